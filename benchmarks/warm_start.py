"""What a second start saves of compiling: `python benchmarks/warm_start.py`.

Two runs of `ict-fast train --training.compile on` on a CPU, one after the other, with one compile cache that
is empty at first: the first step of each holds all its compilations. The goal is a third of the time.
Written: warm-start.json.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from ict_fast.data.prepare import prepare_digits  # noqa: E402

GOAL = 3.0  # times faster


def first_step_seconds(folder: Path, number: int, extra: Sequence[str]) -> float:
    """Of a run in a new folder, from its own report; seconds with a finer clock than that of its line."""
    words = [
        sys.executable,
        "-m",
        "ict_fast",
        "train",
        "--device",
        "cpu",
        "--out",
        str(folder / f"run-{number}"),
    ]
    words += ["--data.path", str(folder / "digits"), "--training.compile", "on", "--logging.grid-every", "0"]
    words += ["--training.total-steps", "8", *extra]
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
    environment.pop("TORCHINDUCTOR_CACHE_DIR", None)
    process = subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    began = ended = 0.0
    lines = []
    for line in process.stderr:
        lines.append(line)
        if re.search(r"compiling \d+ blocks", line):
            began = time.monotonic()
        if "compiled in" in line:
            ended = time.monotonic()
    assert process.wait() == 0, "".join(lines)
    assert began, "".join(lines)
    assert ended, "".join(lines)
    return ended - began


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("extra", nargs="*", help="more options of ict-fast train, after --")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare_digits(folder / "digits")
        seconds = []
        for number, state in enumerate(("cold", "warm")):
            seconds.append(first_step_seconds(folder, number, options.extra))
            print(f"{state}: {seconds[-1]:.1f} s", file=sys.stderr, flush=True)
        caches = sorted(path.name for path in (folder / "cache/ict-fast").iterdir())
    report: dict[str, Any] = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "options": options.extra,
        "cold_seconds": round(seconds[0], 2),
        "warm_seconds": round(seconds[1], 2),
        "times_faster": round(seconds[0] / seconds[1], 2),
        "goal": GOAL,
        "cache": caches,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "warm-start.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))
    return int(report["times_faster"] < GOAL)


if __name__ == "__main__":
    sys.exit(main())
