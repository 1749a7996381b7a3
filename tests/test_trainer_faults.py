"""Pretraining that is killed again and again ends with the bytes of a run that was left alone."""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
import yaml

from adam_nb import trainer
from adam_nb.checkpoint import checkpoints, load_state, newest_state, read_log, save_state
from adam_nb.config import AdamError
from adam_nb.outcome import state_digest
from adam_nb.schedule import PretrainConfig
from adam_nb.trainer import pretrain

pytestmark = pytest.mark.slow
CONFIG = {"data_options": {"n": 40, "size": 96, "seed": 0}, "cache_size": 96, "backbone": "timm:test_resnet", "stages": [0, 2, [3, 4]], "steps": [20, 15, 25], "batch_size": 8, "bank_size": 32,
          "bn_splits": 2, "view_size": 32, "checkpoint_every": 3, "log_every": 2, "val_every": 7, "select": "best", "workers": 1, "threads": 1, "momentum": 0.9}


def command(folder, out, *more):
    return [sys.executable, "-m", "adam_nb.trainer", str(folder/"pretrain.yaml"), "--out", str(folder/out), f"cache={folder/'cache'}", *more]


@pytest.mark.timeout(900)
def test_killed_at_any_moment(tmp_path):
    (tmp_path/"pretrain.yaml").write_text(yaml.safe_dump(CONFIG))
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    started = time.monotonic()
    subprocess.run(command(tmp_path, "straight"), check=True, env=env, stderr=subprocess.DEVNULL)
    whole = time.monotonic() - started
    rng, kills, log = random.Random(0), [], tmp_path/"killed"/"log.jsonl"
    for _ in range(40):
        process = subprocess.Popen(command(tmp_path, "killed"), env=env, stderr=subprocess.DEVNULL, start_new_session=True)
        size = log.stat().st_size if log.exists() else 0
        while process.poll() is None and (not log.exists() or log.stat().st_size == size): time.sleep(0.02)    # until it trains
        try: process.wait(rng.uniform(0, min(whole / 8, 3)))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills += [e.get("stage") for e in read_log(log)[-1:]]
            continue
        break
    assert process.returncode == 0 and len(kills) >= 2 and len(set(kills)) >= 2, (process.returncode, kills)       # not in one stage alone
    for stage in ("stage0", "stage1"):                          # the states at the borders of stages, which stay
        a, b = (newest_state(tmp_path/run/"stages"/stage/"checkpoints")[1] for run in ("straight", "killed"))
        assert state_digest(a) == state_digest(b) and (a["stage"], a["step"]) == (int(stage[-1]) + 1, 0)
    for name in ("encoder.safetensors", "encoder_last.safetensors"):
        assert (tmp_path/"straight"/name).read_bytes() == (tmp_path/"killed"/name).read_bytes(), name
    ends = [newest_state(tmp_path/out/"checkpoints")[1] for out in ("straight", "killed")]
    assert state_digest(ends[0]) == state_digest(ends[1])                        # twin, heads, bank with ids and pointer too
    untimed = [[{k: v for k, v in e.items() if k not in ("seconds", "waited", "images_per_s")} for e in read_log(tmp_path/out/"log.jsonl")] for out in ("straight", "killed")]
    assert untimed[0] == untimed[1]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("number, whole_group", [(signal.SIGTERM, False), (signal.SIGUSR1, False), (signal.SIGTERM, True), (signal.SIGUSR1, True)])
def test_asked_to_stop(tmp_path, number, whole_group):
    "A signal, also one to the whole process group, workers included, saves the state and leaves with exit code 75; the same command goes on to the same bytes."
    (tmp_path/"pretrain.yaml").write_text(yaml.safe_dump(CONFIG | {"checkpoint_every": 1000, "workers": 2, "steps": [20, 15, 60]}))
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command(tmp_path, "straight"), check=True, env=env, stderr=subprocess.DEVNULL)
    log, stops = tmp_path/"asked"/"log.jsonl", 0
    for _ in range(20):
        process = subprocess.Popen(command(tmp_path, "asked"), env=env, stderr=subprocess.PIPE, text=True, start_new_session=True)
        size = log.stat().st_size if log.exists() else 0
        while process.poll() is None and (not log.exists() or log.stat().st_size == size): time.sleep(0.02)
        time.sleep(0.3)
        if process.poll() is None: os.killpg(process.pid, number) if whole_group else process.send_signal(number)
        said = process.communicate()[1]
        if process.returncode == 0: break
        assert process.returncode == 75 and f"{number.name} received" in said and "Traceback" not in said, (process.returncode, said)
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


