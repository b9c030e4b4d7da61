"""The page: one HTML file that asks for nothing from anywhere, with no script."""

from __future__ import annotations

import base64
import statistics
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

from ict_fast.report.charts import charts
from ict_fast.report.measures import in_words, measured_with, measures
from ict_fast.report.run_record import Field, RunRecord
from ict_fast.report.style import STYLE
from ict_fast.screen import asked_sigmas, is_figure, rate
from ict_fast.version import __version__

_MOST_GRIDS = 9
_FREE_OF_CONTENT = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def page(record: RunRecord) -> str:
    """The report of a run as a whole HTML document."""
    name = escape(record.path.resolve().name)
    parts = [
        _head(record, name),
        _facts(record),
        _missing(record),
        _section("Pictures", _grids(record)),
        _section("Metrics", measures(record)),
        _section("Curves", charts(record)),
        _section("Configuration", _configuration(record)),
        _section("Repeat it", "" if record.is_imported else _repeat(record)),
        _section("Hardware and versions", _versions(record)),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_FREE_OF_CONTENT}">\n'
        f'<title>{name} · ict-fast</title>\n<link rel="icon" href="data:,">\n'
        f"<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{''.join(parts)}"
        f"<footer>Written by ict-fast {__version__} on {datetime.now(UTC):%Y-%m-%d %H:%M} UTC.</footer>\n"
        "</main>\n</body>\n</html>\n"
    )


def _section(title: str, content: str) -> str:
    return f"<section>\n<h2>{title}</h2>\n{content}\n</section>\n" if content else ""


def _head(record: RunRecord, name: str) -> str:
    config, total = record.config, record.config.training.total_steps
    network = config.network
    kind = f"{network.num_classes:,} classes" if network.num_classes else "without classes"
    images = f"{network.resolution}×{network.resolution} {'RGB' if network.image_channels == 3 else 'grey'}"
    done = "finished" if record.step >= total else f"{record.step:,} of {total:,} steps"
    done = "not trained here" if record.is_imported else done
    return (
        f"<header>\n<h1>{name}</h1>\n<p class='lead'>Preset {escape(config.preset)} · {images}, {kind} ·"
        f" {escape(network.name)} · {done}</p>\n</header>\n"
    )


def _facts(record: RunRecord) -> str:
    """The few numbers that one looks for first."""
    facts: list[tuple[str, str]] = []
    newest, best = record.measured or {}, record.best_measured or {}
    first = next((key for key in best if key.endswith("_step")), "")  # which it is the best in
    if measured_with(newest, first) != measured_with(best, first):  # 500 samples have another than 50,000
        best = {}
    for words, measured, keys in (("", newest, ("one_step", "two_step")), ("best ", best, (first,))):
        step, ema = measured.get("step"), measured.get("ema")
        where = f", at step {step:,}" if isinstance(step, int) else ""
        where += f", average {ema}" if ema else ""
        where += f", {levels}" if (levels := asked_sigmas(measured)) else ""
        where += f", {measured['count']:,} samples" if type(measured.get("count")) is int else ""
        for key in keys:
            found = measured.get(key)
            value = found.get("frechet_distance") if isinstance(found, dict) else None
            if is_figure(value):
                facts.append((f"{value:.4g}", f"{words}Fréchet, {in_words(key)}{where}"))
    batch = record.config.training.batch_size
    facts.append((f"{record.step:,}", f"steps of {batch:,} images"))
    rates = record.series("images_per_second")[1]
    if rates:
        facts.append((rate(statistics.median(rates)), "images/s, median"))
        facts.append((_duration(_training_seconds(record)), "of training"))
    mfu = record.series("mfu")[1]
    if mfu:
        facts.append((f"{statistics.median(mfu):.1%}", "MFU, median"))
    memory = record.series("memory_gb")[1]
    if memory:
        facts.append((f"{max(memory):.3g} GB", "memory, most"))
    skipped = record.log[-1].get("skipped") if record.log else None
    if skipped:
        facts.append((f"{skipped:,}", "steps skipped, gradient not finite"))
    items = "".join(
        f"<div><b>{escape(value)}</b><span>{escape(words)}</span></div>" for value, words in facts
    )
    return f"<div class='facts'>{items}</div>\n"


def _training_seconds(record: RunRecord) -> float:
    """Time spent training: by the rates, as a run may have been stopped in between."""
    batch, before, seconds = record.config.training.batch_size, 0, 0.0
    for step, images in zip(*record.series("images_per_second"), strict=True):
        seconds += (step - before) * batch / images if images > 0 else 0
        before = step
    return seconds


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if seconds < 120:
        return f"{seconds:.0f} s"
    if minutes < 120:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes < 72 * 60 else f"{minutes / 1440:.1f} days"


def _missing(record: RunRecord) -> str:
    if not record.missing:
        return ""
    items = "".join(f"<li>{escape(text)}</li>" for text in record.missing)
    return _section("What is missing", f"<ul class='missing'>{items}</ul>")


