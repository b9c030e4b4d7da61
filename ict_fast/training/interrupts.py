"""A second Ctrl-C, seen when it arrives: Python's own handlers see two as one while a long operation runs."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType

# What arrives so soon after the first is the same key: a terminal interrupts a launcher and its processes,
# and the launcher passes it on.
_SAME_KEY_SECONDS = 0.3


class SecondInterrupt:
    """While open, calls a function, in a thread of its own, at every Ctrl-C after the first.

    Another one, if it is given, is called at the first.

    A context manager; it does nothing outside the main thread, where no signal arrives. SIGINT needs a
    handler in Python, or its arrival is not noted.
    """

    def __init__(self, then: Callable[[], None], at_first: Callable[[], None] = lambda: None) -> None:
        self._then, self._at_first = then, at_first
        self._arrivals, self._noted = socket.socketpair()
        self._noted.setblocking(False)
        self._thread = threading.Thread(target=self._watch, name="ict-fast-interrupts", daemon=True)
        self._before: int | None = None

    def __enter__(self) -> SecondInterrupt:
        self._thread.start()
        if threading.current_thread() is threading.main_thread():
            self._before = signal.set_wakeup_fd(self._noted.fileno(), warn_on_full_buffer=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.set_wakeup_fd(self._before)
        self._noted.close()
        self._thread.join()
        self._arrivals.close()

    def _watch(self) -> None:
        first: float | None = None
        while numbers := self._arrivals.recv(64):
            for _ in range(numbers.count(signal.SIGINT)):
                now = time.monotonic()
                if first is None:
                    first = now
                    self._at_first()
                elif now - first > _SAME_KEY_SECONDS:
                    first = now
                    self._then()
                    # `interrupt_main` is noted like a key, and has been by now.
                    with suppress(BlockingIOError):
                        self._arrivals.recv(64, socket.MSG_DONTWAIT)
