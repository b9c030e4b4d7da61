"""The page as HTML: whole, self-contained, escaped, and true to the run's files."""

from __future__ import annotations

import base64
import io
import itertools
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ict_fast import presets
from ict_fast.consistency.curriculum import Extension, stages_trained
from ict_fast.report import page, read_run
from ict_fast.report.curves import Line, curve, heat_map
from ict_fast.report.style import STYLE

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


@pytest.mark.usefixtures("undrawn")
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


def _stage_labels(svg: str) -> list[tuple[float, str]]:
    """Place and text of what stands above the axes, by place."""
    found = re.findall(r'x="([\d.]+)" y="([\d.]+)"[^>]*>([\d,]+)</text>', svg)
    top = min(float(y) for _, y, _ in found)
    return sorted((float(x), label) for x, y, label in found if float(y) == top)


def test_no_number_of_levels_is_written_over_another() -> None:
    """A run of 1,200 steps that was extended to 4,800 at step 300: two short stages, then eight long ones."""
    method = presets.get("digits").method
    plans = {1200: [], 4800: [Extension(300, 1200)]}
    for total, extensions in plans.items():
        stages = stages_trained(total, method, extensions)
        svg = curve("name", [Line([1, 2], [1.0, 2.0])], total_steps=total, stages=stages)
        labels = _stage_labels(svg)
        assert [label for _, label in labels][-8:] == ["11", "21", "41", "81", "161", "321", "641", "1,281"]
        for (left, a), (right, b) in itertools.pairwise(labels):
            assert right - left > 9.5 * 0.55 * (len(a) + len(b)) / 2, (a, b)  # 9.5 pixels high, in figures