def _grids(record: RunRecord) -> str:
    """The last grid, large, and others at about equal distances."""
    if not record.grids:
        return ""
    *earlier, last = record.grids
    if len(earlier) > _MOST_GRIDS - 1:
        count = _MOST_GRIDS - 1
        earlier = [earlier[round(i * (len(earlier) - 1) / (count - 1))] for i in range(count)]
    shown = [_figure(*last, "last"), *(_figure(*grid, "") for grid in earlier)]
    return (
        "<p class='note'>One network evaluation per image, of the averaged weights, from the same noise every"
        f" time.</p>\n<div class='grids'>{''.join(shown)}</div>"
    )


def _figure(step: int, picture: Path, kind: str) -> str:
    content = base64.b64encode(picture.read_bytes()).decode()
    return (
        f"<figure class='{kind}'><img alt='Samples after {step:,} steps'"
        f" src='data:image/png;base64,{content}'><figcaption>step {step:,}</figcaption></figure>\n"
    )


def _configuration(record: RunRecord) -> str:
    changed = sum(field.is_changed for field in record.fields)
    words = f"{changed} fields differ from the preset and are marked"
    if changed < 2:
        words = "One field differs from the preset and is marked" if changed else "All is as the preset says"
    if record.is_imported:
        words = "What its file does not tell is a default"
    sections: dict[str, list[Field]] = {}
    for field in record.fields:
        sections.setdefault(field.section, []).append(field)
    cards = []
    for section, fields in sections.items():
        rows = "".join(_row(field) for field in fields)
        cards.append(f"<div class='card'><h3>{escape(section)}</h3><table>{rows}</table></div>")
    return f"<p class='note'>{words}.</p>\n<div class='sections'>{''.join(cards)}</div>"


def _row(field: Field) -> str:
    value = escape(_shown(field.value))
    if field.is_changed:
        value = f"<mark>{value}</mark> <small>preset: {escape(_shown(field.preset_value))}</small>"
    return f"<tr><td>{escape(field.name)}</td><td class='value'>{value}</td></tr>"


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _repeat(record: RunRecord) -> str:
    fingerprint = record.state.get("data_fingerprint")
    data = (
        f"<p class='note'>Data fingerprint <code>{escape(str(fingerprint))}</code></p>" if fingerprint else ""
    )
    begun = " and the weights that it began with" if record.initial else ""
    same = (
        "On a CPU with the same number of threads and processes, and on a GPU with <code class='option'>"
        f"--training.deterministic</code>, the same versions{begun} give the same weights."
    )
    if record.extensions:
        plans = ", ".join(f"{total:,} until step {step:,}" for step, total in record.extensions)
        same = (
            f"The run was extended: its curriculum was one for {plans}. The command trains for all steps from"
            " the start, which is another curriculum and gives other weights."
        )
    return f"<pre>{escape(record.command())}</pre>\n<p class='note'>{same}</p>\n{data}"


def _versions(record: RunRecord) -> str:
    rows: list[tuple[str, str]] = []
    about, state = record.about, record.state
    if about.get("device"):
        rows.append(("device", str(about["device"])))
    if about.get("processes"):
        rows.append(("processes", str(about["processes"])))
    if initial := record.initial:
        step = initial.get("step")
        at = f"step {step:,}" if isinstance(step, int) else f"step {step}"
        rows.append(("began with", f"{initial.get('path')}, {at}, sha256 {initial.get('sha256')}"))
    if state.get("trunk_dtype"):
        rows.append(("arithmetic of the trunk, at the end", str(state["trunk_dtype"])))
    if is_figure(about.get("flops_per_image")):
        rows.append(("GFLOP per image and training step", f"{about['flops_per_image'] / 1e9:.4g}"))
    plan = record.stages
    rows.append(("stages of the curriculum", f"{len(plan):,}, N = {_levels([s.num_scales for s in plan])}"))
    rows += [(name, str(value)) for name, value in _items(state.get("versions"))]
    if times := record.series("time")[1]:
        first, last = (datetime.fromtimestamp(time, UTC) for time in (times[0], times[-1]))
        rows.append(
            ("first and last line of the log", f"{first:%Y-%m-%d %H:%M} and {last:%Y-%m-%d %H:%M} UTC")
        )
    body = "".join(f"<tr><td>{escape(k)}</td><td class='value'>{escape(v)}</td></tr>" for k, v in rows)
    return f"<div class='card scroll'><table>{body}</table></div>"


def _items(versions: object) -> Iterable[tuple[str, Any]]:
    return versions.items() if isinstance(versions, dict) else ()


def _levels(levels: Sequence[int]) -> str:
    shown = [f"{number:,}" for number in levels]
    return ", ".join(shown if len(shown) <= 12 else [*shown[:3], "…", shown[-1]])
