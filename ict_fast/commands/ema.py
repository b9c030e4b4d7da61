"""`ict-fast ema`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from ict_fast import errors, results
from ict_fast.errors import InputError
from ict_fast.screen import live_line, say


@dataclass(frozen=True)
class EmaOptions:
    """Make an average of any length from a run's snapshots (post-hoc EMA). sample and evaluate take it."""

    run: Positional[Annotated[Path, arg(metavar="RUN")]]
    """Folder of a run that was trained with --optimizer.power-ema."""
    sigma_rel: Annotated[float | None, arg(metavar="WIDTH", help_behavior_hint="")] = None
    """The average of a power function: its standard deviation as a share of the training, such as 0.15."""
    decay: Annotated[float | None, arg(metavar="DECAY", help_behavior_hint="")] = None
    """Or the exponential average of this decay per step, such as 0.9999."""
    out: Annotated[
        Path | None, arg(metavar="DIR", help_behavior_hint="(default: <run>/ema/sigma-rel-<WIDTH>)")
    ] = None
    """Folder to write."""


def run(options: EmaOptions) -> int:
    """Runs the command; returns its exit code."""
    if (options.sigma_rel is None) == (options.decay is None):
        raise InputError("ict-fast ema makes one average: give --sigma-rel or --decay, and not both")
    results.require_run(options.run)
    asked = f"sigma-rel-{options.sigma_rel}" if options.decay is None else f"decay-{options.decay}"
    out = options.out if options.out is not None else options.run / "ema" / asked
    results.require_weights_place(out, "--out")
    if out.is_dir() and any(out.iterdir()) and not _is_reconstruction(out):
        raise InputError(f"--out is {out}, which holds something else; name a folder that is not there yet")

    from ict_fast.training.reconstruction import reconstruct

    with live_line() as progress:
        made = reconstruct(
            options.run,
            out,
            sigma_rel=options.sigma_rel,
            decay=options.decay,
            warn=lambda text: say(f"ict-fast: warning: {text}"),
            progress=progress,
        )
    print(
        f"step {made.step:,}: {asked} from {made.snapshots} averages, its profile met to"
        f" {made.profile_error:.2%}, largest coefficient {made.largest_coefficient:.2g}: {out}"
    )
    if made.profile_error > _POOR:
        say(
            f"ict-fast: warning: a profile met to {made.profile_error:.1%} is not the one that was asked for:"
            " the snapshots are too few, or too far apart, for an average this short, or it is too long"
        )
    if made.largest_coefficient > _LARGE:
        say(
            f"ict-fast: warning: a coefficient of {made.largest_coefficient:.2g} magnifies the rounding of"
            " the snapshots, which are fp32, as much: they are too far apart for this average"
        )
    return errors.EXIT_DONE


_POOR = 0.02
_LARGE = 100  # 2^-24 times that is 6e-6 of a weight; averages differ from the weights by some 1e-3


def _is_reconstruction(folder: Path) -> bool:
    """Whether an earlier `ict-fast ema` has written this folder."""
    try:
        return '"reconstruction"' in (folder / "state.json").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
