"""What a run does, in words, as `ict-fast train --dry-run` and the beginning of a run say it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from operator import attrgetter

import torch

from ict_fast import presets
from ict_fast.config import Config, to_dict, unused_fields
from ict_fast.consistency.curriculum import Extension, stages_trained
from ict_fast.networks import build_network

# Of curricula with more stages than this the middle ones are left out. iCT's, extended once, has 16 at most.
_MOST_STAGES = 16
# Share of the initial weights in an average at the end of a run, above which it is worth a warning.
_MOST_INITIAL = 0.01


def describe(config: Config, extensions: Sequence[Extension] = ()) -> str:
    """The resolved configuration, the network's size and the stages; builds no weights."""
    with torch.device("meta"):
        parameters = sum(p.numel() for p in build_network(config.network).parameters())
    training = config.training
    images = training.total_steps * training.batch_size
    return "\n".join(
        [
            json.dumps(to_dict(config), indent=2),
            "",
            f"parameters: {parameters:,} ({config.network.name})",
            f"training: {training.total_steps:,} steps of {training.batch_size:,} images = {images:,} images",
            describe_stages(config, extensions),
        ]
    )


def describe_stages(config: Config, extensions: Sequence[Extension]) -> str:
    """The curriculum as lines, steps and noise levels N: as it was trained, and as it is to go on."""
    plan = stages_trained(config.training.total_steps, config.method, extensions)
    lines = [f"stages: {len(plan)} ({config.method.curriculum})"]
    for number, stage in enumerate(plan):
        if len(plan) > _MOST_STAGES and _MOST_STAGES // 2 <= number < len(plan) - _MOST_STAGES // 2:
            if number == _MOST_STAGES // 2:
                lines.append("  ...")
            continue
        lines.append(
            f"  {number + 1:3d}: steps {stage.first_step:,} to {stage.end_step - 1:,}, N = {stage.num_scales}"
        )
    return "\n".join(lines)


def describe_unused(config: Config) -> str | None:
    """A line on the fields that are not as in the preset and do nothing, if there are any."""
    # A script's configuration may have a preset's name of its own.
    preset = presets.get(config.preset) if config.preset in presets.names() else Config()
    given = [
        f"--{name.replace('_', '-')} (with {why})"
        for name, why in unused_fields(config).items()
        if attrgetter(name)(config) != attrgetter(name)(preset)
    ]
    return f"without effect: {', '.join(given)}" if given else None


def describe_initial_share(config: Config) -> str | None:
    """A line on averages that the run is too short for, if there are any: they keep decay^K of its start."""
    optimizer, total = config.optimizer, config.training.total_steps
    if optimizer.ema_warmup:
        return None
    shares = {decay: decay**total for decay in (optimizer.ema_decay, *optimizer.ema_decays)}
    found = [
        f"{100 * share:.0f} % with a decay of {decay}"
        for decay, share in shares.items()
        if share > _MOST_INITIAL
    ]
    if not found:
        return None
    gap = 1 - _MOST_INITIAL ** (1 / total)
    scale = 10 ** (1 - math.floor(math.log10(gap)))  # two digits, rounded up
    return (
        f"after {total:,} steps the averaged weights are still in part the initial ones:"
        f" {', '.join(found)}; --optimizer.ema-warmup leaves nothing of them, a decay of"
        f" {1 - math.ceil(gap * scale) / scale:.10g} at most {100 * _MOST_INITIAL:.0f} %"
    )
