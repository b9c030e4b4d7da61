"""The definitions of NCSN++'s resampling. That they are upfirdn is shown in tests/networks/test_layers.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ict_kernels import fir_downsample, fir_upsample


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_each_is_the_others_transpose_times_4() -> None:
    x, y = _random(2, 3, 8, 6), _random(2, 3, 4, 3, seed=1)
    torch.testing.assert_close(4 * (fir_downsample(x) * y).sum(), (x * fir_upsample(y)).sum())


def test_without_padding_it_halves_what_lies_inside_a_border() -> None:
    x = _random(2, 3, 8, 6)
    inside = torch.nn.functional.pad(x, (1, 1, 1, 1))
    torch.testing.assert_close(fir_downsample(inside, padding=0), fir_downsample(x))


def test_their_derivatives_of_all_kinds_are_right() -> None:
    x = _random(1, 2, 4, 6).requires_grad_()
    for op in (fir_downsample, fir_upsample):
        assert torch.autograd.gradcheck(op, x, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(op, x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("op", [fir_downsample, fir_upsample])
def test_sums_are_fp32_and_rounded_once_whatever_autocast_says(op, autocast: bool, dtype) -> None:
    x = _random(2, 8, 6, 4).to(dtype).requires_grad_()
    exact_x = x.detach().double().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = op(x)
    exact = op(exact_x)
    grad = _random(*y.shape, seed=1).to(dtype)
    (dx,), (exact_dx,) = torch.autograd.grad(y, x, grad), torch.autograd.grad(exact, exact_x, grad.double())
    assert y.dtype == dx.dtype == dtype
    # fp32's sums end in a tie of 16 bits now and then, and float64's beside it.
    bound = 3e-7 if dtype == torch.float32 else torch.finfo(dtype).eps / 2 * 1.001
    for found, expected in ((y, exact), (dx, exact_dx)):
        torch.testing.assert_close(found.double(), expected, rtol=bound, atol=1e-7)


@pytest.mark.parametrize("op", [fir_downsample, fir_upsample])
def test_anything_else_than_images_is_refused(op) -> None:
    for x in (
        torch.ones(2, 3, 4),
        torch.ones(2, 0, 4, 4),
        torch.ones(2, 3, 4, 4, dtype=torch.int64),
        torch.ones(2, 3, 4, 4).to(torch.float8_e5m2),
    ):
        with pytest.raises(
            ValueError, match=r"x must be \(N, C, H, W\) in fp16, bf16, fp32 or float64, got torch"
        ):
            op(x)


def test_an_image_smaller_than_the_filter_is_refused_by_its_size() -> None:
    for shape, padding in (((1, 2, 1, 8), 1), ((1, 2, 8, 3), 0)):
        with pytest.raises(ValueError, match=f"too small for a filter of 4 x 4, padded by {padding}"):
            fir_downsample(torch.ones(shape), padding=padding)
