"""The training loop, in one fixed order: log, grid, checkpoint, done?, batch, step."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ict_fast.checkpoint import write_checkpoint
from ict_fast.config import Config, to_dict, validate
from ict_fast.consistency.curriculum import num_scales
from ict_fast.consistency.model import ConsistencyModel, build_seeded_network
from ict_fast.consistency.sampling import sample
from ict_fast.data.loaders import make_loader
from ict_fast.data.pictures import image_grid, save_png, to_uint8
from ict_fast.data.prepare import prepare_digits
from ict_fast.data.store import Store, open_store
from ict_fast.errors import EXIT_DONE, InputError, TrainingError
from ict_fast.presets import DIGITS
from ict_fast.training.describe import describe, describe_stages
from ict_fast.training.launch import StopRequest, configure_torch, resolve_device
from ict_fast.training.monitor import Monitor
from ict_fast.training.run_directory import Run, lock, open_run, prepare_directory
from ict_fast.training.step import TrainStep
from ict_fast.version import __version__

_GRID_IMAGES = 64


@dataclass(frozen=True)
class RunResult:
    """How a call of `train` ended.

    Attributes:
        out: the run's directory.
        step: steps done.
        exit_code: 0 finished, 130 or 143 saved and stopped by a signal.
        message: one line for the person.
    """

    out: Path
    step: int
    exit_code: int
    message: str


def train(
    config: Config,
    *,
    out: Path | str | None = None,
    device: str = "auto",
    gpus: int | None = None,
    resume: str = "auto",
    extend: int | None = None,
) -> RunResult:
    """Trains, or goes on training, one run.

    The same call resumes a run that was interrupted; on a CPU, at an equal number of threads, bit for bit as
    if it had not been.

    Args:
        config: see `ict_fast.presets.get`.
        out: the run's directory; by default runs/<preset>.
        device, gpus: see `resolve_device`.
        resume, extend: see `open_run`.
    Raises:
        InputError: before anything is written, if the input cannot work.
        TrainingError: too many steps in a row without a finite gradient, or the end could not be saved.
    """
    validate(config)
    torch_device = resolve_device(device, gpus)
    out = Path("runs") / config.preset if out is None else Path(out)
    warnings: list[str] = []
    run = open_run(config, out, resume, extend, warnings.append)
    config = run.config
    if run.finished:
        return RunResult(out, run.step, EXIT_DONE, f"{out} is finished: {run.step:,} steps are done")
    if config.data.path == DIGITS.data.path and not Path(config.data.path).exists():
        prepare_digits(Path(config.data.path))
    store = _open_data(config)
    _check_same_data(run, store)
    with lock(run):
        try:
            return _train(run, store, torch_device, extend is not None, warnings)
        except (RuntimeError, MemoryError) as error:
            # torch.OutOfMemoryError is the GPU's; the CPU's allocator raises a plain RuntimeError.
            out_of_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
            if not out_of_memory and "allocate memory" not in str(error):
                raise
            raise TrainingError(
                f"out of memory: {_reason(error)}; a smaller --training.micro-batch needs less"
            ) from error


def plan(
    config: Config,
    *,
    out: Path | str | None = None,
    device: str = "auto",
    gpus: int | None = None,
    resume: str = "auto",
    extend: int | None = None,
) -> str:
    """What `train` would do with the same arguments, in words; writes nothing.

    Data or a device that are missing on this machine are said so, not raised: a plan may be made elsewhere.

    Raises:
        InputError: if the input cannot work, or the run that is there is another one.
    """
    validate(config)
    out = Path("runs") / config.preset if out is None else Path(out)
    lines: list[str] = []
    run = open_run(config, out, resume, extend, lambda text: lines.append(f"warning: {text}"))
    config, total = run.config, f"{run.config.training.total_steps:,}"
    if run.finished:
        lines.append(f"run: {out} is finished, its {total} steps are done")
    elif run.step:
        lines.append(f"run: {out} would go on from step {run.step:,} of {total}")
    else:
        lines.append(f"run: {out} would start")
    try:
        lines.append(f"device: {resolve_device(device, gpus)}")
    except InputError as error:
        lines.append(f"device: not here: {error}")
    try:
        if config.data.path == DIGITS.data.path and not Path(config.data.path).exists():
            lines.append(f"data: {config.data.path} would be prepared")
        else:
            store = _open_data(config)
            _check_same_data(run, store)
            lines.append(f"data: {store.path}, {store.num_images:,} images")
    except InputError as error:
        lines.append(f"data: not ready: {error}")
    return "\n".join([describe(config), *lines])


def _train(run: Run, store: Store, device: torch.device, extended: bool, warnings: list[str]) -> RunResult:
    config, out = run.config, run.out
    configure_torch(device, deterministic=config.training.deterministic)
    train_step = TrainStep(config, device)
    if run.checkpoint is not None:
        train_step.restore(run.checkpoint)
        before, now = run.checkpoint.state.get("trunk_dtype"), _trunk_name(train_step)
        if before not in (None, now):
            warnings.append(f"the run so far has a trunk in {before}, on this device it goes on in {now}")
    prepare_directory(run)
    total = config.training.total_steps
    monitor = Monitor(out, first_step=run.step, total_steps=total, batch_size=config.training.batch_size)
    loader, reason = make_loader(config, store, device)
    with StopRequest() as stop, monitor, loader:
        for warning in warnings:
            monitor.warn(warning)
        monitor.say(f"training {config.preset} in {out} on {device}; data: {reason}")
        if extended:
            monitor.say(describe_stages(config))
        if run.step:
            monitor.say(f"resuming at step {run.step:,} of {total:,}")
        return _loop(run, store, train_step, loader, monitor, stop)


def _loop(
    run: Run, store: Store, train_step: TrainStep, loader: Any, monitor: Monitor, stop: StopRequest
) -> RunResult:
    config, out, step = run.config, run.out, run.step
    total, logging = config.training.total_steps, config.logging
    saved_step = step
    while True:
        done, stop_code = step == total, stop.exit_code
        if step > run.step:
            if done or step % logging.log_every == 0:
                monitor.record(step, _metrics(train_step, step, config))
                _check_progress(train_step, step, config)
            if logging.grid_every and (done or step % logging.grid_every == 0):
                _save_grid(train_step, out / "grids" / f"step-{step:08d}.png", monitor)
            if done or stop_code is not None or step % logging.checkpoint_every == 0:
                saved_step = _save(run, store, train_step, step, saved_step, monitor)
        if done or stop_code is not None:
            break
        train_step(step, loader.micro_batches(step))
        step += 1
        monitor.advance(step)
    if saved_step != step:
        raise TrainingError(f"step {step:,} could not be saved; {out} holds step {saved_step:,}")
    if done:
        skipped = int(train_step.optimizer.skipped)
        skips = f", {skipped:,} of them skipped for a gradient that was not finite" if skipped else ""
        return RunResult(out, step, EXIT_DONE, f"{out}: {total:,} steps are done{skips}")
    assert stop_code is not None
    saved = f"stopped and saved at step {step:,} of {total:,}" if step else "stopped before the first step"
    return RunResult(out, step, stop_code, f"{out}: {saved}; the same command resumes")


def _metrics(train_step: TrainStep, step: int, config: Config) -> dict[str, Any]:
    """The values of a log line: here the loop waits for the device."""
    count = int(train_step.loss_count)
    values = {
        "loss": float(train_step.loss_sum) / count if count else None,
        "num_scales": num_scales(step - 1, config.training.total_steps, config.method),
        "skipped": int(train_step.optimizer.skipped),
    }
    gradient_norm = float(train_step.optimizer.grad_norm)
    values["gradient_norm"] = gradient_norm if gradient_norm < float("inf") else None
    return values


def _check_progress(train_step: TrainStep, step: int, config: Config) -> None:
    """Gives up after too many steps in a row without a finite gradient; begins a new window of the loss.

    Raises:
        TrainingError: see above. The weights are still those of the last good step.
    """
    in_a_row = int(train_step.skipped_in_a_row)
    train_step.reset_loss()
    if in_a_row >= config.training.max_skipped_steps:
        raise TrainingError(
            f"{in_a_row} steps in a row up to step {step:,} had no finite gradient, and changed no weight;"
            " a smaller --optimizer.lr, in a new --out, may help"
        )


def _save_grid(train_step: TrainStep, path: Path, monitor: Monitor) -> None:
    """One-step samples of the averaged weights, from the same noise every time."""
    network = build_seeded_network(train_step.config).to(train_step.device)
    network.load_state_dict(train_step.ema_weights())
    model = ConsistencyModel(train_step.config, network).eval()
    try:
        path.parent.mkdir(exist_ok=True)
        save_png(image_grid(to_uint8(sample(model, _GRID_IMAGES))), path)
    except (OSError, torch.OutOfMemoryError) as error:
        monitor.warn(f"{path} cannot be written ({_reason(error)}); training goes on")


def _save(run: Run, store: Store, train_step: TrainStep, step: int, saved_step: int, monitor: Monitor) -> int:
    """Writes a checkpoint; returns the step of the newest one that is on disk."""
    state = {
        "step": step,
        "config": to_dict(run.config),
        "data_fingerprint": store.fingerprint,
        "trunk_dtype": _trunk_name(train_step),
        "versions": {
            "ict_fast": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
    try:
        write_checkpoint(run.out, step, train_step.tensors(), state, keep=run.config.logging.keep_checkpoints)
    except OSError as error:
        monitor.warn(
            f"the checkpoint of step {step:,} could not be written ({_reason(error)}); the one of step"
            f" {saved_step:,} stays, training goes on"
        )
        return saved_step
    return step


def _trunk_name(train_step: TrainStep) -> str:
    return str(train_step.autocast_dtype or torch.float32).removeprefix("torch.")


def _reason(error: Exception) -> str:
    return " ".join(str(getattr(error, "strerror", None) or error).split())


def _open_data(config: Config) -> Store:
    """The store, checked against the network."""
    path = Path(config.data.path)
    store = open_store(path)
    network = config.network
    if (store.resolution, store.image_channels) != (network.resolution, network.image_channels):
        raise InputError(
            f"{path} holds {store.resolution}x{store.resolution} images of {store.image_channels} channels;"
            f" the network takes {network.resolution}x{network.resolution} of {network.image_channels}"
            " (--network.resolution, --network.image-channels)"
        )
    if network.num_classes not in (0, store.num_classes):
        raise InputError(
            f"{path} has {store.num_classes or 'no'} classes; --network.num-classes is {network.num_classes}"
        )
    return store


def _check_same_data(run: Run, store: Store) -> None:
    if run.checkpoint is None:
        return
    before = run.checkpoint.state.get("data_fingerprint")
    if before != store.fingerprint:
        raise InputError(
            f"{run.config.data.path} holds other images than {run.out} was trained on (fingerprint"
            f" {str(store.fingerprint)[:12]}, before {str(before)[:12]}); --data must name the same store"
        )
