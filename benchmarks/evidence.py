"""docs/EVIDENCE.md from the raw results: `python benchmarks/evidence.py`.

Every figure on the page comes from benchmarks/results/{ablation,exactness,honesty}.json. A part whose file is
not there says so. `--check` writes nothing, and fails if the page is not what the results give.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

import honesty  # noqa: E402

from ict_fast.ablation import judge  # noqa: E402
from ict_fast.ablation.summary import plot, rows, verdict_rows  # noqa: E402

PAGE = ROOT / "docs/EVIDENCE.md"
RESULTS = ROOT / "benchmarks/results"

_OPENING = """# Evidence

What the paper found (Song & Dhariwal, ICLR 2024), looked for here at a scale that anyone can rerun:
scikit-learn's 8x8 digits, on two CPU cores. Digits are not CIFAR-10: orderings may carry over, sizes of
effects do not. This page is rendered from raw results by `python benchmarks/evidence.py`.
"""

_READING = """
How to read it. The published EMA teacher averages over N / (s0 ln(1/mu0)) steps: 717 at the baseline's 151
levels. That is nothing in the paper's 800,000 steps and more than a whole run here, so a short run makes that
teacher look worse than a long one would; the teachers that follow faster show how much of it is the lag.
Dropout is a remedy for a large network that sees its data often; this network is small and its run is short.
"""


def ablation_section(report: dict[str, Any]) -> str:
    """The findings and the variants in Markdown."""
    base, verdicts = report["base"], judge(report)
    steps, batch = base["training"]["total_steps"], base["training"]["batch_size"]
    holds, open_, reversed_ = (
        sum(verdict.outcome == outcome for verdict in verdicts) for outcome in ("holds", "open", "reversed")
    )
    lines = [
        f"Preset `{base['preset']}` with {steps:,} steps of {batch} images, {len(report['seeds'])} seeds of",
        f"each variant, {report['count']:,} samples per figure. Of {len(verdicts)} orderings {holds} hold",
        f"here, {open_} are open and {reversed_} are the other way round. An ordering holds if the bars of",
        "one standard error do not meet; the ratio is that of the mean one-step distances.",
        "",
        *_table(("the paper's finding", "section", "ratio", "here"), verdict_rows(report), "llrl"),
        "",
        "![One-step distance of every variant](../benchmarks/results/ablation.png)",
        "",
        "Fréchet distance in the digits classifier's features, in % of that of uniform noise, mean and",
        "standard error:",
        "",
        *_table(("", "variant", "one step", "two steps"), _without_repeats(rows(report)), "llrr"),
    ]
    return "\n".join(lines) + "\n" + _READING


def exactness_section(report: dict[str, Any]) -> str:
    import exactness

    picture = "![Errors against sigma and N](../benchmarks/results/exactness.png)"
    return f"{exactness.section(report).rstrip()}\n\n{picture}\n"


def honesty_section(report: dict[str, Any]) -> str:
    picture = "![Samples and their neighbours](../benchmarks/results/honesty.png)"
    caption = "*Samples over the training images nearest to them: left the ten nearest, right ten others.*"
    return f"{honesty.section(report)}\n{picture}\n\n{caption}\n"


_PARTS: tuple[tuple[str, str, str, Callable[[dict[str, Any]], str]], ...] = (
    ("The findings, in small", "ablation", "ict-fast ablate --out runs/ablation", ablation_section),
    (
        "Exactness, where the answer is known",
        "exactness",
        "python benchmarks/exactness.py",
        exactness_section,
    ),
    ("Drawn, not remembered", "honesty", "python benchmarks/honesty.py runs/digits", honesty_section),
)


def page(results: Path) -> str:
    """The whole page.

    Args:
        results: folder with the raw JSON files; a missing one leaves its part "not measured yet".
    """
    parts = [_OPENING]
    for title, name, command, section in _PARTS:
        file = results / f"{name}.json"
        parts.append(f"## {title}\n")
        if not file.exists():
            parts.append(f"Not measured yet: `{command}`.\n")
            continue
        report = json.loads(file.read_bytes())
        parts.append(f"`{report.get('command', command)}`, [raw](../benchmarks/results/{name}.json).\n")
        parts.append(section(report))
    return "\n".join(parts)


def _without_repeats(table: Iterable[tuple[str, str, str, str]]) -> list[tuple[str, ...]]:
    """A group's name in its first row alone."""
    shown, last = [], None
    for row in table:
        shown.append(("" if row[0] == last else row[0], *row[1:]))
        last = row[0]
    return shown


def _table(header: Sequence[str], body: Iterable[Sequence[str]], alignment: str) -> list[str]:
    rule = ["---:" if side == "r" else "---" for side in alignment]
    return [f"| {' | '.join(row)} |" for row in (header, rule, *body)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ablation", type=Path, help="take over this ablation.json first, and plot it")
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    options = parser.parse_args(argv)
    if options.ablation is not None:
        report = json.loads(options.ablation.read_bytes())
        (RESULTS / "ablation.json").write_text(json.dumps(report, indent=1) + "\n")
        plot(report, RESULTS / "ablation.png")
    text = page(RESULTS)
    if options.check:
        if PAGE.read_text(encoding="utf-8") != text:
            print(f"{PAGE} is not what the results give; run python benchmarks/evidence.py", file=sys.stderr)
            return 1
        return 0
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
