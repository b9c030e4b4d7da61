"""Steps are timed one behind the other, beside what may have held them up."""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

step_timing: Any = importlib.import_module("step_timing")
GPU = SimpleNamespace(type="cuda")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A device with a clock of its own, in milliseconds: what happened, and how far it has got."""
    state = SimpleNamespace(at=0.0, host=0.0, happened=[], allocations=7)

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = state.at
            state.happened.append("event")

        def elapsed_time(self, end: Event) -> float:
            return float(end.at - self.at)

    @contextmanager
    def watched(device: Any) -> Iterator[dict[str, Any]]:
        state.happened.append("watch")
        yield {"sm_mhz": 1980.0}
        state.happened.append("watched")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: state.happened.append("wait"))
    monkeypatch.setattr(
        torch.cuda, "memory_stats", lambda: {"num_device_alloc": state.allocations, "num_device_free": 2}
    )
    monkeypatch.setattr(step_timing, "watched", watched)
    monkeypatch.setattr(step_timing.time, "perf_counter", lambda: state.host / 1e3)
    return state


def test_steps_are_timed_one_behind_the_other_without_the_first(device: SimpleNamespace) -> None:
    """Steps of 30 ms that the host queues in 10, then in 40 and 80: in the end the device waits for it."""

    def step(number: int) -> None:
        device.happened.append(f"step {number}")
        device.host += {8: 40.0, 9: 80.0}.get(number, 10.0)
        device.at = max(device.at, device.host) + 30.0
        device.allocations += number == 9

    times = step_timing.time_steps(step, range(5, 10), GPU)
    queued = [each for number in range(5, 10) for each in (f"step {number}", "event")]
    assert device.happened == ["wait", "watch", "event", *queued, "wait", "watched"]
    # The device is done at 40, 70, 100, 130 and 180 ms; the host at 10, 20, 30, 70 and 150.
    assert times.ms == pytest.approx([30.0, 30.0, 30.0, 50.0])
    assert times.host_ms == pytest.approx([10.0, 10.0, 40.0, 80.0])
    assert times.behind_ms == pytest.approx([50.0, 70.0, 60.0, 30.0])
    assert times.device_allocations == 1
    assert times.record()["gpu"] == {"sm_mhz": 1980.0}


def test_on_a_cpu_a_step_takes_what_the_host_takes() -> None:
    times = step_timing.time_steps(lambda number: time.sleep(0.001), range(3), torch.device("cpu"))
    assert times.ms == times.host_ms
    assert len(times.ms) == 2
    assert min(times.ms) >= 1.0
    assert times.record()["behind_ms"] is None


def test_answers_of_nvidia_smi_are_summed_up() -> None:
    answers = [
        "1980, 410.55, 0x0000000000000000",
        "1755, 698.10, 0x0000000000000004",
        "1740, 699.00, 0x0000000000000044",
        "1725, [N/A], 0x0000000000000004",
        "17",
    ]
    found = step_timing.summary(answers)
    assert found == {
        "sm_mhz": 1755.0,
        "watts": 698.1,
        "limited_by": {"power cap": 2 / 3, "temperature, by hardware": 1 / 3},
        "answers": 3,
    }
    assert step_timing.summary(["No devices were found"]) == {"answers": 0}


def test_the_device_is_watched_by_its_own_nvidia_smi_until_the_body_ends(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Which may take a while to begin, and not heed that it is to end."""
    asked = tmp_path / "nvidia-smi"
    asked.write_text(
        f"#!/bin/sh\ntrap '' TERM\necho \"$@\" > {tmp_path}/words\nsleep 0.5\n"
        "printf '345, 80, 0x0\\n'\nsleep 0.1\nprintf '1980, 500, 0x4\\n%.0s' 1 2\n"
        "while true; do sleep 0.1; done\n"
    )
    asked.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="8f-1"))
    monkeypatch.setattr(step_timing, "_MOST_SECONDS", 2.0)
    begun = time.monotonic()
    with step_timing.watched(GPU) as found:
        assert time.monotonic() - begun >= 0.5, "it is waited for"
        time.sleep(0.4)
        assert found == {}
    assert time.monotonic() - begun < 30
    assert found == {"sm_mhz": 1980.0, "watts": 500.0, "limited_by": {"power cap": 1.0}, "answers": 2}
    assert "-i GPU-8f-1" in (tmp_path / "words").read_text()
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with step_timing.watched(GPU) as found:
        pass
    assert found == {"answers": 0}
