"""What a run tells the outside: the log file, the tracker, and the progress on the screen."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from ict_fast.consistency.curriculum import stages_trained
from ict_fast.screen import LINE_INTERVAL, duration, rate, say
from ict_fast.training.panel import Panel, live_panel
from ict_fast.training.run_directory import LOG_NAME, Run
from ict_fast.training.trackers import Tracker, tagged, tagged_evaluation
from ict_fast.training.utilisation import Utilisation


class Monitor:
    """Appends to log.jsonl and shows progress: a live panel on a terminal, plain lines elsewhere.

    A log or a tracker that cannot be written (a full disk, no network) is reported once and does not stop the
    run. A silent one, for all processes of a run but one, does nothing.
    """

    def __init__(
        self,
        run: Run,
        utilisation: Utilisation | None = None,
        tracker: Tracker | None = None,
        *,
        silent: bool = False,
    ) -> None:
        """
        Args:
            run: where to write, and what the run is.
            utilisation: what a rate means for the hardware; None leaves MFU and memory unsaid.
            tracker: told of every figure and grid besides; closed at the end.
        """
        self._silent = silent
        self._config, self._utilisation, self._tracker = run.config, utilisation, tracker
        self._path = run.out / LOG_NAME
        self._total = run.config.training.total_steps
        self._last_line = 0.0
        self._log_failed = self._log_is_cut = False
        self.restart_clock(run.step)
        self._panel = Panel(
            f"training {run.config.preset} in {run.out}",
            step=run.step,
            total_steps=self._total,
            stages=stages_trained(self._total, run.config.method, run.extensions),
        )
        self._live = None if silent else live_panel(self._panel)
        if self._live is not None:
            self._panel.losses = _logged_losses(self._path)

    def __enter__(self) -> Monitor:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            with contextlib.suppress(OSError):
                self._live.stop()
        self._track(lambda tracker: tracker.close())

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

    def note(self, text: str) -> None:
        """What the run is doing besides training, for the panel; empty when it is training again."""
        self._panel.note = text

    # ---- the clock ----

    def restart_clock(self, step: int) -> None:
        """What came before this step (loading, compiling) says nothing of the rate."""
        self._first = self._window_step = step
        self._started = self._window_started = time.monotonic()
        self._waited = 0.0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What is done inside (a grid, a measurement) counts for the time that remains, not for the rate."""
        started = time.monotonic()
        try:
            yield
        finally:
            self._window_started += time.monotonic() - started

    def waited_for_data(self, seconds: float) -> None:
        """The loop has waited so long for its loader."""
        self._waited += seconds

    def advance(self, step: int) -> None:
        """Moves the bar; costs a microsecond, waits for nothing."""
        self._panel.step = step

    # ---- what there is to tell ----

    def record(self, step: int, values: dict[str, Any]) -> None:
        """One line of the log, with rates since the previous one, and the status line.

        Args:
            step: steps done.
            values: see `figures`.
        """
        if self._silent:
            return
        now = time.monotonic()
        elapsed = max(now - self._window_started, 1e-9)
        rate = (step - self._window_step) * self._config.training.batch_size / elapsed
        use = self._utilisation
        line = {
            "step": step,
            **values,
            "images_per_second": round(rate, 1),
            "mfu": None if use is None else use.mfu(rate, values["precision"]),
            "memory_gb": None if use is None else use.memory_gb(),
            "data_wait": round(min(self._waited / elapsed, 1.0), 4),
            "time": round(time.time(), 3),
        }
        self._window_started, self._window_step, self._waited = now, step, 0.0
        try:
            with self._path.open("a", encoding="utf-8") as file:
                # A line that a full disk cut short must not swallow this one.
                file.write(("\n" if self._log_is_cut else "") + json.dumps(line, allow_nan=False) + "\n")
            self._log_is_cut = False
        except OSError as error:
            if not self._log_failed:
                self.warn(f"{self._path} cannot be written ({error.strerror}); training goes on")
            self._log_failed = self._log_is_cut = True
        self._track(lambda tracker: tracker.figures(step, tagged(line, self._config)))
        self._show(step, line, now)

    def drew_grid(self, step: int, path: Path) -> None:
        """A grid of samples is there."""
        self._panel.grid = str(path)
        self._track(lambda tracker: tracker.picture(step, path))

    def measured(self, step: int, result: dict[str, Any], found: str, how: str) -> None:
        """The averages have been measured.

        Args:
            step: steps done.
            result: what `evaluate` returned.
            found, how: the same in words; `found` alone stays on the panel.
        """
        self._panel.measured = found
        self._track(lambda tracker: tracker.figures(step, tagged_evaluation(result)))
        self.say(f"{found} ({how})")

    def _track(self, what: Callable[[Tracker], None]) -> None:
        if self._tracker is None:
            return
        try:
            what(self._tracker)
        except Exception as error:  # of a foreign package, about its own files or network
            self._tracker = None
            self.warn(f"--logging.tracker failed ({reason(error)}); {LOG_NAME} and the training go on")

    def _show(self, step: int, line: dict[str, Any], now: float) -> None:
        per_step = (now - self._started) / max(step - self._first, 1)
        remaining = duration((self._total - step) * per_step)
        loss, gradient, mfu = line["loss"], line.get("gradient_norm"), line["mfu"]
        skipped = f", {line['skipped']} skipped" if line["skipped"] else ""
        speed = f"{rate(line['images_per_second'])} images/s"
        if self._live is not None:
            panel = self._panel
            if loss is not None:
                panel.losses.append(loss)
            panel.eta = remaining
            panel.speed = speed + (f", MFU {mfu:.1%}" if mfu is not None else "")
            panel.speed += f", {line['data_wait']:.1%} waiting for data"
            if line["memory_gb"] is not None:
                panel.speed += f", {line['memory_gb']:.3g} GB"
            norm = "not finite" if gradient is None else f"norm {gradient:.3g}"
            panel.gradient = f"{norm}, trunk in {line['precision']}{skipped}"
        elif now - self._last_line >= LINE_INTERVAL or step == self._total:
            self._last_line = now
            shown = "none finite" if loss is None else f"{loss:.4g}"
            status = f"loss {shown}, N {line['num_scales']}, {speed}, ETA {remaining}{skipped}"
            self.say(f"step {step:,}/{self._total:,} ({100 * step // self._total} %): {status}")


def reason(error: Exception) -> str:
    """What went wrong, in one line."""
    return " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__


def _logged_losses(log: Path) -> list[float]:
    """The curve so far of a run that goes on."""
    losses = []
    with contextlib.suppress(OSError, ValueError, KeyError):
        for line in log.read_text(encoding="utf-8").splitlines():
            loss = json.loads(line)["loss"]
            if loss is not None:
                losses.append(loss)
    return losses
