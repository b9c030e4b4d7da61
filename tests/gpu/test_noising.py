"""The noising kernel on a GPU: the definition's inputs, and its noise to 1e-6 whatever the words are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ict_kernels import NoiseLevels, noise_images, noise_level_grid, philox
from ict_kernels.triton_support import jit, tl

SHAPES = [(512, 32, 32, 3), (128, 64, 64, 3), (64, 8, 8, 1), (6, 5, 7, 3), (3, 19, 31, 4), (1, 1, 1, 1)]


@jit
def normal_kernel(words_ptr, normal_ptr, CALLS: tl.constexpr):
    call = tl.program_id(0) * CALLS + tl.arange(0, CALLS)
    w0 = tl.load(words_ptr + call * 4).to(tl.uint32)
    w1 = tl.load(words_ptr + call * 4 + 1).to(tl.uint32)
    w2 = tl.load(words_ptr + call * 4 + 2).to(tl.uint32)
    w3 = tl.load(words_ptr + call * 4 + 3).to(tl.uint32)
    normal = tl.reshape(philox.normal4(w0, w1, w2, w3), (CALLS * 4,))
    tl.store(normal_ptr + tl.program_id(0) * CALLS * 4 + tl.arange(0, CALLS * 4), normal)


def levels_of(count: int, num_scales: int = 11) -> NoiseLevels:
    grid = noise_level_grid(num_scales)
    index = torch.arange(count) % (num_scales - 1)
    levels = NoiseLevels(index, grid[index].float(), grid[index + 1].float(), torch.ones(count))
    return NoiseLevels(*(t.cuda() for t in levels))


def on_cpu(levels: NoiseLevels) -> NoiseLevels:
    return NoiseLevels(*(t.cpu() for t in levels))


def bytes_of(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1)).cuda()


def some_flips(count: int) -> Tensor:
    return (torch.arange(count) % 3 != 1).to(torch.uint8).cuda()


def assert_close_noise(ours: Tensor, definition: Tensor) -> None:
    """1e-6, and above 4, where three last bits are more, 1.5e-6."""
    bound = torch.where(definition.abs() < 4, 1e-6, 1.5e-6)
    assert ((ours.cpu() - definition).abs() <= bound).all()


def test_extreme_and_random_words_give_the_noise_of_the_cpu(monkeypatch) -> None:
    borders = [k * 2**29 + d for k in range(9) for d in (-129, -128, -64, -2, -1, 0, 1, 2, 64, 128, 129)]
    extreme = torch.tensor([w for w in borders if 0 <= w < 2**32])
    near_1 = 2**32 - 2 ** torch.arange(0, 28)
    generator = torch.Generator().manual_seed(3)
    words = torch.randint(0, 2**32, (2**20, 4), generator=generator)
    words[: 2**18, ::2] >>= 16  # radii from 4.7 up
    words[2**18 : 2**19, ::2] = near_1[torch.randint(0, 28, (2**18, 1), generator=generator)]
    pairs = torch.cartesian_prod(extreme, extreme).view(-1, 4)
    words[-pairs.shape[0] :] = pairs
    normal = torch.full(words.shape, torch.nan, device="cuda")
    normal_kernel[(2**20 // 256,)](words.cuda(), normal, CALLS=256)
    packed = torch.stack((words[:, 0] | words[:, 1] << 32, words[:, 2] | words[:, 3] << 32), dim=-1)
    monkeypatch.setattr(philox, "_draw", lambda *args: packed[None])
    definition = philox.normal((1, 4, words.shape[0]), 0).movedim(1, -1)
    assert_close_noise(normal, definition.reshape(words.shape))


def test_the_noise_is_the_cpus_and_a_flip_leaves_it() -> None:
    count = 256
    zero, one = torch.zeros(count, 3, 64, 64, device="cuda"), torch.ones(count, device="cuda")
    levels = NoiseLevels(torch.zeros(count).cuda(), one, one * 0.5, one)
    seed = torch.tensor([77, 88])
    plain = noise_images(zero, levels, seed=seed.cuda(), offset=3, sigma_data=1e-20)
    definition = philox.normal(zero.shape, seed, 3, philox.NOISE)
    for drawn in plain:
        assert_close_noise(drawn, definition)
    flipped = noise_images(zero, levels, seed=seed.cuda(), offset=3, sigma_data=1e-20, flip=one.bool())
    assert torch.equal(flipped[0], plain[0])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["bytes", "float32", "bfloat16", "channels last", "sliced"])
def test_both_inputs_are_the_cpus(shape, kind) -> None:
    images = bytes_of(*shape)
    if kind != "bytes":
        images = images.permute(0, 3, 1, 2).float() / 127.5 - 1
        images = {
            "float32": lambda x: x.contiguous(),
            "bfloat16": lambda x: x.contiguous().bfloat16(),
            "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
            "sliced": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
        }[kind](images)
    levels, seed = levels_of(shape[0]), torch.tensor([-5, 9])
    for flip in (None, some_flips(shape[0])):
        ours = noise_images(images, levels, seed=seed.cuda(), offset=10, flip=flip)
        theirs = noise_images(
            images.cpu(), on_cpu(levels), seed=seed, offset=10, flip=None if flip is None else flip.cpu()
        )
        for a, b in zip(ours, theirs, strict=True):
            assert a.is_contiguous(memory_format=torch.channels_last)
            torch.testing.assert_close(a.cpu(), b, rtol=1e-6, atol=1e-6)


def test_inputs_do_not_depend_on_the_micro_batch_and_the_bits_repeat() -> None:
    images, levels, seed = bytes_of(64, 32, 32, 3), levels_of(64), torch.tensor([3, 4]).cuda()
    flip, start = some_flips(64), 2**32 - 10
    whole = noise_images(images, levels, seed=seed, offset=start, flip=flip)
    for part, offset in ((slice(0, 64), start), (slice(0, 20), start), (slice(20, 64), start + 20)):
        few = NoiseLevels(*(t[part] for t in levels))
        for where in (offset, torch.tensor(offset).cuda()):
            got = noise_images(images[part], few, seed=seed, offset=where, flip=flip[part])
            assert all(torch.equal(a, b[part]) for a, b in zip(got, whole, strict=True))


def test_a_captured_graph_follows_step_and_images() -> None:
    images, levels, seed = bytes_of(64, 32, 32, 3), levels_of(64), torch.tensor([3, 0]).cuda()
    flip = some_flips(64)
    noise_images(images, levels, seed=seed, flip=flip)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = noise_images(images, levels, seed=seed, flip=flip)
    images.copy_(images.flip(0))
    flip.copy_(flip.flip(0))
    seed[1].fill_(5)
    graph.replay()
    expected = noise_images(images, levels, seed=seed, flip=flip)
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


def test_nothing_waits_for_the_device_and_inductor_compiles_it_whole() -> None:
    def noise(images: Tensor, levels: NoiseLevels, seed: Tensor, offset: Tensor, flip: Tensor) -> Tensor:
        student, teacher = noise_images(images, levels, seed=seed, offset=offset, flip=flip)
        return student * 2 - teacher

    images, levels = bytes_of(64, 32, 32, 3), levels_of(64)
    arguments = (images, levels, torch.tensor([3, 0]).cuda(), torch.tensor(5).cuda(), some_flips(64))
    expected = noise(*arguments)
    compiled = torch.compile(noise, fullgraph=True)
    torch.testing.assert_close(compiled(*arguments), expected, rtol=1e-6, atol=1e-6)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = noise(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(again, expected)


def test_more_than_2_31_elements() -> None:
    count = 180_000
    if torch.cuda.mem_get_info()[0] < 30 * 2**30:
        pytest.skip("needs 30 GiB of free GPU memory")
    images = torch.zeros(count, 64, 64, 3, dtype=torch.uint8, device="cuda")
    assert images.numel() > 2**31
    images[-8:] = bytes_of(8, 64, 64, 3)
    levels, seed = levels_of(count), torch.tensor([1, 2]).cuda()
    whole = noise_images(images, levels, seed=seed)
    last = NoiseLevels(*(t[-8:] for t in levels))
    few = noise_images(images[-8:], last, seed=seed, offset=count - 8)
    assert all(torch.equal(a[-8:], b) for a, b in zip(whole, few, strict=True))
