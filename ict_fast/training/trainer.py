"""The training loop, in one fixed order: log, snapshot, checkpoint, grid, measurement, done?, batch, step."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from ict_fast import torchrun
from ict_fast.config import Config, LoggingConfig, validate
from ict_fast.consistency.curriculum import stages
from ict_fast.data.dali_loader import require_dali
from ict_fast.data.loaders import Loader, choose_loader, make_loader
from ict_fast.data.order import micro_batch_size
from ict_fast.data.resident_loader import resident_bytes
from ict_fast.data.store import Store
from ict_fast.errors import EXIT_DONE, DivergedError, TrainingError
from ict_fast.networks.cost import network_cost
from ict_fast.planning.plan import choose_micro_batch
from ict_fast.screen import duration, say
from ict_fast.training.describe import describe_initial_share, describe_stages, describe_unused
from ict_fast.training.evaluations import (
    Evaluations,
    describe_missing,
    is_measured,
    require_measurable,
    require_measurement,
)
from ict_fast.training.failures import SkippedSteps, closing, explained, require_update
from ict_fast.training.figures import figures
from ict_fast.training.graph import CapturedStep, require_capturable
from ict_fast.training.grids import averaged_model, save_grid
from ict_fast.training.initial import RECORD_NAME, initial_weights
from ict_fast.training.launch import StopRequest, configure_torch, resolve_processes
from ict_fast.training.monitor import Monitor
from ict_fast.training.outcome import RunResult, report_progress
from ict_fast.training.precision import (
    choice_is_due,
    choose_trunk,
    chooses_trunk,
    is_too_coarse,
    leave_fp16,
)
from ict_fast.training.processes import MAX_RESTARTS, run_processes
from ict_fast.training.run_data import open_data, prepare_if_bundled
from ict_fast.training.run_directory import GRIDS, Run, lock, open_run, prepare_directory, update
from ict_fast.training.saving import Saver, trunk_name
from ict_fast.training.step import TrainStep, describe_trunk, trunk_dtype
from ict_fast.training.trackers import chosen_tracker, open_tracker
from ict_fast.training.utilisation import Utilisation, describe_run
from ict_fast.training.world import (
    COLLECTIVE_TIMEOUT,
    SAVE,
    World,
    joined,
    launched,
    local_rank,
    require_launched,
)

# After the loss of a node: Linux's NFS server keeps its locks for 90 s.
_LEASE_SECONDS = 120.0
_POWER_SNAPSHOTS = 64  # in a run, where --logging.power-ema-every does not say otherwise


def train(
    config: Config,
    *,
    out: Path | str | None = None,
    device: str = "auto",
    gpus: int | None = None,
    processes: int | None = None,
    resume: str = "auto",
    extend: int | None = None,
    max_restarts: int | None = None,
    collective_timeout: float = COLLECTIVE_TIMEOUT,
    init: Path | str | None = None,
) -> RunResult:
    """Trains, or goes on training, one run.

    The same call resumes a run that was interrupted; on a CPU, at an equal number of threads and processes,
    bit for bit as if it had not been. Where torchrun has started this process, it is one of the run's; else
    it starts as many as were asked for (they import the caller's main module, so a script must guard its
    own call by `if __name__ == "__main__"`).

    Args:
        config: see `ict_fast.presets.get`.
        out: the run's directory; by default runs/<preset>. Every node must see it.
        device, gpus, processes: see `resolve_processes`.
        resume, extend: see `open_run`.
        max_restarts: see `run_processes`; None for its default. Under torchrun it is torchrun's to say.
        collective_timeout: seconds that a process waits for another one.
        init: a run, a checkpoint or an imported model whose averaged weights a new run begins with.
    Raises:
        InputError: before anything is written, if the input cannot work.
        TrainingError: too many steps in a row without a finite gradient, the end could not be saved,
            processes were lost again and again, or one waited for another in vain.
    """
    validate(config)
    chosen_tracker(config)
    require_measurable(config)
    out = Path("runs") / config.preset if out is None else Path(out)
    init = None if init is None else Path(init)
    found, count = resolve_processes(device, gpus, processes)
    if config.training.cuda_graph:
        require_capturable(found, config.data.loader)
    if launched():
        require_launched(found, gpus or processes, max_restarts)
        here = torch.device("cuda", local_rank()) if found.type == "cuda" else found
        with joined(here, collective_timeout) as world:
            # An earlier attempt has begun the run. A node that joins the others' restart does not count it.
            if is_restart := world.any(torchrun.restarts() > 0):
                resume = "auto"
            patience = min(_LEASE_SECONDS, collective_timeout / 2) if is_restart else 0.0  # all wait
            result = _train(config, out, here, world, resume, extend, init, patience)
            return result if world.is_first else replace(result, message="")
    if count == 1:
        return _train(config, out, found, World(), resume, extend, init)

    # Whatever can be refused is refused here, before a process is started.
    run = open_run(config, out, resume, extend, lambda text: None, init)
    if run.finished:
        return _already_finished(run)
    if run.initial is not None and run.checkpoint is None:
        initial_weights(run.initial, run.config)
    micro_batch_size(run.config.training.batch_size, count, run.config.training.micro_batch)
    prepare_if_bundled(run.config)
    open_data(run)
    if run.config.data.loader == "dali":
        require_dali()
    require_measurement(run.config)
    with lock(run, lambda text: None):
        pass  # process 0 takes it again, and keeps it
    work = partial(_train_launched, config, out, found.type, resume, extend, init, collective_timeout)
    return run_processes(
        work,
        count,
        out=out,
        step=run.step,
        warn=lambda text: say(f"ict-fast: warning: {text}"),
        max_restarts=MAX_RESTARTS if max_restarts is None else max_restarts,
    )


def _train_launched(
    config: Config,
    out: Path,
    device: str,
    resume: str,
    extend: int | None,
    init: Path | None,
    timeout: float,
    first: bool,
) -> RunResult:
    """One process of several; a later attempt resumes what the first one began."""
    resume = resume if first else "auto"
    return train(
        config, out=out, device=device, resume=resume, extend=extend, init=init, collective_timeout=timeout
    )


def _train(
    config: Config,
    out: Path,
    device: torch.device,
    world: World,
    resume: str,
    extend: int | None,
    init: Path | None,
    patience: float = 0.0,
) -> RunResult:
    """Trains in this process, one of the world's; for `patience` see `lock`."""
    warnings = [] if (warning := torchrun.warning()) is None else [warning]
    run = world.decide(lambda: open_run(config, out, resume, extend, warnings.append, init))
    if run.finished:
        return _already_finished(run)
    world.decide(lambda: prepare_if_bundled(run.config))
    store = world.together(lambda: open_data(run))
    world.decide(lambda: require_measurement(run.config))
    world.require_equal(store.fingerprint, f"the images of {store.path}")
    with ExitStack() as held, explained():
        world.decide(lambda: held.enter_context(lock(run, warnings.append, patience)))
        return _train_locked(run, store, device, world, warnings, extended=extend is not None)


