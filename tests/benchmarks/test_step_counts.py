"""What a training step asks of a GPU: the committed counts are this code's, and agree with independent
ones."""

from __future__ import annotations

import importlib
import json
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ict_fast.networks.convolution import doubling_weight, interleaved
from ict_fast.networks.layers import NearestUpsample

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))

pytest.importorskip("triton")
step_counts: Any = importlib.import_module("step_counts")
gpu_step: Any = importlib.import_module("gpu_step")
gpu_step_floor: Any = importlib.import_module("gpu_step_floor")
COMMITTED = json.loads((ROOT / "benchmarks/results/step-counts.json").read_text())


@pytest.mark.parametrize("step", COMMITTED["steps"], ids=[each["preset"] for each in COMMITTED["steps"]])
def test_a_step_asks_what_was_committed(step: dict[str, Any]) -> None:
    if COMMITTED["versions"]["torch"].split("+")[0] != torch.__version__.split("+")[0]:
        pytest.skip(f"counted with torch {COMMITTED['versions']['torch']}; this is {torch.__version__}")
    counted = step_counts.count_step(step["preset"], step["batch_size"])
    assert counted == step, "if this is meant, `make counts` writes the counts anew"


def test_the_presets_of_the_gpus_steps_are_counted() -> None:
    assert {each["preset"] for each in COMMITTED["steps"]} >= {name for name, _ in gpu_step.GPU_SIZES}


@pytest.mark.parametrize(
    # GFLOP of one forward pass for one image, as published code has them (METHOD.md's table).
    ("preset", "forward"),
    [("cifar10", 42.8), ("imagenet64", 219)],
)
def test_a_step_is_two_forward_passes_and_a_backward_pass_of_two(preset: str, forward: float) -> None:
    (step,) = (each for each in COMMITTED["steps"] if each["preset"] == preset)
    assert step["flops"] / step["batch_size"] / 1e9 == pytest.approx(4 * forward, rel=0.02)


def test_every_norm_is_launched_twice_forward_and_once_backward() -> None:
    # NCSN++ has 73 norms: KERNELS.md counts them.
    (step,) = (each for each in COMMITTED["steps"] if each["preset"] == "cifar10")
    kernels = step["kernels"]
    assert kernels["sum_samples"] == 73
    assert kernels["resident_forward"] + kernels["split_apply"] == 2 * 73
    assert kernels["resident_backward"] + kernels["split_backward"] / 2 == 73
    for kernel in (
        "_forward_kernel",
        "_backward_kernel",
        "_noise_kernel",
        "_levels_kernel",
        "_update_kernel",
    ):
        assert kernels[kernel] == 1


def test_the_floor_takes_what_has_most_flops_first_and_says_how_much_it_covers() -> None:
    total = step_counts.count_step("digits", 4)["flops"]
    calls = gpu_step_floor.heavy_calls("digits", 4)
    work = {call: count * gpu_step_floor.flops_of_call(call) for call, count in calls.items()}
    # The rest are the linear layers of the embedding.
    assert 0.99 * total < sum(work.values()) < total
    seconds = iter([1.0, 1.0, 1.0, 0.0])
    *_, floor = gpu_step_floor.measure_floor("digits", 4, torch.device("cpu"), lambda: next(seconds))
    kept = gpu_step_floor.floor_calls(calls)
    largest = sorted(
        (count * gpu_step_floor.flops_of_call(call) for call, count in kept.items()), reverse=True
    )
    assert floor["share_of_flops"] == pytest.approx(sum(largest[:3]) / sum(largest))
    assert floor["ms"] == pytest.approx(sum(each["count"] * each["ms"] for each in floor["calls"]))
    assert len(floor["calls"]) == 3
    assert {(each["bias"], each["channels_last"]) for each in floor["calls"]} == {(False, True)}
    assert "in_sequence" not in floor


