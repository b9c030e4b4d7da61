"""The captured step against the same step launched operation by operation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ict_fast import presets
from ict_fast.config import Config
from ict_fast.data.loaders import Batch
from ict_fast.training.graph import CapturedStep
from ict_fast.training.launch import configure_torch
from ict_fast.training.reduction import AtOnce
from ict_fast.training.step import TrainStep
from ict_fast.training.world import World

STEPS = 12


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    """Equal bits can be asked for only where the algorithms repeat themselves."""
    configure_torch(torch.device("cuda"), deterministic=True)
    yield
    torch.use_deterministic_algorithms(False)


def _config(precision: str, compile: str, teacher: str) -> Config:
    preset = presets.get("digits")
    return replace(
        preset,
        network=replace(preset.network, dropout=0.2),
        method=replace(preset.method, teacher=teacher),
        training=replace(
            preset.training,
            total_steps=16,
            batch_size=32,
            precision=precision,
            compile=compile,
            deterministic=True,
        ),
    )


def _batches(step: int, size: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(step)
    images = torch.randint(0, 256, (32, 8, 8, 1), dtype=torch.uint8, generator=generator).cuda()
    labels = torch.randint(0, 10, (32,), generator=generator).cuda()
    return [Batch(images[i : i + size], labels[i : i + size], None, i) for i in range(0, 32, size)]


def _state(step: TrainStep) -> dict[str, Tensor]:
    return {f"{file}/{name}": t for file, group in step.tensors().items() for name, t in group.items()}


@pytest.mark.parametrize("teacher", ["student", "ema"])
@pytest.mark.parametrize("compile", ["off", "on"])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_captured_steps_are_the_launched_ones(precision: str, compile: str, teacher: str) -> None:
    config = _config(precision, compile, teacher)
    plain, inner = (TrainStep(config, torch.device("cuda")) for _ in range(2))
    captured = CapturedStep(inner)
    for step in range(STEPS):
        plain(step, _batches(step, 16))
        captured(step, _batches(step, 16))
    assert captured.captures == 1
    ours, theirs = _state(inner), _state(plain)
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-7, msg=name)


def test_gradients_that_lie_in_one_tensor_are_captured() -> None:
    """As those of several processes do, which are reduced between the two graphs."""
    config = _config("bf16", "on", "student")
    plain, inner = (TrainStep(config, torch.device("cuda")) for _ in range(2))
    inner.reduction = AtOnce(inner.network, World())
    captured = CapturedStep(inner)
    for step in range(STEPS):
        plain(step, _batches(step, 16))
        captured(step, _batches(step, 16))
    assert captured.captures == 1
    assert (
        len({p.grad.untyped_storage().data_ptr() for p in inner.network.parameters() if p.grad is not None})
        == 1
    )
    for ours, theirs in zip(inner.network.parameters(), plain.network.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_a_switch_of_precision_and_a_new_plan_are_captured_anew() -> None:
    config = _config("bf16", "off", "student")
    plain, inner = (TrainStep(config, torch.device("cuda")) for _ in range(2))
    captured = CapturedStep(inner)
    for step in range(STEPS):
        if step == 5:
            plain.set_trunk(torch.float16)
            inner.set_trunk(torch.float16)
        size = 16 if step < 9 else 8
        plain(step, _batches(step, size))
        captured(step, _batches(step, size))
    assert captured.captures == 2, "three warm-up steps of the last plan are all that is left of it"
    for ours, theirs in zip(inner.network.parameters(), plain.network.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_a_replay_never_waits_for_the_device() -> None:
    captured = CapturedStep(TrainStep(_config("bf16", "off", "student"), torch.device("cuda")))
    ready = [_batches(step, 16) for step in range(8)]
    for step in range(4):
        captured(step, ready[step])
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(4, 8):
            captured(step, ready[step])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert captured.captures == 1


def test_the_gradients_of_the_calibration_leave_the_graph_whole() -> None:
    """Between steps, `--training.precision auto` makes and drops gradients of its own."""
    config = _config("bf16", "off", "student")
    plain, inner = (TrainStep(config, torch.device("cuda")) for _ in range(2))
    captured = CapturedStep(inner)
    for step in range(STEPS):
        if step == 6:
            inner.optimizer.zero_grad()
            inner.backward(_batches(99, 16)[0])
            inner.optimizer.zero_grad()
        plain(step, _batches(step, 16))
        captured(step, _batches(step, 16))
    for ours, theirs in zip(inner.network.parameters(), plain.network.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_a_released_graph_gives_its_memory_back_and_is_captured_anew() -> None:
    plain, inner = (TrainStep(_config("bf16", "off", "student"), torch.device("cuda")) for _ in range(2))
    captured = CapturedStep(inner)
    for step in range(STEPS):
        if step == 6:
            torch.cuda.empty_cache()
            held = torch.cuda.memory_reserved()
            captured.release()
            torch.cuda.empty_cache()
            assert torch.cuda.memory_reserved() < held
        plain(step, _batches(step, 16))
        captured(step, _batches(step, 16))
    assert captured.captures == 2
    for ours, theirs in zip(inner.network.parameters(), plain.network.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
