"""Consistency training where the answer is known: `python benchmarks/exactness.py`.

A Gaussian, a mixture of Gaussians, two points, a ring: their consistency functions are known exactly, and so
is what consistency training at N noise levels converges to (`closed_forms/fixed_point.py`). Measured, in
units of the data's standard deviation and over x + sigma z as it is distributed:

* fixed points: distance of the limit at N levels from the exact function, for the squared L2 norm and for
  Pseudo-Huber; float64 quadrature, nothing is trained;
* learned: distance of a small network, trained by the project's own objective and optimizer, from both;
* targets: bias and standard deviation of the target f(x + s_i z, s_i), f exact, given x + s_{i+1} z;
* dimensions: where the Pseudo-Huber centre of the target lies, for images of d independent values.

Written: exactness.json, and exactness.png from it alone. A quarter of an hour on one core, `--quick` a
minute. What exactness.json has already, of the same versions, is not measured again.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import torch
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

from closed_forms import (  # noqa: E402
    PROBLEMS,
    FixedPoint,
    Problem,
    fixed_point,
    fixed_points,
    gaussian_fixed_point,
    gaussian_leading_constant,
    target_statistics,
)
from closed_forms.dimensions import pseudo_huber_offset  # noqa: E402
from closed_forms.learned import SmallNetwork, Training, learn, learned_function  # noqa: E402
from closed_forms.picture import plot  # noqa: E402
from closed_forms.words import section  # noqa: E402
from small_png import record_source  # noqa: E402

from ict_fast.config import MethodConfig  # noqa: E402
from ict_fast.durable import replace_durably  # noqa: E402
from ict_fast.screen import say  # noqa: E402
from ict_fast.training.monitor import duration  # noqa: E402
from ict_fast.version import __version__  # noqa: E402
from ict_kernels import noise_level_grid  # noqa: E402
from ict_kernels.consistency_loss import default_huber_c  # noqa: E402

__all__ = ["main", "plot", "section"]

Array = NDArray[np.float64]

SCALES = (11, 21, 41, 81, 161, 321, 641, 1281)
HUBER_SCALES = SCALES[:5]  # its quadrature needs eight times the nodes, and a bisection at each
LEVELS = tuple(float(sigma) for sigma in np.geomspace(0.02, 80, 13))
SHOWN = (0.1, 0.5, 2.0, 80.0)  # levels at which the functions are drawn
METRICS = ("l2", "pseudo-huber")
LAST_SCALES = 161  # of the trainings
FIXED_SCALES = (11, 41, LAST_SCALES)  # of trainings without a curriculum, the last with every seed
TARGET_LEVELS = (0.05, 0.2, 0.8, 3.0, 12.0)
DIMENSIONS = (1, 4, 16, 64, 256)
QUICK_STEPS = 300
SEEDS = (0, 1, 2)
GROUPS = ("fixed_points", "targets", "dimensions", "learned")  # the lists of records in a report
# Equal shares of probability, by which positions are averaged: of a trained network; and of a fixed point,
# whose error can lie in a thousandth of them.
SHARES = (np.arange(500) + 0.5) / 500
FINE_SHARES = (np.arange(5000) + 0.5) / 5000


def distances(difference: Array, problem: Problem) -> dict[str, float]:
    """Root mean square and mean length of (..., values) differences, in the data's standard deviations."""
    length = np.sqrt((difference**2).sum(axis=-1)) / problem.std
    return {"rms": float(np.sqrt((length**2).mean())), "mean": float(length.mean())}


@cache
def limits(name: str, metric: str, num_scales: int) -> tuple[FixedPoint, ...]:
    """The fixed point at the grid's levels nearest LEVELS and SHOWN, each once, ascending."""
    problem = PROBLEMS[name]
    huber_c = default_huber_c(problem.values) if metric == "pseudo-huber" else None
    found = fixed_points(problem, num_scales, sorted({*LEVELS, *SHOWN}), huber_c=huber_c)
    return tuple({point.sigma: point for point in found}.values())


def fixed_point_errors(name: str, metric: str, num_scales: int) -> list[dict[str, Any]]:
    """Distances of the fixed point from the exact function, by level."""
    problem = PROBLEMS[name]
    exact = problem.quantile(FINE_SHARES, MethodConfig().sigma_min)
    return [
        {
            "sigma": point.sigma,
            **distances((point(problem.quantile(FINE_SHARES, point.sigma)) - exact)[:, None], problem),
        }
        for point in limits(name, metric, num_scales)
    ]


