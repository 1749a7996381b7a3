"""Several processes train as one: the numbers of a single process, the same bytes after a stop, and one clear end when one of them fails."""
import dataclasses
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest
import torch
import yaml

from adam_nb.checkpoint import read_log
from adam_nb.config import AdamError
from adam_nb.schedule import PretrainConfig, check
from adam_nb.trainer import Stopped, pretrain

CONFIG = {"data_options": {"n": 70, "size": 96, "seed": 0}, "cache_size": 96, "backbone": "timm:test_resnet", "stages": [0, [2, 3]], "steps": [12, 14], "batch_size": 16, "bank_size": 40, "bn_splits": 4,
          "view_size": 32, "checkpoint_every": 4, "log_every": 3, "val_every": 5, "workers": 0, "threads": 1, "momentum": 0.9, "precision": "fp32", "dim": 12, "on_collapse": "warn"}
ENV = os.environ | {"OMP_NUM_THREADS": "1"}
RANKS = [sys.executable, "-m", "adam_nb.ranks", "--nproc_per_node=2"]
TRAINER = ["-m", "adam_nb.trainer"]

# Twenty updates in float64 and a validation, by the trainer's own functions; what came out is saved by each rank.
TWENTY = """
import sys, dataclasses, torch, yaml
from pathlib import Path
from adam_nb import ranks
from adam_nb.config import build
from adam_nb.feed import open_cache, stage_loader
from adam_nb.schedule import PretrainConfig, check
from adam_nb.loop import Run, make_optimizer, update, validate
from adam_nb.trainer import _Silent
folder, name, changes = Path(sys.argv[1]), sys.argv[2], yaml.safe_load(sys.argv[3])
with ranks.group():
    config = check(build(PretrainConfig, yaml.safe_load((folder/"p.yaml").read_text()) | {"steps": [10, 10], "cache": str(folder/"cache"), "nproc": ranks.world()} | changes))
    run = Run(config, folder, open_cache(config, folder/name, False), torch.device("cpu"), None, None, False)
    run.model.double(); run.log = _Silent()
    seen = {"loss": [], "val": []}
    for stage in run.stages:
        run.optimizer, run.at.step = make_optimizer(run), 0
        for batch in stage_loader(config, run.cache, run.train, stage):
            assert len(batch[2]) == config.batch_size // ranks.world()
            run.model.train(); update(run, stage, batch)
            seen["loss"].append(run.at.pending[-1].tolist() + [float(run.emptied)])
        seen["val"].append([validate(run, stage)[k] for k in ("loss", "chance", "accuracy")])
    torch.save(seen | {"model": run.model.state_dict()}, folder/f"{name}_{ranks.rank()}.pt")
"""


def files(folder, **changes):
    (folder/"p.yaml").write_text(yaml.safe_dump(CONFIG | changes))
    (folder/"twenty.py").write_text(TWENTY)


def twenty(folder, name, start=(sys.executable,), **changes):
    subprocess.run([*start, str(folder/"twenty.py"), str(folder), name, yaml.safe_dump(changes)], check=True, env=ENV, timeout=240)
    return [torch.load(p, weights_only=True) for p in sorted(folder.glob(f"{name}_*.pt"))]


def difference(a, b):
    "The largest of all differences: losses, validation losses, weights, twin, running statistics, bank, ids. What the log says besides is in float32, and counts a thousandth."
    assert a["model"].keys() == b["model"].keys() and len(a["loss"]) == len(b["loss"]) == 20
    tables = lambda run: [t for k in ("loss", "val") for table in [torch.tensor(run[k], dtype=torch.float64)] for t in (table[:, 0], table[:, 1:] / 1000)]
    pairs = [(a["model"][k].double(), b["model"][k].double()) for k in a["model"]] + list(zip(tables(a), tables(b)))
    return float(torch.stack([(x - y).abs().max() for x, y in pairs]).max())         # torch's maximum of a NaN is NaN, and less than nothing; Python's may pass it over


