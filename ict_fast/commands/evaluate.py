"""`ict-fast evaluate`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from ict_fast import errors, results
from ict_fast.commands.arguments import (
    Device,
    Ema,
    Run,
    Sigmas,
    at_least,
    group_of,
    record_of,
    valid_count,
    valid_features,
    valid_seed,
    valid_sigmas,
    valid_steps,
)
from ict_fast.errors import InputError
from ict_fast.interruption import interruptible
from ict_fast.screen import live_line, print_table, say

if TYPE_CHECKING:
    import torch

    from ict_fast.checkpoint import Checkpoint


@dataclass(frozen=True)
class EvaluateOptions:
    """Measure a trained model against real images; writes evaluation.json beside the checkpoint.

    Fréchet distance (FID), kernel distance (KID), Inception score, precision and recall. The same command
    continues an evaluation that was interrupted.
    """

    run: Positional[Run]
    """Folder of a run, whose newest checkpoint is taken, or of one checkpoint."""
    reference: Annotated[
        Path | None,
        arg(metavar="DATA|FILE.npz", help_behavior_hint="(default: what the run was trained on)"),
    ] = None
    """Real images: a prepared store, an .npz with mu and sigma (OpenAI, EDM), or an .npz with arr_0."""
    features: Annotated[
        Path | None, arg(metavar="FILE.pt", help_behavior_hint="(default: a classifier of digits)")
    ] = None
    """TorchScript file of the network whose features are compared, such as inception-2015-12-05.pt."""
    features_sha256: Annotated[str | None, arg(metavar="HEX", help_behavior_hint="(default: any)")] = None
    """What the SHA-256 of --features must be."""
    allow_other_recipe: bool = False
    """Compare with a reference whose images were cropped in another way than the training data."""
    out: Annotated[
        Path | None,
        arg(
            metavar="FILE.json",
            help_behavior_hint="(default: evaluation.json beside it; evaluation-NAME.json with --ema NAME)",
        ),
    ] = None
    """Where the result is written; the default is overwritten by the next evaluation in the same run."""
    steps: Annotated[
        tuple[str, ...] | None, arg(metavar="1,2", help_behavior_hint="(default: 1,2, or as --sigmas)")
    ] = None
    """Numbers of sampling steps to measure."""
    sigmas: Sigmas = None
    """Noise levels of the steps after the first, descending."""
    count: Annotated[
        int | None, arg(metavar="INT", help_behavior_hint="(default: 50000; of digits 10000)")
    ] = None
    """Number of images to generate."""
    seed: int = 0
    """Seed of the noise."""
    ema: Ema = None
    """A further average of the weights, by its decay (0.9999) or its width (power-0.05)."""
    device: Device = "auto"
    """auto: the GPUs if the machine has any."""
    gpus: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: all, or the CPU)")] = None
    """Number of GPUs on this machine, a process for each."""
    processes: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: 1)")] = None
    """Number of processes that share the CPU (--device cpu)."""


@interruptible("the same command continues")
def run(options: EvaluateOptions) -> int:
    """Runs the command; returns its exit code."""
    sigmas, steps = options.sigmas or (), _steps(options)
    valid_steps(1, steps)
    valid_sigmas(sigmas, steps)
    if options.count is not None:
        valid_count(2, options.count)
    valid_seed(options.seed)
    for name, number in (("gpus", options.gpus), ("processes", options.processes)):
        if number is not None:
            at_least(1, name, number)
    valid_features(options.features, options.features_sha256)
    results.require_run(options.run)

    from ict_fast.checkpoint import open_checkpoint
    from ict_fast.consistency import load_model
    from ict_fast.evaluation import discard_work, evaluate, table
    from ict_fast.evaluation.reference import training_data
    from ict_fast.training.launch import configure_torch, resolve_processes

    device, count = resolve_processes(options.device, options.gpus, options.processes)
    configure_torch(device, deterministic=False)
    checkpoint = open_checkpoint(options.run)
    group = group_of(options.ema)
    model = load_model(checkpoint.path, weights=group).to(device)
    reference = options.reference or training_data(model)
    out = _default_out(checkpoint, group) if options.out is None else options.out
    results.require_measurement_place(
        out,
        "--out (by default in the run)" if options.out is None else "--out",
        "evaluation.json",
        (options.reference, options.features),
    )

    def warn(now: dict[str, Any]) -> None:
        lost = _lost(_measured_in(out), now)
        if lost:
            text = f"{out} was measured with {', '.join(lost)}, and will be replaced"
            say(f"ict-fast: warning: {errors.visible(text)}; with --out another file it stays")

    with live_line() as progress, results.unfinished(out) as folder:
        result = evaluate(
            model,
            reference,
            steps=steps,
            sigmas=sigmas or None,
            count=options.count,
            seed=options.seed,
            progress=progress,
            features=options.features,
            features_sha256=options.features_sha256,
            allow_other_recipe=options.allow_other_recipe,
            devices=_devices(device, count),
            checked=warn,
            work_folder=folder,
        )
        about = {"checkpoint": Path(checkpoint.path).name, "step": checkpoint.step}
        result = {**about, **record_of(options.ema), **result}
        results.write(out, (json.dumps(result, indent=2, allow_nan=False) + "\n").encode())
        discard_work(folder)
    for warning in result.get("warnings", ()):
        say(f"ict-fast: warning: {warning}")
    print_table(table(result))
    print(f"written: {out}")
    if folder.exists():
        say(f"what another evaluation for this file has done stays in {folder}; its command continues it")
    return errors.EXIT_DONE


def _steps(options: EvaluateOptions) -> tuple[int, ...]:
    """The numbers of steps to measure."""
    if options.steps is None:
        return (len(options.sigmas) + 1,) if options.sigmas else (1, 2)
    try:
        return tuple(int(number) for text in options.steps for number in text.split(",") if number)
    except ValueError:
        raise InputError(errors.bad_value("--steps", " ".join(options.steps), tuple[int, ...])) from None


def _default_out(checkpoint: Checkpoint, group: str) -> Path:
    """evaluation.json is about a run's own average; others, and what is made of a run, have theirs."""
    folder = Path(checkpoint.path)
    if "reconstruction" in checkpoint.state:
        return folder / "evaluation.json"
    return folder.parent / f"evaluation{group.removeprefix('ema')}.json"


