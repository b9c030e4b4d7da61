"""Part `kernels` of run_gpu.py: every kernel but the optimizer's, at the shapes of both networks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from compilers import compile_beside, dismiss
from gpu_baselines import by_definition, compiled_variants, definitions, error_record
from gpu_group_norm import NormCase, compare_norm, compile_baselines, in_other_dtypes, norm_cases
from gpu_host import NAME, measure_host
from gpu_timing import OURS, Comparison, Stage, buffer_sets, differentiable, measure
from plain_network import TorchFilter
from torch import Tensor

from ict_fast import presets
from ict_kernels import (
    NoiseLevels,
    consistency_loss,
    fir_downsample,
    fir_upsample,
    noise_images,
    noise_level_grid,
    noise_level_probabilities,
    sample_noise_levels,
)

# (preset, samples, channels, size) as one GPU sees them in a step.
SIZES = (("cifar10", 512, 3, 32), ("imagenet64", 128, 3, 64))
SMALL_SIZES = (("digits", 4, 1, 8),)
# Its adaptive norms scale and shift; the other two networks' do not.
SCALE_SHIFT_PRESET = ("imagenet64-ct2023", 128)
SIGMA_DATA = 0.5


def part_kernels(device: torch.device, session: Any) -> dict[str, Callable[[], dict[str, Any]]]:
    """What to measure, by name; on a CPU a few small shapes.

    Args:
        session: whose `only` chooses names, and whose `left()` is the seconds that are left: with the first
            norm the baselines of all chosen ones are compiled, in half of that time at most.
    """
    sizes = SIZES if device.type == "cuda" else SMALL_SIZES
    norms = {case.name: case for case in _norms(sizes, device) if device.type == "cuda"}
    to_compile = [case for name, case in norms.items() if session.only in name]

    def measured(name: str, prepare: Callable[[], Comparison]) -> dict[str, Any]:
        if name in norms and to_compile:
            compile_beside([partial(compile_baselines, case) for case in to_compile], session.left() / 2)
            dismiss()
            to_compile.clear()
        return measure(prepare(), device)

    measurements = {NAME: partial(measure_host, device)}
    return measurements | {
        name: partial(measured, name, prepare) for name, prepare in comparisons(sizes, device).items()
    }


def comparisons(
    sizes: Sequence[tuple[str, int, int, int]], device: torch.device
) -> dict[str, Callable[[], Comparison]]:
    """What makes each comparison, by name, the most telling first.

    First the ops that have one shape per network, which take seconds together; then the norms, those that see
    the most elements in a step before others, the networks' in turn; then other dtypes and adaptive norms.

    Args:
        sizes: (preset, samples, channels, size) of each network.
        device: where they are to run.
    """
    made: dict[str, Callable[[], Comparison]] = {}
    for preset, *shape in sizes:
        for op, compare in (
            ("consistency_loss", compare_loss),
            ("noise_images", compare_noising),
            ("sample_noise_levels", compare_levels),
        ):
            made[f"{op}, {preset}"] = partial(compare, (*shape, shape[-1]), device)
    for preset, count, _, size in sizes:
        config = presets.get(preset).network
        if config.name == "ncsnpp":
            width = config.channels * config.channel_mult[0]
            for op in (fir_downsample, fir_upsample):
                made[f"{op.__name__}, {preset}"] = partial(
                    compare_resampling, op, (count, width, size), device
                )
    return made | {case.name: partial(compare_norm, case, device) for case in _norms(sizes, device)}


def _norms(sizes: Sequence[tuple[str, int, int, int]], device: torch.device) -> list[NormCase]:
    networks = [norm_cases(preset, samples) for preset, samples, _, _ in sizes]
    cases = sorted((case for network in networks for case in network), key=lambda case: -case.share)
    if device.type == "cuda":
        cases += [each for network in networks for each in in_other_dtypes(network[0])]
        seen = {case.norm for case in cases}
        cases += [case for case in norm_cases(*SCALE_SHIFT_PRESET) if case.norm not in seen]
    return cases


# --------------------------------------------------------------------------------------------------- the loss


def compare_loss(shape: tuple[int, ...], device: torch.device) -> Comparison:
    """consistency_loss and its gradient beside its definition, eager and compiled."""
    elements = math.prod(shape)
    moved = {"forward": 20.0 * elements, "backward": 8.0 * elements}
    sets = buffer_sets(moved["forward"], device)
    generator = torch.Generator(device).manual_seed(0)

    def image() -> Tensor:
        values = torch.empty(shape, device=device).normal_(generator=generator)
        return values.contiguous(memory_format=torch.channels_last)

    images = [[image() for _ in range(4)] for _ in range(sets)]
    for student, *_ in images:
        student.requires_grad_()
    levels = sample_noise_levels(shape[0], 1281, seed=torch.tensor([1, 2], device=device))
    gradient = torch.rand(shape[0], generator=generator, device=device) / shape[0]

    def stages(loss: Callable[..., Tensor]) -> dict[str, Stage]:
        return differentiable(
            lambda number: loss(*images[number], levels),
            [[student] for student, *_ in images],
            lambda number, loss_n: gradient,
        )

    def results(loss: Callable[..., Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        inputs = [each.detach().to(dtype, copy=True) for each in images[0]]
        loss_n = loss(inputs[0].requires_grad_(), *inputs[1:], levels)
        (dx,) = torch.autograd.grad(loss_n, inputs[0], gradient.to(dtype))
        return loss_n.detach(), dx

    eager = by_definition(consistency_loss)
    variants = {OURS: stages(consistency_loss), "eager": stages(eager)}
    compiled_ones = compiled_variants(consistency_loss, device)
    for name, compiled in compiled_ones.items():
        variants[name] = stages(by_definition(compiled))
    exact = results(consistency_loss, torch.float64)
    ours, torchs = results(consistency_loss, torch.float32), results(eager, torch.float32)
    errors = {
        name: error_record(*values)
        for name, *values in zip(("loss", "gradient"), ours, exact, torchs, strict=True)
    }
    facts = {"shape": shape, "dtype": "float32", "errors": errors}
    return Comparison(variants, sets, moved, moved, facts, held_to=dict.fromkeys(compiled_ones, "eager"))


# ------------------------------------------------------------------------------------------- the resampling


def compare_resampling(
    op: Callable[[Tensor], Tensor], sizes: tuple[int, int, int], device: torch.device
) -> Comparison:
    """fir_downsample or fir_upsample beside torch's convolution of each channel, eager and compiled.

    Args:
        op: one of the two.
        sizes: samples, channels, and the side of the larger image.
    """
    count, channels, side = sizes
    shape = (count, channels, *2 * (side // (1 if op is fir_downsample else 2),))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    moved = 1.25 * count * channels * side**2 * dtype.itemsize
    sets = buffer_sets(moved, device)
    generator = torch.Generator(device).manual_seed(0)

    def image(*shape: int) -> Tensor:
        values = torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator)
        return values.contiguous(memory_format=torch.channels_last)

    images = [image(*shape).requires_grad_() for _ in range(sets)]
    result = torch.empty_like(op(images[0]))
    gradients = [image(*result.shape) for _ in range(sets)]

    def stages(function: Callable[[Tensor], Tensor]) -> dict[str, Stage]:
        return differentiable(
            lambda number: function(images[number]),
            [[each] for each in images],
            lambda number, _: gradients[number],
        )

    torchs = TorchFilter(channels, up=op is fir_upsample).to(device, dtype)
    variants = {OURS: stages(op), "eager": stages(torchs)}
    compiled_ones = compiled_variants(torchs, device)
    variants |= {name: stages(compiled) for name, compiled in compiled_ones.items()}

    def results(function: Callable[[Tensor], Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        x = images[0].detach().to(dtype, copy=True).requires_grad_()
        y = function(x)
        (dx,) = torch.autograd.grad(y, x, gradients[0].to(dtype))
        return y.detach(), dx

    exact, ours, eager = results(op, torch.float64), results(op, dtype), results(torchs, dtype)
    errors = {
        name: error_record(*values) for name, *values in zip(("y", "dx"), ours, exact, eager, strict=True)
    }
    facts = {"shape": shape, "dtype": str(dtype).removeprefix("torch."), "errors": errors}
    bytes_moved = {"forward": moved, "backward": moved}
    return Comparison(
        variants, sets, bytes_moved, bytes_moved, facts, held_to=dict.fromkeys(compiled_ones, "eager")
    )


# ------------------------------------------------------------------------------------- the noising and levels


def noised_by_torch(images: Tensor, levels: NoiseLevels, flip: Tensor) -> tuple[Tensor, Tensor]:
    """What a trainer without this package runs: torch's own normal numbers, both inputs from one noise."""
    x = (images.permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
    x = torch.where(flip.bool()[:, None, None, None], x.flip(3), x)
    noise = torch.randn_like(x)

    def noised(sigma: Tensor) -> Tensor:
        sigma = sigma[:, None, None, None]
        return (x + sigma * noise) * (sigma.square() + SIGMA_DATA**2).rsqrt()

    return noised(levels.sigma_next), noised(levels.sigma)


def compare_noising(shape: tuple[int, ...], device: torch.device) -> Comparison:
    """noise_images from bytes with flips, beside plain torch, eager and compiled."""
    count, channels, height, width = shape
    moved = 9.0 * count * channels * height * width
    sets = buffer_sets(moved, device)
    generator = torch.Generator(device).manual_seed(0)

    def random_bytes(highest: int, *size: int) -> Tensor:
        return torch.randint(0, highest + 1, size, dtype=torch.uint8, device=device, generator=generator)

    images = [random_bytes(255, count, height, width, channels) for _ in range(sets)]
    flip = random_bytes(1, count)
    seed = torch.tensor([1, 2], device=device)
    levels = sample_noise_levels(count, 1281, seed=seed)

    def ours(number: int, _: Any = None) -> tuple[Tensor, Tensor]:
        return noise_images(images[number], levels, seed=seed, flip=flip)

    def stages(function: Callable[..., Any]) -> dict[str, Stage]:
        return {"forward": lambda number, _: function(images[number], levels, flip)}

    variants: dict[str, dict[str, Stage]] = {OURS: {"forward": ours}, "eager": stages(noised_by_torch)}
    for name, compiled in compiled_variants(noised_by_torch, device).items():
        variants[name] = stages(compiled)
    with definitions():
        definition = ours(0)
    difference = max(float((a - b).abs().max()) for a, b in zip(ours(0), definition, strict=True))
    facts = {
        "shape": (count, height, width, channels),
        "dtype": "uint8",
        "largest_difference_from_definition": difference,
    }
    return Comparison(variants, sets, {"forward": moved}, {"forward": moved}, facts)


def levels_by_torch(cdf: Tensor, grid: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a trainer without this package runs for one N: a uniform number, looked up."""
    index = torch.searchsorted(cdf, torch.rand(count, device=cdf.device))
    sigma, sigma_next = grid[index], grid[index + 1]
    return index, sigma, sigma_next, 1 / (sigma_next - sigma)


def compare_levels(shape: tuple[int, ...], device: torch.device) -> Comparison:
    """sample_noise_levels with N on the device, beside a look-up in plain torch of one N."""
    count = shape[0]
    num_scales = torch.tensor(1281, device=device)
    seed = torch.tensor([1, 2], device=device)
    # float32 of 1,280 sums may end below 1: no draw may fall behind the last pair.
    cdf = noise_level_probabilities(1281).cumsum(0)[:-1].float().to(device)
    grid = noise_level_grid(1281).float().to(device)
    moved = 20.0 * count  # what is written; the table is in L2
    sets = buffer_sets(moved, device)

    def ours(number: int, _: Any = None) -> NoiseLevels:
        return sample_noise_levels(count, num_scales, seed=seed)

    def stages(function: Callable[..., Any]) -> dict[str, Stage]:
        return {"forward": lambda number, _: function(cdf, grid, count)}

    variants: dict[str, dict[str, Stage]] = {
        OURS: {"forward": ours},
        "eager": stages(levels_by_torch),
    }
    for name, compiled in compiled_variants(levels_by_torch, device).items():
        variants[name] = stages(compiled)
    with definitions():
        definition = ours(0)
    differing = sum(int((a != b).sum()) for a, b in zip(ours(0), definition, strict=True))
    facts = {"shape": (count,), "values_unlike_the_definition": differing}
    return Comparison(variants, sets, {"forward": moved}, {"forward": moved}, facts)
