"""The drop-in on a GPU: masks that are shared there, adapters, replaced blocks."""

from __future__ import annotations

import copy
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ict_kernels import GroupNormSiLU, SharedDropout, block_patterns, seed_dropout
from ict_kernels.adapters import kinyugo, openai_cm
from ict_kernels.adapters.ect import ECMLoss

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
theirs: Any = importlib.import_module("other_trainers")


def dropping() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 1), nn.Dropout(0.4)).cuda()


def unet(dropout: float = 0.0) -> Any:
    torch.manual_seed(0)
    network = theirs.Unet(64, 2, dropout, num_groups=32).cuda().to(memory_format=torch.channels_last)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network


def test_both_generators_are_rewound_where_one_is_not_enough() -> None:
    network, x = dropping(), torch.randn(8, 3, 16, 16, device="cuda")
    state = torch.get_rng_state()
    first = network(x)
    torch.set_rng_state(state)  # what public trainers do
    assert not torch.equal(network(x) == 0, first == 0)
    masks = SharedDropout(network, x.device)
    with masks, torch.no_grad():
        teacher = network(x)
    with masks:
        assert torch.equal(network(x), teacher)


def test_a_network_compiled_by_inductor_shares_its_masks() -> None:
    network, x = dropping(), torch.randn(8, 3, 16, 16, device="cuda")
    compiled = torch.compile(network, fullgraph=True)
    masks = SharedDropout(network, x.device)
    with masks, torch.no_grad():
        teacher = compiled(x)
    with masks:
        student = compiled(x)
    assert torch.equal(student == 0, teacher == 0)


def test_seeded_masks_are_the_same_on_both_devices_and_in_a_cuda_graph() -> None:
    network, x = dropping(), torch.randn(8, 3, 16, 16, device="cuda")
    on_cpu = copy.deepcopy(network).cpu()
    seeds = seed_dropout(network, seed=3), seed_dropout(on_cpu, seed=3)
    torch.testing.assert_close(network(x).cpu(), on_cpu(x.cpu()), rtol=1e-4, atol=1e-5)
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.no_grad():
        with torch.cuda.stream(side):  # what a capture may not do for the first time
            network(x)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            captured = network(x)
        for _ in range(3):
            graph.replay()
            assert torch.equal(captured == 0, (on_cpu(x.cpu()) == 0).cuda())
            for seed in seeds:
                seed.advance()


def _norms(network: nn.Module) -> list[nn.Module]:
    return [module for module in network.modules() if isinstance(module, nn.GroupNorm)]


@pytest.mark.parametrize("scale_shift", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replaced_blocks_agree_with_float64(scale_shift: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    block = theirs.ResBlock(64, 32, 0.0, use_scale_shift_norm=scale_shift, num_groups=32).cuda()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.2)
    x, emb = torch.randn(4, 64, 16, 16, device="cuda"), torch.randn(4, 32, device="cuda")
    in_float64 = copy.deepcopy(block).double()
    for norm in _norms(in_float64):
        norm.__class__ = nn.GroupNorm  # theirs computes in fp32
    exact = in_float64(x.double(), emb.double())
    block = block.to(dtype).to(memory_format=torch.channels_last)
    for norm in _norms(block):
        norm.float()  # as theirs are in half precision
    x, emb = x.to(dtype).contiguous(memory_format=torch.channels_last), emb.to(dtype)
    own = (block(x, emb).double() - exact).abs().max()
    assert len(GroupNormSiLU.replace_in(block).changed) == 1
    ours = (block(x, emb).double() - exact).abs().max()
    assert ours <= 1.5 * own + 1e-5


def test_adapters_train_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    network = unet(dropout=0.2)
    calls: list[torch.device] = []
    original = block_patterns.group_norm_silu

    def counted(x: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        calls.append(x.device)
        return original(x, *arguments, **options)

    monkeypatch.setattr(block_patterns, "group_norm_silu", counted)
    GroupNormSiLU.replace_in(network)
    images = torch.randn(8, 3, 32, 32, device="cuda")
    denoiser = theirs.KarrasDenoiser()
    output = theirs.ImprovedConsistencyTraining()(network, images, 0, 1)
    losses = (
        openai_cm.consistency_losses(denoiser, network, images, 41)["loss"],
        ECMLoss(c=0.03)(theirs.EDMPrecond(network), images),
        (kinyugo.pseudo_huber_loss(output.predicted, output.target) * output.loss_weights).flatten(),
    )
    for loss in losses:
        network.zero_grad()
        loss.mean().backward()
        assert loss.shape == (8,)
        assert all(p.grad is None or p.grad.isfinite().all() for p in network.parameters())
    assert calls
    assert all(device.type == "cuda" for device in calls)


def test_indices_are_those_of_the_cpu() -> None:
    sigmas = theirs.ascending_grid(81)
    on_cpu = kinyugo.lognormal_timestep_distribution(4096, sigmas, seed=5)
    on_gpu = kinyugo.lognormal_timestep_distribution(4096, sigmas.cuda(), seed=5)
    assert torch.equal(on_gpu.cpu(), on_cpu)
