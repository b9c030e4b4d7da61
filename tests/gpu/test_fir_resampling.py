"""The filter [1, 3, 3, 1] on a GPU: the definition in float64, any layout, compiled."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ict_kernels import fir_downsample, fir_upsample
from ict_kernels.fir_resampling import _down, _up

OPS = [(fir_downsample, _down), (fir_upsample, _up)]
# NCSN++'s, then channels and sizes that fill no tile.
SHAPES = [(16, 256, 32, 32), (16, 256, 16, 16), (3, 130, 6, 34), (1, 1, 2, 2), (2, 5, 64, 18)]
EPS = {torch.float32: 3e-7, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    values = torch.randn(shape, device="cuda", generator=generator).to(dtype)
    return values.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("op", "definition"), OPS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", list(EPS))
def test_they_are_float64s_rounded_once_and_so_are_their_gradients(op, definition, shape, dtype) -> None:
    x = random(*shape, dtype=dtype).requires_grad_()
    exact_x = x.detach().double().requires_grad_()
    y, exact = op(x), definition(exact_x, 1.0)
    grad = random(*y.shape, dtype=dtype, seed=1)
    (dx,) = torch.autograd.grad(y, x, grad)
    (exact_dx,) = torch.autograd.grad(exact, exact_x, grad.double())
    for found, expected in ((y, exact), (dx, exact_dx)):
        assert found.is_contiguous(memory_format=torch.channels_last)
        assert ((found.double() - expected).abs() <= EPS[dtype] * expected.abs() + 1e-6).all()
    assert torch.equal(op(x), y)


@pytest.mark.parametrize(("op", "definition"), OPS)
def test_compiled_and_from_any_layout_they_are_the_same(op, definition) -> None:
    x = random(4, 64, 16, 16, dtype=torch.bfloat16)
    expected = op(x)
    compiled = torch.compile(op, fullgraph=True, dynamic=False)
    for other in (x, x.contiguous(), torch.cat([x, x], 1)[:, :64]):
        other = other.detach().requires_grad_()
        y = compiled(other)
        assert torch.equal(y, expected)
        grad = random(*y.shape, dtype=x.dtype, seed=1)
        (found,), (plain,) = (torch.autograd.grad(f(other), other, grad) for f in (compiled, op))
        assert torch.equal(found, plain)


@pytest.mark.parametrize(("op", "definition"), OPS)
def test_more_than_2_to_the_31_elements(op, definition) -> None:
    side = 64 if op is fir_downsample else 32
    count = 2**31 // (256 * 64 * 64) + 2
    free, _ = torch.cuda.mem_get_info()
    if free < 1.5 * count * 256 * 64 * 64 * 2:
        pytest.skip(f"{free / 2**30:.0f} GiB are free")
    x = torch.zeros(count, side, side, 256, dtype=torch.bfloat16, device="cuda").permute(0, 3, 1, 2)
    x[-1] = random(1, 256, side, side, dtype=torch.bfloat16)[0]
    y = op(x)
    assert torch.equal(y[-1:], op(x[-1:].clone(memory_format=torch.channels_last)))
    assert not y[:-1].any()