SGD = {"optimizer": "sgd", "lr": 0.03}        # AdamW divides a vanishing gradient by its own size, and so makes its last digit visible
SWITCHES = {"ours": {}, "each rank in two parts": {"accumulate": 2}, "pruner from the start": {"prune_from": 0, "threshold": 0.5}, "authors": {"recipe": "authors", "stages": [0, 2]}, "four processes": {"nproc": 4}, "eight groups": {"bn_splits": 8, "batch_size": 32, "bank_size": 80}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("twenty")
    files(folder)
    return folder


@pytest.fixture(scope="module")
def alone(folder): return twenty(folder, "alone", **SGD)[0]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n == "ours" else [pytest.mark.slow]) for n in SWITCHES])
def test_two_processes_are_one(folder, alone, name):
    "Also in the validation, whose seven images are not shared evenly."
    changes = {k: v for k, v in SWITCHES[name].items() if k not in ("accumulate", "nproc")}
    one = twenty(folder, f"{name}_one", **SGD | changes)[0] if changes else alone
    n = SWITCHES[name].get("nproc", 2)
    zero, *others = twenty(folder, f"{name}_all", [*RANKS[:-1], f"--nproc_per_node={n}"], **SGD | SWITCHES[name])
    assert 0 < difference(one, zero) < 1e-8 and len(others) == n - 1
    for other in others:
        for k, v in zero["model"].items(): assert torch.equal(v, other["model"][k]), k            # among ranks every bit, running statistics too


