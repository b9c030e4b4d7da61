"""The curves of a run as SVG that takes its colours from the page around it."""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

from ict_fast.consistency.curriculum import Stage

# Colours that stand for the page's own: the SVG is written with these, and CSS variables take their place.
_COLOURS = {
    "#101001": "var(--ink)",
    "#202002": "var(--muted)",
    "#303003": "var(--line)",
    "#404004": "var(--first)",
    "#505005": "var(--second)",
    "#606006": "var(--third)",
}
_INK, _MUTED, _LINE, *SERIES = _COLOURS
_MOST_POINTS = 600
_MARKERS = "os^Dv"  # as many as lines of one colour need, for those to whom colours look alike
MOST_LABELLED_STAGES = 12
"""Borders of more stages are not drawn."""
_LETTER = 0.02  # of the axis, at the size of the stages' labels
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "font.size": 11,
    "axes.linewidth": 0.8,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _MUTED,
    "text.color": _INK,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Line:
    """One curve."""

    steps: Sequence[float]
    values: Sequence[float]
    label: str = ""
    marked: bool = False
    """With a point for each value: for few of them."""
    begins_anew: Sequence[float] = ()
    """Steps whose values do not compare with those before: the line is broken there."""


def curve(
    name: str,
    lines: Sequence[Line],
    *,
    total_steps: int,
    stages: Sequence[Stage] = (),
    logarithmic: bool | None = None,
    form: str = "",
    top: float | None = None,
) -> str:
    """Curves over the training steps, with a border at the beginning of each stage of the curriculum.

    Args:
        name: what it shows, for people who do not see it.
        lines: of rising steps; at least one has a value.
        stages: none to draw no borders.
        logarithmic: the scale of the values; None: if they are positive and range over a factor of 10.
        form: "percent", "si" for thousands as k, else plain.
        top: of the axis, which then begins at 0; None: as the values are.
    Returns:
        An <svg> element.
    """
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes()
        _borders(axes, stages, total_steps)
        looks = zip(itertools.cycle(SERIES), itertools.cycle(_MARKERS), strict=True)
        for line, (colour, shape) in zip(lines, looks, strict=False):
            steps, values, low, high = _thinned(line.steps, line.values)
            if low is not None and high is not None:
                axes.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)
            marker = shape if line.marked else "None"
            broken = np.unique(np.searchsorted(steps, line.begins_anew))
            steps, values = (np.insert(each, broken, np.nan) for each in (steps, values))
            [drawn] = axes.plot(steps, values, color=colour, linewidth=1.6, label=line.label)
            drawn.set(marker=marker, markersize=4, clip_on=not line.marked)
        values = np.concatenate([np.asarray(line.values, float) for line in lines])
        if logarithmic is None and top is None:
            logarithmic = values.min() > 0 and values.max() > 10 * values.min()
        if logarithmic and values.min() > 0:
            _logarithmic(axes, values)
        elif values.min() >= 0:
            axes.set_ylim(0, top or values.max() * 1.12 or 1.0)
        if form == "percent":
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3g} %")
        elif form == "si":
            axes.yaxis.set_major_formatter(_thousands(values.max()))
        _steps_axis(axes, total_steps)
        if sum(bool(line.label) for line in lines) > 1:
            axes.legend(fontsize=10, loc="best", handlelength=1.4)
        return _svg(figure, name)


