"""Part tests of run_gpu.py: how processes share tests, what is said of them, and the sanitizer."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(Path(__file__).parent)]

report_in: Any = importlib.import_module("reports").report_in
gpu_sanitizer: Any = importlib.import_module("gpu_sanitizer")
gpu_tests: Any = importlib.import_module("gpu_tests")
run_gpu: Any = importlib.import_module("run_gpu")


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
    assert code == 0, "the deadline is ours"
    outcomes = {each["name"].split("::")[-1]: each for each in results["test_a.py"]["tests"]}
    assert outcomes["test_quick"]["outcome"] == "passed"
    assert outcomes["test_endless"]["outcome"] == outcomes["test_late"]["outcome"] == "not run"
    assert "still ran 0.0 s after the budget" in outcomes["test_endless"]["reason"]
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


# ---------------------------------------------------------------------------------------------- the sanitizer


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


@pytest.fixture
def sanitize(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """The record of memcheck where the tool does what a line of shell says."""

    def run(found: str) -> dict[str, Any]:
        binary = tmp_path / "compute-sanitizer"
        binary.write_text(FAKE_SANITIZER.format(found=found))
        binary.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        monkeypatch.setattr(gpu_sanitizer.torch.cuda, "is_available", lambda: True)
        record: dict[str, Any] = gpu_sanitizer.sanitize("memcheck", lambda: 60.0)
        return record

    return run


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
    found: str, error: str | None, sanitize: Callable[..., dict[str, Any]]
) -> None:
    record = sanitize(found)
    if error is None:
        assert record["kernels"] == ["a"]
        assert "error" not in record
    else:
        assert error in record["error"]


def test_a_machine_that_the_sanitizer_refuses_and_one_that_hangs_have_failed_nothing(
    sanitize: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    refused = 'echo "========= Error: Device not supported"; echo "CUDA error 999" >&2; exit 1'
    assert sanitize(refused) == {"not_measured": "compute-sanitizer: Device not supported"}
    monkeypatch.setattr(gpu_sanitizer, "MOST_SECONDS", 0.0)  # it gets a second
    record = sanitize(f"sleep 600 & echo $! > {tmp_path}/child; wait")
    assert record == {"not_measured": "did not end within 1 s"}
    child = int((tmp_path / "child").read_text())
    within = time.monotonic() + 20.0  # of 600 s: one that is killed is still there until it has its turn
    while _runs(child) and time.monotonic() < within:
        time.sleep(0.01)
    assert not _runs(child), "what it had started too"


def _runs(process: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