@pytest.mark.timeout(600)
@pytest.mark.parametrize("number, whole_group", [(signal.SIGTERM, False), (signal.SIGUSR1, False), (signal.SIGUSR1, True)])
def test_run_asked_to_stop(number, whole_group):
    "A signal to `adam_nb run`, or to its whole process group, reaches the node that trains; the run leaves with exit code 75 and no lock, and the same command goes on from the saved state to its end."
    import shutil
    from adam_nb.config import project_root
    name = f"stop_run_{os.getpid()}"
    folder = project_root()/"outputs"/name
    command = [sys.executable, "-m", "adam_nb.pipeline", "run", "smoke", f"name={name}", "pretrain.steps=[60,40]", "--cores", "1", "--engine=--until pretrain_adam_seed0_stage0"]
    log = folder/"adam"/"seed0"/"stage0"/"log.jsonl"
    try:
        process = subprocess.Popen(command, cwd=project_root(), stderr=subprocess.PIPE, text=True, start_new_session=True)
        while process.poll() is None and not (log.exists() and '"event": "step"' in log.read_text()): time.sleep(0.05)
        os.killpg(process.pid, number) if whole_group else process.send_signal(number)
        said = process.communicate(timeout=120)[1]
        assert process.returncode == 75 and f"adam_nb: {number.name} received" in said and "Traceback" not in said, (process.returncode, said[-1500:])
        saved = max(int(p.stem[5:]) for p in (log.parent/"checkpoints").glob("step_*.pt"))
        assert 0 < saved < 60
        assert subprocess.run(command, cwd=project_root(), stderr=subprocess.DEVNULL).returncode == 0
        steps = [e["step"] for e in read_log(log) if e["event"] == "step"]
        assert steps == sorted(set(steps)) and steps[-1] == 60
    finally: shutil.rmtree(folder, ignore_errors=True)


SHORT = CONFIG | {"stages": [0, 2], "steps": [6, 4], "workers": 0, "select": "last", "val_split": None, "checkpoint_every": 2}


def config(folder, **changes): return PretrainConfig(**SHORT | {"cache": str(folder/"cache")} | changes)


def refused(folder, *words, out="out", **changes):
    "`pretrain` refuses in one sentence with all `words`."
    with pytest.raises(AdamError) as e: pretrain(config(folder, **changes), folder/out, progress=False)
    for word in words: assert word in str(e.value), (word, str(e.value))
    assert "\n" not in str(e.value)


