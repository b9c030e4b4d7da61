"""What a run would do, in words: the text of `ict-fast train --dry-run`."""

from __future__ import annotations

import json

import torch

from ict_fast.config import Config, to_dict
from ict_fast.consistency.curriculum import stages
from ict_fast.networks import build_network

# Curricula with more stages than this are shown by their first and last ones.
_MOST_STAGES = 12


def describe(config: Config) -> str:
    """The resolved configuration, the network's size and the plan of stages; builds no weights."""
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
            describe_stages(config),
        ]
    )


def describe_stages(config: Config) -> str:
    """The curriculum as lines: steps, noise levels N."""
    plan = stages(config.training.total_steps, config.method)
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
