"""RAdam and the exponential moving average of the weights, in one step that never waits for the host.

With g the gradient, t the step, b1, b2 = betas (Liu et al., "On the variance of the adaptive learning rate
and beyond", ICLR 2020, algorithm 2; eps, and rho > 5 where the paper has 4, as in torch.optim.RAdam):

    m   <- b1 m + (1 - b1) g                    v <- b2 v + (1 - b2) g^2
    rho <- rho_inf - 2 t b2^t / (1 - b2^t)      rho_inf = 2 / (1 - b2) - 1
    r   <- sqrt((rho - 4)(rho - 2) rho_inf / ((rho_inf - 4)(rho_inf - 2) rho))
    p   <- p - lr m / (1 - b1^t) * (r sqrt(1 - b2^t) / (sqrt(v) + eps) if rho > 5 else 1)
    ema <- ema + (1 - decay) (p - ema)          as torch.lerp, which begins from p where decay < 1/2

With a max_norm, g is first multiplied by min(1, max_norm / norm), norm the L2 norm over all gradients.

A step whose gradients are not all finite changes nothing, not one bit, and does not count: the decision
is a tensor.

Bytes per fp32 parameter, at least: 20 read (p, g, m, v, ema) and 16 written. The kernels move 40: whether
all gradients are finite must be known before the first value is written, so g is read once more.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .backend import use_triton
from .radam_ema_kernels import launch_norm, launch_scalars, launch_update
from .radam_ema_tables import STATE, Plan, fits, misfit

# Switches of torch.optim.RAdam that change the mathematics; a state dict that has one set is not ours to
# continue.
_FOREIGN_SWITCHES = ("maximize", "decoupled_weight_decay")
# What else torch.optim.RAdam keeps in its groups; means nothing here.
_FOREIGN_OPTIONS = (*_FOREIGN_SWITCHES, "foreach", "capturable", "differentiable")

# What Adam and NAdam of torch keep in their groups, and RAdam does not; their moments have the same names.
_OPTIONS_OF_OTHERS = ("amsgrad", "momentum_decay")

_BEGINS = -1  # the cohort of parameters that have made no step yet

_WARM_UP = (
    "RAdamEMA.step() must make its state or its tables of addresses, which a CUDA graph cannot record:"
    " take one step with gradients for the same parameters before the capture"
)

_SHARDED = (
    "sharded parameters (DTensor, of fully_shard or tensor parallelism) are not supported: the kernels would"
    " read no memory of theirs, and processes would not agree on steps to skip; use DistributedDataParallel"
)


# The same as torch.compiler.disable, but Dynamo is imported by the first call and not by this module.
_not_traced = getattr(torch, "_disable_dynamo", None) or torch.compiler.disable
# torch's own, without what keeps them out of graphs: that imports Dynamo, a third of a short run's start.
_add_param_group = getattr(Optimizer.add_param_group, "__wrapped__", Optimizer.add_param_group)
_state_dict = getattr(Optimizer.state_dict, "__wrapped__", Optimizer.state_dict)
_load_state_dict = getattr(Optimizer.load_state_dict, "__wrapped__", Optimizer.load_state_dict)


class RAdamEMA(Optimizer):
    """RAdam with an EMA of the parameters; the same steps as torch.optim.RAdam.

    State of each parameter, on its device: `step` (0-dim fp32), `exp_avg`, `exp_avg_sq` (named as
    torch.optim.RAdam names them) and `ema`, the last three in the parameter's dtype and memory format. A
    state dict of torch.optim.RAdam loads too. The EMA starts from the parameters at the first step or first
    look at `ema_parameters()`, whichever comes first; so load pretrained weights, and move the network to its
    device, before.

    Parameters should be fp32, and 16 bits autocast's: an average in 16 bits stops short of the weights, with
    the default decay where it began. Nor does v fall in bf16, and in fp16 eps is 0, which makes a NaN of a
    gradient of 0; both are so in torch.optim.RAdam.

    A parameter without a gradient is left alone, its EMA too, as in torch.optim.

    A process judges the gradients that it has. DistributedDataParallel gives all processes the same; where
    each has its own (ZeroRedundancyOptimizer, FullyShardedDataParallel), set `found_inf`, or some skip a step
    that others take.

    The Triton kernels (see `set_backend`) take three launches for the parameters of a group that have had
    gradients in the same steps, however many. They take fp32 parameters without gaps in memory, and gradients
    of any layout, which cost a copy where the layout is not the parameter's; other parameters go the eager
    way in the same step. torch.compile leaves the kernels' step as it is, at a graph break. A CUDA graph can
    hold the step after one step outside it; capture anew once a state dict has been loaded, or a parameter or
    its set of gradients has changed.

    Attributes:
        grad_scale: 0-dim device tensor or None (or absent): gradients are divided by it. torch.amp.GradScaler
            sets it.
        found_inf: device tensor or None (or absent): not 0 skips the step. torch.amp.GradScaler sets it.
        grad_norm: 0-dim fp32, L2 norm over all gradients of the last step, after division by grad_scale and
            before they are clipped.
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
        max_norm: the L2 norm over all gradients (of every group) that clipping brings a larger one down to,
            as torch.nn.utils.clip_grad_norm_, but on the device and in the same pass; None: no clipping.
    Raises:
        ValueError: for a value out of range, a tensor of another shape, complex or sharded parameters, or
            several devices.
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
        max_norm: float | None = None,
    ) -> None:
        # Parameters that have had a gradient in the same steps are a cohort: their `step` is equal, so they
        # share the step's scalars. The host keeps the cohorts; to read `step` would be a synchronisation.
        self._cohort: dict[Tensor, int] = {}
        # The kernels' tables, by a cohort's first parameter; those that CUDA graphs read stay for good.
        self._plans: dict[Tensor, Plan] = {}
        self._captured: dict[int, Plan] = {}
        defaults: dict[str, Any] = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "ema_decay": ema_decay,
            "max_norm": max_norm,
        }
        _check_options(defaults)
        super().__init__(params, defaults)
        self._make_figures()

    def _make_figures(self) -> None:
        device = next((p.device for p in self._parameters()), None)
        self.grad_norm = torch.zeros((), dtype=torch.float32, device=device)
        self.last_step_skipped = torch.zeros((), dtype=torch.bool, device=device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)

    def _follow(self, device: torch.device) -> None:
        """Takes the figures to where the parameters have gone: networks may move before the first step."""
        if self.grad_norm.device != device:
            for name in ("grad_norm", "last_step_skipped", "skipped"):
                setattr(self, name, getattr(self, name).to(device))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As torch.optim.Optimizer's; a deep copy or a pickle holds the groups and the state alone."""
        super().__setstate__(state)
        if "_cohort" not in self.__dict__:
            self._cohort, self._plans, self._captured = {}, {}, {}
            self._find_cohorts()
            self._make_figures()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch.optim.Optimizer's; what the constructor would refuse is refused here too."""
        _check_options(self.defaults | param_group)
        _add_param_group(self, param_group)
        devices = {p.device for p in self._parameters()}
        unsupported = {p.dtype for p in param_group["params"] if p.is_complex()}
        sharded = any(map(_is_sharded, param_group["params"]))
        if len(devices) > 1 or unsupported or sharded:
            self.param_groups.pop()
        if len(devices) > 1:
            raise ValueError(f"all parameters must be on one device, got {sorted(map(str, devices))}")
        if unsupported:
            raise ValueError(f"complex parameters are not supported, got {unsupported.pop()}")
        if sharded:
            raise ValueError(_SHARDED)

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _state_of(self, p: Tensor) -> dict[str, Tensor]:
        state = self.state[p]
        if "step" in state and "ema" in state:
            return state
        with torch.inference_mode(False), torch.no_grad():  # a first look may come in inference mode
            if "step" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            if "ema" not in state:
                state["ema"] = p.detach().clone(memory_format=torch.preserve_format)
        return state

    def ema_parameters(self) -> Iterator[Tensor]:
        """The averaged parameters, in the order of the optimizer's groups: the state itself, not copies.

        That need not be the order of network.parameters(); `ema_state_dict` goes by name.
        """
        yield from map(self._average_of, self._parameters())

    def ema_state_dict(self, module: nn.Module) -> dict[str, Tensor]:
        """A module's state dict with the averages in the parameters' places; buffers are the module's.

        To evaluate, for load_state_dict of a copy, and for files. As in a module's own state dict the tensors
        are no copies: the next step changes them.

        Args:
            module: holds parameters of this optimizer; may be wrapped, or a part. What is frozen and not the
                optimizer's stays as it is.
        Raises:
            ValueError: for a parameter that has no average here: the optimizer does not hold it, and it is
                trained; or the optimizer holds none of the module's, which is a copy then.
        """
        weights: dict[str, Any] = module.state_dict(keep_vars=True)
        held = set(self._parameters())
        is_copy = held.isdisjoint(each for each in weights.values() if isinstance(each, nn.Parameter))
        for name, value in weights.items():
            if isinstance(value, nn.Parameter) and value in held:
                weights[name] = self._average_of(value)
            elif isinstance(value, nn.Parameter) and (value.requires_grad or is_copy):
                raise ValueError(f"{name} is not among this optimizer's parameters, and so has no average")
            elif isinstance(value, Tensor):
                weights[name] = value.detach()
        return weights

    def _average_of(self, p: Tensor) -> Tensor:
        if "step" not in self.state[p]:
            self._cohort[p] = _BEGINS
        return self._state_of(p)["ema"]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of RAdam and of the EMA; nothing at all where a gradient is not finite.

        Args:
            closure: re-evaluates the model and returns the loss, as for any torch.optim.Optimizer.
        Returns:
            What the closure returned, or None.
        Raises:
            RuntimeError: for sparse gradients; where a parameter has changed its shape, and its state or its
                gradient has not. Nothing has changed then.
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
        self._follow(with_grad[0].device)
        cohorts = [(group, c) for group in self.param_groups for c in self._cohorts(group["params"])]
        by_kernels = [use_triton(*params) for _, params in cohorts]
        if any(by_kernels):
            self._step_by_kernels(cohorts, by_kernels)
        else:
            self._check_shapes(with_grad)
            unscale, healthy = self._inspect([p.grad for p in with_grad if p.grad is not None])
            for group, params in cohorts:
                self._update(group, params, unscale, healthy)
        return loss

    def _cohorts(self, params: list[Tensor]) -> list[list[Tensor]]:
        """The parameters with a gradient, by dtype and cohort; a cohort that steps in part is split."""
        if moved := [p for p in params if p not in self._cohort and "step" in self.state.get(p, {})]:
            # In another's place, with its state: of how many steps, the host has to read.
            if any(map(_is_sharded, moved)):
                raise ValueError(_SHARDED)
            if _capturing(moved[0].device):
                raise RuntimeError(_WARM_UP)
            self._find_cohorts()
        # Those that begin, too: whose state was taken away, or only made to be looked at.
        missing = {_BEGINS} | {self._cohort.get(p) for p in params if p.grad is None}
        unused = max([0, *self._cohort.values()]) + 1
        renamed: dict[int, int] = {}
        cohorts: dict[tuple[torch.dtype, int], list[Tensor]] = {}
        for p in params:
            if p.grad is not None:
                known = self._cohort[p] if "step" in self.state[p] else _BEGINS
                if known in missing:
                    if _is_sharded(p):  # put in the place of one that was not, as accelerate does
                        raise ValueError(_SHARDED)
                    self._cohort[p] = renamed.setdefault(known, unused + len(renamed))
                cohorts.setdefault((p.dtype, self._cohort[p]), []).append(p)
        if renamed:
            self._forget_replaced()
        return list(cohorts.values())

    def _forget_replaced(self) -> None:
        """Lets go of parameters that are in no group any more."""
        held = set(self._parameters())
        for known in (self._cohort, self._plans):
            for p in known.keys() - held:
                del known[p]

    def _check_shapes(self, params: list[Tensor]) -> None:
        """Raises where a parameter has changed its shape: operations would stop half-way, or broadcast."""
        for p in params:
            shape, state = p.shape, self.state[p]
            for name in STATE[:3]:
                if name in state and state[name].shape != shape:
                    raise RuntimeError(
                        f"a parameter of shape {tuple(shape)} has {name} of shape {tuple(state[name].shape)}:"
                        " give one that changes its shape a state of its new shape, or none, to begin anew:"
                        " del optimizer.state[parameter]"
                    )
            if p.grad is not None and p.grad.shape != shape:
                raise misfit(p.grad, p)

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

    def _gradient_factor(self, group: dict[str, Any], unscale: Tensor | None) -> Tensor | None:
        """What `_inspect`'s factor becomes with a group's clipping; None for 1."""
        max_norm = group["max_norm"]
        if max_norm is None:
            return unscale
        clipping = max_norm / self.grad_norm.to(torch.float64).clamp_min(max_norm)
        return clipping if unscale is None else unscale * clipping

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
        if (factor := self._gradient_factor(group, unscale)) is not None:
            grads = list(torch._foreach_mul(grads, factor.to(_scalar_dtype(grads[0]))))
        if any(g.dtype != p.dtype for g, p in zip(grads, params, strict=True)):
            grads = [g.to(p.dtype) for g, p in zip(grads, params, strict=True)]
        if group["weight_decay"] != 0.0:
            grads = list(torch._foreach_add(grads, params, alpha=group["weight_decay"]))
        dtype = _scalar_dtype(params[0])
        size, rectified = step_size(steps[0].to(torch.float64) + 1.0, group["lr"], beta1, beta2)
        decay = torch.as_tensor(group["ema_decay"], dtype=torch.float64, device=size.device)
        rest = (1.0 - decay).to(dtype)

        if _may_look(params[0].device) and dtype == params[0].dtype:
            if healthy:
                torch._foreach_lerp_(m, grads, 1 - beta1)
                torch._foreach_mul_(v, beta2)
                torch._foreach_addcmul_(v, grads, grads, 1 - beta2)
                if rectified:
                    denominator = torch._foreach_sqrt(v)
                    torch._foreach_add_(denominator, group["eps"])
                    change = torch._foreach_div(m, denominator)
                    torch._foreach_mul_(change, (-size).to(dtype))
                else:
                    change = torch._foreach_mul(m, (-size).to(dtype))
                torch._foreach_add_(params, change)
                torch._foreach_lerp_(ema, params, float(rest))
                torch._foreach_add_(steps, 1.0)
            return

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
        new_ema = [torch.lerp(e.to(dtype), p.to(dtype), rest) for e, p in zip(ema, new_p, strict=True)]

        _add_scalar_(steps, healthy.to(torch.float32))
        for new, old in ((new_p, params), (new_m, m), (new_v, v), (new_ema, ema)):
            for new_tensor, old_tensor in zip(new, old, strict=True):
                # A 0-dim fp32 scalar promotes a bf16 parameter that is itself 0-dim.
                torch.where(healthy, new_tensor.to(old_tensor.dtype), old_tensor, out=old_tensor)

    @_not_traced
    def _step_by_kernels(
        self, cohorts: list[tuple[dict[str, Any], list[Tensor]]], by_kernels: list[bool]
    ) -> None:
        """The step where kernels may take some cohorts; those that they do not take go to `_update`."""
        capturing = _capturing(self.grad_norm.device)
        planned: list[tuple[dict[str, Any], Plan, list[Tensor], Tensor]] = []
        figures = [self.grad_norm, self.last_step_skipped, self.skipped]
        scaler = [getattr(self, name, None) for name in ("grad_scale", "found_inf")]
        written = list(figures)
        others: list[tuple[dict[str, Any], list[Tensor]]] = []
        for (group, params), by_kernel in zip(cohorts, by_kernels, strict=True):
            plan = self._plan(params, capturing) if by_kernel else None
            if plan is None:
                self._check_shapes(params)
                others.append((group, params))
            else:
                grads = plan.gradients_of(params)
                planned.append((group, plan, grads, plan.find(grads, capturing)))
                written += [t for p in params for t in (p, self.state[p]["ema"])]
        partials = None
        if others:
            unscale, healthy = self._inspect([p.grad for _, c in cohorts for p in c if p.grad is not None])
            for group, params in others:
                self._update(group, params, unscale, healthy)
        else:
            partials = self.grad_norm.new_empty(sum(len(plan.chunks) for _, plan, _, _ in planned))
            done = 0
            for _, plan, _, gradients in planned:
                launch_norm(plan, gradients, partials[done:])
                done += len(plan.chunks)
        for group, plan, _, gradients in planned:
            scalars = launch_scalars(group, plan, partials, *figures, *scaler)
            launch_update(group, plan, gradients, scalars)
            partials = None  # the first launch has settled for all whether the step happens
        # By address, where autograd does not see it: a graph that has saved one of these must not be used.
        torch.autograd.graph.increment_version(written)

    def _plan(self, params: list[Tensor], capturing: bool) -> Plan | None:
        """The tables of a cohort, made anew where a tensor has moved; None if the kernels do not take it."""
        if capturing and any("ema" not in self.state[p] for p in params):
            raise RuntimeError(_WARM_UP)
        states = [self._state_of(p) for p in params]
        # In every step, for hundreds of parameters: lists, the fastest that Python has.
        addresses = [[p.data_ptr() for p in params]]
        addresses += [[state[name].data_ptr() for state in states] for name in STATE]
        places = (addresses, [p.shape for p in params], [p.stride() for p in params])
        plan = self._plans.get(params[0])
        if plan is None or plan.places != places:
            if not all(map(fits, params, states)):
                return None
            if capturing:
                raise RuntimeError(_WARM_UP)
            plan = self._plans[params[0]] = Plan(params, states, places)
        if capturing:
            self._captured[id(plan)] = plan
        return plan

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim.Optimizer's."""
        return _state_dict(self)

    @torch.inference_mode(False)
    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state dict of this class, to the last bit, or of torch.optim.RAdam (with a fresh EMA).

        Nothing is shared with `state_dict` afterwards. Where this optimizer's lr or ema_decay is a tensor it
        stays that tensor and takes the loaded value, so that a compiled or captured step goes on reading it.
        What others keep in the groups, as the schedulers of torch do, is restored too.

        Raises:
            ValueError: if the groups do not fit, the state is of parameters of other shapes or of another
                kind of optimizer, or the dict was made with maximize or decoupled_weight_decay. Nothing has
                changed then.
        """
        for switch in _FOREIGN_SWITCHES:
            if any(group.get(switch) for group in state_dict["param_groups"]):
                raise ValueError(f"cannot continue a state dict that was made with {switch}=True")
        for option in _OPTIONS_OF_OTHERS:
            if any(option in group for group in state_dict["param_groups"]):
                raise ValueError(f"a group of the state dict has {option}: it is of another optimizer")
        before, state_before = self.param_groups, self.state
        _load_state_dict(self, state_dict)
        if (reason := self._why_not_ours()) is not None:
            self.param_groups, self.state = before, state_before
            raise ValueError(reason)
        del state_before
        for group, old in zip(self.param_groups, before, strict=True):
            for name, value in old.items():
                if name == "params":
                    continue
                loaded = group.get(name, value)
                if isinstance(loaded, Tensor) and loaded.dim() == 1:  # as torch's lr may have
                    loaded = loaded.reshape(())
                if isinstance(value, Tensor):
                    loaded = value if loaded is value else value.fill_(loaded)
                elif isinstance(loaded, Tensor):
                    loaded = loaded.to(self.grad_norm.device)
                group[name] = loaded
            for name in _FOREIGN_OPTIONS:
                group.pop(name, None)
        for p in self._parameters():
            state = self.state[p]
            if "step" in state:
                step = torch.as_tensor(state["step"], dtype=torch.float32, device=p.device)
                state["step"] = step.clone().reshape(())
            for name in ("exp_avg", "exp_avg_sq", "ema"):
                if name in state:
                    like = torch.empty_like(p, memory_format=torch.preserve_format, requires_grad=False)
                    state[name] = like.copy_(state[name])
        self._find_cohorts()

    def _why_not_ours(self) -> str | None:
        """Why the state, as torch loads it, cannot be gone on with; None if it can."""
        for group in self.param_groups:
            for name in ("lr", "ema_decay"):
                value = group.get(name)
                if isinstance(value, Tensor) and value.numel() != 1:
                    return f"{name} is one number, and here a tensor of shape {tuple(value.shape)}"
        for p in self._parameters():
            state: dict[str, Any] = self.state.get(p, {})
            held = sorted(state.keys() - {"ema"})
            missing = [name for name in ("step", *STATE[:2]) if name not in state]
            if held and missing:
                has = f"the state has {', '.join(held)} without {' and '.join(missing)}"
                return f"{has}: it is of another optimizer"
            if held and torch.as_tensor(state["step"]).numel() != 1:
                return f"a step is one number, and here a tensor of shape {tuple(state['step'].shape)}"
            wrong = [name for name in STATE[:3] if name in state and state[name].shape != p.shape]
            if wrong:
                return (
                    f"{wrong[0]} of shape {tuple(state[wrong[0]].shape)} does not fit a parameter of shape"
                    f" {tuple(p.shape)}"
                )
        return None

    def _find_cohorts(self) -> None:
        """The cohorts that the state tells of: equal steps; the host reads them."""
        self._forget_replaced()
        ranks: dict[float, int] = {}
        for p in self._parameters():
            step = self.state[p].get("step", 0.0) if p in self.state else 0.0
            self._cohort[p] = ranks.setdefault(float(step), len(ranks))


def _check_options(options: dict[str, Any]) -> None:
    """Raises ValueError for an option of a group that is out of range."""
    lr, betas, ema_decay, max_norm = (options[each] for each in ("lr", "betas", "ema_decay", "max_norm"))
    if not isinstance(lr, Tensor) and not lr >= 0.0:
        raise ValueError(f"lr must be at least 0, got {lr}")
    if not (0.0 <= betas[0] < 1.0 and 0.0 <= betas[1] < 1.0):
        raise ValueError(f"betas must be in [0, 1), got {betas}")
    for name in ("eps", "weight_decay"):
        if not options[name] >= 0.0:
            raise ValueError(f"{name} must be at least 0, got {options[name]}")
    if not isinstance(ema_decay, Tensor) and not 0.0 <= ema_decay <= 1.0:
        raise ValueError(f"ema_decay must be in [0, 1], got {ema_decay}")
    if max_norm is not None and not max_norm > 0.0:
        raise ValueError(f"max_norm must be positive or None, got {max_norm}")
    for name, value in (("lr", lr), ("ema_decay", ema_decay)):
        if isinstance(value, Tensor) and value.dim() != 0:
            raise ValueError(f"a tensor {name} must be 0-dim, got shape {tuple(value.shape)}")


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


def _is_sharded(p: Tensor) -> bool:
    """Whether a parameter is a DTensor, or another that keeps its values in tensors of its own."""
    return hasattr(p, "__tensor_flatten__")


def _may_look(device: torch.device) -> bool:
    """Whether the host may read a verdict: on a CPU there is nothing to wait for, and it halves the time."""
    return device.type == "cpu" and not torch.compiler.is_compiling()


def _add_scalar_(tensors: Sequence[Tensor], scalar: Tensor) -> None:
    """Adds a 0-dim device tensor. torch._foreach_add_ would take its overload for numbers: a host read."""
    torch.ops.aten._foreach_add_.Tensor(tensors, scalar)


def _scalar_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of step scalars for a tensor: never below fp32, where 0.9999 would round to 1."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _capturing(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):  # the question is of the current device's stream
        return torch.cuda.is_current_stream_capturing()
