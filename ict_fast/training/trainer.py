"""Opens a run, in one process or several, and trains it; the loop itself is in loop.py."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from ict_fast import torchrun
from ict_fast.config import Config, validate
from ict_fast.data.dali_loader import require_dali
from ict_fast.data.loaders import choose_loader, make_loader
from ict_fast.data.order import micro_batch_size
from ict_fast.data.resident_loader import resident_bytes
from ict_fast.data.store import Store
from ict_fast.errors import EXIT_DONE
from ict_fast.networks.cost import network_cost
from ict_fast.planning.plan import choose_micro_batch
from ict_fast.screen import say
from ict_fast.training.describe import describe_initial_share, describe_stages, describe_unused
from ict_fast.training.evaluations import (
    Evaluations,
    describe_missing,
    is_measured,
    require_measurable,
    require_measurement,
)
from ict_fast.training.failures import closing, explained, require_update
from ict_fast.training.graph import require_capturable
from ict_fast.training.initial import RECORD_NAME, initial_weights
from ict_fast.training.launch import StopRequest, configure_torch, resolve_processes
from ict_fast.training.loop import run_loop
from ict_fast.training.monitor import Monitor
from ict_fast.training.outcome import RunResult, report_progress
from ict_fast.training.precision import chooses_trunk, is_too_coarse
from ict_fast.training.processes import MAX_RESTARTS, run_processes
from ict_fast.training.run_data import open_data, prepare_if_bundled
from ict_fast.training.run_directory import Run, lock, open_run, prepare_directory, update
from ict_fast.training.saving import Saver, trunk_name
from ict_fast.training.step import TrainStep, describe_trunk, trunk_dtype
from ict_fast.training.trackers import chosen_tracker, open_tracker
from ict_fast.training.utilisation import Utilisation, describe_run
from ict_fast.training.world import (
    COLLECTIVE_TIMEOUT,
    World,
    joined,
    launched,
    local_rank,
    require_launched,
)

# After the loss of a node: Linux's NFS server keeps its locks for 90 s.
_LEASE_SECONDS = 120.0


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
            result = run_loop(run, train_step, loader, monitor, saver, evaluations, stop)
        finally:
            world.finish()  # a tracker may take long to send what it has
    return replace(result, stop_code=stop.exit_code)


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


def _already_finished(run: Run) -> RunResult:
    if run.checkpoint is not None:
        require_update(run.checkpoint.state.get("skipped", 0), run.step, run.config)
    measured = "" if is_measured(run) else describe_missing(run)
    done = f"{run.out} is finished: {run.step:,} steps are done{measured}"
    return RunResult(run.out, run.step, EXIT_DONE, done)
