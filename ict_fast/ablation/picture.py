"""An ablation's report as one picture."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from ict_fast.ablation.summary import as_text, digest, ordered
from ict_fast.ablation.variants import GROUPS
from ict_fast.ablation.verdicts import summarise
from ict_fast.durable import replace_durably

REPORT_KEY = "source-sha256"
"""Text chunk of the PNG: `digest` of the report that it shows."""


def plot(report: dict[str, Any], path: Path) -> None:
    """One-step distance of every variant, group by group, with its seeds and the standard error."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    summaries = {name: found for name, found in summarise(report).items() if found.count}
    order = [variant for variant in ordered(report) if variant["name"] in summaries]
    height = 1.6 + 0.27 * (len(order) + len({variant["group"] for variant in order}))
    figure, axis = plt.subplots(figsize=(9, height), constrained_layout=True)
    ticks: list[float] = []
    labels: list[str] = []
    place, group = 0.0, ""
    for variant in order:
        if variant["group"] != group:
            group = variant["group"]
            place += 0.6 if ticks else 0.0
        summary = summaries[variant["name"]]
        seeds = [100 * run["one_step"]["relative_to_noise"] for run in variant["runs"] if "one_step" in run]
        colour = f"C{list(GROUPS).index(group)}"
        axis.plot(seeds, [place] * len(seeds), ".", color=colour, alpha=0.45, ms=5)
        error = None if summary.standard_error is None else 100 * summary.standard_error
        axis.errorbar(100 * summary.mean, place, xerr=error, fmt="o", color=colour, ms=5, capsize=2.5)
        ticks.append(place)
        labels.append(variant["label"] + (f" ({summary.diverged})" if summary.failed else ""))
        place += 1
    if "ict" in summaries:
        axis.axvline(100 * summaries["ict"].mean, color="C0", lw=0.8, ls=":")
    if "reference" in report:
        _real_halves(axis, report)
    axis.set(xscale="log", yticks=ticks, yticklabels=labels, ylim=(place - 0.4, -1.9))
    axis.set_xlabel("one-step Fréchet distance, % of that of noise\n(dots: seeds; bars: one standard error)")
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
    axis.grid(axis="x", which="both", alpha=0.2)
    picture = io.BytesIO()
    about = {"Software": None, REPORT_KEY: digest(as_text(report))}
    figure.savefig(picture, dpi=110, format="png", metadata=about)
    plt.close(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_durably(path, picture.getvalue())


def _real_halves(axis: Any, report: dict[str, Any]) -> None:
    """Real images against real images: fewer on both sides than for a model, so a larger distance."""
    reference = report["reference"]
    place = 100 * reference["halves"] / reference["noise"]
    sizes = f"{reference['count'] // 2:,} real images against {-(-reference['count'] // 2):,}"
    text = (
        f" {sizes}\n (a variant: {report['count']:,} samples against {reference['count']:,}: not comparable)"
    )
    axis.axvline(place, color="0.5", lw=0.8)
    axis.text(place, -1.2, text, ha="left", va="center", fontsize=8, color="0.4")