@pytest.mark.timeout(600)
@pytest.mark.parametrize("parts", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_batch_in_parts_is_a_batch(folder, alone, parts):
    divided, = twenty(folder, f"in_{parts}", accumulate=parts, **SGD)
    assert 0 < difference(alone, divided) < 1e-8


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_comparison_can_fail(folder, alone):
    "Other groups of batch normalisation give other numbers: what the tests above find equal is not equal by itself."
    other, = twenty(folder, "other", bn_splits=2, **SGD)
    assert difference(alone, other) > 1e-3


def untimed(log): return [{k: v for k, v in e.items() if k not in ("seconds", "waited", "images_per_s")} for e in read_log(log)]


def same_outcome(a, b):
    for name in ("encoder.safetensors", "encoder_last.safetensors"): assert (a/name).read_bytes() == (b/name).read_bytes(), name
    assert untimed(a/"log.jsonl") == untimed(b/"log.jsonl")


def command(folder, out, *more): return [*RANKS, *TRAINER, str(folder/"p.yaml"), "--out", str(folder/out), f"cache={folder/'cache'}", *more]


def started(folder, out, *more, start=command):
    "A run in two processes that has done some updates; the launcher, and its ranks by number."
    log = folder/out/"log.jsonl"
    size = log.stat().st_size if log.exists() else 0
    process = subprocess.Popen(start(folder, out, *more), env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while process.poll() is None and not (log.exists() and log.stat().st_size > size and read_log(log)[-1]["event"] == "step"): time.sleep(0.02)
    assert process.poll() is None, process.communicate()[1]
    return process, {p.environ().get("RANK"): p for p in psutil.Process(process.pid).children()}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_stopped_and_gone_on(tmp_path):
    "SIGKILL to one rank ends the other and the launcher; SIGTERM to one stops both at the same update; at the end stand the bytes of a run that was left alone."
    files(tmp_path, steps=[60, 60], workers=1, checkpoint_every=2)
    subprocess.run(command(tmp_path, "straight"), check=True, env=ENV, stderr=subprocess.DEVNULL)
    for victim in ("1", "0"):
        process, ranks = started(tmp_path, "stopped")
        ranks[victim].send_signal(signal.SIGKILL)
        at = time.monotonic()
        said = process.communicate(timeout=60)[1]
        assert process.returncode == 1 and f"rank {victim} was ended by SIGKILL" in said and "Traceback" not in said, (process.returncode, said)
        assert time.monotonic() - at < 60 and not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in ranks.values())
    for victim in ("1", "0"):
        process, ranks = started(tmp_path, "stopped")
        ranks[victim].send_signal(signal.SIGTERM)
        said = process.communicate(timeout=60)[1]
        assert process.returncode == 75 and said.count("SIGTERM received: the state after update") == 1 and "Traceback" not in said, (process.returncode, said)
    process, _ = started(tmp_path, "stopped")
    process.send_signal(signal.SIGUSR1)                      # to the launcher, as a batch system does
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 75 and "SIGUSR1 received" in said and "Traceback" not in said, (process.returncode, said)
    subprocess.run(command(tmp_path, "stopped"), check=True, env=ENV, stderr=subprocess.DEVNULL)
    same_outcome(tmp_path/"straight", tmp_path/"stopped")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_plain_torchrun(tmp_path):
    "torchrun itself does as well: the same bytes, and an end within a minute when a rank is killed."
    files(tmp_path, steps=[40, 4], checkpoint_every=1)
    torchrun = lambda folder, out, *more: [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", *command(folder, out, *more)[len(RANKS):]]
    subprocess.run(command(tmp_path, "ours"), check=True, env=ENV, stderr=subprocess.DEVNULL)
    process, ranks = started(tmp_path, "theirs", start=torchrun)
    ranks["1"].send_signal(signal.SIGKILL)
    said = process.communicate(timeout=60)[1]
    assert process.returncode and "lost the connection to another process" in said, said
    shutil.copytree(tmp_path/"theirs", tmp_path/"alone")
    alone = subprocess.run([sys.executable, *command(tmp_path, "alone")[len(RANKS):]], env=ENV, capture_output=True, text=True)
    assert alone.returncode == 0 and "began with nproc: 2 and goes on with 1" in alone.stderr, alone.stderr       # allowed, and said
    subprocess.run(torchrun(tmp_path, "theirs"), check=True, env=ENV, stderr=subprocess.DEVNULL)
    same_outcome(tmp_path/"ours", tmp_path/"theirs")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_launchers(tmp_path):
    "Two launchers with a rank each, as on two machines that see one folder, do what one launcher with two ranks does."
    files(tmp_path, steps=[12, 4])
    subprocess.run(command(tmp_path, "one"), check=True, env=ENV, stderr=subprocess.DEVNULL)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    machines = [subprocess.Popen([sys.executable, "-m", "adam_nb.ranks", "--nnodes=2", f"--node_rank={r}", "--nproc_per_node=1", "--master_addr=127.0.0.1", f"--master_port={port}", *command(tmp_path, "two")[len(RANKS):]],
                                 env=ENV, stderr=subprocess.PIPE, text=True) for r in range(2)]
    try: said = [m.communicate(timeout=120)[1] for m in machines]
    finally: [m.kill() for m in machines]
    assert [m.returncode for m in machines] == [0, 0], said
    same_outcome(tmp_path/"one", tmp_path/"two")


def by_hand(folder, *each):
    "Two ranks started one by one, with arguments of their own: exit codes, and what each has said."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    env = ENV | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    ranks = [subprocess.Popen([sys.executable, *TRAINER, str(folder/"p.yaml"), f"cache={folder/'cache'}", *more], env=env | {"RANK": str(r), "LOCAL_RANK": str(r)}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
             for r, more in enumerate(each)]
    said = [p.communicate(timeout=120)[1].strip() for p in ranks]
    return [p.returncode for p in ranks], said


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("zero, one, words", [
    ([], ["lr=0.5", "val_every=7"], "Rank 1 has another lr and val_every than rank 0 (0.5 instead of 0.001, 7 instead of 5); start all ranks with the same parameters."),
    ([], ["lrr=0.5"], "Rank 1: "), (["lr=-1"], ["lr=-1"], "'lr' is -1"), (["bn_splits=1"], ["bn_splits=1"], "'bn_splits' is 1, but must be a multiple of nproc x accumulate = 2 x 1"),
    (["batch_size=9", "bn_splits=3"], ["batch_size=9", "bn_splits=3"], "'batch_size' is 9, which 2 processes"), ([], ["cache_size=64"], "another cache_size"), ([], ["data=no_such"], "another data"),
    ([], ["data_root=/nowhere", "data=phantom_chest"], None), (["lr=1e30", "checkpoint_every=1"], ["lr=1e30", "checkpoint_every=1"], "diverged")])
def test_refused_on_all_ranks(tmp_path, zero, one, words):
    "An error of one rank is an error of all, said once and in one sentence; paths alone may differ."
    files(tmp_path, steps=2, val_split=None)
    out = ["--out", str(tmp_path/"out"), "--quiet"]
    codes, said = by_hand(tmp_path, out + zero, out + one)
    if words is None: assert codes == [0, 0], said; return
    assert codes == [2, 2] and words in said[0] and said[1] == "", (codes, said)
    assert len([line for line in said[0].splitlines() if line.startswith("adam_nb.trainer: ")]) == 1 and "Traceback" not in said[0]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("fault, words", [("bank.keys[5] *= -1", "Rank 1 has another memory bank than rank 0"), ("head[0].weight.data.fill_(float('nan'))", "diverged at update 4 of stage 0")])
def test_a_fault_of_one_rank_stops_all(tmp_path, fault, words):
    (tmp_path/"faulty.py").write_text(f"""
import sys, yaml
from adam_nb import ranks
from adam_nb.config import AdamError
from adam_nb.schedule import PretrainConfig
from adam_nb import trainer
def fault(done):
    if done == 3 and ranks.rank() == 1: runs[0].model.{fault}
runs, make = [], trainer.Run.__init__
def remember(run, *a): runs.append(run); make(run, *a)
trainer.Run.__init__ = remember
with ranks.group():
    try: trainer.pretrain(PretrainConfig(**yaml.safe_load(open(sys.argv[1]))), sys.argv[2], progress=False, on_step=fault)
    except AdamError as e:
        assert {words!r} in str(e) and "update 4" in str(e), e
        sys.exit(9)
    sys.exit("no error")
""")
    files(tmp_path, batch_size=8, bn_splits=2, val_split=None, cache=str(tmp_path/"cache"), data_options={"n": 48, "size": 96, "seed": 0})      # 34 images: four updates an epoch
    done = subprocess.run([*RANKS, str(tmp_path/"faulty.py"), str(tmp_path/"p.yaml"), str(tmp_path/"out")], env=ENV, capture_output=True, text=True)
    assert done.returncode == 9, done.stderr


@pytest.mark.parametrize("values, words", [({"nproc": 3}, "3 processes"), ({"nproc": 2, "bn_splits": 1}, "'bn_splits' is 1"), ({"accumulate": 3}, "1 x 3"), ({"nproc": 4, "accumulate": 2}, "4 x 2"), ({"nproc": 0}, "'nproc'")])
def test_refused_before_the_start(values, words):
    with pytest.raises(AdamError, match=words): check(PretrainConfig(**CONFIG | values))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_from_a_notebook(tmp_path, capfd, monkeypatch):
    "`nproc` starts the processes, passes on what they say, and makes an error of their last word."
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    files(tmp_path, cache=str(tmp_path/"cache"))
    config = PretrainConfig(**yaml.safe_load((tmp_path/"p.yaml").read_text()), nproc=2)
    done = pretrain(config, tmp_path/"notebook")
    said = capfd.readouterr()
    assert "2 processes" in said.err and "stage 1" in said.err and done.encoder.is_file() and done.summary["loss"] > 0
    assert pretrain(config, tmp_path/"notebook", progress=False).summary == done.summary
    subprocess.run(command(tmp_path, "command"), check=True, env=ENV, stderr=subprocess.DEVNULL)
    same_outcome(tmp_path/"notebook", tmp_path/"command")
    with pytest.raises(AdamError, match="another lr; train into another folder"): pretrain(dataclasses.replace(config, lr=0.5), tmp_path/"notebook", progress=False)
    with pytest.raises(AdamError, match="on_step"): pretrain(config, tmp_path/"other", on_step=print)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_notebook_that_is_stopped(tmp_path, monkeypatch):
    "A signal to the calling process reaches the ranks, whose state is saved; a caller that is killed leaves no ranks behind."
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    files(tmp_path, cache=str(tmp_path/"cache"), steps=[300, 300])
    calling = lambda folder, out: [sys.executable, *TRAINER, str(folder/"p.yaml"), "--out", str(folder/out), "nproc=2"]
    process, children = started(tmp_path, "asked", start=calling)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 75 and "adam_nb.trainer: SIGTERM received: the state after update" in said, (process.returncode, said)
    process, children = started(tmp_path, "asked", start=calling)
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    gone, alive = psutil.wait_procs(family, timeout=60)
    assert len(family) >= 3 and not alive
    process.stderr.close()
