"""The noise-level kernel on a GPU: the CPU's levels, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ict_kernels import NoiseLevels, sample_noise_levels
from ict_kernels.noise_levels import CURRICULUM_SCALES


def assert_same(ours: NoiseLevels, theirs: NoiseLevels) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a.cpu(), b.cpu()) or (a.isnan().all() and b.isnan().all())


@pytest.mark.parametrize("num_scales", [2, 3, *CURRICULUM_SCALES, 5000])
@pytest.mark.parametrize("seed", [torch.tensor([0, 0]), torch.tensor([-7, 2**32 - 1])], ids=str)
def test_a_million_levels_are_the_cpus(num_scales, seed) -> None:
    for options in ({}, {"indices": "uniform", "weighting": "uniform", "offset": 2**32 - 77}):
        ours = sample_noise_levels(1_000_000, num_scales, seed=seed, device="cuda", **options)
        assert_same(ours, sample_noise_levels(1_000_000, num_scales, seed=seed, **options))


@pytest.mark.parametrize("batch", [0, 1, 31, 32, 33, 512])
def test_a_tensor_num_scales_draws_what_the_cpu_draws(batch) -> None:
    seed, offset = torch.tensor([3, 4]), torch.tensor(2**33 + 5)
    for num_scales in (*CURRICULUM_SCALES, 12):  # 12 is none of them: NaN
        n = torch.tensor(num_scales)
        ours = sample_noise_levels(batch, n.cuda(), seed=seed.cuda(), offset=offset.cuda())
        assert_same(ours, sample_noise_levels(batch, n, seed=seed, offset=offset))


def test_a_captured_graph_follows_stage_and_step() -> None:
    num_scales, seed = torch.tensor(11).cuda(), torch.tensor([3, 0]).cuda()
    sample_noise_levels(100, num_scales, seed=seed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = sample_noise_levels(100, num_scales, seed=seed)
    for step, scales in enumerate(CURRICULUM_SCALES):
        num_scales.fill_(scales)
        seed[1].fill_(step)
        graph.replay()
        assert_same(captured, sample_noise_levels(100, scales, seed=torch.tensor([3, step])))


def test_nothing_waits_for_the_device_and_inductor_compiles_it_whole() -> None:
    def draw(num_scales: Tensor, seed: Tensor, offset: Tensor) -> NoiseLevels:
        return sample_noise_levels(512, num_scales, seed=seed, offset=offset)

    compiled = torch.compile(draw, fullgraph=True)
    arguments = [torch.tensor(161).cuda(), torch.tensor([1, 2]).cuda(), torch.tensor(7).cuda()]
    expected = draw(*(a.cpu() for a in arguments))
    assert_same(compiled(*arguments), expected)
    draw(*arguments)
    torch.cuda.set_sync_debug_mode("error")
    try:
        levels = draw(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same(levels, expected)


def test_cuda_without_a_number_is_the_current_gpu() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    for number in (0, 1):
        with torch.cuda.device(number):
            levels = sample_noise_levels(9, 11, seed=5, device="cuda")
            assert {t.device for t in levels} == {torch.device("cuda", number)}
            assert_same(levels, sample_noise_levels(9, 11, seed=5))
