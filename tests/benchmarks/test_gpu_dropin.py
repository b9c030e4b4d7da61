"""benchmarks/gpu_dropin.py at sizes that say nothing about speed."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
gpu_dropin: Any = importlib.import_module("gpu_dropin")


def test_every_code_base_is_measured_against_the_drop_in() -> None:
    measurements = gpu_dropin.part_dropin(torch.device("cpu"), SimpleNamespace(left=lambda: 60.0))
    assert len(measurements) == 4
    for name, measure in measurements.items():
        record = measure()
        json.dumps(record)
        assert record["code_base"] in name
        assert record["blocks_replaced"] == 5
        assert record["norms_left"] == 0
        variants = {"own loss", "drop-in loss", "drop-in loss, group norms replaced"}
        assert record["ms"].keys() == record["times_faster"].keys() == variants
        assert all(len(times) == 1 and times[0] > 0 for times in record["ms_all"].values())


def test_a_first_call_that_would_not_end_in_time_is_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(gpu_dropin.time, "monotonic", lambda: clock[0])
    compile_seconds = 40.0

    def first_call(step: Any, device: torch.device) -> float:
        clock[0] += compile_seconds
        return compile_seconds

    monkeypatch.setattr(gpu_dropin, "seconds_of", first_call)
    session = SimpleNamespace(left=lambda: 90.0 - clock[0])
    first, second, *_ = gpu_dropin.part_dropin(torch.device("cpu"), session).values()
    record = first()
    assert list(record["ms"]) == ["own loss", "drop-in loss"]
    assert list(record["left_out"]) == ["drop-in loss, group norms replaced"]
    assert "more than were left" in second()["not_measured"]
    assert clock[0] <= 90.0
