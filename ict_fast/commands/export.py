"""`ict-fast export`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from ict_fast import errors, results
from ict_fast.commands.arguments import Ema, Run, group_of
from ict_fast.errors import InputError


@dataclass(frozen=True)
class ExportOptions:
    """Write a model for others: weights, their configuration and a model card."""

    form: Positional[Literal["safetensors", "diffusers"]]
    """safetensors: model.safetensors, config.json. diffusers: a folder that its from_pretrained loads."""
    run: Positional[Run]
    """Folder of a run, whose newest checkpoint is taken, or of one checkpoint."""
    out: Annotated[Path, arg(metavar="DIR")]
    """Folder to write, new or empty."""
    weights: Literal["ema", "weights"] = "ema"
    """The averaged weights, which sample and evaluate use, or the trained ones themselves."""
    ema: Ema = None
    """Take another average that the run keeps (--optimizer.ema-decays, --optimizer.power-ema)."""
    license: Annotated[str | None, arg(metavar="ID", help_behavior_hint="(default: none)")] = None
    """License that the model card names, as model hubs spell it, such as cc-by-4.0."""


def run(options: ExportOptions) -> int:
    """Runs the command; returns its exit code."""
    results.require_run(options.run)
    results.require_weights_place(options.out, "--out")
    if options.ema is not None and options.weights != "ema":
        raise InputError(
            f"--ema {options.ema} is an average, and --weights {options.weights} are none; choose one of them"
        )
    if options.license is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]*", options.license):
        raise InputError(
            f"--license is {options.license!r}; it must be one word of letters, digits, dots, dashes and"
            " pluses, such as cc-by-4.0"
        )

    from ict_fast.checkpoint import open_checkpoint
    from ict_fast.interop.imported import require_new

    require_new(options.out)
    checkpoint = open_checkpoint(options.run)
    group = options.weights if options.weights != "ema" else group_of(options.ema)
    if options.form == "safetensors":
        from ict_fast.interop.export import export_safetensors

        lines = [", ".join(export_safetensors(checkpoint, options.out, group, options.license))]
    else:
        from ict_fast.interop.diffusers import export_diffusers

        lines = export_diffusers(checkpoint, options.out, group, options.license)
    print(f"{options.run}, step {checkpoint.step:,}: {options.out}")
    for line in lines:
        print(f"  {line}")
    return errors.EXIT_DONE
