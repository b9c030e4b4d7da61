"""A run's directory: whether to start, resume or refuse, and the log that must agree with the checkpoint."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from ict_fast.checkpoint import (
    Checkpoint,
    checkpoint_steps,
    latest_checkpoint,
    set_broken_aside,
    step_folders,
)
from ict_fast.config import Config, differences, from_dict, to_dict
from ict_fast.consistency.curriculum import Extension, num_scales, read_extensions
from ict_fast.consistency.objective import revision
from ict_fast.durable import replace_durably
from ict_fast.errors import InputError, TrainingError
from ict_fast.locks import NO_LOCKS
from ict_fast.training.initial import RECORD_NAME, Initial, find_initial, settle_initial
from ict_fast.training.step import learning_rate

LOG_NAME = "log.jsonl"
EVALUATIONS = "evaluations.jsonl"
REFERENCES = "evaluation"  # what was computed of a reference that has no folder of its own
SNAPSHOTS = "ema-snapshots"
GRIDS = "grids"
TRACEBACK = "crash.txt"
_LOCK_NAME = ".lock"


@dataclass(frozen=True)
class Run:
    """A directory that is ready to be trained in."""

    out: Path
    config: Config
    checkpoint: Checkpoint | None
    steps_seen: frozenset[int] = frozenset()
    """Steps of the checkpoints that were there when `checkpoint` was chosen, whole or not."""
    initial: Initial | None = None
    """What its weights began with; None if at random."""
    extensions: tuple[Extension, ...] = ()
    """Each time that it was extended after its first steps."""

    @property
    def step(self) -> int:
        """Steps that are done."""
        return 0 if self.checkpoint is None else self.checkpoint.step

    @property
    def finished(self) -> bool:
        return self.step >= self.config.training.total_steps


def open_run(
    config: Config,
    out: Path,
    resume: str,
    extend: int | None,
    warn: Callable[[str], None],
    init: Path | None = None,
) -> Run:
    """Decides what a `train` command means for its directory, and changes nothing in it.

    Args:
        config: what was asked for.
        out: the directory, there or not.
        resume: "auto" starts or resumes, "never" refuses an existing run, "must" refuses a new one.
        extend: the new total number of steps of an existing run, or None.
        warn: told of every broken checkpoint that is passed over, and of an extension at which N(k) falls or
            the learning rate rises.
        init: the run, checkpoint or imported model to begin with, or None for random weights.
    Raises:
        InputError: if the run there, or its checkpoint, is another one's (names each field of science that
            differs), or `resume` or `extend` rule it out, or `out` is something else.
    """
    if resume not in ("auto", "never", "must"):
        raise InputError(f"--resume is {resume}; it must be auto, never or must")
    steps_seen = checkpoint_steps(out)
    try:
        # What a run leaves that ended before config.json was written counts for nothing.
        entries = [
            entry
            for entry in (out.iterdir() if out.exists() else ())
            if not entry.name.startswith(".tmp-") and entry.name not in (_LOCK_NAME, RECORD_NAME, TRACEBACK)
        ]
    except OSError as error:
        raise InputError(f"{out} cannot be read ({error.strerror}); --out must name a directory") from None
    config_file = out / "config.json"
    without_config = latest_checkpoint(out, warn) if entries and config_file not in entries else None
    if config_file not in entries and without_config is None:
        if entries:
            raise InputError(f"{out} is not empty and holds no run (no config.json); choose another --out")
        if resume == "must":
            raise InputError(f"there is no run in {out} to resume; --resume auto starts one")
        if extend is not None:
            raise InputError(f"there is no run in {out} to extend; set --training.total-steps to start one")
        # Not by the record of a run that ended while it was being made.
        return Run(out, config, None, steps_seen, None if init is None else find_initial(init))

    if without_config is not None and "imported" in without_config.state:
        raise InputError(
            f"{out} is an imported model, not a run; `--init {out}` begins a run elsewhere with it"
        )
    if resume == "never":
        raise InputError(
            f"there is a run in {out} already; --resume auto continues it, another --out starts one"
        )
    if without_config is None:
        stored = read_config(config_file)
    else:
        origin = without_config.path / "state.json"
        stored = from_dict(without_config.state.get("config", {}), str(origin))
        warn(f"{config_file} is missing; what it said is restored from {origin}")
    if extend is not None:
        if extend < stored.training.total_steps:
            raise InputError(
                f"--extend is {extend}; the run in {out} has {stored.training.total_steps} steps"
            )
        config = replace(config, training=replace(config.training, total_steps=extend))
        stored = replace(stored, training=replace(stored.training, total_steps=extend))
    different = differences(stored, config)
    if different:
        fields = ", ".join(f"{name} (there {ours!r}, asked {theirs!r})" for name, ours, theirs in different)
        hint = "another --out starts a new run"
        if {name for name, _, _ in different} <= {"optimizer.ema_decays", "optimizer.power_ema"}:
            hint = "an average begins with its run: another --out starts one with these"
        if [name for name, _, _ in different] == ["training.total_steps"]:
            longer = config.training.total_steps > stored.training.total_steps
            option = "--extend" if longer else "--training.total-steps"
            steps = max(config.training.total_steps, stored.training.total_steps)
            hint = f"{option} {steps} continues it"
        raise InputError(f"the run in {out} differs in {fields}; {hint}")
    checkpoint = latest_checkpoint(out, warn)
    if checkpoint is None and resume == "must":
        raise InputError(f"the run in {out} has no checkpoint to resume from; --resume auto starts it again")
    if checkpoint is None and (logged := _last_logged_step(out / LOG_NAME)):
        warn(f"{out} has a log of {logged:,} steps and no checkpoint; the run starts again, and its log too")
    extensions: list[Extension] = []
    if checkpoint is not None:
        origin = checkpoint.path / "state.json"
        extensions = read_extensions(checkpoint.state, origin, config.training.total_steps)
        trained = from_dict(checkpoint.state.get("config", to_dict(config)), str(origin))
        others = [name for name, _, _ in differences(trained, config) if name != "training.total_steps"]
        if others:
            raise InputError(
                f"{checkpoint.path} was trained with other {', '.join(others)} than {config_file} says; one"
                " of them is not this run's: restore it, or choose another --out"
            )
        if checkpoint.state.get("objective_revision", 1) != revision(config.method):
            raise InputError(
                f"{checkpoint.path} was trained by another version, to which --method.metric"
                f" {config.method.metric} meant another loss; that version goes on with it, and here another"
                " --out starts a new run"
            )
        if extensions and extensions[-1].step == checkpoint.step:
            _warn_of_extension(extensions[-1], config, warn)
    return Run(out, config, checkpoint, steps_seen, settle_initial(out, checkpoint, init), tuple(extensions))


def _warn_of_extension(extension: Extension, config: Config, warn: Callable[[str], None]) -> None:
    """Says what goes back where a run is extended."""
    step, total = extension.step, config.training.total_steps
    before: float = num_scales(step - 1, extension.total_steps, config.method)
    now: float = num_scales(step, total, config.method)
    if now < before:
        warn(
            f"the curriculum is laid over {total:,} steps anew (--extend): N falls from {before} to {now} at"
            f" step {step:,}"
        )
    planned = replace(config, training=replace(config.training, total_steps=extension.total_steps))
    before = max(learning_rate(step - 1, planned), learning_rate(step, planned))  # in a warm-up the latter
    now = learning_rate(step, config)
    if now > before:
        warn(
            f"the learning rate's decay is laid over {total:,} steps anew (--extend): it rises from"
            f" {before:.3g} to {now:.3g} at step {step:,}"
        )


@contextmanager
def lock(run: Run, warn: Callable[[str], None], patience: float = 0.0) -> Iterator[None]:
    """Keeps every other process from training in the run's directory, which is created.

    Args:
        run: see `open_run`.
        warn: told if the file system has no locks.
        patience: seconds to wait for another process: one whose node is lost keeps a lock of NFS until its
            server gives it up.

    Raises:
        InputError: if another process trains there, or has trained there since the run was opened, or the
            directory cannot be written.
        TrainingError: if the file system fails, or is full and the run has a checkpoint.
    """
    path = run.out / _LOCK_NAME
    try:
        run.out.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise _unwritable(run, error) from None
    try:
        try:
            _lock_within(patience, descriptor)
        except BlockingIOError:
            holder = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
            raise InputError(
                f"another process (number {holder}) is training in {run.out}; wait for it, or choose another"
                " --out"
            ) from None
        except OSError as error:
            unlocked = f"{run.out} cannot be locked ({error.strerror})"
            if error.errno not in NO_LOCKS:
                raise TrainingError(unlocked) from None
            warn(f"{unlocked}: nothing keeps a second run out of it")
        if checkpoint_steps(run.out) != run.steps_seen:
            raise InputError(
                f"another process has just saved a checkpoint in {run.out}; the same command goes on from it"
            )
        with suppress(OSError):  # the number is a courtesy
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"{os.getpid()}\n".encode())
        yield
    finally:
        os.close(descriptor)


def _lock_within(seconds: float, descriptor: int) -> None:
    until = time.monotonic() + seconds
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= until:
                raise
        time.sleep(min(1.0, seconds / 10))


def read_config(path: Path) -> Config:
    """The configuration stored in a run.

    Raises:
        InputError: naming the file, if it cannot be read.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); restore it, or choose another --out") from None
    return from_dict(values, str(path))


