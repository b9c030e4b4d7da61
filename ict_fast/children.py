"""Processes that this one spawns: before they run anything of ours, and when it is lost."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker

_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)


@contextmanager
def deaf_to_interrupts(*others: signal.Signals) -> Iterator[None]:
    """While open, what this thread spawns begins with SIGINT, and `others`, blocked, until it unblocks them.

    Ctrl-C, which a terminal sends to all, would make each of them complain while it imports torch. A SIGINT
    to this process meanwhile needs another thread to arrive at, if it is not to wait.
    """
    # The first start of any process would start it too, and that unblocks SIGINT again.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, *others})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with(parent: int) -> None:
    """Sends this process SIGTERM, which saves a run, when its parent ends, however it does (Linux).

    Args:
        parent: its number; if it has ended already, the signal comes at once.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGTERM)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGTERM)
