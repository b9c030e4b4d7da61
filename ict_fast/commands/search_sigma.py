"""`ict-fast search-sigma`."""

from __future__ import annotations

import json
import shlex
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from ict_fast import errors, results
from ict_fast.commands.arguments import (
    Device,
    Ema,
    Run,
    group_of,
    record_of,
    valid_count,
    valid_features,
    valid_seed,
    valid_steps,
)
from ict_fast.errors import InputError
from ict_fast.interruption import interruptible
from ict_fast.screen import live_line, say

if TYPE_CHECKING:
    from ict_fast.checkpoint import Checkpoint
    from ict_fast.consistency import ConsistencyModel
    from ict_fast.evaluation.sigma_search import SigmaSearch


@dataclass(frozen=True)
class SearchSigmaOptions:
    """Search for the noise level of the second sampling step. A ternary search on the Fréchet distance."""

    run: Positional[Run]
    """Folder of a run, whose newest checkpoint is taken, or of one checkpoint."""
    reference: Annotated[
        Path | None, arg(metavar="DATA", help_behavior_hint="(default: what the run was trained on)")
    ] = None
    """Folder of a prepared store, or an .npz with mu and sigma (OpenAI, EDM) or with arr_0 (samples)."""
    features: Annotated[
        Path | None, arg(metavar="FILE", help_behavior_hint="(default: those of the digits classifier)")
    ] = None
    """A TorchScript file, such as inception-2015-12-05.pt."""
    features_sha256: Annotated[str | None, arg(metavar="HEX", help_behavior_hint="(default: any)")] = None
    """What the SHA-256 of --features must be."""
    allow_other_recipe: bool = False
    """Compare with images of another crop recipe than that of the run's data."""
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
        Path | None,
        arg(
            metavar="FILE.json",
            help_behavior_hint="(default: <run>/search-sigma.json; search-sigma-NAME.json with --ema NAME)",
        ),
    ] = None
    """Where the trace is written: every sigma that was tried, and its distance. Until the search has ended it
    is in FILE.json.partial."""
    seed: int = 0
    """Seed of the noise, the same for every candidate."""
    ema: Ema = None
    """A further average of the weights, by its decay (0.9999) or its width (power-0.05)."""
    device: Device = "auto"
    """auto: the GPU if the machine has one."""


def run(options: SearchSigmaOptions) -> int:
    """Runs the command; returns its exit code."""
    valid_steps(2, [options.steps])
    valid_count(2, options.count)
    valid_seed(options.seed)
    valid_features(options.features, options.features_sha256)
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
    group = group_of(options.ema)
    name = f"search-sigma{group.removeprefix('ema')}.json"
    out = results.run_folder(options.run) / name if options.out is None else options.out
    results.require_measurement_place(
        out,
        "--out (by default in the run)" if options.out is None else "--out",
        "search-sigma.json",
        (options.reference, options.features),
    )

    written: list[Path] = []  # the trace, once something has been tried

    def kept() -> str:
        return f"what was tried is in {written[0]}" if written else "nothing was tried yet"

    with interruptible(kept):
        return _search(options, group, out, written)


def _search(options: SearchSigmaOptions, group: str, out: Path, written: list[Path]) -> int:
    """Searches, says what was found and writes it; returns the exit code."""
    from ict_fast.checkpoint import open_checkpoint
    from ict_fast.consistency import load_model
    from ict_fast.evaluation.reference import training_data
    from ict_fast.evaluation.sigma_search import check_interval
    from ict_fast.interop.description import check_state
    from ict_fast.training.launch import configure_torch, resolve_device

    device = resolve_device(options.device, None)
    configure_torch(device, deterministic=False)
    checkpoint = open_checkpoint(options.run)
    check_state(checkpoint)
    model = load_model(checkpoint.path, weights=group).to(device)
    check_interval((options.low, options.high), model.config.method)  # before the reference takes hours
    reference = options.reference or training_data(model)
    with results.only_writer(out):
        return _search_alone(options, checkpoint, model, reference, out, written)


