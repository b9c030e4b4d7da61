"""The report of benchmarks/exactness.py as a picture: a column per problem."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import mean
from typing import Any

from small_png import save_small

from closed_forms.report import EXPECTED, Report, at, learned, limits, nearest, targets

_COLOURS = ("tab:blue", "tab:green", "tab:orange", "tab:red")


def plot(report: Report, path: Path) -> None:
    """Rows: the functions, errors over sigma, errors over N, the target's bias and noise over N."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(4, len(EXPECTED), figsize=(13, 12), constrained_layout=True)
    for column, name in enumerate(EXPECTED):
        for row, draw in enumerate((_functions, _over_sigma, _over_scales, _over_target)):
            draw(axes[row][column], report, name)
            axes[row][column].grid(alpha=0.3)
            if column == 0:
                axes[row][column].legend(fontsize=8)
        axes[0][column].set_title(name)
    save_small(figure, path)
    plt.close(figure)


def _functions(axis: Any, report: Report, name: str) -> None:
    record = learned(report, "l2", "doubling", name)[0]
    for curve, colour in zip(record["curves"], _COLOURS, strict=False):
        label = f"learned, sigma {curve['sigma']:.2g}"
        axis.plot(report["shares"], curve["learned"], color=colour, label=label)
    axis.plot(report["shares"], report["exact"][name], "k--", lw=1, label="exact, every sigma")
    axis.set(xlabel="share of probability below y", ylabel="radius of f(y)" if name == "ring" else "f(y)")


def _over_sigma(axis: Any, report: Report, name: str) -> None:
    records = learned(report, "l2", "doubling", name)
    sigmas = [level["sigma"] for level in records[0]["levels"]]
    for which, label, style in (
        ("to_exact", "learned - exact", "o-"),
        ("to_fixed_point", "learned - fixed point", "s-"),
        ("to_denoiser", "learned - denoiser", ":"),
    ):
        values = [mean(r["levels"][i][which] for r in records) for i in range(len(sigmas))]
        axis.loglog(sigmas, values, style, ms=3, label=label)
    count = records[0]["num_scales"]
    (limit,) = (r for r in limits(report, name, "l2") if r["num_scales"] == count)
    errors = [level["rms"] or math.nan for level in limit["levels"]]
    axis.loglog([x["sigma"] for x in limit["levels"]], errors, "k--", lw=1, label="fixed point - exact")
    axis.set(xlabel="sigma", ylabel=f"rms distance, N = {count}", ylim=(1e-4, 3))


def _over_scales(axis: Any, report: Report, name: str) -> None:
    for metric, label, style in (
        ("l2", "fixed point, squared norm", "o-"),
        ("pseudo-huber", "fixed point, Pseudo-Huber", "s-"),
    ):
        records = limits(report, name, metric)
        errors = [nearest(record, 2.0)["rms"] for record in records]
        axis.loglog([record["num_scales"] for record in records], errors, style, ms=3, label=label)
    for metric, marker in (("l2", "kx"), ("pseudo-huber", "k+")):
        found = [r for r in report["learned"] if (r["problem"], r["metric"]) == (name, metric)]
        errors = [nearest(record, 2.0)["to_exact"] for record in found]
        axis.loglog([record["num_scales"] for record in found], errors, marker, label=f"learned, {metric}")
    records = limits(report, name, "l2")
    scales = [record["num_scales"] for record in records]
    power, last = EXPECTED[name]["rms"] or 0.0, nearest(records[-1], 2.0)["rms"]
    line = [last * (count / scales[-1]) ** power for count in scales]
    axis.loglog(scales, line, ":", color="grey", label="theory's power")
    axis.set(xlabel="N", ylabel="rms distance to exact, sigma near 2", ylim=(1e-3, 1))


def _over_target(axis: Any, report: Report, name: str) -> None:
    records = targets(report, name)
    scales = [record["num_scales"] for record in records]
    for sigma, colour in ((0.2, _COLOURS[0]), (0.8, _COLOURS[2]), (3.0, _COLOURS[3])):
        for figure, style in (("bias", "o-"), ("std", "s--")):
            values = [at(record, sigma)[figure] or math.nan for record in records]
            axis.loglog(scales, values, style, ms=3, color=colour, label=f"{figure}, sigma {sigma:g}")
    axis.set(xlabel="N", ylabel="target given y", ylim=(1e-7, 3))
