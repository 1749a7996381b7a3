"""The trainer against a plain loop, written here from the paper's equations, in float64: same losses, same bank, same twin."""
import copy
import math

import pytest
import torch
import torch.nn.functional as F

from adam_nb.decomposer import boxes
from adam_nb.feed import open_cache, split_indices, stage_loader, validation_batches
from adam_nb.loop import Run, make_optimizer, update, validate
from adam_nb.model import bn_permutation, create_encoder
from adam_nb.schedule import PretrainConfig, check, stage_list
from adam_nb.views import unpack_id

BASE = dict(data_options={"n": 40, "size": 96, "seed": 0}, cache_size=96, backbone="timm:test_resnet", dim=12, batch_size=8, bank_size=20, bn_splits=2, view_size=32, momentum=0.9,
            threshold=0.95, stages=[0, 2], steps=[3, 4], optimizer="sgd", lr=0.03, warmup_steps=2, workers=0, precision="fp32", val_split=None, channels_last=False)
SWITCHES = {
    "ours": {"val_split": "val"}, "no pruner": {"threshold": None}, "pruner from the start": {"prune_from": 0, "threshold": 0.5}, "pruner later": {"prune_from": 0, "prune_after": 5, "threshold": 0.5},
    "own keys are negatives": {"exclude_own": False}, "ordinary BN": {"bn_splits": 1}, "four groups": {"bn_splits": 4, "batch_size": 16, "bank_size": 40}, "black corners": {"rotation_fill": "zero"},
    "AdamW": {"optimizer": "adamw", "lr": 1e-3}, "ResNet-18": {"backbone": "resnet18", "steps": [2, 2]}, "no warm-up": {"warmup_steps": 0}, "cosine by epoch": {"schedule": "cosine_epoch", "warmup_steps": 0}, "mixed levels": {"stages": [[0, 1, 2]], "steps": 7},
    "temperature": {"temperature": 0.07}, "momentum": {"momentum": 0.5}, "authors": {"recipe": "authors", "schedule": "cosine_epoch", "warmup_steps": 0, "val_split": "val", "threshold": 0.5},
}


