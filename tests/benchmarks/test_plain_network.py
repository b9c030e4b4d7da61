"""The step that ours is compared with computes the same function, so that only the speed differs."""

from __future__ import annotations

import importlib
import itertools
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ict_fast import presets
from ict_fast.training.step import TrainStep
from ict_kernels import GroupNormSiLU, RAdamEMA, consistency_loss, noise_images, sample_noise_levels

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
plain_network: Any = importlib.import_module("plain_network")
gpu_step: Any = importlib.import_module("gpu_step")
CPU = torch.device("cpu")


def config(**network: object) -> Any:
    preset = presets.get("digits")
    return replace(
        preset,
        network=replace(preset.network, **network),
        training=replace(preset.training, batch_size=8, compile="off"),
    )


@pytest.mark.parametrize("nchw", [False, True])
@pytest.mark.parametrize("network", [{"adaptive_norm": False}, {"adaptive_norm": True}, {"name": "adm"}])
def test_torchs_layers_give_the_networks_outputs_and_gradients(network: dict[str, Any], nchw: bool) -> None:
    step = TrainStep(config(**network), CPU)
    generator = torch.Generator().manual_seed(0)
    for p in step.network.parameters():  # gamma 1 and beta 0 hide what is forgotten
        p.data.add_(0.1 * torch.randn(p.shape, generator=generator))
    x, noise = torch.randn(8, 1, 8, 8, generator=generator), torch.randn(8, generator=generator)
    labels = torch.arange(8)

    def run() -> list[torch.Tensor]:
        step.network.zero_grad()
        output = step.network(x, noise, labels)
        output.square().sum().backward()
        return [output.detach(), *(p.grad.clone() for p in step.network.parameters() if p.grad is not None)]

    ours = run()
    plain_network.use_torchs_layers(step.network)
    if nchw:
        plain_network.use_nchw(step.network)
    for a, b in zip(ours, run(), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-4 * float(a.abs().max()))


@pytest.mark.parametrize("network", ["ncsnpp", "adm"])
def test_in_nchw_no_layer_of_a_block_sees_another_layout(
    network: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But attention, which is quick only where the channels of a head lie beside each other."""
    settings = config(name=network)
    step = TrainStep(settings, CPU)
    plain_network.make_plain(step, nchw=True)
    seen = []

    def note(module: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        seen.append((type(module).__name__, inputs[0].is_contiguous(), output.is_contiguous()))

    attention, strides = F.scaled_dot_product_attention, set()

    def noting(*given: torch.Tensor) -> torch.Tensor:
        strides.update(each.stride(-1) for each in given)
        return attention(*given)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noting)
    norms_and_convolutions = (plain_network.TorchNorm, plain_network.TorchConvolution)
    for block in step.network.blocks():
        for module in block.modules():
            assert not isinstance(module, plain_network.TrunkConv2d)
            if isinstance(module, norms_and_convolutions):
                module.register_forward_hook(note, prepend=True)
    step(0, gpu_step.synthetic_batches(settings, CPU))
    assert {kind for kind, *_ in seen} == {"TorchNorm", "TorchConvolution"}
    # A projection's input has attention's layout, in which the heads' channels come last.
    assert all(output and (given or kind == "TorchConvolution") for kind, given, output in seen)
    assert sum(given for _, given, _ in seen) > 0.9 * len(seen)
    assert strides == {1}
    assert all(p.is_contiguous() for p in step.network.parameters())


def test_its_norms_stay_in_the_trunks_dtype_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    norm = plain_network.TorchNorm(GroupNormSiLU(4, 8))
    group_norm, widened = torch.nn.functional.group_norm, []

    def noted(*arguments: Any) -> torch.Tensor:
        widened.append(torch.is_autocast_enabled("cpu"))  # on a GPU this group norm would be fp32
        return group_norm(*arguments)

    monkeypatch.setattr(torch.nn.functional, "group_norm", noted)
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(torch.randn(2, 8, 4, 4).bfloat16(), pre_bias=torch.randn(2, 8))
    assert widened == [False]
    assert y.dtype == torch.bfloat16


def test_its_loss_is_the_same_function_of_the_same_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config()
    step = TrainStep(settings, CPU)
    (batch,) = gpu_step.synthetic_batches(settings, CPU)
    objective = plain_network.TorchObjective(step.network, settings, CPU)
    levels = sample_noise_levels(8, 11, seed=3)
    student_input, teacher_input = noise_images(batch.images, levels, seed=3)
    outputs = [
        step.network(each, sigma.log() / 4, batch.labels)
        for each, sigma in ((student_input, levels.sigma_next), (teacher_input, levels.sigma))
    ]
    ours = consistency_loss(*outputs, student_input, teacher_input, levels)

    # Its own draws replaced by those: the middle of the step of the CDF, and the noise that was added.
    cdf = torch.cat([torch.zeros(1), objective.cdf, torch.ones(1)])
    uniform = (cdf[levels.index] + cdf[levels.index + 1]) / 2
    sigma = levels.sigma[:, None, None, None]
    x = batch.images.permute(0, 3, 1, 2).float() / 127.5 - 1
    noise = (teacher_input * (sigma.square() + 0.25).sqrt() - x) / sigma
    monkeypatch.setattr(plain_network.torch, "rand", lambda *size, device: uniform)
    monkeypatch.setattr(plain_network.torch, "randn_like", lambda x: noise)
    # At sigma = 0.002 the noise comes back with the rounding of x + 0.002 z.
    theirs = objective(batch.images, batch.labels, objective.levels(8))
    torch.testing.assert_close(theirs, ours, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("nchw", [False, True])
def test_a_plain_step_trains_step_after_step(nchw: bool) -> None:
    settings = config()
    step = TrainStep(settings, CPU)
    plain_network.make_plain(step, nchw=nchw)
    batches = gpu_step.synthetic_batches(settings, CPU)
    seen = [[p.detach().clone() for p in step.network.parameters()]]
    for k in range(2):
        step(k, batches)
        seen.append([p.detach().clone() for p in step.network.parameters()])
    for before, after in itertools.pairwise(seen):
        assert all(torch.isfinite(p).all() for p in after)
        assert any(not torch.equal(p, q) for p, q in zip(before, after, strict=True))
    assert int(step.losses.count) == int(step.updates()) == 2
    counts = step.losses.by_sigma[len(step.losses.by_sigma) // 2 :]
    assert int(counts.sum()) == 16, "every image's loss is counted"


def test_its_optimizer_takes_the_same_steps() -> None:
    settings = config()
    networks = [TrainStep(settings, CPU).network for _ in range(2)]
    theirs = plain_network.TorchOptimizer(networks[0], settings, CPU)
    ours = RAdamEMA(
        networks[1].parameters(), lr=settings.optimizer.lr, ema_decay=settings.optimizer.ema_decay
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(8):
        for p, q in zip(*(network.parameters() for network in networks), strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        theirs.step()
        ours.step()
    for p, q in zip(*(network.parameters() for network in networks), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    for a, b in zip(theirs._averages, ours.ema_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
