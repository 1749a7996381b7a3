"""The tutorials, each executed by papermill from top to bottom with small parameters; what they leave behind is looked at."""
import ast
import csv
import json
import re
import time
from pathlib import Path

import papermill
import pytest

ROOT = Path(__file__).resolve().parents[1]
TUTORIALS = {p.stem: p for p in sorted((ROOT/"nbs/tutorials").glob("*.ipynb"))}
SMALL = {
    "own_data": dict(n_films=16, film_size=96, n_masks=3, updates=2, batch_size=12, view_size=32, steps=6, size=32),
    "start_here": dict(n_films=30, film_size=96, updates=2, batch_size=12, view_size=32),
    "pretrain_on_your_images": dict(n_films=20, film_size=96, updates=3, batch_size=12, view_size=32),
    "read_a_probe_card": dict(n_films=30, film_size=96, updates=2, batch_size=12, n_images=4, n_correspondence=2, n_patches=12),
    "run_on_a_cluster": dict(updates=10, batch_size=12, wait=3),
    "add_a_data_set": dict(n_films=12, film_size=64, steps=4, size=32),
    "add_a_backbone": dict(n_films=30, film_size=64, updates=2, batch_size=12),
}


def cells(path): return json.loads(path.read_text())["cells"]
def parameters(path):
    "Names and values of the one `parameters` cell."
    found = [c for c in cells(path) if "parameters" in c["metadata"].get("tags", [])]
    assert len(found) == 1, f"{path.name} must have exactly one parameters cell, but has {len(found)}"
    return {n.targets[0].id: ast.literal_eval(n.value) for n in ast.parse("".join(found[0]["source"])).body}


@pytest.mark.parametrize("name", TUTORIALS)
def test_form(name):
    "Title, a table of contents whose links lead to headings and whose rows say how long they take, and parameters that the test knows."
    prose = ["".join(c["source"]) for c in cells(TUTORIALS[name]) if c["cell_type"] == "markdown"]
    assert prose[0].startswith("# ") and "takes" in prose[1]
    links = re.findall(r"\]\(#(.+)\) \|", prose[1])
    heads = {h.strip().replace(" ", "-") for text in prose for h in re.findall(r"^## (.+)$", text, re.M)}
    assert len(links) >= 4 and set(links) <= heads, set(links) - heads
    known = parameters(TUTORIALS[name])
    assert known["out"].startswith("outputs/tutorials/") and set(SMALL.get(name, {})) < set(known)
    assert "skip_exec: true" in "".join(cells(TUTORIALS[name])[0]["source"])      # nbdev_test would run it a second time, at full size


def execute(name, folder):
    "The executed notebook's text output, and the seconds it took; `folder` is its `out`."
    start = time.perf_counter()
    done = papermill.execute_notebook(str(TUTORIALS[name]), str(folder/f"{name}.ipynb"), {"out": str(folder/"out"), **SMALL[name]}, cwd=str(ROOT), kernel_name="python3", progress_bar=False)
    said = "".join("".join(o.get("text", "")) for c in done.cells for o in c.get("outputs", []) if o.output_type == "stream" and o.name == "stdout")
    return said, done, time.perf_counter() - start


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", SMALL)
def test_tutorial(name, tmp_path, monkeypatch):
    monkeypatch.setenv("ADAM_NB_TEXT_PROGRESS", "1")
    said, done, seconds = execute(name, tmp_path)
    print(f"{name}: {seconds:.1f} s")
    assert seconds <= 90, seconds           # 30 on a quiet machine of two cores; the tests run side by side
    pictures = sum("image/png" in o.get("data", {}) for c in done.cells for o in c.get("outputs", []))
    assert pictures >= {"run_on_a_cluster": 0, "add_a_backbone": 1}.get(name, 2), pictures
    CHECKS[name](said, tmp_path/"out")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", TUTORIALS)
def test_two_minutes_at_its_own_size(name, tmp_path):
    start = time.perf_counter()
    papermill.execute_notebook(str(TUTORIALS[name]), str(tmp_path/f"{name}.ipynb"), {"out": str(tmp_path/"out")}, cwd=str(ROOT), kernel_name="python3", progress_bar=False)
    print(f"{name}: {(seconds := time.perf_counter() - start):.1f} s")
    assert seconds <= 120, seconds


def own_data(said, out):
    rows = list(csv.DictReader((out/"segmented/segmentation.csv").open()))
    scores = [float(r["uncertainty"]) for r in rows]
    assert len(rows) == 16 and scores == sorted(scores, reverse=True) and sum(r["trained_on"] == "yes" for r in rows) == 3
    assert len(list((out/"segmented/masks").glob("*.png"))) == 16 and (out/"segmented/overlay.png").is_file()
    assert "fitted to 3 images (13 more have no mask)" in said and "with 6 masks" in said


def pretrained(said, out): assert (out/"pretrained/encoder.safetensors").is_file()


def pretrain_on_your_images(said, out):
    assert "stopped; on disk" in said and (out/"run/encoder.safetensors").is_file()
    steps = [json.loads(line) for line in (out/"run/log.jsonl").read_text().splitlines()]
    assert max(e["global_step"] for e in steps if e["event"] == "step") == 9


def read_a_probe_card(said, out):
    card = json.loads((out/"trained/card.json").read_text())
    assert {r["probe"] for r in card["rows"]} == {"locality", "compositionality", "correspondence"} and (out/"cards.html").is_file()


def run_on_a_cluster(said, out):
    assert "exit code 75" in said and "exit code 0; updates in the log: 1 to 10, each once: True" in said, said


def add_a_data_set(said, out): assert "hospital in" in said and "usable" in said and "There is no folder" in said and "Dice of the heart" in said
def add_a_backbone(said, out): assert (out/"pretrained/encoder.safetensors").is_file() and "There is no backbone 'resnet19'" in said


CHECKS = {"own_data": own_data, "start_here": pretrained, "pretrain_on_your_images": pretrain_on_your_images, "read_a_probe_card": read_a_probe_card, "run_on_a_cluster": run_on_a_cluster,
          "add_a_data_set": add_a_data_set, "add_a_backbone": add_a_backbone}


def test_every_tutorial_is_tested(): assert set(TUTORIALS) - {"scaling"} == set(SMALL) == set(CHECKS)      # scaling.ipynb has a test of its own
