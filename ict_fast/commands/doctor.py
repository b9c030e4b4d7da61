"""`ict-fast doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from ict_fast import errors, presets
from ict_fast.commands.arguments import at_least
from ict_fast.errors import InputError
from ict_fast.screen import live_line, print_table


@dataclass(frozen=True)
class DoctorOptions:
    """Say what this machine has and lacks. Exit code 0: it can train; 2: something essential is missing."""

    data: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(default: none is measured)")] = None
    """Folder of a prepared store: does any loader starve the training step on it? Takes some ten seconds."""
    verify: bool = False
    """Compare the store's files with their SHA-256, however large they are."""
    preset: Annotated[
        str | None,
        arg(
            metavar=f"{{{','.join(presets.names())}}}",
            help_behavior_hint="(default: one that takes such images)",
        ),
    ] = None
    """Whose training step the loaders are measured against."""
    batch: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: the preset's)")] = None
    """Images per step."""


def run(options: DoctorOptions) -> int:
    """Runs the command; returns its exit code."""
    from ict_fast.doctor import Check, advice, checks, feeding_checks, memory, table

    for name in ("preset", "batch"):
        if options.data is None and getattr(options, name) is not None:
            raise InputError(f"--{name} says what --data is measured against; name a store with --data DIR")
    if options.batch is not None:
        at_least(1, "batch", options.batch)
    if options.verify:
        from ict_fast.data.store import open_store

        if options.data is None:
            raise InputError("--verify compares the files of a store; name it with --data DIR")
        open_store(options.data, verify=True)
    found = checks()
    failed = any(check.status == "FAIL" for check in found)
    if options.data is not None and failed:
        found.append(Check("data", "none", f"{options.data}: not measured before this machine can train"))
    elif options.data is not None:
        from ict_fast.training.feeding import measure

        with live_line() as progress:
            feeding = measure(options.data, options.preset, options.batch, progress=progress)
        found += [memory((options.data / "images.npy").stat().st_size), *feeding_checks(feeding)]
    if options.verify:
        found.append(Check("checksums", "ok", "the store's files have the SHA-256 of its meta.json"))
    print_table(table(found))
    print(advice(found))
    return errors.EXIT_BAD_INPUT if failed else errors.EXIT_DONE
