"""Computes the chunks of an evaluation, here or in several processes of this machine."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from ict_fast.children import deaf_to_interrupts
from ict_fast.errors import InputError, TrainingError
from ict_fast.evaluation.chunks import Chunk, Finished, Work, in_words
from ict_fast.hardware import usable_cores
from ict_fast.networks.switches import configure_torch

Report = Callable[[int, str], None]


def compute_chunks(
    work: Work, chunks: Sequence[Chunk], finished: Finished, devices: Sequence[torch.device], report: Report
) -> None:
    """Computes what is missing of the chunks.

    Args:
        finished: where they are kept; with several devices it needs a folder.
        devices: one for each process; a single one is that of this process, where the model is.
        report: called with what is done, of the sum of the chunks' costs, and what is being done.
    Raises:
        InputError, TrainingError, OSError: what a process raised; or one that was killed, by its signal.
    """
    todo = finished.missing(chunks)
    total, done = sum(chunk.cost for chunk in chunks), 0
    done = total - sum(chunk.cost for chunk in todo)

    def advance(cost: int, chunk: Chunk) -> None:
        nonlocal done
        done += cost
        report(done, _doing(chunk, chunks))

    if todo and len(devices) > 1:
        _in_processes(work, todo, finished, devices, advance)
        return
    for chunk in todo:
        report(done, _doing(chunk, chunks))
        arrays = work.compute(chunk, devices[0], lambda cost, chunk=chunk: advance(cost, chunk))  # type: ignore[misc]
        finished.keep(chunk, arrays)


def threads_each(processes: int) -> int:
    """The threads of torch in each of the processes of `compute_chunks`; a single one is this process."""
    if processes == 1:
        return torch.get_num_threads()
    return int(os.environ.get("OMP_NUM_THREADS") or max(1, usable_cores() // processes))


def _doing(chunk: Chunk, chunks: Sequence[Chunk]) -> str:
    images = sum(other.count for other in chunks if other.steps == chunk.steps)
    if chunk.steps == 0:
        return f"measuring {images:,} real images"
    return f"sampling {images:,} images in {in_words(chunk.steps)}"


def _in_processes(
    work: Work,
    todo: Sequence[Chunk],
    finished: Finished,
    devices: Sequence[torch.device],
    advance: Callable[[int, Chunk], None],
) -> None:
    assert finished.folder is not None
    context = multiprocessing.get_context("spawn")  # a fork of a process that has used CUDA cannot use it
    threads = threads_each(len(devices))
    device = next(work.model.parameters()).device
    work.model.to("cpu")
    processes, pipes = [], []
    try:
        for place in devices:
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(place, threads, there), daemon=True)
            with deaf_to_interrupts(signal.SIGTERM):  # which schedulers send to all: it is the parent's
                process.start()
            there.close()  # so that the end of the process is the end of the pipe
            processes.append(process)
            pipes.append(here)
        # As bytes: torch would send the tensors through shared memory, of which containers have little.
        _send_work(pickle.dumps((work, finished)), todo, pipes)
        open_pipes = list(pipes)
        while open_pipes:
            for pipe in wait(open_pipes):
                assert isinstance(pipe, Connection)
                try:
                    answer = pipe.recv()
                except (EOFError, ConnectionError):
                    open_pipes.remove(pipe)
                    _require_success(pipes.index(pipe), processes[pipes.index(pipe)])
                    continue
                if isinstance(answer, Exception):
                    raise answer
                advance(*answer)
        if finished.missing(todo):
            raise TrainingError("a process of the evaluation ended early; the same command continues")
    finally:
        for process in processes:
            process.kill()  # it holds nothing that could be left half-done
        for process in processes:
            process.join()
        work.model.to(device)


def _send_work(given: bytes, todo: Sequence[Chunk], pipes: Sequence[Connection]) -> None:
    """Each process takes it once it is up; as an argument of its start it would be waited for, one by one."""
    for number, pipe in enumerate(pipes):
        with suppress(ConnectionError):  # why it has ended is found when it is listened to
            pipe.send_bytes(given)
            pipe.send(list(todo[number :: len(pipes)]))


def _require_success(number: int, process: Any) -> None:
    process.join()
    code = process.exitcode
    if code:
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        raise TrainingError(f"process {number} of the evaluation {how}; the same command continues")


def _serve(device: torch.device, threads: int, pipe: Connection) -> None:
    """Runs in each process.

    Args:
        device, threads: to compute on, and with how many threads.
        pipe: brings the work, and then this process's share of the chunks; takes what is done, or an error.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C of the terminal is for the parent, which ends us
    try:
        work, finished = pipe.recv()
        share = pipe.recv()
    except (EOFError, OSError):  # OSError: its end came within a message
        return
    try:
        torch.set_num_threads(threads)
        configure_torch(device, deterministic=False)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        work.model.to(device).eval()
        for chunk in share:
            arrays = work.compute(chunk, device, lambda cost, chunk=chunk: pipe.send((cost, chunk)))
            finished.keep(chunk, arrays)
    except ConnectionError:
        pass  # the parent was killed: nobody waits for the rest
    except (InputError, TrainingError, OSError) as error:
        pipe.send(error)
    except (RuntimeError, MemoryError) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        pipe.send(TrainingError(f"a process of the evaluation failed: {text}"))
