"""Processes that are deaf to Ctrl-C from their first instruction on, and end with their parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from multiprocessing import resource_tracker
from pathlib import Path

import pytest

from ict_fast.children import deaf_to_interrupts


def test_a_spawned_process_begins_with_signals_blocked_and_this_one_hears_them_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # As in a process that has spawned none yet.
    monkeypatch.setattr(resource_tracker._resource_tracker, "_fd", None)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    process = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
    with deaf_to_interrupts(signal.SIGTERM):
        process.start()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
    status = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    process.kill()
    process.join()
    [blocked] = [int(line.split()[1], 16) for line in status if line.startswith("SigBlk:")]
    for number in (signal.SIGINT, signal.SIGTERM):
        assert blocked >> (number - 1) & 1
        assert number not in before


def test_a_process_is_told_when_its_parent_is_killed(tmp_path: Path) -> None:
    """And saves what it has."""
    child = tmp_path / "child.py"
    child.write_text(
        "import os, pathlib, signal, sys, time\n"
        "from ict_fast.children import end_with\n"
        f"folder = pathlib.Path({str(tmp_path)!r})\n"
        "signal.signal(signal.SIGTERM, lambda *_: ((folder / 'saved').touch(), os._exit(0)))\n"
        "end_with(int(sys.argv[1]))\n"
        "(folder / 'begun').touch()\n"
        "time.sleep(60)\n"
    )
    parent = (
        "import os, subprocess, sys\n"
        f"subprocess.Popen([sys.executable, {str(child)!r}, str(os.getpid())], start_new_session=True).wait()"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen([sys.executable, "-c", parent], env=environment) as process:
        _wait_for(tmp_path / "begun")
        process.kill()
    _wait_for(tmp_path / "saved")


def _wait_for(file: Path) -> None:
    end = time.monotonic() + 30
    while not file.exists():
        assert time.monotonic() < end, file
        time.sleep(0.02)
