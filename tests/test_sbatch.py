"""docs/train.sbatch, with stand-ins for SLURM's commands: what is queued again, and what is not."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def _program(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("at_the_signal", "queued_again"),
    [("exit 1", True), ("exit 143", True), ("exit 0", False)],
    ids=["torchrun that was stopped", "srun that was stopped", "a run that has ended meanwhile"],
)
def test_a_job_that_is_stopped_before_its_end_is_queued_again(
    tmp_path: Path, at_the_signal: str, queued_again: bool
) -> None:
    _program(
        tmp_path,
        "srun",
        f"trap '{at_the_signal}' TERM\necho \"$@\" > asked\ntouch started\nwhile true; do sleep 0.05; done",
    )
    _program(tmp_path, "scontrol", 'if [ "$1" = show ]; then echo node0; else echo "$@" >> queued; fi')
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_NNODES": "2",
        "SLURM_CPUS_PER_TASK": "96",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_JOB_NODELIST": "node[0-1]",
    }
    job = subprocess.Popen(["bash", str(ROOT / "docs/train.sbatch")], cwd=tmp_path, env=environment)
    while not (tmp_path / "started").exists():
        time.sleep(0.02)
    job.send_signal(signal.SIGTERM)
    job.wait(timeout=30)
    asked = (tmp_path / "asked").read_text()
    assert asked.startswith("--kill-on-bad-exit=0 --cpus-per-task=96 torchrun --nnodes 2 --nproc-per-node 8 ")
    queued = tmp_path / "queued"
    assert (queued.read_text() if queued.exists() else "") == ("requeue 7\n" if queued_again else "")
