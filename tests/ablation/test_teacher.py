"""Without its lag the EMA teacher is the student's own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ict_fast.config import Config
from ict_fast.training.trainer import train


def _losses(config: Config, out: Path) -> list[float]:
    folder = train(config, out=out, device="cpu").out
    lines = (json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def test_an_ema_teacher_with_mu_near_0_trains_as_without_ema(tiny: Config, tmp_path: Path) -> None:
    fixed = replace(
        tiny,
        method=replace(tiny.method, curriculum="fixed"),
        training=replace(tiny.training, total_steps=6),
        logging=replace(tiny.logging, log_every=1),
    )
    own = _losses(fixed, tmp_path / "own")
    ema = {
        mu: _losses(
            replace(fixed, method=replace(fixed.method, teacher="ema", teacher_ema=mu)), tmp_path / f"{mu}"
        )
        for mu in (1e-300, 0.9)
    }
    assert len(own) == 6
    assert ema[1e-300] == pytest.approx(own, rel=1e-5)
    assert ema[0.9][0] == pytest.approx(own[0], rel=1e-5), "teacher and student begin as the same network"
    assert ema[0.9][1:] != pytest.approx(own[1:], rel=1e-3), "a lag is seen"
