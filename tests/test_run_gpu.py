"""benchmarks/run_gpu.py on a bare machine: torch (and what torch needs) alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
BARE = """
import runpy, sys
for name in ("tyro", "safetensors", "PIL", "rich", "sklearn", "torchmetrics", "matplotlib", "nvidia.dali"):
    sys.modules[name] = None  # importing it now fails
sys.argv = ["run_gpu.py", "--part", "step", "--out", sys.argv[1]]
runpy.run_path({script!r}, run_name="__main__")
"""


def test_part_step_needs_torch_alone_and_writes_raw_json(tmp_path: Path) -> None:
    script = BARE.format(script=str(ROOT / "benchmarks/run_gpu.py"))
    finished = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    (path,) = tmp_path.glob("step-*.json")
    report = json.loads(path.read_text())
    assert report["part"] == "step"
    assert report["versions"]["torch"].startswith("2.")
    (result, *_) = report["results"]
    rate = result["batch_size"] / (result["ms_per_step"] / 1e3)
    assert abs(result["images_per_second"] / rate - 1) < 1e-6
    assert len(result["ms_all"]) == 10
    assert min(result["ms_all"]) <= result["ms_per_step"] <= max(result["ms_all"])


def test_an_unknown_part_is_refused() -> None:
    command = [sys.executable, str(ROOT / "benchmarks/run_gpu.py"), "--part", "stpe"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 2
    assert "stpe" in finished.stderr
