"""`ict-fast ablate`: real runs, stopped and gone on with, and what it refuses."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from ict_fast import cli
from ict_fast.ablation import Plan, one_run
from ict_fast.ablation.variants import VARIANTS
from ict_fast.config import Config, to_dict

WORDS = ("ablate", "--only", "ict", "l2", "--seeds", "1", "--total-steps", "40", "--count", "64")


def _start(folder: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "ict_fast", *WORDS, "--device", "cpu", *words]
    return subprocess.Popen(
        command, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )


@pytest.fixture(scope="module")
def ablation(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, str]:
    """(folder, exit code of a first call that was sent SIGTERM, standard output of a second one)."""
    folder = tmp_path_factory.mktemp("ablation")
    first = _start(folder)
    log = folder / "runs/ablation/ict/seed-0/run/log.jsonl"
    deadline = time.monotonic() + 120
    while not log.exists() and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    _, complaint = first.communicate(timeout=120)
    assert "the same command goes on" in complaint
    second = _start(folder)
    output, complaint = second.communicate(timeout=240)
    assert second.returncode == 0, complaint
    return folder, first.returncode, output


def test_a_stopped_ablation_goes_on(ablation: tuple[Path, int, str]) -> None:
    folder, first_code, _ = ablation
    assert first_code == 128 + signal.SIGTERM
    output = (folder / "runs/ablation/ict/seed-0/output.txt").read_text()
    assert "resuming at step" in output, "the first call's steps were not lost"


def test_the_report_holds_every_run_and_names_what_differs(ablation: tuple[Path, int, str]) -> None:
    folder, _, output = ablation
    report = json.loads((folder / "runs/ablation/ablation.json").read_text())
    found = {variant["name"]: variant for variant in report["variants"]}
    assert found.keys() == {"ict", "l2"}
    for name, variant in found.items():
        (run,) = variant["runs"]
        assert run["seed"] == 0
        assert 0 < run["one_step"]["relative_to_noise"] < 10
        config = json.loads((folder / f"runs/ablation/{name}/seed-0/run/config.json").read_text())
        assert config["method"]["metric"] == ("l2" if name == "l2" else "pseudo-huber")
        assert config["training"]["total_steps"] == 40
    assert "squared L2 instead of Pseudo-Huber" in output
    assert (folder / "runs/ablation/ablation.png").exists()


def test_a_finished_ablation_runs_nothing_again(
    ablation: tuple[Path, int, str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, _, _ = ablation
    monkeypatch.chdir(folder)
    before = (folder / "runs/ablation/ict/seed-0/result.json").stat().st_mtime_ns
    assert cli.main([*WORDS, "--device", "cpu"]) == 0
    assert "2 of 2 runs are done already" in capfd.readouterr().err
    assert (folder / "runs/ablation/ict/seed-0/result.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--total-steps", "30"), "training.total_steps 40, now it is 30"),
        (("--count", "65"), "--count 64, now it is 65"),
        (("--only", "l3"), "--only names l3, which is no variant"),
        (("--seeds", "0"), "--seeds is 0"),
        (("--parallel", "0"), "--parallel is 0"),
        (("--preset", "cifar10", "--out", "other"), "data/cifar10"),
    ],
)
def test_what_cannot_work_is_one_line(
    ablation: tuple[Path, int, str],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    complaint: str,
) -> None:
    monkeypatch.chdir(ablation[0])
    assert cli.main([*WORDS, "--device", "cpu", *words]) == 2
    error = capfd.readouterr().err.strip().splitlines()
    assert complaint in error[-1]
    assert error[-1].startswith("ict-fast: error:")


def test_a_run_that_diverges_is_a_result(tiny: Config, tmp_path: Path) -> None:
    config = replace(
        tiny,
        optimizer=replace(tiny.optimizer, lr=1e38),
        training=replace(tiny.training, max_skipped_steps=1),
        logging=replace(tiny.logging, log_every=1),
    )
    plan = Plan(config, VARIANTS[:1], (0,), tmp_path, "cpu", 1, count=16)
    ((_, _, job),) = plan.jobs()
    assert one_run.do(job) == 0
    result = json.loads((Path(job.folder) / one_run.RESULT).read_text())
    assert "finite" in result["failed"]
    assert result["config"] == to_dict(config)
