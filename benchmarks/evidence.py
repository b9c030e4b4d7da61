"""docs/EVIDENCE.md from the raw results: `python benchmarks/evidence.py`.

Every figure on the page comes from benchmarks/results/{ablation,exactness,honesty}.json. A part whose file is
not there says so. `--check` writes nothing, and fails if the page is not what the results give.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

import ablation_page  # noqa: E402
import honesty  # noqa: E402
from PIL import Image  # noqa: E402

from ict_fast.ablation.picture import REPORT_KEY, plot  # noqa: E402
from ict_fast.ablation.summary import as_text, digest  # noqa: E402
from ict_fast.errors import InputError  # noqa: E402

PAGE = ROOT / "docs/EVIDENCE.md"
RESULTS = ROOT / "benchmarks/results"

_OPENING = """# Evidence

What the paper found (Song & Dhariwal, ICLR 2024), looked for here at a scale that anyone can rerun:
scikit-learn's 8x8 digits. Digits are not CIFAR-10: orderings may carry over, sizes of effects do not. This
page is rendered from raw results by `python benchmarks/evidence.py`.
"""


def exactness_section(report: dict[str, Any]) -> str:
    import exactness

    picture = "![Errors against sigma and N](../benchmarks/results/exactness.png)"
    return f"{exactness.section(report).rstrip()}\n\n{picture}\n"


def honesty_section(report: dict[str, Any]) -> str:
    picture = "![Samples and their neighbours](../benchmarks/results/honesty.png)"
    caption = "*Samples over the training images nearest to them: left the ten nearest, right ten others.*"
    return f"{honesty.section(report)}\n{picture}\n\n{caption}\n"


_PARTS: tuple[tuple[str, str, str, Callable[[dict[str, Any]], str]], ...] = (
    ("The findings, in small", "ablation", "ict-fast ablate", ablation_page.section),
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
        made = ablation_page.commands(report) if name == "ablation" else [report.get("command", command)]
        shown = ", then ".join(f"`{each}`" for each in made)
        parts.append(f"{shown}, [raw](../benchmarks/results/{name}.json).\n")
        parts.append(section(report))
    return "\n".join(parts)


def picture_shows(picture: Path, report: Path) -> bool:
    """Whether the ablation's picture is of this report: it keeps the SHA-256 of the report's text."""
    if not picture.exists():
        return False
    with Image.open(picture) as opened:
        return opened.info.get(REPORT_KEY) == digest(report.read_text(encoding="utf-8"))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ablation", type=Path, help="take over this ablation.json first, and plot it")
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    options = parser.parse_args(argv)
    if options.check and options.ablation is not None:
        parser.error("--check writes nothing, and --ablation takes a report over; give one of them")
    if options.ablation is not None:
        try:
            report = json.loads(options.ablation.read_bytes())
            ablation_page.section(report)  # before it takes the place of the one that is there
        except (OSError, ValueError, KeyError, TypeError, InputError) as error:
            print(
                f"evidence.py: error: {options.ablation}: no report of an ablation ({error})", file=sys.stderr
            )
            return 2
        (RESULTS / "ablation.json").write_text(as_text(report), encoding="utf-8")
        plot(report, RESULTS / "ablation.png")
    text = page(RESULTS)
    if options.check:
        if PAGE.read_text(encoding="utf-8") != text:
            print(f"{PAGE} is not what the results give; run python benchmarks/evidence.py", file=sys.stderr)
            return 1
        report, picture = RESULTS / "ablation.json", RESULTS / "ablation.png"
        if report.exists() and not picture_shows(picture, report):
            print(
                f"{picture} is not of {report}; run python benchmarks/evidence.py --ablation {report}",
                file=sys.stderr,
            )
            return 1
        return 0
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