def _measured_in(out: Path) -> dict[str, Any]:
    """The measurement that is there; empty if none is."""
    try:
        result = json.loads(out.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return result if isinstance(result, dict) else {}


def _lost(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What a measurement holds that the one that replaces it will not.

    Args:
        before: as it was written; empty if there is none. What it does not say is taken to be the same.
        now: see `checked` of `evaluate`.
    Returns:
        In words, a part each.
    """

    def is_other(name: str) -> bool:
        return name in before and before[name] != now[name]

    def named(what: str, name: Any) -> str:
        return f"{what} ({name})" if name else what

    lost = []
    count, steps, features = (before.get(name) for name in ("count", "steps", "features"))
    if type(count) is int and count > now["count"]:
        lost.append(f"{count:,} samples (now {now['count']:,})")
    missing = [number for number in steps if number not in now["steps"]] if isinstance(steps, list) else []
    if missing:
        lost.append(f"--steps {','.join(map(str, missing))} too")
    if before and (before.get("sigmas") or None) != now["sigmas"]:
        lost.append("other noise levels")
    if isinstance(features, dict) and features.get("sha256") != now["features"]["sha256"]:
        lost.append(named("other features", features.get("name")))
    if is_other("reference_fingerprint"):
        lost.append(named("another reference", before.get("reference_path")))
    if is_other("model_sha256"):
        lost.append(named("other weights", before.get("checkpoint")))
    return lost


def _devices(first: torch.device, count: int) -> list[torch.device]:
    """A device for each process."""
    import torch

    if count == 1 or first.type == "cpu":
        return [first] * count
    return [torch.device("cuda", number) for number in range(count)]
