"""Measures ict-fast on the GPU of this machine, writes raw JSON: `python benchmarks/run_gpu.py --part all`.

Needs torch and Triton alone (the parts data and train numpy too), no installation: the checkout is put on the
path. Without a GPU it runs the same code on the CPU, at sizes that say nothing about speed (the suite does,
so that the script never rots). Parts, each in its gpu_*.py: tests, those that need a GPU; kernels, the loss
among them; optimizer; step, whole training steps; data, the loaders; train, a run that learns; dropin, the
kernels in other code bases; profile, where a step's time goes; precision, gradients of a trunk in less than
fp32; and, asked for by itself, tune, other plans of group norm beside the present ones. Every part fits into
its budget, compilation included: what the time does not reach is named, and `--only TEXT` gives all of it to
some, `--variants` to some variants of a step: `--part step --only cifar10 --variants ours max-autotune`.
Where the files came without git, ICT_FAST_COMMIT says of which commit they are. benchmarks/README.md says in
which order a quarter of an hour on a GPU is best used.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

import compilers  # noqa: E402

if __name__ == "__main__":
    compilers.settle()

import torch  # noqa: E402
from gpu_timing import OURS  # noqa: E402
from machine import absent, ceilings, clocks, commit, hardware, kernel_sources, versions  # noqa: E402

from ict_fast.training.launch import configure_torch  # noqa: E402

# After a part's budget, for the measurement that runs when it ends; then `--part all` kills it.
GRACE_SECONDS = 60
# What to measure, by name; each gives what its entry in the JSON holds, or repeatedly what it holds so far.
Record = dict[str, Any]
Measurements = dict[str, Callable[[], Record | Iterator[Record]]]


class Session:
    """The run of a part: where its files go, and its time. Nothing new is started after it.

    Attributes:
        out: folder for the JSON, which exists.
        seconds: of the whole part.
        only: what has this text in its name is measured; "" for all.
        variants: of a step, see gpu_step.py; none for all.
        to_come: measurements that have not been finished.
        begun: names of what runs already beside what is being measured: it is asked for whatever the time is.
    """

    def __init__(self, out: Path, seconds: float, only: str = "", variants: Sequence[str] = ()) -> None:
        self.out = out
        self.seconds = seconds
        self.only = only
        self.variants = variants
        self.to_come = 1
        self.begun: set[str] = set()
        self._started = time.monotonic()

    def used(self) -> float:
        return time.monotonic() - self._started

    def left(self) -> float:
        return max(0.0, self.seconds - self.used())

    def share(self) -> float:
        """Seconds that the measurement which asks may take, if the others are to have as much."""
        return self.left() / self.to_come


def _part(
    name: str, module: str, *packages: str, asks: bool = False
) -> Callable[[torch.device, Session], Measurements]:
    """The part of a file, its `part_NAME(device)`; skipped where what it needs is absent.

    Args:
        name: as `--part` has it.
        module: imported when the part is asked for.
        packages: that it needs beside torch.
        asks: whether it takes the session too, for its folder or its time: `part_NAME(device, session)`.
    """

    def measurements(device: torch.device, session: Session) -> Measurements:
        missing = absent(module, *packages)
        if missing:
            return {name: lambda: {"not_measured": f"needs {', '.join(missing)}, which is not here"}}
        part = getattr(importlib.import_module(module), f"part_{name}")
        found: Measurements = part(device, session) if asks else part(device)
        return found

    return measurements


# In the order of `--part all`. Each: (device, session) -> what to measure.
PARTS: dict[str, Callable[[torch.device, Session], Measurements]] = {
    "tests": _part("tests", "gpu_tests", asks=True),
    "kernels": _part("kernels", "gpu_kernels", asks=True),
    "optimizer": _part("optimizer", "gpu_optimizer"),
    "step": _part("step", "gpu_step", asks=True),
    "data": _part("data", "gpu_data", "numpy"),
    "train": _part("train", "gpu_train", "numpy", asks=True),
    "dropin": _part("dropin", "gpu_dropin", asks=True),
    "profile": _part("profile", "profile_step", asks=True),
    "precision": _part("precision", "gpu_precision", "numpy", asks=True),
    "tune": _part("tune", "gpu_tune", asks=True),
}
# By itself it says nothing of what is here: what it finds is written into the kernels, and measured then.
ON_REQUEST = ("tune",)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=[*PARTS, "all"], required=True)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results", help="folder for the JSON")
    parser.add_argument(
        "--budget-seconds",
        type=float,
        default=420.0,
        help="start nothing new in a part after this time, and name what was not measured (default: 420)",
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="only what has this text in its name")
    parser.add_argument(
        "--variants", nargs="+", default=(), metavar="WORD", help="of part step: ours, tuned, inductor, ..."
    )
    arguments = parser.parse_args(argv)
    if arguments.variants:
        from gpu_step_variants import WORDS

        if arguments.part != "step" or not set(arguments.variants) <= WORDS.keys():
            parser.error(f"--variants: for part step, some of {', '.join(WORDS)}")
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {arguments.out}: {error.strerror}; name a folder that can be written")
    if arguments.part == "all" and arguments.only:
        parser.error(f"--only {arguments.only}: choose one --part with it")
    if arguments.part == "all":
        return max(_run_alone(part, arguments) for part in PARTS if part not in ON_REQUEST)
    return run_part(
        arguments.part, arguments.out, arguments.budget_seconds, arguments.only, arguments.variants
    )


def run_part(
    part: str, out: Path, budget_seconds: float, only: str = "", variants: Sequence[str] = ()
) -> int:
    """Measures one part and writes its JSON anew after every result, so that a killed run loses none.

    Args:
        part: a key of PARTS.
        out: folder for the JSON, which exists.
        budget_seconds: nothing new is started after this time.
        only: a text that the names of what is measured have; "" for all.
        variants: of a step, see gpu_step.py; none for all.
    Returns:
        0; 1 if something could not be measured or a test failed; 2 if `only` fits nothing.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    session = Session(out, budget_seconds, only, variants)
    report, path = header(part, out)
    report |= {"budget_seconds": budget_seconds, "only": only}
    if report["commit"] is None:
        _say("the report will not say of which commit it is: there is no git here; set ICT_FAST_COMMIT")
    offered = PARTS[part](device, session)
    report["offered"] = list(offered)
    measurements = {each: measure for each, measure in offered.items() if only in each}
    if not measurements:
        _say(f"--only {only}: no name of part {part} has it; there are: {'; '.join(offered)}")
        return 2
    for number, (each, measure) in enumerate(measurements.items(), start=1):
        elapsed, session.to_come = session.used(), len(measurements) - number + 1
        report["results"].append({"name": each})
        if elapsed > budget_seconds and each not in session.begun:
            report["results"][-1]["not_measured"] = f"the budget of {budget_seconds:g} s was used up"
        else:
            left = min(session.left(), elapsed / max(1, number - 1) * session.to_come)
            _say(f"{part} {number}/{len(measurements)}, {elapsed:.0f} s, about {left:.0f} s left: {each}")
            for result in _measured(measure):
                report["results"][-1] = {"name": each, **result}
                write(report, path)
        report["wall_seconds"] = round(session.used(), 1)
        write(report, path)
    report |= {"complete": True, "clocks_at_end": clocks() if device.type == "cuda" else None}
    write(report, path)
    results = report["results"]
    _say(
        f"{part}: {sum('not_measured' not in each for each in results)} of {len(results)} measured in "
        f"{report['wall_seconds']:.0f} s"
    )
    print(path)
    return int(any("error" in each for each in results))


