"""How the gradients of a run's processes become one: their mean, in every process."""

from __future__ import annotations

import math
import warnings
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ict_fast.config import TrainingConfig
from ict_fast.training.world import World

_ALIGNED_BYTES = 512  # as torch's allocator would: kernels read whole vectors, wherever a gradient begins


def _to_none(network: nn.Module) -> None:
    for parameter in network.parameters():
        parameter.grad = None


class Alone:
    """The gradients of a process that is the only one.

    Attributes:
        network: what the student's forward pass has to go through.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def clear(self, *, single: bool = False) -> None:
        """Before a step: there are no gradients.

        Args:
            single: one micro-batch is to come, not several whose gradients add up.
        """
        _to_none(self.network)

    def gathering_only(self) -> AbstractContextManager[None]:
        """While open, gradients stay in this process: another micro-batch is to come."""
        return nullcontext()

    def finish(self) -> None:
        """After the last micro-batch: gradients are means over the processes; the host does not wait."""


class Overlapped:
    """Reduced while others are still computed, with the last micro-batch: by DistributedDataParallel.

    The gradients are views of its buckets from now on. Where micro-batches accumulate they must stay: new
    ones, after these were set to none, would be beside the buckets meanwhile, as much memory again. Those of
    a single micro-batch come one by one, and each is scaled into its bucket, where gradients that stay would
    be set to zero, added to and scaled: 24 bytes per parameter for 8.
    """

    def __init__(self, network: nn.Module) -> None:
        for parameter in network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        with warnings.catch_warnings():  # what takes the argument's place is not in torch 2.11
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
            self.network = DistributedDataParallel(
                network, gradient_as_bucket_view=True, broadcast_buffers=False
            )

    def clear(self, *, single: bool = False) -> None:
        if single:
            _to_none(self.network)
        else:
            torch._foreach_zero_([p.grad for p in self.network.parameters() if p.grad is not None])

    def gathering_only(self) -> AbstractContextManager[None]:
        context: AbstractContextManager[None] = self.network.no_sync()
        return context

    def finish(self) -> None:
        pass


class AtOnce:
    """Views of one tensor, which is reduced when all are there.

    For gradients that a CUDA graph computes: what DistributedDataParallel does would have to be captured with
    them, its communication included. And for the same bits after a resumption: which process's share of a
    number is added first depends on the number's place in what is reduced, and there DistributedDataParallel
    goes by other places in the first step of a process than in all later ones.
    """

    def __init__(self, network: nn.Module, world: World) -> None:
        self.network = network
        self._world = world
        parameters = list(network.parameters())
        first = parameters[0]
        assert all(p.dtype == first.dtype for p in parameters)
        step = _ALIGNED_BYTES // first.element_size()
        starts, end = [], 0
        for parameter in parameters:
            starts.append(end)
            end += step * math.ceil(parameter.numel() / step)
        self._flat: Tensor = torch.zeros(end, dtype=first.dtype, device=first.device)
        for parameter, start in zip(parameters, starts, strict=True):
            parameter.grad = self._flat.as_strided(parameter.shape, parameter.stride(), start)

    def clear(self, *, single: bool = False) -> None:
        self._flat.zero_()

    def gathering_only(self) -> AbstractContextManager[None]:
        return nullcontext()

    def finish(self) -> None:
        # Each by its share, then the sum, as DistributedDataParallel does it. On a CPU the host waits.
        with self._world.waiting("the gradients of all processes"):
            self._world.add(self._flat.div_(self._world.size))


Reduction = Alone | Overlapped | AtOnce


def reduction_of(
    network: nn.Module, world: World, training: TrainingConfig, device: torch.device
) -> Reduction:
    """The one for a network on its device; connects the devices of all processes, before DDP does."""
    if world.size == 1:
        return Alone(network)
    world.connect(next(network.parameters()).device)
    at_once = training.cuda_graph or training.deterministic or device.type == "cpu"
    return AtOnce(network, world) if at_once else Overlapped(network)
