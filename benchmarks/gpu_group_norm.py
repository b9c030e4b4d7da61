"""group_norm_silu at every shape of the networks, beside torch, Inductor and apex: times and errors.

The baselines get what favours them: their parameters and embeddings in the dtype of x already; eager torch,
which answers a channels-last input with NCHW, is spared the way back, and Inductor writes channels last as it
would for the convolution that follows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from gpu_baselines import INDUCTOR, TUNED, compiled_variants, error_record
from gpu_timing import OURS, Comparison, Stage, buffer_sets, differentiable
from kernel_cases.group_norm_silu import Norm, case_of
from torch import Tensor

from ict_fast import presets
from ict_fast.networks import build_network
from ict_kernels import GroupNormSiLU, apex_backend, group_norm_silu
from ict_kernels.philox import dropout_keep_mask

EPS = 1e-5
LAYER = 3
# Images of x's size that all variants and copies of one case take together (counted: about 30).
_COPIES_IN_MEMORY = 36
# Errors are computed on as many whole samples as have this many elements.
_CHECKED_ELEMENTS = 2**24


@dataclass(frozen=True)
class NormCase:
    """A norm as a network uses it.

    Attributes:
        preset: whose network.
        norm: channels, size, and what comes with it.
        dtype: of x.
        samples: N.
        uses: norms of this kind in a forward pass.
        share: of the elements that all norms of the network see.
        dropout: probability, if the norm has dropout at all.
    """

    preset: str
    norm: Norm
    dtype: torch.dtype
    samples: int
    uses: int
    share: float
    dropout: float

    @property
    def name(self) -> str:
        dtype = "fp16, " if self.dtype == torch.float16 else ""
        return f"group_norm_silu, {self.preset}, {dtype}{self.norm}"


@cache
def norm_cases(preset: str, samples: int) -> tuple[NormCase, ...]:
    """The distinct norms of a preset's network, those first that see the most elements in a step."""
    config = presets.get(preset).network
    uses: Counter[Norm] = Counter()

    def count(module: Any, arguments: tuple[Tensor, ...], options: dict[str, Any]) -> None:
        (x,) = arguments
        uses[
            Norm(
                size=x.shape[2],
                channels=x.shape[1],
                num_groups=module.num_groups,
                silu=module.activation == "silu",
                dropout=options.get("seed") is not None and module.dropout > 0,
                pre_bias=options.get("pre_bias") is not None,
                scale_shift=options.get("scale") is not None,
                fp32=module is network.output.norm,  # the network's ends compute in fp32
            )
        ] += 1

    with torch.device("meta"):
        network = build_network(config)
        x = torch.empty(2, config.image_channels, config.resolution, config.resolution)
        labels = torch.zeros(2, dtype=torch.int64) if config.num_classes else None
        for module in network.modules():
            if isinstance(module, GroupNormSiLU):
                module.register_forward_pre_hook(count, with_kwargs=True)
        network(x, torch.empty(2), labels, dropout_seed=torch.empty(2, dtype=torch.int64))
    elements = {norm: times * norm.channels * norm.size**2 for norm, times in uses.items()}
    return tuple(
        NormCase(
            preset,
            norm,
            torch.float32 if norm.fp32 else torch.bfloat16,
            samples,
            uses[norm],
            elements[norm] / sum(elements.values()),
            config.dropout if norm.dropout else 0.0,
        )
        for norm in sorted(elements, key=lambda each: (-elements[each], each))
    )


def in_other_dtypes(case: NormCase) -> list[NormCase]:
    """The same norm in fp16 and in fp32."""
    return [
        replace(case, dtype=torch.float16),
        replace(case, norm=replace(case.norm, fp32=True), dtype=torch.float32),
    ]


# ---------------------------------------------------------------------------------------------- the baselines


class Parameters(NamedTuple):
    """What a norm takes beside x: (C,), and where it is given (N, C)."""

    weight: Tensor
    bias: Tensor
    scale: Tensor | None
    shift: Tensor | None
    pre_bias: Tensor | None


def norm_by_torch(
    x: Tensor,
    parameters: Parameters,
    num_groups: int,
    silu: bool,
    dropout: float,
    keep: Tensor | None = None,
) -> Tensor:
    """What a network without this package calls; `keep` replaces torch's own dropout mask."""
    weight, bias, scale, shift, pre_bias = parameters

    def column(values: Tensor) -> Tensor:
        return values[:, :, None, None]

    y = x if pre_bias is None else x + column(pre_bias)
    y = F.group_norm(y, num_groups, weight, bias, EPS)
    if scale is not None and shift is not None:
        y = y * (1 + column(scale)) + column(shift)
    if silu:
        y = F.silu(y)
    if keep is not None:
        return y * keep / (1 - round(dropout * 65536) / 65536)
    return F.dropout(y, dropout) if dropout > 0 else y


