"""What a step's time is of its floor, gpu_step_floor.py: of files of before calls had no biases, too.

Until then a floor's calls were those of a step that is not compiled: convolutions with biases, which cuDNN's
take another pass over memory for, as their gradients do; and gradients that are slices, which are copied. A
compiled step has these in passes that there are anyway. What they took, calls of the same shapes tell.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from step_categories import ATTENTION, CONVOLUTION, MATRIX

OURS = "ict-fast"


def passes_over_memory(floor: dict[str, Any]) -> tuple[float, float]:
    """Milliseconds that a floor's convolutions take beyond the fastest call of the same shapes.

    Returns:
        Forward, of those with a bias beyond the one without; backward, where the file does not tell what a
        slower call has besides. 0 and 0 where the calls have none, and say so.
    """
    alike: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for call in floor.get("calls", ()):
        if "bias" not in call and call["operation"].startswith("convolution"):
            shapes = call["shapes"][: 2 if call["operation"] == "convolution" else 3]
            alike[call["operation"], repr(shapes), call["dtype"]].append(call)
    beyond = {"convolution": 0.0, "convolution_backward": 0.0}
    for (operation, *_), calls in alike.items():
        fastest = min(each["ms"] for each in calls)
        beyond[operation] += sum(each["count"] * (each["ms"] - fastest) for each in calls)
    return beyond["convolution"], beyond["convolution_backward"]


def floor_ms(floor: dict[str, Any]) -> float:
    """Of the convolutions and attention alone, without `passes_over_memory`."""
    return float(floor["ms"]) - sum(passes_over_memory(floor))


def times_the_floor(record: dict[str, Any]) -> float | None:
    """Our step's time over that, where both were measured."""
    ratio = record.get("times_the_floor")
    return None if ratio is None else ratio * record["floor"]["ms"] / floor_ms(record["floor"])


def ms_in_the_step(record: dict[str, Any]) -> float | None:
    """What the same operations take within our step, by its profile."""
    ms = record["variants"].get(OURS, {}).get("profile", {}).get("ms")
    return None if ms is None else sum(ms.get(each, 0.0) for each in (CONVOLUTION, MATRIX, ATTENTION))
