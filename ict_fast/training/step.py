"""One optimizer step, and the state that it advances."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ict_fast import consistency
from ict_fast.config import Config
from ict_fast.consistency.model import build_seeded_network
from ict_fast.consistency.objective import ConsistencyObjective
from ict_fast.errors import InputError
from ict_fast.networks import UNet
from ict_fast.networks.casts import TrunkCasts
from ict_fast.networks.tf32 import set_tf32
from ict_fast.training.adam_ema import AdamEMA
from ict_fast.training.averages import Averages, ema_decay
from ict_fast.training.compilation import compile_blocks, compiles
from ict_fast.training.loss_by_sigma import LossBySigma
from ict_fast.training.loss_scale import LossScale
from ict_fast.training.loss_window import FIGURES, LossWindow
from ict_fast.training.reduction import reduction_of
from ict_fast.training.world import World
from ict_kernels import RAdamEMA

if TYPE_CHECKING:
    from ict_fast.checkpoint import Checkpoint
    from ict_fast.data.loaders import Batch

_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


class TrainStep:
    """Network, optimizer and averages of one run, and the step that advances them.

    All that changes from step to step (k, N(k), decays) is written into device tensors, so that nothing in
    a step waits for the device and a compiled step never sees a new constant.

    Attributes:
        network: the student, on the device, channels_last. Under autocast it computes with the casts of the
            last `gradient`; a copy of it does not.
        optimizer: RAdam with the average of the weights.
        reduction: of the gradients of several processes.
        averages: the further averages.
        compiled_blocks: how many residual blocks are compiled when they are first called.
        casts: of the trunk's weights, made anew whenever a gradient is to be computed.
        loss_scale: of an fp16 trunk, else None.
        roundings: what was measured to choose the trunk's arithmetic so far, as JSON values; see `precision`.
        losses: sums of the losses since `reset_losses`.
        skipped_in_a_row: the longest run of skipped steps since `reset_losses`; int64 scalar.
    """

    def __init__(
        self,
        config: Config,
        device: torch.device,
        world: World | None = None,
        initial: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Begins with weights drawn from config.training.seed, or with the state dict `initial`."""
        require_arithmetic(config.training.precision, device)
        self.config = config
        self.device = device
        self.world = World() if world is None else world
        network = build_seeded_network(config)
        if initial is not None:  # before anything copies the weights: EMA teacher, average, other processes
            network.load_state_dict(initial)
        self.network = _on_device(network, device)
        self.autocast_dtype: torch.dtype | None = None
        teacher = None
        if config.training.precision == "tf32":
            set_tf32(self.network, True)
        if config.method.teacher == "ema":
            teacher = copy.deepcopy(self.network).requires_grad_(False)
        self.teacher: nn.Module | None = teacher
        total = config.training.total_steps
        self.compiled_blocks = 0
        if compiles(config.training.compile, device):
            networks = (self.network,) if teacher is None else (self.network, teacher)
            autotune = config.training.compile == "max-autotune"
            self.compiled_blocks = compile_blocks(*networks, autotune=autotune)
        self.reduction = reduction_of(self.network, self.world, config.training, device)
        self.objective = ConsistencyObjective(
            self.reduction.network,
            config.method,
            c_noise=config.network.c_noise,
            scales=[stage.num_scales for stage in consistency.stages(total, config.method)],
            teacher=self.network if teacher is None else teacher,
        )

        def scalar(value: float, dtype: torch.dtype) -> Tensor:
            return torch.tensor(value, dtype=dtype, device=device)

        self.seed_and_step = torch.tensor([config.training.seed, 0], device=device)
        self.num_scales = scalar(0, torch.int64)
        self.learning_rate = scalar(0.0, torch.float64)
        self.ema_decay = scalar(0.0, torch.float64)
        self.teacher_decay = scalar(0.0, torch.float64)
        optimizer = config.optimizer
        kind = RAdamEMA if optimizer.name == "radam" else AdamEMA
        self.optimizer = kind(
            self.network.parameters(),
            lr=self.learning_rate,
            betas=optimizer.betas,
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            ema_decay=self.ema_decay,
            max_norm=optimizer.clip_norm or None,
        )
        self.averages = Averages(optimizer, list(self.network.parameters()))
        self.loss_scale: LossScale | None = None
        self.roundings: list[dict[str, Any]] = []
        self.set_trunk(trunk_dtype(config.training.precision, device))
        self._loss_by_sigma = LossBySigma(config.method, device)
        self.losses = LossWindow(device, self.world)
        self.skipped_in_a_row = scalar(0, torch.int64)
        self._skipping_since = scalar(0, torch.int64)

    def set_trunk(self, dtype: torch.dtype | None) -> None:
        """Computes in this dtype from now on, None for fp32; fp16 begins with a new loss scale."""
        self.autocast_dtype = dtype
        networks = (self.network,) if self.teacher is None else (self.network, self.teacher)
        self.casts = TrunkCasts(networks, dtype)
        self.loss_scale = LossScale(self.device) if dtype is torch.float16 else None
        self.optimizer.grad_scale = None if self.loss_scale is None else self.loss_scale.value

    def __call__(self, step: int, micro_batches: Sequence[Batch]) -> None:
        """Trains on the share of global batch `step` (from 0) that is here; never waits for the device."""
        self.begin(step)
        self.advance(micro_batches)

    def begin(self, step: int) -> None:
        """Writes into device tensors whatever differs from one step to the next."""
        config = self.config
        scales = consistency.num_scales(step, config.training.total_steps, config.method)
        self.seed_and_step[1].fill_(step)
        self.num_scales.fill_(scales)
        self.learning_rate.fill_(learning_rate(step, config))
        self.ema_decay.fill_(ema_decay(config.optimizer.ema_decay, step, warmup=config.optimizer.ema_warmup))
        self.averages.set_step(step)
        if self.teacher is not None:
            self.teacher_decay.fill_(consistency.teacher_ema_decay(scales, config.method))

    def advance(self, micro_batches: Sequence[Batch]) -> None:
        """The step that has begun: the same operations, with the same numbers, in every step.

        In between, what the processes have computed becomes one.
        """
        self.losses.add(self.compute(micro_batches))
        self.reduction.finish()
        self.update()

    def compute(self, micro_batches: Sequence[Batch]) -> Tensor:
        """`gradient`, but for the end of the reduction."""
        self.reduction.clear(single=len(micro_batches) == 1)
        self.casts.refresh()
        figures = torch.zeros(FIGURES, device=self.device)
        for number, batch in enumerate(micro_batches, start=1):
            with self.reduction.gathering_only() if number < len(micro_batches) else nullcontext():
                figures += self.backward(batch)
        return figures

    def update(self) -> None:
        """Advances the weights and all that follows them by the gradient that is in the parameters."""
        if self.loss_scale is not None and self.world.size > 1:
            self.optimizer.grad_scale = self.loss_scale.value / self.world.size
        self.optimizer.step()

        skipped = self.optimizer.last_step_skipped
        self.averages.advance(skipped, self.updates())
        if self.loss_scale is not None:
            self.loss_scale.advance(skipped)
        if self.teacher is not None:
            self._advance_teacher(skipped)
        self._skipping_since.add_(1).mul_(skipped)
        torch.maximum(self.skipped_in_a_row, self._skipping_since, out=self.skipped_in_a_row)

    def gradient(self, micro_batches: Sequence[Batch]) -> Tensor:
        """Leaves the gradient of all processes' micro-batches in the parameters; never waits for the device.

        Returns:
            The sum of what `backward` returns, in this process.
        """
        figures = self.compute(micro_batches)
        self.reduction.finish()
        return figures

    def updates(self) -> Tensor:
        """Steps that have changed the weights, the last one included: 0-dim int64 on the device."""
        return self.seed_and_step[1] + 1 - self.optimizer.skipped

    def backward(self, batch: Batch) -> Tensor:
        """Adds the gradient of the micro-batch's share of the global mean loss.

        Returns:
            (FIGURES,) fp32: that share, then sums and numbers by noise level.
        """
        # No cache of cast weights: the teacher would fill it without gradients, for the student to find.
        with torch.autocast(
            self.device.type,
            dtype=self.autocast_dtype,
            enabled=self.autocast_dtype is not None,
            cache_enabled=False,
        ):
            levels = self.objective.levels(
                len(batch.images),
                num_scales=self.num_scales,
                seed=self.seed_and_step,
                offset=batch.offset,
                device=self.device,
            )
            loss_n = self.objective(
                batch.images,
                batch.labels if self.config.network.num_classes else None,
                num_scales=self.num_scales,
                seed=self.seed_and_step,
                offset=batch.offset,
                flip=batch.flip,
                levels=levels,
            )
        loss = loss_n.sum() / self.config.training.batch_size
        # The processes' gradients are averaged, but their shares of the mean loss add up. With a loss scale
        # the optimizer makes up for that: the number of processes, in the loss, would overflow fp16.
        (loss * (self.world.size if self.loss_scale is None else self.loss_scale.value)).backward()
        by_sigma = self._loss_by_sigma(loss_n.detach(), levels.sigma)
        return torch.cat([loss.detach().reshape(1), by_sigma])

    @torch.no_grad()
    def _advance_teacher(self, skipped: Tensor) -> None:
        """theta_teacher = mu theta_teacher + (1 - mu) theta, unchanged by a skipped step."""
        assert self.teacher is not None
        decay = torch.where(skipped, 1.0, self.teacher_decay).float()
        teacher = [parameter.data for parameter in self.teacher.parameters()]
        student = [parameter.data for parameter in self.network.parameters()]
        torch._foreach_mul_(teacher, decay)
        torch._foreach_add_(teacher, torch._foreach_mul(student, 1 - decay))

    def reset_losses(self) -> None:
        """Starts a new window of the losses."""
        self.losses.reset()
        self.skipped_in_a_row.zero_()

    # ---- what a checkpoint holds ----

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Everything that the next step depends on, by file and name; no copies are made.

        To be called by all processes at the same step.
        """
        self.losses.gather()
        names = [name for name, _ in self.network.named_parameters()]
        weights = dict(self.network.state_dict())
        files = {"weights": weights, "ema": self.ema_weights()}
        files |= {f"ema-{name}": self.ema_weights(name) for name in self.averages.names}
        state = [self.optimizer.state[parameter] for parameter in self.network.parameters()]
        files["optimizer"] = {
            f"{name}.{moment}": entry[moment]
            for name, entry in zip(names, state, strict=True)
            for moment in _MOMENTS
        }
        files["optimizer"]["skipped"] = self.optimizer.skipped
        files["optimizer"]["skipping_since"] = self._skipping_since
        files["optimizer"]["skipped_in_a_row"] = self.skipped_in_a_row
        files["optimizer"] |= self.losses.tensors()
        if self.loss_scale is not None:
            files["optimizer"] |= self.loss_scale.tensors()
        if self.teacher is not None:
            files["teacher"] = dict(self.teacher.state_dict())
        return files

    def ema_weights(self, average: str | None = None) -> dict[str, Tensor]:
        """The averaged weights as a network's state dict: buffers, such as Fourier frequencies, included.

        Args:
            average: name of a further average; None for the first one.
        """
        weights = dict(self.network.state_dict())
        names = [name for name, _ in self.network.named_parameters()]
        averaged = self.optimizer.ema_parameters() if average is None else self.averages.parameters(average)
        weights.update(zip(names, averaged, strict=True))
        return weights

    def restore(self, checkpoint: Checkpoint) -> None:
        """Takes over a checkpoint's state, bit for bit.

        Raises:
            InputError: naming the file, if it does not fit this network.
        """
        self.roundings = list(checkpoint.state.get("roundings", []))
        _load(self.network, checkpoint, "weights")
        if self.teacher is not None:
            _load(self.teacher, checkpoint, "teacher")
        ema, saved = checkpoint.tensors("ema"), checkpoint.tensors("optimizer")
        further = {name: checkpoint.tensors(f"ema-{name}") for name in self.averages.names}
        names = [name for name, _ in self.network.named_parameters()]
        with torch.no_grad():
            try:
                for name, tensors in further.items():
                    self.averages.restore(name, tensors, names)
                self.optimizer.load_state_dict(self._optimizer_state(ema, saved))
                self.optimizer.skipped.copy_(saved["skipped"])
                self._skipping_since.copy_(saved["skipping_since"])
                self.skipped_in_a_row.copy_(saved["skipped_in_a_row"])
                self.losses.restore(saved)
                if self.loss_scale is not None and "loss_scale" in saved:  # else it was not fp16 so far
                    for name, tensor in self.loss_scale.tensors().items():
                        tensor.copy_(saved[name])
            except KeyError as missing:
                raise InputError(f"{checkpoint.path}/optimizer.safetensors lacks {missing}") from None

    def _optimizer_state(self, ema: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> dict:
        """The optimizer's state dict from tensors kept by parameter name, in the parameters' own layout."""
        state = {}
        for number, (name, parameter) in enumerate(self.network.named_parameters()):
            entry = {moment: saved[f"{name}.{moment}"] for moment in _MOMENTS} | {"ema": ema[name]}
            state[number] = {
                key: value if key == "step" else torch.empty_like(parameter).copy_(value)
                for key, value in entry.items()
            }
        return {"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]}


def learning_rate(step: int, config: Config) -> float:
    """Rate of step k of K: lr min(1, k / warmup_steps, (K - k) / (lr_decay K)), each if it is not 0."""
    optimizer, total = config.optimizer, config.training.total_steps
    shares = [1.0]
    if optimizer.warmup_steps:
        shares.append(step / optimizer.warmup_steps)
    if optimizer.lr_decay:
        shares.append((total - step) / (optimizer.lr_decay * total))
    return optimizer.lr * min(shares)


def trunk_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The autocast dtype of the network's trunk, or None for fp32 (of which TF32 is a way to compute)."""
    if precision == "auto":
        if device.type != "cuda":
            precision = "fp32"
        else:
            precision = "bf16" if _is_ampere(device) else "fp16"
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)


def describe_trunk(precision: str, device: torch.device) -> str | None:
    """A line for the person, where `auto` is not what it is on other GPUs."""
    if precision != "auto" or device.type != "cuda" or _is_ampere(device):
        return None
    return f"{_described(device)} has no bf16: the trunk is in fp16 from the start"


def require_arithmetic(precision: str, device: torch.device) -> None:
    """Raises InputError for a GPU without this arithmetic.

    It would compute TF32 in fp32, and bf16 by emulation or not at all (Triton), and not say so.
    """
    if precision in ("tf32", "bf16") and device.type == "cuda" and not _is_ampere(device):
        raise InputError(
            f"--training.precision is {precision}, which {_described(device)} has not (it takes 8.0); choose"
            " fp32 or fp16"
        )


def _is_ampere(device: torch.device) -> bool:
    """Whether its tensor cores take bf16 and TF32: those of V100 and T4 take fp16 alone."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _described(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor})"


def _on_device(network: UNet, device: torch.device) -> UNet:
    return network.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _load(network: nn.Module, checkpoint: Checkpoint, name: str) -> None:
    try:
        network.load_state_dict(checkpoint.tensors(name))
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{checkpoint.path}/{name}.safetensors does not fit the network: {reason}") from None
