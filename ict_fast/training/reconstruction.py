"""An average of any length from a run's snapshots, made afterwards (Karras et al. 2024, section 3.2)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ict_fast.checkpoint import Checkpoint, open_checkpoint, step_folders, write_whole
from ict_fast.config import WIDTHS, Config, from_dict, valid_width
from ict_fast.consistency.averaging import Cumulative, combine, exponential_profile, power_profile
from ict_fast.errors import InputError
from ict_fast.training.averages import ema_decay, power_name
from ict_fast.training.run_directory import SNAPSHOTS

# Of a snapshot's state: what the average comes from, too.
_ORIGIN = ("config", "data_fingerprint", "init", "extended")


@dataclass(frozen=True)
class Reconstruction:
    """What was made.

    Attributes:
        run: the name of the run's folder.
        step: the run's step that the average belongs to, the newest snapshot's.
        sigma_rel, decay: what was asked for; the other one is None.
        snapshots: how many averages it is a combination of.
        profile_error: distance of its profile from the one that was asked for, relative to that one's length.
        largest_coefficient: by how much an error of a snapshot may count.
    """

    run: str
    step: int
    sigma_rel: float | None
    decay: float | None
    snapshots: int
    profile_error: float
    largest_coefficient: float


def reconstruct(
    run: Path,
    out: Path,
    *,
    sigma_rel: float | None = None,
    decay: float | None = None,
    warn: Callable[[str], None],
    progress: Callable[[float, str], None],
) -> Reconstruction:
    """Writes an average as a folder that `load_model` takes like a checkpoint (its ema.safetensors).

    Args:
        run: a run with snapshots of power-function averages.
        out: the folder to write; an older one is replaced.
        sigma_rel: relative width of the power-function average to make, or None for:
        decay: the exponential average to make, with the run's warm-up if it has one.
        warn: told of every snapshot that is not whole and passed over.
        progress: called with the fraction done and what is being done.
    Raises:
        InputError: if the run has no snapshots, or the average cannot be.
        OSError: if it cannot be written.
    """
    if sigma_rel is not None and not valid_width(sigma_rel):
        raise InputError(f"--sigma-rel is {sigma_rel}; it must be one of the {WIDTHS}")
    if decay is not None and not 0 <= decay < 1:
        raise InputError(f"--decay is {decay}; it must be in [0, 1)")
    snapshots = _snapshots(run, warn)
    if not snapshots:
        raise InputError(
            f"{run} has no {SNAPSHOTS}; a run that starts with --optimizer.power-ema 0.05 0.1 keeps them"
        )
    newest = snapshots[-1]
    config = from_dict(newest.state["config"], str(newest.path / "state.json"))
    updates = int(newest.state["updates"])
    parts = [
        (snapshot, width, power_profile(width, int(snapshot.state["updates"])))
        for snapshot in snapshots
        for width in config.optimizer.power_ema
        if snapshot.state["updates"] > 0
    ]
    target = _profile(config, updates, sigma_rel, decay)
    combination = combine([profile for _, _, profile in parts], target, updates)
    average = _combined(parts, combination.coefficients, progress)
    made = Reconstruction(
        run=run.resolve().name,
        step=newest.step,
        sigma_rel=sigma_rel,
        decay=decay,
        snapshots=len(parts),
        profile_error=combination.error,
        largest_coefficient=float(np.abs(combination.coefficients).max()),
    )
    origin = {name: newest.state[name] for name in _ORIGIN if name in newest.state}
    write_whole(out, newest.step, {"ema": average}, {**origin, "reconstruction": asdict(made)})
    return made


def _snapshots(run: Path, warn: Callable[[str], None]) -> list[Checkpoint]:
    """The whole ones, oldest first."""
    whole = []
    for _, path in sorted(step_folders(run / SNAPSHOTS).items()):
        try:
            whole.append(open_checkpoint(path))
        except InputError as error:
            warn(f"{error}; passing over this snapshot")
    return whole


def _profile(config: Config, updates: int, sigma_rel: float | None, decay: float | None) -> Cumulative:
    if sigma_rel is not None:
        return power_profile(sigma_rel, updates)
    assert decay is not None
    warmup = config.optimizer.ema_warmup
    return exponential_profile(np.array([ema_decay(decay, k, warmup=warmup) for k in range(updates)]))


def _combined(
    parts: list[tuple[Checkpoint, float, Cumulative]],
    coefficients: np.ndarray,
    progress: Callable[[float, str], None],
) -> dict[str, Tensor]:
    """The sum of the averages times their coefficients, taken in float64 and rounded once."""
    total: dict[str, Tensor] = {}
    last: dict[str, Tensor] = {}
    for number, ((snapshot, width, _), coefficient) in enumerate(zip(parts, coefficients, strict=True)):
        progress(number / len(parts), f"averaging {len(parts)} snapshots")
        last = snapshot.tensors(f"ema-{power_name(width)}")
        for name, tensor in last.items():
            if name not in total:
                total[name] = torch.zeros_like(tensor, dtype=torch.float64)
            total[name].add_(tensor, alpha=float(coefficient))
    return {
        name: total[name].to(tensor.dtype) if tensor.is_floating_point() else tensor
        for name, tensor in last.items()
    }
