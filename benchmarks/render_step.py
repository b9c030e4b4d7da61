"""What RESULTS.md says of training steps on a GPU."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

from floor_figures import OURS, floor_ms, ms_in_the_step, passes_over_memory, times_the_floor
from page import link, table
from profile_step import table_of
from results_index import Entry
from step_categories import is_copy_of_layout
from step_profile import categorised


def step_blocks(found: dict[str, Entry]) -> Iterator[str]:
    for name, entry in found.items():
        record = entry.record
        if not record.get("variants"):
            continue
        flops = f"{record['flops'] / 1e12:.1f} TFLOP"
        yield f"{name}: {record['batch_size']} images, {flops} ({link(entry.file)})."
        rows = [
            (
                each,
                f"{figures['ms_per_step']:.1f}",
                f"{figures['images_per_second']:.0f}",
                f"{figures['percent_of_matrix_rate']:.1f} %",
                f"{(figures['peak_memory_bytes'] or 0) / 2**30:.1f}",
                f"{figures['first_step_s']:.0f}",
            )
            for each, figures in record["variants"].items()
        ]
        names = ("variant", "ms", "images/s", "of the matrix rate", "peak GiB", "first step, s")
        yield table(names, rows, right=1)
        if "floor" in record:
            yield _floor(record)
        yield from _what_held_up(record)
        profiles = {
            each: categorised(of["profile"]) for each, of in record["variants"].items() if "profile" in of
        }
        yield from _copies(record)
        if profiles:
            yield "Where the time of a step goes, from two more that were profiled:"
            yield table_of(profiles).strip()
        for batch, variants in record.get("larger_batches", {}).items():
            times = ", ".join(f"{each} {figures['ms_per_step']:.1f} ms" for each, figures in variants.items())
            yield f"At {batch} images, for which not every variant has the memory: {times}."
        yield from without_figures(record)


def _floor(record: dict[str, Any]) -> str:
    """What the convolutions and attention took alone, and the step beside them."""
    floor = record["floor"]
    parts = ", ".join(f"{kind} {ms:.1f}" for kind, ms in floor["ms_by_operation"].items())
    share = floor["share_of_flops"]
    of = "" if share == 1 else f", {100 * share:.0f} % of their FLOPs"
    said = f"Convolutions and attention alone{of}: {floor['ms']:.1f} ms ({parts})"
    ratio = record.get("times_the_floor")
    if ratio is None:
        return f"{said}."
    said += f"; the step takes {ratio:.2f} times that"
    if sequence := floor.get("in_sequence"):
        said += f", and {ratio * floor['ms'] / sequence['ms']:.2f} times the same calls as one sequence"
    forward, backward = passes_over_memory(floor)
    if forward + backward:
        said += (
            ". These calls are those of a step that is not compiled. By calls of the same shapes up to"
            f" {forward:.1f} ms of it are biases forward, and up to {backward:.1f} ms biases' gradients and"
            f" copies backward, which a compiled step fuses: without them it is {floor_ms(floor):.1f} ms, and"
            f" the step {times_the_floor(record):.2f} times that"
        )
    within = ms_in_the_step(record)
    if within is not None:
        ms = record["variants"][OURS]["ms_per_step"]
        said += (
            ". In two more steps, which were profiled, convolutions, products and attention took"
            f" {within:.1f} ms: it takes {ms / within:.2f} times that"
        )
    return f"{said}."


def _copies(record: dict[str, Any]) -> Iterator[str]:
    """What of a variant's time its profile says are copies from one layout to another, and ours without."""
    for name, of in record["variants"].items():
        copies = [each for each in of.get("profile", {}).get("top", ()) if is_copy_of_layout(each["name"])]
        if not copies or name == OURS or OURS not in record["variants"]:
            continue
        ms, launches = (sum(each[key] for each in copies) for key in ("ms", "calls"))
        rest = (of["ms_per_step"] - ms) / record["variants"][OURS]["ms_per_step"]
        yield (
            f"Of the {of['ms_per_step']:.1f} ms of {name}, {ms:.1f} are copies from one layout to another, in"
            f" {launches:.0f} launches (of the kernels that its profile keeps): without them it would be"
            f" {rest:.2f} times ours."
        )


def _what_held_up(record: dict[str, Any]) -> Iterator[str]:
    """Of every pass, and of the floor's calls as one sequence: the host's lead, the clock, power, limits."""
    timed = [(name, each) for name, of in record["variants"].items() for each in of.get("passes", ())]
    if sequence := record.get("floor", {}).get("in_sequence"):
        timed.append(("convolutions and attention, as one sequence", sequence))
    rows = []
    for name, each in timed:
        if each.get("behind_ms") is None:
            continue
        gpu = each["gpu"]
        limits = ", ".join(
            f"{limit} {100 * share:.0f} %" for limit, share in gpu.get("limited_by", {}).items()
        )
        figures = [f"{statistics.median(each['ms_all']):.1f}", f"{each['behind_ms']:.1f}"]
        figures += [str(each["device_allocations"])]
        figures += [f"{gpu[key]:.0f}" if key in gpu else "" for key in ("sm_mhz", "watts")]
        rows.append((name, *figures, limits))
    if rows:
        yield (
            "What bounds these times: where the device is hardly behind the host, the host does; asking the"
            " driver for memory waits for the device; limits are given with their share of the time."
        )
        head = ("timed", "ms", "device behind host, ms", "allocations", "MHz", "W", "limited by")
        yield table(head, rows, right=1)


def without_figures(record: dict[str, Any]) -> Iterator[str]:
    """What failed and what was left out, and why."""
    for kind in ("failed", "left_out"):
        if record.get(kind):
            yield "; ".join(f"{each}: {reason}" for each, reason in record[kind].items())
