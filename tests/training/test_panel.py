"""The live panel: what it shows at which width, and Ctrl-C on a real terminal."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from fcntl import ioctl
from pathlib import Path

import pytest
from rich.console import Console

from ict_fast.checkpoint import open_checkpoint
from ict_fast.config import Config
from ict_fast.consistency.curriculum import Extension, stages
from ict_fast.training.monitor import Monitor
from ict_fast.training.panel import Panel, sparkline
from ict_fast.training.run_directory import Run

from .conftest import flags  # type: ignore[import-not-found]


@pytest.fixture
def panel(one_level: Config) -> Panel:
    """In the middle of a run of 24 steps, with everything to say."""
    panel = Panel(
        "training digits in runs/" + "long-name-" * 12,
        step=13,
        total_steps=24,
        stages=stages(24, one_level.method),
    )
    panel.losses = [2.0**i for i in range(40)]
    panel.eta, panel.speed, panel.gradient = "1m02s", "1,234 images/s, MFU 43.2%", "norm 0.5, trunk in bf16"
    panel.grid = "runs/digits/grids/step-00000012.png"
    panel.measured, panel.note = "step 12: Fréchet distance 3.21 in 1 step, the best so far", "sampling (40%)"
    return panel


def _drawn(panel: Panel, width: int, height: int = 30, encoding: str = "utf-8") -> list[str]:
    with open(os.devnull, "w", encoding=encoding) as nowhere:
        console = Console(file=nowhere, width=width, height=height, force_terminal=True, color_system=None)
        lines = console.render_lines(panel, pad=False)
    return ["".join(segment.text for segment in line).rstrip() for line in lines]


@pytest.mark.parametrize("width", [200, 120, 80, 60, 54])
def test_a_wide_terminal_gets_a_frame_with_everything(panel: Panel, width: int) -> None:
    lines = _drawn(panel, width)
    text = "\n".join(lines)
    assert {len(line) for line in lines} == {min(width - 4, 110)}, "every line ends at the frame"
    assert text.count("training digits in") == 1
    assert "13/24 54 %  ETA 1m02s" in text
    assert "5 of 8, N = 161, step 1 of 3" in text, "the stage's own step"
    for words in (
        "1,234 images/s",
        "norm 0.5",
        "grids/step-00000012.png",
        "Fréchet distance 3.21",
        "sampling",
    ):
        assert words in text
    assert len(lines) == 2 + 8


@pytest.mark.parametrize(
    ("step", "said"), [(0, "1 of 8, N = 11, step 0 of 3"), (12, "5 of 8, N = 161, step 0 of 3")]
)
def test_a_stage_begins_with_its_first_step(panel: Panel, step: int, said: str) -> None:
    panel.step = step
    assert said in "\n".join(_drawn(panel, 80))


def test_the_stages_of_an_extended_run_are_those_that_it_was_trained_in(
    one_level: Config, tmp_path: Path
) -> None:
    """Eight of three steps each, then, of eight each, the last five of a plan of 64 steps."""
    config = replace(one_level, training=replace(one_level.training, total_steps=64))
    monitor = Monitor(Run(tmp_path, config, None, extensions=(Extension(24, 24),)))
    for step, shown in ((23, "8 of 13, N = 1,281, step 2 of 3"), (25, "9 of 13, N = 81, step 1 of 8")):
        monitor.advance(step)
        assert shown in "\n".join(_drawn(monitor._panel, 120))


@pytest.mark.parametrize("width", [53, 40, 24, 12])
def test_a_narrow_terminal_gets_the_same_lines_cut_and_none_wrapped(panel: Panel, width: int) -> None:
    lines = _drawn(panel, width)
    assert len(lines) == 8
    assert max(len(line) for line in lines) <= width - 4
    assert lines[0].endswith("ETA 1m02s") or "…" in lines[0]
    assert lines[1].startswith("5 of 8"[: width - 5])


def test_a_terminal_that_knows_ascii_alone_gets_ascii(panel: Panel) -> None:
    text = "\n".join(_drawn(panel, 80, encoding="ascii"))
    assert "@" in text
    frame = set("".join(line for line in text.splitlines() if "Fréchet" not in line and "…" not in line))
    assert all(ord(character) < 128 for character in frame)


def test_a_sparkline_rises_with_the_logarithm_and_averages_neighbours() -> None:
    assert sparkline([1, 2, 4, 8, 16, 32, 64, 128], 80) == "▁▂▃▄▅▆▇█"
    assert sparkline([2.0**i for i in range(80)], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([5.0] * 7, 80) == "▁" * 7
    assert sparkline([0.0, 1.0, 2.0], 80) == "▁█", "a loss of 0 has no logarithm"
    assert sparkline([1.0], 0) == sparkline([], 5) == ""
    for count in range(1, 60):
        assert len(sparkline([1.0 + i for i in range(count)], 23)) == min(count, 23)


# ---- on a pseudo-terminal ----


class Terminal:
    """`ict-fast train` in the foreground of a terminal of its own, as a person has it."""

    def __init__(self, words: list[str], columns: int = 100) -> None:
        self.process_id, self._descriptor = pty.fork()
        if self.process_id == 0:
            environment = {**os.environ, "TERM": "xterm-256color", "OMP_NUM_THREADS": "1"}
            os.execve(sys.executable, [sys.executable, "-m", "ict_fast", "train", *words], environment)
        ioctl(self._descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
        self.text = ""

    def read_until(self, found: Callable[[str], bool], seconds: float = 120) -> None:
        """Reads what is on the screen until it is found; fails after so long, or at the end."""
        deadline = time.monotonic() + seconds
        while not found(self.text):
            assert time.monotonic() < deadline, self.text[-2000:]
            assert self._read(), self.text[-2000:]

    def press_ctrl_c(self) -> None:
        os.write(self._descriptor, b"\x03")

    def exit_code(self) -> int:
        """Reads to the end."""
        while self._read():
            pass
        return os.waitstatus_to_exitcode(os.waitpid(self.process_id, 0)[1])

    def _read(self) -> bool:
        ready, _, _ = select.select([self._descriptor], [], [], 60)
        assert ready, self.text[-2000:]
        try:
            more = os.read(self._descriptor, 65536)
        except OSError:  # how Linux says that the other end is closed
            return False
        self.text += re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", more.decode(errors="replace"))
        return bool(more)

    def close(self) -> None:
        os.close(self._descriptor)
        try:
            os.kill(self.process_id, signal.SIGKILL)
            os.waitpid(self.process_id, 0)
        except (ProcessLookupError, ChildProcessError):
            pass


@pytest.fixture
def terminal(one_level: Config, tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def start(config: Config, *extra: str) -> Terminal:
        words = ["--device", "cpu", "--out", str(tmp_path / "run"), *flags(config), *extra]
        opened.append(Terminal(words))
        return opened[-1]

    yield start
    for each in opened:
        each.close()


def _endless(config: Config, batch_size: int = 16) -> Config:
    return replace(
        config,
        training=replace(config.training, total_steps=100_000, batch_size=batch_size),
        logging=replace(config.logging, log_every=1, checkpoint_every=100_000),
    )


def test_the_panel_is_drawn_and_one_ctrl_c_saves(
    one_level: Config, tmp_path: Path, terminal: Callable[..., Terminal]
) -> None:
    screen = terminal(_endless(one_level))
    screen.read_until(lambda text: "images/s" in text and re.search(r"[▁-█]{3}", text) is not None)
    assert "╭─ training digits in" in screen.text
    assert "1 of 8, N = 11, step" in screen.text
    screen.press_ctrl_c()
    assert screen.exit_code() == 130
    assert "Ctrl-C again quits without" in screen.text
    step = open_checkpoint(tmp_path / "run").step
    assert step > 0
    assert f"stopped and saved at step {step:,} of 100,000; the same command resumes" in screen.text
    assert "Traceback" not in screen.text


@pytest.mark.parametrize("processes", [(), ("--processes", "2")], ids=["one", "two"])
def test_a_second_ctrl_c_does_not_wait_for_the_step(
    one_level: Config, tmp_path: Path, terminal: Callable[..., Terminal], processes: tuple[str, ...]
) -> None:
    """A step that takes minutes: the first Ctrl-C waits for its end, the second one for nothing."""
    screen = terminal(_endless(one_level, batch_size=2**19), "--training.micro-batch", "4096", *processes)
    screen.read_until(lambda text: "training digits in" in text and "progress" in text)
    time.sleep(1)
    started = time.monotonic()
    screen.press_ctrl_c()
    time.sleep(0.5)
    screen.press_ctrl_c()
    code = screen.exit_code()
    assert code == 130, screen.text[-3000:]
    assert time.monotonic() - started < 30
    assert "nothing more was saved" in screen.text
    assert "Traceback" not in screen.text
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(tmp_path / "run") not in listed, "nobody is left behind"
