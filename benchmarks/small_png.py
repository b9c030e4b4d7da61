"""Plots as PNGs that a repository can hold: few colours, a fraction of the bytes, and of which result."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

_COLOURS = 200


def save_small(figure: Any, path: Path, dpi: int = 90) -> None:
    """Writes a matplotlib figure with a palette of its own, without a transparent channel."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=dpi, format="png")
    picture = Image.open(drawn).convert("RGB").quantize(_COLOURS, dither=Image.Dither.NONE)
    picture.save(path, optimize=True)


def record_source(picture: Path, source: Path) -> None:
    """Notes in a PNG of which file it shows: the SHA-256 of the file's bytes, as text `source-sha256`."""
    note = PngImagePlugin.PngInfo()
    note.add_text("source-sha256", hashlib.sha256(source.read_bytes()).hexdigest())
    with Image.open(picture) as shown:
        shown.load()
    shown.save(picture, pnginfo=note, optimize=True)
