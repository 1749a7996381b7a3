"""Pretraining that is killed again and again ends with the bytes of a run that was left alone."""
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import yaml

pytestmark = pytest.mark.slow
CONFIG = {"data_options": {"n": 40, "size": 96, "seed": 0}, "cache_size": 96, "backbone": "timm:test_resnet", "stages": [0, 2, [3, 4]], "steps": [20, 15, 25], "batch_size": 8, "bank_size": 32,
          "bn_splits": 2, "view_size": 32, "checkpoint_every": 3, "log_every": 2, "val_every": 7, "select": "best", "workers": 1, "threads": 1, "momentum": 0.9}


def command(folder, out):
    return [sys.executable, "-m", "adam_nb.trainer", str(folder/"pretrain.yaml"), "--out", str(folder/out), f"cache={folder/'cache'}"]


@pytest.mark.timeout(900)
def test_killed_at_any_moment(tmp_path):
    (tmp_path/"pretrain.yaml").write_text(yaml.safe_dump(CONFIG))
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    started = time.monotonic()
    subprocess.run(command(tmp_path, "straight"), check=True, env=env, stderr=subprocess.DEVNULL)
    whole = time.monotonic() - started
    rng, kills, log = random.Random(0), 0, tmp_path/"killed"/"log.jsonl"
    for _ in range(40):
        process = subprocess.Popen(command(tmp_path, "killed"), env=env, stderr=subprocess.DEVNULL, start_new_session=True)
        size = log.stat().st_size if log.exists() else 0
        while process.poll() is None and (not log.exists() or log.stat().st_size == size): time.sleep(0.02)    # until it trains
        try: process.wait(rng.uniform(0, whole / 8))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
            continue
        break
    assert process.returncode == 0 and kills >= 2, (process.returncode, kills)
    for name in ("encoder.safetensors", "encoder_last.safetensors"):
        assert (tmp_path/"straight"/name).read_bytes() == (tmp_path/"killed"/name).read_bytes(), name
    from adam_nb.checkpoint import read_log
    untimed = [[{k: v for k, v in e.items() if k not in ("seconds", "waited", "images_per_s")} for e in read_log(tmp_path/out/"log.jsonl")] for out in ("straight", "killed")]
    assert untimed[0] == untimed[1]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_asked_to_stop(tmp_path, number):
    "A signal saves the state and leaves with exit code 75; the same command goes on to the same bytes."
    (tmp_path/"pretrain.yaml").write_text(yaml.safe_dump(CONFIG | {"checkpoint_every": 1000}))
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command(tmp_path, "straight"), check=True, env=env, stderr=subprocess.DEVNULL)
    log, stops = tmp_path/"asked"/"log.jsonl", 0
    for _ in range(20):
        process = subprocess.Popen(command(tmp_path, "asked"), env=env, stderr=subprocess.PIPE, text=True)
        size = log.stat().st_size if log.exists() else 0
        while process.poll() is None and (not log.exists() or log.stat().st_size == size): time.sleep(0.02)
        time.sleep(0.3)
        if process.poll() is None: process.send_signal(number)
        said = process.communicate()[1]
        if process.returncode == 0: break
        assert process.returncode == 75 and f"{number.name} received" in said, (process.returncode, said)
        stops += 1
    assert process.returncode == 0 and stops >= 2, (process.returncode, stops)
    assert (tmp_path/"straight"/"encoder_last.safetensors").read_bytes() == (tmp_path/"asked"/"encoder_last.safetensors").read_bytes()


@pytest.mark.timeout(600)
def test_node_asked_to_stop():
    "A signal to a node of the pipeline reaches its kernel; the node leaves with exit code 75 and a saved state."
    import shutil
    from adam_nb.config import project_root
    from adam_nb.pipeline import write_plan
    name = f"stop_{os.getpid()}"
    folder = project_root()/"outputs"/name
    try:
        plan, _ = write_plan("smoke", ["pretrain.steps=2000"], name)
        node = lambda which: [sys.executable, "-m", "adam_nb.pipeline", "node", str(plan), which]
        subprocess.run(node("prepare"), check=True, cwd=project_root(), stderr=subprocess.DEVNULL)
        process = subprocess.Popen(node("pretrain.adam.seed0.stage0"), cwd=project_root(), stderr=subprocess.PIPE, text=True)
        log = folder/"adam"/"seed0"/"stage0"/"log.jsonl"
        while process.poll() is None and not (log.exists() and '"event": "step"' in log.read_text()): time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=120)[1]
        assert process.returncode == 75 and "SIGTERM received" in said, (process.returncode, said[-500:])
        assert list((log.parent/"checkpoints").glob("step_*.pt"))
    finally: shutil.rmtree(folder, ignore_errors=True)
