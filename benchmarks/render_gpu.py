"""What RESULTS.md says of each GPU, part by part."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu_optimizer import BYTES_MOVED, COPIED_BYTES, MINIMUM_BYTES
from gpu_timing import COPIES, OURS
from page import NOT_YET, link, table
from plots import machine_plots
from precision import table as gradient_table
from profile_step import table_of
from render_step import step_blocks, without_figures
from results_index import PARTS, Entry, Results
from step_categories import OUR_KERNELS
from step_profile import categorised

PART_TITLES = {
    "tests": "The tests that need a GPU",
    "kernels": "Kernels",
    "optimizer": "Optimizer",
    "step": "Training step",
    "data": "Loaders",
    "train": "A run that learns",
    "dropin": "In other code bases",
    "profile": "Profiles",
    "precision": "Gradients by precision",
}


def gpu_blocks(results: Results, plots: Path) -> Iterator[str]:
    if not results.machines:
        yield table(
            ("part", "command", ""),
            [(PART_TITLES[part], f"`python benchmarks/run_gpu.py --part {part}`", NOT_YET) for part in PARTS],
        )
        return
    for machine in results.machines.values():
        yield f"### {machine.name}"
        for title, file in machine_plots(machine, plots):
            yield f"![{title}](results/{plots.name}/{file})\n\n*{title}.*"
        for part in PARTS:
            yield f"#### {PART_TITLES[part]}"
            if not machine.parts.get(part):
                yield f"{NOT_YET}: `python benchmarks/run_gpu.py --part {part}`"
                continue
            for file in dict.fromkeys(entry.file for entry in machine.parts[part].values()):
                yield about(machine.reports[file])
            yield from PART_BLOCKS[part](machine.parts[part])
            yield from left_out(machine.parts[part])


def about(report: Entry) -> str:
    """Where a file's figures are from."""
    record = report.record
    versions = ", ".join(f"{name} {value}" for name, value in record["versions"].items() if value)
    ceilings = record.get("ceilings") or {}
    peaks = ""
    if ceilings:
        rates = ", ".join(f"{name} {rate:.0f}" for name, rate in ceilings["matrix_tflop_per_s"].items())
        peaks = (
            f" Measured peaks: a copy {ceilings['copy_gb_per_s']:.0f} GB/s; matrix products {rates} TFLOP/s."
        )
    return (
        f"{link(report.file)}, {record['date'][:10]}, commit {record['commit'] or 'unknown'}, driver"
        f" {record['hardware'].get('driver')}, {versions}.{peaks}"
    )


def left_out(found: dict[str, Entry]) -> Iterator[str]:
    reasons: dict[tuple[str, str], list[str]] = {}
    for name, entry in found.items():
        reason = entry.record.get("error") or entry.record.get("not_measured")
        if reason:
            reasons.setdefault((reason, link(entry.file)), []).append(name)
    lines = [f"* {_together(names)}: {reason} ({file})" for (reason, file), names in reasons.items()]
    lines += [
        f"* {name}: the figure is of {link(entry.file)}; a later run failed:"
        f" {entry.failed_since.record['error']} ({link(entry.failed_since.file)})"
        for name, entry in found.items()
        if entry.failed_since is not None
    ]
    if lines:
        yield "Not measured, or in part:\n\n" + "\n".join(lines)


def _together(names: list[str]) -> str:
    """The names; of many that are of one kernel, how many of which presets."""
    if len(names) <= 3:
        return "; ".join(names)
    kinds = Counter(", ".join(name.split(", ")[:2]) for name in names)
    return "; ".join(f"{kind}: {count} cases" if count > 1 else kind for kind, count in kinds.items())


def tests_blocks(found: dict[str, Entry]) -> Iterator[str]:
    rows = [
        (name, f"{entry.record['summary']}{_not_run(entry.record)}", entry.of, link(entry.file))
        for name, entry in found.items()
        if entry.record.get("summary")
    ]
    if rows:
        yield table(("tests", "", "commit", "file"), rows)
    if any(entry.older_kernels for entry in found.values()):
        yield "Older kernels: the files of ict_kernels are not those of now, or the report does not say."
    failed = [
        f"* {test['name']}: {test['outcome']}"
        for entry in found.values()
        for test in entry.record.get("tests", ())
        if test["outcome"] in ("failed", "error")
    ]
    if failed:
        yield "\n".join(failed)


