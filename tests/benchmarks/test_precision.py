"""The comparison of gradients by precision finds what is there, and nothing where nothing is."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ict_fast.config import Config
from ict_fast.data.loaders import make_loader
from ict_fast.data.store import open_store
from ict_fast.training.step import TrainStep
from ict_fast.training.trainer import train

ROOT = Path(__file__).parents[2]
_SPEC = importlib.util.spec_from_file_location("precision", ROOT / "benchmarks/precision.py")
assert _SPEC is not None
assert _SPEC.loader is not None
precision = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(precision)

CPU = torch.device("cpu")


@pytest.fixture
def short(tiny: Config) -> Config:
    return replace(tiny, training=replace(tiny.training, batch_size=8))


def test_equal_trunks_agree_and_a_scaled_one_differs_in_its_norm_alone(short: Config) -> None:
    exact, same, doubled = (TrainStep(short, CPU) for _ in range(3))
    with torch.no_grad():
        for p in doubled.network.parameters():
            p.register_hook(lambda gradient: 2 * gradient)
    loader, _ = make_loader(short, open_store(Path(short.data.path)), CPU)
    with loader:
        batches = [loader.micro_batches(k)[0] for k in range(3)]
    found = precision.measure(short, {"fp32": exact, "same": same, "doubled": doubled}, 161, batches)
    assert found["same"] == pytest.approx({"cosine": 1, "cosine_of_mean": 1, "norm": 1, "noise": 0})
    assert found["doubled"] == pytest.approx({"cosine": 1, "cosine_of_mean": 1, "norm": 2, "noise": 1})


def test_the_command_writes_a_row_for_every_stage(
    short: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # as torch has it
    train(short, out=tmp_path / "run", device="cpu")
    words = [str(tmp_path / "run"), "--batches", "2", "--batch-size", "8", "--out", str(tmp_path / "out")]
    assert precision.main(words) == 0
    assert not torch.backends.cudnn.allow_tf32, "fp32 is what the others are compared with"
    report = json.loads((tmp_path / "out/precision.json").read_text())
    assert [stage["num_scales"] for stage in report["stages"]] == [11, 21, 41, 81, 161, 321, 641, 1281]
    for stage in report["stages"]:
        half, full = stage["precisions"]["bf16"], stage["precisions"]["fp16"]
        assert half["cosine"] < full["cosine"] <= 1, "fp16 has three bits more"
        assert half["cosine"] < stage["precisions"]["tf32"]["cosine"] <= 1
    assert report["tf32"].startswith("emulated")
    assert (tmp_path / "out/precision.md").read_text().count("\n| ") >= 8
    assert (tmp_path / "out/precision.png").stat().st_size > 5000
