"""Which arithmetic a run's trunk can afford: bf16 until its rounding drowns the gradient, then fp16.

Neighbouring noise levels grow closer with every stage of the curriculum, and so do the two outputs whose
difference is the signal. bf16 keeps 8 bits of each. fp16 keeps 11, at the same speed, but needs a loss scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ict_fast.consistency.curriculum import num_scales
from ict_fast.data.loaders import Batch, Loader
from ict_fast.training.step import TrainStep

_BATCHES = 24
_LEAST_COSINE = 0.998
_MOST_NOISE = 0.10

PIECES = 4
"""An fp32 activation takes twice the memory of a half-precision one: a quarter of the images takes half."""


@dataclass(frozen=True)
class Rounding:
    """What the rounding of a half-precision trunk does to the gradient.

    Attributes:
        cosine: of the mean gradient over all batches with that of an fp32 trunk.
        noise: variance over the batches that the rounding adds, relative to that of the fp32 gradient.
    """

    cosine: float
    noise: float

    @property
    def is_harmless(self) -> bool:
        return self.cosine >= _LEAST_COSINE and self.noise <= _MOST_NOISE


def chooses_trunk(step: TrainStep) -> bool:
    """Whether the trunk is in bf16 only as long as that does no harm."""
    return step.config.training.precision == "auto" and step.autocast_dtype is torch.bfloat16


class _Stopped(Exception):
    """The run is to stop."""


def choose_trunk(
    step: TrainStep, loader: Loader, number: int, is_stopped: Callable[[], bool] = lambda: False
) -> str | None:
    """Goes over to fp16, for the rest of the run, if bf16 is too coarse for the stage that begins.

    What was measured is added to `step.roundings`. It is that of whole global batches, so the choice does not
    depend on micro-batches and processes, up to the order of sums.

    Args:
        step: with a bf16 trunk.
        loader: of the run's batches; those of the next steps are used.
        number: the stage's first step.
        is_stopped: asked before each batch whether the run stops, in all processes alike; the choice is then
            made when it goes on.
    Returns:
        A line for the person; None if the run stops.
    """
    config = step.config
    scales = num_scales(number, config.training.total_steps, config.method)
    step.num_scales.fill_(scales)

    def batches() -> Iterator[Sequence[Batch]]:
        for k in range(_BATCHES):
            if is_stopped():
                raise _Stopped
            yield loader.micro_batches(number + k)

    try:
        measured = measure_rounding(step, number, batches())
    except _Stopped:
        return None
    rounding = step.world.decide(lambda: measured)
    if not rounding.is_harmless:
        step.set_trunk(torch.float16)
    step.roundings.append(
        {
            "step": number,
            "num_scales": scales,
            "cosine": _json_number(rounding.cosine),
            "noise": _json_number(rounding.noise),
        }
    )
    return (
        f"N = {scales}: {'bf16 stays' if rounding.is_harmless else 'bf16 is too coarse, fp16 from here on'}"
        f" (cosine {rounding.cosine:.4f}, at least {_LEAST_COSINE}; noise {rounding.noise:.3f}, at most"
        f" {_MOST_NOISE})"
    )


def measure_rounding(step: TrainStep, first_step: int, batches: Iterable[Sequence[Batch]]) -> Rounding:
    """Compares gradients of the run's own weights with the present trunk and with an fp32 one.

    Changes nothing but `step`'s gradients and step number, which the next step sets anew. Waits for the
    device. Beside what a step needs, it takes three times the memory of the weights; the fp32 passes are made
    over pieces of the micro-batches, whose activations take no more than those of a step.

    Args:
        step: with a half-precision trunk that needs no loss scale, and N(k) set.
        first_step: number of the step whose noise the first batch gets; the others get the following ones'.
        batches: two or more, each in micro-batches; every process passes as many, its share of each.
    """
    half = step.autocast_dtype
    assert half is not None
    assert step.loss_scale is None
    count = 0
    means: list[list[Tensor]] = []
    noise = variance = 0.0
    for count, micro_batches in enumerate(batches, start=1):
        step.world.get_on()
        step.seed_and_step[1].fill_(first_step + count - 1)
        pieces = [piece for batch in micro_batches for piece in cut(batch)]
        # Not compiled: blocks that are compiled for fp32 would serve nobody else.
        with torch.compiler.set_stance("force_eager"):
            step.autocast_dtype = None
            exact = [gradient.clone() for gradient in _gradient(step, pieces)]
            step.autocast_dtype = half
        rounded = _gradient(step, micro_batches)
        noise += _square(torch._foreach_sub(rounded, exact))
        variance += _square(exact)
        if not means:
            means = [[torch.zeros_like(tensor) for tensor in exact] for _ in range(2)]
        for mean, each in zip(means, (exact, rounded), strict=True):
            torch._foreach_add_(mean, each)
        del exact, rounded, each, pieces  # before the next ones are made
    step.optimizer.zero_grad()
    for mean in means:
        torch._foreach_div_(mean, count)
    exact_mean, rounded_mean = means
    # Variance over the batches: the mean of the squares less the square of the mean.
    noise = noise / count - _square(torch._foreach_sub(rounded_mean, exact_mean))
    variance = variance / count - _square(exact_mean)
    dot = sum(float((a.double() * b).sum()) for a, b in zip(exact_mean, rounded_mean, strict=True))
    return Rounding(
        cosine=dot / (_square(exact_mean) * _square(rounded_mean)) ** 0.5, noise=max(noise, 0.0) / variance
    )


def cut(batch: Batch) -> list[Batch]:
    """A micro-batch in the pieces that take the fp32 pass, PIECES of them where it has as many images."""
    size = math.ceil(len(batch.images) / PIECES)
    return [
        Batch(
            batch.images[start : start + size],
            batch.labels[start : start + size],
            None if batch.flip is None else batch.flip[start : start + size],
            batch.offset + start,
        )
        for start in range(0, len(batch.images), size)
    ]


def _gradient(step: TrainStep, micro_batches: Sequence[Batch]) -> list[Tensor]:
    """That of the whole batch, over all processes: the parameters' own, not copies."""
    step.gradient(micro_batches)
    return [p.grad for p in step.network.parameters() if p.grad is not None]


def _square(tensors: Iterable[Tensor]) -> float:
    """The squared length of all tensors together."""
    return float(sum((tensor.double() ** 2).sum() for tensor in tensors))


def _json_number(value: float) -> float | None:
    return value if math.isfinite(value) else None
