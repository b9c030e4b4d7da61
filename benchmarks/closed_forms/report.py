"""Reading the report of benchmarks/exactness.py: its records, and what theory expects of them."""

from __future__ import annotations

import math
from itertools import pairwise
from statistics import mean
from typing import Any

Report = dict[str, Any]
Record = dict[str, Any]

# How the distance of the fixed point from the exact function should fall: as N to the power of this.
EXPECTED: dict[str, dict[str, float | None]] = {
    "gaussian": {"rms": -1.0, "mean": -1.0},
    "mixture": {"rms": -1.0, "mean": -1.0},
    "two points": {"rms": -0.25, "mean": -0.5},
    "ring": {"rms": -0.5, "mean": None},
}
TOLERANCE = 0.1


def limits(report: Report, problem: str, metric: str) -> list[Record]:
    """The fixed points, ascending in N."""
    return [r for r in report["fixed_points"] if (r["problem"], r["metric"]) == (problem, metric)]


def targets(report: Report, problem: str) -> list[Record]:
    """The figures of the target, ascending in N."""
    return [record for record in report["targets"] if record["problem"] == problem]


def learned(report: Report, metric: str, curriculum: str, problem: str | None = None) -> list[Record]:
    """The trainings; of every problem, or of one."""
    return [
        record
        for record in report["learned"]
        if (record["metric"], record["curriculum"]) == (metric, curriculum)
        and problem in (None, record["problem"])
    ]


def nearest(record: Record, sigma: float) -> Record:
    """The level of a record nearest to sigma."""
    found: Record = min(record["levels"], key=lambda level: abs(math.log(level["sigma"] / sigma)))
    return found


def at(record: Record, near: float) -> Record:
    """The level of a target's record that was taken near this sigma."""
    return next(level for level in record["levels"] if level["near"] == near)


def curriculum_gains(report: Report, sigma: float) -> list[float]:
    """Per problem: distance to the exact function with N fixed, less that with the curriculum; squared norm.

    Means over the seeds that both have, at the N that both end with. Empty if there is no such pair.
    """
    gains = []
    for problem in EXPECTED:
        fixed = {(r["num_scales"], r["seed"]): r for r in learned(report, "l2", "fixed", problem)}
        pairs = [
            (fixed[key], r)
            for r in learned(report, "l2", "doubling", problem)
            if (key := (r["num_scales"], r["seed"])) in fixed
        ]
        if pairs:
            gains.append(
                mean(nearest(a, sigma)["to_exact"] - nearest(b, sigma)["to_exact"] for a, b in pairs)
            )
    return gains


def slopes(report: Report, problem: str, figure: str) -> list[float]:
    """d ln(error) / d ln N at sigma_max from each N to the next, squared norm."""
    errors = [
        (record["num_scales"], record["levels"][-1][figure]) for record in limits(report, problem, "l2")
    ]
    return [math.log(e2 / e1) / math.log(n2 / n1) for (n1, e1), (n2, e2) in pairwise(errors)]


def holds(report: Report, problem: str) -> bool:
    """Whether the errors of the fixed point fall as theory says, each within TOLERANCE of its power."""
    return all(
        power is None or abs(slopes(report, problem, figure)[-1] - power) < TOLERANCE
        for figure, power in EXPECTED[problem].items()
    )
