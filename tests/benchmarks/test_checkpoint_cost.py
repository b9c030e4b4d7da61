"""The benchmark of what checkpoints cost runs, and its figures fit together."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

checkpoint_cost: Any = importlib.import_module("checkpoint_cost")


def test_the_cost_of_the_digits_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        "--presets",
        "digits",
        "--saves",
        "2",
        "--work",
        str(tmp_path / "work"),
        "--out",
        str(tmp_path),
    ]
    assert checkpoint_cost.main(options) in (0, 1)
    assert capsys.readouterr().out.startswith("digits: 0.0")
    (result,) = json.loads((tmp_path / "checkpoint-cost.json").read_text())["results"]
    assert len(result["held_up_seconds"]) == len(result["written_after_seconds"]) == 2
    for held, written in zip(result["held_up_seconds"], result["written_after_seconds"], strict=True):
        assert 0 < held <= written
    steps = result["digits_step_seconds"]
    assert min(steps.values()) > 0
    held, longer = (sorted(result[key]) for key in ("held_up_seconds", "steps_longer_by_seconds"))
    cost = sum(held) / 2 + max(0.0, sum(longer) / 2)
    interval = min(result["checkpoint_every"] * result["step_seconds"], 60 * result["checkpoint_minutes"])
    assert result["share_of_the_run"] == pytest.approx(cost / (interval + cost))
    assert result["step_seconds"] == steps["alone"]
    # Weights, their average and two moments in fp32; little else.
    assert 1 <= result["state_bytes"] / (16 * result["parameters"]) < 1.01
