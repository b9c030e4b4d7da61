"""Group norm + SiLU by this package in networks of other code bases: `GroupNormSiLU.replace_in`.

No module is exchanged. A block whose forward pass has a group norm and then a SiLU gets a subclass of its own
class, in which both are one call of `group_norm_silu`, with the embedding, scale and shift between them:

- torch's nn.Sequential (and subclasses that keep its forward pass): GroupNorm, SiLU next to each other;
- diffusers' ResnetBlock2D, and the last norm of its U-Nets (conv_norm_out, conv_act);
- guided-diffusion's ResBlock (also improved-diffusion's, openai/consistency_models');
- EDM's UNetBlock (also ECT's).

So parameters, names, hooks on blocks and state dicts are what they were; a deep copy stays replaced; a pickle
holds the original classes. Blocks of other code bases are tried on a small input, and everywhere so is a norm
or SiLU whose class is not torch's: where the result is another, they are left alone, and the report says so.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backend import get_backend, set_backend
from .block_patterns import PATTERNS, Pattern, guided_forward, is_group_norm


@dataclass
class Replacement:
    """What `GroupNormSiLU.replace_in` did; print it.

    Attributes:
        changed: what was replaced, by the block's name in the network.
        left: why not, by the group norm's name.
    """

    changed: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    _originals: list[tuple[nn.Module, type[nn.Module]]] = field(default_factory=list, repr=False)

    def undo(self) -> None:
        """Gives every block of this network (not of its copies) its own class back."""
        while self._originals:
            module, original = self._originals.pop()
            module.__class__ = original

    def __str__(self) -> str:
        lines = [f"group norm + SiLU: {len(self.changed)} blocks replaced, {len(self.left)} norms left"]
        lines += [f"  replaced  {name or '(the network)'}: {what}" for name, what in self.changed.items()]
        lines += [f"  left      {name or '(the network)'}: {why}" for name, why in self.left.items()]
        return "\n".join(lines)


def replace_in(network: nn.Module) -> Replacement:
    """See `GroupNormSiLU.replace_in`."""
    report = Replacement()
    done: set[str] = set()  # norms that one call of ours computes, now or from before
    left: dict[str, str] = {}
    for name, module in network.named_modules():
        if isinstance(module, _Replaced):
            before = {_joined(name, norm) for norm in module._ict_pattern.norms(module)}
            left |= dict.fromkeys(before - done, "replaced before")
            done |= before
            continue
        for pattern in PATTERNS:
            norms = [] if isinstance(module, _Replaced) else pattern.norms(module)
            names = {_joined(name, norm) for norm in norms}
            if not names or names & done:
                continue
            reason = _why_not(module, norms, pattern) or _replace(module, pattern, report)
            if reason is not None:
                left |= dict.fromkeys(names, reason)
            else:
                report.changed[name] = f"{type(module).__name__}, {', '.join(norms)}"
                done |= names
                left = {norm: reason for norm, reason in left.items() if norm not in names}
    for name, module in network.named_modules():
        if name not in done and is_group_norm(module):
            left.setdefault(name, "no SiLU module follows it, nor is its block one known here")
    report.left = left
    return report


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}.{name}".strip(".")


# ------------------------------------------------------------------------------- changing a block's class


class _Replaced:
    """Mixed into the classes of replaced modules."""

    __slots__ = ()
    _ict_pattern: Pattern
    _ict_original: type[Any]


def _twin(module: Any) -> Any:
    """An object of the original class that shares a replaced module's state."""
    original = module._ict_original
    twin = original.__new__(original)
    object.__setattr__(twin, "__dict__", module.__dict__)
    return twin


