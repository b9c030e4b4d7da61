"""The losses of the steps since the last line of the log, summed over images, steps and processes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ict_fast.training.loss_by_sigma import BUCKETS
from ict_fast.training.world import World

# So that what waits to be added takes no memory to speak of, however rare the lines of the log are.
_MOST_KEPT = 64

FIGURES = 1 + 2 * BUCKETS
"""Of a step: its loss, then sums and numbers of the images' losses by noise level."""


class LossWindow:
    """Sums of the finite step losses, and of the images' losses by noise level, since `reset`.

    Each of several processes has but its own share of a step's figures. It keeps them, and adds the others'
    for many steps at once: to wait for the slowest process in each step, for so few numbers, would cost more
    than all the rest that is done outside the network.

    Attributes:
        sum, count: sum and number of the finite step losses; fp64 scalars.
        by_sigma: (2 BUCKETS,) fp64, see `LossBySigma`.
    """

    def __init__(self, device: torch.device, world: World) -> None:
        self._world = world
        self._sums = torch.zeros(1 + FIGURES, dtype=torch.float64, device=device)
        self._kept: list[Tensor] = []

    def add(self, figures: Tensor) -> None:
        """Adds a step.

        Args:
            figures: (FIGURES,), this process's share of the step's loss, and its sums by noise level.
        """
        self._kept.append(figures)
        if self._world.size == 1 or len(self._kept) == _MOST_KEPT:
            self.gather()

    def gather(self) -> None:
        """Brings the sums up to date, in all processes at the same step; never waits for the device."""
        if not self._kept:
            return
        # In fp64, and a step after the other, so that the sums do not depend on when they were gathered.
        steps = self._world.add(torch.stack(self._kept).double())
        self._kept.clear()
        loss, by_sigma = steps[:, :1], steps[:, 1:]
        finite = torch.isfinite(loss)
        for step in torch.cat([torch.where(finite, loss, 0.0), finite, by_sigma], dim=1):
            self._sums += step

    def reset(self) -> None:
        """Starts a new window."""
        self._kept.clear()
        self._sums.zero_()

    @property
    def sum(self) -> Tensor:
        return self._gathered()[0]

    @property
    def count(self) -> Tensor:
        return self._gathered()[1]

    @property
    def by_sigma(self) -> Tensor:
        return self._gathered()[2:]

    def _gathered(self) -> Tensor:
        assert not self._kept, "gather() is to be called first, by all processes"
        return self._sums

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds; no copies are made."""
        return {"loss_sum": self.sum, "loss_count": self.count, "loss_by_sigma": self.by_sigma}

    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Takes over what `tensors` gave; KeyError names what is missing."""
        self._kept.clear()
        for name, tensor in self.tensors().items():
            tensor.copy_(saved[name])