def heat_map(
    name: str,
    steps: Sequence[int],
    rows: Sequence[Sequence[float | None]],
    edges: Sequence[float],
    total: int,
) -> str:
    """Values by step and noise level, on a logarithmic scale of colours.

    Args:
        steps: of the lines of the log, rising.
        rows: for each of them one value per bucket of noise level, None for an empty bucket.
        edges: the buckets' borders, one more than buckets, rising.
    """
    values = np.array([[np.nan if v is None or v <= 0 else v for v in row] for row in rows], float).T
    ends = np.asarray(steps, float)  # a line of the log is about the steps since the one before
    if values.shape[1] > _MOST_POINTS // 3:
        parts = np.array_split(np.arange(values.shape[1]), _MOST_POINTS // 3)
        with np.errstate(all="ignore"):
            values = np.stack([np.exp(_mean(np.log(values[:, part]))) for part in parts], 1)
        ends = ends[[part[-1] for part in parts]]
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes()
        # Rasterized: a picture, not a polygon for each value.
        image = axes.pcolormesh(
            np.append(0.0, ends),
            np.log10(edges),
            np.ma.masked_invalid(values),
            norm=LogNorm(),
            cmap="viridis",
            rasterized=True,
        )
        axes.grid(visible=False)
        axes.set_ylabel("noise level σ")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_formatter(lambda value, _: f"{10**value:g}")
        bar = figure.colorbar(image, ax=axes, pad=0.02, fraction=0.05)
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=0)
        _steps_axis(axes, total)
        return _svg(figure, name)


def _mean(values: np.ndarray) -> np.ndarray:
    """The mean of each row's finite values; NaN where there is none."""
    known = np.isfinite(values)
    return np.where(known, values, 0).sum(1) / known.sum(1)


def _axes() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.6, 2.75), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    figure.patch.set_alpha(0)
    axes.patch.set_alpha(0)
    axes.grid(axis="y", color=_LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    return figure, axes


def _borders(axes: Axes, stages: Sequence[Stage], total: int) -> None:
    """Dashed lines, and labels as far as none meets the one to its right."""
    if not 1 < len(stages) <= MOST_LABELLED_STAGES:
        return
    free_until = math.inf
    for stage in reversed(stages):
        axes.axvline(stage.first_step, color=_LINE, linewidth=0.9, linestyle=(0, (3, 3)), zorder=0)
        label, middle = f"{stage.num_scales:,}", (stage.first_step + stage.end_step) / 2
        room = _LETTER * total * len(label) / 2
        if middle + room > free_until:
            continue
        free_until = middle - room
        axes.text(
            middle,
            1.02,
            label,
            transform=axes.get_xaxis_transform(),
            ha="center",
            fontsize=9.5,
            color=_MUTED,
        )


def _logarithmic(axes: Axes, values: np.ndarray) -> None:
    axes.set_yscale("log")
    if values.max() < 100 * values.min():
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.4g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(which="both", length=0)


def _steps_axis(axes: Axes, total: int) -> None:
    axes.set_xlim(0, total)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(_thousands(total))
    axes.set_xlabel("step", fontsize=10)


def _thousands(greatest: float) -> Any:
    """Such as 1,200; 12k for large numbers."""
    return EngFormatter(sep="") if greatest >= 10_000 else lambda value, _: f"{value:,.0f}"


def _thinned(
    steps: Sequence[float], values: Sequence[float]
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Steps and values; of long series the means, least and greatest of equal parts."""
    x, y = np.asarray(steps, float), np.asarray(values, float)
    if len(x) <= _MOST_POINTS:
        return x, y, None, None
    parts = np.array_split(np.arange(len(x)), _MOST_POINTS)
    means = np.array([(x[part].mean(), y[part].mean(), y[part].min(), y[part].max()) for part in parts])
    return means[:, 0], means[:, 1], means[:, 2], means[:, 3]


def _svg(figure: Figure, name: str) -> str:
    """The figure as an element of an HTML page: no prolog, no metadata, no fixed size, no shared ids."""
    written = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):  # the rest of the ids: the same for equal runs
        figure.savefig(written, format="svg", dpi=200, metadata={"Date": None})  # dpi: of what is rasterized
    text = written.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"<style[^>]*>.*?</style>", "", text, flags=re.DOTALL)  # would hold for the whole page
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # figure_1, axes_1, ...: the same in every figure
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    # The page's own letters. matplotlib 3.11 writes `font-family`, older ones write it within `font`.
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    text = re.sub(r"font: ([^;]*?)'DejaVu Sans'[^;\"]*", r"font: \1sans-serif", text)
    for written_colour, variable in _COLOURS.items():
        text = text.replace(written_colour, variable)
    return text.replace("<svg ", f'<svg role="img" aria-label="{name}" ', 1)
