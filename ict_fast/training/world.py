"""The processes of one run, and what they agree on. A run of one process needs no communication."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ict_fast.errors import HungError, InputError, TrainingError
from ict_fast.training import outcome
from ict_fast.training.launch import StopRequest
from ict_fast.training.lookout import Lookout

T = TypeVar("T")

SAVE = 1
"""What `stop_code` says when all are to save a checkpoint and go on; exit codes of signals are larger."""

COLLECTIVE_TIMEOUT = 600.0
"""Seconds that a process may wait for the slowest: the first one writes pictures and checkpoints."""

# Later, NCCL aborts the process by itself, without a word on which other one did not come.
_NCCL_LATER = 60.0

_SIGN_OF_LIFE_SECONDS = 5.0


class World:
    """This process among those that train one model together.

    Attributes:
        rank: number of this process among all, from 0; process 0 speaks and writes.
        size: number of processes on all nodes.
    """

    def __init__(self, lookout: Lookout | None = None, timeout: float = COLLECTIVE_TIMEOUT) -> None:
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self._lookout = lookout
        self._timeout = timeout
        self._between_signs = min(_SIGN_OF_LIFE_SECONDS, timeout / 5)
        self._got_on = time.monotonic()
        patience = timedelta(seconds=timeout)
        # Over gloo whatever the device: reading the flag waits for the other hosts, never for a GPU.
        self._hosts = dist.new_group(backend="gloo", timeout=patience) if self.size > 1 else None
        self._stop_code = torch.zeros(1, dtype=torch.int64)
        self._asked: Any = None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def reached(self, step: int) -> None:
        """This process begins a step."""
        if self._lookout is not None:
            self._lookout.reached(step)

    def get_on(self) -> None:
        """This process gets on in what takes longer than a step; a sign that it is not stuck."""
        self._got_on = time.monotonic()
        if self._lookout is not None:
            self._lookout.get_on()

    def compiles(self) -> None:
        """The step that has begun compiles, and may take longer than others."""
        if self._lookout is not None:
            self._lookout.compiles()

    def finish(self) -> None:
        """This process has done its last step, and waits for no other one any more."""
        if self._lookout is not None:
            self._lookout.finish()

    def waiting(self, what: str) -> AbstractContextManager[None]:
        """While open, the host waits for what other processes must do as well; `what` is for a diagnosis."""
        return nullcontext() if self._lookout is None else self._lookout.waiting(what)

    def decide(self, choose: Callable[[], T]) -> T:
        """What process 0 chooses, in every process.

        Raises:
            InputError, TrainingError: in every process, what process 0 raises. After any other error it ends,
                and its launcher ends the rest.
        """
        if self.size == 1:
            return choose()
        chosen: list[Any] = [None]
        if self.is_first:
            try:
                chosen = [choose()]
            except (InputError, TrainingError) as error:
                chosen = [error]
        with self.waiting("a decision of process 0"):
            dist.broadcast_object_list(chosen, src=0, group=self._hosts)
        if isinstance(chosen[0], InputError | TrainingError):
            raise chosen[0]
        return chosen[0]

    def together(self, work: Callable[[], T]) -> T:
        """What each process works out for itself, once all have; `work` must not communicate.

        Raises:
            InputError, TrainingError: in every process: its own, else that of the first one that has one.
        """
        if self.size == 1:
            return work()
        failed: InputError | TrainingError | None = None
        try:
            result = work()
        except (InputError, TrainingError) as error:
            failed = error
        mine = None if failed is None else (type(failed), f"on {os.uname().nodename}: {failed}")
        of_all: list[Any] = [None] * self.size
        with self.waiting("all processes to begin"):
            dist.all_gather_object(of_all, mine, group=self._hosts)
        if failed is not None:
            raise failed
        for rank, theirs in enumerate(of_all):
            if theirs is not None:
                kind, text = theirs
                raise kind(f"process {rank} {text}")
        return result

    def while_first(self, work: Callable[[], T], what: str, stop: StopRequest) -> T:
        """What process 0 works out, in every process, however long it takes.

        All give each other a sign of life every few seconds, so that none waits in vain for longer than a
        collective may take, as long as `work` calls `get_on` that often. It must not communicate.

        Args:
            work: as for `decide`.
            what: process 0 is doing, for a diagnosis.
            stop: this process's; that of process 0 hears of the others', so that its work may end early.
        """
        if self.size == 1:
            return work()
        if not self.is_first:
            while self._sign_of_life(stop):
                pass
            return self.decide(work)
        ended = threading.Event()
        failed: list[RuntimeError] = []
        self._got_on = time.monotonic()

        def beat() -> None:
            while not ended.wait(self._between_signs):
                if time.monotonic() - self._got_on > self._timeout:
                    continue  # stuck: the others may say so
                try:
                    self._say_alive(True, stop)
                except RuntimeError as error:  # one of them is lost
                    failed.append(error)
                    return

        thread = threading.Thread(target=beat, name="ict-fast-sign-of-life")
        thread.start()
        try:
            with nullcontext() if self._lookout is None else self._lookout.doing(what):
                result = work()
        finally:
            ended.set()
            thread.join()
            if not failed:
                self._say_alive(False, stop)
        if failed:
            raise failed[0]
        return self.decide(lambda: result)

    def _sign_of_life(self, stop: StopRequest) -> bool:
        """Whether process 0 is still at work, as it says."""
        with self.waiting("a sign of life of process 0"):  # each one counts as progress
            return self._say_alive(False, stop)

    def _say_alive(self, at_work: bool, stop: StopRequest) -> bool:
        """Whether any process is at work, which only process 0 can be."""
        said = torch.tensor([at_work, stop.exit_code or 0], dtype=torch.int64)
        dist.all_reduce(said, dist.ReduceOp.MAX, group=self._hosts)
        if self.is_first and stop.exit_code is None:
            stop.exit_code = int(said[1]) or None
        return bool(said[0])

    def connect(self, device: torch.device) -> None:
        """Connects the devices of all processes, which NCCL would else do in their first collective.

        NCCL has no timeout for that: the lookout watches it. All meet over gloo first, where none is missed
        for what it may rightly do before.

        Args:
            device: where this process trains.
        """
        if self.size == 1:
            return
        self.any(False)
        with self.waiting("the devices of all processes to connect"):
            self.add(torch.zeros(1, device=device))
            if device.type == "cuda":
                torch.cuda.synchronize(device)

    def add(self, value: torch.Tensor) -> torch.Tensor:
        """Replaces a tensor on the run's device by its sum over the processes; the host does not wait."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def any(self, here: bool) -> bool:
        """Whether it is so in any process."""
        if self.size == 1:
            return here
        found = torch.tensor(here, dtype=torch.int64)
        with self.waiting("all processes to begin"):
            dist.all_reduce(found, dist.ReduceOp.MAX, group=self._hosts)
        return bool(found)

    def least(self, here: int, what: str) -> int:
        """The smallest of all processes' numbers; `what` they are is for a diagnosis."""
        if self.size == 1:
            return here
        found = torch.tensor(here, dtype=torch.int64)
        with self.waiting(f"all processes to compare {what}"):
            dist.all_reduce(found, dist.ReduceOp.MIN, group=self._hosts)
        return int(found)

    def stop_code(self, mine: int | None) -> int | None:
        """The exit code with which all stop at this step, SAVE if they save it and go on, or None.

        To be called once before each step. What a process asks for takes effect one call later, in all of
        them at the same step, so that nobody waits for an answer.
        """
        if self.size == 1:
            return mine
        agreed = 0
        if self._asked is not None:
            with self.waiting("all processes to begin the step"):
                self._asked.wait()
            agreed = int(self._stop_code)
        self._stop_code.fill_(mine or 0)
        self._asked = dist.all_reduce(self._stop_code, dist.ReduceOp.MAX, group=self._hosts, async_op=True)
        return agreed or None

    def require_equal(self, value: Any, what: str, cure: str = "") -> None:
        """Checks that every process has the same.

        Args:
            value: of this process; picklable.
            what: it is, in the plural.
            cure: what would be right, if that is known.
        Raises:
            InputError: naming the processes whose value is not that of process 0.
        """
        if self.size == 1:
            return
        values: list[Any] = [None] * self.size
        with self.waiting(f"all processes to compare {what}"):
            dist.all_gather_object(values, value, group=self._hosts)
        if other := [str(rank) for rank in range(self.size) if values[rank] != values[0]]:
            cure = f"; {cure}" if cure else ""
            raise InputError(f"{what} differ between process 0 and process {', '.join(other)}{cure}")

    def require_equal_state(self, tensors: Mapping[str, Mapping[str, torch.Tensor]], step: int) -> None:
        """Compares the run's state over all processes by the exclusive-or of each tensor's bits.

        Args:
            tensors: by file and name, as a checkpoint holds them.
            step: for the message.
        Raises:
            TrainingError: naming a tensor that differs.
        """
        if self.size == 1:
            return
        names = [f"{file}/{name}" for file, group in tensors.items() for name in group]
        bits = torch.stack(
            [
                torch.hash_tensor(tensor).view(torch.int64)
                for group in tensors.values()
                for tensor in group.values()
            ]
        ).cpu()
        of_all = [torch.empty_like(bits) for _ in range(self.size)]
        with self.waiting("all processes to compare their states"):
            dist.all_gather(of_all, bits, group=self._hosts)
        for rank, theirs in enumerate(of_all):
            if not torch.equal(theirs, of_all[0]):
                name = names[int((theirs != of_all[0]).nonzero()[0])]
                raise TrainingError(
                    f"the processes no longer agree at step {step:,}: {name} of process {rank} is not that of"
                    " process 0; the same command resumes from the last checkpoint"
                )


