"""What is said of a finding follows from the seeds, and from nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from ict_fast.ablation import VARIANTS, judge, summarise
from ict_fast.ablation.findings import FINDINGS
from ict_fast.ablation.summary import plot, tables, verdict_rows


def _report(distances: dict[str, list[float | None]]) -> dict[str, Any]:
    """A report with these one-step distances (in units of noise) by variant; None for a run that diverged."""
    variants = []
    for variant in VARIANTS:
        runs: list[dict[str, Any]] = []
        for seed, value in enumerate(distances.get(variant.name, [])):
            measured = {"frechet_distance": 0.0, "relative_to_noise": value}
            result = {"failed": "diverged"} if value is None else {"one_step": measured, "two_step": measured}
            runs.append({"seed": seed, **result})
        described = {"name": variant.name, "group": variant.group, "label": variant.label, "changes": {}}
        variants.append({**described, "runs": runs})
    reference = {"halves": 2.0, "noise": 350.0, "gaussian": 24.0}
    base = {"training": {"total_steps": 600}}
    return {"base": base, "seeds": [0, 1, 2], "reference": reference, "variants": variants}


def _outcome(better: list[float | None], worse: list[float | None], *names: str) -> str:
    ours, theirs = names
    verdicts = judge(_report({ours: better, theirs: worse}))
    assert [(v.finding.better, v.finding.worse) for v in verdicts] == [(ours, theirs)]
    return verdicts[0].outcome


def test_mean_and_standard_error_are_numpys() -> None:
    values = [0.012, 0.017, 0.0145]
    found = summarise(_report({"ict": list(values)}))["ict"]
    assert found.mean == pytest.approx(np.mean(values))
    assert found.standard_error == pytest.approx(np.std(values, ddof=1) / np.sqrt(3))
    assert (found.count, found.failed) == (3, 0)


@pytest.mark.parametrize(
    ("better", "worse", "outcome"),
    [
        ([0.010, 0.011, 0.012], [0.020, 0.021, 0.022], "holds"),
        ([0.020, 0.021, 0.022], [0.010, 0.011, 0.012], "reversed"),
        ([0.010, 0.020, 0.030], [0.012, 0.022, 0.032], "open"),
        ([0.010], [0.020], "open"),
        ([0.010, 0.011, 0.012], [0.011, None, 0.012], "holds"),
        ([0.010, None, 0.012], [0.050, 0.051, 0.052], "reversed"),
        ([None, None, None], [None, None, None], "open"),
    ],
)
def test_an_ordering_holds_if_the_bars_of_one_standard_error_do_not_meet(
    better: list[float | None], worse: list[float | None], outcome: str
) -> None:
    assert _outcome(better, worse, "ict", "l2") == outcome


def test_a_factor_must_be_reached_beyond_the_bars() -> None:
    better: list[float | None] = [0.010, 0.0101, 0.0102]
    assert _outcome(better, [0.0230, 0.0231, 0.0232], "ict", "ct2023") == "holds"
    assert _outcome(better, [0.0190, 0.0191, 0.0192], "ict", "ct2023") == "open"


def test_tables_and_picture_show_every_variant_and_finding(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    distances: dict[str, list[float | None]] = {
        variant.name: list(rng.uniform(0.01, 0.2, 3)) for variant in VARIANTS
    }
    distances["l1"] = [None, None, None]
    report = _report(distances)
    console = Console(width=200, record=True, file=(tmp_path / "out").open("w"))
    for table in tables(report):
        console.print(table)
    text = console.export_text()
    assert all(variant.label in text for variant in VARIANTS)
    assert all(finding.claim in text for finding in FINDINGS)
    assert "3 of 3 diverged" in text
    assert len(verdict_rows(report)) == len(FINDINGS)
    plot(report, tmp_path / "ablation.png")
    with Image.open(tmp_path / "ablation.png") as picture:
        assert picture.width > 600
    first = (tmp_path / "ablation.png").read_bytes()
    plot(report, tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == first
