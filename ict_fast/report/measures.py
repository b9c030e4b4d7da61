"""The metrics of a run as a table, and as curves where they were measured while it trained."""

from __future__ import annotations

import itertools
from html import escape
from typing import Any

from ict_fast.report.curves import Line, curve
from ict_fast.report.run_record import RunRecord
from ict_fast.screen import MEASURES, asked_sigmas, is_figure, real_halves


def measures(record: RunRecord) -> str:
    """Table and curves as HTML; empty if the run was not measured."""
    parts = []
    result = record.measured
    if result is not None:
        parts.append(_table(result))
    if len(record.evaluations) > 1:
        parts.append(_curves(record))
    return "\n".join(parts)


def _table(result: dict[str, Any]) -> str:
    rows: list[tuple[str, dict[str, Any], bool]] = [
        (in_words(key), value, True)
        for key, value in result.items()
        if key.endswith("_step") and isinstance(value, dict)
    ]
    compared = result.get("reference")
    compared = compared if isinstance(compared, dict) else {}
    for name, words in (
        ("halves", real_halves(compared)),
        ("gaussian", "Gaussian of pixels"),
        ("noise", "uniform noise"),
    ):
        if name in compared:
            rows.append((words, {"frechet_distance": compared[name]}, False))
    columns = [column for column in MEASURES if any(_number(values, column[0]) for _, values, _ in rows)]
    head = "".join(f"<th class='number'>{escape(title)}</th>" for _, title, _ in columns)
    body = ""
    for name, values, is_model in rows:
        cells = "".join(f"<td class='number'>{_cell(values, field, form)}</td>" for field, _, form in columns)
        body += f"<tr{' class=model' if is_model else ''}><td>{escape(name)}</td>{cells}</tr>"
    return (
        f"<div class='card scroll'><table><thead><tr><th></th>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>\n{_notes(result, compared)}"
    )


def in_words(key: str) -> str:
    """ "one step", "two steps", of a key like one_step."""
    return key.replace("_", " ") + ("" if key == "one_step" else "s")


def measured_with(result: dict[str, Any], key: str) -> tuple[Any, ...]:
    """What two measurements in the steps of a key like one_step must have in common to be compared."""
    features, values = result.get("features"), result.get(key)
    network = features.get("sha256") if isinstance(features, dict) else features
    sigmas = values.get("sigmas") if isinstance(values, dict) else None
    # Those after sigma_max; old measurements have them only where they were asked for.
    levels = sigmas[1:] if isinstance(sigmas, list) else result.get("sigmas") or []
    return result.get("count"), network, result.get("reference_fingerprint"), levels


def _number(values: dict[str, Any], field: str) -> bool:
    return is_figure(values.get(field))


def _cell(values: dict[str, Any], field: str, form: str) -> str:
    if not _number(values, field):
        return ""
    deviation = f"{field}_std"
    spread = f" <small>± {values[deviation]:.2g}</small>" if _number(values, deviation) else ""
    return form.format(values[field]) + spread


def _notes(result: dict[str, Any], compared: dict[str, Any]) -> str:
    """What the numbers depend on, what is not available, and warnings."""
    features = result.get("features")
    features = features if isinstance(features, dict) else {}
    about = [f"Step {result['step']:,}" if isinstance(result.get("step"), int) else ""]
    if result.get("ema"):
        about.append(f"average {result['ema']} of the weights")
    if isinstance(result.get("count"), int):
        about.append(f"{result['count']:,} samples, seed {result.get('seed', 0)}")
    about.append(asked_sigmas(result))
    if features.get("name"):
        about.append(f"features {features['name']}")
    if isinstance(compared.get("count"), int):
        about.append(f"{compared['count']:,} real images")
    if result.get("reference_path"):
        about.append(f"reference {result['reference_path']}")
    lines = ["; ".join(text for text in about if text) + ". Lower distances are better."]
    missing = result.get("not_available")
    if isinstance(missing, dict) and missing:
        lines.append(
            "Not available: "
            + "; ".join(f"{name.replace('_', ' ')}: {why}" for name, why in missing.items())
            + "."
        )
    warnings = result.get("warnings")
    lines += [f"Warning: {text}." for text in warnings] if isinstance(warnings, list) else []
    return "".join(f"<p class='note'>{escape(line)}</p>" for line in lines)


def _curves(record: RunRecord) -> str:
    end, stages = record.drawn
    keys = dict.fromkeys(key for line in record.evaluations for key in line if key.endswith("_step"))
    changed = {
        key: [
            line["step"]
            for before, line in itertools.pairwise(line for line in record.evaluations if key in line)
            if measured_with(before, key) != measured_with(line, key)
        ]
        for key in keys
    }
    cards = []
    for field, title, _ in MEASURES:
        lines = []
        for key in keys:
            points = [
                (line["step"], line[key][field])
                for line in record.evaluations
                if isinstance(line.get(key), dict) and _number(line[key], field)
            ]
            if points:
                steps, values = zip(*points, strict=True)
                lines.append(Line(steps, values, in_words(key), marked=True, begins_anew=changed[key]))
        if lines and (field == "frechet_distance" or len(lines[0].steps) > 1):
            top = 1.0 if field in ("precision", "recall") else None
            svg = curve(title, lines, total_steps=end, stages=stages, top=top)
            cards.append(f"<figure class='card'><h3>{escape(title)} while training</h3>{svg}</figure>\n")
    anew = sorted({step for each in changed.values() for step in each})
    note = (
        "<p class='note'>The number of samples, the features, the reference or the noise levels changed at"
        f" step {' and '.join(f'{step:,}' for step in anew)}, where the lines are broken: figures before"
        " and after do not compare.</p>\n"
    )
    return f"{note if anew else ''}<div class='charts'>{''.join(cards)}</div>"
