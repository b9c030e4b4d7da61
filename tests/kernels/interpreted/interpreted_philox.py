"""Philox inside a kernel against the eager definition: words, lanes and masks bit for bit."""

import pytest
import torch

from ict_kernels import philox
from ict_kernels.triton_support import jit, tl


@jit
def draw_kernel(seed_ptr, words_ptr, lanes_ptr, normal_ptr, stream, offset, CALLS: tl.constexpr):
    sample = tl.program_id(0).to(tl.int64)
    call = tl.arange(0, CALLS)
    w0, w1, w2, w3 = philox.philox_call(seed_ptr, sample + offset, call, stream)
    words = tl.reshape(philox.interleave4(w0, w1, w2, w3), (CALLS * 4,))
    lanes = tl.reshape(philox.lanes16(w0, w1, w2, w3), (CALLS * 8,))
    normal = tl.reshape(philox.normal4(w0, w1, w2, w3), (CALLS * 4,))
    tl.store(words_ptr + sample * CALLS * 4 + tl.arange(0, CALLS * 4), words.to(tl.int64))
    tl.store(lanes_ptr + sample * CALLS * 8 + tl.arange(0, CALLS * 8), lanes)
    tl.store(normal_ptr + sample * CALLS * 4 + tl.arange(0, CALLS * 4), normal)


SAMPLES, CALLS, STREAM = 3, 64, philox.DROPOUT << 16 | 5


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 0x0123456789ABCDEF])
@pytest.mark.parametrize(("step", "offset"), [(0, 0), (7, 11), (2**32 - 1, 2**32 - 2)])
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
