"""The loss by noise level: which part of the curriculum the mean hides."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ict_fast.config import MethodConfig

BUCKETS = 12


def sigma_edges(method: MethodConfig) -> list[float]:
    """The borders of the buckets, BUCKETS + 1 of them: equal steps of ln sigma from sigma_min to sigma_max.

    They do not follow N(k), so that curves go on from one stage to the next.
    """
    low, high = math.log(method.sigma_min), math.log(method.sigma_max)
    inner = [math.exp(low + (high - low) * i / BUCKETS) for i in range(1, BUCKETS)]
    return [method.sigma_min, *inner, method.sigma_max]


class LossBySigma:
    """Sorts the losses of images into buckets of noise level, on the device."""

    def __init__(self, method: MethodConfig, device: torch.device) -> None:
        self._inner = torch.tensor(sigma_edges(method)[1:-1], device=device)
        self._numbers = torch.arange(BUCKETS, device=device)

    def __call__(self, loss_n: Tensor, sigma_n: Tensor) -> Tensor:
        """Sums and numbers of the finite losses per bucket, (2 BUCKETS,) fp32.

        Args:
            loss_n: (N,) fp32, weighted losses.
            sigma_n: (N,) fp32, the teacher's noise levels, which index and weight of a pair go by.
        """
        bucket_n = torch.bucketize(sigma_n, self._inner, right=True)
        # Not index_add_: on a GPU its order, so its rounding, changes from run to run.
        belongs = (bucket_n[:, None] == self._numbers) & torch.isfinite(loss_n)[:, None]
        sums = torch.where(belongs, loss_n[:, None], 0.0).sum(0)
        return torch.cat([sums, belongs.sum(0).to(sums.dtype)])


def bucket_means(sums_and_counts: Tensor) -> list[float | None]:
    """Mean loss of each bucket, waits for the device; None for an empty one, or a sum beyond fp32."""
    sums, counts = sums_and_counts.cpu().view(2, BUCKETS).tolist()
    return [
        total / count if count and math.isfinite(total) else None
        for total, count in zip(sums, counts, strict=True)
    ]
