"""What a run tells the outside: the log file and the progress on the screen."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from ict_fast.screen import LINE_INTERVAL, live_bar, say
from ict_fast.training.run_directory import LOG_NAME


class Monitor:
    """Appends to log.jsonl and shows progress: one live line on a terminal, plain lines elsewhere.

    A log that cannot be written (a full disk) is reported once and does not stop the run. A silent one, for
    all processes of a run but one, does nothing.
    """

    def __init__(
        self, out: Path, *, first_step: int, total_steps: int, batch_size: int, silent: bool = False
    ) -> None:
        self._silent = silent
        self._path = out / LOG_NAME
        self._total = total_steps
        self._batch_size = batch_size
        self._first = first_step
        self._started = self._window_started = time.monotonic()
        self._window_step = first_step
        self._last_line = 0.0
        self._log_failed = False
        self._live = None if silent else live_bar("training")
        if self._live is not None:
            self._task = self._live.add_task("", total=total_steps, completed=first_step, status="starting")

    def __enter__(self) -> Monitor:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, text: str) -> None:
        """A line for the person, on standard error; one that cannot be written never ends a run."""
        if self._silent:
            return
        if self._live is None:
            say(text)
            return
        with contextlib.suppress(OSError, ValueError, AttributeError):
            self._live.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        self.say(f"ict-fast: warning: {text}")

    def advance(self, step: int) -> None:
        """Moves the bar; costs microseconds, waits for nothing."""
        if self._live is not None:
            self._live.update(self._task, completed=step)

    def record(self, step: int, values: dict[str, Any]) -> None:
        """One line of the log, with the rate since the previous one, and the status line.

        Args:
            step: steps done.
            values: "loss", "num_scales" and whatever else is worth keeping; JSON values.
        """
        if self._silent:
            return
        now = time.monotonic()
        elapsed = max(now - self._window_started, 1e-9)
        rate = (step - self._window_step) * self._batch_size / elapsed
        self._window_started, self._window_step = now, step
        line = {"step": step, **values, "images_per_second": round(rate, 1), "time": round(time.time(), 3)}
        try:
            with self._path.open("a", encoding="utf-8") as file:
                # A line that a full disk cut short must not swallow this one.
                file.write(("\n" if self._log_failed else "") + json.dumps(line, allow_nan=False) + "\n")
        except OSError as error:
            if not self._log_failed:
                self.warn(f"{self._path} cannot be written ({error.strerror}); training goes on")
            self._log_failed = True
        self._show(step, values, rate, now)

    def _show(self, step: int, values: dict[str, Any], rate: float, now: float) -> None:
        per_step = (now - self._started) / max(step - self._first, 1)
        remaining = duration((self._total - step) * per_step)
        loss = "none finite" if values["loss"] is None else f"{values['loss']:.4g}"
        skipped = f", {values['skipped']} skipped" if values["skipped"] else ""
        status = f"loss {loss}, N {values['num_scales']}, {rate:,.0f} images/s, ETA {remaining}{skipped}"
        if self._live is not None:
            self._live.update(self._task, completed=step, status=status)
        elif now - self._last_line >= LINE_INTERVAL or step == self._total:
            self._last_line = now
            self.say(f"step {step:,}/{self._total:,} ({100 * step // self._total} %): {status}")


def reason(error: Exception) -> str:
    """What went wrong, in one line."""
    return " ".join(str(getattr(error, "strerror", None) or error).split())


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
