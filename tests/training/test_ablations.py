"""Every pair of values of the ablation switches trains together at least once; what does nothing is known."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import fields, replace

import pytest
import torch

from ict_fast.config import Config, unused_fields, validate
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


# Of every field of science another value, which shows in two steps.
OTHERS: dict[str, dict] = {
    "network": {
        "name": "ddpmpp",
        "resolution": 16,
        "image_channels": 3,
        "num_classes": 10,
        "head_channels": 4,
        "channels": 16,
        "channel_mult": (1, 1),
        "num_blocks": 2,
        "attention_resolutions": (8,),
        "adaptive_norm": True,
        "dropout": 0.5,
        "dropout_max_resolution": 8,
        "embedding": "fourier",
        "embedding_scale": 1.0,
        "c_noise": "adm-openai",
    },
    "method": {
        "p_mean": 0.0,
        "p_std": 1.0,
        "sigma_min": 0.01,
        "boundary_sigma": 0.0,
        "sigma_max": 40.0,
        "rho": 5.0,
        "sigma_data": 0.4,
        "s0": 12,
        "s1": 40,
        "curriculum": "square-root",
        "indices": "uniform",
        "weighting": "uniform",
        "metric": "l1",
        "huber_c": 0.3,
        "teacher": "ema",
        "teacher_ema": 0.5,
        "teacher_ema_divisor": "pairs",
        "second_sigma": 0.5,
    },
    "optimizer": {
        "name": "radam",
        "lr": 1e-3,
        "warmup_steps": 2,
        "lr_decay": 0.5,
        "betas": (0.8, 0.999),
        "eps": 1e-3,
        "clip_norm": 1e-3,
        "weight_decay": 0.1,
        "ema_decay": 0.5,
        "ema_warmup": False,
        "ema_decays": (0.9,),
        "power_ema": (0.1,),
    },
}
SAMPLING = {"method.second_sigma"}


@pytest.mark.parametrize(
    ("network", "method", "unused"),
    [
        (
            {"embedding": "fourier", "dropout": 0.2, "dropout_max_resolution": 4},
            {"teacher": "ema"},
            set(),
        ),
        (
            {"embedding": "positional", "dropout": 0.0, "dropout_max_resolution": 4},
            {"metric": "l2", "indices": "uniform", "curriculum": "fixed"},
            {
                "network.embedding_scale",
                "network.dropout_max_resolution",
                "method.s1",
                "method.p_mean",
                "method.p_std",
                "method.huber_c",
                "method.teacher_ema",
                "method.teacher_ema_divisor",
            },
        ),
        (
            {"embedding": "positional", "dropout": 0.2, "dropout_max_resolution": 2},
            {"teacher": "ema"},
            {"network.dropout", "network.embedding_scale"},
        ),
    ],
)
def test_the_fields_without_effect_are_those_that_change_no_bit(
    tiny: Config, batches: Callable[..., list], network: dict, method: dict, unused: set[str]
) -> None:
    base = replace(
        tiny,
        network=replace(tiny.network, attention_resolutions=(), **network),
        method=replace(tiny.method, **method),
        optimizer=replace(tiny.optimizer, name="adam"),  # RAdam begins without eps
        training=replace(tiny.training, batch_size=4),
    )

    def state(config: Config) -> dict[str, torch.Tensor]:
        """All that a checkpoint would hold after a step of an early stage and one of a late one."""
        validate(config)
        train_step = TrainStep(config, torch.device("cpu"))
        for step in (1, 20):
            train_step(step, batches(config, step))
        groups = train_step.tensors()
        return {f"{file}/{name}": t.clone() for file, group in groups.items() for name, t in group.items()}

    expected, same = state(base), set()
    for section, others in OTHERS.items():
        kept = getattr(base, section)
        assert others.keys() == {field.name for field in fields(kept)}
        for name, value in others.items():
            if getattr(kept, name) == value:
                continue
            found = state(replace(base, **{section: replace(kept, **{name: value})}))
            if found.keys() == expected.keys() and all(
                torch.equal(tensor, expected[key]) for key, tensor in found.items()
            ):
                same.add(f"{section}.{name}")
    assert same == unused | SAMPLING
    assert {name for name in unused_fields(base) if not name.startswith("logging.")} == unused
