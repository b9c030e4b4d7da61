"""Set-up of the adapters' tests: the other code bases, restated, and a network with dropout."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

TRAINERS = Path(__file__).parents[3] / "benchmarks/other_trainers.py"


@pytest.fixture
def theirs() -> Any:
    """benchmarks/other_trainers.py; what a test patches in it is its own."""
    spec = importlib.util.spec_from_file_location("other_trainers", TRAINERS)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)  # and not into sys.modules, where other tests' copy may be
    return module


@pytest.fixture
def a_module() -> Callable[..., ModuleType]:
    """Somebody's module: a name and what it defines."""

    def make(name: str, **members: Any) -> ModuleType:
        module = ModuleType(name)
        module.__dict__.update(members)
        return module

    return make


class Recording(nn.Module):
    """A network with dropout that remembers its inputs and masks; F(x, noise level, **ignored)."""

    def __init__(self, dropout: float = 0.4, channels: int = 3) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(channels, 8, 3, padding=1), nn.Conv2d(8, channels, 1)
        self.dropout = nn.Dropout(dropout)
        self.inputs: list[tuple[Tensor, ...]] = []
        self.masks: list[Tensor] = []
        self.with_gradient: list[bool] = []

    def forward(self, x: Tensor, level: Tensor, *labels: Any, **_: Any) -> Tensor:
        hidden = self.dropout(self.first(x) + 0.1 * level.reshape(-1, 1, 1, 1).tanh())
        if not torch.compiler.is_compiling():
            self.inputs.append((x.detach(), level.detach()))
            self.masks.append(hidden.detach() == 0)
            self.with_gradient.append(torch.is_grad_enabled())
        return self.last(hidden)


@pytest.fixture
def network() -> Recording:
    torch.manual_seed(0)
    return Recording()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)


def exact_huber(a: Tensor, b: Tensor, c: float) -> Tensor:
    """(N,), the paper's metric over whole images, in float64."""
    return ((a.double() - b.double()).flatten(1).square().sum(1) + c**2).sqrt() - c


def exact_elementwise(a: Tensor, b: Tensor, c: float) -> Tensor:
    """(N,), the metric that several code bases have instead."""
    return (((a.double() - b.double()).flatten(1).square() + c**2).sqrt() - c).mean(1)


@pytest.fixture
def exact() -> Any:
    """Both metrics, in float64."""
    from types import SimpleNamespace

    return SimpleNamespace(huber=exact_huber, elementwise=exact_elementwise)


def gradients_of(network: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(network.parameters())))


@pytest.fixture
def same_gradients() -> Callable[..., None]:
    """Checks the gradients of a loss against those of another, of the network's copy in float64."""

    def check(network: nn.Module, loss: Tensor, exact_network: nn.Module, exact_loss: Tensor) -> None:
        pairs = zip(gradients_of(network, loss), gradients_of(exact_network, exact_loss), strict=True)
        for ours, expected in pairs:
            atol = 1e-4 * float(expected.abs().max())
            torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=atol)

    return check
