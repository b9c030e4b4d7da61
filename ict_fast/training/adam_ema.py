"""Adam and the average of the weights: `--optimizer.name adam`, a baseline beside RAdam.

The update is NVIDIA apex's `FusedAdam` where apex is installed with its optimizers and the weights are on a
GPU, else torch's fused Adam. Adam: Kingma & Ba, ICLR 2015, algorithm 1, with an L2 penalty as in
torch.optim.Adam.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ict_kernels import RAdamEMA


class AdamEMA(RAdamEMA):
    """Adam with an EMA of the parameters; arguments, state, attributes and skipped steps as RAdamEMA.

    Attributes:
        engine: "apex" or "torch", whose fused kernel makes the update.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.engine = "apex" if _has_apex(self.grad_norm.device) else "torch"
        self._apex: dict[int, Any] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of Adam and of the EMA; nothing at all where a gradient is not finite."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        cohorts = [(group, c) for group in self.param_groups for c in self._cohorts(group["params"])]
        if not cohorts:
            return loss
        unscale, healthy = self._inspect([p.grad for _, c in cohorts for p in c if p.grad is not None])
        for group, params in cohorts:
            grads = [p.grad for p in params if p.grad is not None]
            if (factor := self._gradient_factor(group, unscale)) is not None:
                grads = list(torch._foreach_mul(grads, factor.to(grads[0].dtype)))
            states = [self._state_of(p) for p in params]
            update = self._update_by_apex if self.engine == "apex" else _update_by_torch
            update(group, params, grads, states, healthy)
            decay = torch.as_tensor(group["ema_decay"], dtype=torch.float64, device=healthy.device)
            weight = torch.where(healthy, 1.0 - decay, 0.0).to(params[0].dtype)
            ema = [state["ema"] for state in states]
            torch._foreach_add_(ema, torch._foreach_mul(torch._foreach_sub(params, ema), weight))
        return loss

    def _update_by_apex(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        states: list[dict[str, Tensor]],
        healthy: Tensor,
    ) -> None:
        """apex.optimizers.FusedAdam on this optimizer's own moments, masked by its overflow flag."""
        from apex.optimizers import FusedAdam

        key = id(params[0])
        if key not in self._apex:
            self._apex[key] = FusedAdam(
                params,
                lr=1.0,
                betas=group["betas"],
                eps=group["eps"],
                adam_w_mode=False,
                weight_decay=group["weight_decay"],
                capturable=True,
            )
        engine, (settings,) = self._apex[key], self._apex[key].param_groups
        settings["params"] = params
        lr = torch.as_tensor(group["lr"], dtype=torch.float32)
        settings["lr"] = lr.to(healthy.device)
        # apex counts its steps ahead of its verdict on the gradients: its count is set anew from ours.
        settings["step"] = states[0]["step"].to(torch.int32).reshape(1)
        engine._dummy_overflow_buf.zero_()
        for p, state in zip(params, states, strict=True):
            engine.state[p] = {name: state[name] for name in ("exp_avg", "exp_avg_sq")}
        kept = [p.grad for p in params]
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        engine.step(grad_scaler=_Verdict((~healthy).float().reshape(1)))
        for p, before in zip(params, kept, strict=True):
            p.grad = before
        steps = [state["step"] for state in states]
        torch._foreach_add_(steps, [healthy.to(torch.float32)] * len(steps))


class _Verdict:
    """What FusedAdam asks of a gradient scaler: whether to skip, and a scale, which is 1 here."""

    def __init__(self, found_inf: Tensor) -> None:
        self._found_inf = found_inf

    def _check_inf_per_device(self, optimizer: object) -> dict[torch.device, Tensor]:
        return {self._found_inf.device: self._found_inf}

    def _get_scale_async(self) -> Tensor:
        return torch.ones_like(self._found_inf)


def _update_by_torch(
    group: dict[str, Any],
    params: list[Tensor],
    grads: list[Tensor],
    states: list[dict[str, Tensor]],
    healthy: Tensor,
) -> None:
    beta1, beta2 = group["betas"]
    lr = group["lr"].float() if isinstance(group["lr"], Tensor) else group["lr"]
    skip = (~healthy).to(torch.float32)
    steps = [state["step"] for state in states]
    torch._foreach_add_(steps, 1.0)
    torch._fused_adam_(
        params,
        grads,
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        steps,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        amsgrad=False,
        maximize=False,
        found_inf=skip,
    )
    torch._foreach_sub_(steps, [skip] * len(steps))


def _has_apex(device: torch.device) -> bool:
    """Whether FusedAdam can be used: amp_C is NVIDIA's extension, which PyPI's package of the name lacks."""
    return device.type in _APEX_DEVICES and importlib.util.find_spec("amp_C") is not None


_APEX_DEVICES = ("cuda",)
