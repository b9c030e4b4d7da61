"""Times ways of computing the same thing side by side: in turn, from memory that L2 does not hold.

Each stage of a variant (forward, backward) is captured as one CUDA graph that takes every buffer set once, so
that no launch waits for the host. The graphs of all variants are replayed in turn and timed by events; a
round's time over the number of sets is one value, the median of the rounds is reported. The clock of a GPU
drifts with its temperature: variants that take turns drift together.

On a CPU the same stages are called one by one. Such times compare nothing; they keep the code from rotting.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

# A graph's start costs a few microseconds: a graph that moves this much takes some 400 on an H100.
GRAPH_BYTES = 1_200_000_000
MOST_SETS = 256
ROUNDS = 15
# What holds the device while the host queues a round: 1 ms at 2 GHz.
HEAD_START_CYCLES = 2_000_000

# Of two ways to compute a norm, a loss or a gradient: one rounds after every operation, the other at the end.
# A gradient that lacks one of its terms is farther off.
MOST_OF_ROUNDING = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}

OURS = "ict_kernels"
COPIES = ("copy", "copy by a kernel")

# (number of the buffer set, what the stage before returned for it) -> what the next stage needs. What is
# returned stays allocated until all sets are captured: an output that reused the memory of the one before
# would find it in L2.
Stage = Callable[[int, Any], Any]


@dataclass(frozen=True)
class Comparison:
    """Ways of computing the same thing, ready to be timed.

    Attributes:
        variants: stages in order, by variant; OURS among them.
        sets: number of buffer sets that the stages know.
        bytes_moved: by stage, bytes that our algorithm reads and writes.
        minimum_bytes: by stage, bytes that any algorithm must read and write.
        facts: what else belongs to the record: shapes, errors.
        algorithms: by stage, where there are several.
        copied_bytes: by stage, what the copies move, where that is not `bytes_moved`.
        held_to: variants that must give the results of another one, by that one; what does not is no rival,
            and is reported as wrong.
    """

    variants: Mapping[str, Mapping[str, Stage]]
    sets: int
    bytes_moved: Mapping[str, float]
    minimum_bytes: Mapping[str, float]
    facts: Mapping[str, Any]
    algorithms: Mapping[str, str] = field(default_factory=dict)
    copied_bytes: Mapping[str, float] | None = None
    held_to: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Timings:
    """What `time_variants` measured.

    Attributes:
        milliseconds: of one call, a value for each round; by stage and variant.
        failed: variants that could not run or were wrong, and why.
        differences: of variants that are held to another one, their largest difference from it.
    """

    milliseconds: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    differences: dict[str, float] = field(default_factory=dict)

    def medians(self, stage: str) -> dict[str, float]:
        """Milliseconds of each variant that has this stage."""
        return {name: statistics.median(each) for name, each in self.milliseconds[stage].items()}


def buffer_sets(bytes_per_call: float, device: torch.device) -> int:
    """How many buffer sets to take in turn: 3 x L2, a graph's worth of bytes, and no more than MOST_SETS."""
    if device.type != "cuda":
        return 2
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    return min(MOST_SETS, max(1, round(max(3 * l2, GRAPH_BYTES) / bytes_per_call)))


