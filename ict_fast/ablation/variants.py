"""What is varied: the way from the 2023 baseline to iCT, iCT without each ingredient, and its free choices.

iCT is the preset itself; a variant is what differs from it. The baseline is consistency training as of 2023
(Song et al., ICML 2023) with L2 in place of LPIPS, on the preset's own network, batch and optimizer: only
one thing changes from one variant to the next.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from ict_fast.config import Config, validate

_FOURIER_2023 = {"network.embedding_scale": 16.0}
_TEACHER_2023 = {"method.teacher": "ema", "method.teacher_ema": 0.9}
_METRIC_2023 = {"method.metric": "l2"}
_CURRICULUM_2023 = {"method.curriculum": "square-root", "method.s0": 2, "method.s1": 150}
_INDICES_2023 = {"method.indices": "uniform"}
_WEIGHT_2023 = {"method.weighting": "uniform"}
# iCT's order of presentation (sections 3.1 to 3.5), dropped one by one.
_STEPS_TO_ICT = (_FOURIER_2023, _TEACHER_2023, _METRIC_2023, _CURRICULUM_2023, _INDICES_2023 | _WEIGHT_2023)

HUBER_C = (1e-6, 0.001, 0.03, 0.1, 0.3)
"""c of Pseudo-Huber beside the default 0.00054 sqrt(d); the first stands for c = 0, the L2 norm."""
DROPOUT = (0.1, 0.2, 0.3)
SHORTER_TEACHERS = (0.1, 0.01)
"""mu0 beside the published 0.9, whose average reaches back N / (s0 ln(1/mu0)) steps: 717 at the baseline's
N = 151 and 1,216 at iCT's 1281, which is nothing in 800,000 steps and longer than a short run."""


@dataclass(frozen=True)
class Variant:
    """One set of switches.

    Attributes:
        name: of its folder and in results.
        group: the table it belongs to: a key of `ict_fast.ablation.summary.GROUPS`.
        label: what a reader sees.
        changes: dotted field of the configuration -> value, relative to iCT.
    """

    name: str
    group: str
    label: str
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)


def _ladder() -> tuple[Variant, ...]:
    """From the baseline, one ingredient of iCT after the other; the last step is iCT itself."""
    names = (
        ("ct2023", "consistency training of 2023, L2"),
        ("ct2023-fourier", "+ Fourier scale 0.02 instead of 16"),
        ("ct2023-no-ema", "+ no EMA in the teacher"),
        ("ct2023-huber", "+ Pseudo-Huber instead of L2"),
        ("ct2023-curriculum", "+ doubling curriculum, 11 to 1281 levels"),
    )
    found = []
    for number, (name, label) in enumerate(names):
        changes: dict[str, Any] = {}
        for remaining in _STEPS_TO_ICT[number:]:
            changes |= remaining
        found.append(Variant(name, "ladder", label, changes))
    return tuple(found)


VARIANTS: tuple[Variant, ...] = (
    Variant("ict", "ict", "iCT"),
    *_ladder(),
    Variant("fourier-16", "removed", "Fourier scale 16 instead of 0.02", _FOURIER_2023),
    Variant("ema-teacher", "removed", "EMA teacher, mu0 = 0.9", _TEACHER_2023),
    *(
        Variant(
            f"ema-teacher-{mu:g}",
            "teacher",
            f"EMA teacher, mu0 = {mu:g}",
            _TEACHER_2023 | {"method.teacher_ema": mu},
        )
        for mu in SHORTER_TEACHERS
    ),
    Variant("l2", "removed", "squared L2 instead of Pseudo-Huber", _METRIC_2023),
    Variant("l1", "removed", "L1 instead of Pseudo-Huber", {"method.metric": "l1"}),
    Variant(
        "uniform-indices-and-weight",
        "indices",
        "uniform indices, weight 1",
        _INDICES_2023 | _WEIGHT_2023,
    ),
    Variant("uniform-indices", "indices", "uniform indices, weight 1/(s' - s)", _INDICES_2023),
    Variant("uniform-weight", "indices", "lognormal indices, weight 1", _WEIGHT_2023),
    Variant("fixed-11", "curriculum", "fixed N = 11", {"method.curriculum": "fixed"}),
    Variant(
        "fixed-1281",
        "curriculum",
        "fixed N = 1281",
        {"method.curriculum": "fixed", "method.s0": 1280},
    ),
    Variant("square-root", "curriculum", "square-root curriculum, 2 to 151", _CURRICULUM_2023),
    *(Variant(f"huber-{c:g}", "huber-c", f"Pseudo-Huber, c = {c:g}", {"method.huber_c": c}) for c in HUBER_C),
    *(
        Variant(f"dropout-{rate:g}", "dropout", f"dropout {rate:g}", {"network.dropout": rate})
        for rate in DROPOUT
    ),
)


def configured(base: Config, variant: Variant) -> Config:
    """The preset with a variant's changes.

    Raises:
        InputError: if the preset does not allow them.
    """
    config = base
    for name, value in variant.changes.items():
        section, field = name.split(".")
        changed = dataclasses.replace(getattr(config, section), **{field: value})
        config = dataclasses.replace(config, **{section: changed})
    validate(config)
    return config
