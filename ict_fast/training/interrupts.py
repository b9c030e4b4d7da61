"""A second Ctrl-C ends the processes of a run at once."""

from __future__ import annotations

import multiprocessing
import signal
import socket
import threading
import time
from types import TracebackType

# What arrives so soon after the first is the same key: a terminal interrupts a launcher and its processes,
# and the launcher passes it on.
SAME_INTERRUPT_SECONDS = 0.3


class SecondInterrupt:
    """While open, a second Ctrl-C kills the processes that this one has started.

    torch's agent waits as long after a second signal as after the first one, and its handlers are its own; so
    signals are read where Python itself notes their arrival. A context manager; it does nothing outside the main
    thread, where no signal arrives.
    """

    def __init__(self) -> None:
        self._arrivals, self._noted = socket.socketpair()
        self._noted.setblocking(False)
        self._thread = threading.Thread(target=self._watch, name="ict-fast-interrupts", daemon=True)

    def __enter__(self) -> SecondInterrupt:
        self._thread.start()
        try:
            self._before: int | None = signal.set_wakeup_fd(self._noted.fileno(), warn_on_full_buffer=False)
        except ValueError:
            self._before = None
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
                elif now - first > SAME_INTERRUPT_SECONDS:
                    for process in multiprocessing.active_children():
                        process.kill()