def _loss_alone(run: Path) -> None:
    """Leaves one curve and no picture, which take the time."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    kept = ("step", "loss")
    (run / "log.jsonl").write_text("".join(json.dumps({k: line[k] for k in kept}) + "\n" for line in lines))
    shutil.rmtree(run / "grids")


def test_the_note_says_of_the_curves_what_they_have(run: Path) -> None:
    """Borders of 8 stages, none of the 149 of a square-root curriculum, and a single stage."""
    _loss_alone(run)
    (run / "evaluations.jsonl").unlink()

    def note(**method: object) -> str:
        values = json.loads((run / "config.json").read_text())
        values["method"] |= method
        (run / "config.json").write_text(json.dumps(values))
        text = page(read_run(run))
        assert text.count("stroke-dasharray") > 0 or "Dashed lines" not in text
        return text

    doubling = note()
    assert "Dashed lines are the borders" in doubling
    assert "does not compare with that of another: its weights grow with N." in doubling
    square_root = note(curriculum="square-root", s0=2, s1=150, weighting="uniform")
    assert "Dashed lines" not in square_root
    assert "does not compare with that of another: the more levels, the nearer they are" in square_root
    assert "does not compare with that of another" not in note(curriculum="fixed", s0=10)


@pytest.mark.parametrize(("total", "last"), [(1_600, "1,600"), (1_601, "400"), (800_000, "400")])
def test_the_beginning_of_a_long_run_fills_the_axes(run: Path, total: int, last: str) -> None:
    _loss_alone(run)
    for file in (run / "config.json", run / "checkpoints/step-00000400/state.json"):
        content = json.loads(file.read_text())
        (content.get("config", content))["training"]["total_steps"] = total
        file.write_text(json.dumps(content))
    text = page(read_run(run))
    for name in ("Loss", "Fréchet distance"):
        chart = re.search(rf'<svg role="img" aria-label="{name}".*?</svg>', text, re.DOTALL)
        assert chart is not None
        found = re.findall(r'x="([\d.]+)" y="([\d.]+)"[^>]*>([\d.,k]+)</text>', chart[0])
        lowest = max(float(y) for _, y, _ in found)
        assert max((float(x), label) for x, y, label in found if float(y) == lowest)[1] == last
        levels = [label for _, label in _stage_labels(chart[0])]
        assert ("1,281" in levels) == (total == 1_600)
        assert max(float(x) for x, _, _ in found) < 330, "nothing is written beyond the figure"


def test_lines_of_one_chart_differ_in_more_than_colour_and_none_is_left_out() -> None:
    lines = [Line([1, 2], [float(i), i + 1.0], f"line {i}", marked=True) for i in range(14)]
    svg = curve("name", lines, total_steps=2)
    shapes = dict(re.findall(r'<path id="(m[^"]+)" d="([^"]+)"', svg))
    drawn = re.findall(r'xlink:href="#(m[^"]+)"[^>]*fill: (var\(--[a-z]+\))', svg)
    assert len({(shapes[name], colour) for name, colour in drawn}) == 14
    assert all(f">line {i}<" in svg for i in range(14))


def test_the_letters_of_the_curves_are_the_pages(run: Path) -> None:
    text = page(read_run(run))
    assert "DejaVu" not in text
    assert text.count("font-family") == STYLE.count("font-family")


def test_measurements_that_do_not_compare_are_not_joined(run: Path) -> None:
    """The run went on with more samples from step 300 on; then the features changed."""
    _loss_alone(run)
    features = {"name": "a", "sha256": "1"}
    lines = [
        {"step": step, "one_step": {"frechet_distance": distance}, "count": count, "features": of}
        for step, distance, count, of in (
            (100, 9.0, 500, features),
            (200, 8.0, 500, features),
            (300, 2.0, 5000, features),
            (400, 1.0, 5000, features | {"sha256": "2"}),
        )
    ]
    (run / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def strokes() -> tuple[int, str]:
        """How many pieces the line has."""
        text = page(read_run(run))
        chart = re.search(r'<svg role="img" aria-label="Fréchet distance".*?</svg>', text, re.DOTALL)
        assert chart is not None
        [line] = re.findall(r'<path d="([^"]+)"[^>]*style="fill: none; stroke: var\(--first\)', chart[0])
        return line.count("M "), text

    pieces, text = strokes()
    assert pieces == 3
    assert "changed at step 300 and 400, where the lines are broken: figures before and after do not" in text
    (run / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:2]))
    pieces, text = strokes()
    assert pieces == 1
    assert "are broken" not in text


def test_a_curve_of_two_steps_is_broken_where_the_second_noise_level_changes(run: Path) -> None:
    """And that of one step is not; the first line is of a version that did not write the levels."""
    _loss_alone(run)
    lines = [
        {
            "step": step,
            "one_step": {"frechet_distance": 9.0} | ({} if level is None else {"sigmas": [80.0]}),
            "two_step": {"frechet_distance": 8.0} | ({} if level is None else {"sigmas": [80.0, level]}),
            "sigmas": None,
        }
        for step, level in ((100, None), (200, 0.821), (300, 0.821), (400, 0.4))
    ]
    (run / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = page(read_run(run))
    chart = re.search(r'<svg role="img" aria-label="Fréchet distance".*?</svg>', text, re.DOTALL)
    assert chart is not None
    for name, pieces in (("first", 1), ("second", 3)):
        line = re.search(rf'<path d="([^"]+)"[^>]*style="fill: none; stroke: var\(--{name}\)', chart[0])
        assert line is not None
        assert line[1].count("M ") == pieces
    assert "or the noise levels changed at step 200 and 400, where" in text


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


@pytest.mark.usefixtures("undrawn")
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


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("counts", "row"),
    [([898, 899], "real, 898 to 899"), (None, "real, half to half"), ([1, "<b>"], "real, half to half")],
)
def test_the_row_of_real_halves_says_of_how_many_images_they_are(run: Path, counts: object, row: str) -> None:
    file = run / "checkpoints" / "evaluation.json"
    result = json.loads(file.read_text())
    result["reference"]["halves_counts"] = counts
    file.write_text(json.dumps(result))
    assert f"<td>{row}</td><td class='number'>2.28</td>" in page(read_run(run))


@pytest.mark.usefixtures("undrawn")
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


@pytest.mark.usefixtures("undrawn")
def test_a_learning_rate_has_a_curve_where_it_has_a_schedule(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    for rate, shown in ((lambda step: 1e-4, False), (lambda step: 1e-4 * min(1, step / 200), True)):
        changed = (json.dumps(line | {"learning_rate": rate(line["step"])}) + "\n" for line in lines)
        (run / "log.jsonl").write_text("".join(changed))
        assert ('aria-label="Learning rate"' in page(read_run(run))) is shown


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