def _train_locked(
    run: Run, store: Store, device: torch.device, world: World, warnings: list[str], *, extended: bool
) -> RunResult:
    config, out = run.config, run.out
    configure_torch(device, deterministic=config.training.deterministic)
    begun: list[str] = []
    weights: dict[str, torch.Tensor] | None = None
    if run.initial is not None and run.checkpoint is None:
        weights, report = world.together(partial(initial_weights, run.initial, config))
        begun = report.lines()
        record = (json.dumps(report.record(), indent=1) + "\n").encode()
        world.decide(lambda: update(run, RECORD_NAME, record))
    world.require_equal(
        str(trunk_dtype(config.training.precision, device)),
        "the dtypes of the GPUs (--training.precision auto)",
        "fp16 is one that all have",
    )
    train_step = TrainStep(config, device, world, weights)
    if trunk := describe_trunk(config.training.precision, device):
        begun.append(trunk)
    if run.checkpoint is not None:
        before = run.checkpoint.state.get("trunk_dtype")
        # Chosen at an earlier stage, if not on the last device.
        chosen = before == "float16" or is_too_coarse(run.checkpoint.state.get("roundings", []))
        if chooses_trunk(train_step) and chosen:
            train_step.set_trunk(torch.float16)
        world.together(partial(train_step.restore, run.checkpoint))
        now = trunk_name(train_step)
        if before not in (None, now):
            warnings.append(f"the run so far has a trunk in {before}, on this device it goes on in {now}")
    if config.training.precision == "tf32" and device.type == "cpu":
        warnings.append(
            "a CPU has no TF32: its rounding is emulated, which is slower than --training.precision fp32"
        )
    if unused := describe_unused(config):
        warnings.append(unused)
    if run.checkpoint is None and (initial_share := describe_initial_share(config)):
        warnings.append(initial_share)
    micro_batch = config.training.micro_batch
    if memory := _memory(device):
        if choose_loader(config.data.loader, store, device)[0] == "resident":
            memory -= resident_bytes(store)
        cost, memory = network_cost(train_step.network), world.least(memory, "the memory of their GPUs")
        micro_batch, short = world.decide(lambda: choose_micro_batch(config, cost, world.size, memory))
        if short is not None:
            (begun if micro_batch != config.training.micro_batch else warnings).append(short)
    sized = replace(config, training=replace(config.training, micro_batch=micro_batch))
    loader, reason = world.together(
        lambda: make_loader(sized, store, device, rank=world.rank, world_size=world.size)
    )
    world.decide(lambda: prepare_directory(run))
    monitor = world.together(lambda: _open_monitor(run, train_step, device, warnings))
    with (
        StopRequest() as stop,
        monitor,
        closing(loader, world),
        Saver(run, store, train_step, monitor) as saver,
    ):
        for warning in warnings:
            monitor.warn(warning)
        where = str(device) if world.size == 1 else f"{device.type} in {world.size} processes"
        monitor.say(f"training {config.preset} in {out} on {where}; data: {reason}")
        for line in begun:
            monitor.say(line)
        if extended:
            monitor.say(describe_stages(config, run.extensions))
        if run.step:
            monitor.say(f"resuming at step {run.step:,} of {config.training.total_steps:,}")
        evaluations = Evaluations(run, monitor, stop, world.get_on)
        try:
            return _loop(run, train_step, loader, monitor, saver, evaluations, stop)
        finally:
            world.finish()  # a tracker may take long to send what it has


