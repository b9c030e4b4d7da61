"""benchmarks/run_gpu.py: on a bare machine, when its time is up or a part fails, and what it counts."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))

gpu_step: Any = importlib.import_module("gpu_step")
gpu_group_norm: Any = importlib.import_module("gpu_group_norm")
gpu_sanitizer: Any = importlib.import_module("gpu_sanitizer")
gpu_tests: Any = importlib.import_module("gpu_tests")
gpu_timing: Any = importlib.import_module("gpu_timing")
gpu_tune: Any = importlib.import_module("gpu_tune")
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


def report_in(folder: Path, part: str) -> dict[str, Any]:
    (path,) = folder.glob(f"{part}-*.json")
    report: dict[str, Any] = json.loads(path.read_text())
    return report


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
@pytest.mark.parametrize(("part", "absent"), [("train", ()), ("profile", ()), ("profile", ("numpy",))])
def test_parts_train_and_profile_run(part: str, absent: tuple[str, ...], tmp_path: Path) -> None:
    arguments = ("--part", part, "--out", str(tmp_path), "--budget-seconds", "20")
    finished = run_bare(*arguments, absent=(*ABSENT, *absent))
    assert finished.returncode == 0, finished.stderr
    (result,) = report_in(tmp_path, part)["results"]
    assert result.get("one_step" if part == "train" else "profiles")


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
        assert set(figures["times_faster_than"]) == {"eager"}
    # An ulp of bf16 at 8, which no output of unit variance reaches; the interpreter truncates to bf16.
    assert 0 < result["errors"]["y"]["max_error"] < 2**-4
    assert set(result["errors"]) == {"y", "dx", "dweight", "dbias", "dpre_bias"}


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


# -------------------------------------------------------------------------------------------- the GPU's tests


def write_tests(folder: Path, **files: str) -> None:
    for name, text in files.items():
        (folder / f"test_{name}.py").write_text(textwrap.dedent(text))


@pytest.fixture
def part_tests(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., tuple[int, dict[str, dict[str, Any]]]]:
    """Runs part tests on the files of tmp_path; its exit code, and the results by the file's name."""
    monkeypatch.setattr(gpu_tests, "FOLDER", tmp_path)

    def run(budget: float = 1800.0, only: str = "tests/gpu/", processes: int = 1) -> tuple[int, dict]:
        monkeypatch.setattr(gpu_tests, "PROCESSES", processes)
        out = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
        out.mkdir()
        code = run_gpu.run_part("tests", out, budget, only)
        return code, {each["name"].split("/")[-1]: each for each in report_in(out, "tests")["results"]}

    return run


def test_every_outcome_of_a_test_is_written_and_an_absent_package_is_no_error(
    part_tests: Callable[..., Any], tmp_path: Path
) -> None:
    write_tests(
        tmp_path,
        outcomes="""
        import pytest
        @pytest.fixture
        def broken():
            raise OSError("no device")
        def test_passes(): pass
        def test_fails(): assert 1 == 2
        def test_skips(): pytest.skip("needs a GPU")
        def test_errs(broken): pass
        """,
        needs_a_package="import a_package_that_nobody_has",
        is_broken="import ict_kernels.not_there",
    )
    code, results = part_tests()
    assert code == 1
    assert list(results) == ["test_is_broken.py", "test_needs_a_package.py", "test_outcomes.py"]
    found = results["test_outcomes.py"]
    assert found["counts"] == {"passed": 1, "failed": 1, "skipped": 1, "error": 1}
    assert "assert 1 == 2" in found["error"]
    outcomes = {each["name"].split("::")[-1]: (each["outcome"], each["reason"]) for each in found["tests"]}
    assert outcomes["test_passes"] == ("passed", None)
    assert "assert 1 == 2" in outcomes["test_fails"][1]
    assert "no device" in outcomes["test_errs"][1]
    assert results["test_is_broken.py"]["counts"] == {"error": 1}
    absent = results["test_needs_a_package.py"]
    assert "error" not in absent
    assert absent["tests"][0]["reason"] == "needs a_package_that_nobody_has, which is not installed"


