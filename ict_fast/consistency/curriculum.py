"""How many noise levels there are at step k: the curriculum N(k), and what else follows from it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ict_fast.config import MethodConfig
from ict_fast.errors import InputError


class Stage(NamedTuple):
    """Steps first_step <= k < end_step train with N = num_scales."""

    first_step: int
    end_step: int
    num_scales: int


class Extension(NamedTuple):
    """Until `step` a run's curriculum was one for `total_steps`; then it was extended."""

    step: int
    total_steps: int


def num_scales(step: int, total_steps: int, method: MethodConfig) -> int:
    """Number of noise levels N(k) at training step k; there are N(k) - 1 pairs.

    "doubling" (iCT, section 3.4): from s0 to s1 in equal stages; 11, 21, 41, ..., 1281 for the defaults.
    "square-root" (Song et al. 2023, appendix C): s0, ..., s1 + 1.
    "fixed": s0 + 1.

    Args:
        step: global step k, 0 <= k <= total_steps.
        total_steps: K. Runs too short for every stage keep the first ones.
        method: s0, s1 and the name of the curriculum.
    """
    s0, s1 = method.s0, method.s1
    if method.curriculum == "doubling":
        stage_length = max(1, math.floor(total_steps / (math.log2(s1 // s0) + 1)))
        return min(s0 * 2 ** (step // stage_length), s1) + 1
    if method.curriculum == "square-root":
        # ceil(sqrt(v) - 1) + 1 = ceil(sqrt(v)) for v = k/K ((s1+1)^2 - s0^2) + s0^2, in exact integers.
        ceiling = -(-(step * ((s1 + 1) ** 2 - s0**2) + total_steps * s0**2) // total_steps)
        return math.isqrt(ceiling - 1) + 1
    return s0 + 1


def stages(total_steps: int, method: MethodConfig) -> list[Stage]:
    """The plan of a run: its stages in order, covering steps 0 to total_steps - 1."""
    plan: list[Stage] = []
    first = 0
    while first < total_steps:
        scales = num_scales(first, total_steps, method)
        # N(k) never falls, so the end of the stage can be found by bisection.
        low, high = first, total_steps
        while high - low > 1:
            middle = (low + high) // 2
            if num_scales(middle, total_steps, method) == scales:
                low = middle
            else:
                high = middle
        plan.append(Stage(first, high, scales))
        first = high
    return plan


def stages_trained(total_steps: int, method: MethodConfig, extensions: Sequence[Extension]) -> list[Stage]:
    """The stages of a run that was extended: up to each extension those of the plan until then."""
    trained: list[Stage] = []
    for end, total in (*extensions, Extension(total_steps, total_steps)):
        begun = trained[-1].end_step if trained else 0
        for first, last, scales in stages(total, method):
            first, last = max(first, begun), min(last, end)
            if first < last and trained and trained[-1].num_scales == scales:
                trained[-1] = trained[-1]._replace(end_step=last)
            elif first < last:
                trained.append(Stage(first, last, scales))
    return trained


def read_extensions(state: Mapping[str, Any], file: Path, total_steps: int) -> list[Extension]:
    """The extensions of a run, in their order: those that a checkpoint records, and the one at it, if any.

    Args:
        state: of the checkpoint.
        file: where it stands, for messages.
        total_steps: of the run now.
    Raises:
        InputError: if they are altered.
    """
    try:
        extensions = [Extension(*entry) for entry in state.get("extended", [])]
        before = state.get("config", {}).get("training", {}).get("total_steps", total_steps)
        if before != total_steps:
            extensions.append(Extension(state["step"], before))
        if any(type(n) is not int for entry in extensions for n in entry):
            raise ValueError
        steps = [0, *(extension.step for extension in extensions)]
        if any(not 0 < step <= total for step, total in extensions) or steps != sorted(steps):
            raise ValueError
    except (AttributeError, KeyError, TypeError, ValueError):
        raise InputError(f"{file}: its record of --extend is altered") from None
    return extensions


def teacher_ema_decay(scales: int, method: MethodConfig) -> float:
    """Decay of the EMA teacher, mu(k) = exp(s0 ln mu0 / N(k)) (Song et al. 2023, appendix C).

    Args:
        scales: N(k).
        method: s0, mu0, and whether to divide by the N(k) grid points or, as published code does, by the
            N(k) - 1 pairs.
    """
    divisor = scales if method.teacher_ema_divisor == "points" else scales - 1
    return math.exp(method.s0 * math.log(method.teacher_ema) / divisor)
