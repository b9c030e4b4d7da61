"""One dropout mask for student and teacher, in networks whose dropout is torch's.

The consistency loss compares two passes of one network; with different masks it measures dropout's noise
instead (Song & Dhariwal 2024, section 3.1: both sides use the same mask). Public trainers restore the CPU's
generator between the passes, which leaves a GPU's masks different. Two ways to do it right:

    masks = SharedDropout(network, x.device)     # eager, or a network that is compiled by itself:
    with masks:                                  # the generators of the CPU and of x's device are rewound
        teacher = network(...)
    with masks:
        student = network(...)

    seed = seed_dropout(network)                 # a step that is compiled as a whole, CUDA graphs, activation
    ...                                          # checkpointing: masks are a function of a seed (philox.py)
    seed.advance()                               # before each step, and between micro-batches
"""

from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from .philox import dropout_keep_mask, dropout_threshold, seed_tensor


class SharedDropout:
    """A block to run each forward pass in: all of them start from the generator states of the first.

    Args:
        network: whose passes they are; read only under torch.compile.
        device: where the network draws its masks; the CPU's generator is rewound in any case.
    Raises:
        RuntimeError: on entering inside torch.compile, where generators cannot be rewound, if the network has
            active dropout layers that `seed_dropout` has not seeded. (Dropout called as a function cannot be
            seen there: compile the network, not the step, in such a code base.)
    """

    def __init__(self, network: Any, device: torch.device | str) -> None:
        self._network, self._device = network, torch.device(device)
        self._states: list[Tensor] | None = None

    def _generators(self) -> list[tuple[Any, tuple[torch.device, ...]]]:
        """The modules whose generators are rewound, and what to tell them."""
        generators: list[tuple[Any, tuple[torch.device, ...]]] = [(torch, ())]
        if self._device.type != "cpu":
            one = self._device.type == "mps"  # that is one device, and is not asked which
            told = () if one else (self._device,)
            generators.append((torch.get_device_module(self._device), told))
        return generators

    def __enter__(self) -> "SharedDropout":
        if torch.compiler.is_compiling():
            if isinstance(self._network, nn.Module) and any(
                isinstance(module, _DropoutNd)
                and not isinstance(module, SeededDropout)
                and module.training
                and module.p > 0.0
                for module in self._network.modules()
            ):
                raise RuntimeError(
                    "inside torch.compile dropout masks cannot be shared by rewinding generators; call"
                    " ict_kernels.seed_dropout(network) once, or compile the network instead of the step"
                )
        elif self._states is None:
            self._states = [module.get_rng_state(*told) for module, told in self._generators()]
        else:
            for (module, told), state in zip(self._generators(), self._states, strict=True):
                module.set_rng_state(state, *told)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def around(self, network: Callable[..., Any]) -> Callable[..., Any]:
        """The network as a function whose every call is such a block."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with self:
                return network(*args, **kwargs)

        return call


def forget_casts() -> None:
    """Between a teacher's pass without gradients and the student's, under autocast with the same weights.

    Older torch keeps the teacher's casts of the weights, and the student, who finds them, gives their weights
    no gradient (pytorch issue 112583; 2.13 does not). Compiled code casts anew anyway.
    """
    if not torch.compiler.is_compiling():
        torch.clear_autocast_cache()


class DropoutSeed:
    """The seed that the dropout layers of a network read; made by `seed_dropout`.

    A deep copy of the network reads the same seed: a teacher that is a copy shares the student's masks.

    Attributes:
        seed: int64 (2,), (run seed, step), on the network's device; compiled code reads it anew each time.
        layers: names of the seeded layers.
        left: names of dropout layers that were not seeded, and why.
    """

    def __init__(self, seed: Tensor) -> None:
        self.seed = seed
        self.layers: list[str] = []
        self.left: dict[str, str] = {}
        self._modules: list[tuple[nn.Module, type[nn.Module]]] = []

    def on(self, device: torch.device) -> Tensor:
        """The seed, for masks on a device.

        Raises:
            RuntimeError: if it is elsewhere: `network.to(device)` does not move it, since compiled code and
                captured graphs hold this very tensor.
        """
        if self.seed.device != device:
            raise RuntimeError(
                f"the network's dropout seed is on {self.seed.device}, its input on {device}; move the"
                " network first and call seed_dropout then (undo() the earlier one)"
            )
        return self.seed

    def advance(self) -> None:
        """New masks from now on: call it before each step, outside of compiled code and captured graphs.

        Also between the micro-batches of a step: a mask depends on a sample's place in the tensor, so without
        it the i-th samples of all micro-batches have the same. After the backward pass, which may draw the
        masks again (activation checkpointing, norms of `GroupNormSiLU.replace_in`).
        """
        self.seed[1] += 1

    def undo(self) -> None:
        """Gives the layers of the network (not of its copies) back to torch's generators."""
        for module, original in self._modules:
            module.__class__ = original
            del module.__dict__["_ict_dropout"]
        self._modules.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> "DropoutSeed":
        return self


class SeededDropout(nn.Dropout):
    """What `seed_dropout` makes of torch's layer."""

    _ict_dropout: tuple[DropoutSeed, int]  # and the layer's number

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        if self.p == 1.0:  # which is no share of 65,536 that leaves something to scale
            return x * 0.0
        source, layer = self._ict_dropout
        keep = dropout_keep_mask(x, self.p, source.on(x.device), layer=layer)
        # As torch multiplies: what is dropped and not finite is NaN, and not 0. Through uint8: see the
        # definition in group_norm_silu.py. The mask first: scaled, fp16 might overflow where it is dropped.
        return x * keep.to(torch.uint8) * (1.0 / (1.0 - dropout_threshold(self.p) / 65536))


def seed_dropout(network: nn.Module, seed: int | None = None) -> DropoutSeed:
    """Makes every torch.nn.Dropout of a network draw its mask from a seed, by Philox, instead of a generator.

    Until `advance` is called, all passes have the same masks: student, teacher, a recomputation under
    activation checkpointing. Parameters, state dict and module tree stay as they are. Where
    `GroupNormSiLU.replace_in` has replaced the norm before a dropout layer, its kernel draws the mask and no
    mask is stored; elsewhere on a GPU it is some hundred small operations, which torch.compile makes one.

    A mask belongs to a layer: one that a pass calls in two places draws the same mask in both, if the shapes
    are equal. Give each place a layer of its own.

    Args:
        network: changed in place; on the device where it is to stay, which the seed does not leave.
        seed: run seed; give each rank its own. None: drawn from torch's default generator.
    Returns:
        The seed to advance, which also names what was seeded and can undo it.
    """
    parameter = next(network.parameters(), None)
    source = DropoutSeed(seed_tensor(seed, "cpu" if parameter is None else parameter.device))
    for name, module in network.named_modules():
        if not isinstance(module, _DropoutNd) or isinstance(module, SeededDropout):
            continue
        if type(module) is not nn.Dropout:
            source.left[name] = f"{type(module).__name__} is a dropout of its own"
        else:
            source._modules.append((module, nn.Dropout))
            module.__class__ = SeededDropout
            module.__dict__["_ict_dropout"] = (source, len(source.layers))
            source.layers.append(name)
    return source
