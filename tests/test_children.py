"""Processes that are deaf to Ctrl-C from their first instruction on."""

from __future__ import annotations

import multiprocessing
import signal
import time
from multiprocessing import resource_tracker
from pathlib import Path

import pytest

from ict_fast.children import deaf_to_interrupts


def test_a_spawned_process_begins_with_sigint_blocked_and_this_one_hears_it_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # As in a process that has spawned none yet.
    monkeypatch.setattr(resource_tracker._resource_tracker, "_fd", None)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    process = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
    with deaf_to_interrupts():
        process.start()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
    status = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    process.kill()
    process.join()
    [blocked] = [int(line.split()[1], 16) for line in status if line.startswith("SigBlk:")]
    assert blocked >> (signal.SIGINT - 1) & 1
    assert signal.SIGINT not in before
