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
    whole = (OUT/"report.html").read_text()
    page = re.sub(r"base64,[A-Za-z0-9+/=]+", "base64,", whole)       # letters of a picture mean nothing
    assert len(whole) > 20_000 and "http" not in page.replace("http://www.w3.org", "").replace("https://doi.org/", "") and "could not be" not in page
    assert page.count("<img ") + page.count("<svg") >= 8 and not re.search(r'(src|href)="(?!data:|#|https://doi)', page)
    assert "adam_nb embed" in first.stdout and f"Report: outputs/{NAME}/report.html" in first.stdout
    assert "first picture: " in first.stderr
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
    assert time.perf_counter() - t < 30          # 2 to 6 s on a quiet machine; here another test runs beside it


def test_a_locked_checkout_says_so_and_can_be_unlocked(first):
    lock = ROOT/".snakemake"/"locks"/"0.output.lock"
    lock.parent.mkdir(parents=True, exist_ok=True); lock.touch()
    try:
        done = run()
        assert done.returncode == 2 and "adam_nb unlock" in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
        subprocess.run([sys.executable, "-m", "adam_nb.pipeline", "unlock"], cwd=ROOT, check=True, capture_output=True)
        assert not lock.exists() and run().returncode == 0
    finally: lock.unlink(missing_ok=True)


def test_a_node_by_hand(first, tmp_path):
    "papermill with a preset's file, from the project's root and as Run All in JupyterLab would, beside the notebook; a parameter that the notebook does not know is refused by the pipeline."
    import yaml
    from adam_nb.config import AdamError
    from adam_nb.pipeline import check_parameters
    papermill = lambda *args, cwd=ROOT: subprocess.run([sys.executable, "-m", "papermill", "--no-progress-bar", *map(str, args)], cwd=cwd, capture_output=True, text=True)
    small = {"data_options": {"n": 40, "size": 96, "seed": 0}, "cache_size": 96, "cache": str(tmp_path/"cache"), "steps": 2, "batch_size": 8, "bank_size": 32, "backbone": "timm:test_resnet", "out": str(tmp_path/"out")}
    values = yaml.safe_load((ROOT/"params/demo/pretrain.yaml").read_text()) | small
    (tmp_path/"p.yaml").write_text(yaml.safe_dump({k: v for k, v in values.items() if k not in ("val_every",)}))
    done = papermill(ROOT/"nbs/run/pretrain.ipynb", tmp_path/"out.ipynb", "-f", tmp_path/"p.yaml")
    assert done.returncode == 0 and (tmp_path/"out/encoder.safetensors").is_file(), done.stderr[-2000:]
    done = papermill("figures.ipynb", tmp_path/"figures.ipynb", "-p", "folder", f"outputs/{NAME}", "-p", "out", str(tmp_path/"figures"), cwd=ROOT/"nbs/run")
    assert done.returncode == 0 and list((tmp_path/"figures").glob("*.svg")), done.stderr[-2000:]
    said = "".join(t for c in json.loads((tmp_path/"figures.ipynb").read_text())["cells"] for o in c.get("outputs", []) for t in o.get("text", []))
    for line in ("2, what is cut, level by level: decomposition\n", "4.2, compositionality: compositionality\n", "5.3, with and without the pruner: ", "Table 1, few-shot segmentation: tables/few_shot"): assert line in said, line      # which shows what of the paper
    with pytest.raises(AdamError, match="'bank_size'"): check_parameters(ROOT/"nbs/run/pretrain.ipynb", {"bank_sise": 3})


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


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_nine_tasks():
    "Every target task and probe of `phantom_all`, at its smallest, with an arm that is trained and one that is not: all in the tables, none of them empty."
    name = f"all-test-{os.getpid()}"
    images, others = "data_options={n: 40, size: 64, seed: 0}", "data_options={n: 60, size: 64, seed: 1}"
    small = [f"prepare.{images}", "prepare.cache_size=64", f"pretrain.{images}", "pretrain.cache_size=64", "pretrain.stages=[0, 2]", "pretrain.steps=3", "pretrain.batch_size=16", "pretrain.bn_splits=2", "pretrain.bank_size=64",
             "pretrain.view_size=32", "pretrain.warmup_steps=1", "pretrain.val_every=3", "pretrain.checkpoint_every=3", "pretrain.workers=0", f"segment.{others}", "segment.size=64", "segment.steps=2", "classify.data_options={n: 500, size: 64, seed: 1}", "classify.size=64", "classify.steps=2",
             f"probes.{others}", "probes.n_images=8", "probes.n_correspondence=2", "probes.n_patches=30", "probes.grid=[4, 4]", "probes.perplexity=5", "pruning.data_options={n: 60, size: 64, seed: 1}", "pruning.n_images=8"]
    try:
        done = subprocess.run([sys.executable, "-m", "adam_nb.pipeline", "run", "phantom_all", f"name={name}", "arms={adam: {}, random: {untrained: true}}", *small], cwd=ROOT, capture_output=True, text=True, timeout=1500)
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
        out = ROOT/"outputs"/name
        table = (out/"figures"/"tables"/"transfer.md").read_text()
        for task in ("chestxray14", "vindr_cxr", "shenzhen", "chestx_det", "chestx_det_13", "siim_acr", "vindr_ribcxr", "drive", "scr"):
            for arm in ("adam", "random"):
                found = [r for p in (out/arm/"seed0").rglob("*.json") if (r := json.loads(p.read_text())).get("task") == f"{task}_phantom"]
                assert len(found) == 1 and found[0]["runs"] and found[0]["n"]["test_images"] >= 12, (task, arm)
            assert f"{task}_phantom" in table, task
        kinds = {arm: {r["kind"] for p in (out/arm/"seed0").rglob("*.json") if "kind" in (r := json.loads(p.read_text()))} for arm in ("adam", "random")}
        assert kinds["random"] == {"segment", "classify", "locality", "compositionality", "correspondence"} and kinds["adam"] == kinds["random"] | {"pretrain", "pruning"}, kinds
        assert "no data" not in table and "no number" not in table and set(json.loads((out/"figures"/"figures.json").read_text())["tables"]) == {"few_shot", "transfer", "differences"}
    finally: shutil.rmtree(ROOT/"outputs"/name, ignore_errors=True)
