"""`ict-fast ablate`."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from ict_fast import errors, presets, results
from ict_fast.commands.arguments import Device, at_least
from ict_fast.config import Config
from ict_fast.errors import InputError, did_you_mean
from ict_fast.screen import print_table, say


@dataclass(frozen=True)
class AblateOptions:
    """Compare iCT with its 2023 baseline, one ingredient at a time. The same command again goes on."""

    preset: Annotated[str, arg(metavar=f"{{{','.join(presets.names())}}}")] = "digits"
    """The run that every variant changes."""
    out: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(default: runs/ablation)")] = None
    """Folder of all runs, and of ablation.json and ablation.png."""
    seeds: int = 3
    """Seeds of each variant: 0, 1, 2, ..."""
    total_steps: int = 600
    """Steps of each run."""
    only: Annotated[
        tuple[str, ...] | None, arg(metavar="VARIANT ...", help_behavior_hint="(default: all)")
    ] = None
    """Names of the variants to run."""
    count: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: evaluate's)")] = None
    """Images to sample from each run, and number of steps."""
    parallel: Annotated[
        int | None, arg(metavar="N", help_behavior_hint="(default: one per core, on GPUs four each)")
    ] = None
    """Runs at once."""
    device: Device = "auto"
    """auto: the GPUs if the machine has any."""


def run(options: AblateOptions) -> int:
    """Runs the command; returns its exit code."""
    for name in ("seeds", "total_steps"):
        at_least(1, name.replace("_", "-"), getattr(options, name))
    if options.count is not None:
        at_least(2, "count", options.count)
    if options.parallel is not None:
        at_least(1, "parallel", options.parallel)
    base = _base(presets.get(options.preset), options.total_steps)
    out = options.out if options.out is not None else Path("runs/ablation")
    results.require_place(out, "--out")

    import torch

    from ict_fast.ablation import VARIANTS, Plan, configured, run_all
    from ict_fast.ablation.summary import plot, tables
    from ict_fast.training.launch import resolve_device

    by_name = {variant.name: variant for variant in VARIANTS}
    for name in options.only or ():
        if name not in by_name:
            raise InputError(f"--only names {name}, which is no variant{did_you_mean(name, by_name)}")
    variants = tuple(v for v in VARIANTS if options.only is None or v.name in options.only)
    for variant in variants:
        configured(base, variant)
    device = resolve_device(options.device).type
    usual = 4 * torch.cuda.device_count() if device == "cuda" else _cores()
    plan = Plan(
        base=base,
        variants=variants,
        seeds=tuple(range(options.seeds)),
        out=out,
        device=device,
        parallel=usual if options.parallel is None else options.parallel,
        count=options.count,
    )
    found = run_all(plan, lambda text: say(f"ict-fast: {text}"))
    if isinstance(found, int):
        print(f"{out}: stopped; the same command goes on", file=sys.stderr)
        return found
    _write(found, out)
    for table in tables(found):
        print_table(table)
    plot(found, out / "ablation.png")
    print(f"written: {out / 'ablation.json'}, {out / 'ablation.png'}")
    return errors.EXIT_DONE


def _base(preset: Config, total_steps: int) -> Config:
    """The preset, shortened: no grids, no checkpoints but the last and what a stop needs."""
    logging = replace(preset.logging, grid_every=0, checkpoint_every=total_steps, snapshot_every=0)
    training = replace(preset.training, total_steps=total_steps, compile="off")
    return replace(preset, training=training, logging=logging)


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _write(report: dict[str, Any], out: Path) -> None:
    results.write(out / "ablation.json", (json.dumps(report, indent=1) + "\n").encode())
