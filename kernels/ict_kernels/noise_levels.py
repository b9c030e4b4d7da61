# mypy: disable-error-code="no-untyped-def"
"""Which two noise levels each image is trained at.

Grid (Karras et al., "Elucidating the design space of diffusion-based generative models", NeurIPS 2022,
equation 5, in ascending order), for i = 1 .. N:

    sigma_i = (sigma_min^(1/rho) + (i-1)/(N-1) (sigma_max^(1/rho) - sigma_min^(1/rho)))^rho

Index distribution and weight (Song & Dhariwal, "Improved Techniques for Training Consistency Models", ICLR
2024, sections 3.5 and 3.1), for the N - 1 pairs:

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
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._ops import add_op_namespace_prefix
from .backend import use_triton
from .philox import INTEGERS, LEVELS, Seed, offset_arguments, philox_call, seed_tensor, uniform_bits
from .triton_support import constant_in_graphs, jit, launch, tl, triton

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
        sigma_min, sigma_max: the ends, 0 < sigma_min < sigma_max, finite, in units of pixels in [-1, 1].
        rho: curvature of the grid, positive; larger puts more levels near sigma_min.
    Returns:
        (N,) float64 on the CPU.
    Raises:
        ValueError: for values out of those ranges, or levels that float64 does not tell apart.
    Source:
        Karras et al. 2022, equation 5.
    """
    steps = checked_scales(num_scales) - 1
    if not (0.0 < sigma_min < sigma_max < math.inf and 0.0 < rho < math.inf):
        raise ValueError(
            "need 0 < sigma_min < sigma_max and rho > 0, all finite; got"
            f" sigma_min={sigma_min}, sigma_max={sigma_max}, rho={rho}"
        )
    try:
        low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
        # Python's floats, not torch's vectorised pow: the table must not depend on the machine's vector
        # width.
        inner = [(low + i / steps * (high - low)) ** rho for i in range(1, steps)]
    except OverflowError:
        inner = [math.inf]
    levels = [sigma_min, *inner, sigma_max]
    if not all(below < above for below, above in pairwise(levels)):
        raise ValueError(
            f"float64 does not tell apart {num_scales} levels from {sigma_min} to {sigma_max} with rho={rho}"
        )
    return torch.tensor(levels, dtype=torch.float64, device="cpu")


def checked_scales(num_scales: int) -> int:
    """A number of scales as an int: 20.0 is one, 20.7 and True are not."""
    if isinstance(num_scales, bool | str) or num_scales % 1 != 0:
        raise ValueError(f"num_scales counts grid points and must be an int, got {num_scales!r}")
    if num_scales < 2:
        raise ValueError(f"num_scales counts grid points and must be at least 2, got {num_scales}")
    return _constant(int(num_scales))


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
    num_scales = checked_scales(num_scales)
    sigma = noise_level_grid(num_scales, sigma_min=sigma_min, sigma_max=sigma_max, rho=rho).tolist()
    if indices == "uniform":
        return torch.full((num_scales - 1,), 1.0 / (num_scales - 1), dtype=torch.float64, device="cpu")
    if indices != "lognormal":
        raise ValueError(f"indices must be 'lognormal' or 'uniform', got {indices!r}")
    if not p_std > 0.0:
        raise ValueError(f"p_std must be positive, got {p_std}")
    cdf = [math.erf((math.log(s) - p_mean) / (math.sqrt(2.0) * p_std)) for s in sigma]
    mass = torch.tensor([high - low for low, high in pairwise(cdf)], dtype=torch.float64, device="cpu")
    if not mass.sum() > 0.0:
        raise ValueError(
            f"no level of [{sigma_min}, {sigma_max}] is likely under p_mean={p_mean}, p_std={p_std}"
        )
    return mass / mass.sum()


def _constant(number: Any) -> Any:
    """A number as a table needs it: torch.compile makes a symbol of one that has changed, or of every one."""
    if not torch.compiler.is_compiling():
        return number
    return torch.fx.experimental.symbolic_shapes.guard_scalar(number)


_tables: dict[tuple[object, ...], _Table] = {}