@pytest.mark.parametrize("by_products", [False, True])
def test_the_floors_sequence_is_every_call_as_often_as_a_step_makes_it(
    monkeypatch: pytest.MonkeyPatch, by_products: bool
) -> None:
    calls = gpu_step_floor.floor_calls(gpu_step_floor.heavy_calls("digits", 4))
    for name, number in (("_WARM_UP_SEQUENCES", 0), ("_SEQUENCES", 2)):
        monkeypatch.setattr(gpu_step_floor, name, number)
    products = {call for call in calls if by_products and gpu_step_floor._product_of(call)}
    assert bool(products) == by_products
    fastest = {call: gpu_step_floor._PRODUCTS if call in products else gpu_step_floor.OURS for call in calls}
    with step_counts.Counting() as counting:
        found = gpu_step_floor.time_sequence(calls, fastest, torch.device("cpu"))
    assert counting.operations["mm"] + counting.operations["addmm"] >= 2 * sum(
        calls[call] for call in products
    )
    expected = Counter(
        {
            call: 2 * count
            for call, count in calls.items()
            if "attention" not in call.operation and call not in products
        }
    )
    assert {
        call: count for call, count in counting.heavy.items() if "attention" not in call.operation
    } == expected
    assert [found["ms"]] == found["ms_all"]

    def attention(of: Counter[Any], name: str) -> int:
        return sum(count for call, count in of.items() if call.operation == name)

    kinds = sum(call.operation == "attention backward" for call in calls)
    assert kinds
    assert attention(counting.heavy, "attention backward") == 2 * attention(calls, "attention backward")
    # Each kind of a backward pass has run its forward pass once.
    assert attention(counting.heavy, "attention") == 2 * attention(calls, "attention") + kinds


def test_the_floor_is_all_dense_convolutions_and_the_attention() -> None:
    calls = step_counts.heavy_calls("digits", 4)
    kept = gpu_step_floor.floor_calls(calls)
    depthwise = {call for call in calls if gpu_step_floor.as_compiled(call) not in kept}
    assert depthwise
    assert all("convolution" in call.operation for call in depthwise)
    assert all(call.arguments[1 + ("backward" in call.operation)].shape[1] == 1 for call in depthwise)
    assert kept.total() == sum(count for call, count in calls.items() if call not in depthwise)
    assert {call.operation for call in kept} == {
        "convolution",
        "convolution_backward",
        "attention",
        "attention backward",
    }
    for call, count in kept.items():
        if call.operation == "convolution":
            assert count % 2 == 0  # the teacher's, and the student's


def test_the_step_knows_which_convolutions_follow_nearest_upsampling() -> None:
    """Those of imagenet64's three blocks, and no other of the same shapes."""
    calls = step_counts.heavy_calls("imagenet64", 2)
    kept = gpu_step_floor.floor_calls(calls)
    found = Counter(
        (call.operation, *(each.shape for each in call.arguments if isinstance(each, step_counts.TensorOf)))
        for call in kept.elements()
        if call.upsampled
    )
    expected = Counter[Any]()
    for width, side in ((384, 64), (576, 32), (768, 16)):
        image, weight = (2, width, side, side), (width, width, 3, 3)
        expected["convolution", image, weight] = 2  # the student's, and the teacher's
        expected["convolution_backward", image, image, weight] = 1
    assert found == expected
    others = {call._replace(upsampled=False) for call in kept if call.upsampled}
    assert others < set(kept), "the second convolutions of these blocks"
    assert not any(call.upsampled for call in step_counts.heavy_calls("digits", 4)), "which filters"