def launched() -> bool:
    """Whether torch's elastic launcher (`torchrun`, or ours) has started this process for a run."""
    return dist.is_torchelastic_launched()


def local_rank() -> int:
    """Number of this process on its node: the GPU it has."""
    return int(os.environ["LOCAL_RANK"]) if launched() else 0


def require_launched(device: torch.device, asked: int | None, max_restarts: int | None = None) -> None:
    """Checks what was asked for, if anything, against what the launcher has started on this node.

    Raises:
        InputError: if the numbers of processes differ, or restarts were asked for, which are the launcher's;
            or if this process finds no GPU left for it.
        TrainingError: instead of the last, if ict-fast itself has counted the GPUs before.
    """
    # Those that ict-fast itself has started are not given the option.
    if max_restarts is not None:
        raise InputError("--max-restarts is torchrun's here: give it to torchrun, before -m ict_fast")
    started = int(os.environ["LOCAL_WORLD_SIZE"])
    if asked not in (None, started):
        raise InputError(
            f"{asked} processes are asked for, and torchrun has started {started} on this node; give the"
            " number to torchrun (--nproc-per-node) and leave --gpus and --processes out"
        )
    # Not the number of processes: a launcher may show each of them its own GPU alone, as number 0.
    if device.type == "cuda" and local_rank() >= (visible := torch.cuda.device_count()):
        if outcome.reports():
            raise TrainingError(
                f"torch now sees {visible} of the {started} GPUs: `ict-fast doctor` may say more; --gpus with"
                f" {visible} or less, of which the batch is a multiple, goes on without the rest"
            )
        raise InputError(
            f"torchrun has started {started} processes on this node, where torch sees {visible}"
            f" GPU{'s' * (visible > 1)}; choose --nproc-per-node {visible}, or --device cpu"
        )