@constant_in_graphs  # which the host computes once, while tracing
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
    if device.type == "cuda" and device.index is None:  # the current one, which may change
        device = torch.device("cuda", torch.cuda.current_device())
    key = (scales, p_mean, p_std, sigma_min, sigma_max, rho, indices, weighting, str(device))
    if key not in _tables:
        if weighting not in ("inverse-gap", "uniform"):
            raise ValueError(f"weighting must be 'inverse-gap' or 'uniform', got {weighting!r}")
        # Ordinary tensors, even if the first call comes under inference_mode: a later one may record a graph.
        with torch.inference_mode(False):
            grids = [noise_level_grid(n, sigma_min=sigma_min, sigma_max=sigma_max, rho=rho) for n in scales]
            longest = max(scales)
            thresholds = torch.full((len(scales), longest - 2), 2**32, dtype=torch.int64, device="cpu")
            sigma = torch.full((len(scales), longest), math.nan, dtype=torch.float64, device="cpu")
            weight = torch.full((len(scales), longest - 1), math.nan, dtype=torch.float64, device="cpu")
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
            _tables[key] = _Table(
                torch.tensor(scales, dtype=torch.int64, device=device),
                thresholds.to(device),
                sigma.to(device, torch.float32),
                weight.to(device, torch.float32),
            )
    return _tables[key]


def _look_up(table: _Table, num_scales: Tensor | None, word: Tensor) -> NoiseLevels:
    """The levels that belong to each word; a `num_scales` of None means the table's only row."""
    if num_scales is not None:
        matches = table.num_scales == num_scales
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


# ------------------------------------------------------------------------------------------------ the kernel

_STREAM = LEVELS << 16


