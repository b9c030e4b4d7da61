"""How a command that keeps what it has done is interrupted: by Ctrl-C and by SIGTERM alike."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from ict_fast.errors import EXIT_SIGINT, EXIT_SIGTERM


class Interrupted(Exception):
    """A command was interrupted, and what it had done is kept. One line.

    Attributes:
        exit_code: 130 (SIGINT) or 143 (SIGTERM).
    """

    def __init__(self, kept: str, exit_code: int) -> None:
        super().__init__(f"interrupted; {kept}")
        self.exit_code = exit_code


@contextmanager
def interruptible(kept: str | Callable[[], str]) -> Iterator[None]:
    """While open, SIGTERM unwinds this thread as Ctrl-C does, so that processes are ended and locks released.

    Args:
        kept: what the person is told of the work that is done; a function is called when it is over.
    Raises:
        Interrupted: by either.
    """
    code, heard, before = EXIT_SIGINT, -math.inf, {}

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal code, heard
        last, heard = heard, time.monotonic()
        if (
            heard - last > 1.0
        ):  # timeout(1) sends two, others one of each: the second would meet the clearing up
            code = EXIT_SIGTERM if number == signal.SIGTERM else EXIT_SIGINT
            raise KeyboardInterrupt

    with suppress(ValueError):  # not in the main thread: whoever started us owns the signals
        before[signal.SIGTERM] = signal.signal(signal.SIGTERM, stop)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored, as by nohup
            before[signal.SIGINT] = signal.signal(signal.SIGINT, stop)
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(kept if isinstance(kept, str) else kept(), code) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
