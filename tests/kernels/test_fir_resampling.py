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


@pytest.mark.parametrize("op", [fir_downsample, fir_upsample])
def test_anything_else_than_images_is_refused(op) -> None:
    for x in (torch.ones(2, 3, 4), torch.ones(2, 3, 4, 4, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"x must be floating point \(N, C, H, W\), got torch"):
            op(x)
