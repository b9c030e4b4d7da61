"""`ict-fast search-sigma`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from ict_fast import errors, results
from ict_fast.commands.arguments import Device, Run, at_least, valid_seed
from ict_fast.errors import InputError
from ict_fast.screen import live_line, say

if TYPE_CHECKING:
    import torch

    from ict_fast.consistency import ConsistencyModel
    from ict_fast.data.store import Store

# Labels of a class-conditional model follow the reference's, by this seed: the same for every sigma.
_LABEL_SEED = 4


@dataclass(frozen=True)
class SearchSigmaOptions:
    """Search for the noise level of the second sampling step. A ternary search on the Fréchet distance."""

    run: Positional[Run]
    """Folder of a run, whose newest checkpoint is taken, or of one checkpoint."""
    reference: Annotated[
        Path | None, arg(metavar="DATA", help_behavior_hint="(default: what the run was trained on)")
    ] = None
    """Folder of a prepared store with the real images."""
    steps: int = 2
    """Sampling steps: the level of the second is searched for, then that of the third, and so on."""
    low: float = 0.05
    """Lower end of the interval."""
    high: float = 20.0
    """Upper end of the interval."""
    tolerance: float = 1.1
    """Stop when the interval's ends are this ratio apart."""
    count: int = 5000
    """Images per candidate."""
    out: Annotated[
        Path | None, arg(metavar="FILE.json", help_behavior_hint="(default: <run>/search-sigma.json)")
    ] = None
    """Where the trace is written: every sigma that was tried, and its distance."""
    seed: int = 0
    """Seed of the noise, the same for every candidate."""
    device: Device = "auto"
    """auto: the GPU if the machine has one."""


def run(options: SearchSigmaOptions) -> int:
    """Runs the command; returns its exit code."""
    at_least(2, "steps", options.steps)
    at_least(2, "count", options.count)
    valid_seed(options.seed)
    if not 0 < options.low < options.high:
        raise InputError(
            f"--low is {options.low} and --high {options.high}; they must be positive, ascending"
        )
    if not 1 < options.tolerance < options.high / options.low:
        raise InputError(
            f"--tolerance is {options.tolerance}; it must be above 1 and below --high / --low ="
            f" {options.high / options.low:.4g}"
        )
    results.require_run(options.run)
    out = results.run_folder(options.run) / "search-sigma.json" if options.out is None else options.out
    results.require_place(out.parent, "--out")

    from ict_fast.checkpoint import open_checkpoint
    from ict_fast.consistency import load_model
    from ict_fast.data.store import open_store
    from ict_fast.evaluation import FrechetDistance, digits_features
    from ict_fast.evaluation.sigma_search import search_sampling_sigmas
    from ict_fast.training.launch import configure_torch, resolve_device

    device = resolve_device(options.device, None)
    configure_torch(device, deterministic=False)
    checkpoint = open_checkpoint(options.run)
    model = load_model(checkpoint.path).to(device)
    reference = options.reference or Path(model.config.data.path)
    if options.reference is None and not reference.exists():
        raise InputError(f"the run's data, {reference}, are not here; name a prepared store with --reference")
    store = open_store(reference)
    labels = _labels(model, store, options.count)

    with live_line() as progress:
        progress(0.0, "measuring the real images")
        distance = FrechetDistance(digits_features(), store.images)
        searches = search_sampling_sigmas(
            model,
            distance.to,
            count=options.count,
            steps=options.steps,
            interval=(options.low, options.high),
            tolerance=options.tolerance,
            labels=labels,
            seed=options.seed,
            progress=progress,
        )
    sigmas = [search.best[0] for search in searches]
    result = {
        "checkpoint": checkpoint.path.name,
        "step": checkpoint.step,
        "sigmas": sigmas,
        "searches": [search.as_dict() for search in searches],
        "count": options.count,
        "seed": options.seed,
        "reference_path": str(reference),
        "reference_fingerprint": store.fingerprint,
    }
    results.write(out, (json.dumps(result, indent=2) + "\n").encode())
    for number, search in enumerate(searches, start=2):
        for sigma, measured in sorted(search.tried):
            print(f"  sigma {sigma:9.4f}  distance {measured:.4f}")
        best, smallest = search.best
        print(f"step {number}: sigma {best:.4g}, distance {smallest:.4f}, of {len(search.tried)} candidates")
        if search.without is not None and search.without <= smallest:
            say(f"warning: step {number}: {search.without:.4f} without this step; no sigma improves on that")
        if not search.is_single_valley():
            say(
                f"warning: step {number}: the distances have more than one valley; the best one may have been"
                " missed"
            )
        if best in (min(search.tried)[0], max(search.tried)[0]):
            say(f"warning: step {number}: the best is the outermost one tried; widen --low or --high")
    shown = " ".join(f"{sigma:.4g}" for sigma in sigmas)
    print(f"sample with: --steps {options.steps} --sigmas {shown}")
    if len(sigmas) == 1:
        print(f"make it the run's: --method.second-sigma {shown}")
    print(f"written: {out}")
    return errors.EXIT_DONE


def _labels(model: ConsistencyModel, store: Store, count: int) -> torch.Tensor | None:
    """(count,) labels drawn from the reference's, for a class-conditional model."""
    import numpy as np
    import torch

    network = model.config.network
    ours = (network.resolution, network.image_channels)
    if ours != (store.resolution, store.image_channels):
        raise InputError(
            f"{store.path}: holds images of {store.resolution}x{store.resolution} with {store.image_channels}"
            f" channels, the model makes {network.resolution}x{network.resolution} with"
            f" {network.image_channels}; name the data that it was trained on as --reference"
        )
    if not network.num_classes:
        return None
    if store.num_classes != network.num_classes:
        raise InputError(f"{store.path}: has {store.num_classes} classes, the model {network.num_classes}")
    drawn = np.random.default_rng(_LABEL_SEED).integers(0, store.num_images, count)
    return torch.from_numpy(store.labels[drawn])
