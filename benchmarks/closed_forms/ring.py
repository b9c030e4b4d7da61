"""The uniform distribution on a circle: two values per image, one of which, the radius, the ODE moves."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import i0e, i1e
from scipy.stats import rice

Array = NDArray[np.float64]

_BULK = 8.0  # standard deviations of the posterior over the angle that the quadrature covers


@dataclass(frozen=True)
class Ring:
    """x = radius (cos a, sin a) with a uniform. |x + s z| has a Rice distribution."""

    radius: float
    values = 2
    jump = 0.0  # the share of probability at which the exact function jumps: the centre

    @property
    def std(self) -> float:
        """Standard deviation of each of the two values."""
        return self.radius / math.sqrt(2)

    def images(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """(count, 2, 1, 1) fp32 draws."""
        angle = 2 * math.pi * torch.rand(count, generator=generator)
        return self.radius * torch.stack([angle.cos(), angle.sin()], dim=1).view(-1, 2, 1, 1)

    def cdf(self, y: Array, sigma: float) -> Array:
        """P(|x + sigma z| <= y)."""
        return rice.cdf(y, self.radius / sigma, scale=sigma)

    def quantile(self, u: Array, sigma: float) -> Array:
        """The radius with share u of the probability inside."""
        return rice.ppf(u, self.radius / sigma, scale=sigma)

    def exact(self, y: Array, sigma: float, sigma_min: float) -> Array:
        """Radius of f at radius y; the direction stays."""
        inside, outside = self.cdf(y, sigma), rice.sf(y, self.radius / sigma, scale=sigma)
        least = (self.radius / sigma_min, 0.0, sigma_min)
        return np.where(
            inside < 0.5,
            rice.ppf(np.minimum(inside, 0.5), *least),
            rice.isf(np.minimum(outside, 0.5), *least),
        )

    def denoiser(self, y: Array, sigma: float) -> Array:
        """|E[x | x + sigma z]| at radius y: a ratio of Bessel functions."""
        concentration = self.radius * y / sigma**2
        return self.radius * i1e(concentration) / i0e(concentration)

    def teacher_states(
        self, y: Array, sigma_next: float, sigma: float, nodes: int
    ) -> tuple[Array, Array, Array]:
        """Where x + sigma z may lie, given that x + sigma_next z = (y, 0): the midpoint rule over x's angle.

        The angle has the von Mises distribution of concentration radius y / sigma_next^2; an angle and its
        negative count once, so that only the component along y is left of a mean.

        Args:
            y: (M,) radii.
            nodes: over half of the posterior's bulk, or half of the circle.
        Returns:
            (M, K) radii, (M, K) cosines of the angle to y, (M, K) weights that sum to 1.
        """
        concentration = (self.radius * y / sigma_next**2)[:, None]
        widest = np.minimum(math.pi, _BULK / np.sqrt(np.maximum(concentration, 1e-9)))
        angle = widest * (np.arange(nodes) + 0.5) / nodes
        weight = np.exp(concentration * (np.cos(angle) - 1))
        weight = weight / weight.sum(axis=1, keepdims=True)
        share = sigma / sigma_next
        along = share * y[:, None] + (1 - share) * self.radius * np.cos(angle)
        across = (1 - share) * self.radius * np.sin(angle)
        distance = np.hypot(along, across)
        return distance, along / distance, weight

    def support(self, sigma: float, width: float) -> tuple[float, float]:
        """Outside it |x + sigma z| is less likely than a Gaussian beyond `width` deviations."""
        return max(0.0, self.radius - width * sigma), self.radius + width * sigma
