"""Each metric against independent implementations (plain loops, scikit-learn, torchmetrics), on random and on adversarial cases."""
import itertools
import math

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, jaccard_score
from torchmetrics.functional.classification import binary_auroc, binary_average_precision
from torchmetrics.functional.segmentation import dice_score, mean_iou

from adam_nb.metrics import _weighted_areas, auprc, auroc, bootstrap_ci, counts, dice_of, dice_per_image, dice_pooled, iou, iou_of, overlap_scores


def masks():
    "(name, pred, target) of shape (N, 6, 6): all pairs of odd masks, and random ones."
    shapes = {"empty": np.zeros((6, 6), bool), "full": np.ones((6, 6), bool), "pixel": np.zeros((6, 6), bool), "corner": np.zeros((6, 6), bool), "half": np.zeros((6, 6), bool)}
    shapes["pixel"][3, 3] = shapes["corner"][0, 0] = True
    shapes["half"][:, :3] = True
    odd = list(itertools.product(shapes, repeat=2))
    yield "odd", np.stack([shapes[a] for a, _ in odd]), np.stack([shapes[b] for _, b in odd])
    yield "nothing anywhere", np.zeros((4, 6, 6), bool), np.zeros((4, 6, 6), bool)
    yield "nothing found", np.zeros((4, 6, 6), bool), np.ones((4, 6, 6), bool)
    rng = np.random.default_rng(0)
    for share in (0.01, 0.3, 0.99): yield f"random {share}", rng.random((12, 6, 6)) < share, rng.random((12, 6, 6)) < share


def slow(pred, target):
    "Dice and IoU from Python's own sets of pixels; two empty sets agree."
    a, b = ({tuple(i) for i in np.argwhere(x)} for x in (pred, target))
    both, union = len(a & b), len(a | b)
    return (2 * both / (len(a) + len(b)) if union else 1.0), (both / union if union else 1.0)


@pytest.mark.parametrize("name, pred, target", list(masks()), ids=lambda x: x if isinstance(x, str) else "")
def test_overlap(name, pred, target):
    each = np.array([slow(p, t) for p, t in zip(pred, target)])
    np.testing.assert_allclose(dice_per_image(pred, target), each[:, 0])
    np.testing.assert_allclose(iou_of(counts(pred, target)), each[:, 1])
    pooled = slow(pred, target)                        # all pixels of all images are one set
    assert dice_pooled(pred, target) == pytest.approx(pooled[0]) and iou(pred, target) == pytest.approx(pooled[1])
    s = overlap_scores(counts(pred, target))
    assert (s["dice_image"], s["iou_image"], s["dice_pooled"], s["iou_pooled"]) == pytest.approx((*each.mean(0), *pooled))
    p, t = pred.ravel(), target.ravel()
    if (p | t).any():                                  # where scikit-learn and torchmetrics have a convention for two empty masks, it is another
        assert dice_pooled(pred, target) == pytest.approx(f1_score(t, p)) and iou(pred, target) == pytest.approx(jaccard_score(t, p))
    a, b = (torch.tensor(x)[:, None].long() for x in (pred, target))
    some = (pred | target).any((1, 2))
    np.testing.assert_allclose(dice_per_image(pred, target)[some], dice_score(a, b, num_classes=1, average="none").numpy().ravel()[some], rtol=1e-5)
    np.testing.assert_allclose(iou_of(counts(pred, target))[some], mean_iou(a, b, num_classes=1, per_class=True, input_format="one-hot").numpy().ravel()[some], rtol=1e-5)


def test_what_does_not_count_is_as_if_it_were_not_there():
    rng = np.random.default_rng(1)
    pred, target, valid = (rng.random((9, 6, 6)) < 0.5 for _ in range(3))
    for k in range(9):
        p, t = pred[k][valid[k]], target[k][valid[k]]
        assert dice_of(counts(pred, target, valid))[k] == pytest.approx(f1_score(t, p))
    assert (counts(pred, target, False) == 0).all() and (counts(pred, target, True) == counts(pred, target)).all()


