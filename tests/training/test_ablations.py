"""Every pair of values of the ablation switches trains together at least once."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from ict_fast.config import Config, validate
from ict_fast.training.step import TrainStep

SWITCHES: dict[str, tuple] = {
    "teacher": ("student", "ema"),
    "metric": ("pseudo-huber", "l2", "l1"),
    "indices": ("lognormal", "uniform"),
    "weighting": ("inverse-gap", "uniform"),
    "curriculum": ("doubling", "square-root", "fixed"),
    "dropout": (0.0, 0.3),
    "network": ("ncsnpp", "ddpmpp", "adm"),
    "adaptive_norm": (False, True),
    "num_classes": (0, 10),
}


def pairwise() -> list[dict]:
    """A greedy covering array: every pair of values of every two switches occurs in some row."""
    names, choose = list(SWITCHES), random.Random(0)
    missing = {
        ((a, x), (b, y))
        for a, b in itertools.combinations(names, 2)
        for x in SWITCHES[a]
        for y in SWITCHES[b]
    }
    rows = []
    while missing:
        candidates = [{name: choose.choice(SWITCHES[name]) for name in names} for _ in range(200)]
        best = max(candidates, key=lambda row: len(missing & set(itertools.combinations(row.items(), 2))))
        rows.append(best)
        missing -= set(itertools.combinations(best.items(), 2))
    return rows


@pytest.mark.parametrize("row", pairwise(), ids=lambda row: "-".join(map(str, row.values())))
def test_switches_train_in_every_pair(tiny: Config, batches: Callable[..., list], row: dict) -> None:
    row = dict(row)
    network = replace(
        tiny.network,
        name=row.pop("network"),
        dropout=row.pop("dropout"),
        adaptive_norm=row.pop("adaptive_norm"),
        num_classes=row.pop("num_classes"),
    )
    config = replace(tiny, network=network, method=replace(tiny.method, **row))
    validate(config)
    train_step = TrainStep(config, torch.device("cpu"))
    before = [parameter.clone() for parameter in train_step.network.parameters()]
    for step in range(2):
        train_step(step, batches(config, step))
    assert int(train_step.optimizer.skipped) == 0
    assert int(train_step.losses.count) == 2
    # Not all: the published initialisations end every block with (nearly) zero weights.
    changed = [not torch.equal(a, b) for a, b in zip(before, train_step.network.parameters(), strict=True)]
    assert any(changed)
    assert all(torch.isfinite(parameter).all() for parameter in train_step.network.parameters())
