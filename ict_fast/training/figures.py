"""The figures of a log line that come from the training itself: here alone the loop waits for the device."""

from __future__ import annotations

from typing import Any

from ict_fast.consistency.curriculum import num_scales
from ict_fast.training.loss_by_sigma import bucket_means
from ict_fast.training.saving import trunk_name
from ict_fast.training.step import TrainStep, learning_rate

_PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "tf32": "tf32"}


def figures(train_step: TrainStep, step: int) -> dict[str, Any]:
    """What the steps since `TrainStep.reset_losses` have to say, as JSON values.

    Args:
        train_step: after its last step, in all processes at once.
        step: steps done.
    Returns:
        loss (mean of the finite ones, or None), num_scales and learning_rate (of the last step), precision
        (of the trunk), skipped (steps, in the whole run), gradient_norm (of the last step, None if it is not
        finite), loss_by_sigma (see `bucket_means`), loss_scale (with an fp16 trunk).
    """
    train_step.losses.gather()
    config, count = train_step.config, int(train_step.losses.count)
    gradient_norm = float(train_step.optimizer.grad_norm)
    values = {
        "loss": float(train_step.losses.sum) / count if count else None,
        "num_scales": num_scales(step - 1, config.training.total_steps, config.method),
        "learning_rate": learning_rate(step - 1, config),
        "precision": _PRECISIONS[trunk_name(train_step)],
        "skipped": int(train_step.optimizer.skipped),
        "gradient_norm": gradient_norm if gradient_norm < float("inf") else None,
        "loss_by_sigma": bucket_means(train_step.losses.by_sigma),
    }
    if train_step.loss_scale is not None:
        values["loss_scale"] = float(train_step.loss_scale.value)
    return values
