"""Bad input to the target tasks: one sentence that names file or key and remedy, and nothing already computed is lost."""
import dataclasses
import json
import warnings

import numpy as np
import pytest
from PIL import Image

from adam_nb.classify import ClassifyConfig, run_classify
from adam_nb.compare import collect
from adam_nb.config import AdamError
from adam_nb.finetune import load_arrays
from adam_nb.layouts import file_record
from adam_nb.model import create_encoder
from adam_nb.protocols import parts_of
from adam_nb.records import Records
from adam_nb.results import read_results, write_result
from adam_nb.runs import read_run
from adam_nb.segment import SegmentConfig, finetune_segmenter, run_segment
from adam_nb.tasks import TASKS, Task, task
from adam_nb.transfer import absent_tasks, standings

pytestmark = pytest.mark.usefixtures("one_thread")
OPTIONS = {"n": 40, "size": 64, "seed": 0}
SEGMENT = SegmentConfig(task="heart_scr_phantom", data_options=OPTIONS, size=32, shots=[2], steps=1, threads=1)
CLASSIFY = ClassifyConfig(data_options=OPTIONS, size=32, steps=1, methods=["knn"], threads=1)


def refused(call, *words):
    with pytest.raises(AdamError) as e: call()
    for w in words: assert w in str(e.value), f"{w!r} is missing in: {e.value}"
    assert str(e.value).count("\n") == 0


def changed(monkeypatch, name, change):
    "A task whose records are changed by `change` after loading."
    class Changed(Task):
        def load(self, *a, **kw):
            records = super().load(*a, **kw)
            change(records)
            return records
    monkeypatch.setitem(TASKS, name, Changed(**{f.name: getattr(task(name), f.name) for f in dataclasses.fields(Task)}))


def test_a_class_without_a_positive_in_test_is_named_and_left_out(monkeypatch, tmp_path):
    def none_in_test(records):
        for i, r in enumerate(records): r.labels = {n: float(i % 2) for n in r.labels} | ({"nodule": 0.0} if r.split == "test" else {})
    changed(monkeypatch, "findings_phantom", none_in_test)
    res = run_classify(dataclasses.replace(CLASSIFY, data_options=OPTIONS | {"n": 120}), progress=False)
    m = res["runs"][0]["metrics"]["knn"]
    assert m["too_few"] == {"nodule": {"positive": 0, "negative": 24}} and np.isnan(m["auroc"]["nodule"]) and m["classes"] == 5 and np.isfinite(m["auroc_mean"])
    write_result(tmp_path/"r.json", res)
    assert json.loads((tmp_path/"r.json").read_text())["runs"][0]["metrics"]["knn"]["auroc"]["nodule"] is None


@pytest.mark.parametrize("run, config, name", [(run_segment, SEGMENT, "heart_scr_phantom"), (run_classify, CLASSIFY, "findings_phantom")])
def test_a_test_patient_among_the_training_films_is_refused(monkeypatch, run, config, name):
    def leak(records): next(r for r in records if r.split == "test").patient = next(r for r in records if r.split == "train").patient
    changed(monkeypatch, name, leak)
    refused(lambda: run(config, progress=False), "1 patients are in train and test", "mend the split")


def test_a_validating_patient_is_never_drawn(monkeypatch):
    def leak(records): next(r for r in records if r.split == "val").patient = next(r for r in records if r.split == "train").patient
    changed(monkeypatch, "heart_scr_phantom", leak)
    refused(lambda: run_segment(dataclasses.replace(SEGMENT, patience=1, val_every=1), progress=False), "train and validation")
    run_segment(SEGMENT, progress=False)                    # who validates nothing has no validation part


def test_more_shots_than_patients(): refused(lambda: run_segment(dataclasses.replace(SEGMENT, shots=[2, 29]), progress=False), "29 shots", "28 patients")


def film(folder, mask):
    "A film and a mask as files, as a record with the mask heart."
    for name, x in (("film.png", np.arange(64, dtype=np.uint8).reshape(8, 8)), ("mask.png", mask)): Image.fromarray(x).save(folder/name)
    return Records([file_record(str(folder/"film.png"), "ann", masks={"heart": str(folder/"mask.png")})], name="own")

def test_a_mask_with_unknown_labels(tmp_path):
    records = film(tmp_path, (np.arange(64, dtype=np.uint8) % 4).reshape(8, 8))
    refused(lambda: load_arrays(records, "heart_scr", 32), "mask.png", "labels 0, 1, 2, 3", "a mask of its own")

def test_a_mask_that_the_task_does_not_know(tmp_path):
    refused(lambda: load_arrays(film(tmp_path, np.full((8, 8), 255, np.uint8)), "lungs_scr", 32), "film.png", "left_lung", "Add the mask")

