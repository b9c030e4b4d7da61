"""The raw results under benchmarks/results, by machine, part and name."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from machine import kernel_sources

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
PARTS = ("tests", "kernels", "optimizer", "step", "data", "train", "dropin", "profile", "precision")


@dataclass(frozen=True)
class Entry:
    """One result, and the name of the file that it is from; what failed in a later run, if that did.

    Attributes:
        commit: that the file's report names.
        older_kernels: whether ict_kernels was other than now, or the report does not say.
        before: the measured one whose place it has taken, if there is one.
    """

    record: dict[str, Any]
    file: str
    failed_since: Entry | None = None
    commit: str | None = None
    older_kernels: bool = False
    before: Entry | None = None

    @property
    def rank(self) -> int:
        """2 if it was measured, 1 if it failed, 0 if it was not reached. Tests that fail were measured."""
        if self.record.get("not_measured"):
            return 0
        return 1 if "error" in self.record and not self.record.get("counts") else 2

    @property
    def of(self) -> str:
        """The commit, and whether its kernels are older."""
        return f"{self.commit or 'unknown'}{', older kernels' if self.older_kernels else ''}"


@dataclass(frozen=True)
class Machine:
    """What was measured on one kind of GPU.

    Attributes:
        name: of the GPU.
        parts: results by part and name: of several runs the newest that measured it, else the newest that
            failed. What a run offered and no run has got to is there too, as not measured.
        reports: by file, with hardware, versions and date.
    """

    name: str
    parts: dict[str, dict[str, Entry]]
    reports: dict[str, Entry]


class Results:
    """Everything that RESULTS.md is made from.

    Args:
        folder: with the JSON files.
    Attributes:
        machines: the GPUs, by name.
        suite: pytest-benchmark's report of the whole CPU suite, or None.
    """

    def __init__(self, folder: Path = RESULTS) -> None:
        self.folder = folder
        self.machines = _machines(folder)
        self.suite = _suite(folder)

    def read(self, name: str) -> Entry | None:
        """A file of its own name, such as step-counts.json, or None if it is not there."""
        path = self.folder / name
        return Entry(json.loads(path.read_text()), name) if path.exists() else None

    def of_part(self, part: str) -> list[tuple[str, str, Entry]]:
        """(GPU, name, result) of all that was measured of a part."""
        return [
            (machine.name, name, entry)
            for machine in self.machines.values()
            for name, entry in machine.parts.get(part, {}).items()
        ]

    def suite_records(self, group: str = "") -> list[dict[str, Any]]:
        """The suite's extra figures, each with its `group`; those of one group, or of all."""
        if self.suite is None:
            return []
        return [
            {**each["extra_info"], "group": each["group"]}
            for each in self.suite.record["benchmarks"]
            if each["extra_info"] and each["group"].startswith(group)
        ]


def _machines(folder: Path) -> dict[str, Machine]:
    found: dict[str, Machine] = {}
    reports = []
    for part in PARTS:
        for path in folder.glob(f"{part}-*.json"):
            report = json.loads(path.read_text())
            if report.get("part") == part and "gpu" in report["hardware"]:
                reports.append((report["date"], path.name, report))
    for _, file, report in sorted(reports, key=lambda each: each[:2]):
        name = report["hardware"]["gpu"]
        machine = found.setdefault(name, Machine(name, defaultdict(dict), {}))
        machine.reports[file] = Entry(report, file)
        results = machine.parts[report["part"]]
        older = report.get("kernels") != kernel_sources()
        for each in report["results"]:
            new, old = Entry(each, file, None, report["commit"], older), results.get(each["name"])
            if old is None or new.rank >= old.rank:
                results[each["name"]] = replace(new, before=old if old and old.rank == 2 else None)
            elif new.rank == 1:
                results[each["name"]] = replace(old, failed_since=new)
        for each in report.get("offered", ()):
            results.setdefault(each, Entry({"name": each, "not_measured": "no run has got to it"}, file))
    return found


def _suite(folder: Path) -> Entry | None:
    """The newest report of pytest-benchmark that conftest.py has signed."""
    found = []
    for path in folder.glob("cpu-suite*.json"):
        report = json.loads(path.read_text())
        found.append((report["ict_fast"]["date"], path.name, report))
    if not found:
        return None
    _, file, report = max(found, key=lambda each: each[:2])
    return Entry(report, file)
