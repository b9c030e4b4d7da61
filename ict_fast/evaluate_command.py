"""The command that measures a run: what its images need of it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ict_fast.config import Config
from ict_fast.data.prepare import DIGITS_FINGERPRINT


def evaluate_command(run: Path, config: Config, state: Mapping[str, Any]) -> str:
    """What to type, with FILE.pt and DATA for what only a person can name.

    Args:
        run: its folder.
        config: its configuration.
        state: state.json of one of its checkpoints; empty if there is none.
    """
    seen = state.get("data_fingerprint")
    if seen is None:  # weights from elsewhere: only the size tells whether they may make digits
        has_features = (config.network.resolution, config.network.image_channels) == (8, 1)
    else:
        has_features = seen == DIGITS_FINGERPRINT
    features = config.logging.evaluate_features or (None if has_features else "FILE.pt")
    words = ["ict-fast", "evaluate", str(run)]
    words += ["--features", features] if features else []
    words += ["--reference", "DATA"] if "imported" in state else []
    return shlex.join(words)
