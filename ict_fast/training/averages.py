"""The further averages of the weights: of other decays, and of power functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ict_fast.config import OptimizerConfig


def ema_decay(decay: float, step: int, *, warmup: bool) -> float:
    """Decay of an exponential average at step k; with warm-up min(decay, (k+1)/(k+10))."""
    return min(decay, (step + 1) / (step + 10)) if warmup else decay


def power_name(sigma_rel: float) -> str:
    """What the average of that relative width is called, in files and as `--ema NAME`."""
    return f"power-{sigma_rel!r}"


class Averages:
    """Averages of the weights beside the one that the optimizer keeps; all begin with the run.

    Exponential ones follow ema += (1 - decay) (theta - ema), named by their decay; those of power functions
    have 1 - decay = 1 - (1 - 1/t)^(gamma+1), where t counts the steps that were not skipped.

    Each takes the memory of the weights, and moves 8 values for each of them per step (the optimizer's own
    average moves 2, in the same pass as the update).

    Attributes:
        names: as files and `--ema` have them; decays first.
        power_names: those of power functions.
    """

    def __init__(self, config: OptimizerConfig, parameters: Sequence[Tensor]) -> None:
        self._warmup = config.ema_warmup
        self._parameters = [parameter.detach() for parameter in parameters]
        self._decays = {repr(decay): decay for decay in config.ema_decays}
        self._exponents: dict[str, float] = {}
        if config.power_ema:
            from ict_fast.consistency.averaging import power_exponent  # numpy, which a step does without

            self._exponents = {power_name(width): power_exponent(width) + 1 for width in config.power_ema}
        self.power_names = tuple(self._exponents)
        self.names = (*self._decays, *self.power_names)
        self._values = {name: [p.clone() for p in self._parameters] for name in self.names}
        device = self._parameters[0].device
        self._decay = {name: torch.zeros((), dtype=torch.float64, device=device) for name in self._decays}

    def set_step(self, step: int) -> None:
        """Writes the decays of a step, numbered from 0, into device tensors."""
        for name, decay in self._decays.items():
            self._decay[name].fill_(ema_decay(decay, step, warmup=self._warmup))

    @torch.no_grad()
    def advance(self, skipped: Tensor, updates: Tensor) -> None:
        """Follows the step that has begun; never waits for the device.

        Args:
            skipped: 0-dim bool, whether it changed no weight; then it changes no average either.
            updates: 0-dim integer, the steps that have changed the weights, this one included.
        """
        for name, decay in self._decay.items():
            self._follow(name, decay, skipped)
        if self._exponents:
            base = 1.0 - 1.0 / updates.double()
            for name, exponent in self._exponents.items():
                self._follow(name, base**exponent, skipped)

    def _follow(self, name: str, decay: Tensor, skipped: Tensor) -> None:
        average = self._values[name]
        weight = torch.where(skipped, 0.0, 1.0 - decay).to(average[0].dtype)
        change = torch._foreach_sub(self._parameters, average)
        torch._foreach_mul_(change, weight)
        torch._foreach_add_(average, change)

    def parameters(self, name: str) -> list[Tensor]:
        """One average, in the order of the parameters: the state itself, not copies."""
        return self._values[name]

    @torch.no_grad()
    def restore(self, name: str, tensors: Mapping[str, Tensor], parameter_names: Sequence[str]) -> None:
        """Takes over a saved average.

        Raises:
            KeyError: if a parameter is not among the tensors.
        """
        for ours, parameter in zip(self._values[name], parameter_names, strict=True):
            ours.copy_(tensors[parameter])