@jit(do_not_specialize=["batch", "offset"])
def _levels_kernel(
    num_scales_ptr,
    scales_ptr,
    thresholds_ptr,
    sigmas_ptr,
    weights_ptr,
    seed_ptr,
    offset_ptr,
    index_ptr,
    sigma_ptr,
    sigma_next_ptr,
    weight_ptr,
    batch,
    offset,
    STREAM: tl.constexpr,
    ROWS: tl.constexpr,
    ROWS_POW2: tl.constexpr,
    LONGEST: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    number = sample + offset
    if offset_ptr is not None:
        number += tl.load(offset_ptr)
    word, _, _, _ = philox_call(seed_ptr, number, tl.zeros((BLOCK,), tl.int32), STREAM)
    word = word.to(tl.int64)

    row = 0
    known = True
    if num_scales_ptr is not None:
        rows = tl.arange(0, ROWS_POW2)
        scales = tl.load(scales_ptr + rows, mask=rows < ROWS, other=0)
        matches = (scales == tl.load(num_scales_ptr)) & (rows < ROWS)
        row = tl.min(tl.where(matches, rows, ROWS_POW2), axis=0)
        known = row < ROWS_POW2
        row = tl.where(known, row, 0)

    # index = #{j : T_j <= word}, in two rounds of loads that do not wait for each other: the last threshold
    # of each group of WIDTH tells the group, and its members the rest.
    row_ptr = thresholds_ptr + row * (LONGEST - 2)
    lane = tl.arange(0, WIDTH)
    last = (lane + 1) * WIDTH - 1
    threshold = tl.load(row_ptr + last, mask=last < LONGEST - 2, other=4294967296)
    group = tl.sum((threshold[None, :] <= word[:, None]).to(tl.int32), axis=1)
    member = group[:, None] * WIDTH + lane[None, :]
    threshold = tl.load(row_ptr + member, mask=member < LONGEST - 2, other=4294967296)
    index = group * WIDTH + tl.sum((threshold <= word[:, None]).to(tl.int32), axis=1)
    index = tl.where(known, index, 0)

    inside = sample < batch
    sigma = tl.load(sigmas_ptr + row * LONGEST + index)
    sigma_next = tl.load(sigmas_ptr + row * LONGEST + index + 1)
    weight = tl.load(weights_ptr + row * (LONGEST - 1) + index)
    tl.store(index_ptr + sample, index.to(tl.int64), mask=inside)
    tl.store(sigma_ptr + sample, tl.where(known, sigma, float("nan")), mask=inside)
    tl.store(sigma_next_ptr + sample, tl.where(known, sigma_next, float("nan")), mask=inside)
    tl.store(weight_ptr + sample, tl.where(known, weight, float("nan")), mask=inside)


def launch_levels(
    num_scales: Tensor | None,
    scales: Tensor,
    thresholds: Tensor,
    sigmas: Tensor,
    weights: Tensor,
    seed: Tensor,
    offset_tensor: Tensor | None,
    batch_size: int,
    offset: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    index, sigma, sigma_next, weight = _empty_levels(sigmas, batch_size)
    rows, longest = sigmas.shape
    width = triton.next_power_of_2(max(2, math.isqrt(longest - 1) + 1))
    block = max(1, min(32, 2048 // width))
    launch(
        _levels_kernel,
        (triton.cdiv(batch_size, block),),
        elements=block,
        num_scales_ptr=num_scales,
        scales_ptr=scales,
        thresholds_ptr=thresholds,
        sigmas_ptr=sigmas,
        weights_ptr=weights,
        seed_ptr=seed.contiguous(),
        offset_ptr=offset_tensor,
        index_ptr=index,
        sigma_ptr=sigma,
        sigma_next_ptr=sigma_next,
        weight_ptr=weight,
        batch=batch_size,
        offset=offset,
        STREAM=_STREAM,
        ROWS=rows,
        ROWS_POW2=triton.next_power_of_2(rows),
        LONGEST=longest,
        WIDTH=width,
        BLOCK=block,
    )
    return index, sigma, sigma_next, weight


_sample = torch.library.custom_op(
    add_op_namespace_prefix("sample_noise_levels"), launch_levels, mutates_args=()
)


@_sample.register_fake
def _(num_scales, scales, thresholds, sigmas, weights, seed, offset_tensor, batch_size, offset):
    return _empty_levels(sigmas, batch_size)


def _empty_levels(like: Tensor, batch_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    index = torch.empty(batch_size, dtype=torch.int64, device=like.device)
    sigma, sigma_next, weight = (
        torch.empty(batch_size, dtype=torch.float32, device=like.device) for _ in range(3)
    )
    return index, sigma, sigma_next, weight


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
        seed: an int, an int64 tensor (run seed, step), or None (drawn from torch's generator). An int means
            step 0: one that stays the same in a loop draws the same in every step.
        offset: number of this call's first sample in the global batch, so that levels do not depend on
            micro-batch or rank.
        device: default: that of a tensor `num_scales` or `seed`, else the CPU. Tensors that lie elsewhere are
            copied to a device given here, for which the host waits.
        indices: "lognormal" or "uniform".
        weighting: "inverse-gap", 1/(sigma_next - sigma), or "uniform", 1.
        scales: the values that a *tensor* num_scales may take. One outside them gives index 0 and NaN for
            sigma, sigma_next and weight: the loss is NaN at once, since the host cannot be asked.
    Returns:
        NoiseLevels(index, sigma, sigma_next, weight): int64 and fp32, each (batch,).
    Raises:
        ValueError: for a parameter out of range.
        RuntimeError: if `num_scales` and `seed` are tensors of two devices, and no `device` is given.
    Source:
        Song & Dhariwal 2024, sections 3.1 (weight) and 3.5 (distribution).
    """
    if device is None:
        if isinstance(num_scales, Tensor) and isinstance(seed, Tensor) and num_scales.device != seed.device:
            raise RuntimeError(
                f"num_scales is on {num_scales.device} and seed on {seed.device}: put them on one device, or"
                " give device="
            )
        on_device = next((t for t in (num_scales, seed) if isinstance(t, Tensor)), None)
        device = "cpu" if on_device is None else on_device.device
    device = torch.device(device)
    if isinstance(num_scales, Tensor) and (num_scales.numel() != 1 or num_scales.dtype not in INTEGERS):
        raise ValueError(
            f"a tensor num_scales is one integer; got {num_scales.dtype} of shape {tuple(num_scales.shape)}"
        )
    rows = tuple(map(checked_scales, scales if isinstance(num_scales, Tensor) else (num_scales,)))
    table = _table(
        rows,
        _constant(p_mean),
        _constant(p_std),
        _constant(sigma_min),
        _constant(sigma_max),
        _constant(rho),
        indices,
        weighting,
        device,
    )
    held = num_scales.to(device) if isinstance(num_scales, Tensor) else None
    if use_triton(table.sigma, held):
        offset_tensor, offset_int = offset_arguments(offset, device)
        # Named one by one: Dynamo of torch 2.11 does not unpack them.
        index, sigma, sigma_next, weight = _sample(
            held,
            table.num_scales,
            table.thresholds,
            table.sigma,
            table.weight,
            seed_tensor(seed, device),
            offset_tensor,
            batch_size,
            offset_int,
        )
        return NoiseLevels(index, sigma, sigma_next, weight)
    return _look_up(table, held, uniform_bits(batch_size, seed, offset, LEVELS, device=device))
