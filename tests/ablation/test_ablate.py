"""`ict-fast ablate`: real runs, stopped and gone on with, and what it refuses."""

from __future__ import annotations

import errno
import io
import json
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from forked import ForkedPython
from small_presets import small

from ict_fast import cli, presets
from ict_fast.ablation import one_run, runs
from ict_fast.ablation.runs import Plan, gather, run_all
from ict_fast.ablation.summary import commands
from ict_fast.ablation.variants import Variant, preset_names, variants_of
from ict_fast.config import Config, from_dict, to_dict
from ict_fast.consistency.objective import revision
from ict_fast.errors import InputError, TrainingError

WORDS = ("ablate", "--only", "ict", "l2", "--seeds", "1", "--total-steps", "48", "--count", "64")
COMMAND = Path(__file__).with_name("small_presets.py")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The presets of the runs are those of the command line."""
    monkeypatch.setattr(presets, "get", small(presets.get))


@pytest.fixture(scope="module")
def ablation(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, str]:
    """(folder, exit code of a first call that was sent SIGTERM, output of a second one)."""
    folder = tmp_path_factory.mktemp("ablation")
    first = ForkedPython([COMMAND, *WORDS, "--device", "cpu"], folder / "first.txt", folder)
    log = folder / "runs/ablation/ict/seed-0/run/log.jsonl"
    deadline = time.monotonic() + 120
    while not log.exists() and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    complaint, _ = first.communicate(timeout=120)
    assert "the same command goes on" in complaint
    second = ForkedPython([COMMAND, *WORDS, "--device", "cpu"], folder / "second.txt", folder)
    output, _ = second.communicate(timeout=240)
    assert second.returncode == 0, output
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
        assert config["training"]["total_steps"] == 48
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
        (("--total-steps", "47"), "training.total_steps 48, now it is 47"),
        (("--count", "65"), "--count 64, now it is 65"),
        (("--only", "l3"), "--only names l3, which is no variant"),
        (("--only", "l3"), "--list shows them"),
        (("--preset", "imagenet64-ct2023"), "--preset is imagenet64-ct2023, which is not iCT"),
        (("--seeds", "0"), "--seeds is 0"),
        (("--seeds", "9" * 20), f"--seeds is {'9' * 20}; it must be at most 10,000"),
        (("--count", "9" * 20), f"--count is {'9' * 20}; it must be at most 1,000,000,000"),
        (("--parallel", "0"), "--parallel is 0"),
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


def test_a_folder_of_something_else_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "images.npy").touch()
    assert cli.main([*WORDS, "--out", str(tmp_path)]) == 2
    assert "is not empty and holds no ablation; choose another --out" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["images.npy"]


@pytest.mark.parametrize("preset", [name for name in preset_names() if name != "digits"])
def test_a_preset_that_cannot_be_measured_is_refused_before_a_run_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], preset: str
) -> None:
    """Nor are its data asked for. The features and the unit of the distances are those of the digits."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "_start", lambda *job: pytest.fail("a run is started"))
    assert cli.main([*WORDS, "--device", "cpu", "--preset", preset]) == 2
    error = capsys.readouterr().err
    assert f"--preset is {preset}; an ablation measures with the features of scikit-learn's digits" in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_list_names_every_variant_and_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["ablate", "--list", "--preset", "cifar10"]) == 0
    shown = capsys.readouterr().out.split()
    assert {variant.name for variant in variants_of(presets.get("cifar10"))} <= set(shown)
    assert list(tmp_path.iterdir()) == []


def _leave_result(plan: Plan, name: str, seed: int, **changes: object) -> None:
    """A finished run's result, made up."""
    (variant,) = (each for each in plan.variants if each.name == name)
    job = plan.job(variant, seed)
    measured = {"frechet_distance": 3.5, "relative_to_noise": 0.01}
    result = {"config": job.config, "asked_count": None, "one_step": measured, "two_step": measured}
    result["objective_revision"] = revision(from_dict(job.config).method)
    Path(job.folder).mkdir(parents=True, exist_ok=True)
    (Path(job.folder) / one_run.RESULT).write_text(json.dumps(result | {"seconds": 1.0} | changes))


