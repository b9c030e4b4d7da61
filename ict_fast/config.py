"""The frozen dataclasses of a run, their validation, and their way to and from JSON.

Field names and defaults are METHOD's; every field is a flag: `--training.total-steps 200`. A field marked
"believed" in its description is not verified against the paper and kept adjustable for that reason.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ict_fast.errors import InputError, did_you_mean

# What may differ between a run and its resumption: it decides how the run executes, not what it computes.
EXECUTION_FIELDS = frozenset(
    {
        "preset",
        "data.path",
        "data.loader",
        "method.second_sigma",
        "training.micro_batch",
        "training.compile",
        "training.cuda_graph",
        "training.deterministic",
        "training.max_skipped_steps",
    }
    | {
        f"logging.{name}"
        for name in (
            "log_every",
            "grid_every",
            "checkpoint_every",
            "checkpoint_minutes",
            "keep_checkpoints",
            "snapshot_every",
        )
    }
    | {
        f"logging.{name}"
        for name in (
            "tracker",
            "evaluate_every",
            "evaluate_count",
            "evaluate_steps",
            "evaluate_reference",
            "evaluate_features",
            "power_ema_every",
        )
    }
)

MOST_STEPS = 10_000
"""The most steps that a sample can be made with."""

MOST_IMAGES = 10**9
"""The most images that files can number, or a measurement take."""

WIDTHS = "numbers from 0.01 to 0.288"
"""The relative widths that a power-function average may have, in words."""


@dataclass(frozen=True)
class DataConfig:
    """Where the images come from."""

    path: str = "data/digits"
    """Folder of a prepared store (images.npy, labels.npy, meta.json)."""
    loader: Literal["auto", "dali", "resident", "memmap"] = "auto"
    """How batches reach the device. auto: on a GPU dali, else resident if it fits; on a CPU memmap."""
    flip: bool = False
    """Flip each image horizontally with probability 1/2, a pure function of (seed, sample number)."""


@dataclass(frozen=True)
class NetworkConfig:
    """The network F in f(x, s) = c_skip(s) x + c_out(s) F(c_in(s) x, c_noise(s))."""

    name: Literal["ncsnpp", "ddpmpp", "adm"] = "ncsnpp"
    """NCSN++ (CIFAR-10), DDPM++ (ECT's network for it) or ADM (ImageNet 64x64)."""
    resolution: int = 8
    """Height and width of the images in pixels."""
    image_channels: int = 1
    """1 for grey, 3 for RGB."""
    num_classes: int = 0
    """Number of classes of a class-conditional model; 0 for an unconditional one."""
    head_channels: int = 0
    """Channels per attention head; 0 means a single head."""
    channels: int = 24
    """Base width; level l has channels * channel_mult[l]."""
    channel_mult: tuple[int, ...] = (1, 2)
    """Width multiplier per resolution level, finest first."""
    num_blocks: int = 1
    """Residual blocks per resolution level."""
    attention_resolutions: tuple[int, ...] = (4,)
    """Resolutions at which blocks carry self-attention."""
    adaptive_norm: bool = False
    """Noise embedding as scale and shift of the norm (True) or added to the activations (False)."""
    dropout: float = 0.0
    """Dropout probability inside the residual blocks; teacher and student share one mask."""
    dropout_max_resolution: int = 0
    """Dropout only in blocks at this resolution or below; 0 means at every resolution."""
    embedding: Literal["fourier", "positional"] = "fourier"
    """Embedding of the noise level: random Fourier features or fixed sinusoids."""
    embedding_scale: float = 0.02
    """Standard deviation of the Fourier frequencies (16 in NCSN++, 0.02 in iCT)."""
    c_noise: Literal["log", "adm-openai"] = "log"
    """log: ln(s)/4, of the authors' code for CIFAR-10 (believed for ImageNet). adm-openai: 250 ln(s + 1e-44),
    of OpenAI's ADM of 2023 and its weights."""


@dataclass(frozen=True)
class MethodConfig:
    """The objective. The defaults are iCT; each ingredient is a switch of its own for ablations."""

    p_mean: float = -1.1
    """Mean of ln sigma in the lognormal index distribution."""
    p_std: float = 2.0
    """Standard deviation of ln sigma in the lognormal index distribution."""
    sigma_min: float = 0.002
    """Smallest noise level; the boundary condition is f(x, sigma_min) = x."""
    boundary_sigma: float | None = None
    """Where f(x, s) = x, if not at sigma_min: 0 is the preconditioning of EDM's denoisers."""
    sigma_max: float = 80.0
    """Largest noise level; sampling starts there."""
    rho: float = 7.0
    """Curvature of the noise-level grid."""
    sigma_data: float = 0.5
    """Standard deviation of the data, in images scaled to [-1, 1]."""
    s0: int = 10
    """Number of intervals, N - 1, that the curriculum starts with; for square-root of levels, N."""
    s1: int = 1280
    """Number of intervals the curriculum ends with."""
    curriculum: Literal["doubling", "square-root", "fixed"] = "doubling"
    """How N(k) grows from s0 to s1. fixed: N = s0 + 1 throughout."""
    indices: Literal["lognormal", "uniform"] = "lognormal"
    """Distribution of the grid index."""
    weighting: Literal["inverse-gap", "uniform"] = "inverse-gap"
    """lambda = 1 / (s_{i+1} - s_i), or 1."""
    metric: Literal["pseudo-huber", "l2", "l1"] = "pseudo-huber"
    """Distance between student and teacher: Pseudo-Huber over the whole image; or, as in the code of 2023,
    the mean over its values of the squared difference (l2) or of the absolute one (l1)."""
    huber_c: float | None = None
    """c of the Pseudo-Huber metric; by default 0.00054 sqrt(d), d = values per image."""
    teacher: Literal["student", "ema"] = "student"
    """The teacher's weights: the student's own (iCT), or their EMA with decay mu(k) (2023)."""
    teacher_ema: float = 0.9
    """mu0 of the EMA teacher: mu(k) = exp(s0 ln mu0 / N(k)); unused when the teacher is the student."""
    teacher_ema_divisor: Literal["points", "pairs"] = "points"
    """Divide by N(k), the grid points (the paper), or by N(k) - 1, the pairs (published code)."""
    second_sigma: float = 0.821
    """Noise level of the second step when sampling with two (0.821 CIFAR-10; 1.526 ImageNet, as in ECT)."""

    @property
    def identity_sigma(self) -> float:
        """The noise level at which f(x, s) = x exactly."""
        return self.sigma_min if self.boundary_sigma is None else self.boundary_sigma


@dataclass(frozen=True)
class OptimizerConfig:
    """RAdam and the average of the weights that is evaluated."""

    name: Literal["radam", "adam"] = "radam"
    """radam (iCT), or adam: NVIDIA apex's FusedAdam where it is installed, else torch's fused one."""
    lr: float = 2e-3
    """Learning rate."""
    warmup_steps: int = 0
    """Steps at the beginning over which the rate rises linearly from 0; 0: none (iCT)."""
    lr_decay: float = 0.0
    """Fraction of the run, at its end, over which the rate falls linearly to 0; 0: constant (iCT)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the first and second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    clip_norm: float = 0.0
    """Norm of the whole gradient above which it is scaled down to it; 0: none (iCT)."""
    weight_decay: float = 0.0
    """L2 penalty added to the gradient."""
    ema_decay: float = 0.999
    """Decay of the average of the weights that is sampled and evaluated."""
    ema_warmup: bool = True
    """Use min(ema_decay, (k+1)/(k+10)): a short run would else evaluate its initialisation."""
    ema_decays: tuple[float, ...] = ()
    """Decays of further averages, kept beside the first: `--ema NAME` samples and evaluates them."""
    power_ema: tuple[float, ...] = ()
    """Relative widths of power-function averages, such as 0.05 0.10 (EDM2): snapshots of two of them let
    `ict-fast ema` make the average of any width when the training is done."""


@dataclass(frozen=True)
class TrainingConfig:
    """How long, how large, and in which arithmetic."""

    total_steps: int = 1200
    """Optimizer steps K; the curriculum is laid over them."""
    batch_size: int = 96
    """Images per optimizer step over all processes."""
    micro_batch: int = 0
    """Images per forward pass and process; gradients accumulate over the rest. 0: all at once, and on a GPU
    the most that by the plan's model should fit."""
    seed: int = 0
    """Seed of the initial weights, the order, the flips, the noise, the levels and the dropout."""
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    """Arithmetic of the network's trunk; its ends stay fp32. auto: on a GPU bf16, from the stage on at which
    its rounding is measured to drown the gradient fp16; on GPUs before Ampere, which have no bf16, fp16
    throughout; on a CPU fp32. tf32: fp32 tensors, TF32 products."""
    compile: Literal["auto", "on", "off", "max-autotune"] = "auto"
    """Compile the network's blocks with torch.compile, minutes at the first start. auto: on a GPU."""
    cuda_graph: bool = False
    """Capture the step as CUDA graphs, with --data.loader resident. Not timed yet."""
    max_skipped_steps: int = 100
    """Give up after this many steps in a row with a non-finite gradient; seen when the log is written."""
    deterministic: bool = False
    """Repeatable CUDA algorithms, so that resuming on a GPU is bit-exact. A CPU always is."""


@dataclass(frozen=True)
class LoggingConfig:
    """What is written down, and how often (in steps)."""

    log_every: int = 25
    """A line in log.jsonl; the only steps that wait for the device."""
    grid_every: int = 300
    """A grid of one-step samples from fixed seeds; 0 for none."""
    checkpoint_every: int = 300
    """A checkpoint; one is written at the end in any case."""
    checkpoint_minutes: float = 15.0
    """A checkpoint, too, when the last one is so many minutes old; 0 for none but those by steps."""
    keep_checkpoints: int = 2
    """The newest checkpoints to keep, whatever they were written for."""
    snapshot_every: int = 0
    """A checkpoint that is never deleted; 0 for none."""
    tracker: Literal["auto", "tensorboard", "wandb", "none"] = "auto"
    """Where figures and grids go besides log.jsonl: TensorBoard's files in <run>/tensorboard, or Weights &
    Biases (WANDB_MODE=offline needs no network). auto: TensorBoard where it is installed."""
    evaluate_every: int = 0
    """Measure the averaged weights as `ict-fast evaluate` does, and keep the best; 0 for never."""
    evaluate_count: int = 5000
    """Images of such a measurement. Distances compare only with those of the same number."""
    evaluate_steps: tuple[int, ...] = (1,)
    """Numbers of sampling steps to measure; the first decides which checkpoint is the best."""
    evaluate_reference: str | None = None
    """What such a measurement compares with, as `evaluate --reference`; by default the run's data."""
    evaluate_features: str | None = None
    """TorchScript file of its features, as `evaluate --features`; by default those of the digits."""
    power_ema_every: int = 0
    """Snapshots of the power-function averages; 0 for 64 in a run."""


@dataclass(frozen=True)
class Config:
    """Everything a run needs to know; what two runs share if they compute the same."""

    preset: str = "digits"
    data: DataConfig = field(default_factory=DataConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration as plain JSON values, nested by section."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(values: Mapping[str, Any], origin: str = "configuration") -> Config:
    """Builds and validates a Config from plain JSON values.

    Args:
        values: nested by section; a missing field takes its default.
        origin: the file to name in errors.
    Raises:
        InputError: on an unknown field, a wrong type, or a value that `validate` refuses.
    """
    config = _build(Config, values, origin, "")
    validate(config)
    return config


def differences(ours: Config, theirs: Config) -> list[tuple[str, Any, Any]]:
    """The fields of science that differ, as (dotted name, our value, their value)."""
    other = dict(_leaves(to_dict(theirs)))
    return [
        (name, value, other[name])
        for name, value in _leaves(to_dict(ours))
        if name not in EXECUTION_FIELDS and value != other[name]
    ]


def with_science_of(config: Config, other: Config) -> Config:
    """`config` with the fields of science of `other`; not validated."""
    sections = {}
    for section in dataclasses.fields(Config):
        theirs = getattr(other, section.name)
        if dataclasses.is_dataclass(theirs):
            science = {
                name: value
                for name, value in vars(theirs).items()
                if f"{section.name}.{name}" not in EXECUTION_FIELDS
            }
            sections[section.name] = dataclasses.replace(getattr(config, section.name), **science)
    return dataclasses.replace(config, **sections)


def unused_fields(config: Config) -> dict[str, str]:
    """The fields that do nothing under this configuration, by dotted name, and what makes it so."""
    network, method, logging = config.network, config.method, config.logging
    coarsest = network.resolution >> (len(network.channel_mult) - 1)
    cases = (
        (network.embedding == "positional", "--network.embedding positional", ["network.embedding_scale"]),
        (network.dropout == 0, "--network.dropout 0", ["network.dropout_max_resolution"]),
        (
            0 < network.dropout_max_resolution < coarsest,
            f"--network.dropout-max-resolution {network.dropout_max_resolution}",
            ["network.dropout"],
        ),
        (method.curriculum == "fixed", "--method.curriculum fixed", ["method.s1"]),
        (method.indices == "uniform", "--method.indices uniform", ["method.p_mean", "method.p_std"]),
        (method.metric != "pseudo-huber", f"--method.metric {method.metric}", ["method.huber_c"]),
        (
            method.teacher == "student",
            "--method.teacher student",
            ["method.teacher_ema", "method.teacher_ema_divisor"],
        ),
        (not config.optimizer.power_ema, "no --optimizer.power-ema", ["logging.power_ema_every"]),
        (
            logging.evaluate_every == 0,
            "--logging.evaluate-every 0",
            [f"logging.evaluate_{name}" for name in ("count", "steps", "reference", "features")],
        ),
    )
    return {name: why for is_so, why, names in cases if is_so for name in names}


def validate(config: Config) -> None:
    """Checks what the types cannot say.

    Raises:
        InputError: naming the flag, the value seen, and what would be right.
    """
    network, method, optimizer = config.network, config.method, config.optimizer
    training, logging = config.training, config.logging

    for name, value in _leaves(dataclasses.asdict(config)):
        for number in value if isinstance(value, tuple) else (value,):
            finite = not isinstance(number, float) or math.isfinite(number)
            _require(finite, name.replace("_", "-"), number, "a finite number")
    for name, number in (
        ("network.resolution", network.resolution),
        ("network.channels", network.channels),
        ("network.num-blocks", network.num_blocks),
        ("training.total-steps", training.total_steps),
        ("training.batch-size", training.batch_size),
        ("training.max-skipped-steps", training.max_skipped_steps),
        ("logging.log-every", logging.log_every),
        ("logging.checkpoint-every", logging.checkpoint_every),
        ("method.s0", method.s0),
    ):
        _require(number >= 1, name, number, "at least 1")
    for name, number in (
        ("network.num-classes", network.num_classes),
        ("network.head-channels", network.head_channels),
        ("network.dropout-max-resolution", network.dropout_max_resolution),
        ("training.micro-batch", training.micro_batch),
        ("training.seed", training.seed),
        ("logging.grid-every", logging.grid_every),
        ("logging.checkpoint-minutes", logging.checkpoint_minutes),
        ("logging.snapshot-every", logging.snapshot_every),
        ("logging.evaluate-every", logging.evaluate_every),
        ("logging.power-ema-every", logging.power_ema_every),
        ("optimizer.clip-norm", optimizer.clip_norm),
        ("optimizer.weight-decay", optimizer.weight_decay),
    ):
        _require(number >= 0, name, number, "0 or more")
    _require(training.seed < 2**63, "training.seed", training.seed, "below 2^63")
    # Far above any use, and below what exhausts the memory before it can be refused, or is too much for fp32:
    # a large c swallows every distance. A rho of 10^6 is the log-uniform grid already.
    for name, number, most in (
        ("network.resolution", network.resolution, 4096),
        ("network.num-classes", network.num_classes, 10**6),
        ("network.channels", network.channels, 4096),
        ("network.channel-mult", max(network.channel_mult, default=1), 64),
        ("network.num-blocks", network.num_blocks, 64),
        ("training.batch-size", training.batch_size, 2**20),
        ("network.embedding-scale", network.embedding_scale, 10**6),
        ("method.p-std", method.p_std, 1000),
        ("method.sigma-max", method.sigma_max, 10**6),
        ("method.rho", method.rho, 10**6),
        ("method.sigma-data", method.sigma_data, 10**6),
        ("method.huber-c", method.huber_c or 0, 1000),
        ("optimizer.lr", optimizer.lr, 3e38),
        ("optimizer.eps", optimizer.eps, 10**6),
        ("optimizer.weight-decay", optimizer.weight_decay, 10**6),
        ("logging.evaluate-steps", max(logging.evaluate_steps, default=1), MOST_STEPS),
        ("logging.evaluate-count", logging.evaluate_count, MOST_IMAGES),
    ):
        _require(number <= most, name, number, f"at most {most:,}")
    _require(network.image_channels in (1, 3), "network.image-channels", network.image_channels, "1 or 3")
    _require(training.total_steps < 2**32, "training.total-steps", training.total_steps, "below 2^32")
    keep = logging.keep_checkpoints
    _require(keep >= 2, "logging.keep-checkpoints", keep, "at least 2")

    _require(len(network.channel_mult) >= 1, "network.channel-mult", network.channel_mult, "one per level")
    _require(min(network.channel_mult) >= 1, "network.channel-mult", network.channel_mult, "positive numbers")
    divisor = 2 ** (len(network.channel_mult) - 1)
    _require(
        network.resolution % divisor == 0,
        "network.resolution",
        network.resolution,
        f"a multiple of {divisor}, because {len(network.channel_mult)} levels halve it"
        f" {len(network.channel_mult) - 1} times",
    )
    resolutions = [network.resolution >> level for level in range(len(network.channel_mult))]
    for resolution in network.attention_resolutions:
        _require(
            resolution in resolutions,
            "network.attention-resolutions",
            resolution,
            f"among this network's resolutions {', '.join(map(str, resolutions))}",
        )
    for level, multiplier in enumerate(network.channel_mult):
        width = network.channels * multiplier
        groups = min(32, width // 4)
        _require(
            groups >= 1 and width % groups == 0,
            "network.channels",
            network.channels,
            f"such that every level's width is a multiple of its group count; {width} channels at level"
            f" {level} make {max(groups, 1)} groups",
        )
        if network.head_channels and resolutions[level] in network.attention_resolutions:
            _require(
                width % network.head_channels == 0,
                "network.head-channels",
                network.head_channels,
                f"a divisor of the {width} channels at resolution {resolutions[level]}",
            )
    _require(0 <= network.dropout <= 0.9999, "network.dropout", network.dropout, "in [0, 0.9999]")
    _require(network.embedding_scale > 0, "network.embedding-scale", network.embedding_scale, "positive")

    _require(method.s1 >= method.s0, "method.s1", method.s1, f"at least method.s0 = {method.s0}")
    if method.curriculum == "square-root":
        _require(method.s0 >= 2, "method.s0", method.s0, "at least 2 with the square-root curriculum")
    _require(method.s1 <= 2**20, "method.s1", method.s1, "at most 2^20")
    _require(
        0 < method.sigma_min < method.sigma_max,
        "method.sigma-min",
        method.sigma_min,
        f"between 0 and method.sigma-max = {method.sigma_max}",
    )
    _require(
        method.sigma_min < method.second_sigma < method.sigma_max,
        "method.second-sigma",
        method.second_sigma,
        f"between method.sigma-min = {method.sigma_min} and method.sigma-max = {method.sigma_max}",
    )
    boundary = method.boundary_sigma
    _require(
        boundary is None or 0 <= boundary <= method.sigma_min,
        "method.boundary-sigma",
        boundary,
        f"between 0 and method.sigma-min = {method.sigma_min}",
    )
    for name, value in (
        ("method.rho", method.rho),
        ("method.p-std", method.p_std),
        ("optimizer.lr", optimizer.lr),
        ("optimizer.eps", optimizer.eps),
    ):
        _require(value > 0 and math.isfinite(value), name, value, "positive")
    # Below, their squares vanish in fp32.
    for name, value, least in (
        ("method.sigma-data", method.sigma_data, 1e-6),
        ("method.huber-c", method.huber_c, 1e-9),
    ):
        _require(value is None or value >= least, name, value, f"at least {least:g}")
    _require(0 <= optimizer.lr_decay <= 1, "optimizer.lr-decay", optimizer.lr_decay, "in [0, 1]")
    _require(
        0 <= optimizer.warmup_steps <= training.total_steps,
        "optimizer.warmup-steps",
        optimizer.warmup_steps,
        f"at least 0 and at most training.total-steps = {training.total_steps}",
    )
    _require(0 < method.teacher_ema < 1, "method.teacher-ema", method.teacher_ema, "in (0, 1)")
    _require(all(0 <= beta < 1 for beta in optimizer.betas), "optimizer.betas", optimizer.betas, "in [0, 1)")
    _require(0 <= optimizer.ema_decay < 1, "optimizer.ema-decay", optimizer.ema_decay, "in [0, 1)")
    _validate_averages(optimizer)
    _validate_evaluation(logging)

    _validate_levels(method)

    micro_batch = training.micro_batch or training.batch_size
    _require(
        training.batch_size % micro_batch == 0,
        "training.micro-batch",
        micro_batch,
        f"a divisor of training.batch-size = {training.batch_size}",
    )


def valid_width(sigma_rel: float) -> bool:
    """Whether a power-function average can have this relative width.

    1/sqrt(12) is that of the plain mean of all steps; beyond it the first steps would count most.
    """
    return 0.01 <= sigma_rel < 12**-0.5


def _validate_averages(optimizer: OptimizerConfig) -> None:
    for name, values, is_right, right in (
        ("optimizer.ema-decays", optimizer.ema_decays, lambda decay: 0 <= decay < 1, "numbers in [0, 1)"),
        ("optimizer.power-ema", optimizer.power_ema, valid_width, WIDTHS),
    ):
        _require(all(map(is_right, values)), name, values, right)
        _require(len(set(values)) == len(values), name, values, "a list without repetitions")


def _validate_evaluation(logging: LoggingConfig) -> None:
    steps, count = logging.evaluate_steps, logging.evaluate_count
    _require(len(steps) >= 1, "logging.evaluate-steps", steps, "at least one number of steps")
    _require(min(steps) >= 1, "logging.evaluate-steps", steps, "numbers of at least 1")
    _require(count >= 2, "logging.evaluate-count", count, "at least 2")


def _validate_levels(method: MethodConfig) -> None:
    """The finest grid must be strictly ascending, and the lognormal must reach it."""
    low, high = (math.log(sigma) for sigma in (method.sigma_min, method.sigma_max))
    try:
        ends = [math.exp(log / method.rho) for log in (low, high)]
        # By the grid's formula at the ends too, or its rounding alone may part them from their neighbours.
        bottom, second, last_but_one, top = (
            (ends[0] + index / method.s1 * (ends[1] - ends[0])) ** method.rho
            for index in (0, 1, method.s1 - 1, method.s1)
        )
        first_gap = second - max(bottom, method.sigma_min)
        last_gap = min(top, method.sigma_max) - last_but_one
    except OverflowError:
        first_gap = last_gap = 0.0
    _require(
        first_gap > 1e-6 * method.sigma_min and last_gap > 1e-9 * method.sigma_max,
        "method.rho",
        method.rho,
        f"such that {method.s1 + 1} noise levels differ between {method.sigma_min} and {method.sigma_max}",
    )
    mass = [math.erf((log - method.p_mean) / (math.sqrt(2) * method.p_std)) for log in (low, high)]
    _require(
        mass[1] - mass[0] > 1e-6,
        "method.p-mean",
        method.p_mean,
        f"within reach of the noise levels with method.p-std = {method.p_std}: ln sigma runs from"
        f" {low:.1f} to {high:.1f}",
    )


def _require(holds: bool, name: str, value: object, right: str) -> None:
    if not holds:
        raise InputError(f"--{name} is {value}; it must be {right}")


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _build(cls: type, values: Any, origin: str, prefix: str) -> Any:
    if not isinstance(values, Mapping):
        raise InputError(f"{origin}: {prefix.rstrip('.') or 'the whole'} is {values!r}; it must be an object")
    types_by_name = typing.get_type_hints(cls)
    arguments = {}
    for name, value in values.items():
        if name not in types_by_name:
            raise InputError(f"{origin}: unknown field {prefix}{name}{did_you_mean(name, types_by_name)}")
        arguments[name] = _coerce(types_by_name[name], value, origin, prefix + name)
    return cls(**arguments)


def _coerce(kind: Any, value: Any, origin: str, name: str) -> Any:
    """A JSON value as the annotated type, or an InputError; only the kinds that occur above."""
    if dataclasses.is_dataclass(kind):
        return _build(typing.cast(type, kind), value, origin, name + ".")
    form, arguments = typing.get_origin(kind), typing.get_args(kind)
    if form is Literal:
        if value in arguments:
            return value
        raise InputError(f"{origin}: {name} is {value!r}{did_you_mean(str(value), arguments)}")
    if form is types.UnionType:  # float | None
        return None if value is None else _coerce(arguments[0], value, origin, name)
    if form is tuple and isinstance(value, list | tuple):
        if arguments[-1] is not Ellipsis and len(value) != len(arguments):
            raise InputError(f"{origin}: {name} is {value!r}; it must have {len(arguments)} numbers")
        return tuple(_coerce(arguments[0], item, origin, name) for item in value)
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(kind, type) and type(value) is kind:
        return value
    raise InputError(f"{origin}: {name} is {value!r}; it must be of type {getattr(kind, '__name__', kind)}")