def prepare_directory(run: Run) -> None:
    """Writes config.json, and cuts back to the checkpoint's step whatever grows with the run.

    The directory is there and locked.

    Raises:
        InputError, TrainingError: see `update`.
    """
    try:
        if run.initial is None:
            (run.out / RECORD_NAME).unlink(missing_ok=True)
        update(run, "config.json", (json.dumps(to_dict(run.config), indent=2) + "\n").encode())
        for log in (run.out / LOG_NAME, run.out / EVALUATIONS):
            if log.exists():
                kept = [line for line in log.read_bytes().splitlines() if _step_of(line) <= run.step]
                update(run, log.name, b"".join(line + b"\n" for line in kept))
        set_broken_aside(run.out, run.step)
        # Those of later steps are another history's.
        for step, snapshot in step_folders(run.out / SNAPSHOTS).items():
            if step > run.step:
                shutil.rmtree(snapshot)
        for grid in (run.out / GRIDS).glob("step-*.png"):
            number = grid.stem.removeprefix("step-")
            if number.isdecimal() and int(number) > run.step:
                grid.unlink()
    except OSError as error:
        raise _unwritable(run, error) from None


def update(run: Run, name: str, content: bytes) -> None:
    """Writes a file of the run, unless it holds that already: a disk may be full.

    Raises:
        InputError: if it cannot be written.
        TrainingError: instead, if its disk is full and the run has a checkpoint.
    """
    path = run.out / name
    try:
        if not path.exists() or path.read_bytes() != content:
            replace_durably(path, content)
    except OSError as error:
        raise _unwritable(run, error) from None


def _unwritable(run: Run, error: OSError) -> InputError | TrainingError:
    what = f"{run.out} cannot be written ({error.strerror})"
    if run.checkpoint is not None and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return TrainingError(f"{what}; with room for it the same command resumes at step {run.step:,}")
    return InputError(f"{what}; choose another --out")


def _last_logged_step(log: Path) -> int:
    try:
        steps = [_step_of(line) for line in log.read_bytes().splitlines()]
    except OSError:
        return 0
    return int(max((step for step in steps if step < float("inf")), default=0))


def _step_of(line: bytes) -> float:
    """The step of a log line; infinite for one that a killed process left half-written."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
