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
