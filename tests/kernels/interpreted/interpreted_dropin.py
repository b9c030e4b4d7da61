"""The drop-in by the kernels, in the interpreter: replaced blocks, seeded dropout, the losses of adapters."""

from __future__ import annotations

import copy
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ict_kernels import GroupNormSiLU, seed_dropout, set_backend, triton_support
from ict_kernels.adapters import diffusers_cm, hf_trainers, kinyugo
from ict_kernels.adapters.ect import ECMLoss

sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))
theirs: Any = importlib.import_module("other_trainers")


def by_kernels_and_by_definition(compute: Any) -> tuple[Any, Any, int]:
    """Both results, and how many kernels the first took."""
    launches: list[Any] = []
    original = triton_support.launch

    def counted(kernel: Any, grid: Any, **options: Any) -> None:
        launches.append(kernel)
        original(kernel, grid, **options)

    modules = [
        m for name, m in sys.modules.items() if name.startswith("ict_kernels.") and hasattr(m, "launch")
    ]
    with pytest.MonkeyPatch.context() as patch:
        for module in modules:
            patch.setattr(module, "launch", counted)
        ours = compute()
        set_backend("eager")
        count = len(launches)
        expected = compute()
        set_backend("auto")
        assert len(launches) == count
    return ours, expected, count


def test_a_replaced_block_with_seeded_dropout() -> None:
    torch.manual_seed(0)
    block = theirs.ResBlock(8, 6, 0.3, use_scale_shift_norm=True, num_groups=4)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    x, emb = torch.randn(2, 8, 4, 4), torch.randn(2, 6)
    seed_dropout(block, seed=2)
    plain = copy.deepcopy(block)
    GroupNormSiLU.replace_in(block)

    def pass_of(network: nn.Module) -> Any:
        output = network(x, emb)
        return [output, *torch.autograd.grad(output.square().sum(), list(network.parameters()))]

    ours, expected, launches = by_kernels_and_by_definition(lambda: pass_of(block))
    assert launches >= 4  # two norms, forward and backward
    for a, b, c in zip(ours, expected, pass_of(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(a, c, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "loss",
    [
        lambda a, b, w: diffusers_cm.consistency_loss(a, b, w),
        lambda a, b, w: kinyugo.pseudo_huber_loss(a, b, w).sum(),
        lambda a, b, w: hf_trainers.conditional_loss(a, b, "sum", "huber", 0.1),
        lambda a, b, w: ECMLoss(c=0.03)(lambda x, sigma, labels: a * x, b).sum(),
    ],
    ids=["diffusers", "kinyugo", "hf", "ect"],
)
def test_the_adapters_losses(loss: Any) -> None:
    a, b = torch.randn(3, 3, 5, 5, requires_grad=True), torch.randn(3, 3, 5, 5)
    weight = torch.tensor([1.0, 5.0, 0.1])

    def compute() -> Any:
        torch.manual_seed(1)
        value = loss(a, b, weight)
        return value, *torch.autograd.grad(value, a)

    ours, expected, launches = by_kernels_and_by_definition(compute)
    assert launches >= 2  # forward and backward
    for x, y in zip(ours, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
