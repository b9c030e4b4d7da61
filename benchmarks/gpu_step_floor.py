"""The time of a step's convolutions and attention alone: every distinct call of the step, repeated by itself.

The calls are those that step_counts.py meets on fake tensors. Each is timed in a CUDA graph over buffers that
L2 does not hold, and counted as often as the step makes it. What the networks compute as matrix products
(convolution.py) is timed as these and as a convolution, and counts as the faster. So is a convolution of what
nearest upsampling gives, as it is written and computed before the upsampling; to put the results in place is
a pass over memory, and no floor's. Depthwise convolutions, which only resample, are left out: a fused kernel
could do their work elsewhere. So are biases and copies of gradients, see `as_compiled`.

Then all calls are timed as one sequence, for whether a device that is kept busy with them is as fast as where
it waits between two of them.
"""

from __future__ import annotations

import random
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import flops
import torch
import torch.nn.functional as F
from gpu_timing import OURS, Stage, buffer_sets, differentiable, time_variants
from step_counts import Call, TensorOf, heavy_calls
from step_timing import time_steps
from torch import Tensor

from ict_fast.networks.convolution import (
    folded_products,
    neighbourhoods,
    pixel_product_gradients,
    pixel_products,
    to_neighbours,
)

# Of a call: a step has more than a hundred distinct ones, whose sum is what counts.
_ROUNDS = 5
_IMAGE_CHANNELS = 3
_PRODUCTS, _BACKWARD = "matrix products", "convolution_backward"
_BEFORE_UPSAMPLING = "before upsampling"
# Of the sequence: the first few choose cuDNN's algorithms and fill the allocator's pool.
_WARM_UP_SEQUENCES, _SEQUENCES = 2, 9
# Where an operation's schema has the number of groups.
_GROUPS = {"convolution": 8, "convolution_backward": 9}
_ATTENTION = {"attention": flops.attention, "attention backward": flops.attention_backward}


def measure_floor(
    preset: str, images: int, device: torch.device, left: Callable[[], float]
) -> Iterator[dict[str, Any]]:
    """Milliseconds of a step's convolutions and attention, those first that have most of the FLOPs.

    Args:
        left: seconds that are left; no call is timed after them, so that the sum is of a part.
    Yields:
        After every call: share_of_flops that the sums cover; ms in all; ms by operation; one entry for each
        distinct call: operation, shapes, dtype, whether it adds a bias or gives its gradient, whether the
        first tensor is dense in channels_last, whether it is of what nearest upsampling gives, count, ms of
        one, and as what it is the fastest. Then the same with in_sequence, see `time_sequence`.
    """
    calls = floor_calls(heavy_calls(preset, images))
    work = {call: count * flops_of_call(call) for call, count in calls.items()}
    found: list[dict[str, Any]] = []
    by_operation: dict[str, float] = {}
    fastest: dict[Call, str] = {}
    covered, record = 0, {}
    for call in sorted(calls, key=lambda each: -work[each]):
        if left() <= 0:
            return
        milliseconds, fastest[call] = _where_a_step_calls_it(call, device)
        by_operation[call.operation] = by_operation.get(call.operation, 0.0) + calls[call] * milliseconds
        covered += work[call]
        tensors = [each for each in call.arguments if isinstance(each, TensorOf)]
        found.append(
            {
                "operation": call.operation,
                "shapes": [each.shape for each in tensors[:3]],
                "dtype": str(tensors[0].dtype).removeprefix("torch."),
                "bias": _has_bias(call),
                "channels_last": tensors[0].stride == _channels_last(tensors[0]).stride,
                "upsampled": call.upsampled,
                "count": calls[call],
                "ms": milliseconds,
                "as": call.operation if fastest[call] == OURS else fastest[call],
            }
        )
        record = {
            "share_of_flops": covered / sum(work.values()),
            "ms": sum(by_operation.values()),
            "ms_by_operation": dict(by_operation),
            "calls": list(found),
        }
        yield record
    if left() > 0:
        yield record | {"in_sequence": time_sequence(calls, fastest, device)}


def flops_of_call(call: Call) -> int:
    """2 per multiply-add, as torch's counter has them."""
    if call.operation in _ATTENTION:
        return _ATTENTION[call.operation](
            *(each.shape for each in call.arguments if isinstance(each, TensorOf))
        )
    operation = getattr(torch.ops.aten, call.operation).default
    return flops.flops_of(lambda: operation(*(_made(each, torch.device("meta")) for each in call.arguments)))


def _made(argument: Any, device: torch.device, generator: torch.Generator | None = None) -> Any:
    """A random tensor of a shape, strides and dtype; anything else as it is."""
    if not isinstance(argument, TensorOf):
        return argument
    values = torch.empty_strided(argument.shape, argument.stride, dtype=argument.dtype, device=device)
    return values if generator is None else values.normal_(generator=generator)


