"""What a person sees of long work, on standard error: one live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Table

from ict_fast.errors import printable

LINE_INTERVAL = 10.0
"""Off a terminal a line about progress is printed at most this often, in seconds."""

MEASURES = (
    ("frechet_distance", "Fréchet distance", "{:.4g}"),
    ("kernel_distance", "Kernel distance", "{:.4g}"),
    ("inception_score", "Inception score", "{:.4g}"),
    ("precision", "Precision", "{:.3f}"),
    ("recall", "Recall", "{:.3f}"),
)
"""What `evaluate` finds: the key in its result, the name on pages, and how a figure is written there."""


def say(text: str) -> None:
    """Lines for the person, what a terminal would obey made visible.

    What cannot be written (full disk, closed, none) never ends the work.
    """
    with contextlib.suppress(OSError, ValueError, AttributeError):
        print("\n".join(map(printable, text.split("\n"))), file=sys.stderr, flush=True)


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


@contextlib.contextmanager
def live_line() -> Iterator[Callable[[float, str], None]]:
    """Progress on standard error, with what is left of the time: called with fraction done and what.

    A bar while a person is watching, else a line at most every ten seconds.
    """
    console = Console(stderr=True)
    started = last_line = time.monotonic()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=1.0)

        def show(fraction: float, text: str) -> None:
            nonlocal last_line
            bar.update(task, completed=fraction, description=text)
            now = time.monotonic()
            if not console.is_terminal and now - last_line >= LINE_INTERVAL and fraction > 0:
                last_line = now
                remaining = timedelta(seconds=round((now - started) * (1 - fraction) / fraction))
                say(f"{text} ({fraction:.0%}), ETA {remaining}")

        yield show


def is_figure(value: object) -> bool:
    """Whether it is a number that was measured: 0, or of a size that can be reckoned and drawn with."""
    return type(value) in (int, float) and (value == 0 or 1e-100 < abs(value) < 1e100)  # type: ignore[arg-type]


def asked_sigmas(result: dict[str, Any]) -> str:
    """ "sigmas 0.8 0.3", if a measurement was made at noise levels other than the method's; else empty."""
    sigmas = result.get("sigmas")
    return f"sigmas {' '.join(map(str, sigmas))}" if isinstance(sigmas, list) and sigmas else ""


def real_halves(reference: dict[str, Any]) -> str:
    """ "real, 898 to 899": the images between which a measurement's distance of real halves is.

    Their number makes up most of it, as it would of a model's; older measurements do not say it.
    """
    counts = reference.get("halves_counts")
    if isinstance(counts, list) and len(counts) == 2 and all(type(count) is int for count in counts):
        return f"real, {counts[0]:,} to {counts[1]:,}"
    return "real, half to half"


def counted(number: int, noun: str, nouns: str | None = None) -> str:
    """1 image, 2,000 images; `nouns` where they are not the noun with an s."""
    return f"{number:,} {noun if number == 1 else nouns or f'{noun}s'}"


def print_table(table: Table) -> None:
    """A table on standard output."""
    console = Console()
    with console.capture() as captured:  # rich exits on a broken pipe; print leaves that to main
        console.print(table)
    print(captured.get(), end="")


def duration(seconds: float) -> str:
    """Seconds as 42s, 3m05s, 7h12m or 3d04h."""
    seconds = round(seconds)
    for unit, next_unit, size, next_size in (
        ("d", "h", 86400, 3600),
        ("h", "m", 3600, 60),
        ("m", "s", 60, 1),
    ):
        if seconds >= size:
            return f"{seconds // size}{unit}{seconds % size // next_size:02d}{next_unit}"
    return f"{seconds}s"


def rate(value: float) -> str:
    """A rate with three digits at least: 1,234, 23.5, 0.427."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
