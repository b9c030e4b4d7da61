"""torch.func's transforms take the definitions; bare forward-mode AD is refused, compiled code included."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from ict_kernels import (
    consistency_loss,
    fir_downsample,
    fir_upsample,
    group_norm_silu,
    noise_images,
    pseudo_huber_loss,
    sample_noise_levels,
)

Op = Callable[[Tensor], Tensor]

LEVELS = sample_noise_levels(2, 11, seed=1)
OTHER, *INPUTS = torch.randn(4, 2, 4, 4, 6, generator=torch.Generator().manual_seed(0)).unbind()

OPS: dict[str, Op] = {
    "group_norm_silu": lambda x: group_norm_silu(x, 2, None, None),
    "pseudo_huber_loss": lambda x: pseudo_huber_loss(x, OTHER.to(x.dtype)),
    "consistency_loss": lambda x: consistency_loss(
        x, *(each.to(x.dtype) for each in (OTHER, *INPUTS[:2])), LEVELS
    ),
    "noise_images": lambda x: noise_images(x, LEVELS, seed=1)[0],
    "fir_downsample": fir_downsample,
    "fir_upsample": fir_upsample,
}


def square(op: Op) -> Op:
    return lambda x: op(x).square().sum()


def slope(op: Op, x: Tensor, direction: Tensor, step: float) -> Tensor:
    """By differences, in float64."""
    x, direction = x.double(), step * direction.double()
    return (op(x + direction) - op(x - direction)) / (2 * step)


@pytest.mark.parametrize("name", OPS)
def test_jvp_and_its_mixture_with_grad_are_right(name: str) -> None:
    op, x, direction = OPS[name], INPUTS[2], OTHER
    step = 1.0 if name == "noise_images" else 1e-6  # which is linear, and gives fp32
    _, tangent = torch.func.jvp(op, (x,), (direction,))
    expected = slope(op, x, direction, step)
    torch.testing.assert_close(tangent, expected.float(), rtol=1e-3, atol=1e-4)
    _, product = torch.func.jvp(torch.func.grad(square(op)), (x,), (direction,))
    expected = slope(torch.func.grad(square(op)), x, direction, step)
    torch.testing.assert_close(product, expected.float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_of_each_sample_are_right(compiled: bool) -> None:
    torch._dynamo.reset()
    op, x = OPS["group_norm_silu"], INPUTS[2].contiguous(memory_format=torch.channels_last)
    by_sample = torch.func.vmap(torch.func.grad(lambda x: square(op)(x[None])))
    gradients = torch.compile(by_sample, backend="aot_eager", fullgraph=True)(x) if compiled else by_sample(x)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(square(op)(leaf), leaf)
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OPS)
def test_within_a_dual_level_the_kernels_refuse(name: str) -> None:
    with (
        forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match="no forward-mode derivative"),
    ):
        OPS[name](forward_ad.make_dual(INPUTS[2], OTHER))


@pytest.mark.parametrize("traced_before", [False, True])
def test_so_does_what_is_compiled(traced_before: bool) -> None:
    """Where a tangent of zero would be a piece of plausible code."""
    torch._dynamo.reset()
    x = INPUTS[2]
    compiled = torch.compile(lambda x: x + OPS["group_norm_silu"](x), backend="aot_eager")
    if traced_before:
        compiled(x)
    with (
        forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match="no forward-mode derivative"),
    ):
        compiled(forward_ad.make_dual(x, x))
