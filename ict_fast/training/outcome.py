"""How a run ended, and how each process of several tells their parent: by a small file."""

from __future__ import annotations

import json
import os
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ict_fast.errors import InputError, TrainingError

_FOLDER = "ICT_FAST_OUTCOMES"
_PROGRESS = "progress"
_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class RunResult:
    """How a call of `train` ended.

    Attributes:
        out: the run's directory.
        step: steps done.
        exit_code: 0 finished, 130 or 143 saved and stopped by a signal.
        message: one line for the person.
        stop_code: 130 or 143 if this process was sent a signal, even one that found the run done.
    """

    out: Path
    step: int
    exit_code: int
    message: str
    stop_code: int | None = None


def report_to(folder: Path) -> None:
    """Names the folder, in a process that has just been started."""
    os.environ[_FOLDER] = str(folder)


def reports() -> bool:
    """Whether this process has a parent that reads what it reports."""
    return _FOLDER in os.environ


def report_error(rank: int, error: Exception, *, hung: bool = False) -> None:
    """`hung`: the other processes cannot end by themselves."""
    _write(rank, {"error": type(error).__name__, "message": str(error), "hung": hung})


def report_result(rank: int, result: RunResult) -> None:
    """How `train` ended."""
    _write(rank, {**asdict(result), "out": str(result.out)})


def await_process_0() -> None:
    """Waits until process 0 has reported how it ended."""
    while not (Path(os.environ[_FOLDER]) / "0.json").exists():
        time.sleep(_POLL_SECONDS)


def report_progress(began: int, saved: int) -> None:
    """In process 0: the step at which this attempt began, and that of its newest checkpoint."""
    if reports():
        with suppress(OSError):
            _replace(Path(os.environ[_FOLDER]) / _PROGRESS, [began, saved])


def progress(folder: Path) -> tuple[int, int] | None:
    """What `report_progress` was last told; None if the attempt did not come so far."""
    with suppress(OSError, ValueError):
        began, saved = json.loads((folder / _PROGRESS).read_text())
        return began, saved
    return None


def _write(rank: int, values: dict[str, Any]) -> None:
    _replace(Path(os.environ[_FOLDER]) / f"{rank}.json", values)


def _replace(path: Path, values: Any) -> None:
    partial = path.with_suffix(f".partial-{threading.get_ident()}")
    partial.write_text(json.dumps(values))
    os.replace(partial, path)


def _read(folder: Path) -> list[dict[str, Any]]:
    found = []
    for path in sorted(folder.glob("*.json"), key=lambda path: int(path.stem)):
        with suppress(OSError, ValueError):
            found.append(json.loads(path.read_text()))
    return found


def is_hung(folder: Path) -> bool:
    """Whether a process has reported that it waits in vain."""
    return any(values.get("hung") for values in _read(folder))


def outcome(folder: Path) -> RunResult | None:
    """What the processes left: the result of process 0, or None.

    Raises:
        InputError, TrainingError: the first error of one.
    """
    found = _read(folder)
    for values in found:
        if "error" in values:
            raise {"InputError": InputError}.get(values["error"], TrainingError)(values["message"])
    for values in found:
        values.pop("hung", None)
        return RunResult(**{**values, "out": Path(values["out"])})
    return None