def test_a_label_that_is_no_label(monkeypatch):
    def grades(records): records[3].labels = {n: 2.0 for n in records[3].labels}
    changed(monkeypatch, "findings_phantom", grades)
    refused(lambda: run_classify(CLASSIFY, progress=False), "has the value 2", "0, 1 or unknown")


def blank(records):
    for r in records: r.load_masks = lambda: {"heart": np.zeros((64, 64), bool)}

def test_empty_masks_in_training(monkeypatch):
    changed(monkeypatch, "heart_scr_phantom", blank)
    refused(lambda: run_segment(SEGMENT, progress=False), "all masks of the 2 training films are empty", "check the masks' files")

def test_a_draw_of_empty_masks_costs_no_other_draw(monkeypatch, tmp_path):
    config = dataclasses.replace(SEGMENT, draw_seeds=[0, 1, 2])
    drawn = {tuple(r["train_paths"]): r["draw_seed"] for r in run_segment(config, progress=False)["runs"]}
    bare = next(paths for paths, s in drawn.items() if s == 1)
    changed(monkeypatch, "heart_scr_phantom", lambda records: blank([r for r in records if str(r.path) in bare]))
    res = run_segment(config, progress=False, out=tmp_path/"adam/seed0/r.json")
    one = res["runs"][1]
    assert one["status"] == "all masks of the 2 training films are empty" and one["metrics"] == {} and [r["draw_seed"] for r in res["runs"] if r["metrics"]] == [0, 2] and res["n"]["empty_draws"] == 1
    assert res["metrics"]["heart/dice_image/2"] == pytest.approx(np.mean([r["metrics"]["heart"]["dice_image"] for r in res["runs"] if r["metrics"]]))
    write_result(tmp_path/"adam/seed0/r.json", res)
    (got,) = standings(read_run(tmp_path))
    assert got["arms"]["random"]["n"] == 2


def test_random_weights_under_another_name(tmp_path):
    for run, config in ((run_segment, SEGMENT), (run_classify, CLASSIFY)):
        refused(lambda: run(config, arm="adam", progress=False), "Arm adam has no encoder", "set untrained to true")
    assert run_segment(SEGMENT, arm="small", untrained=True, progress=False)["arm"] == "small"


def test_a_published_few_shot_run_draws_the_films_of_the_fixed_one():
    config = dataclasses.replace(SEGMENT, shots=[3, 6])
    fixed = run_segment(config, progress=False)
    published = run_segment(dataclasses.replace(config, protocol="published", size=32, epochs=1, patience=1, steps=None, batch_size=4), progress=False)
    assert all("val_loss" in r["series"] for r in published["runs"]) and published["n"]["val_images"] > 0 == fixed["n"]["val_images"]
    there = {str(r.path) for r in parts_of(task(config.task), config, True)[0]}
    for a, b in zip(fixed["runs"], published["runs"]):
        assert len(set(b["train_paths"])) == b["shots"]
        kept = [p for p in a["train_paths"] if p in there]           # all but those that validate
        assert b["train_paths"][:len(kept)] == kept and len(kept) > 0


def test_empty_masks_in_test_are_counted_and_said(monkeypatch, tmp_path):
    changed(monkeypatch, "heart_scr_phantom", lambda records: blank([r for r in records if r.split == "test"]))
    res = run_segment(SEGMENT, progress=False, out=tmp_path/"r.json")
    assert res["truth"] == {"heart": {"images": 8, "empty": 8}}
    with np.load(tmp_path/"r_predictions/shots2_draw0.npz") as z: found = np.unpackbits(z["predictions"], count=8 * 32 * 32).reshape(8, -1).any(1)
    assert np.isnan(res["runs"][0]["metrics"]["heart"]["dice_pooled"]) and np.isnan(res["runs"][0]["metrics"]["heart"]["iou_pooled"])
    assert res["runs"][0]["metrics"]["heart"]["dice_image"] == pytest.approx(1 - found.mean())      # 1 where nothing is found on an empty mask, else 0


def test_a_rib_that_was_drawn_on_no_test_film_has_no_number(monkeypatch, tmp_path):
    def lose(records):
        for r in records:
            if r.split == "test":
                load = r.load_masks
                r.load_masks = lambda load=load: {n: m for n, m in load().items() if n != "rib_l7"}
    changed(monkeypatch, "vindr_ribcxr_phantom", lose)
    res = run_segment(dataclasses.replace(SEGMENT, task="vindr_ribcxr_phantom"), progress=False)
    scores = res["runs"][0]["metrics"]
    assert np.isnan(scores["rib_l7"]["dice_image"]) and np.isfinite(scores["rib_r7"]["dice_image"]) and res["truth"]["rib_l7"]["images"] == 0
    write_result(tmp_path/"r.json", res)
    assert not collect(tmp_path).value.isna().all()


