"""What is said of a claim follows from the seeds, and from nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.integrate
import scipy.stats

from ict_fast.ablation.verdicts import Verdict, chance, judge, summarise

Made = Callable[..., dict[str, Any]]


def _verdict(made_report: Made, better: list[float | None], worse: list[float | None], name: str) -> Verdict:
    (verdict,) = judge(made_report({"ict": better, name: worse}))
    assert (verdict.finding.better, verdict.finding.worse) == ("ict", name)
    return verdict


def test_mean_and_standard_error_are_numpys(made_report: Made) -> None:
    values = [0.012, 0.017, 0.0145]
    found = summarise(made_report({"ict": values}))["ict"]
    assert found.mean == pytest.approx(np.mean(values))
    assert found.standard_error == pytest.approx(np.std(values, ddof=1) / np.sqrt(3))
    assert (found.count, found.failed) == (3, 0)


@pytest.mark.parametrize(
    ("better", "worse", "words"),
    [
        ([0.010, 0.011, 0.012], [0.020, 0.021, 0.022], "holds"),
        ([0.020, 0.021, 0.022], [0.010, 0.011, 0.012], "the other way round"),
        ([0.010, 0.020, 0.030], [0.012, 0.022, 0.032], "open: the bars meet"),
        ([0.010, 0.011, 0.012, 0.011, 0.010], [0.020, 0.021], "holds"),
        ([0.010], [0.020, 0.021], "open: too few seeds"),
        ([0.010, 0.011], [0.020], "open: too few seeds"),
        # Not trained: as far as noise, or farther.
        ([0.010, 0.011], [1.5, 1.6], "holds: the other does not train"),
        ([1.5, 1.6], [0.010, 0.011], "the other way round: the first does not train"),
        ([1.2, 1.21], [1.5, 1.6], "neither trains"),
        ([1.2], [1.5], "neither trains"),
        ([None, None], [1.5, 1.6], "neither trains (2 of 2 diverged)"),
        # Diverged: one seed does not decide.
        ([0.010, 0.011, 0.012], [0.011, None, 0.012], "open: the bars meet (1 of 3 diverged)"),
        ([0.010, 0.011, 0.012], [0.020, None, 0.021], "holds (1 of 3 diverged)"),
        (
            [0.010, None, 0.011],
            [0.050, 0.051, 0.052],
            "open: seeds of the nearer one diverged (1 of 3 diverged)",
        ),
        ([0.050, 0.051], [0.010, 0.011, None], "open: seeds of the nearer one diverged (1 of 3 diverged)"),
        ([0.010, 0.011], [0.020, None], "open: too few seeds (1 of 2 diverged)"),
        ([0.010, 0.011], [None, None, None], "holds: the other does not train (3 of 3 diverged)"),
        ([None, None], [0.010, 0.011], "the other way round: the first does not train (2 of 2 diverged)"),
        (
            [0.010, None],
            [None, None],
            "open: seeds of the nearer one diverged (1 of 2 diverged and 2 of 2 diverged)",
        ),
        ([0.010, 0.011], [None], "open: too few seeds (1 of 1 diverged)"),
        ([None, None], [None], "both diverge (2 of 2 diverged and 1 of 1 diverged)"),
    ],
)
def test_what_is_said_of_an_ordering(
    made_report: Made, better: list[float | None], worse: list[float | None], words: str
) -> None:
    assert _verdict(made_report, better, worse, "l2").words == words


@pytest.mark.parametrize(
    ("worse", "words"),
    [
        ([0.0230, 0.0231, 0.0232], "holds"),
        ([0.0190, 0.0191, 0.0192], "order holds, factor 2 not reached"),
        ([0.0100, 0.0101, 0.0102], "open: the bars meet"),
        ([1.23, 1.24, 1.25], "holds: the other does not train"),
    ],
)
def test_a_factor_must_be_reached_beyond_the_bars(made_report: Made, worse: list[float], words: str) -> None:
    report = made_report({"ict": [0.010, 0.0101, 0.0102], "ct2023-no-ema": worse})
    (verdict,) = (v for v in judge(report) if v.finding.worse == "ct2023-no-ema")
    assert verdict.finding.factor == 2
    assert verdict.words == words


def test_the_ratios_standard_error_is_that_of_ratios_drawn(made_report: Made) -> None:
    rng = np.random.default_rng(1)
    verdict = _verdict(made_report, [0.010, 0.011, 0.012], [0.040, 0.043, 0.047, 0.045], "l2")
    better, worse = verdict.better, verdict.worse
    assert better.standard_error is not None
    assert worse.standard_error is not None
    drawn = rng.normal(worse.mean, worse.standard_error, 200_000)
    drawn /= rng.normal(better.mean, better.standard_error, 200_000)
    assert verdict.ratio_error == pytest.approx(drawn.std(), rel=0.05)
    assert _verdict(made_report, [0.010], [0.040, 0.041], "l2").ratio_error is None


def _chance_by_quadrature(first: int, second: int) -> float:
    """P(m2 - m1 > e1 + e2): given the errors, which are chi distributed, the means' difference is normal."""
    points = np.linspace(0.0, 9.0, 401)
    x, y = np.meshgrid(points, points, indexing="ij")
    errors = x / math.sqrt(first * (first - 1)) + y / math.sqrt(second * (second - 1))
    tail = scipy.stats.norm.sf(errors / math.sqrt(1 / first + 1 / second))
    density = tail * scipy.stats.chi.pdf(x, first - 1) * scipy.stats.chi.pdf(y, second - 1)
    return float(scipy.integrate.simpson(scipy.integrate.simpson(density, x=points), x=points))


@pytest.mark.parametrize(("first", "second"), [(3, 3), (5, 5), (3, 5)])
def test_an_ordering_holds_by_chance_as_often_as_an_integral_says(first: int, second: int) -> None:
    expected = _chance_by_quadrature(first, second)
    assert chance(first, second) == pytest.approx(expected, abs=0.001)
    assert chance(first, second) == chance(first, second)


def test_three_seeds_hold_by_chance_in_an_eighth_of_cases() -> None:
    assert round(100 * chance(3, 3), 1) == 12.7
    assert round(100 * chance(5, 5), 1) == 10.4
