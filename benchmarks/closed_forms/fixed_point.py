"""What consistency training at N noise levels converges to, without training anything.

With a network that can be any function, the student at level i+1 becomes the best prediction of its target,

    f_{i+1}(y) = argmin_m E[ d(m, f_i(x + s_i z)) | x + s_{i+1} z = y ],       f_1(y) = y,

which for the squared L2 metric is a conditional mean. So the fixed point at N levels is a recursion over the
grid, computed here by quadrature in float64. Read backwards it is the mean end of a random walk: from y, draw
x from the posterior, go to x + s_i z with the z that belongs to it, and so on down to s_1. With two points
(N = 2) that is the denoiser E[x | y]; as N grows the walk becomes the probability-flow ODE.

For Gaussian data of variance v it has a closed form: f_i(y) = a_i y with

    a_{i+1} / a_i = (v + s_i s_{i+1}) / (v + s_{i+1}^2),    a_N / a_exact = prod_i cos(b_{i+1} - b_i),

where tan b_i = s_i / sqrt v. Every factor is 1 - O(1/N^2) and there are N - 1 of them: the error is O(1/N).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.integrate import quad
from scipy.interpolate import PchipInterpolator

from ict_kernels import noise_level_grid

if TYPE_CHECKING:
    from closed_forms import Problem

Array = NDArray[np.float64]

# f_i is tabulated at so many positions, evenly over so many standard deviations to either side; an interval
# over which it changes by more than STEP is halved. Between two points the limit of Pseudo-Huber jumps: on
# the even table alone the jump would be as wide as an interval, and the error found that of the table.
POSITIONS = 1501
STEP = 0.01
_WIDTH = 9.0
_HALVINGS = 30
# Quadrature: the mean of a smooth function needs few nodes, what resembles a median needs them dense.
_NODES_OF_MEAN = 24
_NODES_OF_CENTRE = 192
_BISECTIONS = 32


class FixedPoint(NamedTuple):
    """f_N as a table at one noise level; the number that the consistency function moves (see `Problem`)."""

    sigma: float
    function: PchipInterpolator

    def __call__(self, y: Array) -> Array:
        return self.function(y)


def fixed_points(
    problem: Problem, num_scales: int, sigmas: Iterable[float], *, huber_c: float | None = None
) -> list[FixedPoint]:
    """The limit of consistency training on an ascending grid of `num_scales` levels.

    Args:
        problem: the data.
        num_scales: N.
        sigmas: ascending; of each the nearest level of the grid is returned.
        huber_c: c of the Pseudo-Huber metric; None for the squared L2 norm.
    """
    grid = noise_level_grid(num_scales).numpy()
    wanted = [int(np.abs(np.log(grid / sigma)).argmin()) for sigma in sigmas]
    nodes = _NODES_OF_MEAN if huber_c is None else _NODES_OF_CENTRE
    function = _tabulated(lambda y: y, problem.support(grid[0], _WIDTH))
    found = {0: FixedPoint(float(grid[0]), function)}
    for i in range(max(wanted)):

        def student(y: Array, i: int = i, teacher: PchipInterpolator = function) -> Array:
            position, cosine, weight = problem.teacher_states(y, grid[i + 1], grid[i], nodes)
            targets = _targets(teacher(position), cosine, weight)
            return targets.mean() if huber_c is None else targets.pseudo_huber_centre(huber_c)

        function = _tabulated(student, problem.support(grid[i + 1], _WIDTH))
        if i + 1 in wanted:
            found[i + 1] = FixedPoint(float(grid[i + 1]), function)
    return [found[index] for index in wanted]


def gaussian_fixed_point(num_scales: int, std: float) -> float:
    """The closed form: a_N / a_exact at sigma_max for N(0, std^2) data."""
    angle = np.arctan(noise_level_grid(num_scales).numpy() / std)
    return float(np.cos(np.diff(angle)).prod())


def gaussian_leading_constant(std: float, *, sigma_min: float, sigma_max: float, rho: float) -> float:
    """C in 1 - a_N / a_exact = C / (N - 1) + O(1/N^2): half the integral of (db/du)^2 over the grid's u."""
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)

    def speed(u: float) -> float:
        root = low + u * (high - low)
        return rho * (high - low) * root ** (rho - 1) * std / (std**2 + root ** (2 * rho))

    return float(quad(lambda u: speed(u) ** 2 / 2, 0, 1, limit=200)[0])


class Targets(NamedTuple):
    """The distribution of the consistency target at M positions: K values each, along and across y."""

    along: Array
    across: Array
    weight: Array

    def mean(self) -> Array:
        """(M,): the component along y. The one across is 0 by symmetry."""
        return (self.weight * self.along).sum(axis=1)

    def variance(self) -> Array:
        """(M,): E |target - mean|^2, over all values of an image."""
        squared = (self.along - self.mean()[:, None]) ** 2 + self.across**2
        return (self.weight * squared).sum(axis=1)

    def pseudo_huber_centre(self, c: float) -> Array:
        """(M,): the minimum over m of E sqrt(|target - m|^2 + c^2), by bisection of its slope."""
        low, high = self.along.min(axis=1), self.along.max(axis=1)
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            difference = self.along - middle[:, None]
            slope = difference / np.sqrt(difference**2 + self.across**2 + c**2)
            below = (self.weight * slope).sum(axis=1) > 0
            low, high = np.where(below, middle, low), np.where(below, high, middle)
        return (low + high) / 2


def target_statistics(
    problem: Problem, y: Array, sigma_next: float, sigma: float, sigma_min: float
) -> tuple[Array, Array]:
    """Bias and variance of the target f(x + sigma z, sigma), f the exact function, given x + sigma_next z.

    Args:
        y: (M,) positions at sigma_next.
    Returns:
        (M,) mean of the target less f(y, sigma_next), (M,) variance.
    """
    position, cosine, weight = problem.teacher_states(y, sigma_next, sigma, _NODES_OF_MEAN)
    value = problem.exact(position.ravel(), sigma, sigma_min).reshape(position.shape)
    targets = _targets(value, cosine, weight)
    return targets.mean() - problem.exact(y, sigma_next, sigma_min), targets.variance()


def _tabulated(function: Callable[[Array], Array], support: tuple[float, float]) -> PchipInterpolator:
    """A table of a function from positions to values, finer where the values change fast."""
    y = np.linspace(*support, POSITIONS)
    value = function(y)
    for _ in range(_HALVINGS):
        steep = np.flatnonzero(np.abs(np.diff(value)) > STEP)
        if not steep.size:
            break
        middle = (y[steep] + y[steep + 1]) / 2
        y, value = np.insert(y, steep + 1, middle), np.insert(value, steep + 1, function(middle))
    return PchipInterpolator(y, value)


def _targets(value: Array, cosine: Array, weight: Array) -> Targets:
    return Targets(value * cosine, value * np.sqrt(np.maximum(1 - cosine**2, 0)), weight)
