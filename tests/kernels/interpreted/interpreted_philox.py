"""Philox inside a kernel against the eager definition: words, lanes and masks bit for bit."""

import pytest
import torch

from ict_kernels import philox
from ict_kernels.triton_support import jit, tl


@jit
def normal_kernel(words_ptr, normal_ptr, CALLS: tl.constexpr):
    call = tl.program_id(0) * CALLS + tl.arange(0, CALLS)
    w0 = tl.load(words_ptr + call * 4).to(tl.uint32)
    w1 = tl.load(words_ptr + call * 4 + 1).to(tl.uint32)
    w2 = tl.load(words_ptr + call * 4 + 2).to(tl.uint32)
    w3 = tl.load(words_ptr + call * 4 + 3).to(tl.uint32)
    normal = tl.reshape(philox.normal4(w0, w1, w2, w3), (CALLS * 4,))
    tl.store(normal_ptr + tl.program_id(0) * CALLS * 4 + tl.arange(0, CALLS * 4), normal)


@jit
def draw_kernel(seed_ptr, words_ptr, lanes_ptr, normal_ptr, philox_stream, offset, CALLS: tl.constexpr):
    sample = tl.program_id(0).to(tl.int64)
    call = tl.arange(0, CALLS)
    w0, w1, w2, w3 = philox.philox_call(seed_ptr, sample + offset, call, philox_stream)
    words = tl.reshape(philox.interleave4(w0, w1, w2, w3), (CALLS * 4,))
    lanes = tl.reshape(philox.lanes16(w0, w1, w2, w3), (CALLS * 8,))
    normal = tl.reshape(philox.normal4(w0, w1, w2, w3), (CALLS * 4,))
    tl.store(words_ptr + sample * CALLS * 4 + tl.arange(0, CALLS * 4), words.to(tl.int64))
    tl.store(lanes_ptr + sample * CALLS * 8 + tl.arange(0, CALLS * 8), lanes)
    tl.store(normal_ptr + sample * CALLS * 4 + tl.arange(0, CALLS * 4), normal)


SAMPLES, CALLS, STREAM = 3, 64, philox.DROPOUT << 16 | 5


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 0x0123456789ABCDEF])
@pytest.mark.parametrize(("step", "offset"), [(0, 0), (7, 11), (2**32 - 1, 2**32 - 2), (9 << 32 | 7, 1)])
def test_the_kernel_draws_the_numbers_of_the_definition(seed: int, step: int, offset: int) -> None:
    seed_and_step = torch.tensor([seed, step])
    words = torch.full((SAMPLES, CALLS * 4), -1)
    lanes = torch.full((SAMPLES, CALLS * 8), -1, dtype=torch.int32)
    normal = torch.full((SAMPLES, CALLS * 4), torch.nan)
    draw_kernel[(SAMPLES,)](seed_and_step, words, lanes, normal, STREAM, offset, CALLS=CALLS)

    packed = philox._draw(SAMPLES, CALLS, seed_and_step, offset, torch.device("cpu"), STREAM)
    expected = packed.view(torch.int32).flatten(1).to(torch.int64) & 0xFFFFFFFF
    assert torch.equal(words, expected)
    assert torch.equal(lanes.to(torch.int64), packed.view(torch.int16).flatten(1).to(torch.int64) & 0xFFFF)
    shape = (SAMPLES, 4, CALLS)
    drawn = philox.normal(shape, seed_and_step, offset, philox.DROPOUT, layer=5).movedim(1, -1).flatten(1)
    torch.testing.assert_close(normal, drawn, rtol=0, atol=1e-6)


def normal_of(words: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise of given words (calls, 4) by the kernel and by the definition."""
    by_kernel = torch.full(words.shape, torch.nan)
    normal_kernel[(1,)](words, by_kernel, CALLS=words.shape[0])
    packed = torch.stack((words[:, 0] | words[:, 1] << 32, words[:, 2] | words[:, 3] << 32), dim=-1)
    monkeypatch.setattr(philox, "_draw", lambda *args: packed[None])
    defined = philox.normal((1, 4, words.shape[0]), 0).movedim(1, -1)
    return by_kernel, defined.reshape(words.shape)


def exact_normal(words: torch.Tensor) -> torch.Tensor:
    """The same in float64, without any rounding of the words."""
    fraction, turn = words.double().unflatten(-1, (2, 2)).mul(2.0**-32).unbind(-1)
    radius = (-2 * (fraction + 2.0**-33).log()).sqrt()
    angle = 2 * torch.pi * turn
    return torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1).flatten(-2)


def test_extreme_words_give_the_noise_of_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    borders = [k * 2**29 + d for k in range(9) for d in (-129, -128, -64, -2, -1, 0, 1, 2, 64, 128, 129)]
    words = torch.tensor([w for w in borders if 0 <= w < 2**32])
    pairs = torch.cartesian_prod(words, words).view(-1, 4)
    calls = torch.zeros(1 << (pairs.shape[0] - 1).bit_length(), 4, dtype=torch.int64)
    calls[: pairs.shape[0]] = pairs
    by_kernel, defined = normal_of(calls, monkeypatch)
    torch.testing.assert_close(by_kernel, defined, rtol=0, atol=1e-6)
    assert float(by_kernel.abs().max()) > 6.6


def test_a_million_words_give_the_noise_of_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    words = torch.randint(0, 2**32, (2**18, 4), generator=torch.Generator().manual_seed(3))
    words[: 2**17, ::2] >>= 16  # radii from 4.7 up, which a million draws seldom see
    by_kernel, defined = normal_of(words, monkeypatch)
    torch.testing.assert_close(by_kernel, defined, rtol=0, atol=1e-6)


def test_radii_near_0_keep_their_relative_accuracy(monkeypatch: pytest.MonkeyPatch) -> None:
    """u near 1, where a logarithm of fixed absolute error would be wrong by 4e-4 in the noise."""
    words = torch.randint(0, 2**32, (1024, 4), generator=torch.Generator().manual_seed(4))
    words[:, ::2] = 2**32 - 2 ** torch.arange(8, 24).repeat(64)[:, None]
    by_kernel, _ = normal_of(words, monkeypatch)
    exact = exact_normal(words)
    # fp32 holds u = 1 - 2^-24 k only: that rounding is the definition's own, 2^-33 / 2^-24 of the logarithm.
    radius = exact.view(-1, 2, 2).norm(dim=-1)
    error = (by_kernel.double() - exact).view(-1, 2, 2).norm(dim=-1)
    assert float((error / radius).max()) < 2e-3
    assert float(error.max()) < 1e-6
