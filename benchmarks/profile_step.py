"""Where a training step's time goes, before the kernels and with them: `python benchmarks/profile_step.py`.

"Before" is the same network in plain torch, as plain_network.py has it: on a GPU compiled by Inductor as ours
is, on a CPU uncompiled. Each is profiled over a few steps fed by the resident loader, or by the same batch
again where numpy is absent. Written to --out: a Kineto trace of each (open it in Perfetto or
chrome://tracing), and profile-*.json with the milliseconds of a step by category and its most expensive
operations, see step_profile.py.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from gpu_step import clean_up, step_config, synthetic_batches  # noqa: E402
from gpu_step_variants import CPU_VARIANTS, INDUCTOR, OURS, PLAIN, VARIANTS  # noqa: E402
from machine import absent  # noqa: E402
from step_categories import CATEGORIES  # noqa: E402
from step_profile import LOADER, profile_steps  # noqa: E402
from torch.profiler import record_function  # noqa: E402

from ict_fast.config import Config  # noqa: E402

BEFORE_AND_AFTER = {"cuda": (INDUCTOR, OURS), "cpu": (PLAIN, CPU_VARIANTS[0])}
SIZES = {"cuda": (("imagenet64", 128), ("cifar10", 512)), "cpu": (("digits", 96),)}
WARM_UP_STEPS, PROFILED_STEPS = 4, 3


def part_profile(device: torch.device, session: Any) -> dict[str, Callable[[], Iterator[dict[str, Any]]]]:
    """What to measure, by name; the traces go into the session's folder."""
    return {
        f"profile, {preset}": lambda preset=preset, images=images: profile_preset(  # type: ignore[misc]
            preset, images, device, session.out, seconds=session.share()
        )
        for preset, images in SIZES[device.type]
    }


def profile_preset(
    preset: str,
    images: int,
    device: torch.device,
    out: Path,
    variants: Sequence[str] = (),
    seconds: float = math.inf,
) -> Iterator[dict[str, Any]]:
    """The profiles of a preset's step, before and after; yields the record after each.

    Args:
        preset, images: the network, and the images in a step, halved until all fit into the device's memory.
        out: folder for the traces, which exists.
        variants: of gpu_step_variants.VARIANTS, in place of before and after.
        seconds: no variant is begun that would not end within them; what is left out is named.
    """
    started, longest = time.monotonic(), 0.0
    names = list(variants or BEFORE_AND_AFTER[device.type])
    record: dict[str, Any] = {"preset": preset, "batch_size": images, "profiles": {}, "failed": {}}
    to_come = list(names)
    while to_come:
        name = to_come.pop(0)
        begun = time.monotonic()
        if record["profiles"] and begun - started + longest > seconds:
            record.setdefault("left_out", {})[name] = f"the {seconds:.0f} s of this network were used up"
            continue
        slug = "".join(letter if letter.isalnum() else "-" for letter in name)
        trace = out / f"trace-{preset}-{slug}-{time.strftime('%Y%m%d-%H%M%S')}.json.gz"
        batch = record["batch_size"]
        try:
            record["profiles"][name] = profile_variant(name, preset, batch, device, trace)
        except torch.OutOfMemoryError:
            if batch < 16:
                record["failed"][name] = f"out of memory at {batch} images"
            else:  # what is compared has one batch
                record |= {"batch_size": batch // 2, "profiles": {}, "failed": {}}
                to_come = list(names)
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            record["failed"][name] = f"{type(error).__name__}: {lines[0]}"
        clean_up(device)
        longest = max(longest, time.monotonic() - begun)
        record["summary"] = "; ".join(
            f"{each}: {found['wall_ms']:.1f} ms" for each, found in record["profiles"].items()
        )
        yield record
    if not record["profiles"]:
        record["error"] = "; ".join(f"{name}: {reason}" for name, reason in record["failed"].items())
        yield record


@contextmanager
def _batches(config: Config, device: torch.device) -> Iterator[Callable[[int], Any]]:
    """What gives the batches of a step: the resident loader, or without numpy the same ones again."""
    if absent("numpy"):
        batches = synthetic_batches(config, device)
        yield lambda k: batches
        return
    from gpu_data import random_store

    from ict_fast.data.resident_loader import ResidentLoader

    network, images = config.network, config.training.batch_size
    with tempfile.TemporaryDirectory() as folder:
        store = random_store(
            Path(folder) / "store", max(512, 2 * images), network.resolution, network.image_channels
        )
        with ResidentLoader(store, batch_size=images, seed=0, flip=config.data.flip, device=device) as loader:
            yield loader.micro_batches


def profile_variant(name: str, preset: str, images: int, device: torch.device, trace: Path) -> dict[str, Any]:
    """Profiles PROFILED_STEPS steps of a variant and writes the trace.

    Returns:
        Per step: wall_ms; ms by category; launches by category; the operations that take most, with ms, calls
        and category; the trace's name.
    """
    config = step_config(preset, images)
    with _batches(config, device) as batches_of:
        step, _ = VARIANTS[name](config, device)

        def run(k: int) -> None:
            with record_function(LOADER):
                batches = batches_of(k)
            step(k, batches)

        for k in range(WARM_UP_STEPS):
            run(k)
        steps = range(WARM_UP_STEPS, WARM_UP_STEPS + PROFILED_STEPS)
        record, profiler = profile_steps(run, steps, device)
    profiler.export_chrome_trace(str(trace))
    return {**record, "trace": trace.name}


def table_of(profiles: dict[str, dict[str, Any]]) -> str:
    """Milliseconds of a step by category, a column for each profile, as Markdown."""
    present = [each for each in CATEGORIES if any(each in found["ms"] for found in profiles.values())]
    rows = [["of a step", *(f"{name}, ms" for name in profiles)], ["---", *("---:" for _ in profiles)]]
    for each in present:
        cells = (found["ms"].get(each) for found in profiles.values())
        rows.append([each, *("-" if ms is None else f"{ms:.2f}" for ms in cells)])
    rows.append(["**all**", *(f"**{found['wall_ms']:.2f}**" for found in profiles.values())])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def main(argv: list[str] | None = None) -> int:
    from run_gpu import header, write

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", default=SIZES[device.type][0][0])
    parser.add_argument("--images", type=int, default=0, help="in a step (default: as run_gpu.py)")
    parser.add_argument(
        "--variants", nargs="+", default=(), choices=VARIANTS, help="in place of before, after"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    options = parser.parse_args(argv)
    images = options.images or dict(SIZES[device.type]).get(options.preset, 32)
    options.out.mkdir(parents=True, exist_ok=True)
    report, path = header("profile", options.out)
    for record in profile_preset(options.preset, images, device, options.out, options.variants):
        report["results"] = [{"name": f"profile, {options.preset}", **record}]
        write(report, path)
    print(table_of(report["results"][0]["profiles"]), path, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
