"""Part `tests` of run_gpu.py: runs tests/gpu by pytest, and is the plugin that writes down each outcome.

Outcomes are written as they come, so that a run that is killed keeps those it had. A file that cannot be
imported because a package is absent is skipped with the package's name; pytest itself may be absent too.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from machine import absent

ROOT = Path(__file__).resolve().parents[1]
FOLDER = "tests/gpu"
# How the plugin in the child process learns where to write and when to stop.
_OUTCOMES, _DEADLINE = "ICT_FAST_GPU_TESTS_OUTCOMES", "ICT_FAST_GPU_TESTS_DEADLINE"
# For the test that runs when the budget ends.
GRACE_SECONDS = 40
_LATE = "the budget was used up"
_PROJECT = ("ict_fast", "ict_kernels", "kernel_cases")


def measure_tests(budget_seconds: float) -> dict[str, Any]:
    """Runs the tests, no new one after the budget, and returns every outcome.

    Returns:
        counts by outcome: passed, failed, error, skipped, not run; and one entry for each test, with name,
        outcome, seconds and reason; `error` if any failed.
    """
    if absent("pytest"):
        return {"not_measured": "needs pytest, which is not here"}
    with TemporaryDirectory() as folder:
        outcomes = Path(folder) / "outcomes.jsonl"
        outcomes.touch()
        paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            _OUTCOMES: str(outcomes),
            _DEADLINE: str(time.time() + budget_seconds),
        }
        environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # what happens to be installed changes nothing
        command = [sys.executable, "-m", "pytest", FOLDER, "-q", "-o", "addopts=", "--import-mode=importlib"]
        command += ["-p", "no:cacheprovider", "-p", Path(__file__).stem, "--continue-on-collection-errors"]
        ending = _run(command, environment, budget_seconds + GRACE_SECONDS)
        tests = [json.loads(line) for line in outcomes.read_text().splitlines()]
    if ending:
        tests.append(_outcome("pytest", "error", 0.0, ending))
    counts = Counter(test["outcome"] for test in tests)
    summary = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))
    record = {"counts": dict(counts), "tests": tests, "summary": summary}
    return record | ({"error": summary} if counts["failed"] or counts["error"] else {})


def _run(command: list[str], environment: dict[str, str], seconds: float) -> str | None:
    """Runs pytest, its output on stderr; what was wrong with its end, or None."""
    try:
        code = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr,
            timeout=seconds,
            check=False,
        ).returncode
    except subprocess.TimeoutExpired:
        return f"killed after {seconds:.0f} s: a test did not end"
    # 0: all passed, 1: some failed, 2: some files could not be imported; their outcomes say so.
    return None if code in (0, 1, 2) else f"pytest ended with exit code {code}"


def absent_package(report: str) -> str | None:
    """The package whose absence a report tells of, or None. One of the project's own is never absent."""
    found = re.findall(r"ModuleNotFoundError: No module named '([\w.]+)'", report)
    return found[-1] if found and found[-1].split(".")[0] not in _PROJECT else None


def _outcome(name: str, outcome: str, seconds: float, reason: str | None = None) -> dict[str, Any]:
    return {"name": name, "outcome": outcome, "seconds": round(seconds, 3), "reason": reason}


# ------------------------------------------------------------------------------------------ what pytest calls


def _write(*outcome: Any) -> None:
    with open(os.environ[_OUTCOMES], "a", encoding="utf-8") as file:
        file.write(json.dumps(_outcome(*outcome)) + "\n")


def pytest_collectreport(report: Any) -> None:
    if report.failed:
        absent = absent_package(str(report.longrepr))
        if absent:
            _write(report.nodeid, "skipped", 0.0, f"needs {absent}, which is not installed")
        else:
            _write(report.nodeid, "error", 0.0, str(report.longrepr)[-2000:])
    elif report.skipped:
        _write(report.nodeid, "skipped", 0.0, str(report.longrepr[2]))


def pytest_runtest_logreport(report: Any) -> None:
    if report.skipped:
        reason = report.wasxfail if hasattr(report, "wasxfail") else str(report.longrepr[2])
        _write(report.nodeid, "not run" if _LATE in reason else "skipped", report.duration, reason)
    elif report.failed:
        outcome = "failed" if report.when == "call" else "error"
        _write(report.nodeid, outcome, report.duration, str(report.longrepr)[-2000:])
    elif report.when == "call":
        _write(report.nodeid, "passed", report.duration)


def pytest_runtest_setup(item: Any) -> None:
    import pytest

    if time.time() > float(os.environ[_DEADLINE]):
        pytest.skip(_LATE)