def test_seeds_beyond_those_asked_for_are_reported_if_only_the_seed_differs(
    tiny: Config, tmp_path: Path
) -> None:
    variants = tuple(v for v in variants_of(tiny) if v.name in ("ict", "l2", "l1"))
    plan = Plan(tiny, variants, (0, 1), tmp_path, "cpu", 1)
    for name, seeds in {"ict": (0, 1, 2, 3), "l2": (0, 1, 2, 3), "l1": (0, 1)}.items():
        for seed in seeds:
            _leave_result(plan, name, seed)
    other = to_dict(replace(tiny, training=replace(tiny.training, total_steps=25, seed=4)))
    _leave_result(plan, "ict", 4, config=other)
    _leave_result(plan, "ict", 5, asked_count=64)
    _leave_result(plan, "ict", 6, config="broken")
    (tmp_path / "ict" / "seed-07").mkdir()
    (tmp_path / "ict" / "seed-8").mkdir()  # still running
    report = gather(plan)
    found = {each["name"]: [run["seed"] for run in each["runs"]] for each in report["variants"]}
    assert found == {"ict": [0, 1, 2, 3], "l2": [0, 1, 2, 3], "l1": [0, 1]}
    assert report["parallel"] == 1
    assert report["threads"] >= 1
    assert commands(report) == [
        "ict-fast ablate --total-steps 24 --only ict l2 --seeds 4",
        "ict-fast ablate --total-steps 24 --only ict l2 l1 --seeds 2",
    ]
    _leave_result(plan, "l1", 2, config=other)
    with pytest.raises(InputError, match=r"l1/seed-2/result.json: made with"):  # this one was asked for
        gather(replace(plan, seeds=(0, 1, 2)))
    _leave_result(plan, "l1", 2, objective_revision=1)
    with pytest.raises(InputError, match=r"made by another version, to which --method\.metric l1 meant"):
        gather(replace(plan, seeds=(0, 1, 2)))


def test_a_run_that_diverges_is_a_result(tiny: Config, tmp_path: Path) -> None:
    config = replace(
        tiny,
        optimizer=replace(tiny.optimizer, lr=1e38),
        training=replace(tiny.training, max_skipped_steps=1),
        logging=replace(tiny.logging, log_every=1),
    )
    plan = Plan(config, variants_of(config)[:1], (0,), tmp_path, "cpu", 1, count=16)
    ((_, _, job),) = plan.jobs()
    assert one_run.do(job) == 0
    result = json.loads((Path(job.folder) / one_run.RESULT).read_text())
    assert "finite" in result["failed"]
    assert result["config"] == to_dict(config)


@pytest.mark.parametrize(
    ("place", "error", "said"),
    [
        ("saving.write_checkpoint", OSError(errno.ENOSPC, "No space left on device"), "could not be saved"),
        ("step.TrainStep.__call__", MemoryError("cannot allocate memory"), "out of memory"),
    ],
    ids=["disk", "memory"],
)
def test_a_full_disk_and_too_little_memory_say_nothing_of_a_variant(
    tiny: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    place: str,
    error: Exception,
    said: str,
) -> None:
    """No result, which would be a seed that diverged: the same command makes the run again."""

    def fail(*arguments: object, **options: object) -> None:
        raise error

    plan = Plan(tiny, variants_of(tiny)[:1], (0,), tmp_path, "cpu", 1, count=16)
    ((_, _, job),) = plan.jobs()
    monkeypatch.setattr(f"ict_fast.training.{place}", fail)
    monkeypatch.setattr(one_run, "end_with", lambda parent: None)
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(asdict(job) | {"parent": 0})))
    assert one_run.main() == 1
    complaint = capsys.readouterr().err.splitlines()[-1]
    assert complaint.startswith("ict-fast: error:")
    assert said in complaint
    assert not (Path(job.folder) / one_run.RESULT).exists()


def test_a_run_of_other_settings_that_was_stopped_is_not_gone_on_with(tiny: Config, tmp_path: Path) -> None:
    """By the names that `ablate` has, before a process is started."""
    plan = Plan(tiny, variants_of(tiny)[:1], (0,), tmp_path, "cpu", 1)
    ((_, _, job),) = plan.jobs()
    begun = Path(job.folder) / one_run.RUN / "config.json"
    begun.parent.mkdir(parents=True)
    begun.write_text(json.dumps(job.config | {"training": job.config["training"] | {"total_steps": 25}}))
    with pytest.raises(InputError, match=r"made with training\.total_steps 25, now it is 24; choose"):
        run_all(plan, print)


def test_a_run_that_is_lost_takes_no_other_with_it(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of six runs, two at once, the first one's processes end without a result."""
    variants = tuple(v for v in variants_of(tiny) if v.name in ("ict", "l2", "l1"))
    plan = Plan(tiny, variants, (0, 1), tmp_path, "cpu", 2)

    def start(plan: Plan, variant: Variant, seed: int, job: one_run.Job, slot: int) -> runs._Running:
        folder, ends = Path(job.folder), int(variant.name == "ict")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / one_run.OUTPUT).write_text("Killed\n")
        if not ends:
            _leave_result(plan, variant.name, seed)
        process = subprocess.Popen([sys.executable, "-c", f"raise SystemExit({ends})"])
        return runs._Running(variant, seed, job, process, slot)

    monkeypatch.setattr(runs, "_start", start)
    said: list[str] = []
    with pytest.raises(TrainingError, match=r"^2 of 6 runs ended without a result; .*ict, seed 0, ended"):
        run_all(plan, said.append)
    assert sum("distance 3.50" in line for line in said) == 4
    assert sum("ended with 1: Killed" in line for line in said) == 2
    _leave_result(plan, "ict", 0)
    _leave_result(plan, "ict", 1)
    report = run_all(plan, said.append)
    assert isinstance(report, dict)
    assert [len(variant["runs"]) for variant in report["variants"]] == [2, 2, 2]