def _search_alone(
    options: SearchSigmaOptions,
    checkpoint: Checkpoint,
    model: ConsistencyModel,
    reference: Path,
    out: Path,
    written: list[Path],
) -> int:
    """As `_search`; nobody else writes there meanwhile."""
    from ict_fast.evaluation import DistanceToReference
    from ict_fast.evaluation.reference import labels_as_in
    from ict_fast.evaluation.sigma_search import search_sampling_sigmas

    with live_line() as progress:
        progress(0.0, "measuring the real images")
        distance = DistanceToReference(
            model,
            reference,
            features=options.features,
            features_sha256=options.features_sha256,
            allow_other_recipe=options.allow_other_recipe,
            progress=progress,
        )

    warnings = [*distance.warnings, *distance.too_few(options.count)]
    for warning in warnings:  # before what may take an hour
        say(f"warning: {warning}")

    def trace(searches: list[SigmaSearch]) -> bytes:
        result = {
            "checkpoint": checkpoint.path.name,
            "step": checkpoint.step,
            **record_of(options.ema),
            "sigmas": [search.best[0] for search in searches],
            "searches": [search.as_dict() for search in searches],
            "not_searched": list(range(len(searches) + 2, options.steps + 1)),
            "searched": [options.low, options.high],
            "tolerance": options.tolerance,
            "count": options.count,
            "seed": options.seed,
            "warnings": warnings,
            **distance.provenance,
        }
        return (json.dumps(result, indent=2, allow_nan=False) + "\n").encode()

    def keep(searches: list[SigmaSearch]) -> None:
        with suppress(InputError):  # there may be room at the end
            results.write(partial, trace(searches))
            written[:] = [partial]

    partial = out.with_name(f"{out.name}.partial")
    partial.unlink(missing_ok=True)
    with live_line() as progress:  # whose clock begins after the reference
        searches = search_sampling_sigmas(
            model,
            distance.to,
            count=options.count,
            steps=options.steps,
            interval=(options.low, options.high),
            tolerance=options.tolerance,
            labels=labels_as_in(distance.reference, model.config.network.num_classes, options.count),
            seed=options.seed,
            progress=progress,
            tried=keep,
        )
    sigmas = [search.best[0] for search in searches]
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
    if len(sigmas) < options.steps - 1:
        say(
            f"warning: sigma {sigmas[-1]:.4g} leaves no interval above {options.low}: nothing was searched"
            f" for after step {len(sigmas) + 1}, of {options.steps}; a lower --low leaves one"
        )
    shown = [f"{sigma:.4g}" for sigma in sigmas]
    ema = "" if options.ema is None else f" --ema {options.ema}"
    print(f"sample with: --steps {len(sigmas) + 1} --sigmas {' '.join(shown)}{ema}")
    print(f"measure with: {_evaluate_command(options, shown, out)}")
    if len(sigmas) == 1:
        for line in _how_to_keep(checkpoint, shown[0], ema):
            print(line)
    results.write(out, trace(searches))
    partial.unlink(missing_ok=True)
    print(f"written: {out}")
    return errors.EXIT_DONE


def _evaluate_command(options: SearchSigmaOptions, sigmas: list[str], trace: Path) -> str:
    """Measures the levels that were found, against what they were searched with."""
    words = ["ict-fast", "evaluate", str(options.run), "--sigmas", *sigmas]
    words += [] if options.reference is None else ["--reference", str(options.reference)]
    words += [] if options.features is None else ["--features", str(options.features)]
    words += [] if options.features_sha256 is None else ["--features-sha256", options.features_sha256]
    words += ["--allow-other-recipe"] if options.allow_other_recipe else []
    words += [] if options.ema is None else ["--ema", options.ema]
    return shlex.join([*words, "--out", str(trace.with_stem(f"{trace.stem}-evaluation"))])


def _how_to_keep(checkpoint: Checkpoint, sigma: str, ema: str) -> list[str]:
    """What to type so that the level is the model's own; a finished run's configuration stays as it is.

    Args:
        ema: " --ema NAME" if the level is for a further average; a run's configuration is for its own.
    """
    from ict_fast.checkpoint import checkpoint_steps

    training = checkpoint.state["config"].get("training", {})
    imported = checkpoint.state.get("imported")
    if imported is not None and imported["layout"] not in ("ict-fast", "diffusers"):  # read from a file
        return [f"make it the model's: import {imported['file']} again with --second-sigma {sigma}"]
    newest = max(checkpoint_steps(checkpoint.path.parent.parent), default=checkpoint.step)
    if imported is None and not ema and max(newest, checkpoint.step) < training.get("total_steps", 0):
        return [f"make it the run's: resume it with --method.second-sigma {sigma}"]
    return [
        f"make it the model's: `ict-fast export safetensors{ema}` it, and `ict-fast import safetensors` that"
        f" with --second-sigma {sigma}"
    ]
