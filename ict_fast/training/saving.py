"""A run's checkpoints, and snapshots of its power-function averages, written while the training goes on."""

from __future__ import annotations

import errno
import platform
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ict_fast.checkpoint import make_room, mark_best, write_checkpoint, write_whole
from ict_fast.config import to_dict
from ict_fast.consistency.objective import revision
from ict_fast.data.store import Store
from ict_fast.errors import DivergedError, TrainingError, is_system_error
from ict_fast.training import outcome
from ict_fast.training.failures import what_may_help
from ict_fast.training.monitor import Monitor, reason
from ict_fast.training.run_directory import SNAPSHOTS, Run
from ict_fast.training.step import TrainStep
from ict_fast.version import __version__


class Saver:
    """Copies the state into host memory, and writes the copy in a thread.

    The training waits for the copy, and for the checkpoint before if that is still being written. One that
    cannot be written (a full disk, no memory) costs a warning: the older ones stay, and the training goes on.
    In a run of several processes all compare their states, and process 0 writes.

    A context manager; at its end nothing is left half-written.

    Attributes:
        step: of the newest checkpoint that is known to be on disk, 0 if there is none.
        failure: why the last one that could not be written could not; in process 0.
    """

    def __init__(self, run: Run, store: Store, train_step: TrainStep, monitor: Monitor) -> None:
        self.step = run.step
        self.failure = ""
        self._disk_is_full = False
        self._begun = monotonic()
        self._run, self._store, self._train_step, self._monitor = run, store, train_step, monitor
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ict-fast-saver")
        self._writing: tuple[int, Future[Path]] | None = None
        self._writing_snapshot: tuple[int, Future[Path]] | None = None

    def is_due(self) -> bool:
        """Whether the last checkpoint is --logging.checkpoint-minutes old; says so once, in process 0.

        Not while that one is still being written: the training would wait for it.
        """
        minutes = self._run.config.logging.checkpoint_minutes
        if not minutes or not self._train_step.world.is_first:
            return False
        if monotonic() - self._begun < 60 * minutes or (self._writing and not self._writing[1].done()):
            return False
        self._begun = monotonic()
        return True

    def save(self, step: int, *, best: bool = False) -> None:
        """Begins to write the checkpoint of a step; `best` as for `write_checkpoint`.

        Raises:
            TrainingError: if the processes do not agree on the state, or the one before was not finite.
        """
        self._begun = monotonic()
        tensors = self._train_step.tensors()
        self._train_step.world.require_equal_state(tensors, step)
        if not self._train_step.world.is_first:
            self.step = step
            return
        self.wait()
        try:
            copies = _on_host(tensors)
        except Exception as error:
            self._warn(step, error)
            return
        state = {
            "step": step,
            **self._origin(),
            "objective_revision": revision(self._run.config.method),
            "trunk_dtype": trunk_name(self._train_step),
            "roundings": list(self._train_step.roundings),
            "skipped": int(copies["optimizer"]["skipped"]),
            "versions": {
                "ict_fast": __version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        }
        self._writing = (step, self._thread.submit(self._write, step, copies, state, best))

    def _origin(self) -> dict[str, Any]:
        """What the weights come from, as `reconstruct` passes it on."""
        origin: dict[str, Any] = {
            "config": to_dict(self._run.config),
            "data_fingerprint": self._store.fingerprint,
        }
        if self._run.initial is not None:
            origin["init"] = self._run.initial.record()
        if self._run.extensions:
            origin["extended"] = list(self._run.extensions)
        return origin

    def _write(
        self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], best: bool
    ) -> Path:
        """In the thread."""
        out, logging = self._run.out, self._run.config.logging
        keep, snapshot_every = logging.keep_checkpoints, logging.snapshot_every
        path = write_checkpoint(
            out, step, tensors, state, keep=keep, snapshot_every=snapshot_every, best=best
        )
        outcome.report_progress(self._run.step, step)
        return path

    def make_room(self) -> None:
        """For the last checkpoint, where the disk is too full for it; the newest one before it stays."""
        if self._disk_is_full:
            make_room(self._run.out, snapshot_every=self._run.config.logging.snapshot_every)

    def mark_best(self, step: int) -> None:
        """The checkpoint of a step, which has been saved, is the best one from now on."""
        if not self._train_step.world.is_first:
            return
        self.wait()
        if self.step == step:  # else it could not be written, which has been said
            logging = self._run.config.logging
            mark_best(
                self._run.out, step, keep=logging.keep_checkpoints, snapshot_every=logging.snapshot_every
            )

    def save_snapshot(self, step: int) -> None:
        """Begins to write the power-function averages of a step, in process 0."""
        if not self._train_step.world.is_first:
            return
        self.wait()
        names = self._train_step.averages.power_names
        try:
            copies = _on_host({f"ema-{name}": self._train_step.ema_weights(name) for name in names})
        except Exception as error:
            self._warn_of_snapshot(step, error)
            return
        state = {
            "step": step,
            "updates": int(self._train_step.updates()),
            **self._origin(),
        }
        path = self._run.out / SNAPSHOTS / f"step-{step:08d}"
        self._writing_snapshot = (step, self._thread.submit(write_whole, path, step, copies, state))

    def wait(self) -> None:
        """Waits until nothing is being written any more.

        Raises:
            DivergedError: if the state was not finite; nothing was written.
        """
        if self._writing_snapshot is not None:
            (step, future), self._writing_snapshot = self._writing_snapshot, None
            try:
                future.result()
            except Exception as error:
                self._warn_of_snapshot(step, error)
        if self._writing is None:
            return
        (step, future), self._writing = self._writing, None
        try:
            future.result()
        except TrainingError as error:
            raise DivergedError(
                f"{error}: the training has diverged; {what_may_help(self._run.config)}"
            ) from error
        except Exception as error:
            self._warn(step, error)
            return
        self.step = step

    def _warn(self, step: int, error: Exception) -> None:
        """Of a checkpoint that could not be written; raises what is no error of the system."""
        if not is_system_error(error):
            raise error
        self.failure = reason(error)
        self._disk_is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        before = f"the one of step {self.step:,} stays" if self.step else "there is none before it"
        self._monitor.warn(f"the checkpoint of step {step:,} could not be written ({self.failure}); {before}")

    def _warn_of_snapshot(self, step: int, error: Exception) -> None:
        """As `_warn`, of averages; it does not matter here why they are not finite."""
        if not is_system_error(error) and not isinstance(error, TrainingError):
            raise error
        self._monitor.warn(
            f"the averages of step {step:,} could not be kept ({reason(error)}); `ict-fast ema` will do with"
            " the others"
        )

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(wait=True)


def _on_host(tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    return {
        file: {name: tensor.detach().to("cpu", copy=True) for name, tensor in group.items()}
        for file, group in tensors.items()
    }


def trunk_name(train_step: TrainStep) -> str:
    """The arithmetic of the trunk, as state.json has it."""
    if train_step.config.training.precision == "tf32":
        return "tf32"
    return str(train_step.autocast_dtype or torch.float32).removeprefix("torch.")
