"""RAdam and the exponential moving average of the weights, in one step that never waits for the host.

With g the gradient, t the step, b1, b2 = betas (Liu et al., "On the variance of the adaptive learning rate
and beyond", ICLR 2020, algorithm 2; eps as in torch.optim.RAdam):

    m   <- b1 m + (1 - b1) g                    v <- b2 v + (1 - b2) g^2
    rho <- rho_inf - 2 t b2^t / (1 - b2^t)      rho_inf = 2 / (1 - b2) - 1
    r   <- sqrt((rho - 4)(rho - 2) rho_inf / ((rho_inf - 4)(rho_inf - 2) rho))
    p   <- p - lr m / (1 - b1^t) * (r sqrt(1 - b2^t) / (sqrt(v) + eps) if rho > 5 else 1)
    ema <- decay ema + (1 - decay) p

A step whose gradients are not all finite changes nothing, not one bit, and does not count: the decision
is a tensor.

Bytes per fp32 parameter, at least: 20 read (p, g, m, v, ema) and 16 written.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

# Switches of torch.optim.RAdam that change the mathematics; a state dict that has one set is not ours to
# continue.
_FOREIGN_SWITCHES = ("maximize", "decoupled_weight_decay")


class RAdamEMA(Optimizer):
    """RAdam with an EMA of the parameters; the same steps as torch.optim.RAdam.

    State of each parameter, on its device: `step` (0-dim fp32), `exp_avg`, `exp_avg_sq` (named as
    torch.optim.RAdam names them) and `ema`, the last three in the parameter's dtype and memory format. A
    state dict of torch.optim.RAdam loads too. The EMA starts from the parameters at the first step or first
    look at `ema_parameters()`, whichever comes first; so load pretrained weights before.

    A parameter without a gradient is left alone, its EMA too, as in torch.optim.

    Attributes:
        grad_scale: 0-dim device tensor or None (or absent): gradients are divided by it. torch.amp.GradScaler
            sets it.
        found_inf: device tensor or None (or absent): not 0 skips the step. torch.amp.GradScaler sets it.
        grad_norm: 0-dim fp32, L2 norm over all gradients of the last step, after division by grad_scale.
        last_step_skipped: 0-dim bool, whether the last step was skipped, its gradients (or their squared
            norm) not being finite.
        skipped: 0-dim int64, number of skipped steps since this object was made; not part of the state dict.

    Args:
        params: parameters or groups, real and dense, all on one device.
        lr: learning rate, a float or a 0-dim device tensor, which a schedule may then change in place.
        betas: decay of the first and second moment, each in [0, 1).
        eps: added to sqrt(v).
        weight_decay: L2 penalty, added to the gradient as torch.optim.RAdam does by default.
        ema_decay: decay of the average, in [0, 1]; a float or a 0-dim device tensor.
    Raises:
        ValueError: for a value out of range, complex parameters, or several devices.
    """

    # torch.amp.GradScaler then sets grad_scale and found_inf instead of reading found_inf on the host. It
    # deletes both after the step and multiplies by a grad_scale that it finds, so neither has a default here.
    _step_supports_amp_scaling = True
    grad_scale: Tensor | None
    found_inf: Tensor | None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        ema_decay: float | Tensor = 0.9999,
    ) -> None:
        if not isinstance(lr, Tensor) and not lr >= 0.0:
            raise ValueError(f"lr must be at least 0, got {lr}")
        if not (0.0 <= betas[0] < 1.0 and 0.0 <= betas[1] < 1.0):
            raise ValueError(f"betas must be in [0, 1), got {betas}")
        if not eps >= 0.0:
            raise ValueError(f"eps must be at least 0, got {eps}")
        if not weight_decay >= 0.0:
            raise ValueError(f"weight_decay must be at least 0, got {weight_decay}")
        if not isinstance(ema_decay, Tensor) and not 0.0 <= ema_decay <= 1.0:
            raise ValueError(f"ema_decay must be in [0, 1], got {ema_decay}")
        # Parameters that have had a gradient in the same steps are a cohort: their `step` is equal, so they
        # share the step's scalars. The host keeps the cohorts; to read `step` would be a synchronisation.
        self._cohort: dict[Tensor, int] = {}
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "ema_decay": ema_decay},
        )
        device = self._parameters()[0].device
        self.grad_norm = torch.zeros((), dtype=torch.float32, device=device)
        self.last_step_skipped = torch.zeros((), dtype=torch.bool, device=device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch.optim.Optimizer.add_param_group; complex parameters and a second device are refused."""
        super().add_param_group(param_group)
        devices = {p.device for p in self._parameters()}
        if len(devices) > 1:
            raise ValueError(f"all parameters must be on one device, got {sorted(map(str, devices))}")
        for p in param_group["params"]:
            if p.is_complex():
                raise ValueError(f"complex parameters are not supported, got {p.dtype}")
            self._cohort[p] = len(self.param_groups)

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _state_of(self, p: Tensor) -> dict[str, Tensor]:
        state = self.state[p]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        if "ema" not in state:
            state["ema"] = p.detach().clone(memory_format=torch.preserve_format)
        return state

    def ema_parameters(self) -> Iterator[Tensor]:
        """The averaged parameters, in the order of the parameters: the state itself, not copies."""
        for p in self._parameters():
            yield self._state_of(p)["ema"]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of RAdam and of the EMA; nothing at all where a gradient is not finite.

        Args:
            closure: re-evaluates the model and returns the loss, as for any torch.optim.Optimizer.
        Returns:
            What the closure returned, or None.
        Raises:
            RuntimeError: for sparse gradients.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with_grad = [p for p in self._parameters() if p.grad is not None]
        if not with_grad:
            return loss
        if any(p.grad.is_sparse for p in with_grad if p.grad is not None):
            raise RuntimeError("sparse gradients are not supported")
        unscale, healthy = self._inspect([p.grad for p in with_grad if p.grad is not None])
        for group in self.param_groups:
            for params in self._cohorts(group["params"]):
                self._update(group, params, unscale, healthy)
        return loss

    def _cohorts(self, params: list[Tensor]) -> list[list[Tensor]]:
        """The parameters with a gradient, by dtype and cohort; a cohort that steps in part is split."""
        missing = {self._cohort[p] for p in params if p.grad is None}
        unused = max(self._cohort.values()) + 1
        renamed: dict[int, int] = {}
        cohorts: dict[tuple[torch.dtype, int], list[Tensor]] = {}
        for p in params:
            if p.grad is not None:
                if self._cohort[p] in missing:
                    self._cohort[p] = renamed.setdefault(self._cohort[p], unused + len(renamed))
                cohorts.setdefault((p.dtype, self._cohort[p]), []).append(p)
        return list(cohorts.values())

    def _inspect(self, grads: list[Tensor]) -> tuple[Tensor | None, Tensor]:
        """(1 / grad_scale or None, whether this step may happen); updates the three public figures."""
        wide = torch.float64 if any(g.dtype == torch.float64 for g in grads) else torch.float32
        norms = [n.to(wide) for n in torch._foreach_norm(grads, 2, dtype=wide)]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        grad_scale: Tensor | None = getattr(self, "grad_scale", None)
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        unscale = None
        if grad_scale is not None:
            unscale = grad_scale.to(norm.device, torch.float64).reshape(()).reciprocal()
            norm = (norm * unscale).to(wide)
        healthy = torch.isfinite(norm)
        if found_inf is not None:
            healthy = healthy & (found_inf.to(norm.device).reshape(()) == 0)
        self.grad_norm.copy_(norm)
        torch.logical_not(healthy, out=self.last_step_skipped)
        self.skipped.add_(self.last_step_skipped)
        return unscale, healthy

    def _update(
        self, group: dict[str, Any], params: list[Tensor], unscale: Tensor | None, healthy: Tensor
    ) -> None:
        """New values beside the old ones, then a choice between them: no factor of 0 takes a NaN back."""
        states = [self._state_of(p) for p in params]
        steps, m, v, ema = (
            [state[name] for state in states] for name in ("step", "exp_avg", "exp_avg_sq", "ema")
        )
        grads = [p.grad for p in params if p.grad is not None]
        beta1, beta2 = group["betas"]
        if unscale is not None:
            grads = list(torch._foreach_mul(grads, unscale.to(_scalar_dtype(grads[0]))))
        if any(g.dtype != p.dtype for g, p in zip(grads, params, strict=True)):
            grads = [g.to(p.dtype) for g, p in zip(grads, params, strict=True)]
        if group["weight_decay"] != 0.0:
            grads = list(torch._foreach_add(grads, params, alpha=group["weight_decay"]))
        dtype = _scalar_dtype(params[0])
        size, rectified = step_size(steps[0].to(torch.float64) + 1.0, group["lr"], beta1, beta2)

        new_m = torch._foreach_lerp(m, grads, 1 - beta1)
        new_v = torch._foreach_mul(v, beta2)
        torch._foreach_addcmul_(new_v, grads, grads, 1 - beta2)
        # sqrt(v) + eps once rectified, 1 before: multiplied by 1 and 0 added, or by 0 and 1 added.
        denominator = torch._foreach_sqrt(new_v)
        torch._foreach_add_(denominator, group["eps"])
        torch._foreach_mul_(denominator, rectified.to(dtype))
        _add_scalar_(denominator, (1.0 - rectified).to(dtype))
        new_p = torch._foreach_div(new_m, denominator)
        torch._foreach_mul_(new_p, (-size).to(dtype))
        torch._foreach_add_(new_p, params)
        decay = torch.as_tensor(group["ema_decay"], dtype=torch.float64, device=size.device)
        new_ema = torch._foreach_mul(ema, decay.to(dtype))
        torch._foreach_add_(new_ema, torch._foreach_mul(new_p, (1.0 - decay).to(dtype)))

        _add_scalar_(steps, healthy.to(torch.float32))
        for new, old in ((new_p, params), (new_m, m), (new_v, v), (new_ema, ema)):
            for new_tensor, old_tensor in zip(new, old, strict=True):
                # A 0-dim fp32 scalar promotes a bf16 parameter that is itself 0-dim.
                torch.where(healthy, new_tensor.to(old_tensor.dtype), old_tensor, out=old_tensor)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state dict of this class, to the last bit, or of torch.optim.RAdam (with a fresh EMA).

        Nothing is shared with `state_dict` afterwards. Where this optimizer's lr or ema_decay is a tensor it
        stays that tensor and takes the loaded value, so that a compiled or captured step goes on reading it.

        Raises:
            ValueError: if the groups do not fit, or the dict was made with maximize or
                decoupled_weight_decay.
        """
        for switch in _FOREIGN_SWITCHES:
            if any(group.get(switch) for group in state_dict["param_groups"]):
                raise ValueError(f"cannot continue a state dict that was made with {switch}=True")
        before = [dict(group) for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, old in zip(self.param_groups, before, strict=True):
            for name, value in old.items():
                if name == "params":
                    continue
                loaded = group.get(name, value)
                if isinstance(value, Tensor):
                    loaded = value if loaded is value else value.fill_(loaded)
                elif isinstance(loaded, Tensor):
                    loaded = loaded.to(self.grad_norm.device)
                group[name] = loaded
            for name in set(group) - set(old):
                del group[name]
        ranks: dict[float, int] = {}
        for p in self._parameters():
            state = self.state[p]
            if "step" in state:
                step = torch.as_tensor(state["step"], dtype=torch.float32, device=p.device)
                state["step"] = step.clone().reshape(())
            self._cohort[p] = ranks.setdefault(float(state.get("step", 0.0)), len(ranks))
            for name in ("exp_avg", "exp_avg_sq", "ema"):
                if name in state:
                    if state[name].shape != p.shape:
                        raise ValueError(
                            f"{name} of shape {tuple(state[name].shape)} does not fit "
                            f"a parameter of shape {tuple(p.shape)}"
                        )
                    like = torch.empty_like(p, memory_format=torch.preserve_format, requires_grad=False)
                    state[name] = like.copy_(state[name])


def step_size(step: Tensor, lr: float | Tensor, beta1: float, beta2: float) -> tuple[Tensor, Tensor]:
    """RAdam's scalars of one step, on the device.

    Args:
        step: t, 0-dim float64, 1 for the first step.
        lr: learning rate, float or 0-dim tensor.
        beta1, beta2: decay of the moments.
    Returns:
        (size, rectified), 0-dim float64: p changes by -size m / (sqrt(v) + eps) where rectified is 1, by
        -size m where 0.
    Source:
        Liu et al. 2020, algorithm 2.
    """
    if isinstance(lr, Tensor):
        lr = lr.to(step.device, torch.float64)
    correction1 = 1.0 - torch.pow(beta1, step)
    correction2 = 1.0 - torch.pow(beta2, step)
    rho_inf = 2.0 / (1.0 - beta2) - 1.0
    rho = rho_inf - 2.0 * step * (1.0 - correction2) / correction2
    rectified = rho > 5.0
    variance = (rho - 4.0) * (rho - 2.0) * rho_inf / ((rho_inf - 4.0) * (rho_inf - 2.0) * rho)
    rectification = torch.where(rectified, variance, 1.0).sqrt()
    adaptive = rectification * correction2.sqrt()
    return lr / correction1 * torch.where(rectified, adaptive, 1.0), rectified.to(torch.float64)


def _add_scalar_(tensors: Sequence[Tensor], scalar: Tensor) -> None:
    """Adds a 0-dim device tensor. torch._foreach_add_ would take its overload for numbers: a host read."""
    torch.ops.aten._foreach_add_.Tensor(tensors, scalar)


def _scalar_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of step scalars for a tensor: never below fp32, where 0.9999 would round to 1."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
