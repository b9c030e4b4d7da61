"""What a person watches while a run goes on: one panel on the terminal, redrawn in place."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from rich.box import ROUNDED
from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderResult
from rich.control import Control
from rich.live import Live
from rich.panel import Panel as Frame
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ict_fast.consistency.curriculum import Stage

_FRAMED_FROM = 50  # columns; narrower terminals have no room for a frame and labels
_WIDEST = 110
_SHORTEST_BAR = 8
_CTRL_C = 4  # columns for the ^C^C that a terminal echoes behind the panel, to be overwritten with it
_BLOCKS, _ASCII_BLOCKS = "▁▂▃▄▅▆▇█", "_.-=+*#@"
_REDRAWN_PER_SECOND = 4


class Panel:
    """The state of a run in a few lines; whoever knows better sets an attribute, the next drawing shows it.

    Attributes:
        step: steps done.
        losses: of the log's lines, for the curve.
        eta, speed, gradient, grid, measured, note: texts, empty while there is nothing to say.
        drawn_width: columns of the last drawing, 0 before the first.
    """

    def __init__(self, title: str, *, step: int, total_steps: int, stages: Sequence[Stage]) -> None:
        self.step = step
        self.losses: list[float] = []
        self.eta = self.speed = self.gradient = self.grid = self.measured = self.note = ""
        self._title, self._total, self._stages = title, total_steps, stages
        self.drawn_width = 0

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = self.drawn_width = min(options.max_width - _CTRL_C, _WIDEST)
        framed = width >= _FRAMED_FROM
        label_width = 9 if framed else 0
        room = width - 4 - label_width - 1 if framed else width
        rows = [
            ("progress", self._progress(room)),
            ("stage", Text(self._stage())),
            ("loss", self._curve(room, _ASCII_BLOCKS if options.ascii_only else _BLOCKS)),
            *(
                (label, Text(text))
                for label, text in (
                    ("speed", self.speed),
                    ("gradient", self.gradient),
                    ("grid", self.grid),
                    ("measured", self.measured),
                    ("now", self.note),
                )
                if text
            ),
        ]
        table = Table.grid(padding=(0, 1, 0, 0))
        if framed:
            table.add_column(style="dim", width=label_width - 1, no_wrap=True)
        table.add_column(no_wrap=True, overflow="ellipsis", width=room)
        for label, content in rows:
            table.add_row(*((label, content) if framed else (content,)))
        if not framed:
            yield table
            return
        title = Text(self._title)
        title.truncate(width - 6, overflow="ellipsis")
        yield Frame(table, title=title, title_align="left", box=ROUNDED, width=width, border_style="dim")

    def _progress(self, room: int) -> ConsoleRenderable:
        text = f"{self.step:,}/{self._total:,} {100 * self.step // self._total} %"
        text += f"  ETA {self.eta}" if self.eta else ""
        bar_room = room - len(text) - 1
        if bar_room < _SHORTEST_BAR:
            return Text(text)
        row = Table.grid(padding=(0, 1, 0, 0), collapse_padding=True, pad_edge=False)
        row.add_row(ProgressBar(self._total, self.step, width=bar_room), Text(text))
        return row

    def _stage(self) -> str:
        at = min(self.step, self._total - 1)
        number, stage = next((n, s) for n, s in enumerate(self._stages, 1) if at < s.end_step)
        length = stage.end_step - stage.first_step
        done = self.step - stage.first_step
        return f"{number} of {len(self._stages)}, N = {stage.num_scales:,}, step {done:,} of {length:,}"

    def _curve(self, room: int, blocks: str) -> Text:
        if not self.losses:
            return Text("")
        last = f"{self.losses[-1]:.4g} "
        return Text(last + sparkline(self.losses, room - len(last), blocks))


def sparkline(values: Sequence[float], width: int, blocks: str = _BLOCKS) -> str:
    """Positive values as a row of at most `width` blocks, by their logarithm; neighbours are averaged.

    The loss doubles with every stage and more, so that a linear scale would show the last one alone.
    """
    logarithms = [math.log(value) for value in values if value > 0]
    width = min(width, len(logarithms))
    if width < 1:
        return ""
    borders = [round(i * len(logarithms) / width) for i in range(width + 1)]
    means = [sum(logarithms[a:b]) / (b - a) for a, b in itertools.pairwise(borders)]
    low, high = min(means), max(means)
    scale = (len(blocks) - 1) / (high - low) if high > low else 0.0
    return "".join(blocks[round((mean - low) * scale)] for mean in means)


def live_panel(panel: Panel) -> Live | None:
    """The panel, redrawn on standard error until it is stopped; None where nobody is watching."""
    console = Console(stderr=True)
    if not console.is_terminal or console.is_dumb_terminal:
        return None
    return _ResizableLive(panel, console=console, refresh_per_second=_REDRAWN_PER_SECOND, transient=True)


class _ResizableLive(Live):
    """Clears a terminal that was made narrower: it has wrapped the panel into rows that nobody can count.

    Terminals differ in which lines they wrap, and where that leaves the cursor.
    """

    def __init__(self, panel: Panel, **options: Any) -> None:
        super().__init__(panel, **options)
        self._of = panel

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        is_narrower = self.console.width < self._of.drawn_width
        back, *others = super().process_renderables(renderables)
        return [Control.clear(), Control.home(), *others] if is_narrower else [back, *others]
