"""What pytest loads in each process of part `tests`: it takes tests off the list that all of them share.

Every process collects the same files in the same order. A test is run by the process that makes its file in
the folder of claims; what becomes of it is appended to that process's own list, as it comes, so that one that
crashes takes nothing with it but the test that it was in. See gpu_tests.py.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

# How a process learns where to write, which one it is, when to stop, and whether the tests of large tensors
# are its own or not.
FOLDER, NUMBER, DEADLINE, LARGE = (
    f"ICT_FAST_GPU_TESTS_{name}" for name in ("FOLDER", "NUMBER", "DEADLINE", "LARGE")
)
# Tests of more than 2^31 elements take tens of GiB each, and skip themselves where those are not free.
LARGE_PREFIX = "test_more_than_"
_PROJECT = ("ict_fast", "ict_kernels", "kernel_cases")


def absent_package(report: str) -> str | None:
    """The package whose absence a report tells of, or None. One of the project's own is never absent."""
    found = re.findall(r"ModuleNotFoundError: No module named '([\w.]+)'", report)
    return found[-1] if found and found[-1].split(".")[0] not in _PROJECT else None


def outcome(name: str, outcome: str, seconds: float, reason: str | None = None) -> dict[str, Any]:
    """What is written of a test."""
    return {"name": name, "outcome": outcome, "seconds": round(seconds, 3), "reason": reason}


def _write(line: dict[str, Any]) -> None:
    path = Path(os.environ[FOLDER]) / f"{os.environ[NUMBER]}.jsonl"
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _claimed(name: str) -> bool:
    """Whether this process is the one that runs a test."""
    claim = Path(os.environ[FOLDER]) / "claims" / hashlib.sha256(name.encode()).hexdigest()
    try:
        claim.touch(exist_ok=False)
    except FileExistsError:
        return False
    _write({"claimed": name})
    return True


# ------------------------------------------------------------------------------------------ what pytest calls


def pytest_collectreport(report: Any) -> None:
    if report.failed:
        absent = absent_package(str(report.longrepr))
        if absent:
            _write(outcome(report.nodeid, "skipped", 0.0, f"needs {absent}, which is not installed"))
        else:
            _write(outcome(report.nodeid, "error", 0.0, str(report.longrepr)[-2000:]))
    elif report.skipped:
        _write(outcome(report.nodeid, "skipped", 0.0, str(report.longrepr[2])))


def pytest_collection_modifyitems(items: list[Any]) -> None:
    large = os.environ[LARGE] == "1"
    items[:] = [item for item in items if item.name.startswith(LARGE_PREFIX) == large]


def pytest_collection_finish(session: Any) -> None:
    _write({"collected": [item.nodeid for item in session.items]})


def pytest_runtestloop(session: Any) -> bool:
    for item in session.items:
        if time.time() > float(os.environ[DEADLINE]):
            break
        if _claimed(item.nodeid):
            # Which test comes next is not known yet, so every fixture ends with its test.
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
            _write({"done": item.nodeid})
            _give_memory_back()
    return True


def pytest_runtest_logreport(report: Any) -> None:
    if report.skipped:
        reason = report.wasxfail if hasattr(report, "wasxfail") else str(report.longrepr[2])
        _write(outcome(report.nodeid, "skipped", report.duration, reason))
    elif report.failed:
        kind = "failed" if report.when == "call" else "error"
        _write(outcome(report.nodeid, kind, report.duration, str(report.longrepr)[-2000:]))
    elif report.when == "call":
        _write(outcome(report.nodeid, "passed", report.duration))


def _give_memory_back() -> None:
    """To the other processes on this GPU, which look at what is free."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
