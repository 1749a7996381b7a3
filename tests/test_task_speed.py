"""Speed of fine-tuning, in processor time (a busy machine stretches wall time): the network's own share of a step, and a few-shot run whole."""
import time

import numpy as np
import pytest
import torch

from adam_nb.classify import ClassifyConfig, finetune_classifier
from adam_nb.device import thread_count
from adam_nb.finetune import load_arrays
from adam_nb.segment import SegmentConfig, finetune_segmenter
from adam_nb.tasks import few_shot, task

SHARE, SECONDS = 0.85, 12      # of a step in forward, backward and optimiser; of a few-shot run, on two cores


def films(name, part, n, size): return load_arrays(task(name).load(part, n=n, size=size, seed=0), name, size)


@pytest.mark.parametrize("augment", ["small", "published"])
def test_a_segmentation_step_is_the_network(augment):
    pool, rest = films("scr_phantom", "train", 10, 128), films("scr_phantom", "test", 10, 128)
    run = finetune_segmenter(SegmentConfig(size=128, steps=6, threads=1, augment=augment), None, pool, rest)
    assert run["work_share"] >= SHARE, run["work_share"]


def test_a_classification_step_is_the_network():
    pool, rest = films("findings_phantom", "train", 20, 128), films("findings_phantom", "test", 20, 128)
    run = finetune_classifier(ClassifyConfig(size=128, steps=4, batch_size=8, threads=1), None, pool, rest)
    assert run["work_share"] >= SHARE, run["work_share"]


@pytest.mark.slow
def test_a_few_shot_run():
    "ResNet-18 U-Net at 128 px, 60 steps of batch 4, heart, clavicles and lungs in one net, 40 test films: training, prediction and scores."
    pool, rest = films("scr_phantom", "train", 200, 128), films("scr_phantom", "test", 200, 128)
    few = pool[few_shot(pool.patients, 12, 0)]
    config = SegmentConfig(size=128, shots=[12], steps=60, batch_size=4)
    finetune_segmenter(SegmentConfig(size=128, steps=1), None, few, rest[range(4)])     # imports and first allocations
    with thread_count(2):
        cpu, wall = time.process_time(), time.perf_counter()
        run = finetune_segmenter(config, None, few, rest)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    print(f"few-shot run: {cpu:.1f} s of processor time on {2} threads, {wall:.1f} s by the clock; share of the network in a step {run['work_share']:.2f}; {torch.get_num_threads()} threads otherwise")
    assert cpu / 2 <= SECONDS, (cpu, wall)
    assert np.mean(run["series"]["loss"][-5:]) < np.mean(run["series"]["loss"][:5])
