"""`ict-fast report`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from ict_fast import errors, results
from ict_fast.commands.arguments import Run


@dataclass(frozen=True)
class ReportOptions:
    """Write one HTML file about a run: pictures, metrics, curves, configuration, how to repeat it."""

    run: Positional[Run]
    """Folder of a run, finished or not."""
    out: Annotated[
        Path | None, arg(metavar="FILE.html", help_behavior_hint="(default: <run>/report.html)")
    ] = None
    """Where it is written; the file needs nothing else, and no network."""


def run(options: ReportOptions) -> int:
    """Runs the command; returns its exit code."""
    results.require_run(options.run)
    folder = results.run_folder(options.run)
    out = folder / "report.html" if options.out is None else options.out
    results.require_file_place(
        out, "--out (by default in the run)" if options.out is None else "--out", "report.html"
    )

    from ict_fast.report import page, read_run

    record = read_run(folder)
    results.write(out, page(record).encode(errors="replace"))  # a path may hold bytes that are no letters
    print(f"{out}" + "".join(f"\nmissing: {text}" for text in record.missing))
    return errors.EXIT_DONE
