"""The papermill nodes: one `parameters` cell each, named like the config that it fills; presets that fit them."""
import ast
import dataclasses
import json
from pathlib import Path

import pytest

from adam_nb.config import build, digest, read_yaml
from adam_nb.plan import CONFIGS, config_class, plan, preset_names, read_preset

ROOT = Path(__file__).resolve().parents[1]
RUN = sorted((ROOT/"nbs/run").glob("*.ipynb"))


def parameters(path):
    "Names and defaults in the notebook's one `parameters` cell."
    cells = [c for c in json.loads(path.read_text())["cells"] if "parameters" in c["metadata"].get("tags", [])]
    assert len(cells) == 1, f"{path.name} must have exactly one parameters cell, but has {len(cells)}"
    return {n.targets[0].id: ast.literal_eval(n.value) for n in ast.parse("".join(cells[0]["source"])).body}


def test_all_nodes_have_a_notebook():
    assert {p.stem for p in RUN} == {*CONFIGS, "figures", "report"}


@pytest.mark.parametrize("path", RUN, ids=lambda p: p.stem)
def test_one_parameters_cell_that_is_the_config(path):
    found = parameters(path)
    wiring = set(next(n.wiring for n in plan("smoke")[0] if n.notebook == path.stem))
    fields = {f.name for f in dataclasses.fields(config_class(path.stem))} if path.stem in CONFIGS else set()
    assert set(found) == fields | wiring
    if path.stem in CONFIGS:      # the defaults are the smoke size
        smoke = build(config_class(path.stem), read_yaml(ROOT/f"params/smoke/{path.stem}.yaml"))
        assert build(config_class(path.stem), {k: v for k, v in found.items() if k in fields}) == smoke


@pytest.mark.parametrize("path", RUN, ids=lambda p: p.stem)
def test_no_logic_in_a_run_notebook(path):
    "A node calls the library and shows what it did: it defines nothing."
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            kinds = [type(n).__name__ for n in ast.walk(ast.parse("".join(cell["source"])))]
            assert not {"FunctionDef", "ClassDef", "While", "Try"} & set(kinds)


@pytest.mark.parametrize("name", preset_names())
def test_presets_are_valid(name):
    preset, values = read_preset(name)
    assert set(values) >= {"prepare", "pretrain"}
    same = {k: values["pretrain"].get(k) for k in values["prepare"] if k in {f.name for f in dataclasses.fields(config_class("pretrain"))}}
    assert {k: values["prepare"][k] for k in same} == same, f"{name}: prepare.yaml and pretrain.yaml describe different images"


def test_arms_share_what_is_equal():
    nodes, _ = plan("demo")
    stages = [n for n in nodes if n.notebook == "pretrain"]
    first = [n for n in stages if n.wiring["only"] == 0 and n.wiring["init"] is None and not isinstance(n.values["stages"][0], list)]
    assert len(first) == 1, "Adam, Adam without pruner and MoCo-v2 have their first stage in common"
    assert len({digest([n.values, n.wiring["only"], n.wiring["init"]]) for n in stages}) == len(stages)
