"""What is timed and how: the cases, the copies, graphs that take turns, and what is no rival."""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(Path(__file__).parent)]

gpu_group_norm: Any = importlib.import_module("gpu_group_norm")
gpu_optimizer: Any = importlib.import_module("gpu_optimizer")
gpu_timing: Any = importlib.import_module("gpu_timing")

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("preset", "norms", "elements"), [("cifar10", 73, 9.14e6), ("imagenet64", 95, 35.06e6)]
)
def test_the_cases_are_all_norms_of_the_network(preset: str, norms: int, elements: float) -> None:
    cases = gpu_group_norm.norm_cases(preset, 1)
    assert sum(case.uses for case in cases) == norms
    total = sum(case.uses * case.norm.channels * case.norm.size**2 for case in cases)
    assert total == pytest.approx(elements, rel=1e-3)
    assert sum(case.share for case in cases) == pytest.approx(1.0)
    assert [case.share for case in cases] == sorted((case.share for case in cases), reverse=True)


def test_a_copy_moves_as_many_bytes_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    buffers: list[torch.Tensor] = []
    empty = torch.empty

    def noted(*size: int, **options: Any) -> torch.Tensor:
        buffers.append(empty(*size, **options))
        return buffers[-1]

    monkeypatch.setattr(gpu_timing.torch, "empty", noted)
    kinds = gpu_timing.copies({"forward": 4096, "backward": 8192}, 3, CPU)
    for stages, sign in zip(kinds.values(), (1, -1), strict=True):
        for stage, moved in (("forward", 4096), ("backward", 8192)):
            for number in range(3):
                source, target = buffers[2 * number : 2 * number + 2]
                target.zero_()
                stages[stage](number, None)
                copied = moved // 2 // 4  # read and written, fp32
                assert torch.equal(target[:copied], sign * source[:copied])
                assert not target[copied:].any()


class FakeGraph:
    """Records what is captured and, on replay, says that it ran."""

    capturing: FakeGraph | None = None
    log: list[Any] = []  # noqa: RUF012

    def __init__(self) -> None:
        self.captured: list[Any] = []

    def replay(self) -> None:
        FakeGraph.log.append(("replay", *self.captured))


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """torch.cuda with a device whose clock advances by the number of calls that a graph holds."""
    log: list[Any] = []
    monkeypatch.setattr(FakeGraph, "log", log)

    @contextmanager
    def graph(captured: FakeGraph, pool: object, stream: object) -> Iterator[None]:
        assert stream == "side stream"
        FakeGraph.capturing = captured
        yield
        FakeGraph.capturing = None

    @contextmanager
    def on_stream(stream: object) -> Iterator[None]:
        yield

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.time = sum(len(entry) - 1 for entry in log)

        def elapsed_time(self, end: Event) -> float:
            return float(end.time - self.time)

    fakes = {
        "CUDAGraph": FakeGraph,
        "graph": graph,
        "graph_pool_handle": object,
        "Stream": lambda: "side stream",
        "current_stream": lambda: "side stream",
        "stream": on_stream,
        "synchronize": lambda: None,
        "_sleep": lambda cycles: None,
        "Event": Event,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return log


def test_on_a_gpu_every_set_is_captured_once_and_graphs_take_turns(fake_cuda: list[Any]) -> None:
    def stages(variant: str, work: int) -> dict[str, Any]:
        def stage(name: str) -> Callable[[int, Any], Any]:
            def call(number: int, kept: Any) -> Any:
                if FakeGraph.capturing is not None:
                    assert kept == (None if name == "forward" else ("forward", number))
                    FakeGraph.capturing.captured += [(variant, name, number)] * work
                return name, number

            return call

        return {"forward": stage("forward"), "backward": stage("backward")}

    def impossible(number: int, kept: Any) -> Any:
        try:
            raise ValueError("no kernel for this shape")
        finally:
            raise RuntimeError("capture failed")

    variants = {
        "ict_kernels": stages("ours", 1),
        "other": {"forward": impossible},
        "eager": stages("eager", 7),
    }
    timings = gpu_timing.time_variants(variants, 3, SimpleNamespace(type="cuda"))
    # One unit of time per call: a call's time is its work, whatever the number of sets.
    assert timings.medians("forward") == timings.medians("backward") == {"ict_kernels": 1.0, "eager": 7.0}
    reason = "RuntimeError: capture failed; first ValueError: no kernel for this shape"
    assert timings.failed == {"other": reason}
    order = [(entry[1][0], entry[1][1]) for entry in fake_cuda]
    turn = [("ours", "forward"), ("ours", "backward"), ("eager", "forward"), ("eager", "backward")]
    assert order == turn * (len(order) // 4)
    assert len(timings.milliseconds["forward"]["eager"]) == gpu_timing.ROUNDS
    for entry in fake_cuda:
        assert set(Counter(number for _, _, number in entry[1:])) == {0, 1, 2}


def test_our_own_failure_is_not_passed_over() -> None:
    def fail(number: int, kept: Any) -> Any:
        raise RuntimeError("illegal memory access")

    with pytest.raises(RuntimeError, match="illegal"):
        gpu_timing.time_variants({"ict_kernels": {"forward": fail}}, 1, CPU)


def test_a_baseline_with_wrong_results_is_no_rival() -> None:
    x = torch.linspace(-2, 3, 1000, requires_grad=True)

    def stages(factor: float) -> dict[str, Any]:
        return gpu_timing.differentiable(
            lambda number: x * x.detach() * factor, [[x]], lambda number, y: torch.ones_like(y)
        )

    variants = {
        "ict_kernels": stages(1.0),
        "eager": stages(1.0),
        "rounds": stages(1 + 1e-5),
        "wrong": stages(1.01),
        "none": stages(float("nan")),
    }
    held_to = dict.fromkeys(("rounds", "wrong", "none"), "eager")
    timings = gpu_timing.time_variants(variants, 1, CPU, held_to)
    assert timings.medians("backward").keys() == {"ict_kernels", "eager", "rounds"}
    assert timings.failed["wrong"] == "ValueError: wrong: result 0 differs from that of eager by 0.01"
    assert "by nan" in timings.failed["none"]
    assert timings.differences["rounds"] == pytest.approx(1e-5, rel=0.1)


@pytest.mark.parametrize(("host", "expected"), [(30, 2.0), (5000, None)])
def test_a_queued_step_is_timed_while_the_device_never_waits_or_not_at_all(
    host: int, expected: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host takes `host` of the head starts that the device is held for."""
    held = [0]

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.record = self.synchronize = lambda: None

        def query(self) -> bool:
            return host >= held[0] // gpu_timing.HEAD_START_CYCLES

        def elapsed_time(self, end: Event) -> float:
            return 2.0

    fakes = {
        "Event": Event,
        "synchronize": lambda: None,
        "_sleep": lambda cycles: held.__setitem__(0, cycles),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    assert gpu_optimizer.queued_ms(lambda: None) == expected
