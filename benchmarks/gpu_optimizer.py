"""Part `optimizer` of run_gpu.py: RAdamEMA on the parameters of both networks, beside torch's optimizers."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from gpu_baselines import error_record
from gpu_timing import HEAD_START_CYCLES, OURS, Comparison, Stage, measure, time_in_turn
from torch import Tensor, nn

from ict_fast import presets
from ict_fast.networks import build_network
from ict_kernels import RAdamEMA

RADAM, ADAM = "torch.optim.RAdam, foreach, + foreach EMA", "torch.optim.Adam, fused, + foreach EMA"
OPTIMIZERS = (OURS, RADAM, ADAM)
LR, DECAY = 1e-4, 0.9999
# Per parameter: p, g, m, v and ema read, g once more for the verdict, all but g written. The goal is stated
# against a copy of 38 bytes, as a step would move that wrote a bf16 shadow of p and needed no verdict.
BYTES_MOVED, MINIMUM_BYTES, COPIED_BYTES = 40, 36, 38
# RAdam rectifies from the sixth step on: another branch of torch's.
WARM_UP_STEPS = 6
# Outside a graph a round is this many steps: what the host needs for one shows where the device is faster.
STEPS_IN_A_ROW = 10
ROUNDS = 5
QUEUED_ROUNDS = 9
CHECKED_STEPS = 10


def part_optimizer(device: torch.device) -> dict[str, Callable[[], dict[str, Any]]]:
    """What to measure, by name; on a CPU the digits' small network."""
    names = ("cifar10", "imagenet64") if device.type == "cuda" else ("digits",)
    return {f"RAdamEMA, {name}": partial(measure_optimizer, name, device) for name in names}


def measure_optimizer(preset: str, device: torch.device) -> dict[str, Any]:
    """A step's time in a CUDA graph, behind a backlog, and called from Python; errors against float64.

    For a graph torch's optimizers must be capturable, which costs them thousands of small kernels. As one
    uses them they are not: so each is timed on the device once more, called from Python while the device is
    held until the host has queued the whole step.
    """
    parameters = network_parameters(preset, device)
    count = sum(p.numel() for p in parameters)
    errors = _errors(parameters)
    # All read and write the same parameters; the state alone is several times L2, so one buffer set will do.
    steps = optimizer_steps(parameters, capturable=device.type == "cuda")
    record = measure(
        Comparison(
            variants={name: _stages(step) for name, step in steps.items()},
            sets=1,
            bytes_moved={"step": BYTES_MOVED * count},
            minimum_bytes={"step": MINIMUM_BYTES * count},
            copied_bytes={"step": COPIED_BYTES * count},
            facts={"preset": preset, "parameters": count, "tensors": len(parameters), "errors": errors},
        ),
        device,
    )
    del steps
    steps = optimizer_steps(parameters, capturable=False)
    if device.type == "cuda":
        record["stages"]["step"]["queued_ms"] = {name: queued_ms(step) for name, step in steps.items()}
    return record | {"called_from_python_ms": _time_calls(steps, device)}


def queued_ms(step: Callable[[], object]) -> float | None:
    """Milliseconds of a step on the GPU, which never waits for the host: the median of QUEUED_ROUNDS.

    None if the host cannot queue a whole step, because it waits for the device or has too many launches.
    """
    times: list[float] = []
    cycles = 20 * HEAD_START_CYCLES
    while len(times) < QUEUED_ROUNDS:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(cycles)
        start.record()
        step()
        end.record()
        if not start.query():  # the device was still held when the step had been queued
            end.synchronize()
            times.append(start.elapsed_time(end))
        elif (cycles := 2 * cycles) > 1000 * HEAD_START_CYCLES:
            return None
    return statistics.median(times)


def network_parameters(preset: str, device: torch.device) -> list[nn.Parameter]:
    """The parameters of a preset's network, as the trainer lays them out, with random gradients."""
    with device:
        network = build_network(presets.get(preset).network)
    generator = torch.Generator(device).manual_seed(0)
    for p in network.parameters():
        p.grad = torch.empty_like(p).normal_(std=1e-3, generator=generator)
    return list(network.parameters())


def optimizer_steps(parameters: Sequence[nn.Parameter], capturable: bool) -> dict[str, Callable[[], object]]:
    """One step of each optimizer, its average of the weights included; warmed up.

    Args:
        parameters: with gradients; every optimizer changes them.
        capturable: whether torch's keep their counts on the device, as a CUDA graph needs and Python's calls
            are slower for.
    """
    ours = RAdamEMA(parameters, lr=LR, ema_decay=DECAY)
    radam = torch.optim.RAdam(parameters, lr=LR, foreach=True, capturable=capturable)
    adam = torch.optim.Adam(parameters, lr=LR, fused=True, capturable=capturable)
    steps: dict[str, Callable[[], object]] = {
        OURS: ours.step,
        RADAM: _with_average(radam, parameters),
        ADAM: _with_average(adam, parameters),
    }
    for step in steps.values():
        for _ in range(WARM_UP_STEPS):
            step()
    return steps


def _stages(step: Callable[[], object]) -> dict[str, Stage]:
    return {"step": lambda number, kept: step()}


def _with_average(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> Callable[[], None]:
    values = [p.detach() for p in parameters]
    averages = [p.clone(memory_format=torch.preserve_format) for p in values]

    def step() -> None:
        optimizer.step()
        torch._foreach_lerp_(averages, values, 1 - DECAY)

    return step


def _time_calls(steps: dict[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """Milliseconds of a step called from Python, launches and host included: the median of a few rounds."""

    def several(step: Callable[[], object]) -> Callable[[], object]:
        return lambda: [step() for _ in range(STEPS_IN_A_ROW)]

    rounds = [time_in_turn([several(step) for step in steps.values()], device) for _ in range(ROUNDS)]
    return {
        name: statistics.median(times) / STEPS_IN_A_ROW
        for name, times in zip(steps, zip(*rounds, strict=True), strict=True)
    }


def _errors(parameters: Sequence[nn.Parameter]) -> dict[str, dict[str, float | None]]:
    """The largest errors after CHECKED_STEPS steps on some of the tensors, beside those of torch's RAdam."""
    some = parameters[:: max(1, len(parameters) // 16)]
    generator = torch.Generator(some[0].device).manual_seed(1)

    def copied(dtype: torch.dtype) -> list[nn.Parameter]:
        return [nn.Parameter(p.detach().to(dtype, copy=True)) for p in some]

    ours, torchs, exact = copied(torch.float32), copied(torch.float32), copied(torch.float64)
    ours_step, exact_step = (RAdamEMA(each, lr=LR, ema_decay=DECAY) for each in (ours, exact))
    torch_step = torch.optim.RAdam(torchs, lr=LR, foreach=True)
    averages = [p.detach().clone() for p in torchs]
    for _ in range(CHECKED_STEPS):
        for p, q, r in zip(ours, torchs, exact, strict=True):
            p.grad = torch.empty_like(p).normal_(generator=generator)
            q.grad, r.grad = p.grad, p.grad.double()
        ours_step.step()
        exact_step.step()
        torch_step.step()
        torch._foreach_lerp_(averages, [q.detach() for q in torchs], 1 - DECAY)

    def flat(tensors: Iterable[Tensor]) -> Tensor:
        return torch.cat([each.detach().flatten() for each in tensors])

    return {
        "parameters": error_record(flat(ours), flat(exact), flat(torchs)),
        "ema": error_record(
            flat(ours_step.ema_parameters()), flat(exact_step.ema_parameters()), flat(averages)
        ),
    }
