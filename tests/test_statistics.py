"""Tests of significance against scipy, and in worlds where nothing differs: how often they find a difference all the same."""
import math

import numpy as np
import pytest
from scipy import stats

from adam_nb.significance import holm, paired, paired_p, units, welch, welch_p

TRIALS = 4000


def runs(values): return {(s, d): v for s, row in enumerate(values) for d, v in enumerate(row)}


def false_positives(make, test, trials=TRIALS): return np.mean([test(*make(np.random.default_rng([7, i]))) < 0.05 for i in range(trials)])


def world(rng, seeds=5, draws=3, shared=1.0):
    "Two arms without a difference: encoders of their own, draws in common."
    film = rng.normal(0, shared, draws)
    return tuple(runs(rng.normal(0, 1, (seeds, 1)) + film + rng.normal(0, 0.3, (seeds, draws))) for _ in range(2))


@pytest.mark.slow
@pytest.mark.parametrize("test", [paired, welch])
def test_the_dictionaries_find_five_percent(test):
    assert abs(false_positives(world, lambda a, b: test(a, b)["p"]) - 0.05) <= 0.01


@pytest.mark.parametrize("n", [3, 5, 10])
def test_the_null_over_many_trials(n):
    rng = np.random.default_rng(n)
    a, b = rng.normal(0, 1, (2, 40_000, n))
    assert abs(np.mean(paired_p(b - a) < 0.05) - 0.05) < 0.005
    unequal = rng.normal(0, 3, (40_000, n))
    equal_spread, other_spread = (np.mean(welch_p(a, x) < 0.05) for x in (b, unequal))
    assert abs(equal_spread - 0.05) <= 0.01 or n == 3 and 0.03 < equal_spread < 0.04      # with three runs each Welch's test is strict: its degrees of freedom are guessed from two variances of two
    assert abs(other_spread - 0.05) <= 0.01


def test_equal_to_scipy_on_odd_values():
    rng = np.random.default_rng(1)
    cases = [rng.normal(0, 1, (2, 6)), rng.normal(0, 1e-7, (2, 4)) + 0.9, np.array([[0, 0, 0, 1.], [0, 0, 1, 1.]]), rng.standard_cauchy((2, 12))*1e6]
    for a, b in cases:
        rel, ind = stats.ttest_rel(b, a), stats.ttest_ind(b, a, equal_var=False)
        p, w = (t({(i, 0): v for i, v in enumerate(a)}, {(i, 0): v for i, v in enumerate(b)}) for t in (paired, welch))
        np.testing.assert_allclose([p["t"], p["p"], w["t"], w["p"], w["df"]], [rel.statistic, rel.pvalue, ind.statistic, ind.pvalue, ind.df], rtol=1e-7)


@pytest.mark.slow
def test_the_interval_covers_the_truth():
    rng = np.random.default_rng(2)
    truth, hits, effects = 0.7, [], []
    for _ in range(1500):
        a, b = rng.normal(0, 1, 6), rng.normal(truth, 1, 6)
        w = welch({(i, 0): v for i, v in enumerate(a)}, {(i, 0): v for i, v in enumerate(b)})
        hits.append((w["low"] <= truth <= w["high"], w["g_low"] <= truth <= w["g_high"])); effects.append(w["g"])
    difference, effect = np.mean(hits, 0)
    assert abs(difference - 0.95) < 0.02 and abs(effect - 0.95) < 0.02
    assert abs(np.mean(effects) - truth) < 0.05                 # g is unbiased; Cohen's d would be 8 % too large


def test_runs_of_one_arm_alone_do_not_count():
    rng = np.random.default_rng(3)
    a, b = world(rng)
    fewer = {k: v for k, v in a.items() if k[0] != 4}
    p = paired(fewer, b | {(9, 0): 1e6, (0, 7): -1e6})
    assert (p["n"], p["n_runs"], p["left_out_a"], p["left_out_b"]) == (4, 12, 0, 5)
    assert p["mean"] == pytest.approx(np.mean([b[k] - a[k] for k in fewer]))
    assert "left out, because only one arm has them: 0 and 5 runs" in p["note"]


def test_more_draws_are_no_more_seeds():
    a, b = {(s, d): float(s) for s in range(3) for d in range(50)}, {(s, d): s + 0.5 + 0.1*s for s in range(3) for d in range(50)}
    few = paired({k: v for k, v in a.items() if k[1] == 0}, {k: v for k, v in b.items() if k[1] == 0})
    assert paired(a, b)["p"] == pytest.approx(few["p"]) and paired(a, b)["n"] == 3
    assert units({(0, 0): 1., (1, 0): 2.}, {(0, 0): 1.})[1] == "pretraining seeds"        # one arm with several seeds: seeds count
    assert math.isnan(welch({(0, 0): 1., (1, 0): 2.}, {(0, 0): 1.})["p"])


def test_holm_against_a_slow_reference():
    rng = np.random.default_rng(4)
    for n in (1, 2, 7, 20):
        p = rng.uniform(0, 0.2, n)
        order, slow, top = np.argsort(p), np.empty(n), 0.0
        for i, k in enumerate(order): top = max(top, min(1, (n - i)*p[k])); slow[k] = top
        np.testing.assert_allclose(holm(p), slow)


@pytest.mark.slow
def test_ten_thousand_results_in_three_seconds(tmp_path):
    "Reading and tabulating, in seconds of processor time; the files are in the disk's cache, as those of a run at work are."
    import json
    import time
    from adam_nb.compare import collect, difference_table, summary_table, wide_table
    from adam_nb.results import result
    rng = np.random.default_rng(0)
    base = result("segment", arm="", seeds={}, config={"task": "scr", "steps": 60, "lr": 1e-3}, data={"name": "scr", "hash": "0"*16, "n": 247}, metrics={}, n={"test_images": 123}, wall_time_s=1.0, task="scr")
    arms = ("random", "moco_v2", "adam_no_pruner", "adam")
    for i in range(10_000):
        arm, seed, draw, shot = arms[i % 4], i//4 % 5, i//20 % 125, (3, 6, 12, 24)[i//2500]
        scores = {c: {"dice_image": v, "dice_image_low": v - .02, "dice_image_high": v + .02, "dice_pooled": v + .01, "iou_image": v - .1} for c in ("heart", "clavicle") for v in [float(rng.normal(.8, .05))]}
        folder = tmp_path/arm/f"seed{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder/f"{shot}_{draw}.json").write_text(json.dumps(base | {"arm": arm, "seeds": {"pretrain_seed": seed, "draw_seed": draw}, "shot": shot, "metrics": scores}))
    t = time.process_time()
    frame = collect(tmp_path)
    table = wide_table(summary_table(frame, ["heart/dice_image", "clavicle/dice_image"]))
    seconds = time.process_time() - t
    assert len(frame) == 100_000 and len(table) == 4
    assert seconds <= 3, seconds
    assert len(difference_table(frame, [("moco_v2", "adam")], ["heart/dice_image"])) == 4
    from adam_nb.runs import read_run
    paths = [p.relative_to(tmp_path) for p in tmp_path.rglob("*.json")]
    (tmp_path/"plan.json").write_text(json.dumps({"nodes": [{"name": str(p), "notebook": "segment", "values": {}, "inputs": [], "output": f"outputs/run/{p}", "folder": "outputs/run", "wiring": {"arm": p.parts[0]}} for p in paths[1:]]}))
    t = time.process_time()
    run = read_run(tmp_path)
    seconds = time.process_time() - t
    assert len(run.results) == 9_999 and not run.problems        # the one that no node makes is left out
    assert seconds <= 3, seconds
