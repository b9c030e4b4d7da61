"""torch's counter of matrix FLOPs, 2 per multiply-add, made to know a CPU's attention as it knows a GPU's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def _product(query: Sequence[int], key: Sequence[int]) -> int:
    """Queries times keys, (N, heads, pixels, head channels) each; weights times values are as many."""
    count, heads, queries, channels = query
    return 2 * count * heads * queries * key[2] * channels


def attention(query: Any, key: Any, *_: Any, **__: Any) -> int:
    return 2 * _product(query, key)


def attention_backward(gradient: Any, query: Any, key: Any, *_: Any, **__: Any) -> int:
    """The weights again, and two products for each of the two: as torch counts a GPU's."""
    return 5 * _product(query, key)


def flop_counter() -> FlopCounterMode:
    """A context; `get_total_flops()` after it."""
    operations = torch.ops.aten
    return FlopCounterMode(
        display=False,
        custom_mapping={
            operations._scaled_dot_product_flash_attention_for_cpu: attention,
            operations._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
        },
    )


def flops_of(run: Callable[[], object]) -> int:
    """Of one call."""
    with flop_counter() as counter:
        run()
    total: int = counter.get_total_flops()
    return total
