"""What is claimed, by the paper or here: orderings of variants."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

from ict_fast.ablation.variants import CONTROL_RATE, SHORTER_TEACHERS, teacher_reach, variants_of
from ict_fast.config import Config


@dataclass(frozen=True)
class Finding:
    """A claim: one variant ends nearer to the data than another.

    Attributes:
        claim: in words.
        by: who claims it and where: "paper 3.2", "ours".
        better, worse: names of variants.
        factor: how many times smaller the better distance is claimed to be; 1 for a plain ordering.
        required: whether it is one of those that an implementation of iCT has to show.
    """

    claim: str
    by: str
    better: str
    worse: str
    factor: float = 1.0
    required: bool = False


def findings_of(base: Config) -> list[Finding]:
    """All claims about a preset's variants, the required ones first."""
    names = {variant.name for variant in variants_of(base)}
    rungs = [variant.name for variant in variants_of(base) if variant.group == "ladder"]
    before = {rung: previous for previous, rung in itertools.pairwise(rungs)}
    claims = [replace(claim, required=True) for claim in _required(rungs[-1], before)]
    claims += [*_fourier(base, names), *_dropout(base, before), *_others(base, before)]
    return [claim for claim in claims if {claim.better, claim.worse} <= names]


def _required(last_rung: str, before: dict[str, str]) -> list[Finding]:
    no_ema, baseline = "No EMA in the teacher is better than one", "the 2023 baseline"
    weighted = "Lognormal indices with weight 1/(s' - s) are better than uniform ones with weight 1"
    doubling, half = "The doubling curriculum is better than", "iCT has at most half the distance of"
    rung = "ct2023-no-ema"
    return [
        Finding(no_ema, "paper 3.2", "ict", "ema-teacher"),
        Finding(f"{no_ema}, with L2 and the curriculum of 2023", "paper 3.2", rung, before[rung]),
        Finding(weighted, "paper 3.1, 3.5", "ict", last_rung),
        Finding(f"{doubling} a fixed N = 11", "paper 3.4", "ict", "fixed-11"),
        Finding(f"{doubling} a fixed N = 1281", "paper 3.4", "ict", "fixed-1281"),
        Finding(f"{half} {baseline}", "ours", "ict", "ct2023", factor=2),
        Finding(
            f"{half} {baseline} with iCT's network and no EMA in its teacher", "ours", "ict", rung, factor=2
        ),
    ]


def _others(base: Config, before: dict[str, str]) -> list[Finding]:
    mu, rate = min(SHORTER_TEACHERS), f"{CONTROL_RATE:g}"
    reach = teacher_reach(replace(base.method, teacher_ema=mu), base.method.s1 + 1)
    huber, c = "Pseudo-Huber is better than", "c = 0.00054 sqrt(d) is better than c"
    doubling = "The doubling curriculum is better than the square-root one"
    faster = f"No EMA is better than one that reaches back {reach:.0f} steps at most"
    return [
        Finding(faster, "ours", "ict", f"ema-teacher-{mu:g}"),
        Finding(
            f"{faster}, both at a learning rate of {rate}",
            "ours",
            f"ict-lr-{rate}",
            f"ema-teacher-{mu:g}-lr-{rate}",
        ),
        Finding(f"{huber} squared L2", "paper 3.3", "ict", "l2"),
        Finding(
            f"{huber} squared L2, with the method of 2023 but for its teacher",
            "paper 3.3",
            "ct2023-huber",
            before["ct2023-huber"],
        ),
        Finding(f"{huber} L1", "ours", "ict", "l1"),
        Finding(f"{c} near 0", "paper 3.3", "ict", "huber-1e-06"),
        Finding(f"{c} = 0.3", "paper 3.3", "ict", "huber-0.3"),
        Finding(doubling, "paper 3.4", "ict", "square-root"),
        Finding(
            f"{doubling}, with uniform indices and weight 1",
            "paper 3.4",
            "ct2023-curriculum",
            before["ct2023-curriculum"],
        ),
        Finding(
            "Lognormal indices are better than uniform ones, both weighted",
            "paper 3.5",
            "ict",
            "uniform-indices",
        ),
        Finding(
            "The weight is better than none, both with lognormal indices", "ours", "ict", "uniform-weight"
        ),
    ]


def _fourier(base: Config, names: set[str]) -> list[Finding]:
    """The embedding's scale, where the preset's network has one."""
    old = next((name for name in names if name.startswith("fourier-")), None)
    if old is None:
        return []
    claim = f"Fourier scale {base.network.embedding_scale:g} is better than {old.removeprefix('fourier-')}"
    return [
        Finding(claim, "paper 3.1", "ict", old),
        Finding(f"{claim}, from the 2023 baseline", "paper 3.1", "ct2023-fourier", "ct2023"),
    ]


def _dropout(base: Config, before: dict[str, str]) -> list[Finding]:
    """With the preset's dropout against none; where it has none, 0.3 against it."""
    rate = base.network.dropout
    if not rate:
        return [Finding("Dropout 0.3 is better than none", "paper 3.1", "dropout-0.3", "ict")]
    claim = f"Dropout {rate:g} is better than none"
    rung = "ct2023-dropout"
    return [
        Finding(claim, "paper 3.1", "ict", "dropout-0"),
        Finding(f"{claim}, from the 2023 baseline", "paper 3.1", rung, before[rung]),
    ]
