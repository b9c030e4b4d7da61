"""The training loop, in one fixed order: log, snapshot, checkpoint, grid, measurement, done?, batch, step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from ict_fast.config import Config, LoggingConfig
from ict_fast.consistency.curriculum import stages
from ict_fast.data.loaders import Loader
from ict_fast.errors import EXIT_DONE, DivergedError, TrainingError
from ict_fast.screen import duration
from ict_fast.training.evaluations import Evaluations, describe_missing
from ict_fast.training.failures import SkippedSteps, require_update
from ict_fast.training.figures import figures
from ict_fast.training.graph import CapturedStep
from ict_fast.training.grids import averaged_model, save_grid
from ict_fast.training.launch import StopRequest
from ict_fast.training.monitor import Monitor
from ict_fast.training.outcome import RunResult
from ict_fast.training.precision import choice_is_due, choose_trunk, chooses_trunk, leave_fp16
from ict_fast.training.run_directory import GRIDS, Run
from ict_fast.training.saving import Saver
from ict_fast.training.step import TrainStep
from ict_fast.training.world import SAVE, World

_POWER_SNAPSHOTS = 64  # in a run, where --logging.power-ema-every does not say otherwise


def run_loop(
    run: Run,
    train_step: TrainStep,
    loader: Loader,
    monitor: Monitor,
    saver: Saver,
    evaluations: Evaluations,
    stop: StopRequest,
) -> RunResult:
    """Steps until the run is done or stopped, and saves what it ends with.

    Args:
        run, train_step: the run, and its state at `run.step`.
        loader: the batches, by step.
        monitor, saver, evaluations: take the figures, the checkpoints and the measurements.
        stop: hears the signals.
    Returns:
        How it ended, with a line for the person.
    Raises:
        TrainingError: too many steps in a row without a finite gradient, or the end could not be saved.
    """
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
    _save_the_end(run, saver, world, step, best=is_best)
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


def _save_the_end(run: Run, saver: Saver, world: World, step: int, *, best: bool) -> None:
    """Ends with `step` on disk: no later checkpoint makes up for one that could not be written."""
    saver.wait()
    saved_step = world.decide(lambda: saver.step)  # nobody ends before the checkpoint is written
    if saved_step == step:
        return
    world.decide(saver.make_room)
    saver.save(step, best=best)
    saver.wait()
    saved_step, failure = world.decide(lambda: (saver.step, saver.failure))
    if saved_step != step:
        raise TrainingError(
            f"step {step:,} could not be saved ({failure}); {run.out} holds step {saved_step:,}"
        )


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
