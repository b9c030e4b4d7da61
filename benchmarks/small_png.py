"""Plots as PNGs that a repository can hold: few colours, a fraction of the bytes."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from PIL import Image

_COLOURS = 200


def save_small(figure: Any, path: Path, dpi: int = 90) -> None:
    """Writes a matplotlib figure with a palette of its own, without a transparent channel."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=dpi, format="png")
    picture = Image.open(drawn).convert("RGB").quantize(_COLOURS, dither=Image.Dither.NONE)
    picture.save(path, optimize=True)
