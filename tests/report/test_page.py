"""The page as HTML: whole, self-contained, escaped, and true to the run's files."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ict_fast.report import page, read_run
from ict_fast.report.curves import Line, curve, heat_map

VOID = {"meta", "link", "img", "br"}


class Checked(HTMLParser):
    """Reads a page, insists that tags nest, and collects what it would load."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.pictures: list[bytes] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(str(value))
            if name in ("src", "href", "xlink:href") and value:
                if value.startswith("data:image/png;base64,"):
                    self.pictures.append(base64.b64decode(value.partition(",")[2]))
                else:
                    self.links.append(value)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def checked(text: str) -> Checked:
    found = Checked()
    found.feed(text)
    found.close()
    assert found.open == []
    return found


def test_the_page_is_whole_and_asks_for_nothing_from_anywhere(run: Path) -> None:
    text = page(read_run(run))
    found = checked(text)
    assert "script" not in found.tags
    assert all(link.startswith(("#", "data:")) for link in found.links), found.links
    assert "default-src 'none'" in text
    assert not re.search(r"url\((?!#|'#|\"#)", text)
    assert len(found.ids) == len(set(found.ids)), "two figures share an id"
    assert set(re.findall(r"url\(#([^)]+)\)", text)) <= set(found.ids)


def test_every_picture_decodes_and_the_last_grid_is_there(run: Path) -> None:
    pictures = [Image.open(io.BytesIO(content)) for content in checked(page(read_run(run))).pictures]
    values = {picture.convert("L").getpixel((0, 0)) for picture in pictures if picture.size == (64, 64)}
    assert len(values) == 9  # of ten grids
    assert {20, 200} <= values  # the first and the last


def test_the_numbers_of_the_run_are_on_it(run: Path) -> None:
    text = page(read_run(run))
    for expected in (
        "1.609",  # one step
        "1.936",
        "352.6",  # noise
        "10,000 samples, seed 0",
        "NVIDIA H100 80GB HBM3",
        "2.13.0",
        "bfloat16",
        "d2565e4b",
        "inception score: the features file gives no probabilities",
        "Warning: the crop recipe of the reference is not known.",
        "MFU, median",
        "31.0%",
        "1.25 GB",
        "steps skipped",
        "Loss by noise level",
        "Waiting for data",
        "<mark>1, 4</mark> <small>preset: 1, 2</small>",
        "<mark>yes</mark> <small>preset: no</small>",
        "4 fields differ",
    ):
        assert expected in text, expected
    # 400 steps of 96 images at 1,000 images/s.
    assert "<b>38 s</b><span>of training</span>" in text


def test_every_stage_has_its_border_and_its_number_of_levels(run: Path) -> None:
    loss = re.search(r'<svg role="img" aria-label="Loss".*?</svg>', page(read_run(run)), re.DOTALL)
    assert loss is not None
    labels = re.findall(r">([\d,]+)</text>", loss[0])
    assert [n for n in ("11", "21", "41", "81", "161", "321", "641", "1,281") if n not in labels] == []


def test_the_loss_by_noise_level_is_drawn_at_its_true_steps() -> None:
    """Ten lines to step 100 and three to step 400: their border is at a quarter of the axis."""
    steps = [*range(10, 101, 10), 200, 300, 400]
    rows = [[1.0 if step <= 100 else 100.0] * 2 for step in steps]
    [content] = checked(heat_map("Loss", steps, rows, [0.01, 1.0, 100.0], 400)).pictures[:1]
    pixels = np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(int)
    middle = pixels[pixels.shape[0] // 2]
    borders = np.flatnonzero(np.abs(np.diff(middle, axis=0)).sum(1) > 100)
    assert borders.mean() / len(middle) == pytest.approx(0.25, abs=0.02)


def test_curves_of_zeros_and_shares_have_axes_to_one() -> None:
    def labels(**options: float) -> list[str]:
        svg = curve("name", [Line([1, 2], values)], total_steps=2, **options)
        return re.findall(r">([\d.]+)</text>", svg)

    for values in ([0.0, 0.0], [0.2, 0.02]):
        options = {} if max(values) == 0 else {"top": 1.0}
        assert "1.0" in labels(**options), values


def test_everything_that_a_file_says_is_escaped(run: Path) -> None:
    hostile = "</style><script>alert(1)</script>\"'&"
    values = json.loads((run / "config.json").read_text())
    values["data"]["path"] = hostile
    values["preset"] = hostile
    (run / "config.json").write_text(json.dumps(values))
    evaluation = json.loads((run / "checkpoints/evaluation.json").read_text())
    evaluation |= {"warnings": [hostile], "reference_path": hostile, "features": {"name": hostile}}
    evaluation |= {"not_available": {hostile: hostile}, f"{hostile}_step": {"frechet_distance": 1}}
    (run / "checkpoints/evaluation.json").write_text(json.dumps(evaluation))
    (run / "run.json").write_text(json.dumps({"device": hostile}))
    state = run / "checkpoints/step-00000400/state.json"
    state.write_text(json.dumps({"versions": {hostile: hostile}, "data_fingerprint": hostile}))
    renamed = run.rename(run.with_name("<script>alert(2)<&script>"))
    text = page(read_run(renamed))
    assert "script" not in checked(text).tags
    assert "alert(1)" in text  # shown, as text
    assert text.count("</style>") == 1


@pytest.mark.parametrize(
    "values",
    [
        {"one_step": 3, "reference": None, "features": [], "warnings": 7, "not_available": "x"},
        {"one_step": {"frechet_distance": "low"}, "count": "many"},
        {},
    ],
)
def test_an_evaluation_of_another_kind_does_not_end_it(run: Path, values: dict[str, object]) -> None:
    (run / "checkpoints/evaluation.json").write_text(json.dumps(values))
    (run / "evaluations.jsonl").write_text(json.dumps({"step": 100, **values}) + "\n")
    (run / "run.json").write_text(json.dumps({"sigma_edges": "none", "processes": "x", "device": []}))
    checked(page(read_run(run)))


def test_a_run_of_today_without_the_optional_figures_has_its_curves(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    kept = ("step", "loss", "num_scales", "skipped", "gradient_norm", "images_per_second", "time")
    (run / "log.jsonl").write_text("".join(json.dumps({k: line[k] for k in kept}) + "\n" for line in lines))
    for name in ("run.json", "evaluations.jsonl"):
        (run / name).unlink()
    text = page(read_run(run))
    assert re.findall(r'<svg role="img" aria-label="([^"]+)"', text) == [
        "Loss",
        "Gradient norm",
        "Images per second",
    ]
    assert "What is missing" not in text


def test_a_bare_run_says_what_is_missing(run: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((run / "config.json").read_bytes())
    text = page(read_run(bare))
    found = checked(text)
    assert found.pictures == []
    assert "What is missing" in text
    assert "the run has kept no grids; --logging.grid-every sets how often" in text


def test_a_log_of_a_hundred_thousand_lines_makes_a_page_of_the_same_size(run: Path) -> None:
    values = json.loads((run / "config.json").read_text())
    values["training"]["total_steps"] = 100_000
    (run / "config.json").write_text(json.dumps(values))
    short = len(page(read_run(run)))
    line = json.loads((run / "log.jsonl").read_text().splitlines()[0])
    with (run / "log.jsonl").open("w") as file:
        for step in range(1, 100_001, 2):
            file.write(json.dumps({**line, "step": step, "loss": 1 + step % 7}) + "\n")
    assert len(page(read_run(run))) < short + 600_000
