"""Averages of the weights over training: their profiles, and how to make one of any length afterwards.

An average after T steps is sum_tau w(tau) theta(tau), with theta(0) the initial weights and w summing to 1; w
is its profile. A power-function average (Karras et al., "Analyzing and improving the training dynamics of
diffusion models", CVPR 2024, section 3.1) follows

    ema(t) = beta(t) ema(t-1) + (1 - beta(t)) theta(t),    beta(t) = (1 - 1/t)^(gamma+1)

so that w(tau) = (tau^(gamma+1) - (tau-1)^(gamma+1)) / T^(gamma+1) exactly, about tau^gamma. It grows with the
training: its standard deviation is sigma_rel T. Any profile is, nearly, a linear combination of those of
snapshots that were taken of two such averages as the training went on (section 3.2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

Cumulative = Callable[[np.ndarray], np.ndarray]
"""The share of an average that steps 0 to tau have, of tau; int64 to float64, 1 from T on."""

# Profiles are compared step by step, or in so many bins where a run has more steps. For 400,000 steps and 128
# snapshots, 60,000 bins instead change the coefficients by less than 3e-4, and the error in its fourth digit.
_MOST_BINS = 8192


class Combination(NamedTuple):
    """An average as a linear combination of snapshots."""

    coefficients: np.ndarray
    """float64, one per snapshot; they sum to 1."""
    error: float
    """Distance of the combined profile from the one that was asked for, relative to the latter's length."""


def power_exponent(sigma_rel: float) -> float:
    """gamma of the power-function average of relative width sigma_rel.

    Solves sigma_rel^2 = (gamma+1) / ((gamma+2)^2 (gamma+3)), a cubic, for the largest gamma (Karras et al.
    2024, section 3.1 and appendix C).

    Args:
        sigma_rel: standard deviation of the profile, as a share of the training; in (0, 1/sqrt(12)).
    """
    inverse = sigma_rel**-2
    roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
    return float(roots.real.max())


def power_width(exponent: float) -> float:
    """sigma_rel of the power-function average of exponent gamma; see `power_exponent`."""
    return float((exponent + 1) ** 0.5 / ((exponent + 2) * (exponent + 3) ** 0.5))


def power_profile(sigma_rel: float, steps: int) -> Cumulative:
    """Profile of a power-function average after so many steps: (tau / T)^(gamma+1)."""
    exponent = power_exponent(sigma_rel) + 1
    return lambda tau: (np.minimum(tau, steps) / steps) ** exponent


def exponential_profile(decays: np.ndarray) -> Cumulative:
    """Profile of an exponential average whose decay at step k = 0, 1, ... is decays[k].

    What the initial weights still count is the product of all decays.
    """
    with np.errstate(divide="ignore"):  # a decay of 0 forgets all
        after = np.concatenate([np.cumsum(np.log(decays)[::-1])[::-1], [0.0]])  # ln of what follows tau
    kept = np.exp(after)
    return lambda tau: kept[np.minimum(tau, len(decays))]


def combine(snapshots: Sequence[Cumulative], target: Cumulative, steps: int) -> Combination:
    """The combination of snapshots' profiles that is nearest to a profile, by least squares in float64.

    The coefficients sum to 1, so that weights which never changed are met exactly.

    Args:
        snapshots: profiles of the averages that were kept, at least one.
        target: the profile to be met.
        steps: T, of the newest snapshot.
    """
    edges = np.unique(np.linspace(0, steps, min(steps, _MOST_BINS) + 1).round().astype(np.int64))

    def density(profile: Cumulative) -> np.ndarray:
        """The profile's mass in each bin, so scaled that squares add up to the integral's."""
        masses = np.diff(profile(edges))
        masses[0] += profile(edges[:1])[0]  # the initial weights count with the first steps'
        return masses / np.sqrt(np.diff(edges))

    columns = np.stack([density(profile) for profile in snapshots], axis=1)
    wanted = density(target)
    last = columns[:, -1]
    # The last coefficient is 1 less the others; that leaves a plain least-squares problem for these.
    free, *_ = np.linalg.lstsq(columns[:, :-1] - last[:, None], wanted - last, rcond=None)
    coefficients = np.append(free, 1.0 - free.sum())
    error = np.linalg.norm(columns @ coefficients - wanted) / np.linalg.norm(wanted)
    return Combination(coefficients, float(error))
