"""Which arithmetic a run's trunk can afford: bf16 until its rounding drowns the gradient, then fp16.

Neighbouring noise levels grow closer with every stage of the curriculum, and so do the two outputs whose
difference is the signal. bf16 keeps 8 bits of each. fp16 keeps 11, at the same speed, but needs a loss scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ict_fast.consistency.curriculum import num_scales
from ict_fast.data.loaders import Batch, Loader
from ict_fast.training.step import TrainStep, trunk_dtype

BATCHES = 24
"""The most that a choice takes; it takes fewer where they say the same."""

_FEWEST_BATCHES = 6
_LEAST_COSINE = 0.998
_MOST_NOISE = 0.10

# When fewer batches will do: the noise is so many standard errors from its bound, and where bf16 stays, the
# mean gradient lacks no more than half of what it may lack of a cosine of 1. Noise averages out in it, so it
# would lack less over more batches; that the noise is too much, no more batches can mend.
_STANDARD_ERRORS = 3.0
_CLEAR_COSINE = 1 - (1 - _LEAST_COSINE) / 2

_GROWTH = 1.5

# Of the gradient's square: a variance far below it is the rounding of these sums in fp32.
_LEAST_VARIANCE = 1e-4

PIECES = 4
"""An fp32 activation takes twice the memory of a half-precision one: a quarter of the images takes half."""


@dataclass(frozen=True)
class Rounding:
    """What the rounding of a half-precision trunk does to the gradient.

    Attributes:
        cosine: of the mean gradient over all batches with that of an fp32 trunk.
        noise: variance over the batches that the rounding adds, relative to that of the fp32 gradient.
        noise_error: standard error of the noise.
        batches: those that it is known from. Those whose gradient is not finite do not count: a step of the
            training would be skipped for it.
    """

    cosine: float
    noise: float
    noise_error: float = 0.0
    batches: int = BATCHES

    @property
    def is_known(self) -> bool:
        return self.batches >= _FEWEST_BATCHES

    @property
    def is_harmless(self) -> bool:
        """Whether bf16 may stay; what is not known is no reason to leave it."""
        return not self.is_known or (self.cosine >= _LEAST_COSINE and self.noise <= _MOST_NOISE)

    @property
    def is_clear(self) -> bool:
        """Whether more batches would only say the same."""
        if not self.is_known or abs(self.noise - _MOST_NOISE) < _STANDARD_ERRORS * self.noise_error:
            return False
        return self.noise > _MOST_NOISE or self.cosine >= _CLEAR_COSINE


def chooses_trunk(step: TrainStep) -> bool:
    """Whether the trunk is in bf16 only as long as that does no harm."""
    return step.config.training.precision == "auto" and step.autocast_dtype is torch.bfloat16


class _Stopped(Exception):
    """The run is to stop."""


def is_too_coarse(roundings: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the last choice, as `TrainStep.roundings` keeps it, was to leave bf16."""
    if not roundings or roundings[-1].get("fp16_overflows", False):
        return False
    last = roundings[-1]
    cosine, noise = (math.nan if last[name] is None else last[name] for name in ("cosine", "noise"))
    return not Rounding(cosine, noise, batches=last["batches"]).is_harmless


def choice_is_due(step: TrainStep, number: int) -> bool:
    """Whether to choose the trunk at this step, the first one of a stage or of a process.

    Where N has grown by half, or has fallen so far, since the last choice: each stage that doubles N, and not
    each of the hundreds of a curriculum that grows by one.
    """
    if not chooses_trunk(step):
        return False
    scales = num_scales(number, step.config.training.total_steps, step.config.method)
    last = step.roundings[-1]["num_scales"] if step.roundings else 0
    return not last / _GROWTH < scales < last * _GROWTH