def differentiable(
    forward: Callable[[int], Tensor],
    leaves: Sequence[Sequence[Tensor]],
    gradient: Callable[[int, Tensor], Tensor],
) -> dict[str, Stage]:
    """The stages of a function: itself, and its gradient.

    Args:
        forward: of a set's number.
        leaves: of each set, what to differentiate by.
        gradient: of a set's number and output, the gradient that arrives there.
    """

    def backward(number: int, output: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(output, leaves[number], gradient(number, output))

    return {"forward": lambda number, _: forward(number), "backward": backward}


def copies(bytes_moved: Mapping[str, float], sets: int, device: torch.device) -> dict[str, dict[str, Stage]]:
    """Plain copies of as many bytes (read and written) as each stage moves: by cudaMemcpy, and by a kernel.

    The faster of the two is the yardstick.
    """
    generator = torch.Generator(device).manual_seed(0)
    lengths = {stage: max(1, round(moved / 8)) for stage, moved in bytes_moved.items()}

    def buffer() -> Tensor:
        return torch.empty(max(lengths.values()), device=device).normal_(generator=generator)

    pairs = [(buffer(), buffer()) for _ in range(sets)]

    def stage(copy: Callable[[Tensor, Tensor], Any], length: int) -> Stage:
        return lambda number, _: copy(pairs[number][0][:length], pairs[number][1][:length])

    # A change of sign costs nothing, and no library hands it to the driver's copy.
    kinds = (
        lambda source, target: target.copy_(source),
        lambda source, target: torch.neg(source, out=target),
    )
    return {
        name: {of: stage(copy, length) for of, length in lengths.items()}
        for name, copy in zip(COPIES, kinds, strict=True)
    }


def time_variants(
    variants: Mapping[str, Mapping[str, Stage]],
    sets: int,
    device: torch.device,
    held_to: Mapping[str, str] | None = None,
    rounds: int = ROUNDS,
) -> Timings:
    """Times every stage of every variant.

    Args:
        variants: the stages of each, in order.
        sets: number of buffer sets.
        device: where the stages run.
        held_to: see `Comparison`.
        rounds: how often each takes its turn, on a GPU.
    Returns:
        Times of one call, that is of one buffer set. A variant that cannot run is named with the reason, and
        the others are timed all the same; that of this package must run.
    """
    timings = Timings()
    warm_up_rounds, rounds = (2, rounds) if device.type == "cuda" else (0, 2)
    replays: list[tuple[str, str, Callable[[], object]]] = []
    with _own_stream(device):
        for name, stages in variants.items():
            try:
                if held_to and name in held_to:
                    timings.differences[name] = _checked(stages, variants[held_to[name]], held_to[name])
                prepared = _prepare(stages, sets, device)
            except Exception as error:
                if name == OURS:
                    raise
                timings.failed[name] = _reason(error)
                continue
            replays += [(stage, name, replay) for stage, replay in prepared.items()]
        for number in range(warm_up_rounds + rounds):
            times = time_in_turn([replay for _, _, replay in replays], device)
            if number >= warm_up_rounds:
                for (stage, name, _), milliseconds in zip(replays, times, strict=True):
                    of_stage = timings.milliseconds.setdefault(stage, {})
                    of_stage.setdefault(name, []).append(milliseconds / sets)
    return timings


def measure(comparison: Comparison, device: torch.device) -> dict[str, Any]:
    """Times a comparison beside plain copies of as many bytes, and gives the record that is stored."""
    copied = comparison.copied_bytes or comparison.bytes_moved
    yardstick = copies(copied, comparison.sets, device)
    timings = time_variants({**comparison.variants, **yardstick}, comparison.sets, device, comparison.held_to)
    stages = {}
    for stage, moved in comparison.bytes_moved.items():
        medians = timings.medians(stage)
        ours, copy = medians[OURS], min(medians[name] for name in COPIES)
        stages[stage] = {
            "algorithm": comparison.algorithms.get(stage),
            "bytes_moved": moved,
            "minimum_bytes": comparison.minimum_bytes[stage],
            "ms": medians,
            "gb_per_s": moved / ours / 1e6,
            "gb_per_s_of_minimum": comparison.minimum_bytes[stage] / ours / 1e6,
            "copied_bytes": copied[stage],
            "copy_gb_per_s": copied[stage] / copy / 1e6,
            "percent_of_copy": 100 * copy / ours,
            # Of the bytes that any algorithm must move, at the rate of the copy.
            "percent_of_minimum_copy": 100 * copy / ours * comparison.minimum_bytes[stage] / copied[stage],
            "times_faster_than": {
                name: ms / ours for name, ms in medians.items() if name not in (OURS, *COPIES)
            },
            "ms_all": {
                name: [round(ms, 6) for ms in rounds] for name, rounds in timings.milliseconds[stage].items()
            },
        }
    return {
        **comparison.facts,
        "buffer_sets": comparison.sets,
        "stages": stages,
        "failed": timings.failed,
        "differences_of_baselines": timings.differences,
    }


# ------------------------------------------------------------------------------------- what must be the same


def _checked(stages: Mapping[str, Stage], reference: Mapping[str, Stage], name: str) -> float:
    """The largest difference of a variant's results from those of another, over all stages.

    Raises:
        ValueError: if it is more than rounding makes.
    """
    largest = 0.0
    for number, (ours, theirs) in enumerate(zip(_results(stages), _results(reference), strict=True)):
        difference = relative_difference(ours, theirs)
        if not difference <= MOST_OF_ROUNDING[theirs.dtype]:
            raise ValueError(f"wrong: result {number} differs from that of {name} by {difference:.2g}")
        largest = max(largest, difference)
    return largest


def _results(stages: Mapping[str, Stage]) -> list[Tensor]:
    """What the stages give for the first buffer set."""
    kept: Any = None
    found: list[Tensor] = []
    for stage in stages.values():
        kept = stage(0, kept)
        found += [each.detach() for each in ((kept,) if isinstance(kept, Tensor) else kept)]
    return found


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference by the norm of what is expected; NaN if there is one, infinite for not 0."""
    if not expected.numel():
        return 0.0
    scale = float(torch.linalg.vector_norm(expected, dtype=torch.float32))
    error = float(torch.linalg.vector_norm(found.float() - expected.float()))
    return error / scale if scale else error and math.inf


# ------------------------------------------------------------------------------------ what differs on a GPU


@contextmanager
def _own_stream(device: torch.device) -> Iterator[None]:
    """A side stream, as capturing needs: autograd runs a backward pass on the stream of its forward pass."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        yield
        torch.cuda.synchronize()


def _prepare(stages: Mapping[str, Stage], sets: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """For each stage, what runs it over all sets: a captured graph's replay, or on a CPU the calls."""
    kept_of_sets: list[Any] = [None]
    for _ in range(2):  # compiles, loads kernels and fills caches, none of which a capture may do
        for stage in stages.values():
            _take_all(stage, kept_of_sets)
    kept_of_sets = [None] * sets
    prepared: dict[str, Callable[[], object]] = {}
    if device.type != "cuda":
        for name, stage in stages.items():
            prepared[name] = partial(_take_all, stage, kept_of_sets)
        return prepared
    # One pool: what a forward graph keeps for its backward graph stays where that one reads it, since they
    # are replayed in the order of their capture.
    pool = torch.cuda.graph_pool_handle()
    for name, stage in stages.items():
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=torch.cuda.current_stream()):
            kept_of_sets = [stage(number, kept) for number, kept in enumerate(kept_of_sets)]
        prepared[name] = graph.replay
    return prepared


def _take_all(stage: Stage, kept_of_sets: list[Any]) -> None:
    """Calls a stage for every set, and leaves what it returned for the next stage."""
    kept_of_sets[:] = [stage(number, kept) for number, kept in enumerate(kept_of_sets)]


def time_in_turn(replays: Sequence[Callable[[], object]], device: torch.device) -> list[float]:
    """Milliseconds of each, one after the other."""
    if device.type != "cuda":
        clock = [time.perf_counter()]
        for replay in replays:
            replay()
            clock.append(time.perf_counter())
        return [1e3 * (end - start) for start, end in pairwise(clock)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(replays) + 1)]
    # The host gets ahead, so that the device never waits for it between two events.
    torch.cuda._sleep(HEAD_START_CYCLES)
    events[0].record()
    for replay, event in zip(replays, events[1:], strict=True):
        replay()
        event.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in pairwise(events)]


def _reason(error: BaseException) -> str:
    """The error in a line, and the first of its chain: a capture that fails raises another as it ends."""
    first = error
    while first.__context__ is not None:
        first = first.__context__

    def line(each: BaseException) -> str:
        return f"{type(each).__name__}: {(str(each).strip().splitlines() or [''])[0]}"

    return line(error) if first is error else f"{line(error)}; first {line(first)}"