def floor_calls(calls: Counter[Call]) -> Counter[Call]:
    """The dense convolutions and the attention among the calls, `as_compiled`."""
    found = Counter[Call]()
    for call, count in calls.items():
        if call.operation not in _GROUPS or call.arguments[_GROUPS[call.operation]] == 1:
            found[as_compiled(call)] += count
    return found


def as_compiled(call: Call) -> Call:
    """A call as Inductor makes it of one that is not compiled.

    cuDNN's convolutions have no bias: it would be another pass over memory, which is fused with others. A
    product keeps it. A bias's gradient is a pass of its own or fused, and no convolution's. The gradient that
    arrives is dense in channels_last, where torch.cat's, not compiled, is a slice that has to be copied.
    """
    arguments = list(call.arguments)
    if call.operation == "convolution" and _product_of(call) is None:
        arguments[2] = None
    elif call.operation == _BACKWARD:
        arguments[0] = _channels_last(arguments[0])
        arguments[3], arguments[-1] = None, (*arguments[-1][:2], False)
    return call._replace(arguments=tuple(arguments))


def _before_upsampling(call: Call) -> Call:
    """The convolution of what nearest upsampling gives, or its gradients, as a block computes it on a GPU."""
    place = _GROUPS[call.operation] - 5
    *gradient, x, weight, bias = call.arguments[:place]
    assert (weight.shape[2:], set(call.arguments[place + 1])) == ((3, 3), {1})
    (count, channels, height, width), phases = x.shape, 4 * weight.shape[0]
    shapes = [(count, channels, height // 2, width // 2), (phases, channels, 2, 2)]
    if gradient:
        shapes.insert(0, (count, phases, height // 2 + 1, width // 2 + 1))
    made = [_channels_last(TensorOf(shape, (), x.dtype)) for shape in shapes]
    return Call(call.operation, (*made, bias, *call.arguments[place:]))


def _has_bias(call: Call) -> bool:
    """Whether a convolution adds one, or its backward pass gives the gradient of one."""
    if call.operation == _BACKWARD:
        return bool(call.arguments[-1][2])
    return call.operation == "convolution" and call.arguments[2] is not None


def _channels_last(described: TensorOf) -> TensorOf:
    if len(described.shape) != 4:
        return described
    _, channels, height, width = described.shape
    strides = height * width * channels, 1, width * channels, channels
    return TensorOf(described.shape, strides, described.dtype)


def time_sequence(calls: Counter[Call], fastest: Mapping[Call, str], device: torch.device) -> dict[str, Any]:
    """All calls of a step one behind the other, in a random order; convolutions' backward passes last, in
    autograd's thread.

    Args:
        calls: each with its number of times.
        fastest: as what each is to be called, the variant that `time_call` gives.
    Returns:
        ms, the median; and how it was timed, as `StepTimes.record` has it.
    """
    order = list(calls.elements())
    random.Random(0).shuffle(order)
    operations = {call: _on_tensors_of_its_own(call, fastest[call], device) for call in calls}
    backward = [operations[call] for call in order if call.operation == _BACKWARD]
    forward = [operations[call] for call in order if call.operation != _BACKWARD]

    def sequence(number: int) -> None:
        _call_all(forward)
        _in_backward(partial(_call_all, backward), device)

    for number in range(_WARM_UP_SEQUENCES):
        sequence(number)
    times = time_steps(sequence, range(_SEQUENCES), device)
    return {"ms": statistics.median(times.ms), **times.record()}


def _call_all(operations: Sequence[Callable[[], object]]) -> None:
    """Keeps no result: all of them would not fit into a device's memory."""
    for each in operations:
        each()


def _on_tensors_of_its_own(call: Call, variant: str, device: torch.device) -> Callable[[], object]:
    """A call as a function; of attention's backward pass, on what one forward pass has kept."""
    if variant == _BEFORE_UPSAMPLING:
        call = _before_upsampling(call)
    made = [_made(each, device, torch.Generator(device).manual_seed(0)) for each in call.arguments]
    if call.operation == "attention":
        return partial(F.scaled_dot_product_attention, *made[:3])
    if call.operation == "attention backward":
        gradient, *leaves = made[:4]
        output = F.scaled_dot_product_attention(*(each.requires_grad_() for each in leaves))
        return partial(torch.autograd.grad, output, leaves, gradient, retain_graph=True)
    product = _product_of(call) if variant == _PRODUCTS else None
    return partial(product or getattr(torch.ops.aten, call.operation).default, *made)


def _where_a_step_calls_it(call: Call, device: torch.device) -> tuple[float, str]:
    """`time_call`, of a backward pass's convolutions in autograd's thread.

    torch keeps which of cuDNN's algorithms is the fastest for each thread: here it would try them all again.
    """
    if call.operation != _BACKWARD:
        return time_call(call, device)
    found: list[tuple[float, str]] = []
    _in_backward(lambda: found.append(time_call(call, device)), device)
    return found[0]


def _in_backward(work: Callable[[], object], device: torch.device) -> None:
    """Does some work where autograd would: on a GPU, in a thread of its own."""
    _InBackward.apply(torch.zeros((), device=device, requires_grad=True), work).backward()


class _InBackward(torch.autograd.Function):
    """The identity, whose backward pass does some work first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, work: Callable[[], object]) -> Tensor:
        ctx.work = work
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.work()
        return gradient, None


def time_call(call: Call, device: torch.device) -> tuple[float, str]:
    """Milliseconds of a call on random tensors of its shapes, strides and dtypes, and its fastest variant."""
    tensors = [each for each in call.arguments if isinstance(each, TensorOf)]
    moved = sum(each.numel * each.dtype.itemsize for each in tensors)
    sets = buffer_sets(moved, device)
    made = partial(_made, device=device, generator=torch.Generator(device).manual_seed(0))
    if call.operation.startswith("attention"):
        stages = _attention_stages(call, [[made(each) for each in tensors] for _ in range(sets)])
    else:
        operation = getattr(torch.ops.aten, call.operation).default
        arguments = [[made(each) for each in call.arguments] for _ in range(sets)]
        stages = {"forward": lambda number, _: operation(*arguments[number])}
    variants = {OURS: stages}
    if product := _product_of(call):
        variants[_PRODUCTS] = {"forward": lambda number, _: product(*arguments[number])}
    if call.upsampled:
        halved = [[made(each) for each in _before_upsampling(call).arguments] for _ in range(sets)]
        variants[_BEFORE_UPSAMPLING] = {"forward": lambda number, _: operation(*halved[number])}
    timings = time_variants(variants, sets, device, rounds=_ROUNDS)
    medians = timings.medians(list(stages)[-1])
    fastest = min(medians, key=lambda name: medians[name])
    return medians[fastest], fastest


def _product_of(call: Call) -> Callable[..., Any] | None:
    """What computes a convolution, or its gradients, by matrix products as the networks do, if that is known.

    Of 1 x 1, and of 3 x 3 to an image's channels; without stride and groups.
    """
    if call.operation not in _GROUPS:
        return None
    place = _GROUPS[call.operation]
    stride, padding, _, transposed, _, groups = call.arguments[place - 5 : place + 1]
    channels, _, *size = call.arguments[place - 7].shape
    if set(stride) != {1} or transposed or groups > 1:
        return None
    if (size, set(padding)) == ([1, 1], {0}):
        products = pixel_products, pixel_product_gradients
    elif (size, set(padding)) == ([3, 3], {1}) and channels <= _IMAGE_CHANNELS:
        products = folded_products, _folded_product_gradients
    else:
        return None
    forward, gradients = products
    if call.operation == "convolution":
        return lambda x, weight, bias, *_: forward(x, weight, bias)

    def backward(gradient: Tensor, x: Tensor, weight: Tensor, *others: Any) -> list[Tensor]:
        of_x, of_weight, of_bias = others[-1]
        assert of_x
        assert of_weight
        return [*gradients(gradient, x, weight), *([gradient.sum((0, 2, 3))] if of_bias else [])]

    return backward


def _folded_product_gradients(gradient: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """What autograd makes of `folded_products`, by x and by the weight."""
    pixels = x.permute(0, 2, 3, 1).flatten(1, 2)
    neighbours = neighbourhoods(gradient)
    by_pixels = torch.bmm(neighbours, to_neighbours(weight).t().expand(len(x), -1, -1))
    by_weight = torch.bmm(pixels.transpose(1, 2), neighbours).sum(0).unflatten(1, (len(weight), 3, 3))
    by_x = by_pixels.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)
    return by_x, by_weight.flip(2, 3).transpose(0, 1)


def _attention_stages(call: Call, inputs: list[list[Tensor]]) -> dict[str, Stage]:
    """Attention by whatever kernel this device chooses; the last stage is the one that is asked for."""
    if call.operation == "attention":
        return {"forward": lambda number, _: F.scaled_dot_product_attention(*inputs[number][:3])}
    gradients = [each[0] for each in inputs]
    leaves = [[tensor.requires_grad_() for tensor in each[1:4]] for each in inputs]
    return differentiable(
        lambda number: F.scaled_dot_product_attention(*leaves[number]),
        leaves,
        lambda number, output: gradients[number],
    )