@cache
def _replaced_class(original: Any, method: str, forward: Callable[..., Any], pattern: Pattern) -> type[Any]:
    def __reduce_ex__(self: Any, protocol: Any) -> Any:  # pickles hold the original class
        function, *others = _twin(self).__reduce_ex__(protocol)
        if function.__name__ == "__newobj__":  # which pickle lets make no object of another class
            function = object.__new__
        return (function, *others)

    def __deepcopy__(self: Any, memo: dict[int, Any]) -> Any:
        copied = copy.deepcopy(_twin(self), memo)
        kind: Any = type(copied)  # of a class of its own, where the code base copies classes too
        copied.__class__ = _replaced_class(kind, method, forward, pattern)
        memo[id(self)] = copied
        return copied

    members = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "__reduce_ex__": __reduce_ex__,
        "__deepcopy__": __deepcopy__,
        "_ict_pattern": pattern,
        "_ict_original": original,
        method: forward,
    }
    return type(original.__name__, (original, _Replaced), members)


def _replace(module: nn.Module, pattern: Pattern, report: Replacement) -> str | None:
    """Changes the classes of a match; if what it computes changes too, takes that back and says so."""
    swaps = pattern.forwards(module)
    before = None
    if pattern.probe is not None:
        try:
            inputs = _probe_inputs(module, pattern.probe(module))
            before = _record(module, inputs)
        except Exception as error:
            return f"{type(module).__name__} could not be tried: {error}"
    originals = [(each, type(each)) for each, _ in swaps]
    for each, forward in swaps:
        # guided-diffusion's forward wraps its _forward in activation checkpointing, and goes on doing so
        method = "_forward" if forward is guided_forward else "forward"
        kind: Any = type(each)
        each.__class__ = _replaced_class(kind, method, forward, pattern)
    if before is not None:
        try:
            after = _record(module, inputs)
            same = len(before) == len(after) and all(map(_close, after, before))
            reason = None if same else f"{type(module).__name__} is another one than this package knows"
        except Exception as error:
            reason = f"{type(module).__name__} is another one than this package knows: {error}"
        if reason is not None:
            for each, original in originals:
                each.__class__ = original
            return reason
    report._originals += originals
    return None


# ------------------------------------------------------------------------------------------- trying a block