def _not_run(record: dict[str, Any]) -> str:
    """The kernels that the sanitizer's script has not launched."""
    missing = OUR_KERNELS - set(record["kernels"]) if record.get("kernels") else ()
    return f"; not {', '.join(sorted(missing))}" if missing else ""


_COPIES_OF_KERNELS = (
    "*Of a copy* is against a copy of the bytes that the algorithm moves, a split norm's second read among"
    " them, which L2 may serve; *of the least* against one of the bytes that any must move."
)
_COPIES_OF_OPTIMIZER = (
    f"*Of a copy* is against a copy of {COPIED_BYTES} bytes per parameter, as the goal is stated, where"
    f" RAdamEMA moves {BYTES_MOVED}; *of the least* against one of the {MINIMUM_BYTES} that any must move."
    " *ms* and *faster than* are of CUDA graphs, for which torch's optimizers must be capturable."
)


def kernel_blocks(found: dict[str, Entry], copies: str = _COPIES_OF_KERNELS) -> Iterator[str]:
    rows = []
    for name, entry in found.items():
        for stage, figures in entry.record.get("stages", {}).items():
            others = {k: v for k, v in figures["times_faster_than"].items() if k not in COPIES}
            rows.append(
                (
                    name,
                    stage,
                    figures.get("algorithm") or "",
                    f"{figures['ms'][OURS]:.4f}",
                    f"{figures['gb_per_s']:.0f}",
                    f"{figures['percent_of_copy']:.0f} %",
                    f"{figures['percent_of_minimum_copy']:.0f} %",
                    ", ".join(f"{ratio:.2f}x {other}" for other, ratio in others.items()),
                    link(entry.file),
                )
            )
    head = (
        "case",
        "direction",
        "algorithm",
        "ms",
        "GB/s",
        "of a copy",
        "of the least",
        "faster than",
        "file",
    )
    if rows:
        yield copies
        yield table(head, rows, right=3)
    errors = [
        (
            name,
            *(
                f"{each[key]:.3g}" if key in each else ""
                for key in ("max_error", "torch_max_error", "largest")
            ),
            link(entry.file),
        )
        for name, entry in found.items()
        for each in [
            max((entry.record.get("errors") or {}).values(), key=lambda e: e["ratio"] or 0, default=None)
        ]
        if each is not None
    ]
    if errors:
        yield (
            "Largest error against float64, of the tensor that compares worst. (Losses at N = 1281 are a"
            " million and more, where neighbours in fp32 lie 0.125 apart and farther.)"
        )
        yield table(("case", "ours", "torch's", "largest value", "file"), errors, right=1)
    failed = [
        f"* {name}, {variant}: {reason} ({link(entry.file)})"
        for name, entry in found.items()
        for variant, reason in entry.record.get("failed", {}).items()
    ]
    if failed:
        yield "Variants that could not run:\n\n" + "\n".join(failed)


def kernels_blocks(found: dict[str, Entry]) -> Iterator[str]:
    yield from kernel_blocks(found)
    rows = [
        (what, *(f"{us[name]:.1f}" for name in (OURS, "eager")), link(entry.file))
        for entry in found.values()
        for what, us in entry.record.get("host_us", {}).items()
    ]
    if rows:
        yield (
            "What a call costs the host, of tensors so small that the device is faster: microseconds until it"
            " has queued it, torch's functions beside."
        )
        yield table(("call", "ours, us", "eager, us", "file"), rows, right=1)


