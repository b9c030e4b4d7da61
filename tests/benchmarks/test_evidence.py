"""docs/EVIDENCE.md is what the raw results give."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from ict_fast import presets
from ict_fast.config import to_dict

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


def _report(date: str) -> dict[str, Any]:
    """An ablation of iCT alone, made up."""
    measured = {"relative_to_noise": 0.012, "frechet_distance": 4.2}
    runs = [{"seed": seed, "one_step": measured, "two_step": measured, "seconds": 60.0} for seed in range(2)]
    variant = {"name": "ict", "group": "ict", "label": "iCT", "changes": {}, "runs": runs}
    machine = {"machine": "abacus", "device": "cpu, 2 cores", "parallel": 2, "threads": 1}
    return {"date": date, "base": to_dict(presets.get("digits")), **machine, "variants": [variant]}


def test_a_picture_of_another_report_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evidence, "RESULTS", tmp_path)
    monkeypatch.setattr(evidence, "PAGE", tmp_path / "EVIDENCE.md")
    for date in ("2026-01-01", "2026-01-02"):
        (tmp_path / f"{date}.json").write_text(json.dumps(_report(date)))
        assert evidence.main(["--ablation", str(tmp_path / f"{date}.json")]) == 0
        assert f"Gathered on {date}" in evidence.PAGE.read_text(encoding="utf-8")
        assert evidence.main(["--check"]) == 0
        if date == "2026-01-01":
            (tmp_path / "ablation.png").rename(tmp_path / "older.png")
    (tmp_path / "older.png").replace(tmp_path / "ablation.png")
    assert evidence.main(["--check"]) == 1
    assert "ablation.png is not of" in capsys.readouterr().err
    (tmp_path / "ablation.png").unlink()
    assert evidence.main(["--check"]) == 1
    assert "ablation.png is not of" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", b'{"base": {"preset": "none"}, "variants": []}']
)
def test_what_is_no_ablation_takes_no_ones_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    monkeypatch.setattr(evidence, "RESULTS", tmp_path)
    (tmp_path / "ablation.json").write_text("the one that is there")
    if content:
        (tmp_path / "other.json").write_bytes(content)
    assert evidence.main(["--ablation", str(tmp_path / "other.json")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("evidence.py: error: ")
    assert error.count("\n") == 1
    assert (tmp_path / "ablation.json").read_text() == "the one that is there"


def test_a_check_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence, "RESULTS", tmp_path)
    (tmp_path / "other.json").write_text(json.dumps(_report("2026-01-01")))
    with pytest.raises(SystemExit, match="2"):
        evidence.main(["--check", "--ablation", str(tmp_path / "other.json")])
    assert [path.name for path in tmp_path.iterdir()] == ["other.json"]
