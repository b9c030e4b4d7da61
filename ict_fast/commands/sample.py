"""`ict-fast sample`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from ict_fast import errors, results
from ict_fast.commands.arguments import (
    Device,
    Ema,
    Run,
    Sigmas,
    group_of,
    valid_count,
    valid_labels,
    valid_seed,
    valid_sigmas,
    valid_steps,
)
from ict_fast.errors import InputError
from ict_fast.screen import counted, live_line


@dataclass(frozen=True)
class SampleOptions:
    """Make images with a trained model (its EMA weights)."""

    run: Positional[Run]
    """Folder of a run, whose newest checkpoint is taken, or of one checkpoint."""
    out: Annotated[Path | None, arg(metavar="PATH", help_behavior_hint="(default: <run>/samples.png)")] = None
    """FILE.png: a grid. A folder: one PNG per image. FILE.npz: arr_0 uint8 NHWC, arr_1 labels if any."""
    count: int = 64
    """Number of images."""
    steps: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: 1, or as --sigmas)")] = None
    """Network evaluations per image."""
    sigmas: Sigmas = None
    """Noise levels of the steps after the first, descending."""
    labels: Annotated[
        tuple[int, ...] | None, arg(metavar="CLASS ...", help_behavior_hint="(default: every class)")
    ] = None
    """Classes of a class-conditional model; repeated until there is one per image."""
    seed: int = 0
    """Seed of the noise."""
    ema: Ema = None
    """A further average of the weights, by its decay (0.9999) or its width (power-0.05)."""
    device: Device = "auto"
    """auto: the GPU if the machine has one."""


def run(options: SampleOptions) -> int:
    """Runs the command; returns its exit code."""
    valid_count(1, options.count)
    valid_seed(options.seed)
    sigmas = options.sigmas or ()
    steps = len(sigmas) + 1 if options.steps is None else options.steps
    valid_steps(1, [steps])
    valid_sigmas(sigmas, [steps])
    if options.labels and len(options.labels) > options.count:
        raise InputError(f"--labels has {len(options.labels)} values; --count is {options.count}")
    valid_labels(options.labels or ())
    results.require_run(options.run)
    out = options.out if options.out is not None else results.run_folder(options.run) / "samples.png"
    results.require_sample_place(out, options.count)

    import torch

    from ict_fast.consistency import load_model, sample_pixels
    from ict_fast.training.launch import configure_torch, resolve_device

    device = resolve_device(options.device, None)
    configure_torch(device, deterministic=False)
    model = load_model(options.run, weights=group_of(options.ema)).to(device)
    network = model.config.network
    results.require_room(out, options.count * network.image_channels * network.resolution**2)
    results.require_grid(out, options.count, network.resolution)
    labels = None
    if network.num_classes or options.labels:
        classes = torch.tensor(options.labels or range(network.num_classes))
        labels = classes[torch.arange(options.count) % len(classes)]
    with live_line() as progress:
        pixels = sample_pixels(
            model,
            options.count,
            steps=steps,
            sigmas=sigmas or None,
            labels=labels,
            seed=options.seed,
            progress=lambda done: progress(done / options.count, f"sampling {options.count:,} images"),
        )
    with live_line() as progress:
        results.save_samples(
            pixels,
            labels,
            out,
            lambda done: progress(done / options.count, f"writing {options.count:,} images"),
        )
    print(f"{counted(options.count, 'image')} in {counted(steps, 'step')}: {out}")
    return errors.EXIT_DONE
