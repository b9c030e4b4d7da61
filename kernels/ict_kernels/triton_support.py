"""Triton where it is installed, and stand-ins that let the kernels' files be imported where it is not.

Kernels are `@jit` functions in the file of their op, beside the eager definition that says what they compute;
those of group norm are in files of their own.
"""

import os
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton import jit

    MISSING: str | None = None
except ImportError as error:  # Triton is for Linux
    triton: Any = None  # type: ignore[no-redef]
    tl: Any = SimpleNamespace(constexpr=int, int64=int)  # type: ignore[no-redef]
    MISSING = str(error)

    def jit(function: Any = None, **options: Any) -> Any:
        return jit if function is None else function


Function = TypeVar("Function", bound=Callable[..., Any])

# Triton reads the variable when it is imported; so it says for the life of the process what kernels do.
INTERPRETED = MISSING is None and os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y")


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel, as `launch` was asked for it.

    Attributes:
        kernel: the `@jit` function.
        grid: programs along each axis.
        arguments: by the kernel's names, compile-time constants included.
        num_warps: of each program.
        maxnreg: the most registers that a thread may have, or None: as the compiler sees fit.
        elements: how many elements of the bulk tensors a program's straight-line code handles (one iteration
            of a loop); 0 where that means nothing.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    num_warps: int = 4
    maxnreg: int | None = None
    elements: int = 0


_recorded: list[Launch] | None = None

# What Triton compiled for launches that are known to be alike; see `launch`.
_known: dict[tuple[int, Hashable], Any] = {}
_MOST_KNOWN = 4096


@contextmanager
def record_launches() -> Iterator[list[Launch]]:
    """Collects launches instead of making them: what an op would launch for tensors on the meta device."""
    global _recorded
    launches: list[Launch] = []
    _recorded = launches
    try:
        yield launches
    finally:
        _recorded = None


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *,
    num_warps: int = 4,
    maxnreg: int | None = None,
    elements: int = 0,
    like: Hashable = None,
    **arguments: Any,
) -> None:
    """Runs a kernel on the device of its tensors; see `Launch`. An empty grid runs nothing.

    No parameter of a kernel may have the name of one of Triton's own, such as `stream`, `device`, `grid` or
    `num_warps`: only a launch on a GPU says so.

    Args:
        like: of launches of one kernel with an equal one, all but the first go straight to what Triton
            compiled for it, which spares the CPU half of what a launch costs. It must tell apart whatever
            Triton compiles for: the device, options and constants, which tensors are None, types, and by 16
            bytes aligned addresses, and the integers that are not in the kernel's `do_not_specialize`. What
            is set in Triton's knobs after the first has no effect on them, but for hooks of launches.
    """
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, arguments, num_warps, maxnreg, elements))
        return
    if 0 in grid:
        return
    with _on_device_of(arguments.values()):
        known = None if like is None else _known.get((id(kernel), like))
        if known is not None:
            known[(*grid, 1, 1)[:3]](*[arguments[name] for name in kernel.arg_names])
            return
        # Triton for AMD knows no such limit, and refuses the word.
        options = {} if maxnreg is None or torch.version.hip is not None else {"maxnreg": maxnreg}
        # Multiply-add in one instruction, which Triton after 3.9 does not do by itself.
        compiled = kernel[grid](**arguments, num_warps=num_warps, enable_fp_fusion=True, **options)
        if like is not None and compiled is not None:  # None from the interpreter
            if len(_known) >= _MOST_KNOWN:
                _known.clear()
            _known[id(kernel), like] = compiled


def what_is_compiled_for(tensors: Iterable[Tensor | None], numbers: Iterable[int]) -> Hashable:
    """The part of `launch`'s `like` that tensors and unspecialized integers have: types, alignment, presence.

    None while launches are recorded: then tensors may have no address.
    """
    if _recorded is not None:
        return None
    kinds = tuple([None if t is None else (t.dtype, t.data_ptr() % 16 == 0) for t in tensors])
    return kinds, tuple([-(2**31) <= each < 2**31 for each in numbers])


def _on_device_of(arguments: Iterable[Any]) -> AbstractContextManager[Any]:
    """Makes the device of the first tensor the current one, if it is another GPU."""
    device = next(value.device for value in arguments if isinstance(value, Tensor))
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    return torch.cuda.device(device) if elsewhere else nullcontext()


def runs_on(device: torch.device) -> bool:
    """Whether Triton kernels can run on tensors of this device in this process."""
    if MISSING is not None:
        return False
    return INTERPRETED if device.type == "cpu" else device.type == "cuda"


def constant_in_graphs(function: Function) -> Function:
    """Marks a function whose result is a constant of what torch.compile traces: it runs while tracing.

    As torch.compiler.assume_constant_result, which would import all of Dynamo, a second and more, to say so;
    tests/kernels/test_compile.py fails if torch no longer marks a function by that name.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_in_graphs
def is_transformed() -> bool:
    """Whether a transform of torch.func is at work: grad, vmap, jvp, and what is made of them."""
    return torch._C._are_functorch_transforms_active()


def refuse_forward_ad(op: str, *tensors: Tensor | None) -> None:
    """Raises where a dual level goes through a Triton op, which would return a zero tangent in silence.

    Raises:
        NotImplementedError: if one of the tensors carries a tangent, or may: while compiling, none tells.
    """
    # Read here, so that torch.compile guards it: a graph that was traced outside is not taken within a level.
    if torch.autograd.forward_ad._current_level < 0:
        return
    unpack = torch.autograd.forward_ad.unpack_dual
    if torch.compiler.is_compiling() or any(t is not None and unpack(t).tangent is not None for t in tensors):
        raise NotImplementedError(
            f"{op} has no forward-mode derivative in its Triton kernels; use torch.func.jvp, which takes the"
            " PyTorch definition, or ict_kernels.set_backend('eager')"
        )