def test_processes_share_the_tests_and_one_that_crashes_takes_its_own_test_alone(
    part_tests: Callable[..., Any], tmp_path: Path
) -> None:
    shared = """
    import os, time, pathlib, pytest
    @pytest.fixture(scope="module", autouse=True)
    def resource(request):
        yield
    @pytest.mark.parametrize("number", range(4))
    def test_number(number):
        with open(pathlib.Path(__file__).parent / "ran", "a") as file:
            file.write(f"{__name__} {number} {os.getpid()}\\n")
        time.sleep(0.2)
    """
    crash = "import os\ndef test_a_crash(): os._exit(7)\ndef test_next(): pass\n"
    write_tests(tmp_path, group_norm_silu=shared, graph=shared, another=crash)
    code, results = part_tests(processes=2)
    assert code == 1
    assert list(results) == ["test_group_norm_silu.py", "test_another.py", "test_graph.py"]
    assert results["test_group_norm_silu.py"]["counts"] == results["test_graph.py"]["counts"] == {"passed": 4}
    assert results["test_another.py"]["counts"] == {"error": 1, "passed": 1}
    assert "exit code 7" in results["test_another.py"]["error"]
    ran = [line.split() for line in (tmp_path / "ran").read_text().splitlines()]
    assert len({(file, number) for file, number, _ in ran}) == len(ran) == 8
    assert len({process for _, _, process in ran}) == 4, "two of the first files, two of the last"


def test_a_file_can_be_chosen_and_tests_of_large_tensors_are_a_name_of_their_own(
    part_tests: Callable[..., Any], tmp_path: Path
) -> None:
    text = "def test_small(): pass\ndef test_more_than_2_31_elements(): pass\n"
    write_tests(tmp_path, noising=text, other=text)
    code, results = part_tests(only="noising")
    assert code == 0
    assert [each["name"].split("::")[-1] for each in results["test_noising.py"]["tests"]] == ["test_small"]
    code, results = part_tests(only="more than 2^31")
    assert code == 0
    (found,) = results.values()
    assert found["counts"] == {"passed": 2}
    assert all("test_more_than_2_31_elements" in each["name"] for each in found["tests"])


def test_a_process_begins_no_test_after_the_budget_and_leaves_those_of_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    worker = gpu_tests.worker
    clock = [98.0]
    monkeypatch.setattr(worker.time, "time", lambda: clock[0])
    for name, value in ((worker.FOLDER, str(tmp_path)), (worker.NUMBER, "0"), (worker.DEADLINE, "100.0")):
        monkeypatch.setenv(name, value)
    (tmp_path / "claims").mkdir()
    ran = []

    def run(item: Any, nextitem: None) -> None:
        ran.append(item.nodeid)
        clock[0] += 1.5

    config = SimpleNamespace(hook=SimpleNamespace(pytest_runtest_protocol=run))
    items = [SimpleNamespace(nodeid=name, config=config) for name in "abcd"]
    assert worker._claimed("a"), "another process's"
    assert worker.pytest_runtestloop(SimpleNamespace(items=items))
    assert ran == ["b", "c"]


