"""`ict-fast plan`."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from ict_fast import errors, presets, results
from ict_fast.commands.arguments import at_least
from ict_fast.commands.train import stored_config
from ict_fast.config import Config, validate
from ict_fast.errors import InputError
from ict_fast.screen import print_table, say

_DEFAULT_PRESET, _DEFAULT_GPU = "imagenet64", "h100"
# Of the checkout, where there is one.
_RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


@dataclass(frozen=True)
class PlanOptions:
    """Say what a run will take: memory, communication, days. Nothing is trained, no GPU is needed."""

    preset: Annotated[
        str | None,
        arg(metavar=f"{{{','.join(presets.names())}}}", help_behavior_hint=f"(default: {_DEFAULT_PRESET})"),
    ] = None
    """The run."""
    run: Annotated[Path | None, arg(metavar="RUN", help_behavior_hint="")] = None
    """Or one that has been begun: its own network, method, batch and steps, but not its micro-batch."""
    gpu: Annotated[
        str | None, arg(metavar="{a100,h100,h200}", help_behavior_hint=f"(default: {_DEFAULT_GPU})")
    ] = None
    """The kind of GPU."""
    gpu_memory: Annotated[float | None, arg(metavar="GB", help_behavior_hint="")] = None
    """Or another one, by its memory."""
    peak: Annotated[float | None, arg(metavar="TFLOP/S", help_behavior_hint="")] = None
    """And by its rate of dense products in the precision of the plan."""
    gpus: Annotated[int, arg(metavar="N")] = 8
    """How many of them, 1 to 512."""
    batch_size: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: the preset's)")] = None
    """Images per step over all GPUs."""
    micro_batch: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: what fits)")] = None
    """Images at a time on each GPU."""
    total_steps: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: the preset's)")] = None
    """Steps of the run."""
    precision: Annotated[
        Literal["auto", "fp32", "tf32", "bf16", "fp16"] | None,
        arg(metavar="{auto,fp32,tf32,bf16,fp16}", help_behavior_hint="(default: the preset's)"),
    ] = None
    """Arithmetic of the trunk; auto is a half precision."""
    mfu: Annotated[float | None, arg(metavar="SHARE", help_behavior_hint="(default: measured, else 0.4)")] = (
        None
    )
    """Share of the GPU's peak rate that a step reaches."""
    results: Annotated[
        Path | None, arg(metavar="DIR", help_behavior_hint="(default: benchmarks/results)")
    ] = None
    """Where measured rates are looked for."""
    json: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """Write the plan there too, as JSON."""


def run(options: PlanOptions) -> int:
    """Runs the command; returns its exit code."""
    config = _config(options)
    for name in ("gpus", "batch_size", "micro_batch", "total_steps"):
        if (number := getattr(options, name)) is not None:
            at_least(1, name.replace("_", "-"), number)
    training = dataclasses.replace(
        config.training,
        batch_size=options.batch_size or config.training.batch_size,
        micro_batch=0,
        total_steps=options.total_steps or config.training.total_steps,
        precision=options.precision or config.training.precision,
    )
    config = dataclasses.replace(config, training=training)
    try:
        validate(config)
    except InputError as error:  # these options have the same names here, without the section
        raise InputError(str(error).replace("training.", "")) from None
    if options.micro_batch is not None:  # of a GPU's share, not of the batch: `make_plan` checks that
        training = dataclasses.replace(training, micro_batch=options.micro_batch)
        config = dataclasses.replace(config, training=training)
    _require_one_gpu(options)
    if options.json is not None:
        results.require_measurement_place(options.json, "--json", "plan.json", ())
    if options.results is not None and not options.results.is_dir():
        raise InputError(f"--results is {options.results}, which is no folder")

    from ict_fast.planning import gpus, make_plan, tables
    from ict_fast.planning.tables import rate_in_words, to_dict
    from ict_fast.training.describe import describe_initial_share

    folder = _RESULTS if options.results is None else options.results
    kind: str | gpus.Gpu = options.gpu or _DEFAULT_GPU
    if options.gpu_memory is not None and options.peak is not None:
        kind = gpus.described(options.gpu_memory, options.peak, training.precision)
    plan = make_plan(config, kind, options.gpus, mfu=options.mfu, results=folder)
    for table in tables(plan):
        print_table(table)
    if plan.gpu.assumed:
        print(f"Assumed of this GPU: {plan.gpu.assumed}.")
    print(f"The rate is {rate_in_words(plan)}.")
    initial_share = describe_initial_share(config)
    for warning in (*plan.warnings, *([] if initial_share is None else [initial_share])):
        say(f"ict-fast: warning: {warning}")
    if options.json is not None:
        results.write(options.json, (json.dumps(to_dict(plan), indent=2) + "\n").encode(), "--json")
        print(f"written: {options.json}")
    return errors.EXIT_DONE


def _config(options: PlanOptions) -> Config:
    """The preset's, or the run's."""
    if options.run is None:
        return presets.get(options.preset or _DEFAULT_PRESET)
    if options.preset is not None:
        raise InputError(f"--preset is {options.preset} and --run is {options.run}; give one of them")
    results.require_run(options.run)
    config = stored_config(options.run)
    if config is None:
        raise InputError(f"--run {options.run}: there is no run, or it cannot be read")
    return config


def _require_one_gpu(options: PlanOptions) -> None:
    """Raises InputError unless a GPU is named, or described in full."""
    if (options.gpu_memory is None) != (options.peak is None):
        given, lacking = ("--gpu-memory", "--peak") if options.peak is None else ("--peak", "--gpu-memory")
        raise InputError(f"{given} describes a GPU together with {lacking}; give both, or --gpu")
    if options.peak is None:
        return
    for option, value in (("--gpu", options.gpu), ("--results", options.results)):
        if value is not None:
            raise InputError(
                f"{option} is {value}, but --gpu-memory and --peak describe another GPU; give one of the two"
            )