def test_an_encoder_of_another_input_size():
    vit = create_encoder("timm:vit_tiny_patch16_224", 1, seed=0)
    refused(lambda: run_classify(dataclasses.replace(CLASSIFY, size=40), vit, progress=False), "40 × 40", "choose a size")
    refused(lambda: run_segment(dataclasses.replace(SEGMENT, size=40), progress=False), "size is 40", "divisible by 32")
    refused(lambda: run_segment(SEGMENT, vit, progress=False), "No U-Net can be built around timm:vit_tiny", "ResNet")

def test_an_encoder_of_another_channel_count():
    eyes = dataclasses.replace(SEGMENT, task="drive_phantom", data_options=OPTIONS | {"n": 20})
    refused(lambda: run_segment(eyes, progress=False), "channel")
    assert run_segment(dataclasses.replace(eyes, grey=True), progress=False)["channels"] == ["vessel"]       # the remedy
    assert run_segment(SEGMENT, in_channels=3, progress=False)["encoder"]["in_channels"] == 3                # grey films for an encoder of colours are no loss


REAL = sorted(n for n in TASKS if not n.endswith("_phantom"))

@pytest.mark.parametrize("name", REAL)
def test_a_missing_data_set_is_refused_or_noted(name, tmp_path, monkeypatch):
    monkeypatch.setenv("ADAM_NB_DATA", str(tmp_path/"none"))
    run, config = (run_segment, SEGMENT) if task(name).kind == "segment" else (run_classify, CLASSIFY)
    config = dataclasses.replace(config, task=name, data_options={})
    refused(lambda: run(config, progress=False), f"Task {name}: no data: get", "http", "if_missing")
    write_result(tmp_path/"adam/t.json", run(dataclasses.replace(config, if_missing="note"), arm="adam", progress=False))
    (read,) = read_run(tmp_path).results                    # a result like any other, without a number
    assert read["status"].startswith("no data: get") and read["task"] == name and read["metrics"] == {} == read["series"] and len(read_results(tmp_path)) == 1
    assert absent_tasks(read_run(tmp_path)) == {name: read["status"]}      # what the table of tasks shows


def test_what_is_computed_stays(tmp_path, monkeypatch):
    "A study that breaks off in its second run keeps the first; a damaged file costs its own run alone."
    import adam_nb.segment as room
    real, calls = finetune_segmenter, []
    def count(*a, **kw):
        calls.append(kw["draw_seed"])
        if kw["draw_seed"] == 1 and len(calls) == 2: raise KeyboardInterrupt
        return real(*a, **kw)
    monkeypatch.setattr(room, "finetune_segmenter", count)
    study, out = dataclasses.replace(SEGMENT, draw_seeds=[0, 1, 2]), tmp_path/"r.json"
    with pytest.raises(KeyboardInterrupt): run_segment(study, out=out, progress=False)
    first = run_segment(study, out=out, progress=False)
    assert calls == [0, 1, 1, 2]
    (tmp_path/"r_predictions/shots2_draw1.npz").write_bytes(b"PK torn")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        again = run_segment(study, out=out, progress=False)
    assert calls == [0, 1, 1, 2, 1] and any("damaged" in str(w.message) for w in said)
    assert [r["metrics"] for r in again["runs"]] == [r["metrics"] for r in first["runs"]]
    run_segment(dataclasses.replace(study, lr=1e-4), out=out, progress=False)
    assert len(calls) == 8                                  # other settings: nothing of the old is taken


def test_torn_decoded_films_are_named(tmp_path):
    load_arrays(task("heart_scr_phantom").load("test", n=10, size=64, seed=0), "heart_scr_phantom", 32, cache=tmp_path)
    (folder,) = tmp_path.iterdir()
    (folder/"images.npy").write_bytes(b"torn")
    refused(lambda: load_arrays(task("heart_scr_phantom").load("test", n=10, size=64, seed=0), "heart_scr_phantom", 32, cache=tmp_path), "images.npy is damaged", "delete the folder")


@pytest.mark.parametrize("run, config, change, words", [
    (run_segment, SEGMENT, {"task": "chestx_dett"}, ["chestx_det"]), (run_segment, SEGMENT, {"shots": [0]}, ["shots is 0"]), (run_segment, SEGMENT, {"fractions": [0.0]}, ["above 0"]),
    (run_segment, SEGMENT, {"patience": 2, "val_every": 9}, ["val_every"]), (run_classify, CLASSIFY, {"size": 64, "load_size": 32}, ["load_size"]),
    (run_classify, CLASSIFY, {"task": "drive_phantom"}, ["segment notebook"])], ids=lambda x: "")
def test_values_that_cannot_work(run, config, change, words): refused(lambda: run(dataclasses.replace(config, **change), progress=False), *words)