@pytest.fixture
def hanging_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of pytest: one test passed, one does not end, one is left in each of two files."""
    worker = gpu_tests.worker
    lines: list[dict[str, Any]] = [
        {
            "collected": [
                f"test_{file}.py::test_{name}" for file in "ab" for name in ("quick", "endless", "late")
            ]
        },
        {"claimed": "test_a.py::test_quick"},
        worker.outcome("test_a.py::test_quick", "passed", 0.1),
        {"done": "test_a.py::test_quick"},
        {"claimed": "test_a.py::test_endless"},
    ]

    class Process:
        returncode: int | None = None

        def __init__(self, command: list[str], *, env: dict[str, str], **options: Any) -> None:
            path = Path(env[worker.FOLDER]) / f"{env[worker.NUMBER]}.jsonl"
            path.write_text("".join(f"{json.dumps(line)}\n" for line in lines) + '{"claimed": "half a li')

        def poll(self) -> int | None:
            return self.returncode

        def kill(self) -> None:
            self.returncode = -9

        def wait(self) -> None:
            assert self.returncode is not None

    fake = SimpleNamespace(Popen=Process, DEVNULL=subprocess.DEVNULL, STDOUT=subprocess.STDOUT)
    monkeypatch.setattr(gpu_tests, "subprocess", fake)


@pytest.mark.usefixtures("hanging_process")
def test_what_the_time_does_not_reach_is_said_test_by_test(
    part_tests: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    used = iter((0.0, *[2000.0] * 10))  # the first file takes more than the budget
    monkeypatch.setattr(run_gpu.Session, "used", lambda self: next(used))
    monkeypatch.setattr(run_gpu.Session, "left", lambda self: 0.0)
    monkeypatch.setattr(gpu_tests, "GRACE_SECONDS", 0.0)
    write_tests(tmp_path, a="", b="")
    code, results = part_tests()
    assert code == 1
    outcomes = {each["name"].split("::")[-1]: each for each in results["test_a.py"]["tests"]}
    assert outcomes["test_quick"]["outcome"] == "passed"
    assert outcomes["test_endless"]["outcome"] == "error"
    assert "killed (exit code -9)" in outcomes["test_endless"]["reason"]
    assert outcomes["test_late"]["outcome"] == "not run"
    # Begun with the first file, it is asked for although the time is up.
    assert results["test_b.py"]["not_measured"] == "3 not run: the budget was used up"
    assert results["test_b.py"]["counts"] == {"not run": 3}


@pytest.mark.usefixtures("hanging_process")
def test_what_a_file_has_so_far_is_given_before_it_ends(tmp_path: Path) -> None:
    records = gpu_tests.Workers([tmp_path / "test_a.py"], 60.0, 1).results(tmp_path / "test_a.py")
    assert next(records)["not_measured"] == "2 not run, 1 passed: not reached yet"


def test_the_order_of_the_files_names_files_that_are_there() -> None:
    names = [path.stem.removeprefix("test_") for path in gpu_tests._in_order(gpu_tests.FOLDER.glob("test_*"))]
    assert tuple(names[: len(gpu_tests.FIRST)]) == gpu_tests.FIRST
    assert names[-1:] == list(gpu_tests.LAST)


def test_without_pytest_nothing_was_measured_and_nothing_failed(tmp_path: Path) -> None:
    finished = run_bare("--part", "tests", "--out", str(tmp_path))
    assert finished.returncode == 0, finished.stderr
    results = report_in(tmp_path, "tests")["results"]
    assert len(results) > 10
    for each in results:
        assert each["not_measured"].startswith(("needs pytest", "needs compute-sanitizer", "needs a GPU"))
        assert "counts" not in each


def test_what_runs_under_the_sanitizer_launches_every_kernel() -> None:
    pytest.importorskip("triton")
    sources = [path.read_text() for path in (ROOT / "kernels/ict_kernels").glob("*.py")]
    kernels = {name for text in sources for name in re.findall(r"\blaunch\(\s*(\w+),", text)}
    assert len(kernels) > 10
    finished = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/gpu_sanitizer.py")],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert {line.removeprefix("launched ") for line in finished.stdout.splitlines()} == kernels


FAKE_SANITIZER = """#!/bin/sh
echo "========= COMPUTE-SANITIZER"
test "$PYTORCH_NO_CUDA_MEMORY_CACHING" = 1 || exit 3
{found}
"""


@pytest.mark.parametrize(
    ("found", "error"),
    [
        ('echo "launched a"; echo "========= ERROR SUMMARY: 0 errors"', None),
        (
            'echo "launched a"; echo "========= ERROR SUMMARY: 2 errors"; exit 99',
            "memcheck: exit code 99: ========= ERROR SUMMARY: 2 errors",
        ),
        ('echo "no module" >&2; exit 1', "memcheck: exit code 1: no module"),
        ('echo "========= ERROR SUMMARY: 0 errors"', "exit code 0"),  # nothing ran
    ],
)
def test_what_the_sanitizer_finds_is_an_error_and_so_is_a_script_that_fails(
    found: str, error: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    binary = tmp_path / "compute-sanitizer"
    binary.write_text(FAKE_SANITIZER.format(found=found))
    binary.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(gpu_sanitizer.torch.cuda, "is_available", lambda: True)
    record = gpu_sanitizer.sanitize("memcheck", lambda: 60.0)
    if error is None:
        assert record["kernels"] == ["a"]
        assert "error" not in record
    else:
        assert error in record["error"]


def test_files_that_came_without_git_have_the_commit_that_the_call_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ICT_FAST_COMMIT", "0a1b2c3")
    assert machine.commit() != "0a1b2c3", "git knows better"
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    assert machine.commit() == "0a1b2c3"
    monkeypatch.delenv("ICT_FAST_COMMIT")
    assert machine.commit() is None


# ------------------------------------------------------------------------------------------------- the timing


@pytest.mark.parametrize(
    ("preset", "norms", "elements"), [("cifar10", 73, 9.14e6), ("imagenet64", 95, 35.06e6)]
)
def test_the_cases_are_all_norms_of_the_network(preset: str, norms: int, elements: float) -> None:
    cases = gpu_group_norm.norm_cases(preset, 1)
    assert sum(case.uses for case in cases) == norms
    total = sum(case.uses * case.norm.channels * case.norm.size**2 for case in cases)
    assert total == pytest.approx(elements, rel=1e-3)
    assert sum(case.share for case in cases) == pytest.approx(1.0)
    assert [case.share for case in cases] == sorted((case.share for case in cases), reverse=True)


def test_a_copy_moves_as_many_bytes_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    buffers: list[torch.Tensor] = []
    empty = torch.empty

    def noted(*size: int, **options: Any) -> torch.Tensor:
        buffers.append(empty(*size, **options))
        return buffers[-1]

    monkeypatch.setattr(gpu_timing.torch, "empty", noted)
    kinds = gpu_timing.copies({"forward": 4096, "backward": 8192}, 3, CPU)
    for stages, sign in zip(kinds.values(), (1, -1), strict=True):
        for stage, moved in (("forward", 4096), ("backward", 8192)):
            for number in range(3):
                source, target = buffers[2 * number : 2 * number + 2]
                target.zero_()
                stages[stage](number, None)
                copied = moved // 2 // 4  # read and written, fp32
                assert torch.equal(target[:copied], sign * source[:copied])
                assert not target[copied:].any()


class FakeGraph:
    """Records what is captured and, on replay, says that it ran."""

    capturing: FakeGraph | None = None
    log: list[Any] = []  # noqa: RUF012

    def __init__(self) -> None:
        self.captured: list[Any] = []

    def replay(self) -> None:
        FakeGraph.log.append(("replay", *self.captured))


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """torch.cuda with a device whose clock advances by the number of calls that a graph holds."""
    log: list[Any] = []
    monkeypatch.setattr(FakeGraph, "log", log)

    @contextmanager
    def graph(captured: FakeGraph, pool: object, stream: object) -> Iterator[None]:
        assert stream == "side stream"
        FakeGraph.capturing = captured
        yield
        FakeGraph.capturing = None

    @contextmanager
    def on_stream(stream: object) -> Iterator[None]:
        yield

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.time = sum(len(entry) - 1 for entry in log)

        def elapsed_time(self, end: Event) -> float:
            return float(end.time - self.time)

    fakes = {
        "CUDAGraph": FakeGraph,
        "graph": graph,
        "graph_pool_handle": object,
        "Stream": lambda: "side stream",
        "current_stream": lambda: "side stream",
        "stream": on_stream,
        "synchronize": lambda: None,
        "_sleep": lambda cycles: None,
        "Event": Event,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return log


def test_on_a_gpu_every_set_is_captured_once_and_graphs_take_turns(fake_cuda: list[Any]) -> None:
    def stages(variant: str, work: int) -> dict[str, Any]:
        def stage(name: str) -> Callable[[int, Any], Any]:
            def call(number: int, kept: Any) -> Any:
                if FakeGraph.capturing is not None:
                    assert kept == (None if name == "forward" else ("forward", number))
                    FakeGraph.capturing.captured += [(variant, name, number)] * work
                return name, number

            return call

        return {"forward": stage("forward"), "backward": stage("backward")}

    def impossible(number: int, kept: Any) -> Any:
        try:
            raise ValueError("no kernel for this shape")
        finally:
            raise RuntimeError("capture failed")

    variants = {
        "ict_kernels": stages("ours", 1),
        "other": {"forward": impossible},
        "eager": stages("eager", 7),
    }
    timings = gpu_timing.time_variants(variants, 3, SimpleNamespace(type="cuda"))
    # One unit of time per call: a call's time is its work, whatever the number of sets.
    assert timings.medians("forward") == timings.medians("backward") == {"ict_kernels": 1.0, "eager": 7.0}
    reason = "RuntimeError: capture failed; first ValueError: no kernel for this shape"
    assert timings.failed == {"other": reason}
    order = [(entry[1][0], entry[1][1]) for entry in fake_cuda]
    turn = [("ours", "forward"), ("ours", "backward"), ("eager", "forward"), ("eager", "backward")]
    assert order == turn * (len(order) // 4)
    assert len(timings.milliseconds["forward"]["eager"]) == gpu_timing.ROUNDS
    for entry in fake_cuda:
        assert set(Counter(number for _, _, number in entry[1:])) == {0, 1, 2}


# ------------------------------------------------------------------------------------- whole steps, and parts


@pytest.fixture
def measured_steps(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """The record of both variants of the digits' step at 32 images; `fits(name, images)` says what runs."""

    def measure(fits: Callable[[str, int], bool], budget: float = 600.0) -> dict[str, Any]:
        def time_variant(name: str, config: Any, device: torch.device) -> dict[str, Any]:
            images = config.training.batch_size
            if not fits(name, images):
                raise torch.OutOfMemoryError("CUDA out of memory")
            figures = {"ms_all": [float(images)], "host_ms": 1.0, "matrix_tflop_per_s": None}
            return figures | {"first_step_s": 1.0, "parameters": 1, "peak_memory_bytes": None}

        monkeypatch.setattr(gpu_step, "_time_variant", time_variant)
        monkeypatch.setattr(gpu_step, "ceilings", lambda kind: {"matrix_tflop_per_s": {"fp32": 1.0}})
        monkeypatch.setattr(gpu_step, "count_step", lambda preset, images: {"flops": 1e9 * images})
        *_, record = gpu_step.measure_steps("digits", 32, CPU, budget)
        return dict(record)

    return measure


