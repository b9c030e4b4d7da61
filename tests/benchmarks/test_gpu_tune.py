"""Part tune of run_gpu.py: what is tried, and what is said of it."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(Path(__file__).parent)]

report_in: Any = importlib.import_module("reports").report_in
gpu_group_norm: Any = importlib.import_module("gpu_group_norm")
gpu_tune: Any = importlib.import_module("gpu_tune")
run_gpu: Any = importlib.import_module("run_gpu")


SIZES = (("cifar10", 512), ("imagenet64", 128))


@cache
def networks_norms() -> list[tuple[Any, int]]:
    return [(case, n) for preset, n in SIZES for case in gpu_group_norm.norm_cases(preset, n)]


def test_what_is_tried_can_be_computed_and_is_another_plan_each_time() -> None:
    for case, samples in networks_norms():
        for direction in gpu_tune.DIRECTIONS:
            present = gpu_tune.plan_of(case, samples, direction)
            plans, wishes = [present], []
            for choose in (gpu_tune.tiles, gpu_tune.warps_and_registers):
                wishes += gpu_tune.distinct(
                    choose(case, samples, direction, {}), case, samples, direction, plans
                )
            assert len(set(map(str, plans))) == len(plans) == len(wishes) + 1
            assert len({gpu_tune.label(each) for each in wishes}) == len(wishes)
            assert len(wishes) >= 7
            assert {plan.resident for plan in plans} >= {False, present.resident}
            for plan in plans:
                assert 32 * plan.num_warps * (plan.maxnreg or 1) < 65536


@pytest.mark.parametrize(
    ("preset", "norm", "direction", "wishes"),
    [
        # One program per processor by its registers; half of that with half of them, or with more warps.
        (
            "cifar10",
            "256 x 32 x 32, 32 groups, bf16, dropout, pre_bias",
            "backward",
            {"num_warps": 8, "maxnreg": 128},
        ),
        ("cifar10", "256 x 32 x 32, 32 groups, bf16, dropout, pre_bias", "backward", {"num_warps": 16}),
        ("imagenet64", "576 x 16 x 16, 32 groups, bf16", "forward", {"num_warps": 8, "maxnreg": 128}),
        # Chunks that a larger L2 holds, and none.
        (
            "imagenet64",
            "192 x 64 x 64, 32 groups, bf16",
            "backward",
            {"rows": 128, "chunk_bytes": 40 * 2**20},
        ),
        ("imagenet64", "192 x 64 x 64, 32 groups, bf16", "backward", {"rows": 256, "chunk_bytes": 2**62}),
    ],
)
def test_what_is_known_to_be_worth_a_try_is_tried(
    preset: str, norm: str, direction: str, wishes: dict[str, int]
) -> None:
    ((case, samples),) = (
        each for each in networks_norms() if each[0].preset == preset and str(each[0].norm) == norm
    )
    plans: list[Any] = []
    for choose in (gpu_tune.tiles, gpu_tune.warps_and_registers):
        gpu_tune.distinct(choose(case, samples, direction, {}), case, samples, direction, plans)
    resident = gpu_tune.plan_of(case, samples, direction).resident
    assert gpu_tune.plan_of(case, samples, direction, {"resident": resident} | wishes) in plans


def test_other_plans_are_held_to_the_present_ones_results_and_timed_beside_it() -> None:
    pytest.importorskip("triton")
    script = f"""
import sys
sys.path[:0] = {[str(ROOT / "benchmarks"), str(ROOT), str(ROOT / "kernels")]!r}
import json, torch, gpu_group_norm, gpu_tune
cases = gpu_group_norm.norm_cases("digits", 1)
(case,) = (each for each in cases if str(each.norm) == "24 x 4 x 4, 6 groups, bf16, pre_bias")
run = gpu_tune._run
def wrong_if_split(case, direction, wishes, *tensors):
    y, stats = run(case, direction, wishes, *tensors)
    return (y * 1.01, stats) if wishes.get("resident") is False else (y, stats)
gpu_tune._run = wrong_if_split
print(json.dumps(list(gpu_tune.tune(case, "forward", torch.device("cpu"), lambda: 0.0))))
"""
    finished = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    (record,) = json.loads(finished.stdout)
    assert record["failed"].keys() == {"split, 256 rows, 20 MB"}
    assert record["failed"]["split, 256 rows, 20 MB"].startswith("wrong: tensor 0 differs from the present")
    ((wishes, other),) = record["plans"].items()
    assert wishes == "2 groups, 1 warps"
    assert other["plan"]["groups"] == 2
    assert record["minimum_bytes"] == 2 * 2 * 24 * 4 * 4
    assert other["times_faster"] == pytest.approx(record["present"]["ms"] / other["ms"])
    for each in (other, record["present"]):
        assert each["ms_range"][0] <= each["ms"] <= each["ms_range"][1]
    faster = other["times_faster"]
    assert record["best"] == (other["wishes"] if faster > 1 else None)
    saved = 2 * record["uses_per_forward_pass"] * record["present"]["ms"] * (1 - 1 / faster)
    assert record["saves_ms"] == pytest.approx(max(0.0, saved))


def test_without_the_kernels_there_is_nothing_to_tune(tmp_path: Path) -> None:
    assert run_gpu.run_part("tune", tmp_path, 1800.0, "8 x 8, 6 groups") == 0
    results = report_in(tmp_path, "tune")["results"]
    assert results
    assert all("TRITON_INTERPRET" in each["not_measured"] for each in results)