@contextmanager
def joined(device: torch.device, timeout: float = COLLECTIVE_TIMEOUT) -> Iterator[World]:
    """The world of this process: joined if a launcher started it, else a world of one.

    Args:
        device: where this process trains; NCCL connects GPUs, gloo CPUs.
        timeout: seconds that a process waits for another one.
    Raises:
        HungError: if not all processes join in time; instead of the error of an operation inside that the
            other processes do not come to.
    """
    if not launched():
        yield World()
        return
    nccl = device.type == "cuda"
    if nccl:
        torch.cuda.set_device(device)
    patience = timedelta(seconds=timeout + _NCCL_LATER if nccl else timeout)
    with _joining(timeout):
        dist.init_process_group("nccl" if nccl else "gloo", timeout=patience)
    if dist.get_world_size() == 1:
        try:
            yield World()
        finally:
            dist.destroy_process_group()
        return
    with Lookout(dist.get_rank(), dist.get_world_size(), _record(), timeout) as lookout:
        with _joining(timeout):  # NCCL has not met anybody yet
            world = World(lookout, timeout)
        try:
            yield world
        except RuntimeError as error:
            if _timed_out(error):
                raise HungError(lookout.diagnosis()) from error
            raise
    dist.destroy_process_group()  # not after an error: it would wait for what the others no longer do


@contextmanager
def _joining(timeout: float) -> Iterator[None]:
    """Inside, a process that does not come has not joined."""
    try:
        yield
    except RuntimeError as error:
        if not _timed_out(error):
            raise
        count = os.environ["WORLD_SIZE"]
        raise HungError(
            f"not all of the {count} processes have joined within {timeout:g} s (--collective-timeout)"
        ) from error


def _timed_out(error: Exception) -> bool:
    """As gloo says it, or a store: "wait timeout after 6000ms, keys: ..."."""
    return any(words in str(error).lower() for words in ("timed out", "wait timeout"))


def _record() -> dist.Store:
    """Where the processes say what they do: the store by which they have found each other.

    Words of an earlier attempt, in a store that torchrun keeps, are no danger: each process says its first
    one before any is read.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False)
    return dist.PrefixStore("ict-fast", store)