@pytest.mark.timeout(300)
def test_one_process_a_folder(tmp_path):
    "A second process is told, and the first goes on; when the first is killed, with workers or without, the folder is free at once."
    (tmp_path/"pretrain.yaml").write_text(yaml.safe_dump(CONFIG | {"steps": [3000, 1, 1]}))
    env, log = os.environ | {"OMP_NUM_THREADS": "1"}, tmp_path/"out"/"log.jsonl"
    first = subprocess.Popen(command(tmp_path, "out"), env=env, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        while first.poll() is None and not (log.exists() and '"event": "step"' in log.read_text()): time.sleep(0.05)
        second = subprocess.run(command(tmp_path, "out"), env=env, capture_output=True, text=True)
        assert second.returncode == 2 and f"Another process is training into {tmp_path/'out'};" in second.stderr, second.stderr
        assert first.poll() is None
        workers = psutil.Process(first.pid).children()
        os.kill(first.pid, signal.SIGKILL); first.wait()
        assert workers
        third = subprocess.run([sys.executable, "-c", f"from adam_nb.checkpoint import locked\nwith locked({str(tmp_path/'out')!r}): pass"], env=env, capture_output=True, text=True)
        assert third.returncode == 0, third.stderr
        gone, alive = psutil.wait_procs(workers, timeout=30)
        assert not alive                              # workers end by themselves when their parent is no more
    finally:
        if first.poll() is None: os.killpg(first.pid, signal.SIGKILL)


@pytest.mark.timeout(300)
def test_a_killed_worker_is_one_sentence(tmp_path):
    (tmp_path/"pretrain.yaml").write_text(yaml.safe_dump(CONFIG | {"steps": [3000, 1, 1]}))
    log = tmp_path/"out"/"log.jsonl"
    process = subprocess.Popen(command(tmp_path, "out"), env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while process.poll() is None and not (log.exists() and '"event": "step"' in log.read_text()): time.sleep(0.05)
    worker, = psutil.Process(process.pid).children()
    worker.kill()
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 2 and "A process that makes views is gone (" in said and "'workers'" in said and "Traceback" not in said, (process.returncode, said[-800:])


DISK = """
import resource, sys, yaml
from adam_nb.config import AdamError
from adam_nb.schedule import PretrainConfig
from adam_nb.trainer import pretrain
def fill(done):
    if done == int(sys.argv[3]): resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[4]), resource.RLIM_INFINITY))
try: pretrain(PretrainConfig(**yaml.safe_load(open(sys.argv[1]))), sys.argv[2], progress=False, on_step=fill)
except AdamError as e: print(e); sys.exit(2)
"""


@pytest.mark.timeout(300)
@pytest.mark.parametrize("limit, word", [(60_000, "The checkpoint"), (0, "could not be written")])
def test_disk_full(tmp_path, limit, word):
    "No file may grow beyond a limit after the third update: the checkpoint of the second survives, and with room the run goes on to the bytes of one that always had it."
    (tmp_path/"p.yaml").write_text(yaml.safe_dump(SHORT | {"cache": str(tmp_path/"cache")}))
    straight = pretrain(config(tmp_path), tmp_path/"straight", progress=False)
    done = subprocess.run([sys.executable, "-c", DISK, str(tmp_path/"p.yaml"), str(tmp_path/"full"), "3", str(limit)], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 2 and word in done.stdout and done.stdout.count("\n") == 1 and "free some space" in done.stdout, (done.stdout, done.stderr[-800:])
    path, state = newest_state(tmp_path/"full"/"checkpoints")
    assert state["global_step"] == 2 and [p.name for p in path.parent.iterdir()] == [path.name]
    gone_on = pretrain(config(tmp_path), tmp_path/"full", progress=False)
    assert gone_on.encoder_last.read_bytes() == straight.encoder_last.read_bytes()


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path/"file").write_text("")
    refused(tmp_path, "cannot be written to", "file", out="file")
    refused(tmp_path, "cannot be written to", "below", out="file/below")
    (tmp_path/"out").mkdir(); (tmp_path/"out"/"checkpoints").write_text("")
    refused(tmp_path, "checkpoint", "could not be written")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_right_to_write(tmp_path):
    (tmp_path/"out").mkdir(mode=0o500)
    refused(tmp_path, "cannot be written to (Permission denied)")


def test_a_device_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(tmp_path, "'device' is cuda", "cpu", device="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Old GPU")
    refused(tmp_path, "'precision' is bf16", "Old GPU", "fp32", precision="bf16")


def test_checkpoints_of_another_kind(tmp_path):
    "Of a newer version, of another shape, of another run: one sentence each, and the file is left as it was."
    done = pretrain(config(tmp_path, steps=[6, 2]), tmp_path/"out", progress=False)
    path, state = newest_state(done.out/"checkpoints")
    refused(tmp_path, "another dim", "another folder", dim=64, steps=[6, 2])
    refused(tmp_path, "another bank_size", bank_size=64, steps=[6, 2])
    save_state(path, state | {"format": 2})
    refused(tmp_path, str(path), "another version", steps=[6, 2])
    wrong = state | {"finished": False, "stage": 1, "model": {k: v[:-1] if k == "bank.keys" else v for k, v in state["model"].items()}}
    save_state(path, wrong)
    refused(tmp_path, str(done.out), "bank.keys", steps=[6, 2])
    assert load_state(path)["model"]["bank.keys"].shape == wrong["model"]["bank.keys"].shape


def test_begun_from_other_images(tmp_path):
    "Keys of other images are nobody's own: their numbers would hide the wrong ones. The same images again keep their numbers."
    first = pretrain(config(tmp_path, stages=[0], steps=6), tmp_path/"first", progress=False)
    ids = []
    for name, options, warned in (("same", SHORT["data_options"], False), ("others", {"n": 40, "size": 96, "seed": 7}, True)):
        changes = dict(data_options=options, cache=str(tmp_path/f"cache_{name}"), stages=[0], steps=1)
        seen = []
        import adam_nb.trainer as trainer
        train = trainer.train_stage
        def look(run, stage): seen.append(run.model.bank.ids.clone()); train(run, stage)
        with pytest.MonkeyPatch.context() as m:
            m.setattr(trainer, "train_stage", look)
            with pytest.warns(UserWarning) as said: pretrain(config(tmp_path, **changes), tmp_path/name, init=first.out, only=0, progress=False)
        assert any("trained on other images" in str(w.message) for w in said) == warned
        ids.append(seen[0])
    assert (ids[0] >= 0).any() and (ids[1] == -1).all()
    assert any("other images" in e["message"] for e in read_log(tmp_path/"others"/"log.jsonl") if e["event"] == "warning")


def test_torn_files_are_not_counted(tmp_path):
    "With keep: 1 a torn newest file must not push out the state that was just written."
    with pytest.raises(KeyboardInterrupt): pretrain(config(tmp_path, keep=2), tmp_path/"out", progress=False, on_step=lambda done: stop(done, 4))
    newest = checkpoints(tmp_path/"out"/"checkpoints")[-1]
    newest.write_bytes(newest.read_bytes()[:500])
    with pytest.warns(UserWarning, match="cannot be read"), pytest.raises(KeyboardInterrupt): pretrain(config(tmp_path, keep=1), tmp_path/"out", progress=False, on_step=lambda done: stop(done, 3))
    assert [p.name for p in checkpoints(tmp_path/"out"/"checkpoints")] == ["step_00000002.pt"]
    assert newest_state(tmp_path/"out"/"checkpoints")[1]["global_step"] == 2


def stop(done, at):
    if done == at: raise KeyboardInterrupt


def watched(folder: Path) -> list:
    "Update, memory in MB, open files and threads, every 50 of 2,000 updates of a tiny net."
    me, seen = psutil.Process(), []
    def note(done):
        if done % 50 == 0: seen.append((done, me.memory_info().rss / 2**20, me.num_fds(), me.num_threads()))
    pretrain(config(folder, stages=[2], steps=2000, workers=1, val_split="val", val_every=100, checkpoint_every=200, log_every=10, momentum=0.99), folder/"out", progress=False, on_step=note)
    return seen


@pytest.mark.timeout(1800)
def test_nothing_grows(tmp_path):
    "Over 2,000 updates neither memory nor open files nor threads grow: from update 500 on, less than 5 MB in all. In a process of its own, where nothing else is allocated or freed."
    code = f"import json, sys; from pathlib import Path; sys.path.insert(0, {str(Path(__file__).parent)!r}); from test_trainer_faults import watched; print(json.dumps(watched(Path({str(tmp_path)!r}))))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    steps, rss, files, threads = (torch.tensor(column, dtype=torch.float64) for column in zip(*(s for s in json.loads(done.stdout.splitlines()[-1]) if s[0] >= 500)))
    centred = steps - steps.mean()
    growth = float((centred * rss).sum() / centred.square().sum()) * 1500
    print(f"{growth:.2f} MB over 1,500 updates")
    assert growth < 5, f"{growth:.1f} MB over 1,500 updates: {rss.tolist()}"
    assert files.max() - files.min() <= 2 and threads.max() - threads.min() <= 2


def test_a_worker_that_was_left_ends_with_the_interpreter():
    "Workers are deaf to SIGTERM, by which multiprocessing ends what is left: an unfinished generator would hold the interpreter for ever."
    code = "from torch.utils.data import DataLoader\nfrom adam_nb.feed import batches_of\nleft = batches_of(DataLoader(list(range(1000)), num_workers=1))\nprint(next(left))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "") and "tensor" in done.stdout


@pytest.mark.timeout(300)
def test_a_border_that_was_missed_is_made_up_for(tmp_path, monkeypatch):
    "A disk that refuses the second name of a border's state, or a kill before it: the same command makes it. A run begun anew puts its own in the place of the old one's."
    config, real, calls = PretrainConfig(**CONFIG | {"steps": [4, 4, 4], "workers": 0, "cache": str(tmp_path/"cache")}), trainer.second_name, []
    def refuses_once(*names):
        calls.append(names)
        if len(calls) == 1: raise AdamError("no space")
        return real(*names)
    monkeypatch.setattr(trainer, "second_name", refuses_once)
    with pytest.raises(AdamError, match="no space"): pretrain(config, tmp_path/"run", progress=False)
    pretrain(config, tmp_path/"run", progress=False)
    borders = lambda: [(p.parents[1].name, p.name, (s := load_state(p))["stage"], s["step"]) for p in sorted((tmp_path/"run"/"stages").glob("*/checkpoints/*"))]
    assert borders() == [("stage0", "step_00000004.pt", 1, 0), ("stage1", "step_00000008.pt", 2, 0)]
    shutil.rmtree(tmp_path/"run"/"checkpoints")
    pretrain(replace(config, steps=[2, 3, 2]), tmp_path/"run", progress=False)
    assert borders() == [("stage0", "step_00000002.pt", 1, 0), ("stage1", "step_00000005.pt", 2, 0)]
