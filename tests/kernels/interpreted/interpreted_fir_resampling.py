"""The kernels of the filter [1, 3, 3, 1] against scipy's upfirdn in float64, their gradients too."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from scipy.signal import upfirdn
from torch import Tensor

from ict_kernels import fir_downsample, fir_upsample, set_backend
from ict_kernels import fir_resampling as resampling

# (N, C, H, W): C of 1 to 130, sizes from 2, one tile and several of columns, rows and channels, some in part.
SHAPES = [
    (2, 8, 8, 8),
    (1, 3, 6, 10),
    (3, 5, 2, 2),
    (2, 72, 4, 6),
    (1, 1, 36, 34),
    (1, 130, 2, 34),
    (1, 4, 36, 2),
]
TAPS = np.array([1.0, 3.0, 3.0, 1.0]) / 8


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan))
    yield
    set_backend("auto")


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return values.contiguous(memory_format=torch.channels_last)


def halved(x: Tensor) -> Tensor:
    plane = x.detach().double().numpy()
    for axis in (-2, -1):
        plane = np.take(upfirdn(TAPS, plane, 1, 1, axis), np.arange(plane.shape[axis] // 2) * 2 + 2, axis)
    return torch.from_numpy(plane)


def doubled(x: Tensor) -> Tensor:
    plane = x.detach().double().numpy()
    for axis in (-2, -1):
        size = plane.shape[axis]
        full = upfirdn(2 * TAPS, plane, 2, 1, axis)
        pad = [(0, 0)] * plane.ndim
        pad[axis] = (0, 1)
        plane = np.take(np.pad(full, pad), np.arange(2 * size) + 1, axis)
    return torch.from_numpy(plane)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_they_are_upfirdn_and_their_gradients_its_transpose(shape, dtype) -> None:
    bound = {torch.float32: 1e-6, torch.float16: 2e-3}[dtype]
    x = random(*shape, dtype=dtype).requires_grad_()
    for op, exact, transpose in (
        (fir_downsample, halved, lambda g: doubled(g) / 4),
        (fir_upsample, doubled, lambda g: 4 * halved(g)),
    ):
        y = op(x)
        assert y.dtype == dtype
        assert y.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(y.double(), exact(x), rtol=bound, atol=bound)
        grad = random(*y.shape, dtype=dtype, seed=1)
        (found,) = torch.autograd.grad(y, x, grad)
        assert found.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(found.double(), transpose(grad), rtol=bound, atol=bound)


@pytest.mark.parametrize("op", [fir_downsample, fir_upsample])
@pytest.mark.parametrize(
    "layout",
    [
        lambda t: t.contiguous(),
        lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
        lambda t: t[:1].expand(t.shape),
        lambda t: t.transpose(2, 3),
    ],
    ids=["contiguous", "sliced", "expanded", "transposed"],
)
def test_inputs_and_gradients_of_any_layout(op, layout: Callable[[Tensor], Tensor]) -> None:
    x = layout(random(2, 6, 8, 8)).detach().requires_grad_()
    same = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    y, expected = op(x), op(same)
    assert torch.equal(y, expected)
    grad = layout(random(*y.shape, seed=1))
    (found,), (of_same,) = (torch.autograd.grad(a, b, grad) for a, b in ((y, x), (expected, same)))
    assert torch.equal(found, of_same)


def test_the_gradient_of_the_gradient_is_the_operation_itself() -> None:
    x = random(1, 4, 4, 4).requires_grad_()
    for op in (fir_downsample, fir_upsample):
        grad = random(*op(x).shape, seed=1).requires_grad_()
        (first,) = torch.autograd.grad(op(x), x, grad, create_graph=True)
        weights = random(*first.shape, seed=2)
        (second,) = torch.autograd.grad(first, grad, weights)
        torch.testing.assert_close(second, op(weights), rtol=1e-6, atol=1e-6)


def test_what_the_kernels_do_not_take_goes_to_the_definition(monkeypatch) -> None:
    def refuse(*_: object) -> Tensor:
        raise AssertionError("launched")

    monkeypatch.setattr(resampling, "_down_op", refuse)
    monkeypatch.setattr(resampling, "_up_op", refuse)
    assert fir_downsample(random(1, 2, 5, 4)).shape == (1, 2, 2, 2)
    assert fir_downsample(random(1, 2, 6, 4), padding=0).shape == (1, 2, 2, 1)
    assert fir_downsample(random(0, 2, 6, 4)).shape == (0, 2, 3, 2)
    for op in (fir_downsample, fir_upsample):
        op(random(1, 2, 4, 4).double())
        with pytest.raises(AssertionError, match="launched"):
            op(random(1, 2, 4, 4))


def test_they_are_registered_as_torch_wants_them() -> None:
    x = random(2, 4, 4, 6).requires_grad_()
    for op in (resampling._down_op, resampling._up_op):
        torch.library.opcheck(op, (x, 0.5))
