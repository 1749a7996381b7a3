"Explorers over many moves: the memory stays, and the pictures stay small."
import json, os

import numpy as np
import psutil
import pytest
import torch

from adam_nb.data import dataset
from adam_nb.phantom import chest_phantom
from adam_nb.views import pack_id
from adam_nb.widgets import CorrespondenceExplorer, DecomposerExplorer, EmbeddingExplorer, Parts, PrunerExplorer, TrainingMonitor, landmark_points


def decomposer(folder):
    e = DecomposerExplorer([chest_phantom(0, i, 128).image for i in range(3)], panel=200)
    def move(i): e.level = i % 6; e.film = i % 3; e.seed = i
    return e, move


def pruner(folder):
    keys, films = torch.randn(512, 16, generator=torch.Generator().manual_seed(0)), 32
    parts = Parts(keys, np.random.default_rng(0).random((512, 16, 16), dtype=np.float32), torch.tensor([pack_id(i, 4, c) for i in range(films) for c in range(16)]))
    e = PrunerExplorer({"first": parts, "second": parts}, panel=200)
    def move(i): e.anchor = i*37 % 512; e.threshold = i % 10/10; e.bank = ("first", "second")[i % 2]
    return e, move


def correspondence(folder):
    e = CorrespondenceExplorer([chest_phantom(0, i, 64).image for i in range(4)], grid=(8, 8), panel=200)
    def move(i): e.point = (i % 83/83, i % 59/59); e.a = i % 3; e.b = "warp" if i % 7 == 0 else i % 4
    return e, move


def embedding(folder):
    e = EmbeddingExplorer(landmark_points(dataset("phantom_chest", n=4, size=64), size=16), {"pixels": None, "again": None}, panel=200)
    def move(i): e.selected = i*7 % 40
    return e, move


def monitor(folder):
    path = folder/"log.jsonl"
    def line(i): return json.dumps({"event": "step", "stage": 0, "step": i, "global_step": i, "loss": 1.0, "chance": 2.0}) + "\n"
    path.write_text(line(1))
    e = TrainingMonitor(folder, live=False)
    def move(i):
        if i % 10 == 0: path.write_text(line(1) + line(i + 2))
        e.smooth = i % 5 + 1
    return e, move


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("make", [decomposer, pruner, correspondence, embedding, monitor], ids=lambda f: f.__name__)
def test_500_moves_leave_the_memory_where_it_was(make, tmp_path):
    e, move = make(tmp_path)
    e.widget
    rss = lambda: psutil.Process(os.getpid()).memory_info().rss
    def run(n):
        for i in range(n):
            with e.together(): move(i)
    run(100)
    before = rss()
    run(500)
    grown = rss() - before
    print(f"{make.__name__}: {e.draws} pictures, {grown/1e6:+.1f} MB")
    assert grown < 12e6, f"{grown/1e6:.1f} MB more after 500 moves"
    assert all(len(p.image.value) <= 300_000 for p in e._pads) and e.draws > 500