def test_a_baseline_that_does_not_fit_takes_all_variants_to_half_the_batch(
    measured_steps: Callable[..., dict[str, Any]],
) -> None:
    record = measured_steps(lambda name, images: name != gpu_step.PLAIN or images <= 16)
    assert record["batch_size"] == 16
    assert {name: each["ms_per_step"] for name, each in record["variants"].items()} == dict.fromkeys(
        gpu_step.CPU_VARIANTS, 16.0
    )
    assert record["failed"] == record["left_out"] == {}
    assert "error" not in record
    assert record["larger_batches"]["32"].keys() == {gpu_step.CPU_VARIANTS[0]}
    late = measured_steps(lambda name, images: name != gpu_step.PLAIN or images <= 16, budget=0.0)
    assert late["batch_size"] == 32, "without time for all variants, those that ran keep their figures"
    assert late["variants"].keys() == {gpu_step.CPU_VARIANTS[0]}


def test_variants_that_all_fail_are_an_error(
    measured_steps: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    record = measured_steps(lambda name, images: False)
    assert "out of memory at 8 images" in record["error"]
    assert run_with(monkeypatch, tmp_path, {"step": lambda: record}) == 1


def test_max_autotune_has_to_be_asked_for(tmp_path: Path) -> None:
    gpu = torch.device("cuda")
    assert list(gpu_step.part_step(gpu, run_gpu.Session(tmp_path, 1.0))) == [
        "step, imagenet64",
        "step, cifar10",
    ]
    asked = gpu_step.part_step(gpu, run_gpu.Session(tmp_path, 1.0, "max-autotune"))
    assert [name for name in asked if "max-autotune" in name] == [
        "step, imagenet64, max-autotune",
        "step, cifar10, max-autotune",
    ]


def test_a_part_that_does_not_end_is_killed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_gpu, "GRACE_SECONDS", 0)
    assert run_gpu._run_alone("step", SimpleNamespace(out=tmp_path, budget_seconds=0.3)) == 1
    assert "step: killed" in capfd.readouterr().err


