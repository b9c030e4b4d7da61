"""The report in headless Chromium: no console message, every picture decoded, readable wide and narrow."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ict_fast.report import page, read_run

_NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, _NAMES)), None)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium here (Debian: apt-get install chromium)"
)

# Runs in a copy of the page, as the page itself forbids scripts.
MEASURE = """<script>
const images = [...document.images, ...[...document.querySelectorAll("svg image")].map(drawn => {
  const copy = new Image();  // the page's load event waits for it
  copy.src = drawn.href.baseVal;
  return copy;
})];
addEventListener("load", () => {
  const texts = [...document.querySelectorAll("svg text")].map(text => {
    const scale = text.getScreenCTM();
    return parseFloat(getComputedStyle(text).fontSize) * Math.hypot(scale.a, scale.b);
  });
  document.documentElement.setAttribute("data-measured", JSON.stringify({
    images: images.map(image => image.complete && image.naturalWidth),
    charts: [...document.querySelectorAll("svg")].map(svg => svg.getBoundingClientRect().height),
    smallest: Math.min(...texts),
    width: innerWidth,
    overflow: document.documentElement.scrollWidth - innerWidth,
    ink: getComputedStyle(document.querySelector("svg text")).fill,
  }));
});
</script>"""


def chromium(folder: Path, file: Path, *options: str) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    return subprocess.run(
        [
            *(CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            *("--no-first-run", "--disable-dev-shm-usage", f"--user-data-dir={folder / 'profile'}"),
            *options,
            file.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )


def measured(folder: Path, text: str, *options: str) -> dict[str, Any]:
    copy = folder / "copy.html"
    copy.write_text(re.sub(r"<meta http-equiv=[^>]*>", "", text).replace("</body>", f"{MEASURE}</body>"))
    dom = chromium(folder, copy, "--dump-dom", *options).stdout
    found = re.search(r'data-measured="([^"]*)"', dom)
    assert found is not None, dom[:500]
    return json.loads(html.unescape(found[1]))


def test_it_is_shown_without_a_word_on_the_console(run: Path, tmp_path: Path) -> None:
    text = page(read_run(run))
    report = tmp_path / "report.html"
    report.write_text(text)
    picture = tmp_path / "shown.png"
    logged = chromium(tmp_path, report, "--enable-logging=stderr", f"--screenshot={picture}").stderr
    assert "CONSOLE" not in logged
    with Image.open(picture) as shown:
        assert len(shown.convert("L").getcolors()) > 50  # a page, not a blank
    # What would be said is heard: the page's own rules forbid this script.
    report.write_text(text.replace("</body>", "<script>1</script></body>"))
    assert "CONSOLE" in chromium(tmp_path, report, "--enable-logging=stderr", "--dump-dom").stderr


@pytest.mark.parametrize("width", [1200, 500])
def test_every_picture_is_decoded_and_nothing_is_cut_off_or_tiny(
    run: Path, tmp_path: Path, width: int
) -> None:
    found = measured(tmp_path, page(read_run(run)), f"--window-size={width},900")
    assert found["width"] == width
    assert len(found["images"]) == 9 + 1 + 1  # grids, and in SVG the map of losses and its scale of colours
    assert all(found["images"]), found["images"]
    assert len(found["charts"]) >= 8
    assert min(found["charts"]) > 100
    assert found["overflow"] <= 0
    assert found["smallest"] >= 8.5


def test_the_curves_follow_a_dark_page(run: Path, tmp_path: Path) -> None:
    text = page(read_run(run))
    light = measured(tmp_path, text)
    dark = measured(tmp_path, text.replace("(prefers-color-scheme: dark)", "all"))
    assert light["ink"] != dark["ink"]