def choose_trunk(
    step: TrainStep, loader: Loader, number: int, is_stopped: Callable[[], bool] = lambda: False
) -> str | None:
    """Goes over to fp16, for the rest of the run, if bf16 is too coarse for the stage that begins.

    Unless activations are beyond fp16, which no loss scale helps: in bf16 they harm nobody, as every reader
    of the trunk's sums is a norm.

    What was measured is added to `step.roundings`. It is that of whole global batches, so the choice does not
    depend on micro-batches and processes, up to the order of sums.

    Args:
        step: with a bf16 trunk.
        loader: of the run's batches; those of the next steps are used.
        number: the step that comes next.
        is_stopped: asked before each batch whether the run stops, in all processes alike; the choice is then
            made when it goes on.
    Returns:
        A line for the person; None if the run stops.
    """
    config = step.config
    scales = num_scales(number, config.training.total_steps, config.method)
    step.num_scales.fill_(scales)

    def batches() -> Iterator[Sequence[Batch]]:
        for k in range(BATCHES):
            if is_stopped():
                raise _Stopped
            yield loader.micro_batches(number + k)

    try:
        measured = measure_rounding(step, number, batches())
    except _Stopped:
        return None
    rounding = step.world.decide(lambda: measured)
    overflows = not rounding.is_harmless and _overflows_fp16(step, number, loader.micro_batches(number))
    if not (rounding.is_harmless or overflows):
        step.set_trunk(torch.float16)
    step.roundings.append(
        {
            "step": number,
            "num_scales": scales,
            "cosine": _json_number(rounding.cosine),
            "noise": _json_number(rounding.noise),
            "batches": rounding.batches,
            "fp16_overflows": overflows,
        }
    )
    if not rounding.is_known:
        return f"N = {scales}: bf16 stays (only {rounding.batches} of {BATCHES} batches had finite gradients)"
    chosen = "bf16 stays" if rounding.is_harmless else "bf16 is too coarse, fp16 from here on"
    if overflows:
        chosen = "bf16 is too coarse, and stays, as activations overflow fp16"
    return (
        f"N = {scales}: {chosen}"
        f" (cosine {rounding.cosine:.4f}, at least {_LEAST_COSINE}; noise {rounding.noise:.3f}, at most"
        f" {_MOST_NOISE}; {rounding.batches} batches)"
    )


def leave_fp16(step: TrainStep, loader: Loader, number: int) -> str | None:
    """Goes back to bf16 if activations have outgrown fp16 since it was chosen: no step would be finite again.

    A later stage may choose fp16 once more.

    Args:
        step: after a step that was skipped.
        loader: of the run's batches.
        number: that step's.
    Returns:
        A line for the person; None if nothing was changed: fp16 was not chosen, or is not the reason.
    """
    config = step.config
    chosen = config.training.precision == "auto" and step.autocast_dtype is torch.float16
    if not chosen or trunk_dtype("auto", step.device) is not torch.bfloat16:
        return None
    if not _overflows_fp16(step, number, loader.micro_batches(number)):
        return None
    step.set_trunk(torch.bfloat16)
    scales = num_scales(number, config.training.total_steps, config.method)
    step.roundings.append(
        {
            "step": number,
            "num_scales": scales,
            "cosine": None,
            "noise": None,
            "batches": 0,
            "fp16_overflows": True,
        }
    )
    return f"N = {scales}: activations overflow fp16 by now, bf16 from here on"


