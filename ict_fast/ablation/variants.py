"""What is varied: the way from the 2023 baseline to iCT, iCT without each ingredient, and its free choices.

iCT is the preset itself; a variant is what differs from it. The baseline is consistency training as of 2023
(Song et al., ICML 2023) with L2 in place of LPIPS, its figures those of the preset's `-ct2023` companion (but
its teacher's decay as the paper has it, not the code), on the preset's own network, batch and optimizer: only
one thing changes from one variant to the next, and no two variants are the same run.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from ict_fast import presets
from ict_fast.config import Config, MethodConfig, validate
from ict_fast.errors import InputError

DEFAULT_PRESET, DEFAULT_STEPS = "digits", 600
"""Of `ict-fast ablate`."""

GROUPS = {
    "ict": "iCT",
    "ladder": "from the 2023 baseline to iCT, one ingredient after the other",
    "removed": "iCT with one ingredient taken back",
    "teacher": "teachers that follow faster than the published one",
    "learning-rate": "control: a lower learning rate",
    "indices": "noise levels and their weight",
    "curriculum": "curriculum",
    "huber-c": "c of Pseudo-Huber",
    "dropout": "dropout",
}
"""What a variant is for, in words, in the order of tables."""

HUBER_C = (1e-6, 0.001, 0.03, 0.1, 0.3)
"""c of Pseudo-Huber beside the default 0.00054 sqrt(d); the first stands for c = 0, the L2 norm."""
DROPOUT = (0.0, 0.1, 0.2, 0.3)
SHORTER_TEACHERS = (0.1, 0.01)
"""mu0 beside the published one, whose average reaches back `teacher_reach` steps: 717 at the baseline's
N = 151 and 1,216 at iCT's 1281, which is nothing in 800,000 steps and longer than a short run."""
CONTROL_RATE = 5e-4
"""Learning rate of the control, where the preset's own is higher. The paper's is 1e-4 for 400,000 steps."""

_BASELINES = {
    "digits": "cifar10-ct2023",
    "cifar10": "cifar10-ct2023",
    "cifar10-deep": "cifar10-ct2023",
    "imagenet64": "imagenet64-ct2023",
    "imagenet64-deep": "imagenet64-ct2023",
}


@dataclass(frozen=True)
class Variant:
    """One set of switches.

    Attributes:
        name: of its folder and in results.
        group: the table it belongs to: a key of `GROUPS`.
        label: what a reader sees.
        changes: dotted field of the configuration -> value, relative to iCT.
    """

    name: str
    group: str
    label: str
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class _Ingredient:
    """A step of the ladder: what it is called when it is added, and the 2023 values that it replaces."""

    name: str
    label: str
    old: dict[str, Any]


def preset_names() -> list[str]:
    """The presets of iCT, which can be varied."""
    return list(_BASELINES)


def variants_of(base: Config) -> tuple[Variant, ...]:
    """Every variant of a preset of iCT, iCT first.

    Raises:
        InputError: if the preset is not one of iCT.
    """
    old = _published(base)
    teacher = _fields(old, "method.teacher", "method.teacher_ema")
    metric, indices = _fields(old, "method.metric"), _fields(old, "method.indices")
    weight, curriculum = _fields(old, "method.weighting"), _curriculum(old)
    rate = {"optimizer.lr": CONTROL_RATE}
    shorter = {mu: teacher | {"method.teacher_ema": mu} for mu in SHORTER_TEACHERS}
    slowest, own_c = min(SHORTER_TEACHERS), default_huber_c(base)
    found = [Variant("ict", "ict", GROUPS["ict"]), *_ladder(base, old)]
    if base.network.embedding == "fourier":
        new_scale, scale = base.network.embedding_scale, old.network.embedding_scale
        label = f"Fourier scale {scale:g} instead of {new_scale:g}"
        found.append(Variant(f"fourier-{scale:g}", "removed", label, _fields(old, "network.embedding_scale")))
    found += [
        Variant("ema-teacher", "removed", _teacher_label(old.method.teacher_ema), teacher),
        *(
            Variant(f"ema-teacher-{mu:g}", "teacher", _teacher_label(mu), changes)
            for mu, changes in shorter.items()
        ),
        Variant("l2", "removed", "squared L2 instead of Pseudo-Huber", metric),
        Variant("l1", "removed", "L1 instead of Pseudo-Huber", {"method.metric": "l1"}),
        Variant("uniform-indices", "indices", "uniform indices, weight 1/(s' - s)", indices),
        Variant("uniform-weight", "indices", "lognormal indices, weight 1", weight),
        Variant("fixed-11", "curriculum", "fixed N = 11", {"method.curriculum": "fixed"}),
        Variant(
            "fixed-1281",
            "curriculum",
            "fixed N = 1281",
            {"method.curriculum": "fixed", "method.s0": 1280},
        ),
        Variant(
            "square-root",
            "curriculum",
            f"square-root curriculum, {old.method.s0} to {old.method.s1 + 1}",
            curriculum,
        ),
        *(
            Variant(f"huber-{c:g}", "huber-c", f"Pseudo-Huber, c = {c:g}", {"method.huber_c": c})
            for c in HUBER_C
            if not math.isclose(c, own_c, rel_tol=0.01)
        ),
        *(
            Variant(f"dropout-{p:g}", "dropout", f"dropout {p:g}", {"network.dropout": p})
            for p in DROPOUT
            if p != base.network.dropout
        ),
    ]
    if base.optimizer.lr > CONTROL_RATE:
        at = f"learning rate {CONTROL_RATE:g}"
        found += [
            Variant(f"ict-lr-{CONTROL_RATE:g}", "learning-rate", f"iCT, {at}", rate),
            Variant(
                f"ema-teacher-{slowest:g}-lr-{CONTROL_RATE:g}",
                "learning-rate",
                f"{_teacher_label(slowest)}, {at}",
                shorter[slowest] | rate,
            ),
        ]
    return tuple(found)


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


