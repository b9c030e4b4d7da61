"""benchmarks/run_gpu.py: on a bare machine, when its time is up or a part fails, and what it counts."""

from __future__ import annotations

import importlib
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(Path(__file__).parent)]

report_in: Any = importlib.import_module("reports").report_in
gpu_tests: Any = importlib.import_module("gpu_tests")
machine: Any = importlib.import_module("machine")
results_index: Any = importlib.import_module("results_index")
run_gpu: Any = importlib.import_module("run_gpu")

CPU = torch.device("cpu")
ABSENT = (
    *("tyro", "safetensors", "PIL", "rich", "sklearn", "scipy", "torchmetrics", "matplotlib", "tensorboard"),
    *("yaml", "pytest", "nvidia.dali"),
)
BARE = """
import runpy, sys
for name in {absent!r}:
    sys.modules[name] = None  # importing it now fails
sys.argv = ["run_gpu.py", *sys.argv[1:]]
runpy.run_path({script!r}, run_name="__main__")
"""


def run_bare(
    *arguments: str, absent: Sequence[str] = ABSENT, **environment: str
) -> subprocess.CompletedProcess[str]:
    script = BARE.format(absent=absent, script=str(ROOT / "benchmarks/run_gpu.py"))
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


# ------------------------------------------------------------------------------------------ on a bare machine


def test_part_step_needs_torch_alone_and_writes_raw_json(tmp_path: Path) -> None:
    arguments = ("--part", "step", "--out", str(tmp_path), "--budget-seconds", "40")
    finished = run_bare(*arguments, absent=(*ABSENT, "numpy"))
    assert finished.returncode == 0, finished.stderr
    report = report_in(tmp_path, "step")
    assert report["part"] == "step"
    assert report["complete"]
    assert report["versions"]["torch"].startswith("2.")
    (result, *_) = report["results"]
    assert {"ict-fast, uncompiled", "torch, uncompiled"} == result["variants"].keys() | result[
        "left_out"
    ].keys()
    for figures in result["variants"].values():
        rate = result["batch_size"] / (figures["ms_per_step"] / 1e3)
        assert figures["images_per_second"] == pytest.approx(rate)
        times = [ms for each in figures["passes"] for ms in each["ms_all"]]
        assert len(times) in (10, 20)
        assert min(times) <= figures["ms_per_step"] <= max(times)
        # 2 FLOPs per multiply-add: forward twice, backward twice as much, of the network's 20 MFLOP.
        assert result["flops"] == pytest.approx(4 * result["batch_size"] * 21e6, rel=0.1)


@pytest.mark.drill
@pytest.mark.parametrize(
    ("part", "absent"), [("train", ()), ("profile", ()), ("profile", ("numpy",)), ("precision", ())]
)
def test_long_parts_run(part: str, absent: tuple[str, ...], tmp_path: Path) -> None:
    arguments = ("--part", part, "--out", str(tmp_path), "--budget-seconds", "20")
    finished = run_bare(*arguments, absent=(*ABSENT, *absent))
    assert finished.returncode == 0, finished.stderr
    (result,) = report_in(tmp_path, part)["results"]
    assert result.get({"train": "one_step", "profile": "profiles", "precision": "stages"}[part])


def test_what_the_parts_import_is_on_a_bare_machine() -> None:
    listed = """
import sys
sys.path.insert(0, {folder!r})
sys.modules |= dict.fromkeys({absent!r})
import run_gpu
for part in run_gpu.PARTS:
    print(part, list(run_gpu.PARTS[part](run_gpu.torch.device("cpu"), run_gpu.Session(None, 1.0))))
"""
    script = listed.format(folder=str(ROOT / "benchmarks"), absent=ABSENT)
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert [line.split()[0] for line in finished.stdout.splitlines()] == list(run_gpu.PARTS)