def header(part: str, out: Path) -> tuple[Record, Path]:
    """A report without results yet, with all that its reader has to know, and where it goes."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    configure_torch(device, deterministic=False)
    now = datetime.datetime.now(datetime.UTC)
    report: Record = {
        "part": part,
        "date": now.isoformat(timespec="seconds"),
        "commit": commit(),
        "kernels": kernel_sources(),
        "hardware": hardware(),
        "versions": versions() | {"ptxas": compilers.assembler()},
        "ceilings": ceilings("cuda") if device.type == "cuda" else None,
        "complete": False,
        "results": [],
    }
    name = re.sub(r"[^\w.-]", "-", str(report["hardware"].get("gpu", "cpu")))
    return report, out / f"{part}-{name}-{now:%Y%m%d-%H%M%S}.json"


def _measured(measure: Callable[[], Record | Iterator[Record]]) -> Iterator[Record]:
    """What is known so far, and the seconds that it took; of what fails the error, as the rest can still
    be measured.
    """
    started = time.monotonic()
    result: Record = {}
    try:
        # Inside: after an illegal access to the device's memory this fails too.
        _give_memory_back()
        given = measure()
        for result in [given] if isinstance(given, dict) else given:
            yield result
    except Exception as error:
        traceback.print_exc()
        result = {**result, "error": f"{type(error).__name__}: {error}"}
        result.pop("not_measured", None)
    if summary := summary_of(result):
        _say(f"    {summary}")
    yield {"seconds": round(time.monotonic() - started, 1), **result}


def _give_memory_back() -> None:
    """Frees what the measurement before held: captured graphs stand in cycles with their tensors."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def summary_of(result: Record) -> str:
    """A result in a line for the terminal."""
    parts = [str(result[key]) for key in ("error", "not_measured", "summary") if result.get(key)][:1]
    for stage, figures in result.get("stages", {}).items() if OURS in str(result.get("stages")) else ():
        faster = ", ".join(f"{ratio:.2f}x {name}" for name, ratio in figures["times_faster_than"].items())
        parts.append(
            f"{stage} {figures['ms'][OURS]:.4f} ms, {figures['gb_per_s']:.0f} GB/s, "
            f"{figures['percent_of_copy']:.0f} % of a copy; {faster}"
        )
    parts += [f"{name} failed: {reason}" for name, reason in result.get("failed", {}).items()]
    return "; ".join(parts)


def _run_alone(part: str, arguments: argparse.Namespace) -> int:
    """A part in a process of its own: an illegal access in one does not take the others with it, and one that
    does not end is killed, whatever it has started too; what it measured is on disk.
    """
    command = [sys.executable, str(Path(__file__).resolve()), "--part", part, "--out", str(arguments.out)]
    command += ["--budget-seconds", f"{arguments.budget_seconds:g}"]
    with subprocess.Popen(command, start_new_session=True) as process:
        try:
            # A signal's number is negative.
            return abs(process.wait(arguments.budget_seconds + GRACE_SECONDS))
        except subprocess.TimeoutExpired:
            _say(f"{part}: killed {GRACE_SECONDS} s after its budget; what it had measured is on disk")
            return 1
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def write(report: Record, path: Path) -> None:
    """Replaces the file whole: never half a JSON."""
    partial_path = path.with_suffix(".partial")
    partial_path.write_text(json.dumps(report, indent=1) + "\n")
    partial_path.replace(path)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
