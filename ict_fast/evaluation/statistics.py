"""Mean and covariance of a set of features, and the distance between two Gaussians that have them."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from ict_fast.errors import InputError


@dataclass(frozen=True)
class Sums:
    """What statistics are computed from; those of parts give those of their union, see `union`. float64."""

    count: int
    mean: np.ndarray
    """(D,)."""
    products: np.ndarray
    """(D, D): the sum of the outer products of the features less their mean."""


@dataclass(frozen=True)
class Statistics:
    """Mean and covariance of a set of features, float64."""

    mean: np.ndarray
    """(D,)."""
    covariance: np.ndarray
    """(D, D), normalised by n - 1 as everywhere in the field."""


def sums(features: np.ndarray) -> Sums:
    """The sums over (N, D) features, in float64 whatever their type."""
    values = torch.from_numpy(np.array(features, np.float64))  # a copy, which is centred in place
    if not len(values):
        return Sums(0, np.zeros(()), np.zeros(()))
    mean = values.mean(0)
    values -= mean
    return Sums(len(values), mean.numpy(), (values.T @ values).numpy())


def union(first: Sums, second: Sums) -> Sums:
    """The sums over both sets (Chan, Golub and LeVeque 1983).

    Plain sums of products would lose the covariance of features whose mean is large beside their spread.
    """
    count = first.count + second.count
    if not count:
        return first
    apart = second.mean - first.mean
    products = first.products + second.products
    products = products + np.outer(apart, apart) * (first.count * second.count / count)
    return Sums(count, first.mean + apart * (second.count / count), products)


def statistics(parts: Iterable[Sums]) -> Statistics:
    """The statistics of the union of the parts, which are put together in their order.

    Raises:
        InputError: of fewer than 2 images.
    """
    whole = functools.reduce(union, parts, Sums(0, np.zeros(()), np.zeros(())))
    if whole.count < 2:
        raise InputError(
            f"{whole.count} image{'s' if whole.count != 1 else ''}; a Fréchet distance needs at least 2, and"
            " better thousands"
        )
    return Statistics(whole.mean, whole.products / (whole.count - 1))


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


def too_few(num_features: int, generated: int, reference: int | None) -> list[str]:
    """Warnings of covariances that are singular for want of images.

    Args:
        generated, reference: images in each set; None if it is not known.
    """
    return [
        f"{number:,} {what} images for {num_features:,} features: their covariance is singular, and the"
        " Fréchet distance is far too large"
        for what, number in (("generated", generated), ("reference", reference))
        if number is not None and number <= num_features
    ]


def _root(covariance: np.ndarray) -> torch.Tensor:
    """A with A A' = covariance; eigenvalues that rounding has made negative are zero."""
    values, vectors = torch.linalg.eigh(torch.from_numpy(covariance))
    return vectors * values.clamp_min(0).sqrt()
