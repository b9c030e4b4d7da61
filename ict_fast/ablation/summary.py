"""An ablation's report for people: tables for a terminal, Markdown for a page, one picture."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

from rich.table import Table

from ict_fast.ablation.findings import Summary, Verdict, judge, summarise
from ict_fast.durable import replace_durably

GROUPS = {
    "ict": "iCT",
    "ladder": "from the 2023 baseline to iCT, one ingredient after the other",
    "removed": "iCT with one ingredient taken back",
    "teacher": "teachers that follow faster than the published one",
    "indices": "noise levels and their weight",
    "curriculum": "curriculum",
    "huber-c": "c of Pseudo-Huber",
    "dropout": "dropout",
}
_MARKS = {"holds": "holds", "reversed": "the other way round", "open": "open: the bars meet"}


def rows(report: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """(group, label, one-step, two-step distance) of every variant with a result, distances in % of noise."""
    one, two = summarise(report, "one_step"), summarise(report, "two_step")
    return [
        (
            GROUPS[variant["group"]],
            variant["label"],
            distance(one[variant["name"]]),
            distance(two[variant["name"]]),
        )
        for variant in report["variants"]
        if variant["name"] in one
    ]


def distance(summary: Summary) -> str:
    """Mean and standard error in % of noise, and how many seeds diverged."""
    failed = f" ({summary.failed} of {summary.failed + summary.count} diverged)" if summary.failed else ""
    if not summary.count:
        return f"none{failed}"
    error = "" if summary.standard_error is None else f" ± {100 * summary.standard_error:.2f}"
    return f"{100 * summary.mean:.2f}{error}{failed}"


def verdict_rows(report: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """(claim, section of the paper, ratio, outcome) of every finding whose variants were run."""
    return [(_claim(v), v.finding.section, _ratio(v), _MARKS[v.outcome]) for v in judge(report)]


def _claim(verdict: Verdict) -> str:
    return verdict.finding.claim


def _ratio(verdict: Verdict) -> str:
    return "diverged" if math.isnan(verdict.ratio) else f"{verdict.ratio:.2f}"


def tables(report: dict[str, Any]) -> list[Table]:
    """For a terminal: the variants, and the findings."""
    seeds, steps = len(report["seeds"]), report["base"]["training"]["total_steps"]
    variants = Table(
        title=f"Fréchet distance in % of noise, mean ± standard error of {seeds} seeds, {steps:,} steps"
    )
    for name in ("variant", "one step", "two steps"):
        variants.add_column(name, justify="left" if name == "variant" else "right")
    group = None
    for row in rows(report):
        if row[0] != group:
            group = row[0]
            variants.add_section()
            variants.add_row(f"[bold]{group}[/bold]")
        variants.add_row(*row[1:])
    findings = Table(title="The paper's findings (one step)")
    for name in ("finding", "section", "ratio", "here"):
        findings.add_column(name)
    for row in verdict_rows(report):
        findings.add_row(*row)
    return [variants, findings]


def plot(report: dict[str, Any], path: Path) -> None:
    """One-step distance of every variant, group by group, with its seeds and the standard error."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    summaries = {name: found for name, found in summarise(report).items() if found.count}
    variants = [variant for variant in report["variants"] if variant["name"] in summaries]
    order = [variant for group in GROUPS for variant in variants if variant["group"] == group]
    figure, axis = plt.subplots(figsize=(8, 1.2 + 0.27 * (len(order) + len(GROUPS))), constrained_layout=True)
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
        labels.append(variant["label"])
        place += 1
    if "ict" in summaries:
        axis.axvline(100 * summaries["ict"].mean, color="C0", lw=0.8, ls=":")
    halves, noise = report["reference"]["halves"], report["reference"]["noise"]
    axis.axvline(100 * halves / noise, color="0.5", lw=0.8)
    axis.text(100 * halves / noise, -0.55, " real halves", ha="left", va="center", fontsize=8, color="0.4")
    axis.set(xscale="log", yticks=ticks, yticklabels=labels, ylim=(place - 0.4, -1.1))
    axis.set_xlabel("one-step Fréchet distance, % of noise (dots: seeds; bars: one standard error)")
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
    axis.grid(axis="x", which="both", alpha=0.2)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110, format="png", metadata={"Software": None})
    plt.close(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_durably(path, picture.getvalue())