def clustered_shares(jump: float | None, count: int) -> tuple[Array, Array]:
    """Shares of probability, dense where the exact function jumps, and weights that sum to 1."""
    if jump is None:
        return (np.arange(count) + 0.5) / count, np.full(count, 1 / count)
    # The share is a cube's distance away from the jump; 0 <= jump < 1.
    low, high = -np.cbrt(jump), np.cbrt(1 - jump)
    root = low + (high - low) * (np.arange(count) + 0.5) / count
    return jump + root**3, root**2 / (root**2).sum()


def target_figures(name: str, num_scales: int) -> list[dict[str, Any]]:
    """Bias and standard deviation of the target, over positions, at a few levels."""
    problem, grid = PROBLEMS[name], noise_level_grid(num_scales).numpy()
    share, weight = clustered_shares(problem.jump, 100)
    levels = []
    for near in TARGET_LEVELS:
        upper = max(1, int(np.abs(np.log(grid / near)).argmin()))
        y = problem.quantile(share, grid[upper])
        bias, variance = target_statistics(problem, y, grid[upper], grid[upper - 1], float(grid[0]))
        rms = {"bias": float(np.sqrt(weight @ bias**2)), "std": float(np.sqrt(weight @ variance))}
        levels.append(
            {
                "near": near,
                "sigma": float(grid[upper]),
                **{figure: value / problem.std for figure, value in rms.items()},
            }
        )
    return levels


def methods(last: int, fixed: Sequence[int]) -> Iterator[MethodConfig]:
    """iCT's curriculum with either metric, and fixed N with the squared norm."""
    for metric in METRICS:
        yield MethodConfig(metric=metric, s1=last - 1)
    for count in fixed:
        yield MethodConfig(metric="l2", curriculum="fixed", s0=count - 1, s1=count - 1)


