"""Starts a run's processes on this node, and starts them again when one of them is lost."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from ict_fast import torchrun
from ict_fast.children import deaf_to_interrupts, end_with
from ict_fast.errors import EXIT_FAILED, EXIT_SIGINT, EXIT_SIGTERM, HungError, InputError, TrainingError
from ict_fast.hardware import usable_cores
from ict_fast.training import outcome
from ict_fast.training.interrupts import SecondInterrupt
from ict_fast.training.launch import stop_signals
from ict_fast.training.outcome import RunResult
from ict_fast.training.run_directory import TRACEBACK

MAX_RESTARTS = 3
"""A run that loses processes so often without getting any further in between is given up."""

_SILENCED = ("torch.distributed.elastic", "torch.distributed.launcher", "torch.multiprocessing")
_POLL_SECONDS = 0.25
_SAVING_SECONDS = 120  # what a run stopped by a signal has to write its checkpoint; 30 with torch 2.11


def run_processes(
    work: Callable[[bool], RunResult],
    count: int,
    *,
    out: Path,
    step: int = 0,
    warn: Callable[[str], None],
    max_restarts: int = MAX_RESTARTS,
) -> RunResult:
    """Runs `work` in `count` processes under torch's elastic agent until it is done.

    When a process dies, all of them are stopped and started again, as long as the run gets further. What the
    agent would report as a failure like any other keeps its meaning here: errors of the input and of training
    end the run at once, and signals are passed on, so that the run is saved first. A process that waits for
    another one in vain ends the run too, with its diagnosis: somebody should look at that machine.

    Args:
        work: called with whether this is the first attempt; picklable, as the processes are spawned.
        count: the number of processes.
        out: the run's directory.
        step: how far it is.
        warn: told of every new attempt.
        max_restarts: how often in a row the processes are started again without getting any further.
    Returns:
        What process 0 returned.
    Raises:
        InputError, TrainingError: what a process raised, or that several attempts in a row got no further.
    """
    for name in logging.root.manager.loggerDict:  # each of torch's has a level of its own
        if name.startswith(_SILENCED):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # what they report is said here, in a line
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // count)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(_SAVING_SECONDS))
    attempts_in_vain, first = 0, True
    while True:
        with tempfile.TemporaryDirectory(prefix="ict-fast-") as folder:
            cause, signal_number = _attempt(work, count, first, Path(folder), out / TRACEBACK)
            if ended := outcome.outcome(Path(folder)):
                return ended
            # Not from the newest checkpoint's name: that one may be broken, and the run be before it.
            began, step = outcome.progress(Path(folder)) or (step, step)
        if signal_number is not None:
            code = EXIT_SIGINT if signal_number == signal.SIGINT else EXIT_SIGTERM
            return RunResult(out, step, code, f"{out}: {cause}; nothing more was saved")
        first = False
        attempts_in_vain = 1 if step > began else attempts_in_vain + 1
        if attempts_in_vain > max_restarts:
            attempts = f"{attempts_in_vain} attempts" if attempts_in_vain > 1 else "the attempt"
            raise TrainingError(f"{cause}; {attempts} got no further than step {step:,}")
        warn(f"{cause}; starting all {count} processes again from step {step:,}")


def _attempt(
    work: Callable[[bool], RunResult], count: int, first: bool, folder: Path, traceback: Path
) -> tuple[str, int | None]:
    """One start of all processes; returns what ended them, and the signal if it was one to this process."""
    with (
        _keeping_handlers(),
        _ending_who_hangs(folder),
        # torch's agent would wait for them as long after a second Ctrl-C as after the first.
        SecondInterrupt(_kill_all, partial(_kill_beginners, folder, count)),
        deaf_to_interrupts(),  # in this thread: the other two have begun, and hear them
    ):
        return _agent(work, count, first, folder, traceback)


def _agent(
    work: Callable[[bool], RunResult], count: int, first: bool, folder: Path, traceback: Path
) -> tuple[str, int | None]:
    """See `_attempt`."""
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        signals_to_handle=",".join(number.name for number in stop_signals()),
    )
    try:
        elastic_launch(settings, _worker)(work, first, str(folder), os.getpid())
    except SignalException as asked:
        _let_save()
        return f"stopped by {signal.Signals(asked.sigval).name}", asked.sigval
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        if failure.exitcode < 0:
            return f"process {rank} was ended by {failure.signal_name()}", None
        if not isinstance(failure.message, dict):
            return f"process {rank} ended with exit code {failure.exitcode}", None
        text = " ".join(str(failure.message["message"]).split())
        with suppress(OSError):
            traceback.write_text(str(failure.message["extraInfo"]["py_callstack"]))
        return f"process {rank} failed: {text} (traceback: {traceback})", None
    return "the processes ended without a result", None


@contextmanager
def _keeping_handlers() -> Iterator[None]:
    """Afterwards signals have the handlers of before: torch's agent leaves its own behind, which raise."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in stop_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _let_save() -> None:
    """Waits for processes that save, whatever signal comes, and kills those that do not end.

    The agent has waited, unless it was sent three signals: the second begins its wait anew, the third ends
    it. Only a second Ctrl-C ends the saving, see SecondInterrupt.
    """
    with suppress(ValueError):  # not the main thread, where no signal arrives
        for number in stop_signals():
            signal.signal(number, lambda *_: None)  # not SIG_IGN, with which no Ctrl-C is noted
    end = time.monotonic() + _SAVING_SECONDS
    for process in multiprocessing.active_children():
        process.join(max(0.0, end - time.monotonic()))
    _kill_all()


