"""Profiles of averages against their recurrences, and combinations against direct averages in closed form."""

from __future__ import annotations

import numpy as np
import pytest

from ict_fast.consistency.averaging import (
    combine,
    exponential_profile,
    power_exponent,
    power_profile,
    power_width,
)

WIDTHS = (0.02, 0.05, 0.1, 0.15, 0.25)


def _weights(profile, steps: int) -> np.ndarray:  # type: ignore[no-untyped-def]
    """What steps 0 (the initial weights) to T count."""
    return np.diff(profile(np.arange(steps + 1)), prepend=0.0)


def _by_recurrence(decays: np.ndarray) -> np.ndarray:
    """The same from ema = decay ema + (1 - decay) theta, followed for every unit vector at once."""
    weights = np.zeros(len(decays) + 1)
    weights[0] = 1.0
    for t, decay in enumerate(decays, start=1):
        weights *= decay
        weights[t] += 1 - decay
    return weights


@pytest.mark.parametrize("width", WIDTHS)
def test_the_width_is_the_profiles_standard_deviation(width: float) -> None:
    steps = 100_000
    weights, when = _weights(power_profile(width, steps), steps), np.arange(steps + 1) / steps
    mean = weights @ when
    assert weights.sum() == pytest.approx(1)
    assert (weights @ (when - mean) ** 2) ** 0.5 == pytest.approx(width, rel=1e-4)
    assert power_width(power_exponent(width)) == pytest.approx(width, rel=1e-12)


def test_the_widths_of_edm2_have_their_published_exponents() -> None:
    assert power_exponent(0.05) == pytest.approx(16.97, abs=0.01)
    assert power_exponent(0.10) == pytest.approx(6.94, abs=0.01)
    assert power_exponent(12**-0.5) == pytest.approx(0, abs=1e-9), "the plain mean"


@pytest.mark.parametrize("width", WIDTHS)
def test_the_power_profile_is_that_of_its_recurrence(width: float) -> None:
    steps = 300
    decays = (1 - 1 / np.arange(1, steps + 1)) ** (power_exponent(width) + 1)
    assert _weights(power_profile(width, steps), steps) == pytest.approx(_by_recurrence(decays), abs=1e-12)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("warmup", [False, True])
def test_the_exponential_profile_is_that_of_its_recurrence(decay: float, warmup: bool) -> None:
    k = np.arange(300)
    decays = np.minimum(decay, (k + 1) / (k + 10)) if warmup else np.full(300, decay)
    assert _weights(exponential_profile(decays), 300) == pytest.approx(_by_recurrence(decays), abs=1e-12)


def _trajectory(t: np.ndarray, steps: int) -> np.ndarray:
    """Three weights in closed form: one that settles, one that drifts, one that swings; (T + 1, 3)."""
    x = t / steps
    return np.stack([1 + np.exp(-9 * x), 1 + 0.5 * x**2, 1 + 0.2 * np.sin(25 * x)], axis=1)


@pytest.mark.parametrize("steps", [512, 20_000])
@pytest.mark.parametrize(
    ("asked", "value", "most"),
    [("width", 0.03, 1e-4), ("width", 0.075, 1e-4), ("width", 0.15, 1e-4), ("width", 0.25, 1e-2)]
    + [("forgets_in", share, 1e-3) for share in (0.02, 0.05, 0.1)],
)
def test_a_combination_of_snapshots_is_the_direct_average(
    steps: int, asked: str, value: float, most: float
) -> None:
    """Averages of a trajectory in closed form, in float64; 64 snapshots of widths 0.05 and 0.10."""
    theta = _trajectory(np.arange(steps + 1), steps)
    times = [steps * (i + 1) // 64 for i in range(64)]
    profiles = [power_profile(width, t) for t in times for width in (0.05, 0.1)]
    snapshots = np.stack([_weights(profile, steps) @ theta for profile in profiles])
    if asked == "width":
        target = power_profile(value, steps)
    else:
        target = exponential_profile(np.full(steps, 1 - 1 / (value * steps)))
    found = combine(profiles, target, steps)
    direct = _weights(target, steps) @ theta
    moved = np.abs(theta[-1] - direct).max()
    assert found.coefficients.sum() == pytest.approx(1)
    assert np.abs(found.coefficients @ snapshots - direct).max() < most * moved
    assert moved > 0.01, "the average is not the last weights"


def test_a_tracked_average_is_its_own_combination_and_a_constant_stays_one() -> None:
    profiles = [power_profile(width, t) for t in (50, 100, 150, 200) for width in (0.05, 0.1)]
    found = combine(profiles, power_profile(0.1, 200), 200)
    assert found.coefficients == pytest.approx([0] * 7 + [1], abs=1e-9)
    assert found.error < 1e-9
    alone = combine(profiles[-1:], power_profile(0.05, 200), 200)
    assert alone.coefficients == pytest.approx([1])
    assert alone.error > 0.1, "and says how far off it is"


@pytest.mark.parametrize("decay", [0.9, 1 - 1 / 200], ids=["forgets", "remembers the initial weights"])
def test_a_combination_is_the_nearest_there_is(decay: float) -> None:
    """By Lagrange's multiplier, of profiles by their recurrences; the initial weights count with step 1."""
    steps, columns, profiles = 200, [], []
    for t in (50, 100, 150, 200):
        for width in (0.05, 0.1):
            decays = (1 - 1 / np.arange(1, t + 1)) ** (power_exponent(width) + 1)
            columns.append(np.pad(_by_recurrence(decays), (0, steps - t)))
            profiles.append(power_profile(width, t))
    wanted = _by_recurrence(np.full(steps, decay))
    a, b = (np.concatenate([w[:1] + w[1:2], w[2:]]) for w in (np.stack(columns, axis=1), wanted))
    ones = np.ones((len(profiles), 1))
    system = np.block([[a.T @ a, ones], [ones.T, np.zeros((1, 1))]])
    expected = np.linalg.solve(system, np.append(a.T @ b, 1.0))[:-1]
    found = combine(profiles, exponential_profile(np.full(steps, decay)), steps)
    assert found.coefficients == pytest.approx(expected, abs=1e-6)
    error = np.linalg.norm(a @ expected - b) / np.linalg.norm(b)
    assert found.error == pytest.approx(error, rel=1e-6)
    assert (error > 0.9) == (decay > 0.99), "an average that remembers cannot be made"
