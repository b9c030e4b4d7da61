"""An ablation's report for people: rows of its tables, and the commands that make it again."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

from rich.table import Table

from ict_fast.ablation.variants import DEFAULT_PRESET, DEFAULT_STEPS, GROUPS, variants_of
from ict_fast.ablation.verdicts import Summary, Verdict, judge, summarise
from ict_fast.config import from_dict


def as_text(report: dict[str, Any]) -> str:
    """The report as its file has it."""
    return json.dumps(report, indent=1) + "\n"


def digest(text: str) -> str:
    """What a picture keeps of the report that it shows: the SHA-256 of its text."""
    return hashlib.sha256(text.encode()).hexdigest()


def ordered(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The report's variants, group by group."""
    return sorted(report["variants"], key=lambda variant: list(GROUPS).index(variant["group"]))


def rows(report: dict[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """(group, label, seeds, one-step, two-step distance) of every variant with a result, in % of noise."""
    one, two = summarise(report, "one_step"), summarise(report, "two_step")
    return [
        (
            GROUPS[variant["group"]],
            variant["label"],
            str(one[variant["name"]].seeds),
            distance(one[variant["name"]]),
            distance(two[variant["name"]]),
        )
        for variant in ordered(report)
        if variant["name"] in one
    ]


def distance(summary: Summary) -> str:
    """Mean and standard error in % of noise, and how many seeds diverged."""
    failed = f" ({summary.diverged})" if summary.failed else ""
    if not summary.count:
        return f"none{failed}"
    error = "" if summary.standard_error is None else f" ± {100 * summary.standard_error:.2f}"
    return f"{100 * summary.mean:.2f}{error}{failed}"


VERDICT_HEADER = ("claim", "claimed by", "ratio", "one step", "two steps")


def verdict_rows(
    report: dict[str, Any], *, required: bool | None = None
) -> list[tuple[str, str, str, str, str]]:
    """Columns of `VERDICT_HEADER` for every claim whose variants were run.

    Args:
        required: the required claims alone, or (False) all others; None for both.
    """
    two = {verdict.finding: verdict for verdict in judge(report, "two_step")}
    return [
        (v.finding.claim, v.finding.by, _ratio(v), v.words, two[v.finding].words)
        for v in judge(report)
        if required is None or v.finding.required == required
    ]


def _ratio(verdict: Verdict) -> str:
    if math.isnan(verdict.ratio) or verdict.outcome == "neither":
        return "-"
    error = "" if verdict.ratio_error is None else f" ± {verdict.ratio_error:.2g}"
    return f"{verdict.ratio:.3g}{error}"


def commands(report: dict[str, Any]) -> list[str]:
    """What to type for this report: the seeds that every variant has, then those that only some have."""
    base, asked = report["base"], report.get("asked_count")
    options = [] if base["preset"] == DEFAULT_PRESET else ["--preset", base["preset"]]
    if base["training"]["total_steps"] != DEFAULT_STEPS:
        options += ["--total-steps", str(base["training"]["total_steps"])]
    if asked is not None:
        options += ["--count", str(asked)]
    seeds = {v["name"]: 1 + max(run["seed"] for run in v["runs"]) for v in report["variants"] if v["runs"]}
    if not seeds:
        return []
    fewest = min(seeds.values())
    everything = seeds.keys() == {variant.name for variant in variants_of(from_dict(base))}
    plain = ["ict-fast", "ablate", *options, *([] if everything else ["--only", *seeds])]
    plain += ["--seeds", str(fewest)]
    more = []
    for number in sorted(set(seeds.values()) - {fewest}):
        names = [name for name in seeds if seeds[name] == number]
        more.append(["ict-fast", "ablate", *options, "--only", *names, "--seeds", str(number)])
    found = [*more, plain]  # the last one gathers all of them
    return [" ".join(words) for words in found]


def tables(report: dict[str, Any]) -> list[Table]:
    """For a terminal: the variants, and the claims that these bear on, if there are any."""
    steps = report["base"]["training"]["total_steps"]
    variants = Table(title=f"Fréchet distance in % of noise, mean ± standard error, {steps:,} steps")
    for name in ("variant", "seeds", "one step", "two steps"):
        variants.add_column(name, justify="left" if name == "variant" else "right")
    group = None
    for row in rows(report):
        if row[0] != group:
            group = row[0]
            variants.add_section()
            variants.add_row(f"[bold]{group}[/bold]")
        variants.add_row(*row[1:])
    claims = Table(title="What is claimed, and found here")
    for name in VERDICT_HEADER:
        claims.add_column(name)
    for required in (True, False):
        for claim in verdict_rows(report, required=required):
            claims.add_row(*claim)
        claims.add_section()
    return [variants, claims] if claims.row_count else [variants]
