"""Group norm + SiLU by NVIDIA apex (`apex.contrib.group_norm`), where its kernels allow.

apex takes a channels-last image, 16 or 32 groups, certain numbers of channels, an affine norm and SiLU or no
activation. It knows no pre-bias, scale, shift or dropout. What it does not take stays on this package's
kernels; `apex_report` says which shapes went where, and why. Chosen by `set_backend("apex")`.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BUILD = "NVIDIA's is built from https://github.com/NVIDIA/apex with APEX_CUDA_EXT=1 APEX_GROUP_NORM=1"
# When apex takes its two-pass kernels: its own module's rule from sm_80 on.
_ONE_PASS_PIXELS = 1024
_WIDE_CHANNELS, _WIDE_ONE_PASS_PIXELS = (3136, 3584, 4096), 511

DEVICES = ("cuda",)

_seen: dict[str, str] = {}


def why_unavailable() -> str | None:
    """Why apex's group norm cannot be called here, or None. Never imports a foreign package of its name."""
    found = importlib.util.find_spec("apex")
    if found is None:
        return f"NVIDIA apex is not installed; {BUILD}"
    folders = [Path(folder) for folder in found.submodule_search_locations or ()]
    if not any((folder / "contrib").is_dir() for folder in folders):
        return f"the installed apex is not NVIDIA's (PyPI's is a toolkit for Pyramid); {BUILD}"
    try:
        _find()
    except (ImportError, AttributeError) as error:
        return f"NVIDIA apex is installed without its group norm ({error}); {BUILD}"
    return None


@dataclass(frozen=True)
class _Apex:
    """What is used of apex: its functions, and what its module says that they take."""

    one_pass: Callable[..., Tensor]
    two_pass: Callable[..., Tensor]
    channels: frozenset[int]
    groups: frozenset[int]
    dtypes: frozenset[tuple[torch.dtype, torch.dtype]]


# Found once, by `why_unavailable`: torch.compile can trace the use of it, not an import.
_apex: _Apex | None = None


def _find() -> None:
    global _apex
    if _apex is None:
        module = importlib.import_module("apex.contrib.group_norm.group_norm")
        limits = module.GroupNorm
        _apex = _Apex(
            module.cuda_group_norm_nhwc_one_pass,
            module.cuda_group_norm_nhwc_two_pass,
            frozenset(limits.SUPPORTED_CHANNELS),
            frozenset(limits.SUPPORTED_GROUPS),
            frozenset(limits.SUPPORTED_DTYPES),
        )


def why_not(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    extras: dict[str, bool],
) -> str | None:
    """Why apex does not take this norm, or None if it does. Ask `why_unavailable` first.

    Args:
        x: (N, C, H, W).
        num_groups, weight, bias: as in `group_norm_silu`.
        extras: what else was asked for, by name, such as {"pre_bias": True}.
    """
    assert _apex is not None
    asked = [name for name, given in extras.items() if given]
    if asked:
        return f"apex knows no {' or '.join(asked)}"
    if x.device.type not in DEVICES:
        return f"apex runs on a GPU, not on {x.device.type}"
    if weight is None or bias is None:
        return "apex needs weight and bias"
    if x.dim() != 4 or not x.is_contiguous(memory_format=torch.channels_last):
        return "apex needs a channels-last image"
    if x.shape[1] not in _apex.channels:
        return f"apex has no kernel for {x.shape[1]} channels"
    if num_groups not in _apex.groups:
        return f"apex has no kernel for {num_groups} groups"
    if weight.dtype != bias.dtype or (x.dtype, weight.dtype) not in _apex.dtypes:
        return f"apex does not take {x.dtype} with parameters of {weight.dtype}"
    return None


def note(x: Tensor, num_groups: int, reason: str | None) -> None:
    """Remembers for `apex_report` where a shape went."""
    if not torch.compiler.is_compiling():
        shape = f"{' x '.join(map(str, x.shape[1:]))}, {num_groups} groups"
        _seen[shape] = reason or "apex"


def apex_report() -> dict[str, str]:
    """Where the group norms seen under `set_backend("apex")` went: "apex", or why not; by shape, N left out.

    The last call of each shape counts; what torch.compile has traced is not seen.
    """
    return dict(_seen)


class _ChannelsLastGradient(torch.autograd.Function):
    """The identity, whose gradient is channels last: apex's backward pass refuses any other layout."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.contiguous(memory_format=torch.channels_last)


def group_norm(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float, activation: str | None
) -> Tensor:
    """The norm by apex, differentiable, for gradients of any layout. Ask `why_not` first."""
    assert _apex is not None
    most = _WIDE_ONE_PASS_PIXELS if x.shape[1] in _WIDE_CHANNELS else _ONE_PASS_PIXELS
    function = _apex.one_pass if x.shape[2] * x.shape[3] <= most else _apex.two_pass
    y: Tensor = _ChannelsLastGradient.apply(function(x, num_groups, weight, bias, eps, activation or ""))
    return y
