"""The blocks of other code bases that `GroupNormSiLU.replace_in` knows, and their forward passes with one op.

Known by class name and attributes: whether a block computes what is restated here is found by trying it, in
replacement.py.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .group_norm_silu import group_norm_silu
from .shared_dropout import SeededDropout

# ------------------------------------------------------------------------------------------- what is a match


class Pattern(NamedTuple):
    """One kind of match.

    Attributes:
        norms: names of the norms, within a module that matches, that a SiLU follows; else nothing.
        forwards: the modules that get another forward pass, and which.
        probe: shapes of the inputs to try that on; None where nothing is restated.
    """

    norms: Callable[[Any], list[str]]
    forwards: Callable[[Any], list[tuple[nn.Module, Callable[..., Tensor]]]]
    probe: Callable[[Any], list[list[int] | None]] | None = None


def is_group_norm(module: Any) -> bool:
    """torch's group norm, or a class of such a name that has its parameters (EDM's)."""
    if isinstance(module, nn.GroupNorm):
        return True
    named = isinstance(module, nn.Module) and type(module).__name__ == "GroupNorm"
    return named and all(hasattr(module, each) for each in ("num_groups", "weight", "bias", "eps"))


def _is_silu(module: Any) -> bool:
    """torch's SiLU, or a module of that name (guided-diffusion's)."""
    return isinstance(module, nn.SiLU) or (isinstance(module, nn.Module) and type(module).__name__ == "SiLU")


def _pairs(module: nn.Sequential) -> list[str]:
    """Names of the norms of a Sequential that a SiLU follows."""
    children = list(module._modules.items())
    return [
        name for (name, child), (_, after) in pairwise(children) if is_group_norm(child) and _is_silu(after)
    ]


def _sequential(module: Any) -> list[str]:
    unchanged = isinstance(module, nn.Sequential) and type(module).forward in (
        nn.Sequential.forward,
        _sequential_forward,
    )
    return _pairs(module) if unchanged else []


def _has(module: Any, class_name: str, *attributes: str) -> bool:
    return type(module).__name__ == class_name and all(hasattr(module, each) for each in attributes)


def _diffusers_block(module: Any) -> list[str]:
    known = _has(module, "ResnetBlock2D", "norm1", "norm2", "nonlinearity", "time_embedding_norm", "dropout")
    return ["norm1", "norm2"] if known and _is_silu(module.nonlinearity) else []


def _diffusers_end(module: Any) -> list[str]:
    known = type(module).__name__ in ("UNet2DModel", "UNet2DConditionModel")
    norm, act = getattr(module, "conv_norm_out", None), getattr(module, "conv_act", None)
    return ["conv_norm_out"] if known and is_group_norm(norm) and _is_silu(act) else []


def _guided_block(module: Any) -> list[str]:
    if not _has(module, "ResBlock", "_forward", "in_layers", "emb_layers", "out_layers", "skip_connection"):
        return []
    sequentials = (module.in_layers, module.out_layers)
    if not all(
        isinstance(each, nn.Sequential) and _pairs(each) == ["0"] and len(each) > 2 for each in sequentials
    ):
        return []
    return ["in_layers.0", "out_layers.0"]


def _edm_block(module: Any) -> list[str]:
    known = _has(module, "UNetBlock", "norm0", "conv0", "affine", "norm1", "conv1", "skip", "adaptive_scale")
    return ["norm0", "norm1"] if known else []


# -------------------------------------------------------------------------------------- the passes, restated


def _fused(norm: Any, x: Tensor, dropout: Any = None, **between: Any) -> Tensor:
    """Norm and SiLU, with scale, shift or pre_bias between, and the dropout layer after, where it can be.

    Samplers have one noise level, and so one embedding, for all images.
    """
    between = {name: None if row is None else row.expand(x.shape[0], -1) for name, row in between.items()}
    if _is_seeded(dropout):
        source, layer = dropout._ict_dropout
        between |= {"dropout": dropout.p, "seed": source.on(x.device), "layer": layer}
    return group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, eps=norm.eps, **between)


def _is_seeded(dropout: Any) -> bool:
    """Whether a dropout layer's mask is a function that the norm's kernel can compute."""
    return isinstance(dropout, SeededDropout) and dropout.training and 0.0 < dropout.p < 1.0


def _run(sequential: nn.Sequential, x: Tensor, first: int = 0) -> Tensor:
    """A Sequential's pass from a child on."""
    children = list(sequential._modules.values())
    while first < len(children):
        child, act, dropout = (*children[first : first + 3], None, None)[:3]
        if is_group_norm(child) and _is_silu(act):
            x = _fused(child, x, dropout)
            first += 3 if _is_seeded(dropout) else 2
        else:
            x = child(x)  # type: ignore[misc]
            first += 1
    return x


