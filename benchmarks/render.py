"""Renders benchmarks/RESULTS.md and its plots from the raw JSON alone: `make results`.

Every claim names its file; what has no JSON is "not measured yet". Goals that are missed are listed with what
results/analysis.md says of each (a section `## KEY`), written by hand.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

from goals import GOALS, Goal, Reached  # noqa: E402
from page import NOT_YET, link, table  # noqa: E402
from plots import suite_plot  # noqa: E402
from render_gpu import gpu_blocks  # noqa: E402
from results_index import RESULTS, Results  # noqa: E402

from ict_fast.screen import rate  # noqa: E402

MISSING = "**analysis missing**"


def render(results: Results, plots: Path) -> str:
    """RESULTS.md as text; draws the plots.

    Args:
        results: what is there.
        plots: folder for the pictures, inside the results' folder.
    """
    blocks = [
        "# Results",
        "Rendered by `make results` from the raw JSON under [results](results); nothing here is written by"
        " hand but the [analysis](results/analysis.md) of what fell short. Times are medians. How they are"
        " measured: the files of this folder.",
        "## Goals",
        goals_table(results),
        misses(results),
        "## On a GPU",
        *gpu_blocks(results, plots),
        "## On a CPU",
        *suite_blocks(results, plots),
        "## Without a GPU",
        *static_blocks(results),
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


# -------------------------------------------------------------------------------------------------- the goals


def goals_table(results: Results) -> str:
    """Every goal, and its figure on every machine that has one."""
    rows = []
    for goal in GOALS:
        reached = list(goal.figures(results))
        if not reached:
            rows.append((goal.text, goal.bound, NOT_YET, "", ""))
        for each in reached:
            value = f"{each.value:.3g}{goal.unit} ({each.where}{'; ' + each.worst if each.worst else ''})"
            rows.append((goal.text, goal.bound, value, goal.verdict(each), link(each.file)))
    return table(("goal", "bound", "measured", "met", "file"), rows)


def missed(results: Results) -> Iterator[tuple[Goal, list[Reached]]]:
    """The goals that some machine missed."""
    for goal in GOALS:
        short = [each for each in goal.figures(results) if not goal.is_met(each)]
        if short:
            yield goal, short


def analyses(folder: Path) -> dict[str, str]:
    """The sections of analysis.md by key."""
    path = folder / "analysis.md"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    found = re.split(r"^## +(\S+) *$", text, flags=re.MULTILINE)
    return {key: body.strip() for key, body in zip(found[1::2], found[2::2], strict=True)}


def misses(results: Results) -> str:
    """What fell short, and why, by hand; an empty place where nobody has said yet."""
    written = analyses(results.folder)
    lines = []
    for goal, short in missed(results):
        values = ", ".join(f"{each.value:.3g}{goal.unit} on {each.where}" for each in short)
        why = written.get(goal.key) or f"{MISSING}: write section `## {goal.key}` of results/analysis.md"
        lines.append(f"* **{goal.text}** ({goal.bound}): {values}. {why}")
    return "### What falls short\n\n" + "\n".join(lines) if lines else ""


# ---------------------------------------------------------------------------------------------------- the CPU


def suite_blocks(results: Results, plots: Path) -> Iterator[str]:
    """A table for each group of the suite, contestants of an op beside each other."""
    suite = results.suite
    if suite is None:
        yield f"{NOT_YET}: `make bench-results`"
        return
    signed = suite.record["ict_fast"]
    ceiling = signed["ceilings"]["cpu"]
    versions = ", ".join(f"{name} {value}" for name, value in signed["versions"].items() if value)
    yield (
        f"{link(suite.file)}, {signed['date'][:10]}, commit {signed['commit']}, {signed['hardware']['cpu']},"
        f" {signed['hardware']['threads']} threads, {versions}. Measured peaks: a copy"
        f" {ceiling['copy_gb_per_s']:.1f} GB/s; an fp32 matrix product"
        f" {1000 * ceiling['matrix_tflop_per_s']['fp32']:.0f} GFLOP/s. A copy is of as many bytes as the"
        " operation must move; what fits into the caches is copied faster than the large copy. The product is"
        " that of torch's BLAS, which oneDNN's convolutions exceed: for them it is a scale, not a bound."
    )
    file = suite_plot(results, plots / "cpu-suite.png")
    if file is not None:
        yield f"![On a CPU: rates beside a copy, and beside BLAS](results/{plots.name}/{file})"
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in results.suite_records():
        if "op" in record:
            groups.setdefault(record["group"], []).append(record)
    for group, records in groups.items():
        yield f"### {group[0].upper()}{group[1:]}"
        yield table(
            ("op", "variant", "ms", "images/s", "of a copy", "of the matrix rate", "baseline's time"),
            list(_suite_rows(records)),
            right=2,
        )


def _suite_rows(records: Sequence[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    baselines = {each["op"]: each["ms"] for each in records if each["variant"] == each["baseline"]}
    for each in records:
        baseline = baselines.get(each["op"])
        yield (
            each["op"],
            each["variant"],
            f"{each['ms']:.4g}",
            rate(each["images_per_second"]) if "images_per_second" in each else "",
            f"{each['percent_of_copy']:.0f} %" if "percent_of_copy" in each else "",
            f"{each['percent_of_matrix_rate']:.0f} %" if "percent_of_matrix_rate" in each else "",
            f"{baseline / each['ms']:.2f}x" if baseline else "",
        )


# ---------------------------------------------------------------------------------------------- without a GPU


def static_blocks(results: Results) -> Iterator[str]:
    yield "### What a step asks of a GPU"
    counts = results.read("step-counts.json")
    if counts is None:
        yield f"{NOT_YET}: `make counts`"
    else:
        yield (
            f"Counted on fake tensors, torch {counts.record['versions']['torch']} ({link(counts.file)}),"
            " uncompiled; bytes: every operation's tensors once."
        )
        rows = [
            (
                each["preset"],
                str(each["batch_size"]),
                f"{each['flops'] / each['batch_size'] / 1e9:.4g}",
                f"{sum(each['bytes'].values()) / 1e9:.4g}",
                f"{each['launches_of_kernels']:,}",
                f"{each['launches_of_operations']:,}",
            )
            for each in counts.record["steps"]
        ]
        head = ("preset", "images", "GFLOP per image", "GB per step", "our launches", "torch's")
        yield table(head, rows, right=1)
    yield "### The kernels' machine code"
    code = results.read("compiled-kernels.json")
    if code is None:
        yield f"{NOT_YET}: `python benchmarks/compiled_kernels.py`"
        return
    kernels = code.record["kernels"]
    spilling = sum(each["stack_bytes"] > 0 for each in kernels)
    registers = Counter[int]()
    for each in kernels:
        registers[each["architecture"]] = max(registers[each["architecture"]], each["registers"])
    most = ", ".join(f"{count} on sm_{name}" for name, count in sorted(registers.items()))
    yield (
        f"{len(kernels):,} launches, compiled ahead of time by Triton {code.record['versions']['triton']}:"
        f" {spilling} of them spill; at most {most} registers"
        f" ([table](results/compiled-kernels.md), {link(code.file)})."
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON")
    parser.add_argument("--out", type=Path, help="the page (default: RESULTS.md beside the folder)")
    options = parser.parse_args(argv)
    results = Results(options.results)
    out = options.out or options.results.parent / "RESULTS.md"
    out.write_text(render(results, options.results / "plots"), encoding="utf-8")
    print(out)
    for goal, _ in missed(results):
        if not analyses(options.results).get(goal.key):
            print(f"missed and not analysed: {goal.key}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
