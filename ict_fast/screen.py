"""What a person sees of long work, on standard error: one live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn

LINE_INTERVAL = 10.0
"""Off a terminal a line about progress is printed at most this often, in seconds."""


def say(text: str) -> None:
    """A line for the person; one that cannot be written (full disk, closed, none) never ends the work."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        print(text, file=sys.stderr, flush=True)


def live_bar(doing: str) -> Progress | None:
    """A bar with counts, share and the task's field `status`; None where nobody is watching.

    Args:
        doing: one word.
    """
    console = Console(stderr=True)
    if not console.is_terminal or console.is_dumb_terminal:
        return None
    return Progress(
        TextColumn(doing),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[status]}"),
        console=console,
        transient=True,
    )
