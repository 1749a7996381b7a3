"""The whole pipeline at its smallest, in a folder of its own: it ends, does nothing twice, and reruns only what a change touches."""
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NAME = f"smoke-test-{os.getpid()}"
OUT = ROOT/"outputs"/NAME


def run(*args): return subprocess.run([sys.executable, "-m", "adam_nb.pipeline", "run", "smoke", *args, f"name={NAME}"], cwd=ROOT, capture_output=True, text=True, timeout=900)


def ran(done): return re.findall(r"^\[\d+/\d+\] (\S+)$", done.stderr.replace("\r", "\n"), re.M)


@pytest.fixture(scope="module")
def first():
    try:
        done = run()
        assert done.returncode == 0, done.stderr[-3000:]
        yield done
    finally: shutil.rmtree(OUT, ignore_errors=True)


def test_it_ends_with_a_report(first):
    page = (OUT/"report.html").read_text()
    assert len(page) > 20_000 and "http://" not in page.replace("http://www.w3.org", "")
    assert "adam_nb embed" in first.stdout
    plan = json.loads((OUT/"plan.json").read_text())
    assert sorted(ran(first)) == sorted(n["name"] for n in plan["nodes"])
    for node in plan["nodes"]: assert (ROOT/node["output"]).is_file() and (ROOT/node["folder"]/"notebooks"/f"{node['name']}.ipynb").is_file()


def test_every_result_says_where_it_comes_from(first):
    results = [r for p in OUT.glob("*/seed*/**/*.json") if "kind" in (r := json.loads(p.read_text()))]      # beside them lie the cards of kept embeddings
    assert {r["kind"] for r in results} == {"pretrain", "segment", "classify", "locality", "compositionality", "correspondence", "pruning"}
    for r in results:
        assert r["arm"] and r["config"] and r["versions"]["torch"] and r["data"]["hash"] and r["wall_time_s"] > 0 and "pretrain_seed" in r["seeds"], r["kind"]


def test_the_embedding_of_ones_own_image(first, tmp_path):
    from PIL import Image
    import numpy as np
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 90), dtype=np.uint8)).save(tmp_path/"film.png")
    done = subprocess.run([sys.executable, "-m", "adam_nb.pipeline", "embed", str(OUT/"adam/seed0/stage1/encoder.safetensors"), str(tmp_path/"film.png"), "--out", str(tmp_path/"e.csv")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    head, row = (tmp_path/"e.csv").read_text().splitlines()
    assert len(head.split(",")) == len(row.split(",")) == 513


def test_a_second_run_does_nothing(first):
    t = time.perf_counter()
    done = run()
    assert done.returncode == 0 and ran(done) == [], done.stderr
    assert time.perf_counter() - t < 30          # 10 s on a quiet machine


def test_a_change_reruns_what_it_touches(first):
    done = run("segment.steps=1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted({n.split(".")[0] for n in ran(done)}) == ["figures", "report", "segment"]


def test_a_failing_node_says_so_and_leaves_the_rest(first):
    before = {p: p.stat().st_mtime_ns for p in OUT.glob("*/seed*/**/*.json") if p.name != "scr_phantom.json"}
    done = run("segment.data_options={n: 3, size: 128, seed: 1}")
    said = done.stdout + done.stderr
    assert done.returncode != 0 and "Traceback" not in said and "segment." in said, said[-3000:]
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert any("AdamError" in p.read_text() for p in (OUT/"notebooks").glob("segment.*.ipynb"))
