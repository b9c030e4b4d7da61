"""docs/train.sbatch, with stand-ins for SLURM's commands: what is queued again, and what is not."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# srun takes SIGTERM for the end of its step, whose processes it kills: they save nothing.
SRUN = """\
trap 'kill -KILL "$task"; touch killed; exit 143' TERM
echo "$OMP_NUM_THREADS threads: $@" > asked
./task & task=$!
echo "$task" > task.pid
wait "$task"
"""
# Without --signal, scancel would end the job; with it, it signals the steps, and not the batch script.
SCANCEL = '[ "$*" = "--signal=TERM 7" ] && kill -TERM "$(cat task.pid)"'
SCONTROL = 'if [ "$1" = show ]; then echo node0; else echo "$@" >> queued; fi'
SAVE = "mkdir -p runs/imagenet64/checkpoints; echo step-00000007 > runs/imagenet64/checkpoints/latest"


@pytest.fixture
def job(tmp_path: Path) -> subprocess.Popen:
    """The script, as soon as `task`, which the test has written, is there to be run."""
    for name, text in (("srun", SRUN), ("scancel", SCANCEL), ("scontrol", SCONTROL)):
        _program(tmp_path, name, text)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_NNODES": "2",
        "SLURM_CPUS_PER_TASK": "96",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_JOB_NODELIST": "node[0-1]",
    }
    begin = "while [ ! -e task ]; do sleep 0.02; done; [ -e old ] && SECONDS=900"
    script = f"{begin}; source {ROOT / 'docs/train.sbatch'}"
    return subprocess.Popen(["bash", "-c", script], cwd=tmp_path, env=environment)


def _program(folder: Path, name: str, text: str) -> None:
    path = folder / f".{name}"
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)
    path.rename(folder / name)


def _queued_again(folder: Path) -> bool:
    queued = folder / "queued"
    assert not queued.exists() or queued.read_text() == "requeue 7\n"
    return queued.exists()


@pytest.mark.parametrize(
    ("at_the_signal", "is_old", "queued_again"),
    [
        ("exit 1", False, True),
        ("exit 143", False, True),
        ("exit 0", False, False),
        (f"{SAVE}; exit 1", True, True),
        ("exit 1", True, False),
    ],
    ids=[
        "torchrun that was stopped",
        "srun that was stopped",
        "a run that has ended meanwhile",
        "one that has got further",
        "one that could not be saved",
    ],
)
def test_a_job_that_is_stopped_before_its_end_is_saved_and_queued_again(
    tmp_path: Path, job: subprocess.Popen, at_the_signal: str, is_old: bool, queued_again: bool
) -> None:
    if is_old:
        (tmp_path / "old").touch()
    _program(
        tmp_path,
        "task",
        f"trap 'touch saved; {at_the_signal}' TERM\ntouch started\nwhile true; do sleep 0.05; done",
    )
    while not (tmp_path / "started").exists():
        time.sleep(0.02)
    job.send_signal(signal.SIGTERM)
    job.wait(timeout=30)
    asked = (tmp_path / "asked").read_text()
    options = "--kill-on-bad-exit=0 --cpus-per-task=96"
    assert asked.startswith(f"12 threads: {options} torchrun --nnodes 2 --nproc-per-node 8 ")
    assert (tmp_path / "saved").exists()
    assert not (tmp_path / "killed").exists()
    assert _queued_again(tmp_path) == queued_again


@pytest.mark.parametrize(
    ("task", "queued_again", "code"),
    [(f"{SAVE}; exit 1", True, 1), ("exit 1", False, 1), (f"{SAVE}; exit 0", False, 0)],
    ids=["it has got further", "it has not", "it is done"],
)
def test_a_job_that_fails_is_queued_again_if_it_has_got_further(
    tmp_path: Path, job: subprocess.Popen, task: str, queued_again: bool, code: int
) -> None:
    _program(tmp_path, "task", task)
    assert job.wait(timeout=30) == code
    assert _queued_again(tmp_path) == queued_again
