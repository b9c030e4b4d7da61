"""A run's folder with everything in it, written by hand: nothing is trained."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ict_fast import presets
from ict_fast.config import Config, to_dict
from ict_fast.consistency.curriculum import num_scales
from ict_fast.data.prepare import DIGITS_FINGERPRINT
from ict_fast.report import curves

BUCKETS = 6


@pytest.fixture
def config() -> Config:
    """The digits preset with four fields of other values, one of each kind."""
    preset = presets.get("digits")
    return replace(
        preset,
        data=replace(preset.data, flip=True),
        network=replace(preset.network, channel_mult=(1, 4), dropout=0.125),
        training=replace(preset.training, total_steps=400),
    )


def log_line(config: Config, step: int) -> dict[str, Any]:
    """What the trainer logs, with every figure that it may have."""
    return {
        "step": step,
        "loss": None if step == 100 else 5 / (1 + step / 100),
        "num_scales": num_scales(step - 1, config.training.total_steps, config.method),
        "skipped": 2,
        "gradient_norm": 3 + step / 10,
        "images_per_second": 1000.0,
        "time": 1.7e9 + step,
        "precision": "bf16",
        "loss_by_sigma": [None if bucket == 0 else 2.0**-bucket for bucket in range(BUCKETS)],
        "mfu": 0.31,
        "memory_gb": 1.25,
        "data_wait": 0.015,
    }


MEASURES = {
    "one_step": {"frechet_distance": 1.6088, "precision": 0.66, "recall": 0.85, "kernel_distance": 0.44},
    "two_step": {"frechet_distance": 1.9359, "precision": 0.7, "recall": 0.82, "kernel_distance": 1.5},
}


@pytest.fixture
def run(tmp_path: Path, config: Config) -> Path:
    """runs/everything: log, grids, measurements, checkpoint, devices."""
    path = tmp_path / "runs" / "everything"
    checkpoint = path / "checkpoints" / "step-00000400"
    checkpoint.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(to_dict(config)))
    lines = [json.dumps(log_line(config, step)) for step in range(20, 401, 20)]
    (path / "log.jsonl").write_text("\n".join(lines) + "\n")
    measured = [{"step": step, **MEASURES, "count": 500, "steps": [1, 2]} for step in (200, 400)]
    (path / "evaluations.jsonl").write_text("\n".join(map(json.dumps, measured)) + "\n")
    evaluation = {
        "checkpoint": checkpoint.name,
        "step": 400,
        **MEASURES,
        "reference": {
            "halves": 2.28,
            "gaussian": 24.4,
            "noise": 352.6,
            "count": 1797,
            "halves_counts": [898, 899],
        },
        "count": 10_000,
        "seed": 0,
        "steps": [1, 2],
        "features": {"name": "digits-classifier-v1"},
        "reference_path": "data/digits",
        "not_available": {"inception_score": "the features file gives no probabilities of classes"},
        "warnings": ["the crop recipe of the reference is not known"],
    }
    (path / "checkpoints" / "evaluation.json").write_text(json.dumps(evaluation))
    state = {
        "step": 400,
        "config": to_dict(config),
        "data_fingerprint": DIGITS_FINGERPRINT,
        "trunk_dtype": "bfloat16",
        "versions": {"ict_fast": "0.1.0", "torch": "2.13.0"},
    }
    (checkpoint / "state.json").write_text(json.dumps(state))
    edges = [math.exp(i) for i in range(-6, -6 + BUCKETS + 1)]
    about = {"sigma_edges": edges, "device": "NVIDIA H100 80GB HBM3", "processes": 8, "flops_per_image": 1e9}
    (path / "run.json").write_text(json.dumps(about))
    (path / "grids").mkdir()
    for step in range(40, 401, 40):
        pixels = np.full((64, 64), step // 2, np.uint8)
        Image.fromarray(pixels).save(path / "grids" / f"step-{step:08d}.png")
    return path


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Curves that are made and not drawn, which takes most of a page's time: for tests of its words."""
    monkeypatch.setattr(curves, "_svg", lambda figure, name: f'<svg role="img" aria-label="{name}"></svg>')
