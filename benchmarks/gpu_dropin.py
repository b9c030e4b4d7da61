"""Part `dropin` of run_gpu.py: a training step by each code base's own loss, and by the drop-in's.

One network for all of them, in guided-diffusion's pattern (other_trainers.py), as they stand and through
torch.compile. A step is both forward passes and the gradient, without the optimizer: theirs; with the loss of
`ict_kernels.adapters`; with `GroupNormSiLU.replace_in` too. The variants are timed in turn, in one process.
What differs between their losses by the paper differs here too: times are compared, not values.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import other_trainers as theirs
import torch
from gpu_baselines import COMPILED_ON
from gpu_timing import time_in_turn
from machine import seconds_of
from torch import Tensor, nn

from ict_kernels import GroupNormSiLU, SharedDropout
from ict_kernels.adapters import diffusers_cm, ect, kinyugo, openai_cm

NUM_SCALES = 81
WARM_UP_ROUNDS, ROUNDS = 3, 7

Loss = Callable[[nn.Module, Tensor], Tensor]


def part_dropin(device: torch.device, session: Any) -> dict[str, Callable[[], dict[str, Any]]]:
    """What to measure, by name, what has to be compiled last; on a CPU a network and a batch that say nothing
    about speed.

    Args:
        session: whose `left()` is the seconds that are left.
    """
    modes = (False, True) if device.type in COMPILED_ON else (False,)
    # Of those so far, the longest first call, which compiles: what the next one may take too.
    longest = dict.fromkeys(modes, 0.0)

    def measure(name: str, compiled: bool) -> dict[str, Any]:
        if session.left() < longest[compiled]:
            return {"not_measured": f"a first call takes {longest[compiled]:.0f} s, more than were left"}
        record = measure_dropin(name, compiled, device, session.left())
        longest[compiled] = max(longest[compiled], *record["first_call_s"].values())
        return record

    return {
        f"drop-in, {name}{', compiled network' if compiled else ''}": partial(measure, name, compiled)
        for compiled in modes
        for name in LOSSES
    }


def measure_dropin(
    name: str, compiled: bool, device: torch.device, seconds: float = math.inf
) -> dict[str, Any]:
    """Milliseconds and peak memory of a step by each variant.

    Args:
        name: of LOSSES.
        compiled: whether the networks are.
        device: where the steps run.
        seconds: a variant whose first call would not end within them is left out, and named.
    """
    on_gpu = device.type == "cuda"
    channels, blocks, groups, batch = (128, 4, 32, 256) if on_gpu else (16, 1, 4, 2)
    own, ours = LOSSES[name]
    torch.manual_seed(0)
    network = theirs.Unet(channels, blocks, dropout=0.3, num_groups=groups).to(
        device, memory_format=torch.channels_last
    )
    replaced = copy.deepcopy(network)
    replacement = GroupNormSiLU.replace_in(replaced)
    images = torch.randn(batch, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    variants = {
        "own loss": (own, network),
        "drop-in loss": (ours, network),
        "drop-in loss, group norms replaced": (ours, replaced),
    }
    torch.compiler.reset()
    started, first_calls, left_out = time.monotonic(), dict[str, float](), dict[str, str]()
    steps = {}
    for variant, (loss, of) in variants.items():
        if first_calls and time.monotonic() - started + max(first_calls.values()) > seconds:
            left_out[variant] = "the part's time was used up"
            continue
        module = torch.compile(of) if compiled else of
        steps[variant] = partial(_step, loss, module, of, images)
        first_calls[variant] = seconds_of(steps[variant], device)
    warm_up, timed = (WARM_UP_ROUNDS, ROUNDS) if on_gpu else (0, 1)
    rounds = [time_in_turn(list(steps.values()), device) for _ in range(warm_up + timed)]
    milliseconds = {
        variant: [round(ms, 4) for ms in times[warm_up:]]
        for variant, times in zip(steps, zip(*rounds, strict=True), strict=True)
    }
    medians = {variant: statistics.median(times) for variant, times in milliseconds.items()}
    return {
        "code_base": name,
        "compiled_network": compiled,
        "precision": "bf16 autocast" if on_gpu else "fp32",
        "batch_size": batch,
        "parameters": sum(p.numel() for p in network.parameters()),
        "blocks_replaced": len(replacement.changed),
        "norms_left": len(replacement.left),
        "first_call_s": first_calls,
        "left_out": left_out,
        "ms": medians,
        "ms_all": milliseconds,
        "times_faster": {variant: medians["own loss"] / ms for variant, ms in medians.items()},
        "peak_memory_bytes": {variant: _peak(step) for variant, step in steps.items()} if on_gpu else None,
    }


def _step(loss: Loss, network: nn.Module, parameters_of: nn.Module, images: Tensor) -> None:
    with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
        value = loss(network, images)
    value.backward()
    parameters_of.zero_grad(set_to_none=True)


def _peak(step: Callable[[], None]) -> int:
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated()


# ------------------------------------------------------------------------------- each loss, theirs and ours


def _openai(network: nn.Module, images: Tensor) -> Tensor:
    losses = theirs.KarrasDenoiser().consistency_losses(network, images, NUM_SCALES, target_model=network)
    return losses["loss"].mean()


def _openai_dropin(network: nn.Module, images: Tensor) -> Tensor:
    denoiser = theirs.KarrasDenoiser()
    return openai_cm.consistency_losses(denoiser, network, images, NUM_SCALES)["loss"].mean()


def _ect(loss_class: Any) -> Loss:
    return lambda network, images: loss_class(c=0.03)(theirs.EDMPrecond(network), images).mean()


def _diffusers(network: nn.Module, images: Tensor, precondition: Any, loss: Any, masks: Any) -> Tensor:
    sigmas = theirs.ascending_grid(NUM_SCALES, images.device)
    index = theirs.lognormal_timestep_distribution(len(images), sigmas)
    noise = torch.randn_like(images)

    def denoised(sigma_n: Tensor) -> Tensor:
        c_skip, c_out, c_in = (theirs.spread(each, images) for each in precondition(sigma_n))
        x_t = images + theirs.spread(sigma_n, images) * noise
        with masks:
            output = network(c_in * x_t, 250 * torch.log(sigma_n + 1e-44))
        return c_skip * x_t + c_out * output

    student = denoised(sigmas[index + 1])
    with torch.no_grad():
        teacher = denoised(sigmas[index])
    return loss(student, teacher, theirs.spread(1 / sigmas.diff()[index], images))


class _CpuGenerator:
    """What the script does about dropout masks."""

    def __init__(self) -> None:
        self.state = torch.get_rng_state()

    def __enter__(self) -> None:
        torch.set_rng_state(self.state)

    def __exit__(self, *_: object) -> None:
        pass


def _diffusers_own(network: nn.Module, images: Tensor) -> Tensor:
    def precondition(sigma: Tensor) -> tuple[Tensor, ...]:
        return *theirs.scalings_for_boundary_conditions(sigma), theirs.get_input_preconditioning(sigma)

    loss = partial(theirs.diffusers_loss, huber_c=0.03)
    return _diffusers(network, images, precondition, loss, _CpuGenerator())


def _diffusers_dropin(network: nn.Module, images: Tensor) -> Tensor:
    masks = SharedDropout(network, images.device)
    return _diffusers(network, images, diffusers_cm.precondition, diffusers_cm.consistency_loss, masks)


def _kinyugo(network: nn.Module, images: Tensor) -> Tensor:
    output = theirs.ImprovedConsistencyTraining()(network, images, 0, 1)
    return (theirs.pseudo_huber_loss(output.predicted, output.target) * output.loss_weights).mean()


def _kinyugo_dropin(network: nn.Module, images: Tensor) -> Tensor:
    shared = SharedDropout(network, images.device).around(network)
    output = theirs.ImprovedConsistencyTraining()(shared, images, 0, 1)
    return (kinyugo.pseudo_huber_loss(output.predicted, output.target) * output.loss_weights).mean()


# By code base: its own, the drop-in's.
LOSSES: dict[str, tuple[Loss, Loss]] = {
    "openai/consistency_models": (_openai, _openai_dropin),
    "locuslab/ect": (_ect(theirs.ECMLoss), _ect(ect.ECMLoss)),
    "diffusers' research script": (_diffusers_own, _diffusers_dropin),
    "Kinyugo/consistency_models": (_kinyugo, _kinyugo_dropin),
}
