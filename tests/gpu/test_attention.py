"""Attention as the networks call it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ict_fast.networks.layers import attend


def _gradients(
    query: Tensor, key: Tensor, value: Tensor, grad: Tensor, attention: Callable[..., Tensor] = attend
) -> list[Tensor]:
    leaves = [each.detach().clone().requires_grad_() for each in (query, key, value)]
    return list(torch.autograd.grad(attention(*leaves), leaves, grad))


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "head_channels"), [(64, 64), (64, 256), (256, 64), (256, 256)])
def test_gradients_are_float64s_where_all_scores_of_a_row_are_low(
    tokens: int, head_channels: int, dtype: torch.dtype, is_compiled: bool
) -> None:
    """cuDNN's are reported to be NaN there, where its tiles of 128 are not filled (pytorch issue 196678)."""
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (2, 3, tokens, head_channels)
    query, key, value, grad = (
        torch.randn(shape, device="cuda", generator=generator).mul(0.1).to(dtype) for _ in range(4)
    )
    query[..., 0] = 1.0
    key[..., 0] = -120.0 * head_channels**0.5  # every score is some -120 after the division by the root
    attention = attend
    if is_compiled:
        torch._dynamo.reset()
        attention = torch.compile(attend, backend="aot_eager", fullgraph=True, dynamic=False)
    found = _gradients(query, key, value, grad, attention)
    expected = _gradients(*(each.double() for each in (query, key, value, grad)))
    # Of the first channel of the query's, large terms cancel.
    pairs = [(found[0][..., 1:], expected[0][..., 1:]), *zip(found[1:], expected[1:], strict=True)]
    assert all(bool(each.isfinite().all()) for each in found)
    for ours, theirs in pairs:
        error = torch.linalg.vector_norm(ours.double() - theirs) / torch.linalg.vector_norm(theirs)
        assert error < 4 * torch.finfo(dtype).eps