def optimizer_blocks(found: dict[str, Entry]) -> Iterator[str]:
    yield from kernel_blocks(found, _COPIES_OF_OPTIMIZER)
    rows = []
    for name, entry in found.items():
        queued = entry.record.get("stages", {}).get("step", {}).get("queued_ms", {})
        called = entry.record.get("called_from_python_ms", {})
        for each in {**queued, **called}:
            times = (f"{ms:.3f}" if ms else "" for ms in (queued.get(each), called.get(each)))
            rows.append((name, each, *times, link(entry.file)))
    if rows:
        yield (
            "As one uses them, torch's not capturable. *Device time, queued*: while the device is held until"
            " the host has queued the whole step, so that it never waits. *Called from Python*: step after"
            " step, where the host may be the slower of the two."
        )
        head = ("case", "optimizer", "device time, queued, ms", "called from Python, ms", "file")
        yield table(head, rows, right=2)


def data_blocks(found: dict[str, Entry]) -> Iterator[str]:
    rows = [
        (
            name,
            contestant,
            f"{rate:,.0f}",
            _of_link(contestant, entry.record),
            link(entry.file),
        )
        for name, entry in found.items()
        for contestant, rate in entry.record.get("images_per_second_of", {}).items()
    ]
    if rows:
        yield table(("store", "loader", "images/s", "of a pinned copy", "file"), rows, right=2)
    for name, entry in found.items():
        if entry.record.get("left_out"):
            yield f"{name}: " + "; ".join(f"{k}: {v}" for k, v in entry.record["left_out"].items())


def _of_link(contestant: str, record: dict[str, Any]) -> str:
    """The share of a pinned copy's rate; empty where it was not measured, and for the resident loader, whose
    images do not cross the link.
    """
    share = None if contestant == "resident" else record.get("percent_of_link", {}).get(contestant)
    return "" if share is None else f"{share:.0f} %"


def train_blocks(found: dict[str, Entry]) -> Iterator[str]:
    for entry in found.values():
        record = entry.record
        if "one_step" not in record:
            continue
        yield (
            f"{record['total_steps']:,} steps of {record['batch_size']} images in"
            f" {record['training_seconds']:.0f} s, {record['images_per_second']:.0f} images/s,"
            f" {record['percent_of_matrix_rate']:.1f} % of the matrix rate;"
            f" {record['parameters'] / 1e6:.1f} M parameters, {record['precision']} trunk,"
            f" {record['compiled_blocks']} compiled blocks,"
            f" {record['loader']} ({link(entry.file)})."
        )
        rows = [
            (
                each.replace("_", " "),
                f"{record[each]['frechet_distance']:.3f}",
                f"{record[each]['deviation_within_blocks']:.4f}",
            )
            for each in ("one_step", "two_step")
        ]
        rows += [
            (f"real, {each}" if each == "halves" else each, f"{value:.3f}", "")
            for each, value in record["reference"].items()
        ]
        yield table(("images", "Fréchet distance", "deviation within blocks"), rows, right=1)


def profile_blocks(found: dict[str, Entry]) -> Iterator[str]:
    for name, entry in found.items():
        if entry.record.get("profiles"):
            yield f"{name}, {entry.record['batch_size']} images ({link(entry.file)}):"
            profiles = entry.record["profiles"].items()
            yield table_of({each: categorised(profile) for each, profile in profiles}).strip()
            yield from without_figures(entry.record)


def precision_blocks(found: dict[str, Entry]) -> Iterator[str]:
    for name, entry in found.items():
        if entry.record.get("stages"):
            record = entry.record
            yield f"{name}: {record['batches']} batches of {record['batch_size']} ({link(entry.file)}):"
            yield gradient_table(record).strip()


def other_blocks(found: dict[str, Entry]) -> Iterator[str]:
    yield "\n".join(
        f"* {name}: {entry.record.get('summary', 'see the file')} ({link(entry.file)})"
        for name, entry in found.items()
        if not entry.record.get("not_measured")
    )


PART_BLOCKS = {
    "tests": tests_blocks,
    "kernels": kernels_blocks,
    "optimizer": optimizer_blocks,
    "step": step_blocks,
    "data": data_blocks,
    "train": train_blocks,
    "dropin": other_blocks,
    "profile": profile_blocks,
    "precision": precision_blocks,
}