class Plain:
    "The method in the words of the paper: loops over rows, groups and parameters, no tensor tricks."
    def __init__(self, config, run):
        self.c, self.updates = config, 0
        self.f, self.g = self.network(run.model.encoder), copy.deepcopy(run.model.head)
        self.f_twin, self.g_twin = copy.deepcopy(self.f), copy.deepcopy(self.g)
        self.keys = [k.clone() for k in run.model.bank.keys]
        self.owner = [None] * len(self.keys)                    # (image, pixel box) of each key
        self.place = 0
        self.size = run.cache.size

    def network(self, encoder):
        "The same weights in a network with ordinary batch normalisation."
        plain = create_encoder(encoder.backbone, encoder.in_channels, seed=1).double()
        plain.load_state_dict(encoder.state_dict())
        for m in self.norms(plain):
            m.momentum, m.seen = 0.0, []                        # it keeps no running statistics of its own: see `remember`
            m.register_forward_pre_hook(lambda m, x: m.seen.append((x[0].detach().mean((0, 2, 3)), x[0].detach().transpose(0, 1).flatten(1).var(1))) if m.training else None)
        return plain.train()

    @staticmethod
    def norms(f): return [m for m in f.modules() if isinstance(m, torch.nn.BatchNorm2d)]

    def remember(self):
        "Running statistics move a tenth of the way to the mean of the groups' means and variances, once an update."
        for m in (*self.norms(self.f), *self.norms(self.f_twin)):
            for buffer, values in zip((m.running_mean, m.running_var), zip(*m.seen)): buffer.mul_(0.9).add_(0.1 * torch.stack(values).mean(0))
            m.seen.clear()

    def through(self, f, g, x, order):
        "Each group of the batch passes alone, so that its statistics are its own; `order` says who is in a group."
        n = len(x) // self.c.bn_splits
        out = [None] * len(x)
        for start in range(0, len(x), n):
            group = order[start:start + n]
            for i, z in zip(group, F.normalize(g(f(x[group])), dim=1)): out[i] = z
        return torch.stack(out)

    def part(self, id):
        image, level, cell = (int(v) for v in unpack_id(torch.tensor([id])))
        return image, boxes(*self.size(image), level)[cell].tolist()

    def overlap(self, a, b):
        if b is None or a[0] != b[0]: return False
        (y0, x0, y1, x1), (v0, u0, v1, u1) = a[1], b[1]
        return min(y1, v1) > max(y0, v0) and min(x1, u1) > max(x0, u0)

    def loss(self, x_q, x_k, ids, prunes, training=True):
        order = list(range(len(x_q)))
        shuffled = bn_permutation(len(x_q), self.c.seed, self.updates).tolist() if self.c.bn_splits > 1 else order
        if training: q, k = self.through(self.f, self.g, x_q, order), self.through(self.f_twin, self.g_twin, x_k, shuffled)
        else: q, k = F.normalize(self.g(self.f(x_q)), dim=1), F.normalize(self.g_twin(self.f_twin(x_k)), dim=1)
        k, rows = k.detach(), []
        mine = [self.part(i) for i in ids.tolist()]
        for i in range(len(q)):
            positive, negatives = (q[i] @ k[i]) / self.c.temperature, []
            for key, owner in zip(self.keys, self.owner):
                if self.c.exclude_own and self.overlap(mine[i], owner): continue
                if prunes and float(q[i].detach() @ key) > self.c.threshold: continue
                negatives.append((q[i] @ key) / self.c.temperature)
            rows.append(torch.logsumexp(torch.stack([positive, *negatives]), 0) - positive)
        return torch.stack(rows).mean(), k, mine

    def follow(self, k, mine):
        "The twin follows, and the keys replace the oldest."
        m = self.c.momentum
        with torch.no_grad():
            for twin, net in ((self.f_twin, self.f), (self.g_twin, self.g)):
                for t, p in zip(twin.parameters(), net.parameters()): t.copy_(m * t + (1 - m) * p)
        self.updates += 1
        for key, owner in zip(k, mine):
            self.keys[self.place], self.owner[self.place] = key.clone(), owner
            self.place = (self.place + 1) % len(self.keys)

    def rate(self, stage, step):
        "Half a cosine over the stage, by update or by epoch, after a straight rise."
        c = self.c
        if c.schedule == "cosine_epoch": done = (step // stage.steps_per_epoch) / math.ceil(stage.steps / stage.steps_per_epoch)
        else: done = max(step - min(c.warmup_steps, stage.steps - 1), 0) / (stage.steps - min(c.warmup_steps, stage.steps - 1))
        return c.lr * min((step + 1) / (c.warmup_steps + 1), 1) * (1 + math.cos(math.pi * done)) / 2


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return open_cache(check(PretrainConfig(**BASE)), tmp_path_factory.mktemp("fidelity")/"run", progress=False)


def apart(a, b):
    "The largest difference of two modules' parameters and running statistics; NaN if there is one."
    pairs = [*zip(a.parameters(), b.parameters()), *((m, n) for (name, m), (_, n) in zip(a.named_buffers(), b.named_buffers()) if "running" in name)]
    return float(torch.stack([(p - r).detach().abs().max() for p, r in pairs]).max())


@pytest.mark.parametrize("name", SWITCHES)
def test_same_as_a_plain_loop(cache, tmp_path, name):
    config = check(PretrainConfig(**BASE | SWITCHES[name]))
    run = Run(config, tmp_path, cache, torch.device("cpu"), None, None, False)
    run.model.double()
    written = []
    run.log = type("Log", (), {"write": lambda self, event, **k: written.append((event, k))})()
    plain = Plain(config, run)
    val = split_indices(cache, "val", "val_split")
    pruned = 0
    for stage in run.stages:
        run.optimizer, run.at.step = make_optimizer(run), 0
        parameters = [*plain.f.parameters(), *plain.g.parameters()]
        optimizer = (torch.optim.SGD(parameters, lr=1, momentum=config.sgd_momentum, weight_decay=config.weight_decay) if config.optimizer == "sgd"
                     else torch.optim.AdamW(parameters, lr=1, weight_decay=config.weight_decay))
        for step, batch in enumerate(stage_loader(config, cache, run.train, stage)):
            prunes = config.threshold is not None and run.at.global_step >= config.prune_after and (max(stage.levels) > 0 if config.recipe == "authors" else stage.index >= config.prune_from)
            loss, k, mine = plain.loss(*batch, prunes)
            for group in optimizer.param_groups: group["lr"] = plain.rate(stage, step)
            optimizer.zero_grad(); loss.backward(); optimizer.step()
            plain.remember()
            plain.follow(k, mine)
            run.model.train()
            update(run, stage, batch)
            assert abs(float(run.at.pending[-1][0]) - loss.item()) < 1e-8, (name, stage.index, step)
            pruned += float(run.at.pending[-1][3]) > 0
        if config.val_split:
            validate(run, stage)
            plain.f.eval(), plain.f_twin.eval()
            batch, = validation_batches(config, cache, val, stage)
            with torch.no_grad(): loss, k, mine = plain.loss(*batch, stage.prunes and config.recipe == "authors", training=False)
            if config.recipe == "authors": plain.follow(k, mine)                # theirs moves twin and bank, ours nothing
            plain.f.train(), plain.f_twin.train()
            assert abs(written[-1][1]["loss"] - float(loss)) < 1e-8
    assert float((run.model.bank.keys - torch.stack(plain.keys)).abs().max()) < 1e-8          # torch's maximum of a NaN is NaN, Python's is not
    assert [plain.part(i) if i >= 0 else None for i in run.model.bank.ids.tolist()] == plain.owner and int(run.model.bank.ptr) == plain.place
    for ours, theirs in ((run.model.encoder, plain.f), (run.model.head, plain.g), (run.model.twin_encoder, plain.f_twin), (run.model.twin_head, plain.g_twin)):
        assert apart(ours, theirs) < (1e-6 if config.optimizer == "adamw" else 1e-8)       # AdamW divides a vanishing gradient by its own size, and so makes its last digit visible
    if name.startswith("pruner") or name == "authors": assert pruned                               # the switch was at work