def norm_channels_last(*arguments: Any) -> Tensor:
    """`norm_by_torch` in the layout of the convolution that follows."""
    return norm_by_torch(*arguments).contiguous(memory_format=torch.channels_last)


# ---------------------------------------------------------------------------------------------- the arguments


class Arguments:
    """Tensors of one case: large ones for every buffer set, small ones shared by all.

    Attributes:
        x, dy, dy_nchw: of each set; x channels last, the gradient of y in both layouts.
        ours: the parameters as the networks pass them, in fp32.
        theirs: the same in the dtype of x.
    """

    def __init__(self, case: NormCase, samples: int, sets: int, device: torch.device) -> None:
        norm = case.norm
        generator = torch.Generator(device).manual_seed(norm.channels * norm.size)

        def randn(*shape: int) -> Tensor:
            # Values that the dtype of x holds, so that theirs are ours.
            return torch.randn(shape, generator=generator, device=device).to(case.dtype).float()

        def image() -> Tensor:
            shape = (samples, norm.size, norm.size, norm.channels)
            values = torch.empty(shape, dtype=case.dtype, device=device).normal_(generator=generator)
            return values.permute(0, 3, 1, 2)

        self.x = [image().mul_(2).add_(0.5).requires_grad_() for _ in range(sets)]
        self.dy = [image() for _ in range(sets)]
        self.dy_nchw = [each.contiguous() for each in self.dy]
        weight, bias = randn(norm.channels), randn(norm.channels)
        scale, shift, pre_bias = (
            randn(samples, norm.channels) if given else None
            for given in (norm.scale_shift, norm.scale_shift, norm.pre_bias)
        )
        self.ours = _leaves(Parameters(weight, bias, scale, shift, pre_bias), torch.float32)
        self.theirs = _leaves(self.ours, case.dtype)
        self.seed = torch.tensor([7, 8], device=device)

    def gradient(self, number: int, y: Tensor) -> Tensor:
        """The gradient of y in y's own layout."""
        channels_last = y.is_contiguous(memory_format=torch.channels_last)
        return self.dy[number] if channels_last else self.dy_nchw[number]


def _leaves(parameters: Parameters, dtype: torch.dtype) -> Parameters:
    """Copies to differentiate by."""

    def leaf(each: Tensor) -> Tensor:
        return each.detach().to(dtype, copy=True).requires_grad_()

    return Parameters._make(None if each is None else leaf(each) for each in parameters)


def _given(*tensors: Tensor | None) -> list[Tensor]:
    return [each for each in tensors if each is not None]


def _by_kernels(case: NormCase, seed: Tensor, x: Tensor, parameters: Parameters) -> Tensor:
    return group_norm_silu(
        x,
        case.norm.num_groups,
        **parameters._asdict(),
        eps=EPS,
        activation="silu" if case.norm.silu else None,
        dropout=case.dropout,
        seed=seed if case.dropout > 0 else None,
        layer=LAYER,
    )


def _variants(case: NormCase, arguments: Arguments, device: torch.device) -> dict[str, dict[str, Stage]]:
    norm = case.norm

    def stages(function: Callable[..., Tensor], parameters: Parameters, *options: Any) -> dict[str, Stage]:
        return differentiable(
            lambda number: function(arguments.x[number], parameters, *options),
            [_given(x, *parameters) for x in arguments.x],
            arguments.gradient,
        )

    def by_apex(x: Tensor, parameters: Parameters) -> Tensor:
        activation = "silu" if norm.silu else None
        return apex_backend.group_norm(x, norm.num_groups, *parameters[:2], EPS, activation)

    theirs = arguments.theirs, norm.num_groups, norm.silu, case.dropout
    variants = {
        OURS: stages(partial(_by_kernels, case, arguments.seed), arguments.ours),
        "eager": stages(norm_by_torch, *theirs),
    }
    for name, compiled in compiled_variants(norm_channels_last, device).items():
        variants[name] = stages(compiled, *theirs)
    if _why_not_apex(case, arguments) is None:
        variants["apex"] = stages(by_apex, arguments.ours)
    return variants


