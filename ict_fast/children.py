"""Processes that this one spawns, before they run anything of ours."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker


@contextmanager
def deaf_to_interrupts() -> Iterator[None]:
    """While open, what this thread spawns begins with SIGINT blocked, until it unblocks it.

    Ctrl-C, which a terminal sends to all, would make each of them complain while it imports torch. A SIGINT
    to this process meanwhile needs another thread to arrive at, if it is not to wait.
    """
    # The first start of any process would start it too, and that unblocks SIGINT again.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
