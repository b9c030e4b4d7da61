"""The JSON that run_gpu.py leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def report_in(folder: Path, part: str) -> dict[str, Any]:
    (path,) = folder.glob(f"{part}-*.json")
    report: dict[str, Any] = json.loads(path.read_text())
    return report
