"""Part `tune` of run_gpu.py: other plans of group_norm_silu beside the present one, shape by shape.

What can be chosen of a plan: resident or split; of a resident tile its groups; of split its rows and how many
bytes are taken at once; warps and the most registers of a thread. First tiles and chunks are tried, each with
the warps that its size asks for, then warps and registers of the best of them. Every plan's results are held
to the present plan's before it is timed, in turn with it and with a copy of the fewest bytes that must move.
The best plan of each shape is printed, as what would be changed in group_norm_plan.py, with what that saves
of a step.

On a GPU other processes compile what is to be timed, see compilers.py.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from compilers import compile_beside
from gpu_group_norm import EPS, LAYER, Arguments, NormCase, norm_cases, samples_that_fit
from gpu_kernels import SIZES, SMALL_SIZES
from gpu_timing import COPIES, OURS, Stage, buffer_sets, copies, relative_difference, time_variants
from kernel_cases.group_norm_silu import norm as module
from torch import Tensor

from ict_kernels import group_norm_plan
from ict_kernels.group_norm_plan import Plan, parts, power_of_2
from ict_kernels.philox import DROPOUT, dropout_threshold
from ict_kernels.triton_support import runs_on

DIRECTIONS = ("backward", "forward")
# How often a direction runs in a step: student and teacher, and the student's gradient.
_RUNS_IN_A_STEP = {"forward": 2, "backward": 1}
# Of a split tile, around 8,192.
_ELEMENTS = (4096, 8192, 16384)
_MEGABYTE = 2**20
# Around 20 MB: an A100's L2 is 40 MB, an H100's 50. The last takes all samples at once.
_CHUNK_BYTES = (10 * _MEGABYTE, 20 * _MEGABYTE, 40 * _MEGABYTE, 2**62)
_MOST_ELEMENTS = 32768  # of a resident tile: twice as many spill (compiled ahead of time)
_REGISTERS_OF_A_PROCESSOR = 65536
_REGISTERS = (None, 128, 96)
# Sums are taken in another order, so that some elements are rounded to the other side: of a tensor's norm.
_TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 3e-3, torch.float16: 1e-3}
# Of one compilation; the plan's largest programs have what the smallest have.
_COMPILED_SAMPLES = 64

Wishes = dict[str, Any]  # the arguments of `planned`


def part_tune(device: torch.device, session: Any) -> dict[str, Callable[[], Any]]:
    """What to tune, by name, the shapes that see the most elements in a step first.

    Args:
        session: whose `left()` is the seconds that are left.
    """
    networks = SIZES if device.type == "cuda" else SMALL_SIZES
    cases = [case for preset, samples, _, _ in networks for case in norm_cases(preset, samples)]
    cases.sort(key=lambda case: -case.share)
    return {
        f"tune, {case.name}, {direction}": partial(tune, case, direction, device, session.left)
        for case in cases
        for direction in DIRECTIONS
    }


def tune(
    case: NormCase, direction: str, device: torch.device, seconds_left: Callable[[], float]
) -> Iterator[dict[str, Any]]:
    """Times the plans of one norm in one direction; yields the record after the tiles, and after the warps.

    Args:
        seconds_left: after which no more plans are tried.
    Yields:
        present: the present plan with its ms, their range over the rounds, and percent of a copy of the
        fewest bytes; plans: of the others the same, the wishes that make them, how many times faster they
        are; failed: those that could not run or gave other results, with the reason; best: the wishes of the
        fastest, or None for the present plan; saves_ms: of a step, by all norms of this kind.
    """
    if not runs_on(device):
        yield {"not_measured": "needs a GPU, or TRITON_INTERPRET=1: the plan is of the Triton kernels"}
        return
    samples = samples_that_fit(case, device)
    present = plan_of(case, samples, direction)
    elements = samples * case.norm.channels * case.norm.size**2
    record: dict[str, Any] = {
        "preset": case.preset,
        "norm": str(case.norm),
        "direction": direction,
        "samples": samples,
        "uses_per_forward_pass": case.uses,
        "minimum_bytes": elements * case.dtype.itemsize * (3 if direction == "backward" else 2),
        "present": {"plan": asdict(present)},
        "plans": {},
        "failed": {},
        "best": None,
    }
    tried: list[Any] = [present]
    sets = buffer_sets(2 * elements * case.dtype.itemsize, device)
    arguments = Arguments(case, samples, sets, device)
    for choose in (tiles, warps_and_registers):
        wishes = distinct(
            choose(case, samples, direction, record["best"] or {}), case, samples, direction, tried
        )
        if wishes and (not record["plans"] or seconds_left() > 0):
            if device.type == "cuda":
                work = [partial(_compile, case, direction, each) for each in wishes]
                outcomes = compile_beside(work, seconds_left())
                late = [each for each, found in zip(wishes, outcomes, strict=True) if found == "given up"]
                record["failed"] |= {label(each): "was not compiled when the time was up" for each in late}
                wishes = [each for each in wishes if each not in late]
            _time(case, direction, arguments, wishes, device, record)
            yield record


def plan_of(case: NormCase, samples: int, direction: str, wishes: Wishes | None = None) -> Plan:
    """The plan that a norm has with some wishes.

    Raises:
        ValueError: if its shape cannot be computed so.
    """
    norm = case.norm
    with group_norm_plan.planned(**wishes or {}):
        return group_norm_plan.plan_of(
            samples,
            norm.channels,
            norm.size**2,
            norm.num_groups,
            case.dtype.itemsize,
            direction == "backward",
            case.dropout > 0,
        )


# ------------------------------------------------------------------------------------------------ what to try


def tiles(case: NormCase, samples: int, direction: str, best: Wishes) -> list[Wishes]:
    """Tiles of other groups, with about 64 elements per thread; split by rows and chunk."""
    norm = case.norm
    present = plan_of(case, samples, direction)
    group = norm.channels // norm.num_groups
    bundles = []
    for groups in range(1, norm.num_groups + 1):
        if norm.num_groups % groups or (norm.channels % 8 == 0 and groups * group % 8):
            continue
        elements = power_of_2(norm.size**2) * sum(parts(groups * group))
        if elements <= _MOST_ELEMENTS:
            bundles.append({"groups": groups, "num_warps": _warps_for(elements)})
    if present.resident:  # the next smaller and larger ones
        near = [abs(each["groups"].bit_length() - present.groups.bit_length()) for each in bundles]
        bundles = [each for each, distance in zip(bundles, near, strict=True) if distance <= 1]
    width = min(64, power_of_2(norm.channels))
    split = [
        {"resident": False, "rows": max(1, elements // width), "chunk_bytes": chunk}
        for elements in ((_ELEMENTS[1],) if present.resident else _ELEMENTS)
        for chunk in (_CHUNK_BYTES[1:] if present.resident else _CHUNK_BYTES)
    ]
    return bundles[:4] + split


def _warps_for(elements: int) -> int:
    return max(1, min(16, power_of_2(elements // 2048)))


def warps_and_registers(case: NormCase, samples: int, direction: str, best: Wishes) -> list[Wishes]:
    """Half and twice the warps of the best plan so far, and fewer registers than each would have."""
    found = []
    plan = plan_of(case, samples, direction, best)
    for num_warps in (plan.num_warps // 2, plan.num_warps, 2 * plan.num_warps):
        for maxnreg in _REGISTERS:
            threads = 32 * num_warps
            if 1 <= num_warps <= 16 and (maxnreg is None or maxnreg * threads < _REGISTERS_OF_A_PROCESSOR):
                found.append(best | {"num_warps": num_warps, "maxnreg": maxnreg})
    return found


def distinct(
    wishes: Sequence[Wishes], case: NormCase, samples: int, direction: str, tried: list[Any]
) -> list[Wishes]:
    """Those that make a plan that is not among the tried ones, which it joins."""
    found = []
    for each in wishes:
        with suppress(ValueError):
            plan = plan_of(case, samples, direction, each)
            if plan not in tried:
                tried.append(plan)
                found.append(each)
    return found


def label(wishes: Wishes) -> str:
    """Wishes in words: "split, 128 rows, 20 MB, 4 warps"."""
    chunk = wishes.get("chunk_bytes")
    words = [
        "split" if wishes.get("resident") is False else "",
        f"{wishes['groups']} groups" if wishes.get("groups") else "",
        f"{wishes['rows']} rows" if wishes.get("rows") else "",
        "" if chunk is None else "unchunked" if chunk == _CHUNK_BYTES[-1] else f"{chunk // _MEGABYTE} MB",
        f"{wishes['num_warps']} warps" if wishes.get("num_warps") else "",
        f"at most {wishes['maxnreg']} registers" if wishes.get("maxnreg") else "",
    ]
    return ", ".join(filter(None, words))


# ----------------------------------------------------------------------------------------- running and timing


def _run(
    case: NormCase,
    direction: str,
    wishes: Wishes,
    x: Tensor,
    dy: Tensor,
    stats: Tensor | None,
    rest: Sequence[Any],
) -> Any:
    """One direction as the op computes it: y and its statistics, or the gradients.

    Args:
        stats: which only the backward pass reads.
        rest: weight, bias, scale, shift, pre_bias, seed.
    """
    *parameters, seed = rest
    threshold = dropout_threshold(case.dropout)
    numbers = (0, (DROPOUT << 16) + LAYER, threshold)
    tensors = (case.norm.num_groups, *parameters, seed if threshold else None, None)
    with group_norm_plan.planned(**wishes):
        if direction == "forward":
            return module._forward(x, *tensors, *numbers, EPS, case.norm.silu)
        wanted = [each is not None for each in parameters]
        return module._backward(dy, x, stats, *tensors, *numbers, case.norm.silu, wanted)


def _time(
    case: NormCase,
    direction: str,
    arguments: Arguments,
    wishes: Sequence[Wishes],
    device: torch.device,
    record: dict[str, Any],
) -> None:
    """Adds the times of plans to the record, beside the present one's in the same rounds."""
    rest = [None if each is None else each.detach() for each in (*arguments.ours, arguments.seed)]
    x, dy = [each.detach() for each in arguments.x], arguments.dy
    stats = [_run(case, "forward", {}, each, each, None, rest)[1] for each in x]

    def stage(each: Wishes) -> dict[str, Stage]:
        return {
            direction: lambda number, _: _run(
                case, direction, each, x[number], dy[number], stats[number], rest
            )
        }

    expected = stage({})[direction](0, None)
    plans = {}
    for each in wishes:
        try:
            _poison(x[0])
            wrong = difference(stage(each)[direction](0, None), expected)
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            wrong = f"{type(error).__name__}: {lines[0]}"
        if wrong:
            record["failed"][label(each)] = wrong
        else:
            plans[label(each)] = each
    del expected
    sets = len(x)
    yardstick = copies({direction: record["minimum_bytes"]}, sets, device)
    variants = {OURS: stage({}), **{name: stage(each) for name, each in plans.items()}, **yardstick}
    timings = time_variants(variants, sets, device)
    record["failed"] |= timings.failed
    medians = timings.medians(direction)
    present, copy = medians[OURS], min(medians[name] for name in COPIES)
    rounds = timings.milliseconds[direction]
    record["present"] |= {
        "ms": present,
        "ms_range": [min(rounds[OURS]), max(rounds[OURS])],
        "percent_of_copy": 100 * copy / present,
    }
    samples = x[0].shape[0]
    for name, each in plans.items():
        if name in medians:
            record["plans"][name] = {
                "wishes": each,
                "plan": asdict(plan_of(case, samples, direction, each)),
                "ms": medians[name],
                "ms_range": [min(rounds[name]), max(rounds[name])],
                "times_faster": present / medians[name],
                "percent_of_copy": 100 * copy / medians[name],
            }
    _summarise(case, direction, record)
    del variants, timings, yardstick
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _poison(like: Tensor) -> None:
    """What is allocated next, if it is as large, holds NaN: an element that is not written is seen."""
    torch.full_like(like, torch.nan)


def difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> str | None:
    """What is wrong with tensors that should be others up to rounding, or None; NaN is wrong."""
    for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        by = relative_difference(ours, theirs)
        if not by <= _TOLERANCE[theirs.dtype]:
            return f"wrong: tensor {number} differs from the present plan's by {by:.2g}"
    return None


def _summarise(case: NormCase, direction: str, record: dict[str, Any]) -> None:
    present, name = record["present"], ""
    saved = 0.0
    if record["plans"]:
        name = max(record["plans"], key=lambda each: record["plans"][each]["times_faster"])
        best = record["plans"][name]
        faster = best["times_faster"]
        record["best"] = best["wishes"] if faster > 1 else None
        saved = max(0.0, case.uses * _RUNS_IN_A_STEP[direction] * present["ms"] * (1 - 1 / faster))
    record["saves_ms"] = saved
    kind = "resident" if present["plan"]["resident"] else "split"
    record["summary"] = (
        f"present ({kind}) {present['ms']:.4f} ms, {present['percent_of_copy']:.0f} % of a copy"
    )
    if record["best"] is None:
        record["summary"] += "; none of the others is faster"
    else:
        record["summary"] += (
            f"; best {name}: {best['ms']:.4f} ms, {faster:.2f}x, {best['percent_of_copy']:.0f} %;"
            f" saves {saved:.2f} ms of a step"
        )


# --------------------------------------------------------------------------------------- compiling beforehand


def _compile(case: NormCase, direction: str, wishes: Wishes) -> None:
    """In another process: runs a plan once, on whatever stands in memory, for fewer samples."""
    norm, samples = case.norm, min(case.samples, _COMPILED_SAMPLES)

    def rows(given: bool) -> Tensor | None:
        return torch.empty(samples, norm.channels, device="cuda") if given else None

    x = torch.empty(samples, norm.size, norm.size, norm.channels, dtype=case.dtype, device="cuda")
    x = x.permute(0, 3, 1, 2)
    vector = torch.empty(norm.channels, device="cuda")
    seed = torch.zeros(2, dtype=torch.int64, device="cuda")
    stats = torch.empty(samples, norm.num_groups, 2, device="cuda")
    rest = (vector, vector, rows(norm.scale_shift), rows(norm.scale_shift), rows(norm.pre_bias), seed)
    _run(case, direction, wishes, x, x, stats, rest)
    torch.cuda.synchronize()
    del x, stats, rest
    torch.cuda.empty_cache()
