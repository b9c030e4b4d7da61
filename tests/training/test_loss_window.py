"""The sums of the losses, gathered over processes now and then."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ict_fast.training.loss_by_sigma import BUCKETS
from ict_fast.training.loss_window import _MOST_KEPT, LossWindow
from ict_fast.training.world import World

CPU = torch.device("cpu")
STEPS = 2 * _MOST_KEPT + 5


class _WithAnother(World):
    """A world of two, in which the other process has these figures, step by step."""

    def __init__(self, others: Tensor) -> None:
        super().__init__()
        self.size, self.others, self.calls = 2, others, 0

    def add(self, value: Tensor) -> Tensor:
        theirs, self.others = self.others[: len(value)], self.others[len(value) :]
        self.calls += 1
        return value.add_(theirs)


def _figures(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    # Of many magnitudes, so that the order of a sum shows.
    figures = torch.randn(STEPS, 1 + 2 * BUCKETS, generator=generator).mul_(8).exp_()
    figures[:, 1 + BUCKETS :] = torch.randint(0, 9, (STEPS, BUCKETS), generator=generator).float()
    return figures


def _state(window: LossWindow) -> list[float]:
    return torch.cat([tensor.reshape(-1) for tensor in window.tensors().values()]).tolist()


def test_the_sums_are_those_of_all_processes_steps_whose_loss_is_finite_in_all() -> None:
    """Against exact sums; a loss that is infinite here, and one that is no number there, are left out."""
    ours, theirs = _figures(0), _figures(1)
    ours[7, 0], theirs[9, 0] = torch.inf, torch.nan
    world = _WithAnother(theirs)
    window = LossWindow(CPU, world)
    for step in ours:
        window.add(step)
    assert world.calls == 2, "only where as many are kept as may be"
    window.gather()
    assert world.calls == 3
    window.gather()
    assert world.calls == 3, "with nothing left, nobody is waited for"
    both = (ours.double() + theirs.double()).numpy()
    kept = np.isfinite(both[:, 0])
    assert float(window.count) == kept.sum() == STEPS - 2
    assert float(window.sum) == pytest.approx(math.fsum(both[kept, 0]), rel=1e-13)
    expected = [math.fsum(column) for column in both[:, 1:].T]
    assert window.by_sigma.tolist() == pytest.approx(expected, rel=1e-13)
    window.reset()
    assert _state(window) == [0.0] * (2 + 2 * BUCKETS)


def test_when_they_are_gathered_changes_no_bit_and_a_restored_window_goes_on() -> None:
    ours, theirs = _figures(2), _figures(3)
    window = LossWindow(CPU, _WithAnother(theirs))
    often = LossWindow(CPU, _WithAnother(theirs))
    for number, step in enumerate(ours):
        window.add(step)
        often.add(step)
        if number % 3 == 0:
            often.gather()
        if number == 30:
            saved = {name: tensor.clone() for name, tensor in often.tensors().items()}
            often = LossWindow(CPU, _WithAnother(theirs[31:]))
            often.restore(saved)
    window.gather()
    often.gather()
    assert _state(window) == _state(often)


def test_one_process_keeps_nothing_back() -> None:
    window = LossWindow(CPU, World())
    figures = _figures(4)
    for step in figures:
        window.add(step)
        assert float(window.count) > 0
    assert float(window.sum) == pytest.approx(math.fsum(figures[:, 0].tolist()), rel=1e-13)


def test_sums_that_lack_steps_are_not_given_out() -> None:
    window = LossWindow(CPU, _WithAnother(_figures(5)))
    window.add(_figures(6)[0])
    with pytest.raises(AssertionError, match="gather"):
        _ = window.sum
