"""What a step's time is of its floor: passes over memory that older files counted in it are told apart."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results"
sys.path.append(str(ROOT / "benchmarks"))

floor_figures: Any = importlib.import_module("floor_figures")
categories: Any = importlib.import_module("step_categories")


def call(operation: str, tensors: int, count: int, ms: float, **flags: Any) -> dict[str, Any]:
    shapes = [[8, 4, 2, 2], [4, 4, 3, 3], [4]][:tensors]
    return {"operation": operation, "shapes": shapes, "dtype": "bfloat16", "count": count, "ms": ms, **flags}


def test_a_call_with_a_bias_is_beyond_the_one_without() -> None:
    forward = [call("convolution", 3, 10, 0.5), call("convolution", 2, 4, 0.3)]
    backward = [call("convolution_backward", 3, 2, 1.0), call("convolution_backward", 3, 1, 0.75)]
    attention = [call("attention", 3, 5, 1.0), call("attention", 3, 5, 9.0)]
    floor = {"ms": 60.0, "calls": [*forward, *backward, *attention]}
    assert floor_figures.passes_over_memory(floor) == pytest.approx((2.0, 0.5))
    record = {"times_the_floor": 1.25, "floor": floor, "variants": {}}
    assert floor_figures.times_the_floor(record) == pytest.approx(75.0 / 57.5)
    assert floor_figures.ms_in_the_step(record) is None


def test_a_call_that_says_whether_it_has_a_bias_takes_nothing_beyond() -> None:
    calls = [call("convolution", 3, 10, 0.5, bias=True), call("convolution", 2, 4, 0.3, bias=False)]
    floor = {"ms": 6.2, "calls": calls}
    assert floor_figures.passes_over_memory(floor) == (0, 0)
    assert floor_figures.times_the_floor({"times_the_floor": 1.1, "floor": floor}) == 1.1
    assert floor_figures.times_the_floor({"variants": {}}) is None


def newest_steps(variant: str) -> list[dict[str, Any]]:
    """Those of both networks that have a floor and this variant."""
    found = {}
    for path in sorted(RESULTS.glob("step-NVIDIA-*.json"), key=lambda path: path.stem.split("-", 1)[1][-15:]):
        steps = [each for each in json.loads(path.read_text())["results"] if "floor" in each]
        found |= {each["name"]: each for each in steps if variant in each["variants"]}
    return [found[f"step, {preset}"] for preset in ("imagenet64", "cifar10")]


def test_the_analysis_of_the_steps_says_what_the_files_say() -> None:
    """Of both networks' newest steps: where our step's time goes, its floor; and plain torch's copies, of the
    newest that have it."""
    written = " ".join((RESULTS / "analysis.md").read_text(encoding="utf-8").split())
    claims = []
    for record in newest_steps("ict-fast"):
        ours = record["variants"]["ict-fast"]
        kernels = sum(ms for each, ms in ours["profile"]["ms"].items() if each != categories.IDLE)
        matrix = floor_figures.ms_in_the_step(record)
        none = ours["ms_per_step"] - kernels
        launches = sum(ours["profile"]["launches"].values())
        claims += [
            f"{matrix:.1f} ms are convolutions, products and attention",
            f"{kernels - matrix:.1f} memory-bound kernels",
            f"longer by {none:.1f} ({launches:,.0f} launches, {1e3 * none / launches:.1f} us each",
            f"{ours['ms_per_step'] / matrix:.2f} times what",
            f"{floor_figures.floor_ms(record['floor']):.1f} ms, and the step"
            f" {floor_figures.times_the_floor(record):.2f} times that",
        ]
    for record in newest_steps("torch, uncompiled"):
        ours, plain = (record["variants"][each] for each in ("ict-fast", "torch, uncompiled"))
        copies = [each for each in plain["profile"]["top"] if categories.is_copy_of_layout(each["name"])]
        copied = sum(each["ms"] for each in copies)
        claims += [
            f"{copied:.1f} of {plain['ms_per_step']:.1f} ms",
            f"{record['times_faster_than']['torch, uncompiled']:.2f} times as fast, without them"
            f" {(plain['ms_per_step'] - copied) / ours['ms_per_step']:.2f}",
        ]
    assert [claim for claim in claims if claim not in written] == []
