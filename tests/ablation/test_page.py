"""What people see of a report: tables, commands, the picture, and the page's section."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from ict_fast import presets
from ict_fast.ablation.findings import findings_of
from ict_fast.ablation.picture import REPORT_KEY, plot
from ict_fast.ablation.summary import as_text, commands, digest, ordered, rows, tables, verdict_rows
from ict_fast.ablation.variants import GROUPS, variants_of
from ict_fast.config import to_dict

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import ablation_page

Made = Callable[..., dict[str, Any]]
DIGITS = presets.get("digits")
NAMES = [variant.name for variant in variants_of(DIGITS)]


def _distances(seeds: int, **others: list[float | None]) -> dict[str, list[float | None]]:
    rng = np.random.default_rng(0)
    found: dict[str, list[float | None]] = {name: list(rng.uniform(0.01, 0.2, seeds)) for name in NAMES}
    return found | {name.replace("_", "-"): values for name, values in others.items()}


def _section(report: dict[str, Any]) -> str:
    """With single spaces, so that where a line ends does not matter."""
    return " ".join(ablation_page.section(report).split())


def _printed(report: dict[str, Any], folder: Path) -> str:
    with (folder / "out").open("w") as file:
        console = Console(width=240, record=True, file=file)
        for table in tables(report):
            console.print(table)
        return console.export_text()


def test_tables_show_every_variant_and_claim(made_report: Made, tmp_path: Path) -> None:
    text = _printed(made_report(_distances(3, l1=[None, None, None])), tmp_path)
    assert all(variant.label in text for variant in variants_of(DIGITS))
    assert all(claim.claim in text for claim in findings_of(DIGITS))
    assert "3 of 3 diverged" in text


def test_variants_that_no_claim_is_about_have_one_table(made_report: Made, tmp_path: Path) -> None:
    text = _printed(made_report({"ict": [0.1]}), tmp_path)
    assert "iCT" in text
    assert "What is claimed" not in text


def test_no_heading_is_repeated(made_report: Made, tmp_path: Path) -> None:
    report = made_report(_distances(2))
    text, section = _printed(report, tmp_path), ablation_page.section(report)
    for title in list(GROUPS.values())[1:]:
        assert len(re.findall(rf"^│ {re.escape(title)} +│", text, re.MULTILINE)) == 1, title
        assert section.count(f"\n| {title} |") == 1, title
    assert [row[0] for row in rows(report)] == [GROUPS[v["group"]] for v in ordered(report)]


def test_one_seed_decides_nothing_and_is_one_seed(made_report: Made) -> None:
    text = _section(made_report(_distances(1)))
    assert f"1 seed of each of {len(NAMES)} variants" in text
    assert "1 seeds" not in text
    assert "0 hold" in text
    assert "By chance" not in text
    assert "open: too few seeds" in text


def test_mixed_numbers_of_seeds_are_said_for_each(made_report: Made) -> None:
    five: list[float | None] = [0.02, 0.021, 0.022, 0.021, 0.02]
    report = made_report(_distances(3, ict=five, l2=five))
    text = _section(report)
    assert f"3 seeds of {len(NAMES) - 2} variants and 5 seeds of 2 variants" in text
    assert "| iCT | iCT | 5 |" in text
    assert "12.7 % of cases with 3 seeds each" in text
    assert "10.4 % of cases with 5 seeds each" in text
    assert "with 3 and 5 seeds" in text
    assert commands(report) == ["ict-fast ablate --only ict l2 --seeds 5", "ict-fast ablate --seeds 3"]


def test_the_expected_number_by_chance_and_what_shares_icts_mean_are_counted(made_report: Made) -> None:
    claims = findings_of(DIGITS)
    text = _section(made_report(_distances(3)))
    shared = sum("ict" in (claim.better, claim.worse) for claim in claims)
    assert f"{shared} of all {len(claims)} comparisons have iCT on one side" in text
    assert f"that is up to {0.127 * len(claims):.1f} of each" in text


def test_required_orderings_come_first_and_once(made_report: Made) -> None:
    text = ablation_page.section(made_report(_distances(3)))
    first, others = text.split("**All others.**")
    for claim in findings_of(DIGITS):
        assert (f"| {claim.claim} |" in first) == claim.required
        assert (f"| {claim.claim} |" in others) != claim.required
        assert f"| {claim.claim} | {claim.by} |" in text
    assert {claim.by.split()[0] for claim in findings_of(DIGITS)} == {"paper", "ours"}
    assert "the paper's finding" not in text


def test_the_two_step_verdict_stands_beside_the_one_step_one(made_report: Made) -> None:
    near: list[float | None] = [0.01, 0.011, 0.012]
    far: list[float | None] = [0.02, 0.021, 0.022]
    report = made_report({"ict": near, "l2": far}, two={"ict": far, "l2": near})
    (row,) = verdict_rows(report)
    assert row[3:] == ("holds", "the other way round")
    assert row[2].startswith("1.91 ± ")


def test_what_does_not_train_is_no_ratio(made_report: Made) -> None:
    none = {"ct2023": [1.59, 1.6], "ct2023_fourier": [1.59, 1.61]}
    report = made_report(_distances(2, ict=[0.01, 0.011], **none))
    text = _section(report)
    found = {(row[0]): row for row in verdict_rows(report)}
    assert found["Fourier scale 0.02 is better than 16, from the 2023 baseline"][2:4] == (
        "-",
        "neither trains",
    )
    half = found["iCT has at most half the distance of the 2023 baseline"]
    assert half[3] == "holds: the other does not train"
    assert "That baseline does not train in 600 steps (159.50 ± 0.50 % of noise)" in text
    assert "Not trained at all" in text
    trained = _section(made_report(_distances(2)))
    assert "does not train in" not in trained
    assert "Not trained at all" not in trained


def test_a_report_with_only_some_variants_is_a_page(made_report: Made) -> None:
    near: list[float | None] = [0.01, 0.011]
    report = made_report({"ict": near, "l2": [0.02, None, 0.021, None]})
    text = _section(report)
    assert "2 seeds of 1 variant and 4 seeds of 1 variant" in text
    assert "holds (2 of 4 diverged)" in text
    assert "The orderings asked" not in text, "none of them was run"
    assert commands(report)[-1] == "ict-fast ablate --only ict l2 --seeds 2"
    report["variants"] = [each for each in report["variants"] if each["runs"]]
    assert _section(report).count("|") > 20


def test_all_of_a_variants_seeds_may_diverge(made_report: Made, tmp_path: Path) -> None:
    report = made_report(_distances(3, ict=[None] * 3, ema_teacher=[None] * 3))
    text = _section(report)
    assert "both diverge (3 of 3 diverged and 3 of 3 diverged)" in text
    assert "nan" not in text
    plot(report, tmp_path / "plot.png")


def test_the_page_follows_the_reports_fields(made_report: Made) -> None:
    report = made_report(_distances(3))
    text = _section(report)
    assert "cpu, 2 cores (abacus), 2 runs at once with 1 thread each" in text
    assert "Gathered on 2026-01-02 (UTC)" in text
    assert "1h21m of run time in all" in text, "27 variants, 3 seeds, a minute each"
    assert "717 in the baseline and 1,216 in iCT" in text
    assert "119 % and 203 % of a run of 600 steps" in text
    gpu = made_report(_distances(3)) | {"device": "NVIDIA H100", "parallel": 4, "asked_count": 500}
    del gpu["threads"]
    gpu["base"]["training"]["total_steps"] = 60_000
    text = _section(gpu)
    assert "NVIDIA H100 (abacus), 4 runs at once, " in text
    assert "1.2 % and 2 % of a run of 60,000 steps" in text
    assert commands(gpu) == ["ict-fast ablate --total-steps 60000 --count 500 --seeds 3"]


def test_the_picture_is_repeatable_and_keeps_its_reports_digest(made_report: Made, tmp_path: Path) -> None:
    report = made_report(_distances(3))
    plot(report, tmp_path / "ablation.png")
    with Image.open(tmp_path / "ablation.png") as picture:
        assert picture.width > 600
        assert picture.info[REPORT_KEY] == digest(as_text(report))
    plot(report, tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "ablation.png").read_bytes()


@pytest.mark.parametrize("preset", ["cifar10", "imagenet64"])
def test_other_presets_have_a_page_too(made_report: Made, preset: str) -> None:
    base = presets.get(preset)
    report = made_report({"ict": [0.1, 0.11, 0.12]})
    runs = report["variants"][0]["runs"]
    base = replace(base, training=replace(base.training, total_steps=600))
    report["base"] = to_dict(base)
    report["variants"] = [{**asdict(variant), "runs": runs} for variant in variants_of(base)]
    del report["reference"]
    text = _section(report)
    assert commands(report) == [f"ict-fast ablate --preset {preset} --seeds 3"]
    assert "Dropout" in text
    assert "control" not in text
