"""Reports that no run made."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from ict_fast import presets
from ict_fast.ablation.variants import variants_of
from ict_fast.config import to_dict

sys.path.append(str(Path(__file__).parent))  # for small_presets.py

Distances = Mapping[str, Sequence[float | None]]


@pytest.fixture(scope="session")
def made_report() -> Callable[..., dict[str, Any]]:
    """A report of the digits with these one-step distances by variant, None for a seed that diverged.

    Distances are in units of noise; in two steps they are the same unless given.
    """
    preset = presets.get("digits")
    base = replace(preset, training=replace(preset.training, total_steps=600))

    def run(seed: int, one: float | None, two: float | None) -> dict[str, Any]:
        if one is None:
            return {"seed": seed, "failed": "diverged", "seconds": 7.0}
        measured = [{"frechet_distance": 350 * (v or 0), "relative_to_noise": v} for v in (one, two)]
        return {"seed": seed, "one_step": measured[0], "two_step": measured[1], "seconds": 60.0}

    def made(distances: Distances, two: Distances | None = None) -> dict[str, Any]:
        seconds = {**distances, **(two or {})}
        variants = []
        for variant in variants_of(base):
            pairs = zip(distances.get(variant.name, ()), seconds.get(variant.name, ()), strict=True)
            runs = [run(seed, *pair) for seed, pair in enumerate(pairs)]
            variants.append({**asdict(variant), "runs": runs})
        return {
            "date": "2026-01-02",
            "base": to_dict(base),
            "asked_count": None,
            "reference": {"halves": 2.0, "noise": 350.0, "gaussian": 24.0, "count": 1797},
            "count": 10_000,
            "versions": {"ict_fast": "0.0.0"},
            "machine": "abacus",
            "device": "cpu, 2 cores",
            "parallel": 2,
            "threads": 1,
            "variants": variants,
        }

    return made
