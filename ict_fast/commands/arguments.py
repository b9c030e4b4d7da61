"""Options that several commands share, and their checks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from ict_fast.config import MOST_IMAGES, MOST_STEPS
from ict_fast.errors import InputError

Device = Literal["auto", "cuda", "cpu"]
Run = Annotated[Path, arg(metavar="RUN|CHECKPOINT")]
Ema = Annotated[
    str | None, arg(metavar="NAME", help_behavior_hint="(default: the run's --optimizer.ema-decay)")
]
Sigmas = Annotated[
    tuple[float, ...] | None, arg(metavar="SIGMA ...", help_behavior_hint="(default: the method's)")
]


def group_of(ema: str | None) -> str:
    """The group of tensors in a checkpoint that --ema means."""
    return "ema" if ema is None else f"ema-{ema.removeprefix('ema-')}"


def record_of(ema: str | None) -> dict[str, str]:
    """What a result says of --ema: nothing of a run's own average."""
    return {} if ema is None else {"ema": group_of(ema).removeprefix("ema-")}


def at_least(least: int, name: str, value: int) -> None:
    """Raises InputError unless the option `name` is `least` or more."""
    if value < least:
        raise InputError(f"--{name} is {value}; it must be at least {least}")


def valid_steps(least: int, values: Sequence[int]) -> None:
    """Raises InputError unless --steps are numbers of network evaluations that a sample can be made with."""
    at_least(least, "steps", min(values, default=0))
    if max(values) > MOST_STEPS:
        raise InputError(f"--steps is {max(values)}; it must be at most {MOST_STEPS:,}")


def valid_sigmas(values: Sequence[float], steps: Sequence[int]) -> None:
    """Raises InputError unless --sigmas, if any are given, are levels of the one number of steps in --steps.

    What they must lie between is known to the model.
    """
    if values and len(steps) > 1:
        shown = ",".join(map(str, steps))
        raise InputError(f"--steps is {shown}; with --sigmas it must be one number, here {len(values) + 1}")
    if values and len(values) != steps[0] - 1:
        raise InputError(f"--sigmas has {len(values)} values; --steps {steps[0]} needs {steps[0] - 1}")
    if any(not later < earlier for earlier, later in itertools.pairwise((float("inf"), *values, 0.0))):
        raise InputError(f"--sigmas is {' '.join(map(str, values))}; it must be descending and positive")


def valid_count(least: int, value: int) -> None:
    """Raises InputError unless --count is a number of images that files can number."""
    at_least(least, "count", value)
    if value > MOST_IMAGES:
        raise InputError(f"--count is {value}; it must be at most {MOST_IMAGES:,}")


def valid_seed(value: int) -> None:
    """Raises InputError unless --seed is a seed that every generator here takes."""
    if not 0 <= value < 2**63:
        raise InputError(f"--seed is {value}; it must be 0 or more and below 2^63")


def valid_labels(values: Sequence[int]) -> None:
    """Raises InputError unless a tensor can hold --labels; the model knows which of them are its classes."""
    for value in values:
        if not -(2**63) <= value < 2**63:
            raise InputError(f"--labels has {value}, which is no class; classes are counted from 0")


def valid_features(features: Path | None, sha256: str | None) -> None:
    """Raises InputError if --features-sha256 is given without the --features that it is of."""
    if sha256 is not None and features is None:
        raise InputError("--features-sha256 is the SHA-256 of --features, which is not given")
