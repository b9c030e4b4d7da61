"""Which two noise levels each image is trained at.

Grid (Karras et al., "Elucidating the design space of diffusion-based generative models", NeurIPS 2022,
equation 5, in ascending order), for i = 1 .. N:

    sigma_i = (sigma_min^(1/rho) + (i-1)/(N-1) (sigma_max^(1/rho) - sigma_min^(1/rho)))^rho

Index distribution and weight (Song & Dhariwal, "Improved Techniques for Training Consistency Models", ICLR
2024, sections 3.3 and 3.5), for the N - 1 pairs:

    p(i) ~ erf((ln sigma_{i+1} - p_mean) / (sqrt2 p_std)) - erf((ln sigma_i - p_mean) / (sqrt2 p_std))
    weight(i) = 1 / (sigma_{i+1} - sigma_i)

The teacher is at sigma_i and the student at sigma_{i+1}. Code counts pairs from 0.

Drawing compares integers: u is one 32-bit Philox word and T_j = floor(2^32 CDF_j), so index = #{j : T_j <= u}
is the same on every backend. Everything else is a look-up in a table computed in float64 on the host.

Bytes: 20 written per sample; the tables stay in cache.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .philox import LEVELS, Seed, uniform_bits

CURRICULUM_SCALES = (11, 21, 41, 81, 161, 321, 641, 1281)


class NoiseLevels(NamedTuple):
    """The levels of a batch, each field of shape (batch,)."""

    # int64, 0 .. N-2: the pair's lower point on the ascending grid (the field hides tuple.index)
    index: Tensor  # type: ignore[assignment]
    sigma: Tensor  # fp32, the teacher's level
    sigma_next: Tensor  # fp32, the student's level, the next one up
    weight: Tensor  # fp32, the loss weight


class _Table(NamedTuple):
    """One row per number of scales; rows are padded to the longest."""

    num_scales: Tensor  # (rows,) int64
    thresholds: Tensor  # (rows, longest - 2) int64, padded with 2^32, which no word reaches
    sigma: Tensor  # (rows, longest) fp32
    weight: Tensor  # (rows, longest - 1) fp32


# --------------------------------------------------------------------------------------- the eager definition


def noise_level_grid(
    num_scales: int, *, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> Tensor:
    """The N noise levels, ascending from exactly sigma_min to exactly sigma_max.

    Args:
        num_scales: N, at least 2.
        sigma_min, sigma_max: the ends, 0 < sigma_min < sigma_max, in units of pixels in [-1, 1].
        rho: curvature of the grid; larger puts more levels near sigma_min.
    Returns:
        (N,) float64 on the CPU.
    Raises:
        ValueError: for values out of those ranges.
    Source:
        Karras et al. 2022, equation 5.
    """
    if num_scales < 2:
        raise ValueError(f"num_scales counts grid points and must be at least 2, got {num_scales}")
    if not (0.0 < sigma_min < sigma_max and rho > 0.0):
        raise ValueError(f"need 0 < sigma_min < sigma_max and rho > 0, got {sigma_min}, {sigma_max}, {rho}")
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    steps = num_scales - 1
    # Python's floats, not torch's vectorised pow: the table must not depend on the machine's vector width.
    inner = [(low + i / steps * (high - low)) ** rho for i in range(1, steps)]
    return torch.tensor([sigma_min, *inner, sigma_max], dtype=torch.float64)


def noise_level_probabilities(
    num_scales: int,
    *,
    p_mean: float = -1.1,
    p_std: float = 2.0,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    indices: str = "lognormal",
) -> Tensor:
    """The probability of each pair of adjacent levels.

    Args:
        num_scales: N, at least 2.
        p_mean, p_std: mean and standard deviation of ln sigma.
        sigma_min, sigma_max, rho: the grid; see `noise_level_grid`.
        indices: "lognormal", the discretised normal of ln sigma, or "uniform", as in consistency training of
            2023.
    Returns:
        (N - 1,) float64 on the CPU, summing to 1.
    Raises:
        ValueError: for an unknown `indices`, p_std <= 0, or a normal that misses the whole grid.
    Source:
        Song & Dhariwal 2024, section 3.5.
    """
    sigma = noise_level_grid(num_scales, sigma_min=sigma_min, sigma_max=sigma_max, rho=rho).tolist()
    if indices == "uniform":
        return torch.full((num_scales - 1,), 1.0 / (num_scales - 1), dtype=torch.float64)
    if indices != "lognormal":
        raise ValueError(f"indices must be 'lognormal' or 'uniform', got {indices!r}")
    if not p_std > 0.0:
        raise ValueError(f"p_std must be positive, got {p_std}")
    cdf = [math.erf((math.log(s) - p_mean) / (math.sqrt(2.0) * p_std)) for s in sigma]
    mass = torch.tensor([high - low for low, high in pairwise(cdf)], dtype=torch.float64)
    if not mass.sum() > 0.0:
        raise ValueError(
            f"no level of [{sigma_min}, {sigma_max}] is likely under p_mean={p_mean}, p_std={p_std}"
        )
    return mass / mass.sum()


_tables: dict[tuple[object, ...], _Table] = {}


# Under torch.compile the table is a constant of the graph: the host computes it once, while tracing.
@torch._dynamo.assume_constant_result
def _table(
    scales: tuple[int, ...],
    p_mean: float,
    p_std: float,
    sigma_min: float,
    sigma_max: float,
    rho: float,
    indices: str,
    weighting: str,
    device: torch.device,
) -> _Table:
    key = (scales, p_mean, p_std, sigma_min, sigma_max, rho, indices, weighting, str(device))
    if key not in _tables:
        if weighting not in ("inverse-gap", "uniform"):
            raise ValueError(f"weighting must be 'inverse-gap' or 'uniform', got {weighting!r}")
        grids = [noise_level_grid(n, sigma_min=sigma_min, sigma_max=sigma_max, rho=rho) for n in scales]
        longest = max(scales)
        thresholds = torch.full((len(scales), longest - 2), 2**32, dtype=torch.int64)
        sigma = torch.full((len(scales), longest), math.nan, dtype=torch.float64)
        weight = torch.full((len(scales), longest - 1), math.nan, dtype=torch.float64)
        for row, (n, grid) in enumerate(zip(scales, grids, strict=True)):
            probability = noise_level_probabilities(
                n,
                p_mean=p_mean,
                p_std=p_std,
                sigma_min=sigma_min,
                sigma_max=sigma_max,
                rho=rho,
                indices=indices,
            )
            thresholds[row, : n - 2] = (probability.cumsum(0)[:-1] * 2.0**32).floor().to(torch.int64)
            sigma[row, :n] = grid
            weight[row, : n - 1] = 1.0 / grid.diff() if weighting == "inverse-gap" else 1.0
        # Ordinary tensors, even if the first call comes under inference_mode: a later one may record a graph.
        _tables[key] = _Table(
            torch.tensor(scales, dtype=torch.int64).to(device),
            thresholds.to(device),
            sigma.to(device, torch.float32),
            weight.to(device, torch.float32),
        )
    return _tables[key]


# -------------------------------------------------------------------------------------------- public function


def sample_noise_levels(
    batch_size: int,
    num_scales: int | Tensor,
    *,
    p_mean: float = -1.1,
    p_std: float = 2.0,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    seed: Seed = None,
    offset: int | Tensor = 0,
    device: torch.device | str | None = None,
    indices: str = "lognormal",
    weighting: str = "inverse-gap",
    scales: Sequence[int] = CURRICULUM_SCALES,
) -> NoiseLevels:
    """Draw the pair of noise levels of each sample of a batch.

    Args:
        batch_size: number of samples of this call.
        num_scales: N, the number of grid points: an int of at least 2, or a 0-dim int64 tensor, which is
            never read by the host, so that a new stage of the curriculum neither synchronises nor recompiles.
        p_mean, p_std, sigma_min, sigma_max, rho: see `noise_level_probabilities` and `noise_level_grid`.
        seed: an int, an int64 tensor (run seed, step), or None (drawn from torch's generator).
        offset: number of this call's first sample in the global batch, so that levels do not depend on
            micro-batch or rank.
        device: default: that of a tensor `num_scales` or `seed`, else the CPU.
        indices: "lognormal" or "uniform".
        weighting: "inverse-gap", 1/(sigma_next - sigma), or "uniform", 1.
        scales: the values that a *tensor* num_scales may take. One outside them gives index 0 and NaN for
            sigma, sigma_next and weight: the loss is NaN at once, since the host cannot be asked.
    Returns:
        NoiseLevels(index, sigma, sigma_next, weight): int64 and fp32, each (batch,).
    Raises:
        ValueError: for a parameter out of range.
    Source:
        Song & Dhariwal 2024, sections 3.3 and 3.5.
    """
    if device is None:
        on_device = next((t for t in (num_scales, seed) if isinstance(t, Tensor)), None)
        device = "cpu" if on_device is None else on_device.device
    device = torch.device(device)
    rows = tuple(scales) if isinstance(num_scales, Tensor) else (int(num_scales),)
    table = _table(rows, p_mean, p_std, sigma_min, sigma_max, rho, indices, weighting, device)
    word = uniform_bits(batch_size, seed, offset, LEVELS, device=device)
    if isinstance(num_scales, Tensor):
        matches = table.num_scales == num_scales.to(device)
        row = matches.to(torch.int64).argmax(dim=0, keepdim=True)
        thresholds, sigmas, weights = (
            t.index_select(0, row)[0] for t in (table.thresholds, table.sigma, table.weight)
        )
        index = torch.searchsorted(thresholds, word, right=True)
        index = torch.where(matches.any(), index, 0)
        unknown = torch.where(matches.any(), 0.0, math.nan)  # x + 0 is x; a value not in the table gives NaN
        sigmas, weights = sigmas + unknown, weights + unknown
    else:
        thresholds, sigmas, weights = table.thresholds[0], table.sigma[0], table.weight[0]
        index = torch.searchsorted(thresholds, word, right=True)
    return NoiseLevels(index, sigmas[index], sigmas[index + 1], weights[index])
