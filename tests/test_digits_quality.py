"""The default run reaches its quality for every seed: the long form, by `make drills` (about ten minutes)."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/digits-quality.json"


def _run(*words: str, cwd: Path) -> None:
    threads = {"OMP_NUM_THREADS": str(os.cpu_count())}
    command = [sys.executable, "-m", "ict_fast", *words]
    run = subprocess.run(command, cwd=cwd, env={**os.environ, **threads}, stderr=subprocess.PIPE, check=False)
    assert run.returncode == 0, run.stderr.decode()


@pytest.fixture(scope="module")
def evaluations(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """evaluation.json of three seeds; the raw results are kept whether they pass or not."""
    folder = tmp_path_factory.mktemp("quality")
    found = []
    for seed in range(3):
        run = f"runs/seed-{seed}"
        _run("train", "--training.seed", str(seed), "--out", run, "--device", "cpu", cwd=folder)
        _run("evaluate", run, "--device", "cpu", cwd=folder)
        evaluation = json.loads((folder / run / "checkpoints/evaluation.json").read_text())
        records = [json.loads(line) for line in (folder / run / "log.jsonl").read_text().splitlines()]
        seconds = records[-1]["time"] - records[0]["time"]
        found.append(
            {"training_seed": seed, "seconds_from_first_to_last_log": round(seconds, 1), **evaluation}
        )
    machine = {"processor": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
    RESULTS.write_text(json.dumps({"machine": machine, "runs": found}, indent=1) + "\n")
    return found


@pytest.mark.drill
def test_one_step_is_below_1_5_percent_of_noise_and_half_of_the_gaussian(evaluations: list[dict]) -> None:
    for evaluation in evaluations:
        distance, reference = evaluation["one_step"]["frechet_distance"], evaluation["reference"]
        assert distance < 0.015 * reference["noise"]
        assert distance < 0.5 * reference["gaussian"]


@pytest.mark.drill
def test_two_steps_are_at_most_a_fifth_worse_than_one(evaluations: list[dict]) -> None:
    for evaluation in evaluations:
        one, two = (evaluation[name]["frechet_distance"] for name in ("one_step", "two_step"))
        assert two <= 1.2 * one + evaluation["reference"]["halves"]
