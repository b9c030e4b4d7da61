"""The plots of RESULTS.md, from the raw results alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from floor_figures import floor_ms
from gpu_train import unpacked
from results_index import Machine, Results
from step_categories import CATEGORIES

# Okabe and Ito's, which people of every colour vision tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000", "#BBBBBB")
NOT_IN_A_NAME = str.maketrans(dict.fromkeys(" ,()/", "-"))


def save(figure: Any, path: Path) -> str:
    """Writes a figure; returns its file's name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
    return path.name


def machine_plots(machine: Machine, folder: Path) -> list[tuple[str, str]]:
    """All plots that this GPU's results allow, as (title, file)."""
    slug = machine.name.translate(NOT_IN_A_NAME)
    made: list[tuple[str, str]] = []
    kinds: tuple[tuple[str, str, Callable[[Machine, Path], str | None]], ...] = (
        ("The kernels beside a copy's bandwidth", "kernels", _kernels),
        ("Training steps beside the measured matrix rate", "steps", _steps),
        ("Where a step's time goes", "profile", _profiles),
        ("The run of part train, and digits that it makes in one step", "train", _training),
    )
    for title, name, plot in kinds:
        file = plot(machine, folder / f"{name}-{slug}.png")
        if file is not None:
            made.append((title, file))
    return made


def _kernels(machine: Machine, path: Path) -> str | None:
    """Rate over bytes moved, beside a copy of as many bytes in the same graph."""
    points: dict[tuple[str, str], list[tuple[float, float]]] = {}
    copy = []
    for part in ("kernels", "optimizer"):
        for name, entry in machine.parts.get(part, {}).items():
            for stage, figures in entry.record.get("stages", {}).items():
                moved = figures["bytes_moved"]
                key = name.split(",")[0], stage
                points.setdefault(key, []).append((moved, figures["gb_per_s"]))
                copy.append((figures["copied_bytes"], figures["copy_gb_per_s"]))
    if not points:
        return None
    figure, axis = plt.subplots(figsize=(9, 5), constrained_layout=True)
    colours = dict(zip(sorted({op for op, _ in points}), COLOURS, strict=False))
    for (op, stage), values in sorted(points.items()):
        form, label = "^" if stage == "backward" else "o", f"{op}, {stage}"
        axis.plot(*zip(*values, strict=True), form, ms=5, alpha=0.8, color=colours[op], label=label)
    copied = list(zip(*copy, strict=True))
    axis.plot(*copied, "_", color="black", ms=9, label="a copy of as many bytes")
    report = machine.reports[entry.file].record
    if report.get("ceilings"):
        axis.axhline(report["ceilings"]["copy_gb_per_s"], color="black", ls=":", label="a copy of 4 GB")
    axis.set(xscale="log", xlabel="bytes that the algorithm moves", ylabel="GB/s", title=machine.name)
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return save(figure, path)


def _steps(machine: Machine, path: Path) -> str | None:
    """TFLOP/s of every variant of both networks' steps; the measured matrix rate is the roof."""
    found = {name: entry.record for name, entry in machine.parts.get("step", {}).items()}
    found = {name: record for name, record in found.items() if record.get("variants")}
    if not found:
        return None
    figure, axes = plt.subplots(1, len(found), figsize=(6 * len(found), 3.6), squeeze=False)
    for axis, (name, record) in zip(axes[0], found.items(), strict=True):
        rates = {each: entry["tflop_per_s"] for each, entry in record["variants"].items()}
        labels = list(rates)[::-1]
        colours = [COLOURS[0] if label.startswith("ict-fast") else COLOURS[8] for label in labels]
        bars = axis.barh(labels, [rates[label] for label in labels], color=colours)
        axis.bar_label(bars, fmt="%.0f", padding=3, fontsize=8)
        axis.axvline(record["matrix_tflop_per_s"], color="black", ls="--", label="measured matrix rate")
        if "floor" in record:
            roof = record["flops"] / floor_ms(record["floor"]) / 1e9
            axis.axvline(roof, color=COLOURS[1], ls=":", label="its convolutions and attention alone")
        axis.set(title=f"{name}, {record['batch_size']} images", xlabel="TFLOP/s")
        axis.margins(x=0.12)
        axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.4, -0.17), ncols=2)
    figure.tight_layout()
    return save(figure, path)


