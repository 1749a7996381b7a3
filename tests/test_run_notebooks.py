"""The papermill nodes: one `parameters` cell each, named like the config that it fills; presets that fit them."""
import ast
import dataclasses
import json
from pathlib import Path

import pytest

from adam_nb.config import AdamError, build, digest, read_yaml, to_dict
from adam_nb.plan import CONFIGS, plan, preset_names, read_preset
from adam_nb.schedule import PretrainConfig, check
from adam_nb.tasks import task

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
    fields = {f.name for f in dataclasses.fields(CONFIGS[path.stem])} if path.stem in CONFIGS else set()
    assert set(found) == fields | wiring
    if path.stem in CONFIGS:      # the defaults are the smoke size
        smoke = build(CONFIGS[path.stem], read_yaml(ROOT/f"params/smoke/{path.stem}.yaml"))
        assert build(CONFIGS[path.stem], {k: v for k, v in found.items() if k in fields}) == smoke


@pytest.mark.parametrize("path", RUN, ids=lambda p: p.stem)
def test_no_logic_in_a_run_notebook(path):
    "A node calls the library and shows what it did: it defines nothing."
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            kinds = [type(n).__name__ for n in ast.walk(ast.parse("".join(cell["source"])))]
            assert not {"FunctionDef", "ClassDef", "While", "Try"} & set(kinds)


@pytest.mark.parametrize("name", preset_names())
def test_presets_can_be_planned(name, tmp_path, monkeypatch):
    "Every preset, with its data sets at hand, becomes nodes that leave nothing to the notebooks' own defaults."
    preset, values = read_preset(name)
    assert set(values) >= {"prepare", "pretrain"}
    monkeypatch.setenv("ADAM_NB_DATA", str(tmp_path))
    for folder in {*preset.needs, *preset.optional.values()}: (tmp_path/folder).mkdir()
    for notebook in CONFIGS:      # papermill -f with such a file alone must not meet the smoke size's defaults
        if notebook in values: assert set(read_yaml(ROOT/f"params/smoke/{notebook}.yaml")) <= set(values[notebook]), (name, notebook)
    nodes, remarks = plan(name)
    assert all("there is no weight file" in r for r in remarks) and len({n.name for n in nodes}) == len({n.output for n in nodes}) == len(nodes)
    images = next(n.values for n in nodes if n.notebook == "prepare")
    for n in nodes:      # what is tested was not pretrained on: the same split of the same films, or other phantoms
        data, options = n.values.get("data") or (task(n.values["task"]).dataset if "task" in n.values else None), n.values.get("data_options")
        if n.notebook in ("segment", "classify", "probes", "pruning") and data == images["data"] and not n.name.endswith(".labels"):      # that one is an arm's pretraining
            assert options["seed"] != images["data_options"]["seed"] if data.startswith("phantom") else options == images["data_options"], n.name
    made = set()
    for n in nodes:      # each node's inputs are made by nodes before it
        assert set(n.inputs) <= made, n.name
        made.add(n.output)
        assert set(n.values) | set(n.wiring) == set(parameters(ROOT/f"nbs/run/{n.notebook}.ipynb")), n.name


PUBLISHED = dict(      # the paper, section 3, and its authors' public settings
    stages=[0, 2, 4], steps=None, epochs=200, backbone="resnet50", in_channels=3, dim=128, batch_size=256, bn_splits=4, bank_size=65536, momentum=0.999, temperature=0.2, threshold=0.8, prune_from=1, exclude_own=False,
    view_size=224, crop_scale=[0.2, 1.0], rotation=30, rotation_fill="zero", brightness=0.4, contrast=0.4, jitter_p=0.8, blur=[0.1, 2.0], blur_p=0.5,
    optimizer="sgd", lr=0.03, sgd_momentum=0.9, weight_decay=1e-4, warmup_steps=0, schedule="cosine_epoch", select="best")


@pytest.mark.parametrize("name, more", [("paper_cxr", {"data": "chestxray14", "data_options": {"split_by": "official"}}), ("paper_fundus", {"data": "eyepacs", "saturation": 0.4, "hue": 0.1})])
def test_paper_presets_are_the_paper(name, more):
    "What is checked before a run has the published values; only what grey films cannot show (saturation, hue) is left out."
    config = check(build(PretrainConfig, read_preset(name)[1]["pretrain"], name))
    assert {k: v for k, v in to_dict(config).items() if k in PUBLISHED | more} == PUBLISHED | more
    assert config.crop_ratio == (3/4, 4/3) and config.recipe == "ours" and config.accumulate == config.nproc == 1


def test_other_images_for_an_arm_are_refused(monkeypatch):
    import adam_nb.plan
    preset, values = read_preset("smoke")
    monkeypatch.setattr(adam_nb.plan, "read_preset", lambda *_: (dataclasses.replace(preset, arms={"adam": {"cache_size": 64}}), values))
    with pytest.raises(AdamError, match="cache_size"): plan("smoke")


def test_what_cannot_change_the_weights_does_not_change_a_stage():
    keys = [[n.key for n in plan("smoke", [pair], "x")[0] if n.notebook == "pretrain"] for pair in ("workers=0", "workers=1", "pretrain.log_every=3", "pretrain.lr=0.1")]
    assert keys[0] == keys[1] == keys[2] and not set(keys[0]) & set(keys[3])


def test_arms_share_what_is_equal():
    nodes, _ = plan("demo")
    stages = [n for n in nodes if n.notebook == "pretrain"]
    first = [n for n in stages if n.wiring["only"] == 0 and n.wiring["init"] is None and not isinstance(n.values["stages"][0], list)]
    assert len(first) == 1, "Adam, Adam without pruner and MoCo-v2 have their first stage in common"
    assert len({digest([n.values, n.wiring["only"], n.wiring["init"]]) for n in stages}) == len(stages)


@pytest.mark.parametrize("path", sorted((ROOT/"params/tasks").glob("*.yaml")), ids=lambda p: p.stem)
def test_each_task_has_its_published_protocol_written_out(path):
    "Every setting of the task's run notebook, as `protocol: published` fills it."
    from adam_nb.protocols import filled
    job, values = task(path.stem), read_yaml(path)
    kind = CONFIGS[job.kind]
    config = build(kind, values, str(path))
    assert set(values) == {f.name for f in dataclasses.fields(kind)} and config.protocol == "published" and config.task == path.stem
    bare = {k: v for k, v in values.items() if k not in job.published}
    assert filled(build(kind, bare), job) == config


def test_every_task_on_real_data_has_such_a_file():
    from adam_nb.tasks import TASKS
    assert {p.stem for p in (ROOT/"params/tasks").glob("*.yaml")} == {n for n in TASKS if not n.endswith("_phantom")}
