"""Which process a stuck run waits for: each says where it is, and reads the others when it waits too long.

A collective operation that one process does not come to holds up all others. Where the host waits (gloo), it
gets an error after the timeout; where only the device does (NCCL), the host stops in whatever it asks of the
device next. So a thread watches that the process gets on, and ends it if it does not.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import timedelta
from typing import Any, NoReturn

import torch.distributed as dist

from ict_fast.errors import EXIT_FAILED, HungError
from ict_fast.training import outcome

_MOST_BETWEEN_WORDS = 10.0  # seconds
_GRACE = 5.0  # for the error of the operation itself, which ends a run in a more orderly way
_ANSWER = timedelta(seconds=5)  # what the store may take to tell what the others have said
_COMPUTING = "computing"
_WAITING = "waiting for "


class Lookout:
    """Publishes what this process does, and says what holds it up.

    A context manager: the thread runs inside.

    Args:
        rank, size: this process among all.
        store: where all say what they do; a client of this process's own.
        seconds: without any progress, until the process is ended. The first step, which compiles, may take
            longer, unless it is another process that is waited for.
    """

    def __init__(self, rank: int, size: int, store: dist.Store, seconds: float) -> None:
        self._rank, self._size, self._store, self._seconds = rank, size, store, seconds
        self._step, self._steps_reached = 0, 0
        self._doing, self._since = _COMPUTING, time.monotonic()
        self._between_words = min(_MOST_BETWEEN_WORDS, seconds / 10)
        self._heard: dict[int, tuple[dict[str, Any], float]] = {}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="ict-fast-lookout", daemon=True)

    def reached(self, step: int) -> None:
        """The process begins this step."""
        self._step, self._since = step, time.monotonic()
        self._steps_reached += 1

    def get_on(self) -> None:
        """The process gets on within its step."""
        self._since = time.monotonic()

    def compiles(self) -> None:
        """The step that has begun compiles: it may take as long as the first one."""
        self._steps_reached = 1

    def waiting(self, what: str) -> AbstractContextManager[None]:
        """While open, the host waits for something that depends on other processes."""
        return self.doing(_WAITING + what)

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """While open, the process does something that takes other time than a step does."""
        # In this order, as the thread would measure what is done now by when the last thing began.
        self._since = time.monotonic()
        self._doing = what
        yield
        self._since = time.monotonic()
        self._doing = _COMPUTING  # after an error the other is still true

    @property
    def is_watched(self) -> bool:
        """Whether the process is ended when it gets no further; not while it compiles, nor after its end."""
        return not self._done.is_set() and (self._steps_reached > 1 or self._doing != _COMPUTING)

    def finish(self) -> None:
        """No step follows: whatever is still to be closed may take its time."""
        self._done.set()

    def diagnosis(self) -> str:
        """One line: what this process waited for, and which of the others did not come."""
        doing = self._doing
        waited = doing if doing != _COMPUTING else f"{_WAITING}the gradients of all processes"
        why = self._culprits() if waited.startswith(_WAITING) else "it got no further, and the others wait"
        return (
            f"process {self._rank} gave up at step {self._step:,} after {self._seconds:g} s of {waited}"
            f" (--collective-timeout): {why}; the same command resumes from the last checkpoint"
        )

    def _culprits(self) -> str:
        try:
            self._listen()
        except (RuntimeError, ValueError):
            return "process 0, which keeps the record of what the others do, does not answer"
        now, awaits = time.monotonic(), self._doing.startswith(_WAITING)
        others = {rank: word for rank, (word, _) in self._heard.items() if rank != self._rank}
        silent_for = {rank: now - since for rank, (_, since) in self._heard.items()}
        silent = {r: w for r, w in others.items() if silent_for[r] > 3 * self._between_words + 1}
        # Where only the device waits, the host says that it is computing, and so do those that wait with it.
        innocent = (_WAITING,) if awaits else (_WAITING, _COMPUTING)
        behind = {
            rank: word
            for rank, word in others.items()
            if word["step"] < self._step
            or (word["step"] == self._step and not word["doing"].startswith(innocent))
        }
        if not (named := silent or behind):
            if awaits:
                return "all others wait too, so the network between them may be down"
            return "no other is behind, so the GPUs or the network between them are suspect"
        rank, word = min(named.items(), key=lambda item: (item[1]["step"], item[0]))
        more = f" and {len(named) - 1} more" if len(named) > 1 else ""
        if silent:
            return (
                f"process {rank}{more} on {word['host']} has been silent for {silent_for[rank]:.0f} s,"
                f" since it was {word['doing']} at step {word['step']:,}"
            )
        return f"process {rank}{more} on {word['host']} is still {word['doing']} at step {word['step']:,}"

    # ---- the thread ----

    def __enter__(self) -> Lookout:
        self._speak()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.finish()

    def _watch(self) -> None:
        while not self._done.wait(self._between_words):
            with suppress(RuntimeError):  # who keeps the record may be the one that is stuck
                self._speak()
            stuck = time.monotonic() - self._since if self.is_watched else 0.0
            if stuck > self._between_words:
                with suppress(RuntimeError, ValueError):
                    self._listen()
            if stuck > self._seconds + _GRACE:
                self._give_up()

    def _give_up(self) -> NoReturn:
        """Ends the process from this thread: the main one is where no exception reaches it."""
        error = HungError(self.diagnosis())
        if outcome.reports():
            outcome.report_error(self._rank, error, hung=True)
        else:
            print(f"ict-fast: error: {error}", file=sys.stderr, flush=True)
        os._exit(EXIT_FAILED)

    def _speak(self) -> None:
        word = {
            "step": self._step,
            "doing": self._doing,
            "time": time.time(),
            "host": os.uname().nodename,
        }
        self._store.set(str(self._rank), json.dumps(word))

    def _listen(self) -> None:
        """Notes what is new, and when by the clock of this process: another node's may go wrong."""
        now = time.monotonic()
        for rank, word in self._words().items():
            if rank not in self._heard or self._heard[rank][0] != word:
                self._heard[rank] = word, now

    def _words(self) -> dict[int, dict[str, Any]]:
        self._store.set_timeout(_ANSWER)
        words = self._store.multi_get([str(rank) for rank in range(self._size)])
        return {rank: json.loads(word) for rank, word in enumerate(words)}