def test_our_own_failure_is_not_passed_over() -> None:
    def fail(number: int, kept: Any) -> Any:
        raise RuntimeError("illegal memory access")

    with pytest.raises(RuntimeError, match="illegal"):
        gpu_timing.time_variants({"ict_kernels": {"forward": fail}}, 1, CPU)


def test_a_baseline_with_wrong_results_is_no_rival() -> None:
    x = torch.linspace(-2, 3, 1000, requires_grad=True)

    def stages(factor: float) -> dict[str, Any]:
        return gpu_timing.differentiable(
            lambda number: x * x.detach() * factor, [[x]], lambda number, y: torch.ones_like(y)
        )

    variants = {
        "ict_kernels": stages(1.0),
        "eager": stages(1.0),
        "rounds": stages(1 + 1e-5),
        "wrong": stages(1.01),
        "none": stages(float("nan")),
    }
    held_to = dict.fromkeys(("rounds", "wrong", "none"), "eager")
    timings = gpu_timing.time_variants(variants, 1, CPU, held_to)
    assert timings.medians("backward").keys() == {"ict_kernels", "eager", "rounds"}
    assert timings.failed["wrong"] == "ValueError: wrong: result 0 differs from that of eager by 0.01"
    assert "by nan" in timings.failed["none"]
    assert timings.differences["rounds"] == pytest.approx(1e-5, rel=0.1)


# ------------------------------------------------------------------------------------------------- the tuning


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
        ("cifar10", "256 x 32 x 32, 32 groups, bf16", "backward", {"num_warps": 8, "maxnreg": 128}),
        ("cifar10", "256 x 32 x 32, 32 groups, bf16", "backward", {"num_warps": 16}),
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


def test_all_parts_are_those_that_measure_what_is_here(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ran: list[str] = []
    monkeypatch.setattr(run_gpu, "_run_alone", lambda part, arguments: ran.append(part) or 0)
    assert run_gpu.main(["--part", "all", "--out", str(tmp_path)]) == 0
    assert tuple(ran) == results_index.PARTS
    assert set(run_gpu.PARTS) - set(ran) == {"tune"}
