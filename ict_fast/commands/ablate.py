"""`ict-fast ablate`."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from rich.table import Table
from tyro.conf import arg

from ict_fast import errors, presets, results
from ict_fast.ablation.variants import (
    DEFAULT_PRESET,
    DEFAULT_STEPS,
    GROUPS,
    Variant,
    configured,
    preset_names,
    variants_of,
)
from ict_fast.commands.arguments import Device, at_least, valid_count
from ict_fast.config import Config
from ict_fast.errors import InputError, did_you_mean
from ict_fast.hardware import usable_cores
from ict_fast.screen import print_table, say

_MOST_SEEDS = 10_000


@dataclass(frozen=True)
class AblateOptions:
    """Compare iCT with its 2023 baseline, one ingredient at a time. The same command again goes on."""

    preset: Annotated[str, arg(metavar=f"{{{','.join(preset_names())}}}")] = DEFAULT_PRESET
    """The run that every variant changes. Only digits can be run, as runs are measured with their features;
    --list shows the variants of any."""
    out: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(default: runs/ablation)")] = None
    """Folder of all runs, and of ablation.json and ablation.png."""
    seeds: int = 3
    """Seeds of each variant: 0, 1, 2, ... Further ones that are there already are reported too."""
    total_steps: int = DEFAULT_STEPS
    """Steps of each run."""
    only: Annotated[
        tuple[str, ...] | None, arg(metavar="VARIANT ...", help_behavior_hint="(default: all)")
    ] = None
    """Names of the variants to run and to report; --list shows them."""
    count: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: evaluate's)")] = None
    """Images to sample from each run: as many in one step, and again in two."""
    parallel: Annotated[
        int | None, arg(metavar="N", help_behavior_hint="(default: one per core, on GPUs four each)")
    ] = None
    """Runs at once."""
    device: Device = "auto"
    """auto: the GPUs if the machine has any."""
    list: bool = False
    """Show the preset's variants and run nothing."""


def run(options: AblateOptions) -> int:
    """Runs the command; returns its exit code."""
    for name in ("seeds", "total_steps"):
        at_least(1, name.replace("_", "-"), getattr(options, name))
    if options.seeds > _MOST_SEEDS:
        raise InputError(f"--seeds is {options.seeds}; it must be at most {_MOST_SEEDS:,}")
    if options.count is not None:
        valid_count(2, options.count)
    if options.parallel is not None:
        at_least(1, "parallel", options.parallel)
    base = _base(presets.get(options.preset), options.total_steps)
    by_name = {variant.name: variant for variant in variants_of(base)}
    for name in options.only or ():
        if name not in by_name:
            raise InputError(
                f"--only names {name}, which is no variant{did_you_mean(name, by_name)}; --list shows them"
            )
    variants = tuple(v for v in by_name.values() if options.only is None or v.name in options.only)
    if options.list:
        print_table(_list(variants))
        return errors.EXIT_DONE
    out = options.out if options.out is not None else Path("runs/ablation")
    results.require_weights_place(out, "--out")
    ours = (out / "ablation.json").exists() or any(out.glob("*/seed-*"))
    if out.is_dir() and any(out.iterdir()) and not ours:
        raise InputError(f"{out} is not empty and holds no ablation; choose another --out")

    import torch

    from ict_fast.ablation.picture import plot
    from ict_fast.ablation.runs import Plan, run_all
    from ict_fast.ablation.summary import as_text, tables
    from ict_fast.training.launch import resolve_device

    for variant in variants:
        configured(base, variant)
    device = resolve_device(options.device).type
    usual = 4 * torch.cuda.device_count() if device == "cuda" else usable_cores()
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
    results.write(out / "ablation.json", as_text(found).encode())
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


def _list(variants: Iterable[Variant]) -> Table:
    table = Table(title="Variants, by what they are for")
    for name in ("name for --only", "what it is"):
        table.add_column(name)
    for group, title in GROUPS.items():
        members = [variant for variant in variants if variant.group == group]
        if members:
            table.add_section()
            table.add_row("", f"[bold]{title}[/bold]")
        for variant in members:
            table.add_row(variant.name, variant.label)
    return table