@pytest.mark.parametrize("operation", ["convolution", "convolution_backward"])
def test_the_floor_times_a_convolution_after_nearest_upsampling_before_it_too(
    operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the calls that a block makes on a GPU."""
    x, weight = torch.randn(2, 6, 4, 5), torch.randn(7, 6, 3, 3)
    x, weight = (each.to(memory_format=torch.channels_last).requires_grad_() for each in (x, weight))
    with step_counts.Counting([weight]) as written:
        F.conv2d(NearestUpsample()(x), weight, padding=1).sum().backward()
    with step_counts.Counting() as ours:
        convolved = F.conv2d(x, doubling_weight(weight), padding=1)
        interleaved(convolved).sum().backward()
    (call,) = (gpu_step_floor.as_compiled(each) for each in written.heavy if each.operation == operation)
    (expected,) = (gpu_step_floor.as_compiled(each) for each in ours.heavy if each.operation == operation)
    assert call.upsampled
    assert gpu_step_floor._before_upsampling(call) == expected

    timed: list[Any] = []

    def time_variants(variants: dict[str, Any], *_: Any, **__: Any) -> Any:
        with step_counts.Counting() as counting:
            for stages in variants.values():
                stages["forward"](0, None)
        timed.extend(counting.heavy)
        times = {name: 1.0 + (name == gpu_step_floor.OURS) for name in variants}
        return SimpleNamespace(medians=lambda stage: times)

    monkeypatch.setattr(gpu_step_floor, "time_variants", time_variants)
    device = torch.device("cpu")
    assert gpu_step_floor.time_call(call, device) == (1.0, gpu_step_floor._BEFORE_UPSAMPLING)
    assert timed == [call._replace(upsampled=False), expected]
    with step_counts.Counting() as counting:
        gpu_step_floor._on_tensors_of_its_own(call, gpu_step_floor._BEFORE_UPSAMPLING, device)()
    assert list(counting.heavy) == [expected]


def test_the_floor_has_no_bias_but_a_products_and_no_gradient_that_is_a_slice() -> None:
    calls = step_counts.heavy_calls("imagenet64", 2)
    kept = gpu_step_floor.floor_calls(calls)
    assert len(kept) < len(calls)
    biases = {call for call in kept if gpu_step_floor._has_bias(call)}
    assert biases
    for call in biases:
        assert gpu_step_floor._product_of(call)
        assert call.operation == "convolution"
    for call in kept:
        if call.operation == "convolution_backward":
            gradient, *_, output_mask = call.arguments
            count, channels, height, width = gradient.shape
            assert gradient.stride == torch.empty(count, height, width, channels).permute(0, 3, 1, 2).stride()
            assert output_mask[1:] == (True, False)
    sliced = [call for call in calls if call.operation == "convolution_backward" and call not in kept]
    assert any(call.arguments[0].numel != call.arguments[0].stride[0] * 2 for call in sliced)
    gradients = gpu_step_floor._on_tensors_of_its_own(
        gpu_step_floor.as_compiled(sliced[0]), gpu_step_floor.OURS, torch.device("cpu")
    )()
    assert [each is None for each in gradients] == [False, False, True]


@pytest.mark.parametrize(("kernel", "channels", "known"), [(1, 7, True), (3, 3, True), (3, 7, False)])
def test_the_floor_knows_the_convolutions_that_are_matrix_products(
    kernel: int, channels: int, known: bool
) -> None:
    def described(arguments: list[Any]) -> tuple[Any, ...]:
        def one(each: Any) -> Any:
            tensor = isinstance(each, torch.Tensor)
            return step_counts.TensorOf(tuple(each.shape), each.stride(), each.dtype) if tensor else each

        return tuple(map(one, arguments))

    x = torch.randn(2, 6, 4, 5, dtype=torch.float64).to(memory_format=torch.channels_last)
    weight = torch.randn(channels, 6, kernel, kernel, dtype=torch.float64)
    bias = torch.randn(channels, dtype=torch.float64)
    options = [[1, 1], [kernel // 2] * 2, [1, 1], False, [0, 0], 1]
    y = torch.ops.aten.convolution.default(x, weight, bias, *options)
    forward = [x, weight, bias, *options]
    backward = [torch.randn_like(y), x, weight, [channels], *options, [True, True, True]]
    for operation, arguments in (("convolution", forward), ("convolution_backward", backward)):
        product = gpu_step_floor._product_of(step_counts.Call(operation, described(arguments)))
        assert (product is not None) == known
        if product is not None:
            expected = getattr(torch.ops.aten, operation).default(*arguments)
            found = product(*arguments)
            torch.testing.assert_close(found, list(expected) if isinstance(expected, tuple) else expected)
