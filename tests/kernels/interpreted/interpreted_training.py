"""A training run by the kernels against the same run by the eager definitions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import ict_kernels
from ict_fast import presets
from ict_fast.networks.casts import TrunkCasts
from ict_fast.networks.layers import ResidualBlock
from ict_fast.training.step import TrainStep

STEPS = 2


@pytest.fixture(autouse=True)
def auto_again() -> Iterator[None]:
    yield
    ict_kernels.set_backend("auto")


def run(backend: str, adaptive_norm: bool) -> tuple[list[float], torch.Tensor, torch.Tensor]:
    """Loss of each step, last gradient and last weights; with dropout, at the curriculum's last stage.

    In one of two networks: with resampling, or of one level with scale and shift.
    """
    ict_kernels.set_backend(backend)
    preset = presets.get("digits")
    levels = {"channel_mult": (1,), "attention_resolutions": (8,)} if adaptive_norm else {}
    config = replace(
        preset,
        network=replace(
            preset.network, channels=8, num_classes=0, dropout=0.2, adaptive_norm=adaptive_norm, **levels
        ),
        training=replace(preset.training, total_steps=24, batch_size=4),
    )
    step = TrainStep(config, torch.device("cpu"))
    with torch.no_grad():  # fresh networks end in zeros, where every gradient but the last is zero
        for number, parameter in enumerate(step.network.parameters()):
            generator = torch.Generator().manual_seed(number)
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    generator = torch.Generator().manual_seed(0)
    losses = []
    for number in range(24 - STEPS, 24):
        images = torch.randint(0, 256, (4, 8, 8, 1), dtype=torch.uint8, generator=generator)
        batch = SimpleNamespace(images=images, labels=None, offset=0, flip=torch.tensor([0, 1, 0, 1]).byte())
        step.reset_losses()
        step(number, [batch])
        losses.append(float(step.losses.sum))
    parameters = list(step.network.parameters())
    gradient = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    return losses, gradient, torch.cat([p.detach().flatten() for p in parameters])


@pytest.mark.parametrize("adaptive_norm", [False, True])
def test_the_kernels_train_as_the_definitions_do(adaptive_norm: bool) -> None:
    kernels, eager = run("triton", adaptive_norm), run("eager", adaptive_norm)
    assert kernels[0] == pytest.approx(eager[0], rel=1e-4)
    cosine = torch.nn.functional.cosine_similarity(kernels[1], eager[1], dim=0)
    assert float(cosine) > 1 - 1e-5
    torch.testing.assert_close(kernels[2], eager[2], rtol=1e-3, atol=1e-5)


def test_compiled_student_and_teacher_are_one_function(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: a rounding that differs between code with and without gradients would be in every loss.

    Eager definitions, which no GPU runs, are compiled into what stands around them, and do differ.
    """
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    ict_kernels.set_backend("triton")
    torch.manual_seed(0)
    block = ResidualBlock(
        12, 8, embedding_channels=4, eps=1e-5, adaptive_norm=True, dropout=0.3, skip_scale=0.5**0.5,
        attention=True, head_channels=4,
    )  # fmt: skip
    TrunkCasts([block], torch.bfloat16).refresh()
    torch._dynamo.reset()
    block.compile(fullgraph=True, dynamic=False)
    x, skip = (
        torch.randn(2, width, 8, 8).bfloat16().to(memory_format=torch.channels_last) for width in (4, 8)
    )
    arguments = (torch.randn(2, 4), torch.tensor([3, 5]), torch.tensor(0))
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        with torch.no_grad():
            teacher = block(x, *arguments, skip_nchw=skip)
        student = block(x, *arguments, skip_nchw=skip)
    assert student.requires_grad
    assert student.detach().equal(teacher)
    assert teacher.float().std() > 0.1