def rankings():
    "(name, labels, scores)."
    rng = np.random.default_rng(2)
    y = (rng.random(200) < 0.3).astype(int)
    yield "random", y, rng.normal(size=200)
    yield "perfect", y, y + rng.random(200) * 0.5
    yield "reversed", y, -y - rng.random(200) * 0.5
    yield "constant", y, np.zeros(200)
    yield "two values", y, (rng.random(200) < 0.5).astype(float)
    yield "many ties", y, rng.integers(0, 5, 200).astype(float)
    yield "nearly equal", y, 1 + 1e-9 * rng.normal(size=200)
    yield "huge and tiny", y, rng.choice([-1e30, -1e-30, 0, 1e-30, 1e30], 200)
    yield "one positive", (np.arange(200) == 7).astype(int), rng.normal(size=200)
    yield "one negative", (np.arange(200) != 7).astype(int), rng.normal(size=200)


def pairs(y, s):
    "AUROC by its meaning: how often a positive is above a negative, ties half."
    return np.mean([(a > b) + 0.5 * (a == b) for a in s[y == 1] for b in s[y == 0]])


def average_precision(y, s):
    "Mean over the positives of the precision at their score, by a plain loop over the distinct scores."
    total, before = 0.0, 0
    for cut in sorted(set(s), reverse=True):
        hit, found = y[s >= cut].sum(), (s >= cut).sum()
        total += (hit - before) * hit / found
        before = hit
    return total / y.sum()


@pytest.mark.parametrize("name, y, s", list(rankings()), ids=lambda x: x if isinstance(x, str) else "")
def test_ranking(name, y, s):
    assert auroc(y, s, min_count=1)["mean"] == pytest.approx(pairs(y, s))
    times = np.random.default_rng(len(y)).integers(0, 4, (6, len(y)))           # a resample as numbers of times, and as rows
    times[0] = 1
    for w, areas in zip(times, _weighted_areas(y, s, times.astype(float)).T):
        again = np.repeat(np.arange(len(y)), w)
        if 0 < y[again].sum() < len(again): assert areas == pytest.approx((pairs(y[again], s[again]), average_precision(y[again], s[again])))
        else: assert np.isnan(areas).all()
    assert auprc(y, s, min_count=1)["mean"] == pytest.approx(average_precision(y, s))
    order = torch.tensor(np.unique(s, return_inverse=True)[1].astype(np.float64) / 1000)       # torchmetrics takes logits as float32: ranks are the same question
    assert auroc(y, s, min_count=1)["mean"] == pytest.approx(binary_auroc(order, torch.tensor(y)).item(), abs=1e-5)
    assert auprc(y, s, min_count=1)["mean"] == pytest.approx(binary_average_precision(order, torch.tensor(y)).item(), abs=1e-5)
    few = auroc(y, s)
    if min(y.sum(), (1 - y).sum()) < 10: assert math.isnan(few["mean"]) and few["too_few"]["0"]["positive"] == y.sum() and few["classes"] == 0


def test_a_mean_over_classes_leaves_out_those_that_cannot_be_computed():
    rng = np.random.default_rng(3)
    y = (rng.random((300, 4)) < [0.5, 0.3, 0.01, 0]).astype(float)
    y[rng.random((300, 4)) < 0.1] = np.nan
    s = rng.normal(size=(300, 4)) + np.nan_to_num(y)
    r = auroc(y, s, list("abcd"))
    own = {k: pairs(y[~np.isnan(y[:, i]), i], s[~np.isnan(y[:, i]), i]) for i, k in enumerate("ab")}
    assert r["per_class"]["a"] == pytest.approx(own["a"]) and r["mean"] == pytest.approx(np.mean(list(own.values()))) and list(r["too_few"]) == ["c", "d"]


def test_bootstrap_of_sums_is_the_bootstrap():
    rng = np.random.default_rng(4)
    table, who = rng.integers(0, 50, (60, 3)), rng.integers(0, 20, 60)
    assert bootstrap_ci(table, who, 5, of_sums=dice_of, resamples=200) == pytest.approx(bootstrap_ci(table, who, 5, lambda rows: float(dice_of(rows.sum(0))), 200))
