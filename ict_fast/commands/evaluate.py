"""`ict-fast evaluate`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from ict_fast import errors, results
from ict_fast.commands.arguments import Device, Ema, Run, at_least, group_of, valid_seed
from ict_fast.errors import InputError
from ict_fast.screen import live_line, print_table


@dataclass(frozen=True)
class EvaluateOptions:
    """Measure a trained model against real images; writes evaluation.json beside the checkpoint."""

    run: Positional[Run]
    """Folder of a run, whose newest checkpoint is taken, or of one checkpoint."""
    reference: Annotated[
        Path | None, arg(metavar="DATA", help_behavior_hint="(default: what the run was trained on)")
    ] = None
    """Folder of a prepared store with the real images."""
    out: Annotated[
        Path | None, arg(metavar="FILE.json", help_behavior_hint="(default: evaluation.json beside it)")
    ] = None
    """Where the result is written; the default is overwritten by the next evaluation in the same run."""
    steps: Annotated[tuple[str, ...], arg(metavar="1,2")] = ("1,2",)
    """Numbers of sampling steps to measure."""
    count: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: 10000)")] = None
    """Number of images to generate."""
    seed: int = 0
    """Seed of the noise."""
    ema: Ema = None
    """A further average of the weights, by its decay (0.9999) or its width (power-0.05)."""
    device: Device = "auto"
    """auto: the GPU if the machine has one."""


def run(options: EvaluateOptions) -> int:
    """Runs the command; returns its exit code."""
    try:
        steps = tuple(int(number) for text in options.steps for number in text.split(",") if number)
    except ValueError:
        raise InputError(errors.bad_value("--steps", " ".join(options.steps), tuple[int, ...])) from None
    at_least(1, "steps", min(steps, default=0))
    if options.count is not None:
        at_least(2, "count", options.count)
    valid_seed(options.seed)
    results.require_run(options.run)

    from ict_fast.checkpoint import open_checkpoint
    from ict_fast.consistency import load_model
    from ict_fast.evaluation import evaluate, table
    from ict_fast.training.launch import configure_torch, resolve_device

    device = resolve_device(options.device, None)
    configure_torch(device, deterministic=False)
    checkpoint = open_checkpoint(options.run)
    model = load_model(checkpoint.path, weights=group_of(options.ema)).to(device)
    reference = options.reference or Path(model.config.data.path)
    if options.reference is None and not reference.exists():
        raise InputError(f"the run's data, {reference}, are not here; name a prepared store with --reference")
    beside = Path(checkpoint.path).parent / "evaluation.json"
    out = beside if options.out is None else options.out
    results.require_place(out.parent, "the run" if options.out is None else "--out")

    with live_line() as progress:
        result = evaluate(
            model, reference, steps=steps, count=options.count, seed=options.seed, progress=progress
        )
    average = {} if options.ema is None else {"ema": options.ema}
    result = {"checkpoint": Path(checkpoint.path).name, "step": checkpoint.step, **average, **result}
    results.write(out, (json.dumps(result, indent=2) + "\n").encode())
    print_table(table(result))
    print(f"written: {out}")
    return errors.EXIT_DONE