def learned_errors(
    network: SmallNetwork, name: str, method: MethodConfig
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Distances by level, and the functions to draw."""
    problem = PROBLEMS[name]
    exact = problem.quantile(SHARES, method.sigma_min)
    levels, curves = [], []
    for point in limits(name, method.metric, method.s1 + 1):
        y = problem.quantile(SHARES, point.sigma)
        learned = learned_function(network, problem, y, point.sigma)
        references = {"exact": exact, "fixed_point": point(y), "denoiser": problem.denoiser(y, point.sigma)}
        away = {
            f"to_{which}": distances(_less(learned, reference), problem)["rms"]
            for which, reference in references.items()
        }
        levels.append({"sigma": point.sigma, **away})
        if any(abs(np.log(point.sigma / sigma)) < 0.15 for sigma in SHOWN):
            drawn = learned[::8, :, 0].mean(axis=1)
            curves.append({"sigma": point.sigma, "learned": np.round(drawn, 5).tolist()})
    return levels, curves


def records(quick: bool, seeds: Sequence[int]) -> Iterator[tuple[str, dict[str, Any], Callable[[], Any]]]:
    """What there is to measure: the list it belongs to, its key, and how to get the rest of it."""
    scales = SCALES[:3] if quick else SCALES
    last, fixed = (21, ()) if quick else (LAST_SCALES, FIXED_SCALES)
    for name in PROBLEMS:
        for metric in METRICS:
            for count in scales if metric == "l2" else HUBER_SCALES[: len(scales)]:
                key = {"problem": name, "metric": metric, "num_scales": count}
                yield "fixed_points", key, partial(_levels, fixed_point_errors, *key.values())
        for count in scales:
            yield (
                "targets",
                {"problem": name, "num_scales": count},
                partial(_levels, target_figures, name, count),
            )
    for values in DIMENSIONS:
        key = {"values": values, "num_scales": LAST_SCALES}
        yield "dimensions", key, partial(pseudo_huber_offset, PROBLEMS["mixture"], *key.values(), seed=0)
    for seed in seeds:
        for name in PROBLEMS:
            for method in methods(last, fixed if seed == seeds[0] else fixed[-1:]):
                key = {
                    "problem": name,
                    "metric": method.metric,
                    "curriculum": method.curriculum,
                    "num_scales": method.s1 + 1,
                    "seed": seed,
                }
                yield "learned", key, partial(_learned, name, method, _training(quick), seed)


def measure(report: dict[str, Any], quick: bool, seeds: Sequence[int], save: Callable[[], None]) -> None:
    """Adds to a report what it does not have yet, and saves it after every record."""
    wanted = list(records(quick, seeds))
    missing = [
        (group, key, work)
        for group, key, work in wanted
        if not any(key.items() <= there.items() for there in report[group])
    ]
    for measured, (group, key, work) in enumerate(missing, start=1):
        started = time.monotonic()
        report[group].append({**key, **work()})
        report["date"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        save()
        what = f"{measured}/{len(missing)} {group}: {', '.join(map(str, key.values()))}"
        if group == "learned":  # the last and longest part, all alike
            what += f"; about {duration((time.monotonic() - started) * (len(missing) - measured))} left"
        say(what)
    # In the order of the work, whenever it was done; seeds that were not asked for are dropped.
    for group in GROUPS:
        keys = [key for other, key, _ in wanted if other == group]
        report[group] = [
            next(there for there in report[group] if key.items() <= there.items()) for key in keys
        ]
    report |= {"command": command(quick, seeds), "seeds": list(seeds)}
    save()


def command(quick: bool, seeds: Sequence[int]) -> str:
    """What to type for such a report."""
    words = ["python benchmarks/exactness.py"]
    if quick:
        words.append("--quick")
    if tuple(seeds) != SEEDS:
        words += ["--seeds", *map(str, seeds)]
    return " ".join(words)


def head(quick: bool) -> dict[str, Any]:
    """What identifies a report; one that begins alike is continued."""
    method, scales = MethodConfig(), SCALES[:3] if quick else SCALES
    std = PROBLEMS["gaussian"].std
    return {
        "versions": {
            "ict-fast": __version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "scipy": scipy.__version__,
            "python": platform.python_version(),
        },
        "training": asdict(_training(quick)),
        "table": {"positions": fixed_point.POSITIONS, "step": fixed_point.STEP},
        "problems": {name: {**asdict(p), "std": p.std} for name, p in PROBLEMS.items()},
        "shares": SHARES[::8].tolist(),
        "exact": {
            name: np.round(p.quantile(SHARES[::8], method.sigma_min), 5).tolist()
            for name, p in PROBLEMS.items()
        },
        "gaussian": {
            "closed_form": [gaussian_fixed_point(count, std) for count in scales],
            "leading_constant": gaussian_leading_constant(
                std, sigma_min=method.sigma_min, sigma_max=method.sigma_max, rho=method.rho
            ),
        },
    }


def _training(quick: bool) -> Training:
    return Training(steps=QUICK_STEPS) if quick else Training()


def _levels(work: Callable[..., list[dict[str, Any]]], *arguments: Any) -> dict[str, Any]:
    return {"levels": work(*arguments)}


def _learned(name: str, method: MethodConfig, training: Training, seed: int) -> dict[str, Any]:
    network = learn(PROBLEMS[name], method, training, seed)
    levels, curves = learned_errors(network, name, method)
    return {"levels": levels, "curves": curves}


def _less(learned: Array, reference: Array) -> Array:
    """(M, directions, values) learned minus (M,) along the first value."""
    difference = learned.copy()
    difference[:, :, 0] -= reference[:, None]
    return difference


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="of the trainings")
    parser.add_argument("--quick", action="store_true", help="a rehearsal: few N, short trainings")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / ("exactness-quick.json" if options.quick else "exactness.json")
    report: dict[str, Any] = {
        "command": command(options.quick, options.seeds),
        "date": "",
        **head(options.quick),
        "seeds": [],
        **{group: [] for group in GROUPS},
    }
    if path.exists():
        there = json.loads(path.read_text())
        if all(
            there.get(name) == value for name, value in json.loads(json.dumps(head(options.quick))).items()
        ):
            report = there
    measure(
        report,
        options.quick,
        options.seeds,
        lambda: replace_durably(path, (json.dumps(report, indent=1) + "\n").encode()),
    )
    plot(report, path.with_suffix(".png"))
    record_source(path.with_suffix(".png"), path)
    print(section(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
