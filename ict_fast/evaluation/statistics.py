"""Mean and covariance of a set of features, and the distance between two Gaussians that have them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from ict_fast.errors import InputError


@dataclass(frozen=True)
class Sums:
    """What statistics are computed from; sums of parts add up. float64."""

    count: int
    total: np.ndarray
    """(D,): the sum of the features."""
    products: np.ndarray
    """(D, D): the sum of their outer products."""


@dataclass(frozen=True)
class Statistics:
    """Mean and covariance of a set of features, float64."""

    mean: np.ndarray
    """(D,)."""
    covariance: np.ndarray
    """(D, D), normalised by n - 1 as everywhere in the field."""


def sums(features: np.ndarray) -> Sums:
    """The sums over (N, D) features, in float64 whatever their type."""
    values = torch.from_numpy(np.asarray(features)).double()
    return Sums(len(values), values.sum(0).numpy(), (values.T @ values).numpy())


def statistics(parts: Iterable[Sums]) -> Statistics:
    """The statistics of the union of the parts, which are added in their order.

    Raises:
        InputError: of fewer than 2 images.
    """
    count, total, products = 0, np.zeros(()), np.zeros(())
    for part in parts:
        count, total, products = count + part.count, total + part.total, products + part.products
    if count < 2:
        raise InputError(
            f"{count} image{'s' if count != 1 else ''}; a Fréchet distance needs at least 2, and better"
            " thousands"
        )
    mean = total / count
    return Statistics(mean, (products - count * np.outer(mean, mean)) / (count - 1))


def frechet_distance(first: Statistics, second: Statistics) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) (Heusel et al. 2017, equation 6: "FID").

    With S = A A' the trace of (S1 S2)^(1/2) is the sum of the singular values of A1' A2. Unlike the
    eigenvalues of S1 S2, whose rounding the root magnifies from e to sqrt(e), these keep full precision where
    a covariance is singular, as it is with fewer images than features (relative error at 2,048 features and
    1,000 images: 3e-14; by torchmetrics, which takes the eigenvalues, 2e-7).

    Returns:
        0 for equal statistics; the unit is that of the features squared.
    """
    means = float(np.square(first.mean - second.mean).sum())
    traces = float(np.trace(first.covariance) + np.trace(second.covariance))
    roots = torch.linalg.svdvals(_root(first.covariance).T @ _root(second.covariance))
    # Rounding can bring equal sets to -1e-13.
    return max(0.0, means + traces - 2 * float(roots.sum()))


def _root(covariance: np.ndarray) -> torch.Tensor:
    """A with A A' = covariance; eigenvalues that rounding has made negative are zero."""
    values, vectors = torch.linalg.eigh(torch.from_numpy(covariance))
    return vectors * values.clamp_min(0).sqrt()
