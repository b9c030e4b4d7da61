"""The result of an evaluation for people."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.table import Table

from ict_fast.evaluation.chunks import in_words, number_word
from ict_fast.screen import asked_sigmas, real_halves

# What it is called, where it is in a result, how it is shown.
_COLUMNS = (
    ("distance", "frechet_distance", "{:.3f}"),
    ("of noise", "of_noise", "{:.2%}"),
    ("KID", "kernel_distance", "{:.4g}"),
    ("IS", "inception_score", "{:.2f}"),
    ("precision", "precision", "{:.3f}"),
    ("recall", "recall", "{:.3f}"),
)


def key(steps: int) -> str:
    """The key of a result under which the measures for so many sampling steps are: "one_step"."""
    return f"{number_word(steps)}_step"


def table(result: dict[str, Any]) -> Table:
    """The result of `evaluate` for people, in 80 columns.

    Args:
        result: what `evaluate` returned, or what was read back from its JSON.
    """
    reference, features = result["reference"], result["features"]
    rows = [
        (real_halves(reference), {"frechet_distance": reference.get("halves")}),
        *((f"model, {in_words(number)}", result[key(number)]) for number in result["steps"]),
        ("Gaussian of pixels", {"frechet_distance": reference.get("gaussian")}),
        ("uniform noise", {"frechet_distance": reference.get("noise")}),
    ]
    rows = [(name, _with_share(values, reference.get("noise"))) for name, values in rows]
    rows = [(name, values) for name, values in rows if values["frechet_distance"] is not None]
    columns = [column for column in _COLUMNS if any(values.get(column[1]) is not None for _, values in rows)]

    real = "" if reference["count"] is None else f" to {reference['count']:,} real images"
    accuracy = features.get("accuracy")
    known = "" if accuracy is None else f", right on {accuracy:.1%} of digits that it has not seen"
    levels = f", {asked}" if (asked := asked_sigmas(result)) else ""
    linear = "" if "gaussian" not in reference else " A linear model achieves the Gaussian's; be well below."
    shown = Table(
        title=f"Fréchet distance{real} (lower is better)",
        caption=f"{result['count']:,} samples, seed {result['seed']}{levels}; features:"
        f" {features['name']}{known}.{linear} Compare only with distances of the same features and count.",
        box=box.SIMPLE_HEAD,
        padding=(0, 1),
        pad_edge=False,
    )
    shown.add_column("images", no_wrap=True)
    for name, _, _ in columns:
        shown.add_column(name, justify="right", no_wrap=True)
    for name, values in rows:
        cells = [
            "" if values.get(field) is None else form.format(values[field]) for _, field, form in columns
        ]
        shown.add_row(name, *cells, style="bold" if name.startswith("model") else None)
    return shown


def _with_share(values: dict[str, Any], noise: float | None) -> dict[str, Any]:
    distance = values["frechet_distance"]
    return values if noise is None or distance is None else {**values, "of_noise": distance / noise}