def _profiles(machine: Machine, path: Path) -> str | None:
    found = {
        name: entry.record["profiles"]
        for name, entry in machine.parts.get("profile", {}).items()
        if entry.record.get("profiles")
    }
    return profile_plot(found, path) if found else None


def profile_plot(found: dict[str, dict[str, Any]], path: Path) -> str:
    """Stacked milliseconds by category, a bar for each profile."""
    bars = [
        (f"{name.removeprefix('profile, ')}\n{each}", profile["ms"])
        for name, profiles in found.items()
        for each, profile in profiles.items()
    ]
    figure, axis = plt.subplots(figsize=(9, 1.2 + 0.7 * len(bars)), constrained_layout=True)
    for row, (_, milliseconds) in enumerate(bars[::-1]):
        left = 0.0
        for colour, each in zip(COLOURS, CATEGORIES, strict=True):
            value = milliseconds.get(each, 0.0)
            axis.barh(row, value, left=left, color=colour, label=each if row == 0 else None)
            left += value
    axis.set_yticks(range(len(bars)), [label for label, _ in bars[::-1]], fontsize=8)
    axis.set(xlabel="ms of a step")
    axis.legend(fontsize=8, ncols=5, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return save(figure, path)


def _training(machine: Machine, path: Path) -> str | None:
    """The loss by stage, and samples."""
    records = [e.record for e in machine.parts.get("train", {}).values() if e.record.get("stages")]
    if not records:
        return None
    record = records[-1]
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True, width_ratios=(3, 2))
    stages = record["stages"]
    axes[0].plot(
        [each["last_step"] for each in stages], [each["loss"] for each in stages], "o-", color=COLOURS[0]
    )
    for each in stages:
        axes[0].annotate(
            f"N = {each['num_scales']}",
            (each["last_step"], each["loss"]),
            fontsize=8,
            xytext=(0, 6),
            textcoords="offset points",
            ha="center",
        )
    axes[0].set(xlabel="step", ylabel="mean weighted loss of the stage")
    axes[0].grid(alpha=0.3)
    if "samples" in record:
        pixels = unpacked(record["samples"])[:, 0]
        count, size = len(pixels) // 10 * 10, pixels.shape[1]
        grid = pixels[:count].reshape(-1, 10, size, size).transpose(0, 2, 1, 3).reshape(-1, 10 * size)
        axes[1].imshow(grid, cmap="gray", vmin=0, vmax=255)
    axes[1].axis("off")
    return save(figure, path)


def suite_plot(results: Results, path: Path) -> str | None:
    """On a CPU: GB/s of what moves bytes, GFLOP/s of what multiplies."""
    records = results.suite_records()
    moving = [each for each in records if "gb_per_s" in each]
    multiplying = [each for each in records if "tflop_per_s" in each]
    if not moving or not multiplying or results.suite is None:
        return None
    ceiling = results.suite.record["ict_fast"]["ceilings"]["cpu"]
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.6), constrained_layout=True)
    panels = (
        (
            axes[0],
            moving,
            "minimum_bytes",
            "gb_per_s",
            1,
            ceiling["copy_gb_per_s"],
            "GB/s of the minimum bytes",
            "minimum bytes",
            "a large copy",
        ),
        (
            axes[1],
            multiplying,
            "flops",
            "tflop_per_s",
            1000,
            1000 * ceiling["matrix_tflop_per_s"]["fp32"],
            "GFLOP/s",
            "matrix FLOPs",
            "a large matrix product",
        ),
    )
    for axis, chosen, x, y, factor, roof, y_label, x_label, roof_label in panels:
        groups = sorted({each["group"] for each in chosen})
        for colour, group in zip(COLOURS, groups, strict=False):
            values = [(each[x], factor * each[y]) for each in chosen if each["group"] == group]
            axis.plot(*zip(*values, strict=True), "o", ms=5, alpha=0.7, color=colour, label=group)
        axis.axhline(roof, color="black", ls="--", label=roof_label)
        axis.set(xscale="log", yscale="log", xlabel=x_label, ylabel=y_label)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    return save(figure, path)
