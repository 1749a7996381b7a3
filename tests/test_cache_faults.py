"""Faults that a notebook cannot show on itself: a cache survives the kill of its process at any moment."""
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from adam_nb.cache import prepare
from adam_nb.data import dataset

OPTIONS = {"n": 60, "size": 128, "seed": 3}
SCRIPT = """
import sys
from adam_nb.cache import prepare
from adam_nb.data import dataset
prepare(dataset("phantom_chest", n=60, size=128, seed=3), sys.argv[1], 96, workers=2, progress=False)
"""


def children(pid):
    "Processes (Linux) whose parent is `pid`."
    out = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try: fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError: continue
        if int(fields[1]) == pid: out.append(int(stat.parent.name))
    return out


def alive(pid):
    try: return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError: return False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
@pytest.mark.timeout(300)
def test_cache_survives_kill(tmp_path):
    straight = prepare(dataset("phantom_chest", **OPTIONS), tmp_path/"straight", 96, workers=0, progress=False)
    out, journal, rng, seen = tmp_path/"killed", tmp_path/".killed.partial"/"journal.bin", random.Random(0), 0
    for _ in range(3):
        run = subprocess.Popen([sys.executable, "-c", SCRIPT, str(out)], env={**os.environ, "OMP_NUM_THREADS": "1"})
        deadline = time.time() + 60
        while time.time() < deadline and run.poll() is None and not (journal.exists() and journal.stat().st_size > seen): time.sleep(.01)
        time.sleep(rng.uniform(0, .5))
        workers = children(run.pid)
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
        seen = journal.stat().st_size if journal.exists() else seen
        deadline = time.time() + 20
        while any(map(alive, workers)) and time.time() < deadline: time.sleep(.1)
        assert not any(map(alive, workers)), "a worker outlived its parent"
        if out.exists(): break
        assert seen > 0
    resumed = prepare(dataset("phantom_chest", **OPTIONS), out, 96, workers=0, progress=False)
    assert resumed.hash == straight.hash
    assert all((resumed.image(i) == straight.image(i)).all() for i in range(len(straight)))
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