@contextmanager
def _ending_who_hangs(folder: Path) -> Iterator[None]:
    """While open, a process that reports that it waits in vain ends all of them, by SIGKILL.

    The agent would ask them by SIGTERM, which a stopped one does not hear, and wait for the time that saving
    may take.
    """
    done = threading.Event()

    def watch() -> None:
        while not done.wait(_POLL_SECONDS):
            if outcome.is_hung(folder):
                for path in folder.glob("*.pid"):
                    with suppress(OSError, ValueError):
                        os.kill(int(path.read_text()), signal.SIGKILL)
                return

    thread = threading.Thread(target=watch, name="ict-fast-hung", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _kill_beginners(folder: Path, count: int) -> None:
    """Kills all unless all have begun: they do not hear a Ctrl-C yet, and have nothing to save."""
    if len(list(folder.glob("*.pid"))) < count:
        _kill_all()


def _kill_all() -> None:
    for process in multiprocessing.active_children():
        process.kill()


def _worker(work: Callable[[bool], RunResult], first: bool, folder: str, parent: int) -> None:
    """Runs in each process."""
    try:
        _work(work, first, folder, parent)
    except Exception:  # which `record` has written down
        time.sleep(torchrun.LEAVING_SECONDS)
        torchrun.leave(EXIT_FAILED)
    except KeyboardInterrupt:  # the interpreter's own end may abort, for threads of torch that are beginning
        os._exit(EXIT_SIGINT)


@record
def _work(work: Callable[[bool], RunResult], first: bool, folder: str, parent: int) -> None:
    """How it ends is written into `folder`."""
    # Its own process group: a Ctrl-C of the terminal reaches the parent alone, which passes it on once.
    os.setpgid(0, 0)
    end_with(parent)  # killed, it leaves nobody who goes on training
    rank = int(os.environ["RANK"])
    outcome.report_to(Path(folder))
    (Path(folder) / f"{rank}.pid").write_text(str(os.getpid()))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    try:
        result = work(first)
    except (InputError, TrainingError) as error:
        outcome.report_error(rank, error, hung=isinstance(error, HungError))
        os._exit(EXIT_FAILED)
    if rank == 0:
        outcome.report_result(rank, result)
    # After a signal, to return may be to wait for the agent, which waits for the end of this process. Or the
    # agent has got none: who leaves then without an error keeps it waiting, and with one ends the others.
    if code := result.exit_code or result.stop_code:
        outcome.await_process_0()
        raise SystemExit(code)
