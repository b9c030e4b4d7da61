"""The loss kernels on a GPU: against float64, against torch's own error, and what compiled steps need."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ict_kernels import NoiseLevels, consistency_loss, noise_level_grid, pseudo_huber_loss, set_backend

# CIFAR-10, ImageNet-64, digits, a split sample, and an odd size.
SHAPES = [(512, 3, 32, 32), (128, 3, 64, 64), (64, 1, 8, 8), (8, 3, 256, 256), (6, 3, 5, 7)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
METRICS = ("pseudo-huber", "l2", "l1")
Result = tuple[Tensor, Tensor]


@pytest.fixture(autouse=True)
def _auto():
    yield
    set_backend("auto")


def pair(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, num_scales: int = 1281):
    """Outputs in `dtype` and inputs in fp32, as a network under autocast has them."""
    generator = torch.Generator("cuda").manual_seed(0)
    outputs = [torch.randn(shape, device="cuda", generator=generator).to(dtype) for _ in range(2)]
    inputs = [torch.randn(shape, device="cuda", generator=generator) for _ in range(2)]
    grid = noise_level_grid(num_scales).cuda()
    index = torch.arange(shape[0], device="cuda") * 37 % (num_scales - 1)
    weight = 1 / (grid[index + 1] - grid[index])
    return *outputs, *inputs, NoiseLevels(index, grid[index].float(), grid[index + 1].float(), weight.float())


def with_gradient(function: Callable[..., Tensor], first: Tensor, *arguments, **options) -> Result:
    leaf = first.detach().requires_grad_()
    loss = function(leaf, *arguments, **options)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach(), gradient


def three_ways(function: Callable[..., Tensor], *arguments, **options) -> tuple[Result, Result, Result]:
    """By the kernels, by torch in fp32, and by torch in float64."""
    ours = with_gradient(function, *arguments, **options)
    set_backend("eager")
    theirs = with_gradient(function, *arguments, **options)
    wide = [
        NoiseLevels(a.index, *(t.double() for t in a[1:])) if isinstance(a, NoiseLevels) else a.double()
        for a in arguments
    ]
    exact = with_gradient(function, *wide, **options)
    set_backend("auto")
    return ours, theirs, exact


def assert_as_good_as_torch(function: Callable[..., Tensor], *arguments, **options) -> None:
    ours, theirs, exact = three_ways(function, *arguments, **options)
    assert ours[0].dtype == torch.float32
    assert ours[1].dtype == arguments[0].dtype
    loss_errors = [((r[0].double() - exact[0]).abs() / exact[0].abs()).max() for r in (ours, theirs)]
    assert loss_errors[0] <= 2 * loss_errors[1] + 2.0**-22
    scale = exact[1].flatten(1).abs().amax(1).view(-1, *[1] * (exact[1].dim() - 1))
    errors = [((r[1].double() - exact[1]).abs() / scale).max() for r in (ours, theirs)]
    assert errors[0] <= 2 * errors[1] + 2.0**-22


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_loss_is_as_exact_as_torchs(shape, dtype) -> None:
    for metric in METRICS:
        assert_as_good_as_torch(consistency_loss, *pair(shape, dtype), metric=metric)
    assert_as_good_as_torch(consistency_loss, *pair(shape, dtype, num_scales=11))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("norm", ["sample", "element"])
def test_the_pseudo_huber_loss_is_as_exact_as_torchs(shape, dtype, norm) -> None:
    prediction, target, *_, levels = pair(shape, dtype)
    assert_as_good_as_torch(pseudo_huber_loss, prediction, target, levels.weight, norm=norm)


@pytest.mark.parametrize("size", [1e-25, 1e-19, 1e-12, 1e-3, 1e6, 1e15, 1e19])
@pytest.mark.parametrize("c", [0.0, 1e-20, 0.03])
def test_extremes_are_those_of_the_definition(size, c) -> None:
    prediction = pair((8, 3, 32, 32))[0] * size
    for norm in ("sample", "element"):
        ours, theirs, _ = three_ways(
            pseudo_huber_loss, prediction, torch.zeros_like(prediction), c=c, norm=norm
        )
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-37, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("c", [None, 0.0])
def test_identical_pairs_have_zero_loss_and_gradient(c, dtype) -> None:
    output, _, scaled_input, _, levels = pair((64, 3, 32, 32), dtype)
    levels = levels._replace(sigma_next=levels.sigma)
    for metric in METRICS:
        loss, gradient = with_gradient(
            consistency_loss, output, output, scaled_input, scaled_input, levels, c=c, metric=metric
        )
        assert torch.equal(loss, torch.zeros_like(loss))
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_layouts_do_not_matter_and_the_gradient_has_the_students() -> None:
    layouts = {
        "contiguous": lambda x: x.contiguous(),
        "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
        "sliced": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
        "sliced channels last": lambda x: x.repeat_interleave(2, dim=1).contiguous(
            memory_format=torch.channels_last
        )[:, ::2],
    }
    *images, levels = pair((32, 6, 17, 16), torch.bfloat16, 81)
    loss, gradient = with_gradient(consistency_loss, *images, levels)
    for name, layout in layouts.items():
        for other in layouts.values():
            arranged = (layout(images[0]), *map(other, images[1:]))
            got = with_gradient(consistency_loss, *arranged, levels)
            torch.testing.assert_close(got[0], loss, rtol=1e-6, atol=0)
            torch.testing.assert_close(got[1], gradient, rtol=2**-7, atol=1e-5)
            last = "last" in name
            assert got[1].is_contiguous(
                memory_format=torch.channels_last if last else torch.contiguous_format
            )


def test_gradients_of_any_strides_and_weights_of_any_dtype() -> None:
    prediction, target = (x.requires_grad_() for x in pair((8, 3, 32, 32))[:2])
    grad = torch.randn(8, device="cuda")
    weight = torch.rand(8, device="cuda").half()
    loss = pseudo_huber_loss(prediction, target, weight)
    (expected,) = torch.autograd.grad(loss, prediction, grad, retain_graph=True)
    (strided,) = torch.autograd.grad(loss, prediction, grad.repeat_interleave(3)[::3])
    assert torch.equal(strided, expected)
    assert torch.equal(loss, pseudo_huber_loss(prediction, target, weight.float()))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_bits_repeat(shape) -> None:
    arguments = pair(shape, torch.bfloat16)
    first = with_gradient(consistency_loss, *arguments)
    for _ in range(5):
        again = with_gradient(consistency_loss, *arguments)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("shape", [(512, 3, 32, 32), (8, 3, 256, 256)], ids=str)
def test_a_captured_graph_replays_on_new_data(shape) -> None:
    first, *rest = pair(shape, torch.bfloat16)
    first.requires_grad_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles the kernels
        torch.autograd.grad(consistency_loss(first, *rest).sum(), first)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = consistency_loss(first, *rest)
        (gradient,) = torch.autograd.grad(loss.sum(), first)
    with torch.no_grad():
        first.copy_(torch.randn_like(first))
    graph.replay()
    expected = with_gradient(consistency_loss, first, *rest)
    assert torch.equal(loss, expected[0])
    assert torch.equal(gradient, expected[1])


def test_inductor_compiles_it_whole() -> None:
    def both(first: Tensor, *arguments) -> Tensor:
        image = first * 1.5
        return consistency_loss(image, *arguments) + pseudo_huber_loss(image, arguments[0], norm="element")

    compiled = torch.compile(both, fullgraph=True)
    for shape in ((64, 3, 32, 32), (16, 3, 64, 64)):
        first, *rest = pair(shape, torch.float32, 81)
        first = first.contiguous(memory_format=torch.channels_last)
        got, expected = with_gradient(compiled, first, *rest), with_gradient(both, first, *rest)
        torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got[1], expected[1], rtol=1e-4, atol=1e-4)


def test_nothing_waits_for_the_device() -> None:
    arguments = pair((64, 3, 32, 32), torch.bfloat16)
    with_gradient(consistency_loss, *arguments)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with_gradient(consistency_loss, *arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_more_than_2_31_elements() -> None:
    shape = (9, 3, 8960, 8960)
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free GPU memory")
    prediction = torch.zeros(shape, dtype=torch.bfloat16, device="cuda")
    target = torch.zeros_like(prediction)
    assert prediction.numel() > 2**31
    prediction[-1].normal_()
    loss, gradient = with_gradient(pseudo_huber_loss, prediction, target)
    one = with_gradient(pseudo_huber_loss, prediction[-1:].clone(), target[-1:].clone())
    assert torch.equal(loss[:-1], torch.zeros_like(loss[:-1]))
    assert torch.equal(loss[-1:], one[0])
    assert torch.equal(gradient[-1:], one[1])
    assert not gradient[:-1].any()
