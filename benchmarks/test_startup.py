"""What starting costs: `pytest benchmarks/ --benchmark-only`. Each round is a process of its own.

Imports beside `import torch` alone, and beside Python that imports nothing; and the first training step of
the digits' network in compiled blocks, with an empty compile cache (cold) and with the one that it left
(warm), beside the uncompiled one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from machine import ROOT

TORCH = "import torch"
IMPORTS = {
    "python": "pass",
    TORCH: TORCH,
    "import ict_kernels": "import ict_kernels",
    "import ict_fast": "import ict_fast",
    "ict_fast.train": "import ict_fast; ict_fast.train",
    "ict-fast --help": "from ict_fast.cli import main; main(['--help'])",
}
FIRST_STEP = """
import sys
sys.path[:0] = [{benchmarks!r}]
import torch
from dataclasses import replace
from gpu_step import synthetic_batches
from ict_fast import presets
from ict_fast.training.step import TrainStep
preset = presets.get("digits")
config = replace(preset, training=replace(preset.training, compile={compile!r}))
device = torch.device({device!r})
TrainStep(config, device)(0, synthetic_batches(config, device))
"""


def _run(code: str, **environment: str) -> None:
    command = [sys.executable, "-c", code]
    subprocess.run(command, check=True, env=os.environ | environment, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("name", IMPORTS)
@pytest.mark.benchmark(group="start-up: imports")
def test_import(benchmark: Any, record: Any, name: str) -> None:
    benchmark.pedantic(_run, args=(IMPORTS[name],), rounds=3, warmup_rounds=1)
    record(op="start of a process", variant=name, baseline=TORCH)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compile cache that the cold start fills and the warm one finds."""
    return tmp_path_factory.mktemp("compiled")


# In this order: the warm start needs what the cold one leaves.
@pytest.mark.parametrize("state", ["uncompiled", "cold", "warm"])
@pytest.mark.benchmark(group="start-up: the first step")
def test_first_step(benchmark: Any, record: Any, cache: Path, state: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    code = FIRST_STEP.format(
        benchmarks=str(ROOT / "benchmarks"), compile="off" if state == "uncompiled" else "on", device=device
    )
    benchmark.pedantic(_run, args=(code,), kwargs={"TORCHINDUCTOR_CACHE_DIR": str(cache)}, rounds=1)
    record(op=f"process to the end of the first step, digits, {device}", variant=state, baseline="uncompiled")
