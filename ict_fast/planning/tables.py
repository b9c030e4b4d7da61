"""A plan for people, and for programs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.table import Table

from ict_fast.planning.gpus import GPUS_PER_NODE
from ict_fast.planning.plan import DEFAULT_MFU, Plan


def tables(plan: Plan) -> list[Table]:
    """The run, the memory of one GPU, and the time."""
    return [_run(plan), _memory(plan), _time(plan)]


def rate_in_words(plan: Plan) -> str:
    """Where the images per second come from."""
    if plan.launch_bound:
        each = _figure(1e3 * plan.launch_seconds * plan.micro_batch / plan.share)
        return (
            f"that of launching kernels, {each} ms for a micro-batch; that of computing is {_computing(plan)}"
        )
    return _computing(plan)


def _computing(plan: Plan) -> str:
    if (measured := plan.measured) is not None:
        return (
            f"measured: {measured.images_per_second:,.0f} images/s on one {measured.gpu},"
            f" {measured.batch_size} images a step ({measured.file}), {100 * plan.mfu:.0f} % of its peak"
        )
    stated = "the default" if plan.mfu == DEFAULT_MFU else "as asked"
    return f"assumed: {100 * plan.mfu:.0f} % of the peak rate ({stated}; nothing measured is used)"


def to_dict(plan: Plan) -> dict[str, Any]:
    """The plan as JSON values; bytes, seconds, FLOPs."""
    gpu = asdict(plan.gpu)
    del gpu["peaks"]  # of a GPU that was described, that of the plan's precision alone is known
    return {
        **asdict(plan),
        "gpu": {**gpu, "peak_flops": plan.gpu.peak(plan.precision)},
        "forward_flops_per_image": plan.cost.forward_flops,
        "step_flops_per_image": plan.cost.step_flops,
        "total_flops": plan.total_flops,
        "images_per_second": plan.images_per_second,
        "days": plan.days,
        "gpu_hours": plan.gpu_hours,
        "rate": rate_in_words(plan),
    }


def _table(title: str, rows: list[tuple[str, str]]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, title_style="bold")
    table.add_column()
    table.add_column(justify="right")
    for name, value in rows:
        table.add_row(name, value)
    return table


def _run(plan: Plan) -> Table:
    cost = plan.cost
    return _table(
        f"{plan.preset} on {plan.gpus} x {plan.gpu.name}, {plan.precision}",
        [
            ("parameters", f"{_figure(cost.parameters / 1e6)} M"),
            ("FLOPs per image, forward", f"{_figure(cost.forward_flops / 1e9)} G"),
            ("FLOPs per image, step (2 forwards + backward)", f"{_figure(cost.step_flops / 1e9)} G"),
            ("steps x batch", f"{plan.total_steps:,} x {plan.batch_size:,}"),
            ("FLOPs in all", f"{plan.total_flops:.3g}"),
        ],
    )


def _memory(plan: Plan) -> Table:
    rows = [(kind, _size(size)) for kind, size in plan.memory.items()]
    total = sum(plan.memory.values())
    rows.append(("together", f"{total / 1e9:.1f} of {plan.usable_bytes / 1e9:.0f} GB"))
    pieces = plan.share // plan.micro_batch
    fits = f"{plan.micro_batch:,} images"
    if pieces > 1:
        fits += f", {pieces} times a step (--training.micro-batch {plan.micro_batch})"
    rows.append((f"micro-batch that fits, of {plan.share:,} images", fits))
    return _table("memory of each GPU", rows)


def _time(plan: Plan) -> Table:
    bound = ", bound by launching kernels" if plan.launch_bound else ""
    rows = [
        ("images/s, all GPUs", f"{plan.images_per_second:,.0f}"),
        ("step", f"{_figure(1e3 * plan.step_seconds)} ms{bound}"),
    ]
    if plan.gpus > 1:
        link = plan.gpu.link_name
        way = link if plan.gpus <= GPUS_PER_NODE else f"{link} and the network"
        way += f" at {plan.gpu.ring(plan.gpus) / 1e9:.0f} GB/s"
        hidden = "hidden behind the backward pass"
        if plan.exposed_seconds:
            hidden = f"{_figure(1e3 * plan.exposed_seconds)} ms not hidden"
        rows += [
            ("all-reduced per step", _size(plan.all_reduced_bytes)),
            ("sent by each GPU", f"{_size(plan.wire_bytes)} over {way}: {hidden}"),
        ]
    if plan.calibration_seconds:
        unit, number = _duration(plan.calibration_seconds / 86400)
        rows.append(("choosing bf16 or fp16, in all", f"at most {number} {unit}"))
    rows += [_duration(plan.days), ("GPU hours", _figure(plan.gpu_hours))]
    return _table("time", rows)


def _duration(days: float) -> tuple[str, str]:
    """Unit and number, in the largest unit of which there is at least one."""
    for unit, number in (("days", days), ("hours", 24 * days), ("minutes", 1440 * days)):
        if number >= 1:
            return unit, _figure(number)
    return "seconds", _figure(86400 * days)


def _figure(value: float) -> str:
    """Three digits, one after the point, or all before it, by size."""
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 100 else f"{value:.3g}"


def _size(number: float) -> str:
    """Bytes in words."""
    return f"{number / 1e9:.3g} GB" if number >= 1e9 else f"{number / 1e6:.3g} MB"
