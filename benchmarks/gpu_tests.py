"""Part `tests` of run_gpu.py: tests/gpu by pytest, and the kernels under compute-sanitizer.

Each file is a name of its own. What takes the time is compiling, on one core per process: so several
processes share the tests of the files, one by one, on the one GPU (gpu_tests_worker.py). They take the files
in order, and a file's entry is given as soon as all its tests have ended. A file that cannot be imported
because a package is absent is skipped with the package's name; pytest itself may be absent too.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gpu_tests_worker as worker
import torch
from gpu_sanitizer import TOOLS, sanitize
from machine import absent

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "tests/gpu"
# The kernels, then whole steps; the others follow, and last the file that compiles thirty networks.
FIRST = ("group_norm_silu", "consistency_loss", "radam_ema", "noising", "noise_levels", "training_step")
LAST = ("graph",)
LARGE = "tests/gpu, more than 2^31 elements"
PROCESSES = max(1, min(12, (os.cpu_count() or 1) - 2))
# For the tests that run when the budget ends.
GRACE_SECONDS = 40
_POLL_SECONDS = 0.2


def part_tests(device: torch.device, session: Any) -> dict[str, Callable[[], Any]]:
    """What to run, by name: files, the sanitizer, the tests of large tensors, and the slowest files.

    Args:
        session: whose `left()` is the seconds that are left, and whose `only` chooses names. What has been
            begun for several names goes to its `begun`.
    """
    files = {_name(path): path for path in _in_order(FOLDER.glob("test_*.py"))}
    late = {name: path for name, path in files.items() if path.stem.removeprefix("test_") in LAST}
    early = {name: path for name, path in files.items() if name not in late}
    found: dict[str, Callable[[], Any]] = _together(early, session)
    found |= {f"compute-sanitizer, {tool}": partial(sanitize, tool, session.left) for tool in TOOLS}
    found[LARGE] = partial(_alone, list(files.values()), session)
    return found | _together(late, session)


def _name(path: Path) -> str:
    return f"tests/gpu/{path.name}"


def _in_order(paths: Any) -> list[Path]:
    def place(path: Path) -> tuple[int, str]:
        name = path.stem.removeprefix("test_")
        if name in FIRST:
            return FIRST.index(name), name
        return len(FIRST) + (name in LAST), name

    return sorted(paths, key=place)


def _together(files: dict[str, Path], session: Any) -> dict[str, Callable[[], Any]]:
    """The results of files whose tests are run by one set of processes, which the first that is asked for
    starts.
    """
    started: list[Workers] = []

    def results(name: str) -> Iterator[dict[str, Any]]:
        if absent("pytest"):
            yield {"not_measured": "needs pytest, which is not here"}
            return
        if not started:
            chosen = [each for each in files if session.only in each]
            session.begun.update(chosen)
            started.append(Workers([files[each] for each in chosen], session.left(), PROCESSES))
        yield from started[0].results(files[name])

    return {name: partial(results, name) for name in files}


def _alone(files: Sequence[Path], session: Any) -> Iterator[dict[str, Any]]:
    """Tests of large tensors, one after the other."""
    if absent("pytest"):
        yield {"not_measured": "needs pytest, which is not here"}
    else:
        yield from Workers(files, session.left(), 1, large=True).results()


class Workers:
    """Processes of pytest that share the tests of some files.

    Args:
        files: in the order in which their tests are taken.
        seconds: no test is begun after them.
        count: of the processes.
        large: whether to run the tests of large tensors, or the others.
    """

    def __init__(self, files: Sequence[Path], seconds: float, count: int, large: bool = False) -> None:
        self._folder = tempfile.TemporaryDirectory()
        (Path(self._folder.name) / "claims").mkdir()
        self._deadline = time.time() + seconds
        paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # what happens to be installed changes nothing
            # Else each of them starts a process for every core, to compile.
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
            # Else the definitions that run on the CPU want every core for each process.
            "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count)),
            worker.FOLDER: self._folder.name,
            worker.DEADLINE: str(self._deadline),
            worker.LARGE: str(int(large)),
        }
        command = [sys.executable, "-m", "pytest", *map(str, files), "-q", "-o", "addopts="]
        command += ["--import-mode=importlib", "-p", "no:cacheprovider", "-p", worker.__name__]
        command += ["--continue-on-collection-errors"]
        self._processes = []
        self._stopped: set[int] = set()  # at the deadline
        for number in range(count):
            with open(Path(self._folder.name) / f"{number}.log", "w") as log:
                process = subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=environment | {worker.NUMBER: str(number)},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            self._processes.append(process)
        atexit.register(self._kill)

    def results(self, file: Path | None = None) -> Iterator[dict[str, Any]]:
        """What is known of a file's tests, or of all, each time that more is; ends when they have ended."""
        known = -1
        while True:
            if time.time() > self._deadline + GRACE_SECONDS:
                self._stopped |= {n for n, each in enumerate(self._processes) if each.poll() is None}
                self._kill()
            running = [process.poll() is None for process in self._processes]
            tests = self._tests(file, running)
            unfinished = sum(test["outcome"] == "not run" for test in tests or ())
            if tests is not None and (not unfinished or not any(running)):
                yield record_of(tests)
                return
            if tests is not None and len(tests) - unfinished > known:
                known = len(tests) - unfinished
                yield record_of(tests)
            time.sleep(_POLL_SECONDS)

    def _tests(self, file: Path | None, running: Sequence[bool]) -> list[dict[str, Any]] | None:
        """Outcomes of a file's tests, or of all, as far as they are known; None before they are collected."""
        said = [(number, line) for number in range(len(running)) for line in self._said(number)]
        collected = next((line["collected"] for _, line in said if "collected" in line), None)
        if collected is None:
            return None if any(running) else [worker.outcome("pytest", "error", 0.0, self._ending(0))]
        outcomes = [line for _, line in said if "outcome" in line]
        tests = [line for line in outcomes if "::" in line["name"]]
        # What is wrong with a whole file, each process says.
        tests += {line["name"]: line for line in outcomes if "::" not in line["name"]}.values()
        taken_by = {line["claimed"]: number for number, line in said if "claimed" in line}
        done = {line["done"] for _, line in said if "done" in line}
        for test in collected:
            if test in done:
                continue
            if test in taken_by and taken_by[test] in self._stopped:
                reason = f"still ran {GRACE_SECONDS} s after the budget was used up, and was stopped"
                tests.append(worker.outcome(test, "not run", 0.0, reason))
            elif test in taken_by and not running[taken_by[test]]:
                tests.append(worker.outcome(test, "error", 0.0, self._ending(taken_by[test])))
            else:
                reason = "not reached yet" if any(running) else "the budget was used up"
                tests.append(worker.outcome(test, "not run", 0.0, reason))
        return [test for test in tests if file is None or Path(test["name"].split("::")[0]).name == file.name]

    def _said(self, number: int) -> list[dict[str, Any]]:
        """What a process has written; a last line without its end is still being written."""
        path = Path(self._folder.name) / f"{number}.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def _ending(self, number: int) -> str:
        """How a process ended that had not come to the end of its work."""
        log = (Path(self._folder.name) / f"{number}.log").read_text(errors="replace")
        code = self._processes[number].returncode
        return f"its process crashed (exit code {code}): {log[-1500:]}"

    def _kill(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def record_of(tests: list[dict[str, Any]]) -> dict[str, Any]:
    """The record of some tests.

    Returns:
        counts by outcome: passed, failed, error, skipped, not run; an entry for each test; a summary. `error`
        if any failed, with why; else `not_measured` if some did not run.
    """
    counts = Counter(test["outcome"] for test in tests)
    summary = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))
    record: dict[str, Any] = {"counts": dict(counts), "tests": tests, "summary": summary}
    bad = [test for test in tests if test["outcome"] in ("failed", "error")]
    late = [test for test in tests if test["outcome"] == "not run"]
    if bad:
        record["error"] = "; ".join([summary, *(f"{test['name']}: {_why(test['reason'])}" for test in bad)])
    elif late:
        record["not_measured"] = f"{summary}: {late[0]['reason']}"
    return record


def _why(reason: str) -> str:
    """Of a traceback the line with the error."""
    lines = reason.strip().splitlines() or [""]
    return next((line[1:].strip() for line in lines if line.startswith("E  ")), lines[-1])[:300]
