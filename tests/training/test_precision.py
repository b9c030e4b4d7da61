"""The trunk's arithmetic is chosen by what its rounding does, and the choice lasts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ict_fast.checkpoint import open_checkpoint
from ict_fast.config import Config
from ict_fast.training import precision, step
from ict_fast.training.precision import Rounding, measure_rounding
from ict_fast.training.step import TrainStep
from ict_fast.training.trainer import train

CPU = torch.device("cpu")


@pytest.fixture
def like_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """auto means bf16, here too."""
    original = step.trunk_dtype
    monkeypatch.setattr(
        step, "trunk_dtype", lambda name, device: original("bf16" if name == "auto" else name, device)
    )


def test_the_rounding_is_what_float64_statistics_of_the_gradients_say(
    tiny: Config, batches: Callable
) -> None:
    config = replace(tiny, training=replace(tiny.training, batch_size=8))
    steps = {
        name: TrainStep(replace(config, training=replace(config.training, precision=name)), CPU)
        for name in ("fp32", "bf16")
    }
    drawn = [batches(config, number, 4) for number in range(5)]
    gradients = {}
    for name, each in steps.items():
        with torch.no_grad():  # fresh networks end in zeros, where every gradient but the last is zero
            for number, parameter in enumerate(each.network.parameters()):
                generator = torch.Generator().manual_seed(number)
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        each.num_scales.fill_(641)
        rows = []
        for number, batch in enumerate(drawn):
            each.optimizer.zero_grad()
            each.seed_and_step[1].fill_(100 + number)
            for micro_batch in batch:
                each.backward(micro_batch)
            rows.append(torch.cat([p.grad.flatten().double() for p in each.network.parameters()]))
        gradients[name] = torch.stack(rows)
    exact, rounded = gradients["fp32"], gradients["bf16"]
    means = rounded.mean(0), exact.mean(0)
    found = measure_rounding(steps["bf16"], 100, drawn)
    assert found.cosine == pytest.approx(float(torch.cosine_similarity(*means, dim=0)), abs=1e-6)
    noise = (rounded - exact).var(0, correction=0).sum() / exact.var(0, correction=0).sum()
    assert found.noise == pytest.approx(float(noise), rel=1e-3)
    assert 0 < found.noise < 0.5
    assert steps["bf16"].autocast_dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("cosine", "noise", "harmless"), [(0.998, 0.1, True), (0.9979, 0.0, False), (1.0, 0.11, False)]
)
def test_the_bounds_of_what_is_harmless(cosine: float, noise: float, harmless: bool) -> None:
    assert Rounding(cosine, noise).is_harmless == harmless


@pytest.mark.usefixtures("like_a_gpu")
def test_the_choice_is_made_at_the_borders_of_stages_lasts_and_is_resumed(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(tiny, training=replace(tiny.training, precision="auto", max_skipped_steps=20))
    measured: list[int] = []

    def measure(train_step: TrainStep, first_step: int, drawn: object) -> Rounding:
        measured.append(first_step)
        return Rounding(0.9, 1.0) if first_step == 12 else Rounding(1.0, 0.0)

    monkeypatch.setattr(precision, "measure_rounding", measure)
    train(config, out=tmp_path / "whole", device="cpu")
    assert measured == [0, 3, 6, 9, 12], "every third step begins a stage; after the switch none is measured"
    said = capsys.readouterr().err
    assert "N = 81: bf16 stays (cosine 1.0000" in said
    assert "N = 161: bf16 is too coarse, fp16 from here on (cosine 0.9000" in said
    dtypes = {
        number: json.loads((tmp_path / f"whole/checkpoints/step-{number:08d}/state.json").read_text())[
            "trunk_dtype"
        ]
        for number in (20, 24)
    }
    assert dtypes == {20: "float16", 24: "float16"}

    original = TrainStep.__call__
    for cut in (11, 17):  # before the switch, and after it

        def until(self: TrainStep, number: int, drawn: object, cut: int = cut) -> None:
            if number == cut:
                raise KeyboardInterrupt
            original(self, number, drawn)  # type: ignore[arg-type]

        monkeypatch.setattr(TrainStep, "__call__", until)
        with pytest.raises(KeyboardInterrupt):
            train(config, out=tmp_path / "broken", device="cpu")
    monkeypatch.setattr(TrainStep, "__call__", original)
    train(config, out=tmp_path / "broken", device="cpu")
    ours, theirs = open_checkpoint(tmp_path / "broken"), open_checkpoint(tmp_path / "whole")
    for name in theirs.names:
        assert (ours.path / f"{name}.safetensors").read_bytes() == (
            theirs.path / f"{name}.safetensors"
        ).read_bytes(), f"{name} differ"


@pytest.mark.usefixtures("like_a_gpu")
def test_a_run_measures_its_own_gradients_and_says_what_it_found(
    tiny: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(tiny, training=replace(tiny.training, precision="auto", batch_size=8))
    train(config, out=tmp_path / "run", device="cpu")
    lines = [line for line in capsys.readouterr().err.splitlines() if "bf16" in line]
    assert len(lines) >= 1
    assert lines[0].startswith("N = 11: bf16 stays (cosine ")