def compile_baselines(case: NormCase) -> None:
    """Runs what Inductor makes of a norm once, on a GPU: for `compile_beside`."""
    device = torch.device("cuda")
    arguments = Arguments(case, case.samples, 1, device)
    for name, stages in _variants(case, arguments, device).items():
        if name in (INDUCTOR, TUNED):
            stages["backward"](0, stages["forward"](0, None))
    torch.cuda.synchronize()
    del arguments, stages
    torch.cuda.empty_cache()


def _why_not_apex(case: NormCase, arguments: Arguments) -> str | None:
    weight, bias, *optional = arguments.ours
    extras = {name: each is not None for name, each in zip(Parameters._fields[2:], optional, strict=True)} | {
        "dropout": case.dropout > 0
    }
    return apex_backend.why_unavailable() or apex_backend.why_not(
        arguments.x[0], case.norm.num_groups, weight, bias, extras
    )


# -------------------------------------------------------------------------------------------- the comparison


def compare_norm(case: NormCase, device: torch.device) -> Comparison:
    """Both directions of a norm beside its baselines, with the errors of ours and torch's against float64."""
    samples = samples_that_fit(case, device)
    elements = samples * case.norm.channels * case.norm.size**2
    sets = buffer_sets(2 * elements * case.dtype.itemsize, device)
    arguments = Arguments(case, samples, sets, device)
    plans = {"forward": case_of(case.norm, backward=False), "backward": case_of(case.norm, backward=True)}
    variants = _variants(case, arguments, device)
    # With dropout each has a mask of its own.
    compiled = [name for name in variants if name.startswith("inductor") and not case.dropout]
    return Comparison(
        variants=variants,
        sets=sets,
        bytes_moved={stage: elements * plan.bytes_per_element for stage, plan in plans.items()},
        minimum_bytes={stage: elements * plan.minimum_bytes_per_element for stage, plan in plans.items()},
        algorithms={stage: plan.algorithm for stage, plan in plans.items()},
        facts={
            "preset": case.preset,
            "norm": str(case.norm),
            "dtype": str(case.dtype).removeprefix("torch."),
            "samples": samples,
            "uses_per_forward_pass": case.uses,
            "share_of_elements": case.share,
            "errors": _errors(case, arguments),
            "apex": _why_not_apex(case, arguments) or "measured",
        },
        held_to=dict.fromkeys(compiled, "eager"),
    )


def samples_that_fit(case: NormCase, device: torch.device) -> int:
    """The case's number of samples, halved until all variants fit into the device's free memory."""
    if device.type != "cuda":
        return case.samples
    free, _ = torch.cuda.mem_get_info(device)
    samples, bytes_per_sample = case.samples, case.norm.channels * case.norm.size**2 * case.dtype.itemsize
    while samples > 1:
        sets = buffer_sets(2 * samples * bytes_per_sample, device)
        if _COPIES_IN_MEMORY * sets * samples * bytes_per_sample < 0.9 * free:
            break
        samples //= 2
    return samples


def _errors(case: NormCase, arguments: Arguments) -> dict[str, dict[str, float | None]]:
    """The largest error of y and of each gradient against float64, beside that of torch's own kernels."""
    # Leaves of their own, as _leaves makes too: a capture must not meet one that another stream has used.
    x = arguments.x[0].detach()
    checked = min(x.shape[0], max(1, _CHECKED_ELEMENTS // x[0].numel()))
    x, gradient = x[:checked], arguments.dy[0][:checked]
    rows = Parameters._make(
        each if each is None or each.dim() == 1 else each.detach()[:checked] for each in arguments.ours
    )
    options: tuple[Any, ...] = (case.norm.num_groups, case.norm.silu, case.dropout)
    if case.dropout > 0:
        options += (dropout_keep_mask(x, case.dropout, arguments.seed, 0, LAYER),)

    def results(function: Callable[..., Tensor], x_dtype: torch.dtype, dtype: torch.dtype) -> list[Tensor]:
        leaf, parameters = x.to(x_dtype, copy=True).requires_grad_(), _leaves(rows, dtype)
        y = function(leaf, parameters)
        return [y.detach(), *torch.autograd.grad(y, _given(leaf, *parameters), gradient.to(y.dtype))]

    by_kernels = partial(_by_kernels, case, arguments.seed)
    exact = results(by_kernels, torch.float64, torch.float64)
    ours = results(by_kernels, case.dtype, torch.float32)
    torchs = results(lambda x, parameters: norm_by_torch(x, parameters, *options), case.dtype, case.dtype)
    given = [name for name, each in rows._asdict().items() if each is not None]
    return {
        name: error_record(*values)
        for name, *values in zip(
            ["y", "dx", *(f"d{name}" for name in given)], ours, exact, torchs, strict=True
        )
    }
