"""Distributions whose consistency function is known exactly, and what finite N makes of it.

Data of one or two values per image, so that images are tensors of shape (count, values, 1, 1). In each the
consistency function moves one number, the position on the line or the distance from the centre, and the
probability-flow ODE keeps the share of probability below it. That number's quantile function at every noise
level is all one needs: with Q(u, s) the u-quantile of x + s z, f(Q(u, s), s) = Q(u, sigma_min).
"""

from closed_forms.fixed_point import (
    FixedPoint,
    Targets,
    fixed_points,
    gaussian_fixed_point,
    gaussian_leading_constant,
    target_statistics,
)
from closed_forms.mixture import Mixture
from closed_forms.ring import Ring

Problem = Mixture | Ring

PROBLEMS: dict[str, Problem] = {
    "gaussian": Mixture(weights=(1.0,), means=(0.0,), stds=(0.3,)),
    "mixture": Mixture(weights=(0.6, 0.4), means=(-0.4, 0.5), stds=(0.2, 0.25)),
    "two points": Mixture(weights=(0.5, 0.5), means=(-0.5, 0.5), stds=(0.0, 0.0)),
    "ring": Ring(radius=0.7),
}

__all__ = [
    "PROBLEMS",
    "FixedPoint",
    "Mixture",
    "Problem",
    "Ring",
    "Targets",
    "fixed_points",
    "gaussian_fixed_point",
    "gaussian_leading_constant",
    "target_statistics",
]
