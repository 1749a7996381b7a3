"The published protocol of segmentation (validation that stops, best weights), bf16 for both kinds of tasks, and that a finished seed is not computed again."
import dataclasses
import json

import numpy as np
import pytest
import torch

from adam_nb import finetune, segment
from adam_nb.classify import ClassifyConfig, run_classify
from adam_nb.predictions import read_predictions
from adam_nb.segment import SegmentConfig, load_segmenter, run_segment

pytestmark = pytest.mark.usefixtures("one_thread")
OPTIONS = {"n": 40, "size": 64, "seed": 0}
SEGMENT = SegmentConfig(task="heart_scr_phantom", data_options=OPTIONS, size=32, shots=["all"], threads=1)
CLASSIFY = ClassifyConfig(data_options=OPTIONS, size=32, methods=["finetune"], threads=1)


def test_published_segmentation(tmp_path, monkeypatch):
    "Epochs, batches no larger than the part, a validation an epoch, the end after `patience`, and the weights of the best validation are judged."
    seen = []
    class Watched(segment.Monitor):
        def __call__(self, step, model):
            stops = super().__call__(step, model)
            seen.append((step, stops, None if self.state is None else {k: v.clone() for k, v in self.state.items()}))
            return stops
    monkeypatch.setattr(segment, "Monitor", Watched)
    config = dataclasses.replace(SEGMENT, protocol="published", size=32, epochs=12, patience=2, lr=0.05, batch_size=64, keep_models=True)       # so large a rate that the loss soon rises
    out = tmp_path/"heart.json"
    res = json.loads(json.dumps(run_segment(config, out=out, progress=False), default=str))
    run, = res["runs"]
    steps = [s for s, _ in run["series"]["val_loss"]]
    losses = [v for _, v in run["series"]["val_loss"]]
    assert steps == list(range(1, len(steps) + 1)), "the part is one batch, so an epoch is a step"
    best = int(np.argmin(losses))
    assert run["n"]["steps"] == len(losses) == best + 3 < 12, losses             # two validations that were no better
    assert res["n"]["val_images"] > 0 and run["n"]["train_images"] == res["n"]["pool_images"]
    best_state = next(state for step, _, state in seen if step == best)
    judged = load_segmenter(tmp_path/run["model"])[0].state_dict()
    assert judged.keys() == best_state.keys() and all(torch.equal(best_state[k], judged[k]) for k in judged), "what is judged and saved is what was best"
    again = run_segment(config, out=out, progress=False)
    assert again["runs"][0]["train_s"] == run["train_s"] and len(seen) == len(losses), "a finished seed is not trained again"
    more = run_segment(dataclasses.replace(config, draw_seeds=[0, 1]), out=out, progress=False)
    assert more["runs"][0]["train_s"] == run["train_s"] and len(seen) > len(losses)


def test_validation_is_never_augmented(monkeypatch):
    "The augmentation sees training batches alone."
    shapes, plain = [], finetune.fit
    def fit(model, data, loss, encoder, **more):
        augment = more["augment"]
        def counted(x, m, g): shapes.append(len(x)); return augment(x, m, g)
        return plain(model, data, loss, encoder, **more | {"augment": counted})
    monkeypatch.setattr(segment, "fit", fit)
    res = run_segment(dataclasses.replace(SEGMENT, protocol="published", size=32, epochs=2, patience=2, batch_size=4), progress=False)
    assert len(shapes) == res["runs"][0]["n"]["steps"] and len(res["runs"][0]["series"]["val_loss"]) == 2 and max(shapes) <= 4


@pytest.mark.parametrize("study, config", [(run_segment, dataclasses.replace(SEGMENT, shots=[8], steps=15)), (run_classify, dataclasses.replace(CLASSIFY, steps=15))])
def test_bf16(study, config, tmp_path):
    "bf16 is recorded, begins as fp32 does, learns as fast, and is not fp32 under another name."
    found = {}
    for precision in ("fp32", "bf16"):
        out = tmp_path/f"{precision}.json"
        res = study(dataclasses.replace(config, precision=precision), out=out, progress=False)
        assert res["precision"] == precision
        if study is run_classify: assert np.isfinite(read_predictions(out, "finetune_share1_draw0")["predictions"]).all()
        found[precision] = np.array(res["runs"][0]["series"]["loss"], dtype=float)
    a, b = found["fp32"], found["bf16"]
    assert np.allclose(a[:3], b[:3], rtol=0.05) and not np.array_equal(a, b), (a, b)
    assert b[-5:].mean() < b[:3].mean() and abs(a[-5:].mean() - b[-5:].mean()) < 0.3*(a[:3].mean() - a[-5:].mean()), (a, b)