def _norm_forward(self: Any, input: Tensor) -> Tensor:
    return _fused(self, input)


def _act_forward(self: Any, input: Tensor) -> Tensor:
    return input  # the norm before has done it


def _sequential_forward(self: Any, input: Tensor) -> Tensor:
    return _run(self, input)


def _diffusers_forward(
    self: Any, input_tensor: Tensor, temb: Tensor | None = None, *args: Any, **kwargs: Any
) -> Tensor:
    hidden = _fused(self.norm1, input_tensor)
    resample = self.upsample if self.upsample is not None else self.downsample
    if resample is not None:
        if self.upsample is not None and hidden.shape[0] >= 64:
            input_tensor, hidden = input_tensor.contiguous(), hidden.contiguous()
        input_tensor, hidden = resample(input_tensor), resample(hidden)
    hidden = self.conv1(hidden)
    if self.time_emb_proj is not None:
        temb = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
    if self.time_embedding_norm == "scale_shift":
        if temb is None:
            raise ValueError("temb should not be None when time_embedding_norm is scale_shift")
        scale, shift = temb.chunk(2, dim=1)
        hidden = _fused(self.norm2, hidden, self.dropout, scale=scale, shift=shift)
    else:
        added = temb if self.time_embedding_norm == "default" else None
        hidden = _fused(self.norm2, hidden, self.dropout, pre_bias=added)
    hidden = self.conv2(hidden if _is_seeded(self.dropout) else self.dropout(hidden))
    if self.conv_shortcut is not None:
        input_tensor = self.conv_shortcut(input_tensor.contiguous() if self.training else input_tensor)
    return (input_tensor + hidden) / self.output_scale_factor


def guided_forward(self: Any, x: Tensor, emb: Tensor) -> Tensor:
    if self.updown:
        h = _fused(self.in_layers[0], x)
        h, x = self.h_upd(h), self.x_upd(x)
        h = self.in_layers[-1](h)
    else:
        h = _run(self.in_layers, x)
    embedding = self.emb_layers(emb).type(h.dtype)
    norm, _, dropout, *_ = self.out_layers
    if self.use_scale_shift_norm:
        scale, shift = embedding.chunk(2, dim=1)
        h = _fused(norm, h, dropout, scale=scale, shift=shift)
    else:
        h = _fused(norm, h, dropout, pre_bias=embedding)
    h = _run(self.out_layers, h, first=3 if _is_seeded(dropout) else 2)
    return self.skip_connection(x) + h


def _edm_forward(self: Any, x: Tensor, emb: Tensor) -> Tensor:
    skipped = x
    x = self.conv0(_fused(self.norm0, x))
    embedding = self.affine(emb).to(x.dtype)
    if self.adaptive_scale:
        scale, shift = embedding.chunk(2, dim=1)
        x = _fused(self.norm1, x, scale=scale, shift=shift)
    else:
        x = _fused(self.norm1, x, pre_bias=embedding)
    x = self.conv1(F.dropout(x, p=self.dropout, training=self.training))
    x = (x + (skipped if self.skip is None else self.skip(skipped))) * self.skip_scale
    if self.num_heads:
        attention = self._ict_original.forward.__globals__["AttentionOp"]
        heads = x.shape[0] * self.num_heads
        q, k, v = self.qkv(self.norm2(x)).reshape(heads, x.shape[1] // self.num_heads, 3, -1).unbind(2)
        mixed = torch.einsum("nqk,nck->ncq", attention.apply(q, k), v)
        x = (self.proj(mixed.reshape(x.shape)) + x) * self.skip_scale
    return x


def _diffusers_probe(module: Any) -> list[list[int] | None]:
    projection = module.time_emb_proj
    return [[2, module.in_channels, 8, 8], None if projection is None else [2, projection.in_features]]


def _guided_probe(module: Any) -> list[list[int] | None]:
    spatial = module.in_layers[-1].weight.dim() - 2
    return [[2, module.channels, *[8] * spatial], [2, module.emb_layers[-1].in_features]]


def _edm_probe(module: Any) -> list[list[int] | None]:
    return [[2, module.in_channels, 8, 8], [2, module.affine.in_features]]


PATTERNS = (
    Pattern(_diffusers_block, lambda module: [(module, _diffusers_forward)], _diffusers_probe),
    Pattern(_guided_block, lambda module: [(module, guided_forward)], _guided_probe),
    Pattern(_edm_block, lambda module: [(module, _edm_forward)], _edm_probe),
    Pattern(
        _diffusers_end,
        lambda module: [(module.conv_norm_out, _norm_forward), (module.conv_act, _act_forward)],
    ),
    Pattern(_sequential, lambda module: [(module, _sequential_forward)]),
)
