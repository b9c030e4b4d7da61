"""Which curves a report has: those that the run's log has figures for."""

from __future__ import annotations

import statistics
from html import escape

from ict_fast.report.curves import MOST_LABELLED_STAGES, Line, curve, heat_map
from ict_fast.report.run_record import RunRecord
from ict_fast.screen import is_figure, rate

_BORDERS = (
    "Dashed lines are the borders of the curriculum's stages, the numbers above them the noise levels N of"
    " each, where there is room."
)


def charts(record: RunRecord) -> str:
    """All curves as HTML; empty if there are none."""
    end, plan = record.drawn
    cards = []

    def add(title: str, words: str, svg: str) -> None:
        note = f" <small>{escape(words)}</small>" if words else ""
        cards.append(f"<figure class='card'><h3>{escape(title)}{note}</h3>{svg}</figure>\n")

    for name, title, form, scale in (
        ("loss", "Loss", "", 1.0),
        ("gradient_norm", "Gradient norm", "", 1.0),
        ("images_per_second", "Images per second", "si", 1.0),
        ("mfu", "Model FLOP utilisation", "percent", 100.0),
        ("data_wait", "Waiting for data", "percent", 100.0),
        ("memory_gb", "Memory, GB", "", 1.0),
        ("loss_scale", "Loss scale of fp16", "", 1.0),
        ("learning_rate", "Learning rate", "", 1.0),
    ):
        steps, values = record.series(name)
        if not values or (name == "learning_rate" and len(set(values)) == 1):
            continue
        words = ""
        if name == "images_per_second":
            words = f"median {rate(statistics.median(values))}"
        elif form == "percent":
            words = f"median {100 * statistics.median(values):.3g} %"
        line = Line(steps, [value * scale for value in values])
        logarithmic = False if form or name in ("memory_gb", "learning_rate") else None
        svg = curve(title, [line], total_steps=end, stages=plan, logarithmic=logarithmic, form=form)
        add(title, words, svg)
    if heat := _loss_by_sigma(record, end):
        cards.insert(1, heat)
    if len(plan) > MOST_LABELLED_STAGES:  # too many borders to draw
        steps, values = record.series("num_scales")
        if values:
            line = Line(steps, values)
            add("Noise levels N", "", curve("Noise levels", [line], total_steps=end))
    if not cards:
        return ""
    return f"{_note(record)}<div class='charts'>{''.join(cards)}</div>"


def _note(record: RunRecord) -> str:
    """What the stages of the curriculum mean for the curves; empty for a single one."""
    _, plan = record.drawn
    if len(plan) < 2:
        return ""
    weighted = record.config.method.weighting != "uniform"
    why = "its weights grow with N" if weighted else "the more levels, the nearer they are to each other"
    compared = f"The loss of one stage does not compare with that of another: {why}."
    borders = f"{_BORDERS} " if len(plan) <= MOST_LABELLED_STAGES else ""
    return f"<p class='note'>{borders}{compared}</p>\n"


def _loss_by_sigma(record: RunRecord, end: int) -> str:
    """Mean loss by step and noise level, if the log has it and it is known which levels they are."""
    edges = record.about.get("sigma_edges")
    found = [line for line in record.log if isinstance(line.get("loss_by_sigma"), list)]
    if not isinstance(edges, list) or not all(is_figure(edge) and edge > 0 for edge in edges):
        return ""
    found = [line for line in found if len(line["loss_by_sigma"]) == len(edges) - 1]
    rows = [line["loss_by_sigma"] for line in found]
    if not any(value is not None and value > 0 for row in rows for value in row):
        return ""
    svg = heat_map("Loss by noise level", [line["step"] for line in found], rows, edges, end)
    return f"<figure class='card'><h3>Loss by noise level <small>weighted means</small></h3>{svg}</figure>\n"
