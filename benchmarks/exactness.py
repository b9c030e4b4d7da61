"""Consistency training where the answer is known: `python benchmarks/exactness.py`.

A Gaussian, a mixture of Gaussians, two points, a ring: their consistency functions are known exactly, and so
is what consistency training at N noise levels converges to (`closed_forms/fixed_point.py`). Measured, in
units of the data's standard deviation and over x + sigma z as it is distributed:

* fixed points: distance of the limit at N levels from the exact function, for the squared L2 norm and for
  Pseudo-Huber; float64 quadrature, nothing is trained;
* learned: distance of a small network, trained by the project's own objective and optimizer, from both;
* targets: bias and standard deviation of the target f(x + s_i z, s_i), f exact, given x + s_{i+1} z;
* dimensions: where the Pseudo-Huber centre of the target lies, for images of d independent values.

Written: exactness.json, and exactness.png from it alone. Half an hour on one core, `--quick` a minute.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import cache
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
    fixed_points,
    gaussian_fixed_point,
    gaussian_leading_constant,
    target_statistics,
)
from closed_forms.dimensions import pseudo_huber_offset  # noqa: E402
from closed_forms.learned import SmallNetwork, Training, learn, learned_function  # noqa: E402
from closed_forms.picture import plot  # noqa: E402
from closed_forms.words import section  # noqa: E402

from ict_fast.config import MethodConfig  # noqa: E402
from ict_fast.screen import say  # noqa: E402
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
FIXED_SCALES = (11, 41, 161)  # of trainings without a curriculum
GAUSSIAN_STD = PROBLEMS["gaussian"].std
DIMENSIONS = (1, 4, 16, 64, 256)
# Equal shares of probability, by which positions are averaged.
SHARES = (np.arange(500) + 0.5) / 500


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


def fixed_point_errors(scales: Sequence[int], sigma_min: float) -> Iterator[dict[str, Any]]:
    """One record for each problem, metric and N."""
    for name, problem in PROBLEMS.items():
        exact = problem.quantile(SHARES, sigma_min)
        for metric in METRICS:
            for count in scales:
                if metric == "pseudo-huber" and count not in HUBER_SCALES:
                    continue
                levels = [
                    {
                        "sigma": point.sigma,
                        **distances((point(problem.quantile(SHARES, point.sigma)) - exact)[:, None], problem),
                    }
                    for point in limits(name, metric, count)
                ]
                say(f"fixed point: {name}, {metric}, N = {count}: {levels[-1]['rms']:.4f} at sigma_max")
                yield {"problem": name, "metric": metric, "num_scales": count, "levels": levels}


def target_figures(scales: Sequence[int], sigma_min: float) -> Iterator[dict[str, Any]]:
    """Bias and standard deviation of the target over positions, for each problem, N and a few levels."""
    for name, problem in PROBLEMS.items():
        for count in scales:
            grid = noise_level_grid(count).numpy()
            levels = []
            for sigma in (0.05, 0.2, 0.8, 3.0, 12.0):
                upper = max(1, int(np.abs(np.log(grid / sigma)).argmin()))
                y = problem.quantile(SHARES[::5], grid[upper])
                bias, variance = target_statistics(problem, y, grid[upper], grid[upper - 1], sigma_min)
                levels.append(
                    {
                        "near": sigma,
                        "sigma": float(grid[upper]),
                        "bias": float(np.sqrt((bias**2).mean())) / problem.std,
                        "std": float(np.sqrt(variance.mean())) / problem.std,
                    }
                )
            yield {"problem": name, "num_scales": count, "levels": levels}


def trainings(last: int, fixed: Sequence[int], seeds: Sequence[int]) -> Iterator[tuple[MethodConfig, int]]:
    """iCT's curriculum with either metric, every seed; fixed N with the squared norm, the first seed."""
    for metric in METRICS:
        for seed in seeds:
            yield MethodConfig(metric=metric, s1=last - 1), seed
    for count in fixed:
        yield MethodConfig(metric="l2", curriculum="fixed", s0=count - 1, s1=count - 1), seeds[0]


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


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The whole report."""
    training = Training(steps=300) if options.quick else Training()
    scales = SCALES[:3] if options.quick else SCALES
    last, fixed = (21, ()) if options.quick else (LAST_SCALES, FIXED_SCALES)
    sigma_min = MethodConfig().sigma_min
    report: dict[str, Any] = {
        "command": "python benchmarks/exactness.py" + (" --quick" if options.quick else ""),
        "versions": {
            "ict-fast": __version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "scipy": scipy.__version__,
            "python": platform.python_version(),
        },
        "seeds": list(options.seeds),
        "training": asdict(training),
        "problems": {name: {**asdict(p), "std": p.std} for name, p in PROBLEMS.items()},
        "shares": SHARES[::8].tolist(),
        "exact": {
            name: np.round(p.quantile(SHARES[::8], sigma_min), 5).tolist() for name, p in PROBLEMS.items()
        },
        "fixed_points": list(fixed_point_errors(scales, sigma_min)),
        "gaussian": {
            "closed_form": [gaussian_fixed_point(count, GAUSSIAN_STD) for count in scales],
            "leading_constant": gaussian_leading_constant(
                GAUSSIAN_STD, sigma_min=sigma_min, sigma_max=MethodConfig().sigma_max, rho=MethodConfig().rho
            ),
        },
        "targets": list(target_figures(scales, sigma_min)),
        "dimensions": [
            pseudo_huber_offset(PROBLEMS["mixture"], values, 161, seed=options.seeds[0])
            for values in DIMENSIONS
        ],
        "learned": [],
    }
    for name, problem in PROBLEMS.items():
        for method, seed in trainings(last, fixed, options.seeds):
            network = learn(problem, method, training, seed)
            levels, curves = learned_errors(network, name, method)
            record: dict[str, Any] = {
                "problem": name,
                "metric": method.metric,
                "curriculum": method.curriculum,
                "num_scales": method.s1 + 1,
                "seed": seed,
                "levels": levels,
            }
            if method.curriculum == "doubling" and seed == options.seeds[0]:
                record["curves"] = curves
            report["learned"].append(record)
            say(f"learned: {name}, {method.metric}, {method.curriculum}, N = {method.s1 + 1}, seed {seed}")
    return report


def _less(learned: Array, reference: Array) -> Array:
    """(M, directions, values) learned minus (M,) along the first value."""
    difference = learned.copy()
    difference[:, :, 0] -= reference[:, None]
    return difference


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the trainings")
    parser.add_argument("--quick", action="store_true", help="a rehearsal: few N, short trainings")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    options = parser.parse_args(argv)
    report = measure(options)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "exactness.json").write_text(json.dumps(report, indent=1) + "\n")
    plot(report, options.out / "exactness.png")
    print(section(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
