"""A machine as the operating system shows it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
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


@pytest.fixture
def control_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, dict[str, str]], None]:
    """Puts this process into control groups: what /proc/self/cgroup says, and files below /sys/fs/cgroup."""

    def write(membership: str, files: dict[str, str]) -> None:
        for name, content in {"membership": membership, **files}.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(content)

    monkeypatch.setattr(hardware, "_MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(hardware, "_CONTROL_GROUPS", tmp_path)
    return write


@pytest.fixture
def twelve_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware.os, "cpu_count", lambda: 96)
    monkeypatch.setattr(hardware.os, "sched_getaffinity", lambda process: set(range(12)))


def test_a_process_counts_the_cores_that_it_may_use(
    twelve_cores: None, control_groups: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert hardware.usable_cores() == 12
    monkeypatch.delattr(hardware.os, "sched_getaffinity")  # not on every system
    assert hardware.usable_cores() == 96


@pytest.mark.parametrize(
    ("membership", "files", "cores"),
    [
        ("0::/", {"cpu.max": "400000 100000\n"}, 4),  # a container of its own name space
        ("0::/a b/c\n", {"a b/c/cpu.max": "max 100000\n", "a b/cpu.max": "250000 100000\n"}, 2),
        ("0::/a/b", {"a/b/cpu.max": "300000 100000\n", "a/cpu.max": "500000 100000\n"}, 3),
        ("0::/", {"cpu.max": "50000 100000\n"}, 1),
        ("0::/", {"cpu.max": "9600000 100000\n"}, 12),
        ("0::/../../other (deleted)", {"cpu.max": "200000 100000\n"}, 2),
        (
            "5:cpuset:/\n4:cpuacct,cpu:/docker/1f\n0::/\n",  # whose path is the host's
            {"cpu/cpu.cfs_quota_us": "600000\n", "cpu/cpu.cfs_period_us": "200000\n"},
            3,
        ),
        ("4:cpu:/", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 12),
        ("4:cpuset:/", {"cpuset/cpu.cfs_quota_us": "1\n", "cpuset/cpu.cfs_period_us": "1\n"}, 12),
    ],
)
def test_a_container_has_as_many_cores_as_its_time_is_worth(
    twelve_cores: None, control_groups: Callable, membership: str, files: dict[str, str], cores: int
) -> None:
    control_groups(membership, files)
    assert hardware.usable_cores() == cores


@pytest.mark.parametrize(
    ("membership", "files", "available"),
    [
        ("0::/", {"memory.max": "9000\n", "memory.current": "5000\n"}, 4000),
        (
            "0::/job",
            {
                "job/memory.max": "max\n",
                "job/memory.current": "100\n",
                "memory.max": "9000\n",
                "memory.current": "8000\n",
                "memory.stat": "anon 1\nactive_file 2000\ninactive_file 3000\n",
            },
            4000,
        ),
        ("0::/", {"memory.max": "9000\n", "memory.current": "9500\n"}, 0),
        (
            "3:memory:/docker/1f",
            {
                "memory/memory.limit_in_bytes": "9000\n",
                "memory/memory.usage_in_bytes": "8000\n",
                "memory/memory.stat": "inactive_file 1\ntotal_inactive_file 500\n",
            },
            1500,
        ),
        ("0::/", {"memory.max": f"{2**62}\n", "memory.current": "0\n"}, None),
        ("3:memory:/", {"memory/memory.limit_in_bytes": "9000\n"}, None),
    ],
)
def test_a_container_has_the_memory_that_is_left_of_its_limit(
    control_groups: Callable,
    monkeypatch: pytest.MonkeyPatch,
    membership: str,
    files: dict[str, str],
    available: int | None,
) -> None:
    read = Path.read_text
    meminfo = "MemTotal:  200 kB\nMemAvailable:  100 kB\n"
    monkeypatch.setattr(
        Path, "read_text", lambda path: meminfo if path == Path("/proc/meminfo") else read(path)
    )
    control_groups(membership, files)
    assert hardware.available_memory() == (102_400 if available is None else available)