def measure_rounding(step: TrainStep, first_step: int, batches: Iterable[Sequence[Batch]]) -> Rounding:
    """Compares gradients of the run's own weights with the present trunk and with an fp32 one.

    Changes nothing but `step`'s gradients and step number, which the next step sets anew. Waits for the
    device. Beside what a step needs, it takes three times the memory of the weights; the fp32 passes are made
    over pieces of the micro-batches, whose activations take no more than those of a step.

    Args:
        step: with a half-precision trunk that needs no loss scale, and N(k) set.
        first_step: number of the step whose noise the first batch gets; the others get the following ones'.
        batches: each in micro-batches; every process passes as many, its share of each. No more are taken
            than it needs to be clear what they say.
    """
    half = step.autocast_dtype
    assert half is not None
    assert step.loss_scale is None
    sums = _Sums()
    for number, micro_batches in enumerate(batches, start=first_step):
        step.world.get_on()
        step.seed_and_step[1].fill_(number)
        pieces = [piece for batch in micro_batches for piece in cut(batch)]
        # Not compiled: blocks that are compiled for fp32 would serve nobody else.
        with torch.compiler.set_stance("force_eager"):
            step.autocast_dtype = None
            exact = [gradient.clone() for gradient in _gradient(step, pieces)]
            step.autocast_dtype = half
        rounded = _gradient(step, micro_batches)
        sums.add(exact, rounded)
        del exact, rounded, pieces  # before the next ones are made
        if step.world.decide(lambda: sums.rounding.is_clear):
            break
    step.reduction.clear()
    return sums.rounding


def _overflows_fp16(step: TrainStep, number: int, micro_batches: Sequence[Batch]) -> bool:
    """Whether the loss of a batch is not finite with a trunk in fp16, in any process.

    Changes nothing but `step`'s gradients and step number, as `measure_rounding`.
    """
    half = step.autocast_dtype
    step.seed_and_step[1].fill_(number)
    step.set_trunk(torch.float16)
    with torch.compiler.set_stance("force_eager"):  # what may not be used is not compiled
        loss = step.compute([piece for batch in micro_batches for piece in cut(batch)])[0]
    step.reduction.clear()
    step.set_trunk(half)
    return step.world.any(not math.isfinite(float(loss)))


class _Sums:
    """What the gradients of the batches so far add up to; takes twice the memory of the weights.

    Attributes:
        rounding: what they say.
    """

    def __init__(self) -> None:
        self.rounding = Rounding(math.nan, math.nan, math.nan, 0)
        self._exact: list[Tensor] = []
        self._rounded: list[Tensor] = []
        self._squares: list[tuple[float, float]] = []  # of the difference, and of the exact gradient

    def add(self, exact: Sequence[Tensor], rounded: Sequence[Tensor]) -> None:
        """Takes a batch's gradients in fp32 and in half precision, unless they are zero or not finite."""
        squares = _square(torch._foreach_sub(list(rounded), list(exact))), _square(exact)
        if not (squares[1] > 0 and all(map(math.isfinite, squares))):
            return
        self._squares.append(squares)
        if not self._exact:
            self._exact, self._rounded = ([torch.zeros_like(each) for each in exact] for _ in range(2))
        torch._foreach_add_(self._exact, list(exact))
        torch._foreach_add_(self._rounded, list(rounded))
        self.rounding = self._summed_up()

    def _summed_up(self) -> Rounding:
        count = len(self._squares)
        exact, rounded = _square(self._exact), _square(self._rounded)
        dot = sum(float((a.double() * b).sum()) for a, b in zip(self._exact, self._rounded, strict=True))
        # Variance over the batches: the mean of the squares less the square of the mean.
        of_mean = _square(torch._foreach_sub(self._rounded, self._exact)) / count**2, exact / count**2
        noises, variances = (
            [square - of_mean[which] for square in squares]
            for which, squares in enumerate(zip(*self._squares, strict=True))
        )
        floor = _LEAST_VARIANCE * sum(square for _, square in self._squares)
        whole = max(sum(variances), floor)
        noise = max(sum(noises), 0.0) / whole
        # That of a ratio of two means, by what each batch contributes to it.
        spread = sum((a - noise * b) ** 2 for a, b in zip(noises, variances, strict=True))
        return Rounding(
            cosine=dot / (exact * rounded) ** 0.5 if exact * rounded > 0 else 0.0,
            noise=noise,
            noise_error=(spread * count / max(count - 1, 1)) ** 0.5 / whole,
            batches=count,
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