def test_part_kernels_runs_the_kernels_themselves_in_the_interpreter(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    arguments = (
        "--part",
        "kernels",
        "--out",
        str(tmp_path),
        "--only",
        "24 x 4 x 4, 6 groups, bf16, pre_bias",
    )
    finished = run_bare(*arguments, TRITON_INTERPRET="1")
    assert finished.returncode == 0, finished.stderr
    (result,) = report_in(tmp_path, "kernels")["results"]
    assert result["failed"] == {}
    for stage, tensors in (("forward", 2), ("backward", 3)):
        figures = result["stages"][stage]
        # bf16: x and y; x, dy and dx. The tile is resident, so nothing is read twice.
        assert figures["minimum_bytes"] == figures["bytes_moved"] == tensors * 2 * 4 * 24 * 4 * 4
        copy = min(figures["ms"]["copy"], figures["ms"]["copy by a kernel"])
        assert figures["percent_of_copy"] == pytest.approx(100 * copy / figures["ms"]["ict_kernels"])
        assert figures["percent_of_minimum_copy"] == pytest.approx(figures["percent_of_copy"])
        assert set(figures["times_faster_than"]) == {"eager"}
    # An ulp of bf16 at 8, which no output of unit variance reaches; the interpreter truncates to bf16.
    assert 0 < result["errors"]["y"]["max_error"] < 2**-4
    assert set(result["errors"]) == {"y", "dx", "dweight", "dbias", "dpre_bias"}


@pytest.mark.parametrize("interpreted", ["0", "1"])
def test_part_kernels_times_what_a_call_costs_the_host(interpreted: str, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    arguments = ("--part", "kernels", "--out", str(tmp_path), "--only", "host, ")
    finished = run_bare(*arguments, TRITON_INTERPRET=interpreted)
    assert finished.returncode == 0, finished.stderr
    (result,) = report_in(tmp_path, "kernels")["results"]
    calls = result["host_us"]
    assert list(calls) == [
        "group_norm_silu, forward",
        "group_norm_silu, forward and backward",
        "consistency_loss, forward and backward",
    ]
    for us in calls.values():
        assert us.keys() == {"ict_kernels", "eager"}
        assert min(us.values()) > 0


def test_without_pytest_nothing_was_measured_and_nothing_failed(tmp_path: Path) -> None:
    finished = run_bare("--part", "tests", "--out", str(tmp_path))
    assert finished.returncode == 0, finished.stderr
    results = report_in(tmp_path, "tests")["results"]
    assert len(results) > 10
    for each in results:
        assert each["not_measured"].startswith(("needs pytest", "needs compute-sanitizer", "needs a GPU"))
        assert "counts" not in each


def test_files_have_the_commit_that_the_call_names_else_gits(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("ICT_FAST_COMMIT", raising=False)
    monkeypatch.setattr(machine, "output_of", lambda *command: "9f8e7d6")
    assert machine.commit() == "9f8e7d6"
    monkeypatch.setenv("ICT_FAST_COMMIT", "0a1b2c3")
    assert machine.commit() == "0a1b2c3"
    monkeypatch.undo()
    monkeypatch.delenv("ICT_FAST_COMMIT", raising=False)
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    assert machine.commit() is None


def test_an_unknown_part_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run_gpu.main(["--part", "stpe"])
    assert stopped.value.code == 2
    assert "stpe" in capsys.readouterr().err


def test_a_file_in_place_of_the_folder_is_refused_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stopped:
        run_gpu.main(["--part", "step", "--out", str(tmp_path / "file")])
    assert stopped.value.code == 2
    assert "File exists" in capsys.readouterr().err


# ------------------------------------------------------------------------------ what a part does with results


@pytest.mark.parametrize("part", ["data", "dropin"])
def test_parts_need_no_other_package_and_name_what_is_absent(part: str, tmp_path: Path) -> None:
    finished = run_bare("--part", part, "--out", str(tmp_path))
    assert finished.returncode == 0, finished.stderr
    result, *others = report_in(tmp_path, part)["results"]
    if part == "data":
        assert others == []
        assert result["images_per_second_of"].keys() >= {"memmap", "resident", "DataLoader, 0 workers"}
        assert result["left_out"] == {"dali": "DALI is not installed"}
    else:
        assert len(others) == 3, "four code bases"
        for each in (result, *others):
            assert all(time > 0 for time in each["ms"].values())


def run_with(
    monkeypatch: pytest.MonkeyPatch, out: Path, measurements: dict[str, Callable[[], Any]], budget: str = "60"
) -> int:
    monkeypatch.setitem(run_gpu.PARTS, "kernels", lambda device, budget: measurements)
    code: int = run_gpu.main(["--part", "kernels", "--out", str(out), "--budget-seconds", budget])
    return code


def test_each_result_is_on_disk_before_the_next_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def second() -> dict[str, Any]:
        report = report_in(tmp_path, "kernels")
        assert not report["complete"]
        return {"seen": [each["name"] for each in report["results"]]}

    assert run_with(monkeypatch, tmp_path, {"first": lambda: {"figure": 1}, "second": second}) == 0
    report = report_in(tmp_path, "kernels")
    assert report["complete"]
    assert report["results"][0]["figure"] == 1
    assert report["results"][1]["seen"] == ["first"]


def test_what_fails_is_named_and_the_rest_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail() -> dict[str, Any]:
        raise RuntimeError("out of memory")

    assert run_with(monkeypatch, tmp_path, {"large": fail, "small": lambda: {"figure": 1}}) == 1
    large, small = report_in(tmp_path, "kernels")["results"]
    assert large["error"] == "RuntimeError: out of memory"
    assert small["figure"] == 1


def test_a_result_that_grows_is_on_disk_before_it_is_whole(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def growing() -> Iterator[dict[str, Any]]:
        yield {"variants": 1}
        assert report_in(tmp_path, "kernels")["results"][0]["variants"] == 1
        yield {"variants": 2}
        raise RuntimeError("out of memory")

    assert run_with(monkeypatch, tmp_path, {"step": growing}) == 1
    (result,) = report_in(tmp_path, "kernels")["results"]
    assert result["variants"] == 2
    assert result["error"] == "RuntimeError: out of memory"


def test_the_time_left_is_shared_among_what_is_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clock = [0.0]
    monkeypatch.setattr(run_gpu.time, "monotonic", lambda: clock[0])
    session = run_gpu.Session(tmp_path, 400.0)
    session.to_come = 2
    assert session.share() == 200.0
    clock[0], session.to_come = 150.0, 1
    assert session.share() == 250.0
    clock[0] = 500.0
    assert session.share() == 0.0


def test_what_the_budget_does_not_reach_is_named_and_no_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    clock = iter(range(0, 1000, 40))
    monkeypatch.setattr(run_gpu.time, "monotonic", lambda: next(clock))
    names = "abcdef"
    assert run_with(monkeypatch, tmp_path, {name: lambda: {"figure": 1} for name in names}, budget="100") == 0
    results = report_in(tmp_path, "kernels")["results"]
    assert [each["name"] for each in results] == list(names)
    measured = ["figure" in each for each in results]
    assert 0 < sum(measured) < len(names)
    assert measured == sorted(measured, reverse=True)
    assert all("100 s was used up" in each["not_measured"] for each in results if "figure" not in each)


def test_a_part_that_does_not_end_is_killed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_gpu, "GRACE_SECONDS", 0)
    assert run_gpu._run_alone("step", SimpleNamespace(out=tmp_path, budget_seconds=0.3)) == 1
    assert "step: killed" in capfd.readouterr().err


def test_all_parts_are_those_that_measure_what_is_here(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ran: list[str] = []
    monkeypatch.setattr(run_gpu, "_run_alone", lambda part, arguments: ran.append(part) or 0)
    assert run_gpu.main(["--part", "all", "--out", str(tmp_path)]) == 0
    assert tuple(ran) == results_index.PARTS
    assert set(run_gpu.PARTS) - set(ran) == {"tune"}


def test_the_commands_of_the_readme_choose_what_there_is_and_end_in_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = (ROOT / "benchmarks/README.md").read_text(encoding="utf-8")
    commands = [shlex.split(line) for line in text.splitlines() if "timeout -k" in line and "--part" in line]
    # Every variant of part step is profiled there.
    assert {words[words.index("--part") + 1] for words in commands} == set(run_gpu.PARTS) - {"profile"}
    chosen: list[Any] = []
    offered: dict[str, Any] = {}
    monkeypatch.setattr(run_gpu, "run_part", lambda *arguments: chosen.append(arguments) or 0)
    for number, words in enumerate(commands):
        words[words.index("$OUT")] = str(tmp_path)
        script = words.index("benchmarks/run_gpu.py")
        assert run_gpu.main(words[script + 1 :]) == 0
        part, out, seconds, only, variants = chosen[number]
        if part not in offered:
            session = run_gpu.Session(out, seconds, "", variants)
            offered[part] = run_gpu.PARTS[part](torch.device("cuda"), session)
        assert any(only in name for name in offered[part])
        grace = gpu_tests.GRACE_SECONDS if part == "tests" and "sanitizer" not in only else 10
        assert int(words[3]) > seconds + grace, "what runs when the budget ends is to end"
