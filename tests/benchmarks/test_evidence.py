"""docs/EVIDENCE.md is what the raw results give."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import evidence  # noqa: E402


def test_the_page_is_rendered_from_the_committed_results() -> None:
    assert evidence.main(["--check"]) == 0


def test_every_picture_and_file_of_the_page_exists() -> None:
    text = evidence.PAGE.read_text(encoding="utf-8")
    links = [part.split(")")[0] for part in text.split("](")[1:]]
    for link in links:
        assert link.startswith("http") or (evidence.PAGE.parent / link).exists(), link


def test_what_was_not_measured_is_said(tmp_path: Path) -> None:
    text = evidence.page(tmp_path)
    assert text.count("Not measured yet") == 3
    assert "%" not in text.split("##", 1)[1], "no figure without a result"


def test_a_changed_result_changes_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = json.loads((evidence.RESULTS / "honesty.json").read_bytes())
    report["neighbours"]["copies"] = 12345
    (tmp_path / "honesty.json").write_text(json.dumps(report))
    assert "12345 samples are copies" in evidence.page(tmp_path)
