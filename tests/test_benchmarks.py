"""The notebooks that measure: at their tiny size they run to the end, and what they write can be read. Their ratios mean nothing there and are not judged."""
import ast
import json
from pathlib import Path

import papermill
import pytest

from adam_nb.config import read_yaml
from adam_nb.results import read_json

NBS = Path(__file__).resolve().parents[1]/"nbs"
BENCHMARK, SCALING = NBS/"benchmarks/pretraining.ipynb", NBS/"tutorials/scaling.ipynb"


def parameters(path: Path) -> dict:
    "Names and defaults in the notebook's one `parameters` cell."
    cells = [c for c in json.loads(path.read_text())["cells"] if "parameters" in c["metadata"].get("tags", [])]
    assert len(cells) == 1
    return {n.targets[0].id: ast.literal_eval(n.value) for n in ast.parse("".join(cells[0]["source"])).body}


@pytest.mark.parametrize("path, full", [(BENCHMARK, NBS/"benchmarks/full.yaml"), (SCALING, NBS/"tutorials/scaling_full.yaml")], ids=["pretraining", "scaling"])
def test_the_full_size_names_parameters_of_the_notebook(path, full):
    defaults, values = parameters(path), read_yaml(full)
    assert set(values) <= set(defaults) and all(type(v) is type(defaults[k]) for k, v in values.items())


def executed(path: Path, out: Path) -> dict:
    papermill.execute_notebook(path, out/"done.ipynb", {"out": str(out)}, kernel_name="python3", start_timeout=300, progress_bar=False, cwd=path.parent)
    assert (out/f"{path.stem}.png").stat().st_size > 5000
    return read_json(out/f"{path.stem}.json")


@pytest.mark.timeout(1800)
@pytest.mark.slow
def test_the_benchmark_measures_every_row(tmp_path):
    rows = executed(BENCHMARK, tmp_path)["rows"]
    for row in rows:
        if row["value"] is None: assert row["name"].startswith("lightly's MoCo") and row["why"] and row["reached"] is None      # no environment with lightly was named
        else: assert row["value"] > 0 and (row["reached"] is not None) == (row["target"] is not None), row
    text = "\n".join(r["name"] for r in rows)
    for part in ("default against default", "Step over bare passes", "Published way", "Input path at 32 px", "Peak memory", "Cache"): assert part in text
    ratio = next(r for r in rows if r["name"].startswith("Published way"))
    assert ratio["value"] == pytest.approx(ratio["ours"]/ratio["theirs"]) and all(len(side) == 1 for side in ratio["runs"].values())


@pytest.mark.timeout(1800)
@pytest.mark.slow
def test_the_scaling_model_is_fitted_and_checked(tmp_path):
    found = executed(SCALING, tmp_path)
    assert {r["ranks"] for r in found["measured"]} == {1, 2} and len(found["held_out"]) == 1
    assert all(w >= 0 for w in found["time_model"].values()) and found["time_model"]["image_pixel"] > 0
    assert found["held_out_error"]["seconds"] < 1 and found["held_out_error"]["bytes"] < 1      # a factor of two, on a loaded machine
    assert [p["images"] for p in found["paper"]] == [112_120, 1_000_000, 10_000_000]
    assert found["paper"][0]["cache_bytes"] == 112_120*(1024**2 + 512**2 + 256**2 + 128**2 + 64**2)
