"""Mixtures of Gaussians on a line; a standard deviation of 0 makes a point."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import log_ndtr, logsumexp, ndtr

Array = NDArray[np.float64]

_BISECTIONS = 80
_BULK = 6.0  # standard deviations of a component's posterior that the quadrature covers


@dataclass(frozen=True)
class Mixture:
    """x ~ sum_k weights[k] N(means[k], stds[k]^2)."""

    weights: tuple[float, ...]
    means: tuple[float, ...]
    stds: tuple[float, ...]
    values = 1

    @property
    def std(self) -> float:
        """Standard deviation of the data."""
        mean = sum(w * m for w, m in zip(self.weights, self.means, strict=True))
        second = sum(w * (m**2 + s**2) for w, m, s in zip(*self._components(), strict=True))
        return float((second - mean**2) ** 0.5)

    @property
    def jump(self) -> float | None:
        """The share of probability at which the exact function jumps: between two points."""
        return None if any(self.stds) else self.weights[0]

    def images(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """(count, 1, 1, 1) fp32 draws."""
        weights, means, stds = (torch.tensor(each) for each in self._components())
        component = torch.multinomial(weights, count, replacement=True, generator=generator)
        draws = means[component] + stds[component] * torch.randn(count, generator=generator)
        return draws.view(-1, 1, 1, 1)

    def cdf(self, y: Array, sigma: float) -> Array:
        """P(x + sigma z <= y)."""
        weights, _, scaled = self._scaled(y, sigma)
        return ndtr(scaled) @ weights

    def quantile(self, u: Array, sigma: float) -> Array:
        """The y with P(x + sigma z <= y) = u, by bisection in float64, for u in (0, 1)."""
        weights, means, stds = self._at(sigma)
        low = np.full_like(u, float(np.min(means - 40 * stds)))
        high = np.full_like(u, float(np.max(means + 40 * stds)))
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            below = ndtr((middle[:, None] - means) / stds) @ weights < u
            low, high = np.where(below, middle, low), np.where(below, high, middle)
        return (low + high) / 2

    def exact(self, y: Array, sigma: float, sigma_min: float) -> Array:
        """The consistency function f(y, sigma), by equal logarithms of the smaller tail's probability."""
        weights, means, stds = self._at(sigma_min)
        upper = self.cdf(y, sigma) > 0.5
        sign = np.where(upper, -1.0, 1.0)[:, None]
        _, noisy_means, noisy_stds = self._at(sigma)
        wanted = logsumexp(log_ndtr(sign * (y[:, None] - noisy_means) / noisy_stds), axis=1, b=weights)
        low = np.full_like(y, float(np.min(means - 40 * stds)))
        high = np.full_like(y, float(np.max(means + 40 * stds)))
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            tail = logsumexp(log_ndtr(sign * (middle[:, None] - means) / stds), axis=1, b=weights)
            below = np.where(upper, tail > wanted, tail < wanted)
            low, high = np.where(below, middle, low), np.where(below, high, middle)
        return (low + high) / 2

    def denoiser(self, y: Array, sigma: float) -> Array:
        """E[x | x + sigma z = y]."""
        _, means, stds = (np.array(each) for each in self._components())
        total = stds**2 + sigma**2
        return np.sum(self._posterior(y, sigma) * (means + stds**2 / total * (y[:, None] - means)), axis=1)

    def teacher_states(
        self, y: Array, sigma_next: float, sigma: float, nodes: int
    ) -> tuple[Array, Array, Array]:
        """Where x + sigma z may lie, given that x + sigma_next z = y: the trapezoidal rule per component.

        Args:
            y: (M,).
            nodes: of a component that is not a point.
        Returns:
            (M, K) positions, (M, K) cosines with y's direction (1 on a line), (M, K) weights that sum to 1.
        """
        _, means, stds = (np.array(each) for each in self._components())
        total = stds**2 + sigma_next**2
        centre = means + (stds**2 + sigma * sigma_next) / total * (y[:, None] - means)
        spread = stds * (sigma_next - sigma) / np.sqrt(total)
        normal = np.linspace(-_BULK, _BULK, nodes) if spread.any() else np.zeros(1)
        shares = np.exp(-(normal**2) / 2)
        shares = shares / shares.sum()
        position = (centre[:, :, None] + spread[:, None] * normal).reshape(len(y), -1)
        weight = (self._posterior(y, sigma_next)[:, :, None] * shares).reshape(len(y), -1)
        return position, np.ones_like(position), weight

    def support(self, sigma: float, width: float) -> tuple[float, float]:
        """Outside it x + sigma z is less likely than a Gaussian beyond `width` deviations."""
        _, means, stds = self._at(sigma)
        return float(np.min(means - width * stds)), float(np.max(means + width * stds))

    def _components(self) -> tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]:
        return self.weights, self.means, self.stds

    def _at(self, sigma: float) -> tuple[Array, Array, Array]:
        """Weights, means and standard deviations of x + sigma z."""
        weights, means, stds = (np.array(each) for each in self._components())
        return weights, means, np.sqrt(stds**2 + sigma**2)

    def _scaled(self, y: Array, sigma: float) -> tuple[Array, Array, Array]:
        weights, means, stds = self._at(sigma)
        return weights, stds, (y[:, None] - means) / stds

    def _posterior(self, y: Array, sigma: float) -> Array:
        """(M, components): which component x came from."""
        weights, stds, scaled = self._scaled(y, sigma)
        logarithm = np.log(weights / stds) - scaled**2 / 2
        logarithm -= logarithm.max(axis=1, keepdims=True)
        likelihood = np.exp(logarithm)
        return likelihood / likelihood.sum(axis=1, keepdims=True)
