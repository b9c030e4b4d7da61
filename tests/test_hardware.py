"""A machine as the operating system shows it."""

from __future__ import annotations

import subprocess
from types import SimpleNamespace

import pytest

from ict_fast import hardware


@pytest.mark.parametrize(
    ("listed", "expected"), [("GPU 0: H200", "nvidia-smi -L"), ("No devices found", None)]
)
def test_nvidia_smi_is_asked_where_the_system_shows_no_device(
    monkeypatch: pytest.MonkeyPatch, listed: str, expected: str | None
) -> None:
    monkeypatch.setattr(
        hardware, "Path", lambda path: SimpleNamespace(exists=lambda: False, glob=lambda name: [])
    )
    monkeypatch.setattr(hardware.shutil, "which", lambda name: name)
    done = subprocess.CompletedProcess([], 0, stdout=listed)
    monkeypatch.setattr(hardware.subprocess, "run", lambda *words, **options: done)
    assert hardware.nvidia_device() == expected


def test_a_process_counts_the_cores_that_it_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware.os, "cpu_count", lambda: 96)
    monkeypatch.setattr(hardware.os, "sched_getaffinity", lambda process: set(range(12)))
    assert hardware.usable_cores() == 12
    monkeypatch.delattr(hardware.os, "sched_getaffinity")  # not on every system
    assert hardware.usable_cores() == 96
