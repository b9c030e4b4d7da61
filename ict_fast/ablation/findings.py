"""The paper's findings as orderings of variants, and what the runs say of each."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Finding:
    """A claim of the paper: one variant ends nearer to the data than another.

    Attributes:
        claim: in words.
        section: of iCT, where it is made.
        better, worse: names of variants.
        factor: how many times smaller the better distance is claimed to be; 1 for a plain ordering.
    """

    claim: str
    section: str
    better: str
    worse: str
    factor: float = 1.0


FINDINGS: tuple[Finding, ...] = (
    Finding("iCT has at most half the distance of consistency training of 2023", "4", "ict", "ct2023", 2.0),
    Finding("A smaller Fourier scale, 0.02, is better than 16", "3.1", "ict", "fourier-16"),
    Finding("The same, from the baseline", "3.1", "ct2023-fourier", "ct2023"),
    Finding("Dropout 0.3 is better than none", "3.1", "dropout-0.3", "ict"),
    Finding("No EMA in the teacher is better than one", "3.2", "ict", "ema-teacher"),
    Finding("The same, from the baseline", "3.2", "ct2023-no-ema", "ct2023-fourier"),
    Finding("No EMA is better than one that reaches back 28 steps at most", "3.2", "ict", "ema-teacher-0.01"),
    Finding("Pseudo-Huber is better than squared L2", "3.3", "ict", "l2"),
    Finding("The same, from the baseline", "3.3", "ct2023-huber", "ct2023-no-ema"),
    Finding("Pseudo-Huber is better than L1", "3.3", "ict", "l1"),
    Finding("c = 0.00054 sqrt(d) is better than c near 0", "3.3", "ict", "huber-1e-06"),
    Finding("c = 0.00054 sqrt(d) is better than c = 0.3", "3.3", "ict", "huber-0.3"),
    Finding("The doubling curriculum is better than a fixed N = 11", "3.4", "ict", "fixed-11"),
    Finding("The doubling curriculum is better than a fixed N = 1281", "3.4", "ict", "fixed-1281"),
    Finding("The doubling curriculum is better than the square-root one", "3.4", "ict", "square-root"),
    Finding("The same, from the baseline", "3.4", "ct2023-curriculum", "ct2023-huber"),
    Finding(
        "Lognormal indices with weight 1/(s' - s) are better than uniform ones with weight 1",
        "3.1, 3.5",
        "ict",
        "uniform-indices-and-weight",
    ),
    Finding("Lognormal indices are better than uniform ones, both weighted", "3.5", "ict", "uniform-indices"),
    Finding("The weight is better than none, both with lognormal indices", "3.1", "ict", "uniform-weight"),
)


@dataclass(frozen=True)
class Summary:
    """One variant's distance over its seeds, in the unit of uniform noise's distance.

    Attributes:
        mean, standard_error: of the seeds that ended; the error is None with fewer than two.
        count: seeds that ended with a distance.
        failed: seeds that diverged.
    """

    mean: float
    standard_error: float | None
    count: int
    failed: int


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
        ratio: worse mean over better mean.
        outcome: "holds" if the bars of one standard error do not meet (with the factor, if there is one),
            "reversed" if they do not meet the other way round, "open" if they meet or for want of seeds.
    """

    finding: Finding
    ratio: float
    outcome: str


def judge(report: dict[str, Any], step: str = "one_step") -> list[Verdict]:
    """The findings whose two variants were both run."""
    summaries = summarise(report, step)
    verdicts = []
    for finding in FINDINGS:
        better, worse = summaries.get(finding.better), summaries.get(finding.worse)
        if better is None or worse is None:
            continue
        verdicts.append(Verdict(finding, worse.mean / better.mean, _outcome(better, worse, finding.factor)))
    return verdicts


def _outcome(better: Summary, worse: Summary, factor: float) -> str:
    if better.failed or worse.failed:  # a variant that diverges is worse than one that does not
        return "open" if better.failed and worse.failed else "reversed" if better.failed else "holds"
    if better.standard_error is None or worse.standard_error is None:
        return "open"
    if factor * (better.mean + better.standard_error) < worse.mean - worse.standard_error:
        return "holds"
    if better.mean - better.standard_error > worse.mean + worse.standard_error:
        return "reversed"
    return "open"