def default_huber_c(config: Config) -> float:
    """c = 0.00054 sqrt(d), d = values per image (iCT, section 3.3)."""
    network = config.network
    return 0.00054 * network.resolution * math.sqrt(network.image_channels)


def teacher_reach(method: MethodConfig, scales: int) -> float:
    """Steps over which an EMA teacher averages: N / (s0 ln(1/mu0)), from mu = exp(s0 ln mu0 / N)."""
    return scales / (method.s0 * -math.log(method.teacher_ema))


def _published(base: Config) -> Config:
    """The 2023 preset that the baseline's figures are taken from."""
    if base.preset not in _BASELINES:
        known = ", ".join(_BASELINES)
        raise InputError(f"--preset is {base.preset}, which is not iCT; an ablation varies one of {known}")
    return presets.get(_BASELINES[base.preset])


def _ladder(base: Config, old: Config) -> list[Variant]:
    """From the baseline, one ingredient of iCT after the other; the last step, to iCT itself, is left out."""
    ingredients = _ingredients(base, old)
    found, name, label = [], "", "consistency training of 2023, L2"
    for number, ingredient in enumerate(ingredients):
        changes: dict[str, Any] = {}
        for remaining in ingredients[number:]:
            changes |= remaining.old
        found.append(Variant(f"ct2023{name}", "ladder", label, changes))
        name, label = f"-{ingredient.name}", f"+ {ingredient.label}"
    return found


def _ingredients(base: Config, old: Config) -> list[_Ingredient]:
    """iCT's order of presentation, sections 3.1 to 3.5, less what the preset's network does not have.

    But for the weight, of section 3.1: it comes with the indices.
    """
    network, found = base.network, []
    if network.embedding == "fourier":
        scales = f"{network.embedding_scale:g} instead of {old.network.embedding_scale:g}"
        fields = _fields(old, "network.embedding_scale")
        found.append(_Ingredient("fourier", f"Fourier scale {scales}", fields))
    if network.dropout != old.network.dropout:
        fields = _fields(old, "network.dropout")
        found.append(_Ingredient("dropout", f"dropout {network.dropout:g}", fields))
    levels = f"{base.method.s0 + 1} to {base.method.s1 + 1} levels"
    return [
        *found,
        _Ingredient("no-ema", "no EMA in the teacher", _fields(old, "method.teacher", "method.teacher_ema")),
        _Ingredient("huber", "Pseudo-Huber instead of L2", _fields(old, "method.metric")),
        _Ingredient("curriculum", f"doubling curriculum, {levels}", _curriculum(old)),
        _Ingredient("", "", _fields(old, "method.indices", "method.weighting")),
    ]


def _curriculum(old: Config) -> dict[str, Any]:
    return _fields(old, "method.curriculum", "method.s0", "method.s1")


def _fields(config: Config, *names: str) -> dict[str, Any]:
    return {name: getattr(getattr(config, name.split(".")[0]), name.split(".")[1]) for name in names}


def _teacher_label(mu: float) -> str:
    return f"EMA teacher, mu0 = {mu:g}"
