"""Adam with the average of the weights, against torch.optim.Adam and with apex's published interface."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from ict_fast.config import Config
from ict_fast.training import adam_ema
from ict_fast.training.adam_ema import AdamEMA
from ict_fast.training.trainer import train

# apex.optimizers.FusedAdam as published: its arguments, its state, its overflow flag, its steps counted
# ahead of the verdict; the arithmetic is torch's.
STAND_IN = """
import torch


class FusedAdam(torch.optim.Optimizer):
    made = []

    def __init__(self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True,
                 weight_decay=0.0, amsgrad=False, set_grad_none=True, capturable=False):
        assert capturable and not adam_w_mode and bias_correction
        super().__init__(params, dict(lr=torch.tensor(lr), betas=betas, eps=eps, weight_decay=weight_decay))
        self._dummy_overflow_buf = torch.tensor([0])
        FusedAdam.made.append(self)

    def step(self, closure=None, grad_scaler=None):
        for group in self.param_groups:
            group["step"] += (self._dummy_overflow_buf != 1).to(torch.int)
            device = group["params"][0].device
            self._dummy_overflow_buf.copy_(grad_scaler._check_inf_per_device(self)[device])
            inverse = grad_scaler._get_scale_async().double().reciprocal().float().reshape(())
            if self._dummy_overflow_buf == 1:
                continue
            for p in group["params"]:
                state = self.state[p]
                step = group["step"].item()
                g = p.grad * inverse + group["weight_decay"] * p
                beta1, beta2 = group["betas"]
                state["exp_avg"].mul_(beta1).add_((1 - beta1) * g)
                state["exp_avg_sq"].mul_(beta2).add_((1 - beta2) * g * g)
                m, v = state["exp_avg"] / (1 - beta1**step), state["exp_avg_sq"] / (1 - beta2**step)
                p.sub_(group["lr"] * m / (v.sqrt() + group["eps"]))
"""


@pytest.fixture(params=["torch", "apex"])
def engine(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "apex":
        (tmp_path / "apex").mkdir()
        (tmp_path / "apex/__init__.py").touch()
        (tmp_path / "apex/optimizers.py").write_text(STAND_IN)
        (tmp_path / "amp_C.py").touch()
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(adam_ema, "_APEX_DEVICES", ("cpu",))
        for name in ("apex", "apex.optimizers"):
            monkeypatch.delitem(sys.modules, name, raising=False)
            monkeypatch.setitem(sys.modules, name, None)
            monkeypatch.delitem(sys.modules, name)
    return request.param


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 5), (7,), ())]


def set_gradients(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step + 1)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_the_steps_are_those_of_torch_in_float64(engine: str, weight_decay: float) -> None:
    ours, theirs = parameters(), [nn.Parameter(p.detach().double()) for p in parameters()]
    settings = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": weight_decay}
    optimizer, reference = AdamEMA(ours, **settings, ema_decay=0.9), torch.optim.Adam(theirs, **settings)
    assert optimizer.engine == engine
    ema = [p.detach().clone() for p in theirs]
    for step in range(20):
        for params, each in ((ours, optimizer), (theirs, reference)):
            set_gradients(params, step)
            each.step()
        ema = [0.9 * average + 0.1 * p.detach() for average, p in zip(ema, theirs, strict=True)]
    for p, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.double(), right, rtol=1e-5, atol=1e-6)
    for average, right in zip(optimizer.ema_parameters(), ema, strict=True):
        torch.testing.assert_close(average.double(), right, rtol=1e-5, atol=1e-6)
    assert all(optimizer.state[p]["step"] == 20 for p in ours)


def test_clipping_is_that_of_torchs_clip_grad_norm(engine: str) -> None:
    ours, theirs = parameters(), parameters()
    optimizer, reference = AdamEMA(ours, lr=0.01, max_norm=2.0), torch.optim.Adam(theirs, lr=0.01)
    for step in range(6):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        assert nn.utils.clip_grad_norm_(theirs, 2.0) > 2.0
        optimizer.step()
        reference.step()
    for name in ("exp_avg", "exp_avg_sq"):  # the steps hardly depend on the gradient's size
        for p, right in zip(ours, theirs, strict=True):
            found, expected = optimizer.state[p][name], reference.state[right][name]
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_gradients_are_divided_by_their_scale(engine: str) -> None:
    """Which changes from step to step; powers of two divide exactly."""
    plain, scaled = parameters(), parameters()
    one, other = AdamEMA(plain, lr=0.01, ema_decay=0.9), AdamEMA(scaled, lr=0.01, ema_decay=0.9)
    for step in range(4):
        for params in (plain, scaled):
            set_gradients(params, step)
        torch._foreach_mul_([p.grad for p in scaled], 2.0**step)
        other.grad_scale = torch.tensor(2.0**step)
        one.step()
        other.step()
    for p, q in zip(plain, scaled, strict=True):
        assert torch.equal(p, q)
        assert all(torch.equal(other.state[q][name], value) for name, value in one.state[p].items())


def test_a_step_that_is_not_finite_changes_no_bit_and_does_not_count(engine: str) -> None:
    params = parameters()
    optimizer = AdamEMA(params, lr=0.01, ema_decay=0.9)
    for step in range(3):
        set_gradients(params, step)
        optimizer.step()
    before = [p.detach().clone() for p in params]
    state = [{name: value.clone() for name, value in optimizer.state[p].items()} for p in params]
    set_gradients(params, 3)
    params[1].grad[2] = torch.nan
    optimizer.step()
    assert bool(optimizer.last_step_skipped)
    for p, kept, entries in zip(params, before, state, strict=True):
        assert torch.equal(p, kept)
        assert all(torch.equal(optimizer.state[p][name], value) for name, value in entries.items())
    set_gradients(params, 4)
    optimizer.step()
    assert all(optimizer.state[p]["step"] == 4 for p in params)


def test_a_run_with_adam_resumes_bit_for_bit(one_level: Config, tmp_path: Path) -> None:
    config = replace(one_level, optimizer=replace(one_level.optimizer, name="adam"))
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for out in (whole, broken):
        assert train(config, out=out, device="cpu").step == 24
    shutil.rmtree(broken / "checkpoints/step-00000024")
    assert train(config, out=broken, device="cpu").step == 24
    for name in ("weights", "ema", "optimizer"):
        files = (out / f"checkpoints/step-00000024/{name}.safetensors" for out in (whole, broken))
        first, second = (file.read_bytes() for file in files)
        assert first == second
