"""How a run divides among GPUs, what fits into their memory, and how long it takes.

Every term is explained in docs/planning.md; what is assumed is in the constants here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from ict_fast import presets
from ict_fast.config import Config
from ict_fast.consistency.curriculum import stages
from ict_fast.errors import InputError
from ict_fast.networks import build_network
from ict_fast.networks.cost import NetworkCost, network_cost
from ict_fast.planning import gpus as machines
from ict_fast.planning.gpus import Gpu
from ict_fast.planning.launching import launch_seconds
from ict_fast.planning.measured import Measured, best_measured

MOST_GPUS = 512
DEFAULT_MFU = 0.40
"""Share of the peak rate that a training step reaches; an assumption until it is measured."""

# CUDA's context, cuDNN's and cuBLAS's workspaces, NCCL's buffers: assumed.
RUNTIME_BYTES = 3e9
# The allocator's gaps are what is left of the GPU's memory: assumed.
USABLE = 0.92
# Gradients that live beside the activations at the peak, in units of the widest; the tests see one at most.
GRADIENTS_ALIVE = 2
# How `--precision auto` compares bf16 with fp32: by so many batches at most, a micro-batch in so many pieces
# through fp32, and again when N has grown by so much.
CALIBRATION_BATCHES = 24
CALIBRATION_PIECES = 4
CALIBRATION_GROWTH = 1.5
_FP32 = 4
# With fewer images at a time a GPU does not reach its rate, and the figures flatter.
_FEW_IMAGES = 32


@dataclass(frozen=True)
class Plan:
    """A run on some GPUs; bytes and images are those of one GPU unless said otherwise.

    Attributes:
        preset, gpu, gpus, precision: what was asked for.
        cost: of the network.
        batch_size, total_steps: of the run, all GPUs together.
        share: images per step.
        micro_batch: images at a time, the largest that fits.
        memory: bytes by kind.
        usable_bytes: what the GPU has for them.
        all_reduced_bytes: gradients that are summed in each step.
        wire_bytes: what the sum sends, as a ring.
        mfu: share of the peak rate while a GPU computes, assumed or measured.
        measured: where the rate comes from, if it is not assumed.
        launch_seconds: of a step, what launching its kernels takes the host; an estimate.
        launch_bound: whether a step takes that long, since computing would take less.
        compute_seconds, exposed_seconds: of a step; the first is computing, or launching if that is longer,
            the second is communication that it does not hide.
        calibration_seconds: of the whole run, at most: choosing the arithmetic, with precision "auto".
        warnings: what a reader should know.
    """

    preset: str
    gpu: Gpu
    gpus: int
    precision: str
    cost: NetworkCost
    batch_size: int
    total_steps: int
    share: int
    micro_batch: int
    memory: dict[str, float]
    usable_bytes: float
    all_reduced_bytes: float
    wire_bytes: float
    mfu: float
    measured: Measured | None
    launch_seconds: float
    launch_bound: bool
    compute_seconds: float
    exposed_seconds: float
    calibration_seconds: float
    warnings: tuple[str, ...]

    @property
    def total_flops(self) -> float:
        """Of the whole run."""
        return float(self.cost.step_flops) * self.batch_size * self.total_steps

    @property
    def step_seconds(self) -> float:
        return self.compute_seconds + self.exposed_seconds

    @property
    def images_per_second(self) -> float:
        """All GPUs together, while they train."""
        return self.batch_size / self.step_seconds

    @property
    def days(self) -> float:
        return (self.total_steps * self.step_seconds + self.calibration_seconds) / 86400

    @property
    def gpu_hours(self) -> float:
        return self.days * 24 * self.gpus


def make_plan(
    config: Config, gpu: str | Gpu, gpus: int, *, mfu: float | None = None, results: Path | None = None
) -> Plan:
    """Plans a run.

    Args:
        config: its network, batch, steps and precision; its micro-batch, unless that is 0.
        gpu: a key of `GPUS`, or a GPU that has no measured rates.
        gpus: how many, all in one run.
        mfu: assume this share of the peak rate, whatever was measured; None: that measured, or the default.
        results: folder of measured rates; they count for the network of the preset that they name.
    Raises:
        InputError: for an unknown GPU, a number of GPUs that is out of range or does not share the batch, an
            mfu that is none, or a run that does not fit.
    """
    kind, training = gpu if isinstance(gpu, Gpu) else machines.get(gpu), config.training
    if not 1 <= gpus <= MOST_GPUS:
        raise InputError(f"--gpus is {gpus}; a plan is for 1 to {MOST_GPUS}")
    if gpus > machines.GPUS_PER_NODE and not kind.network:
        raise InputError(
            f"--gpus is {gpus}; of a GPU that is described no network is known, so a plan is for 1 to"
            f" {machines.GPUS_PER_NODE}, in one node"
        )
    if mfu is not None and not 0 < mfu <= 1:
        raise InputError(f"--mfu is {mfu:g}; it must be a share of the peak rate, above 0 and at most 1")
    if training.batch_size % gpus:
        raise InputError(f"--batch-size is {training.batch_size}; it must be a multiple of --gpus {gpus}")
    share = training.batch_size // gpus
    if share % (training.micro_batch or share):
        raise InputError(
            f"--micro-batch is {training.micro_batch}; it must divide the {share} images that each GPU has of"
            f" --batch-size {training.batch_size} with --gpus {gpus}"
        )
    with torch.device("meta"):
        network = build_network(config.network)
    cost = network_cost(network)
    usable = USABLE * kind.memory
    micro_batch = training.micro_batch or _largest(config, cost, share, usable)
    memory = memory_bytes(config, cost, micro_batch)
    if sum(memory.values()) > usable:
        raise InputError(
            f"{config.preset} needs {sum(memory.values()) / 1e9:.0f} GB on each GPU for {micro_batch} image"
            f"{'s' if micro_batch > 1 else ''} at a time; it has {usable / 1e9:.0f} GB for it ({kind.name})"
        )

    measured = None
    if mfu is None and results is not None and isinstance(gpu, str) and _is_of_the_preset(config):
        measured = best_measured(results, config.preset, gpu.lower(), training.precision)
    peak = kind.peak(training.precision)
    if measured is not None:
        mfu = measured.images_per_second * cost.step_flops / peak
    elif mfu is None:
        mfu = DEFAULT_MFU
    computing = share * cost.step_flops / (peak * mfu)
    launching = share // micro_batch * launch_seconds(network)
    # A rate that was measured with no more images at a time has its launches in it.
    is_as_measured = measured is not None and measured.batch_size <= micro_batch
    compute = computing if is_as_measured else max(computing, launching)
    in_fp32 = max(computing * peak / kind.peak("fp32"), min(CALIBRATION_PIECES, micro_batch) * launching)

    reduced = float(_FP32 * cost.parameters) if gpus > 1 else 0.0
    wire = 2 * (gpus - 1) / gpus * reduced
    # Gradients travel while the last micro-batch's backward pass makes the next ones.
    hiding = compute * cost.backward_flops / cost.step_flops * micro_batch / share
    return Plan(
        preset=config.preset,
        gpu=kind,
        gpus=gpus,
        precision=training.precision,
        cost=cost,
        batch_size=training.batch_size,
        total_steps=training.total_steps,
        share=share,
        micro_batch=micro_batch,
        memory=memory,
        usable_bytes=usable,
        all_reduced_bytes=reduced,
        wire_bytes=wire,
        mfu=mfu,
        measured=measured,
        launch_seconds=launching,
        launch_bound=compute > computing,
        compute_seconds=compute,
        exposed_seconds=max(0.0, wire / kind.ring(gpus) - hiding),
        calibration_seconds=calibrated_batches(config) * (compute + in_fp32),
        warnings=() if is_as_measured else _warnings(micro_batch, computing, launching, measured),
    )


def _is_of_the_preset(config: Config) -> bool:
    return config.preset in presets.names() and presets.get(config.preset).network == config.network


def choose_micro_batch(config: Config, cost: NetworkCost, gpus: int, memory: float) -> tuple[int, str | None]:
    """The micro-batch of a run on GPUs: what was asked for, or without that the largest that should fit.

    Args:
        config: of the run; a micro-batch of 0 asks for none.
        cost: of its network.
        gpus: all that share the batch.
        memory: of one of them, in bytes.
    Returns:
        That micro-batch, 0 for a GPU's whole share; and a line, if the share or what was asked for may not
        fit.
    """
    asked, share = config.training.micro_batch, config.training.batch_size // gpus
    count = min(asked or share, share)
    needed, usable = sum(memory_bytes(config, cost, count).values()), USABLE * memory
    if needed <= usable:
        return asked, None
    fitting = _largest(config, cost, share, usable)
    short = (
        f"{count:,} images at a time need about {needed / 1e9:.0f} GB (`ict-fast plan`), and this GPU has"
        f" {usable / 1e9:.0f} GB for them"
    )
    if sum(memory_bytes(config, cost, fitting).values()) > usable:
        return asked, f"{short}; not even one should fit"
    if asked:
        return asked, f"{short}; --training.micro-batch {fitting} should fit"
    return fitting, f"{short}: it takes {fitting} at a time (--training.micro-batch takes another number)"


def memory_bytes(config: Config, cost: NetworkCost, micro_batch: int) -> dict[str, float]:
    """Bytes of one GPU by kind, at the peak of a step."""
    parameters, half = _FP32 * float(cost.parameters), config.training.precision not in ("fp32", "tf32")
    itemsize = 2 if half else 4
    memory = {
        "weights": parameters,
        "gradients": parameters,
        "optimizer": 2 * parameters,
        "EMA": parameters,
        "activations": float(micro_batch * cost.activation_bytes(itemsize)),
        "workspace": RUNTIME_BYTES + GRADIENTS_ALIVE * float(micro_batch * cost.widest_values * itemsize),
    }
    if config.method.teacher == "ema":
        memory["EMA teacher"] = parameters
    if further := len(config.optimizer.ema_decays) + len(config.optimizer.power_ema):
        memory["further averages"] = (further + 1) * parameters  # one is the change of one of them
    if half:  # kept by `TrunkCasts`
        memory["weights in half precision"] = parameters / 2 * (2 if config.method.teacher == "ema" else 1)
    if config.training.precision == "auto":
        memory["calibration"] = _calibration_bytes(cost, micro_batch)
    return memory


def calibrated_batches(config: Config) -> int:
    """The most batches that choosing the arithmetic takes: see `ict_fast.training.precision`."""
    if config.training.precision != "auto":
        return 0
    chosen, last = 0, 0.0
    for stage in stages(config.training.total_steps, config.method):
        if not last / CALIBRATION_GROWTH < stage.num_scales < last * CALIBRATION_GROWTH:
            chosen, last = chosen + 1, stage.num_scales
    return CALIBRATION_BATCHES * chosen


def _calibration_bytes(cost: NetworkCost, micro_batch: int) -> float:
    """What comparing bf16 with fp32 takes beside a step: see `ict_fast.training.precision`.

    Both mean gradients, always; and in the half-precision pass the exact gradient, or in the fp32 pass what a
    piece of a micro-batch takes more than a whole one in half precision.
    """
    parameters, piece = _FP32 * float(cost.parameters), math.ceil(micro_batch / CALIBRATION_PIECES)

    def passing(images: int, itemsize: int) -> float:
        return images * float(
            cost.activation_bytes(itemsize) + GRADIENTS_ALIVE * cost.widest_values * itemsize
        )

    return 2 * parameters + max(parameters, passing(piece, 4) - passing(micro_batch, 2))


def _largest(config: Config, cost: NetworkCost, share: int, usable: float) -> int:
    """The largest micro-batch that divides a GPU's share and fits; 1 if none does."""
    fitting = (
        size
        for size in range(share, 0, -1)
        if share % size == 0 and sum(memory_bytes(config, cost, size).values()) <= usable
    )
    return next(fitting, 1)


def _warnings(
    micro_batch: int, computing: float, launching: float, measured: Measured | None
) -> tuple[str, ...]:
    """Of a rate that was not measured with as few images at a time; seconds of a step."""
    found = []
    if computing < launching:
        found.append(
            f"a step takes about {_ms(launching)} to launch and {_ms(computing)} to compute: its time is the"
            " former; --training.cuda-graph is for such steps, but no rate has been measured with it"
        )
    if micro_batch < _FEW_IMAGES:
        found.append(
            f"too few images at a time to fill a GPU, {micro_batch}: the rate will be below the"
            f" {'measured' if measured else 'assumed'} one"
        )
    return tuple(found)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.0f} ms" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
