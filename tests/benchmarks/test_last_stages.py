"""The last stages in each precision: one checkpoint, several ends, and nothing done twice."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from ict_fast.checkpoint import open_checkpoint
from ict_fast.training.step import TrainStep

_SPEC = importlib.util.spec_from_file_location(
    "last_stages", Path(__file__).parents[2] / "benchmarks/last_stages.py"
)
assert _SPEC is not None
assert _SPEC.loader is not None
last_stages = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(last_stages)


def test_every_precision_ends_the_same_beginning_and_an_interrupted_command_goes_on(
    digits_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--precisions", "fp32", "bf16", "--seeds", "1", "--count", "50", "--total-steps", "16"]
    words += ["--data", str(digits_store), "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    original = TrainStep.__call__
    steps: list[tuple[str, int]] = []

    def step(self: TrainStep, number: int, batches: list) -> None:
        precision = self.config.training.precision
        if precision == "bf16" and number == 15 and (precision, 15) not in steps:
            steps.append((precision, number))
            raise KeyboardInterrupt
        steps.append((precision, number))
        original(self, number, batches)

    monkeypatch.setattr(TrainStep, "__call__", step)
    with pytest.raises(KeyboardInterrupt):
        last_stages.main(words)
    assert len(json.loads((tmp_path / "out/last-stages.json").read_text())["runs"]) == 1, "fp32's is kept"
    steps.append(("interrupted", 0))
    assert last_stages.main(words) == 0
    again = steps[steps.index(("interrupted", 0)) + 1 :]
    assert again == [("bf16", 14), ("bf16", 15)], "from the last checkpoint, and nothing of fp32"

    report = json.loads((tmp_path / "out/last-stages.json").read_text())
    assert [(run["precision"], run["seed"]) for run in report["runs"]] == [("fp32", 0), ("bf16", 0)]
    for run in report["runs"]:
        assert run["after"].keys() == {"641", "1281"}
        assert all(0 < value < 200 for each in run["after"].values() for value in each.values())
    # fp32 with the first run's seed is the first run; bf16 parted from it after the common beginning.
    ours, theirs = (
        open_checkpoint(tmp_path / f"work/{run}/checkpoints/step-00000016").tensors("ema")
        for run in ("fp32-until-641", "fp32-0")
    )
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    other = open_checkpoint(tmp_path / "work/bf16-0/checkpoints/step-00000016").tensors("ema")
    assert not all(other[name].equal(theirs[name]) for name in theirs)
    table = (tmp_path / "out/last-stages.md").read_text()
    assert "| bf16 | " in table
    assert "(+" in table or "(-" in table

    monkeypatch.setattr(TrainStep, "__call__", lambda *_: pytest.fail("a step was done again"))
    assert last_stages.main(words) == 0
