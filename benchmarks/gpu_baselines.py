"""What the kernels are compared with: functions compiled by Inductor, and the package's own definitions.

Inductor runs as it comes, but for the reductions that give wrong gradients in torch 2.13 (see
ict_fast/training/compilation.py): there it runs without them, and its name says so. In whole steps it has two
more settings of that file, whatever the variant: channels_last throughout, and backward passes outside
autocast. Where its results can be compared with eager torch's, they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch._inductor.config
from torch import Tensor

from ict_kernels import set_backend

# By default Inductor computes SiLU and dropout anew for every reader of a norm's output; with these it stores
# what it has, and moves a third of the bytes.
RAISED_THRESHOLDS: dict[str, Any] = {
    "realize_reads_threshold": 64,
    "realize_opcount_threshold": 500,
    "realize_acc_reads_threshold": 64,
}
# pytorch issue 193061
REDUCTIONS_ARE_WRONG = torch.__version__.startswith("2.13.")
WITHOUT_REDUCTIONS = ", mix_order_reduction off"
_SUFFIX = WITHOUT_REDUCTIONS if REDUCTIONS_ARE_WRONG else ""
INDUCTOR, TUNED = f"inductor{_SUFFIX}", f"inductor, raised thresholds{_SUFFIX}"
# Compiling for a CPU takes a minute for each shape, and says nothing about a GPU.
COMPILED_ON = ("cuda",)


def compiled_variants(function: Callable[..., Any], device: torch.device) -> dict[str, Callable[..., Any]]:
    """The function by Inductor, with its defaults and with raised thresholds; empty off COMPILED_ON."""
    if device.type not in COMPILED_ON:
        return {}
    torch.compiler.reset()  # else all cases count against one limit of recompilations
    set_reductions()
    return {
        INDUCTOR: torch.compile(function, fullgraph=True, dynamic=False),
        TUNED: torch.compile(function, fullgraph=True, dynamic=False, options=RAISED_THRESHOLDS),
    }


def set_reductions() -> None:
    """As they come, unless they are wrong; the trainer's `compile_blocks` always turns them off."""
    if hasattr(torch._inductor.config.triton, "mix_order_reduction"):
        torch._inductor.config.triton.mix_order_reduction = not REDUCTIONS_ARE_WRONG


@contextmanager
def definitions() -> Iterator[None]:
    """Inside, ict_kernels runs its eager definitions."""
    set_backend("eager")
    try:
        yield
    finally:
        set_backend("auto")


def by_definition(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with the eager definitions behind it."""

    def run(*arguments: Any) -> Any:
        with definitions():
            return function(*arguments)

    return run


def error_record(ours: Tensor, exact: Tensor, torchs: Tensor) -> dict[str, float | None]:
    """Largest absolute errors against float64, and the largest absolute value there; `ratio` is ours over
    torch's, None where torch's is 0.
    """
    error = float((ours.double() - exact).abs().max())
    torchs_error = float((torchs.double() - exact).abs().max())
    return {
        "max_error": error,
        "torch_max_error": torchs_error,
        "ratio": error / torchs_error if torchs_error else None,
        "largest": float(exact.abs().max()),
    }
