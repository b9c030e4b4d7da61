"""What the runs say of each claim: means, standard errors, and whether the bars meet."""

from __future__ import annotations

import functools
import math
import statistics
from dataclasses import dataclass
from typing import Any

import numpy as np

from ict_fast.ablation.findings import Finding, findings_of
from ict_fast.config import from_dict

UNTRAINED = 1.0
"""A mean distance, in that of uniform noise, from which on a variant counts as not trained at all."""

WORDS = {
    "holds": "holds",
    "untrained": "holds: the other does not train",
    "factor": "order holds, factor not reached",
    "reversed": "the other way round",
    "reversed-untrained": "the other way round: the first does not train",
    "open": "open: the bars meet",
    "seeds": "open: too few seeds",
    "diverged": "open: seeds of the nearer one diverged",
    "neither": "neither trains",
    "both-diverge": "both diverge",
}
"""Every outcome in words."""


@dataclass(frozen=True)
class Summary:
    """One variant's distance over its seeds, in the unit of uniform noise's distance.

    Attributes:
        mean, standard_error: of the seeds that ended; NaN without any, the error None with fewer than two.
        count: seeds that ended with a distance.
        failed: seeds that diverged.
    """

    mean: float
    standard_error: float | None
    count: int
    failed: int

    @property
    def seeds(self) -> int:
        return self.count + self.failed

    @property
    def trains(self) -> bool:
        """Whether it is nearer to the data than noise is."""
        return self.count > 0 and self.mean < UNTRAINED

    @property
    def diverged(self) -> str:
        """How many seeds diverged, in words; empty for none."""
        return f"{self.failed} of {self.seeds} diverged" if self.failed else ""


def summarise(report: dict[str, Any], step: str = "one_step") -> dict[str, Summary]:
    """Mean and standard error over the seeds, by variant; variants without any result are left out.

    Args:
        report: see `ict_fast.ablation.runs.gather`.
        step: "one_step" or "two_step".
    """
    found = {}
    for variant in report["variants"]:
        values = [run[step]["relative_to_noise"] for run in variant["runs"] if step in run]
        failed = sum("failed" in run for run in variant["runs"])
        if not values and not failed:
            continue
        mean = statistics.fmean(values) if values else math.nan
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
        found[variant["name"]] = Summary(mean, error, len(values), failed)
    return found


@dataclass(frozen=True)
class Verdict:
    """What was found of one claim.

    Attributes:
        finding: the claim.
        better, worse: what was measured of its variants.
        outcome: a key of `WORDS`.
    """

    finding: Finding
    better: Summary
    worse: Summary
    outcome: str

    @property
    def ratio(self) -> float:
        """Worse mean over better mean; NaN if one of them has none."""
        return self.worse.mean / self.better.mean

    @property
    def ratio_error(self) -> float | None:
        """The ratio's standard error to first order (delta method), the two means taken as independent.

        Seeds are not paired: two variants with the same seed share the initial weights and the order of the
        images, but may have been run with different numbers of seeds.
        """
        better, worse = self.better, self.worse
        if better.standard_error is None or worse.standard_error is None:
            return None
        relative = math.hypot(better.standard_error / better.mean, worse.standard_error / worse.mean)
        return self.ratio * relative

    @property
    def kind(self) -> str:
        """ "holds", "reversed", or "open" for everything else."""
        return {"untrained": "holds", "reversed-untrained": "reversed"}.get(
            self.outcome, self.outcome if self.outcome in ("holds", "reversed") else "open"
        )

    @property
    def words(self) -> str:
        """The outcome for people, with the number of seeds that diverged, if any."""
        diverged = " and ".join(filter(None, (self.better.diverged, self.worse.diverged)))
        said = WORDS[self.outcome].replace("factor", f"factor {self.finding.factor:g}")
        return f"{said} ({diverged})" if diverged else said


def judge(report: dict[str, Any], step: str = "one_step") -> list[Verdict]:
    """The claims whose two variants were both run.

    One holds if the bars of one standard error do not meet, and do not with the claimed factor either.
    """
    summaries = summarise(report, step)
    verdicts = []
    for finding in findings_of(from_dict(report["base"])):
        better, worse = summaries.get(finding.better), summaries.get(finding.worse)
        if better is not None and worse is not None:
            verdicts.append(Verdict(finding, better, worse, _outcome(better, worse, finding.factor)))
    return verdicts


def _outcome(better: Summary, worse: Summary, factor: float) -> str:
    """All seeds diverged: the worse variant. Some did: never the better one."""
    if not better.count and not worse.count:
        return "both-diverge"
    if not better.trains and not worse.trains:
        return "neither"
    if min(better.seeds, worse.seeds) < 2:
        return "seeds"
    if not worse.count or not better.count:
        nearer = better if better.count else worse
    elif better.standard_error is None or worse.standard_error is None:
        return "seeds"
    elif _beyond(better, worse):
        nearer = better
    elif _beyond(worse, better):
        nearer = worse
    else:
        return "open"
    if nearer.failed:
        return "diverged"
    if nearer is worse:
        return "reversed" if better.trains else "reversed-untrained"
    if worse.count and not _beyond(better, worse, factor):
        return "factor"
    return "holds" if worse.trains else "untrained"


def _beyond(nearer: Summary, farther: Summary, factor: float = 1.0) -> bool:
    """Whether the bars of one standard error do not meet."""
    assert nearer.standard_error is not None
    assert farther.standard_error is not None
    return factor * (nearer.mean + nearer.standard_error) < farther.mean - farther.standard_error


@functools.cache
def chance(first: int, second: int, draws: int = 1_000_000, seed: int = 0) -> float:
    """How often a plain ordering would be said to hold if nothing distinguished the two variants.

    As often it would be said to be the other way round. By simulation: both means are of normal distances
    with the same mean and spread.

    Args:
        first, second: seeds of the two variants, at least 2.
    """
    rng = np.random.default_rng(seed)

    def drawn(count: int) -> tuple[np.ndarray, np.ndarray]:
        values = rng.standard_normal((draws, count), dtype=np.float32)
        return values.mean(1), values.std(1, ddof=1) / math.sqrt(count)

    (mean, error), (other_mean, other_error) = drawn(first), drawn(second)
    # Both directions are equally likely: counting both halves the noise.
    return float(np.mean(np.abs(mean - other_mean) > error + other_error)) / 2