def _open_monitor(run: Run, train_step: TrainStep, device: torch.device, warnings: list[str]) -> Monitor:
    world = train_step.world
    if not world.is_first:
        return Monitor(run, silent=True)
    report_progress(run.step, run.step)
    utilisation = Utilisation(train_step.network, device, world.size)
    describe_run(run, utilisation, world.size)
    return Monitor(run, utilisation, open_tracker(run, warnings.append))


def _memory(device: torch.device) -> int | None:
    """Bytes of a GPU; None for a CPU."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def _loop(
    run: Run,
    train_step: TrainStep,
    loader: Loader,
    monitor: Monitor,
    saver: Saver,
    evaluations: Evaluations,
    stop: StopRequest,
) -> RunResult:
    config, out, step, world = run.config, run.out, run.step, train_step.world
    total, logging = config.training.total_steps, config.logging
    borders = {stage.first_step for stage in stages(total, config.method)}
    advance = CapturedStep(train_step) if config.training.cuda_graph else train_step
    skipped_steps = SkippedSteps(train_step, config, monitor.warn, step)
    stop_code: int | None = None

    def is_stopped() -> bool:
        """Asked by what takes longer than a step; its caller has saved it."""
        nonlocal stop_code
        agreed = world.stop_code(stop.exit_code)
        stop_code = None if agreed == SAVE else agreed
        return stop_code is not None

    while True:
        world.reached(step)
        # By the clock of process 0. All of them see it one step later.
        is_due = step > run.step and not _is_saved(step, logging) and saver.is_due()
        agreed = world.stop_code(stop.exit_code or (SAVE if is_due else None))
        done, stop_code = step == total, None if agreed == SAVE else agreed
        compiling = train_step.compiled_blocks if step == run.step else 0
        is_best = False
        if step > run.step and (done or step % logging.log_every == 0):
            monitor.record(step, figures(train_step, step))
            try:
                skipped_steps.look(step)
            except DivergedError:
                with _between_steps(advance, monitor):
                    back = leave_fp16(train_step, loader, step - 1)
                if back is None:
                    raise
                monitor.warn(back)
                if compiling := train_step.compiled_blocks:
                    world.compiles()
        if step > run.step and config.optimizer.power_ema and (done or step % _snapshot_every(config) == 0):
            saver.save_snapshot(step)
        is_saved = step > run.step and (done or agreed is not None or _is_saved(step, logging))
        if stop_code is not None and is_saved and not done:
            monitor.say(f"stopping at step {step:,}, saving it; Ctrl-C again quits without")
        if is_saved:  # before the picture and the measurement, which may crash
            saver.save(step)
        is_drawn = bool(logging.grid_every) and (done or step % logging.grid_every == 0)
        if step > run.step and world.is_first and is_drawn:
            with _between_steps(advance, monitor):
                save_grid(train_step, step, out / GRIDS / f"step-{step:08d}.png", monitor)
        if evaluations.is_due(step) and stop_code is None:  # a run that goes on makes up for a missed one
            saver.wait()
            measure = partial(evaluations.measure, step, partial(averaged_model, train_step))
            with _between_steps(advance, monitor):
                is_best, stop_code = world.while_first(measure, "measuring", stop)
            is_there = is_saved or (step == run.step and run.checkpoint is not None)
            if is_best and is_there:
                saver.mark_best(step)
            elif is_best or (stop_code is not None and step > run.step and not is_saved):
                saver.save(step, best=is_best)
                is_saved = True
        if done or stop_code is not None:
            break
        started = time.monotonic()
        if compiling:
            monitor.say(f"compiling {compiling} blocks; the first start takes minutes, later ones seconds")
        try:
            # A run may come from another device, in the middle of a stage.
            if (step in borders or step == run.step) and choice_is_due(train_step, step):
                if step > run.step and not is_saved:  # the choice may take an hour
                    saver.save(step)
                with _between_steps(advance, monitor):
                    choice = choose_trunk(train_step, loader, step, is_stopped)
                if choice is None:
                    monitor.say(f"stopping at step {step:,}; its trunk's arithmetic is chosen on resuming")
                    break
                monitor.say(choice)
                if train_step.compiled_blocks and not chooses_trunk(train_step):
                    compiling, started = train_step.compiled_blocks, time.monotonic()
                    monitor.say(f"compiling {compiling} blocks for fp16")
                    world.compiles()
            asked = time.monotonic()
            batches = loader.micro_batches(step)
            monitor.waited_for_data(time.monotonic() - asked)
            advance(step, batches)
        except Exception:
            # A terminal's Ctrl-C also ends the compilers that the first step has started. `step` is saved.
            if world.size > 1 or stop.exit_code is None or not (compiling or step == run.step):
                raise
            stop_code = stop.exit_code
            break
        step += 1
        if compiling:
            monitor.say(f"compiled in {duration(time.monotonic() - started)}")
            monitor.restart_clock(step)
        monitor.advance(step)
    saver.wait()
    saved_step = world.decide(lambda: saver.step)  # nobody ends before the checkpoint is written
    if saved_step != step:  # no later one makes up for it
        world.decide(saver.make_room)
        saver.save(step, best=is_best)
        saver.wait()
        saved_step, failure = world.decide(lambda: (saver.step, saver.failure))
        if saved_step != step:
            raise TrainingError(
                f"step {step:,} could not be saved ({failure}); {out} holds step {saved_step:,}"
            )
    if done:
        skipped = int(train_step.optimizer.skipped)
        require_update(skipped, step, config)
        skips = f", {skipped:,} of them skipped for a gradient that was not finite" if skipped else ""
        code, measured = EXIT_DONE, ""
        if world.decide(lambda: evaluations.is_missing(step)):
            code = EXIT_DONE if stop_code is None else stop_code
            measured = describe_missing(run)
        return RunResult(out, step, code, f"{out}: {total:,} steps are done{skips}{measured}")
    assert stop_code is not None
    saved = f"stopped and saved at step {step:,} of {total:,}" if step else "stopped before the first step"
    return RunResult(out, step, stop_code, f"{out}: {saved}; the same command resumes")


@contextmanager
def _between_steps(advance: TrainStep | CapturedStep, monitor: Monitor) -> Iterator[None]:
    """While open, the device and the clock are for work other than the training."""
    if isinstance(advance, CapturedStep):
        advance.release()
    with monitor.paused():
        yield


def _is_saved(step: int, logging: LoggingConfig) -> bool:
    return any(every and step % every == 0 for every in (logging.checkpoint_every, logging.snapshot_every))


def _snapshot_every(config: Config) -> int:
    return config.logging.power_ema_every or max(1, config.training.total_steps // _POWER_SNAPSHOTS)


def _already_finished(run: Run) -> RunResult:
    if run.checkpoint is not None:
        require_update(run.checkpoint.state.get("skipped", 0), run.step, run.config)
    measured = "" if is_measured(run) else describe_missing(run)
    done = f"{run.out} is finished: {run.step:,} steps are done{measured}"
    return RunResult(run.out, run.step, EXIT_DONE, done)
