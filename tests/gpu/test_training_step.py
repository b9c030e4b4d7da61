"""The training step on a GPU against the CPU's, and what it must never do there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ict_fast import presets
from ict_fast.config import Config
from ict_fast.data.loaders import Batch
from ict_fast.networks.tf32 import TrunkConv2d, set_tf32
from ict_fast.training.launch import configure_torch
from ict_fast.training.step import TrainStep
from ict_kernels import sample_noise_levels
from ict_kernels.philox import dropout_keep_mask, normal


def _config(precision: str = "fp32") -> Config:
    preset = presets.get("digits")
    return replace(
        preset,
        network=replace(preset.network, dropout=0.2),
        training=replace(preset.training, total_steps=16, batch_size=32, precision=precision),
    )


def _batch(config: Config, step: int, device: str) -> Batch:
    generator = torch.Generator().manual_seed(step)
    count = config.training.batch_size
    images = torch.randint(0, 256, (count, 8, 8, 1), dtype=torch.uint8, generator=generator)
    flip = torch.randint(0, 2, (count,), dtype=torch.uint8, generator=generator)
    return Batch(images.to(device), torch.zeros(count, dtype=torch.int64).to(device), flip.to(device), 0)


def _trained(config: Config, device: str, steps: int) -> Tensor:
    configure_torch(torch.device(device), deterministic=False)
    train_step = TrainStep(config, torch.device(device))
    for step in range(steps):
        train_step(step, [_batch(config, step, device)])
    assert int(train_step.optimizer.skipped) == 0
    return torch.cat([p.detach().cpu().double().flatten() for p in train_step.network.parameters()])


@contextmanager
def _synchronisation_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_a_step_never_waits_for_the_device(precision: str) -> None:
    config = _config(precision)
    train_step = TrainStep(config, torch.device("cuda"))
    batches = [_batch(config, step, "cuda") for step in range(6)]
    for step in range(3):
        train_step(step, [batches[step]])
    with _synchronisation_is_an_error():
        for step in range(3, 6):
            train_step(step, [batches[step]])


def test_fp32_steps_agree_with_the_cpu() -> None:
    config = _config()
    cpu, gpu = _trained(config, "cpu", 4), _trained(config, "cuda", 4)
    assert float((cpu - gpu).norm() / cpu.norm()) < 1e-4


@pytest.mark.parametrize("preset", ["cifar10", "imagenet64"])
@pytest.mark.parametrize(
    ("precision", "compiled"), [("bf16", False), ("fp16", False), ("fp32", False), ("bf16", True)]
)
def test_student_and_teacher_are_one_function(preset: str, precision: str, compiled: bool) -> None:
    """Bit for bit: else each loss would hold, beside what the trunk's rounding does to both, a difference of
    the code that runs with and without gradients."""
    config = presets.get(preset)
    sizes = {"channels": 32, "channel_mult": (1, 2), "num_blocks": 1, "resolution": 32}
    network = replace(config.network, attention_resolutions=(16,), **sizes)
    training = replace(config.training, precision=precision, compile="on" if compiled else "off")
    step = TrainStep(replace(config, network=network, training=training), torch.device("cuda"))
    with torch.no_grad():  # fresh networks end in zeros
        for parameter in step.network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    step.casts.refresh()
    x, noise = torch.randn(8, 3, 32, 32, device="cuda"), torch.randn(8, device="cuda")
    labels = torch.arange(8, device="cuda") if network.num_classes else None
    seed = torch.tensor([1, 2], device="cuda")
    dtype = step.autocast_dtype
    with torch.autocast("cuda", dtype=dtype, enabled=dtype is not None, cache_enabled=False):
        with torch.no_grad():
            teacher = step.network(x, noise, labels, dropout_seed=seed)
        student = step.network(x, noise, labels, dropout_seed=seed)
    assert student.requires_grad
    assert teacher.std() > 0.01
    assert torch.equal(student.detach(), teacher)


def test_levels_and_masks_are_the_cpus_bit_for_bit_and_noise_to_rounding() -> None:
    for device_seed in (0, 2**40 + 7):
        seed = torch.tensor([device_seed, 12345])
        ours = sample_noise_levels(10_000, torch.tensor(1281), seed=seed, offset=77)
        theirs = sample_noise_levels(10_000, torch.tensor(1281).cuda(), seed=seed.cuda(), offset=77)
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b.cpu())
        shape = (6, 24, 9, 7)
        masks = [dropout_keep_mask(shape, 0.3, s, 5, 3) for s in (seed, seed.cuda())]
        assert torch.equal(masks[0], masks[1].cpu())
        noise = [normal(shape, s, 5) for s in (seed, seed.cuda())]
        torch.testing.assert_close(noise[0], noise[1].cpu(), rtol=0, atol=2e-6)


@pytest.fixture
def cudnns_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN's own choice of algorithm: what it finds to be fastest may be Winograd's, which is less exact."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


@pytest.mark.usefixtures("cudnns_choice")
def test_the_ends_are_not_rounded_to_tf32() -> None:
    x = torch.randn(8, 32, 32, 32, device="cuda")
    weight = torch.randn(64, 32, 3, 3, device="cuda")
    exact = torch.nn.functional.conv2d(x.double(), weight.double())
    error = (torch.nn.functional.conv2d(x, weight).double() - exact).norm() / exact.norm()
    assert float(error) < 1e-6


@pytest.mark.usefixtures("cudnns_choice")
def test_tf32_is_the_trunks_alone() -> None:
    """One block: its convolutions round their operands; a linear layer and what comes after do not."""
    layer = TrunkConv2d(64, 64, 3, padding=1, bias=False).cuda()
    x = torch.randn(8, 64, 32, 32, device="cuda").to(memory_format=torch.channels_last).requires_grad_()
    exact = torch.nn.functional.conv2d(x.detach().double(), layer.weight.detach().double(), padding=1)
    errors = {}
    for tf32 in (False, True):
        set_tf32(layer, tf32)
        output = layer(x)
        errors[tf32] = float((output.detach().double() - exact).norm() / exact.norm())
        output.sum().backward()
    assert errors[False] < 1e-6
    assert 1e-4 < errors[True] < 2e-3
    y = torch.randn(256, 256, device="cuda")
    product = y.double() @ y.double()
    assert float(((y @ y).double() - product).norm() / product.norm()) < 1e-6


def test_tf32_steps_agree_with_the_emulation_of_the_cpu() -> None:
    config = _config("tf32")
    cpu, gpu = _trained(config, "cpu", 4), _trained(config, "cuda", 4)
    assert float((cpu - gpu).norm() / cpu.norm()) < 1e-3
