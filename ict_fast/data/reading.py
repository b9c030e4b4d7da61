"""Pieces of a source, read and decoded by as many processes as there are cores."""

from __future__ import annotations

import hashlib
import multiprocessing
import pickle
import signal
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import numpy as np

from ict_fast.children import deaf_to_interrupts
from ict_fast.data.partial_store import Piece
from ict_fast.data.sources.source import Source
from ict_fast.errors import InputError
from ict_fast.hardware import usable_cores

_AHEAD = 2  # pieces that a process has been told of: one it reads, one to go on with at once


def read_pieces(
    source: Source, pieces: Sequence[tuple[int, int]], processes: int | None
) -> Generator[Piece, None, None]:
    """The pieces in the order in which they become ready; at most three per process are in memory.

    Args:
        source: what is read; sent once to each process.
        pieces: (start, stop) of each.
        processes: how many; by default one per usable core. 1: this process alone.
    Raises:
        InputError: the source as a whole cannot be read, or a process has died.
    """
    processes = min(processes or usable_cores(), len(pieces))
    try:
        if processes <= 1:
            for start, stop in pieces:
                yield _read_piece(source, start, stop)
        else:
            yield from _read_in_parallel(source, pieces, processes)
    except MemoryError:
        raise _death() from None
    except OSError as error:
        raise InputError(
            f"{source.name}: cannot be read: {error}; when that is settled, the same command continues"
        ) from error


def _read_in_parallel(
    source: Source, pieces: Sequence[tuple[int, int]], processes: int
) -> Generator[Piece, None, None]:
    """With a pipe to each process, which ends when either side dies, even in the middle of a piece.

    A `ProcessPoolExecutor` has one pipe for all, and waits for ever for the rest of a dead process's result;
    its processes wait for ever for the work of a parent that was killed.
    """
    workers: dict[Connection, BaseProcess] = {}
    ahead = iter(pieces)
    try:
        for _ in range(processes):
            connection, worker = _start_worker()
            workers[connection] = worker
        _send_source(source, workers)
        expected = dict.fromkeys(workers, 0)
        for _ in range(_AHEAD):
            for connection in workers:
                expected[connection] += _send_next(connection, ahead)
        while any(expected.values()):
            for ready in wait([each for each, count in expected.items() if count]):
                assert isinstance(ready, Connection)
                answer = _receive(ready)
                expected[ready] += _send_next(ready, ahead) - 1
                yield answer
    finally:
        for connection, worker in workers.items():
            worker.kill()  # it holds nothing that could be left half-done
            worker.join()
            connection.close()


def _start_worker() -> tuple[Connection, BaseProcess]:
    # Spawned, not forked: a fork of a process that has threads (a progress bar, torch) may hang.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    worker = context.Process(target=_serve, args=(theirs,), daemon=True)
    with deaf_to_interrupts(signal.SIGTERM):  # which schedulers send to all: it is the parent's
        worker.start()
    theirs.close()
    return ours, worker


def _send_source(source: Source, connections: Iterable[Connection]) -> None:
    """Each process takes it once it is up; as an argument of its start it would be waited for, one by one."""
    pickled = pickle.dumps(source)
    for connection in connections:
        try:
            connection.send_bytes(pickled)
        except ConnectionError:
            raise _death() from None


def _send_next(connection: Connection, pieces: Iterator[tuple[int, int]]) -> int:
    """Tells a process of the next piece; returns how many that were, 0 or 1."""
    piece = next(pieces, None)
    if piece is None:
        return 0
    try:
        connection.send(piece)
    except ConnectionError:
        raise _death() from None
    return 1


def _receive(connection: Connection) -> Piece:
    try:
        answer = connection.recv()
    except (EOFError, ConnectionError):
        raise _death() from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def _death() -> InputError:
    return InputError(
        "a process that reads images has died or run out of memory; the same command continues, and a smaller"
        " --processes needs less"
    )


def _serve(connection: Connection) -> None:
    """The life of a process: reads the pieces that it is told of, until there is nobody to tell.

    Args:
        connection: brings the source, and then (start, stop) of each piece.
    """
    try:
        source: Source = connection.recv()
        while True:
            start, stop = connection.recv()
            answer: Piece | Exception
            try:
                answer = _read_piece(source, start, stop)
            except (InputError, OSError, MemoryError) as error:
                answer = error
            connection.send(answer)
    except (EOFError, OSError):  # OSError: its end came within a message
        return


def _read_piece(source: Source, start: int, stop: int) -> Piece:
    remarks: Counter[str] = Counter()
    pixels, rejected = source.read(start, stop, remarks)
    assert pixels.shape == (stop - start, source.resolution, source.resolution, source.image_channels)
    assert pixels.dtype == np.uint8
    pixels = np.require(pixels, requirements=("C", "W"))
    for index in rejected:
        pixels[index - start] = 0
    return Piece(start, pixels, hashlib.sha256(pixels.data).hexdigest(), rejected, +remarks)