def _probe_input(shape: list[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers between -2 and 3, the same each time; drawn from no generator, which belong to the training."""
    numbers = torch.arange(torch.Size(shape).numel(), dtype=torch.float64, device="cpu")
    return ((numbers * 12.9898).sin() * 43758.5453 % 5 - 2).reshape(shape).to(device, dtype)


def _probe_inputs(module: nn.Module, shapes: list[list[int] | None]) -> list[Tensor | None]:
    """Images in the dtype of the convolutions, embeddings in that of the linear layers, which may differ."""
    inputs: list[Tensor | None] = []
    for shape in shapes:
        if shape is None:
            inputs.append(None)
        else:
            like = next(p for p in module.parameters() if (p.dim() > 2) == (len(shape) > 2) and p.dim() > 1)
            inputs.append(_probe_input(shape, like.dtype, like.device))
    return inputs


@contextmanager
def _quietly(module: nn.Module) -> Iterator[None]:
    """In evaluation mode, without gradients, and by the definitions: no kernel is compiled for this."""
    training, backend = [(each, each.training) for each in module.modules()], get_backend()
    module.eval()
    set_backend("eager")
    try:
        with torch.no_grad():
            yield
    finally:
        set_backend(backend)
        for each, mode in training:
            each.training = mode


def _record(module: nn.Module, inputs: list[Tensor | None]) -> list[Tensor]:
    """What a block gives out, and what its convolutions get: the last one may be 0 yet, and hide the rest."""
    seen: list[Tensor] = []
    convolutions = [
        each
        for each in module.modules()
        if each is not module
        and isinstance(weight := getattr(each, "weight", None), Tensor)
        and weight.dim() > 2
    ]
    handles = [
        each.register_forward_pre_hook(lambda _, given: seen.append(given[0].clone()))
        for each in convolutions
    ]
    try:
        with _quietly(module):
            seen.append(module(*(None if each is None else each.clone() for each in inputs)))
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _close(a: Tensor, b: Tensor) -> bool:
    """Equal but for rounding: a few of the dtype's, relative to the largest value."""
    if a.shape != b.shape:
        return False
    exact = 1e-4 if a.device.type == "cpu" else 3e-3  # convolutions may be TF32
    rounding = {torch.bfloat16: 0.03, torch.float16: 0.004}.get(a.dtype, exact)
    a, b = a.cpu().double(), b.cpu().double()  # Apple's GPUs have no float64
    return bool((a - b).abs().max() <= rounding * (1.0 + b.abs().max()))


def _why_not(module: nn.Module, norms: list[str], pattern: Pattern) -> str | None:
    """A reason in the norms themselves, or in what else would change, to leave them alone."""
    if any(parameter.device.type == "meta" for parameter in module.parameters()):
        return "its parameters are on the meta device, where it cannot be tried"
    # Older diffusers has one SiLU for every place in the process.
    users = [child for parent in module.modules() for child in parent._modules.values()]
    for changed, _ in pattern.forwards(module):
        if sum(child is changed for child in users) > 1:
            return f"its {type(changed).__name__} is used in other places too"
    for name, norm in zip(norms, map(module.get_submodule, norms), strict=True):
        if isinstance(norm, _Replaced):
            return "replaced before"
        act = _silu_after(module, name)
        silent = [norm, *([] if act is None else [act]), *_block_around(module, name)]
        for each in silent:
            if any(getattr(each, hooks) for hooks in _HOOKS):
                return f"the {'norm' if each is norm else type(each).__name__} has hooks, which would not run"
        if any("forward" in each.__dict__ for each in (module, *silent)):
            return "its forward pass was replaced by something else before"
        if type(norm).forward is not nn.GroupNorm.forward and (reason := _is_another_norm(norm)):
            return reason
        if act is not None and type(act).forward is not nn.SiLU.forward and (reason := _is_no_silu(act)):
            return reason
    return None


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _silu_after(module: nn.Module, norm: str) -> nn.Module | None:
    """The SiLU that follows a norm, where it is a module."""
    prefix, _, name = norm.rpartition(".")
    parent = module.get_submodule(prefix)
    if isinstance(parent, nn.Sequential):
        names = list(parent._modules)
        return parent.get_submodule(names[names.index(name) + 1])
    acts = (getattr(module, each, None) for each in ("nonlinearity", "conv_act"))  # diffusers' block and end
    return next((act for act in acts if isinstance(act, nn.Module)), None)


def _block_around(module: nn.Module, norm: str) -> list[nn.Module]:
    """A block's Sequential about a norm, which is called no more."""
    parent = module.get_submodule(norm.rpartition(".")[0])
    return [parent] if isinstance(parent, nn.Sequential) and parent is not module else []


def _is_another_norm(norm: Any) -> str | None:
    """Why a class's own forward pass is not group norm, by trying it."""
    try:
        x = _probe_input([2, len(norm.weight), 4, 4], torch.float32, norm.weight.device)
        with torch.no_grad():
            expected = F.group_norm(x, norm.num_groups, norm.weight.float(), norm.bias.float(), norm.eps)
            same = _close(norm(x), expected)
    except Exception as error:
        return f"{type(norm).__name__} could not be tried: {error}"
    return None if same else f"{type(norm).__name__} computes something else than group norm"


def _is_no_silu(act: nn.Module) -> str | None:
    """Why a class's own forward pass is not SiLU, by trying it: further from 0 than a block's trial gets."""
    name = type(act).__name__
    if act.state_dict():
        return f"{name} has parameters of its own"
    try:
        x = torch.linspace(-5.3, 5.3, 1024, device="cpu").sinh().reshape(2, 8, 8, 8)  # -100 to 100
        with torch.no_grad():
            expected = F.silu(x)
            given = act(x)  # perhaps in place
            same = given.shape == x.shape and torch.allclose(given, expected, rtol=1e-4, atol=1e-4)
    except Exception as error:
        return f"{name} could not be tried: {error}"
    return None if same else f"{name} computes something else than SiLU"
