"""Which implementation the ops use, the process-wide choice of `set_backend`, and in which dtypes."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from . import apex_backend
from .triton_support import INTERPRETED, MISSING, is_transformed, runs_on

_BACKENDS = ("auto", "triton", "eager", "apex")
_chosen = "auto"


def set_backend(name: str) -> None:
    """Choose the implementation of every op of this package, for the whole process.

    float64 tensors, what torch.func transforms (grad, vmap, jvp), and whatever else the kernels do not take,
    go to the eager definitions in any case.

    Args:
        name: "auto", the Triton kernels on CUDA (and on a CPU under TRITON_INTERPRET=1), the PyTorch
            definitions elsewhere; "triton", the same, but a tensor of a device that the kernels cannot run on
            is an error; "eager", the PyTorch definitions; "apex", as "auto", but group norms go to NVIDIA
            apex where its kernels allow (see `apex_report`).
    Raises:
        RuntimeError: for "triton" where Triton cannot run at all, for "apex" where NVIDIA's is not installed
            with its group norm.
        ValueError: for any other name.
    """
    global _chosen
    if name not in _BACKENDS:
        raise ValueError(f"unknown backend {name!r}; choose one of {', '.join(_BACKENDS)}")
    if name == "apex" and (reason := apex_backend.why_unavailable()) is not None:
        raise RuntimeError(reason)
    if name == "triton":
        if MISSING is not None:
            raise RuntimeError(f"Triton cannot be imported ({MISSING}); use 'auto' or 'eager'")
        if not (INTERPRETED or torch.cuda.is_available()):
            raise RuntimeError(
                "torch sees no GPU, and TRITON_INTERPRET=1 is not set, so Triton kernels cannot run; use"
                " 'auto' or 'eager'"
            )
    _chosen = name


def get_backend() -> str:
    """The backend last chosen by `set_backend`; "auto" at first."""
    return _chosen


def convolves_well(x: Tensor) -> bool:
    """Whether torch's convolutions of x round each sum once, as a GPU's do, at no more than fp32's time.

    A CPU's in fp16 do neither. In bf16 those of oneDNN do, which want AVX-512; torch's own, on other CPUs,
    round every partial sum where channels are by themselves, and took 7 and 11 times as long as in fp32.
    """
    return x.device.type != "cpu" or x.dtype not in _CPU_CONVOLVES_BADLY


def _cpu_convolves_badly() -> frozenset[torch.dtype]:
    has_bf16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return frozenset([torch.float16] if has_bf16 else [torch.float16, torch.bfloat16])


_CPU_CONVOLVES_BADLY = _cpu_convolves_badly()


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """A block for operations on tensors of this one's device, in the dtypes that they have."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def use_triton(*tensors: Tensor | None) -> bool:
    """Whether an op on these tensors goes to its Triton kernel. float64 never does, nor what is transformed.

    Raises:
        RuntimeError: if "triton" was chosen, and a tensor lies where its kernels cannot run; if the tensors
            lie on several GPUs, whose addresses mean nothing to each other.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    if _chosen == "eager" or any(tensor.dtype == torch.float64 for tensor in given):
        return False
    able = all(runs_on(tensor.device) for tensor in given)
    if _chosen == "triton" and not able:
        devices = ", ".join(sorted({tensor.device.type for tensor in given}))
        raise RuntimeError(f"the backend is 'triton', whose kernels cannot run on: {devices}")
    if able and any(tensor.device != given[0].device for tensor in given):
        devices = ", ".join(sorted({str(tensor.device) for tensor in given}))
        raise RuntimeError(f"the tensors of one operation must be on one device, not on {devices}")
    return able and not is_transformed()
