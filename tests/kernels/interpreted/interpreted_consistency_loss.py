"""The loss kernels against the eager definitions in float64."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from ict_kernels import (
    NoiseLevels,
    consistency_loss,
    noise_level_grid,
    pseudo_huber_loss,
    sample_noise_levels,
    set_backend,
)
from ict_kernels.consistency_loss import _backward_op, _loss_op

METRICS = ("pseudo-huber", "l2", "l1")
# Odd sizes, one element, C = 1, 3 and 4, one and several blocks, and a sample that is split (d > 12,288).
SHAPES = [
    (3, 3, 5, 7),
    (1, 1, 1, 1),
    (2, 1, 8, 8),
    (2, 4, 9, 33),
    (2, 3, 32, 32),
    (2, 3, 75, 77),
    (3, 13),
    (2, 2, 3, 4, 5),
]
LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x,
    "sliced": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    "transposed": lambda x: x.transpose(1, -1).contiguous().transpose(1, -1),
    "batch last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
}


@pytest.fixture(autouse=True)
def _auto() -> Iterator[None]:
    yield
    set_backend("auto")


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor that an op allocates begins as NaN."""

    def poison(x: Tensor) -> Tensor:
        return x.fill_(torch.nan) if x.is_floating_point() else x

    new_empty, empty_like = torch.Tensor.new_empty, torch.empty_like
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poison(new_empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))


def tensors(*shape: int, count: int = 4, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def wide(value: object) -> object:
    if isinstance(value, NoiseLevels):
        return NoiseLevels(value.index, *(t.double() for t in value[1:]))
    return value.double() if isinstance(value, Tensor) else value


def with_gradient(function, first: Tensor, *arguments: object, grad: Tensor | None = None, **options: object):
    """The loss, and the gradient of its sum, or for a given gradient of the loss."""
    leaf = first.detach().requires_grad_()
    loss = function(leaf, *arguments, **options)
    grad = torch.ones((), dtype=loss.dtype).expand(loss.shape) if grad is None else grad.to(loss.dtype)
    (gradient,) = torch.autograd.grad(loss, leaf, grad)
    return loss.detach(), gradient


def check(function, *arguments: object, tolerance: float = 2e-6, **options: object) -> tuple[Tensor, Tensor]:
    """Kernel against float64: each loss relative to itself, each gradient to its sample's largest."""
    loss, gradient = with_gradient(function, *arguments, **options)
    first = arguments[0]
    exact_loss, exact_gradient = with_gradient(function, *map(wide, arguments), **options)
    assert loss.dtype == torch.float32
    assert gradient.dtype == first.dtype
    torch.testing.assert_close(loss.double(), exact_loss, rtol=tolerance, atol=0)
    scale = exact_gradient.flatten(1).abs().amax(1).view(-1, *[1] * (gradient.dim() - 1))
    rounding = {torch.float16: 2.0**-11, torch.float32: 0.0}[first.dtype]
    error = (gradient.double() - exact_gradient).abs()
    assert (error <= tolerance * scale + rounding * exact_gradient.abs() + (rounding > 0) * 2.0**-24).all()
    return loss, gradient


@pytest.fixture(params=SHAPES, ids=str)
def pair(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor, Tensor, Tensor, NoiseLevels]:
    shape = request.param
    grid = noise_level_grid(11)
    index = torch.tensor([4, 0, 9][: shape[0]])
    weight = 1 / (grid[index + 1] - grid[index])
    levels = NoiseLevels(index, grid[index].float(), grid[index + 1].float(), weight.float())
    return *tensors(*shape), levels


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("metric", METRICS)
def test_the_loss_and_its_gradient(pair, metric) -> None:
    check(consistency_loss, *pair, metric=metric)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("norm", ["sample", "element"])
def test_the_pseudo_huber_loss_and_its_gradient(shape, norm) -> None:
    prediction, target = tensors(*shape, count=2)
    check(pseudo_huber_loss, prediction, target, torch.rand(shape[0]) + 0.5, norm=norm)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("others", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 6, 5, 8), (2, 1, 3, 4), (2, 3, 2, 4, 3)], ids=str)
def test_layouts_do_not_matter_and_the_gradient_has_the_students(layout, others, shape) -> None:
    student, *rest = tensors(*shape)
    levels = sample_noise_levels(shape[0], 21, seed=1)
    expected = with_gradient(consistency_loss, student, *rest, levels)
    moved = [LAYOUTS[layout](student), *(LAYOUTS[others](x) for x in rest)]
    loss, gradient = with_gradient(consistency_loss, *moved, levels)
    torch.testing.assert_close(loss, expected[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, expected[1], rtol=1e-5, atol=1e-6)
    if layout in ("contiguous", "channels last") or (
        layout == "transposed" and len(shape) == 4 and shape[1] > 1
    ):
        assert gradient.is_contiguous(
            memory_format=torch.contiguous_format if moved[0].is_contiguous() else torch.channels_last
        )
    equal = with_gradient(pseudo_huber_loss, moved[0], moved[1])
    torch.testing.assert_close(
        equal, with_gradient(pseudo_huber_loss, student, rest[0]), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("dtypes", [(torch.float16,) * 4, (torch.float16, torch.float32) * 2])
def test_low_precision_is_widened_before_the_arithmetic(pair, dtypes) -> None:
    *images, levels = pair
    check(consistency_loss, *(x.to(dtype) for x, dtype in zip(images, dtypes, strict=True)), levels)
    loss, gradient = with_gradient(pseudo_huber_loss, images[0].half(), images[1])
    assert torch.equal(loss, pseudo_huber_loss(images[0].half().float(), images[1]))
    assert gradient.dtype == torch.float16


@pytest.mark.parametrize("how", ["expanded", "strided", "keepdim"])
def test_gradients_of_the_loss_may_have_any_strides(how) -> None:
    prediction, target = tensors(4, 3, 5, 5, count=2)
    grad = torch.tensor([1.0, -2.0, 0.0, 3.0])
    expected = with_gradient(pseudo_huber_loss, prediction, target, grad=grad)[1]
    if how == "keepdim":
        column = grad.view(4, 1, 1, 1)
        got = with_gradient(pseudo_huber_loss, prediction, target, grad=column, keepdim=True)[1]
    elif how == "strided":
        strided = grad.repeat_interleave(3)[::3]
        assert strided.stride() == (3,)
        got = with_gradient(pseudo_huber_loss, prediction, target, grad=strided)[1]
    else:
        got = with_gradient(pseudo_huber_loss, prediction, target)[1]
        expected = with_gradient(pseudo_huber_loss, prediction, target, grad=torch.ones(4))[1]
    assert torch.equal(got, expected)


@pytest.mark.parametrize("c", [None, 0.0, 1e-30, 1e-20, 1e-8, 1.0])
@pytest.mark.parametrize("norm", ["sample", "element"])
def test_identical_images_have_zero_loss_and_zero_gradient(c, norm) -> None:
    (prediction,) = tensors(2, 3, 4, 4, count=1)
    loss, gradient = with_gradient(pseudo_huber_loss, prediction, prediction.clone(), c=c, norm=norm)
    assert torch.equal(loss, torch.zeros(2))
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("c", [None, 0.0])
def test_identical_pairs_have_zero_loss_and_gradient(c, metric) -> None:
    output, scaled_input = tensors(3, 3, 8, 8, count=2)
    levels = sample_noise_levels(3, 1281, seed=1)
    levels = levels._replace(sigma_next=levels.sigma)
    loss, gradient = with_gradient(
        consistency_loss, output, output, scaled_input, scaled_input, levels, c=c, metric=metric
    )
    assert torch.equal(loss, torch.zeros(3))
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("c", [0.0, 1e-20, 1e-8, 0.03])
@pytest.mark.parametrize("size", [1e-18, 1e-12, 1e-6, 1e-3, 1.0, 1e6, 1e15])
def test_tiny_and_huge_distances_keep_their_digits(size, c) -> None:
    (prediction,) = tensors(2, 3, 8, 8, count=1)
    check(pseudo_huber_loss, prediction * size, torch.zeros_like(prediction), c=c)


@pytest.mark.parametrize("norm", ["sample", "element"])
@pytest.mark.parametrize("size", [1e-25, 1e-21, 1e-19, 1e18, 1e19, 1e25, math.inf, math.nan])
@pytest.mark.parametrize("c", [0.0, 1e-20, 0.03])
def test_underflow_and_overflow_are_those_of_the_definition_in_fp32(size, c, norm) -> None:
    (direction,) = tensors(2, 3, 8, 8, count=1)
    prediction, target = direction * size, torch.zeros_like(direction)
    by_kernel = with_gradient(pseudo_huber_loss, prediction, target, c=c, norm=norm)
    set_backend("eager")
    defined = with_gradient(pseudo_huber_loss, prediction, target, c=c, norm=norm)
    for ours, theirs in zip(by_kernel, defined, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-37, equal_nan=True)


@pytest.mark.parametrize("metric", METRICS)
def test_a_nan_or_an_overflow_of_the_network_reaches_loss_and_gradient(metric) -> None:
    output, *rest = tensors(3, 3, 4, 4)
    output[1, 0, 0, 0], output[2, 0, 0, 0] = math.nan, math.inf
    levels = sample_noise_levels(3, 11, seed=1)
    loss, gradient = with_gradient(consistency_loss, output, *rest, levels, metric=metric)
    assert torch.isfinite(loss).tolist() == [True, False, False]
    assert torch.isfinite(gradient[0]).all()
    assert not torch.isfinite(gradient[1]).all()
    if metric == "pseudo-huber":  # as in the definition: the loss of an infinite distance is NaN
        assert loss[2].isnan()
        assert gradient[2].isnan().all()


def test_weights_reductions_and_keepdim() -> None:
    prediction, target = tensors(4, 3, 5, 5, count=2)
    weight = torch.tensor([1.0, 2.0, 0.0, 25_585.0])
    plain = pseudo_huber_loss(prediction, target)
    weighted = pseudo_huber_loss(prediction, target, weight)
    assert torch.equal(weighted, plain * weight)
    for same in (weight.view(4, 1, 1, 1), weight.repeat_interleave(2)[::2]):
        assert torch.equal(pseudo_huber_loss(prediction, target, same), weighted)
    half = pseudo_huber_loss(prediction, target, weight.half())
    assert torch.equal(half, plain * weight.half().float())
    assert pseudo_huber_loss(prediction, target, weight, keepdim=True).shape == (4, 1, 1, 1)
    for reduction in ("mean", "sum"):
        reduced = pseudo_huber_loss(prediction, target, weight, reduction=reduction)
        assert torch.equal(reduced, getattr(weighted, reduction)())
    check(pseudo_huber_loss, prediction, target, weight)


def test_a_weight_that_learns_gets_its_gradient() -> None:
    prediction, target = tensors(4, 3, 5, 5, count=2)
    weight = torch.rand(4, requires_grad=True)
    loss = pseudo_huber_loss(prediction, target, weight)
    loss.sum().backward()
    assert torch.equal(weight.grad, pseudo_huber_loss(prediction, target))


def test_only_the_first_argument_receives_a_gradient() -> None:
    images = [x.requires_grad_() for x in tensors(2, 3, 4, 4)]
    levels = sample_noise_levels(2, 11, seed=1)
    consistency_loss(*images, levels).sum().backward()
    assert [x.grad is not None for x in images] == [True, False, False, False]
    frozen = images[0].detach()
    assert not consistency_loss(frozen, *images[1:], levels).requires_grad
    assert not pseudo_huber_loss(frozen, images[1]).requires_grad


def test_an_empty_batch_is_empty() -> None:
    empty = torch.zeros(0, 3, 4, 4, requires_grad=True)
    loss = pseudo_huber_loss(empty, empty, torch.zeros(0))
    assert loss.shape == (0,)
    loss.sum().backward()
    assert empty.grad.shape == empty.shape


@pytest.mark.parametrize("c", [None, 0.1])
@pytest.mark.parametrize("norm", ["sample", "element"])
def test_samples_without_elements_have_the_definitions_loss(norm, c) -> None:
    """The norm of nothing is 0; its mean is 0 / 0."""
    empty = torch.zeros(3, 0, 4, 4, requires_grad=True)
    loss = pseudo_huber_loss(empty, empty.detach(), torch.ones(3), c=c, norm=norm)
    expected = torch.full((3,), 0.0 if norm == "sample" else math.nan)
    torch.testing.assert_close(loss, expected, rtol=0, atol=0, equal_nan=True)
    loss.sum().backward()
    assert empty.grad.shape == empty.shape


@pytest.mark.parametrize("metric", ["pseudo-huber", "l2", "l1"])
def test_pairs_without_elements_have_the_definitions_loss(metric) -> None:
    empty = torch.zeros(3, 0, 4, 4, requires_grad=True)
    loss = consistency_loss(empty, *[empty.detach()] * 3, sample_noise_levels(3, 11, seed=1), metric=metric)
    expected = torch.full((3,), 0.0 if metric == "pseudo-huber" else math.nan)
    torch.testing.assert_close(loss, expected, rtol=0, atol=0, equal_nan=True)
    loss.sum().backward()
    assert empty.grad.shape == empty.shape


def test_the_bits_repeat() -> None:
    *images, levels = *tensors(2, 3, 75, 77), sample_noise_levels(2, 11, seed=1)
    first, again = (with_gradient(consistency_loss, *images, levels) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_autocast_leaves_the_arithmetic_in_fp32(pair) -> None:
    plain = consistency_loss(*pair)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(consistency_loss(*pair), plain)


def test_double_backward_fails_clearly() -> None:
    prediction, target = tensors(2, 3, 4, 4, count=2)
    leaf = prediction.requires_grad_()
    (gradient,) = torch.autograd.grad(pseudo_huber_loss(leaf, target).sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="consistency_loss_backward"):
        gradient.square().sum().backward()


def test_a_tensor_c_is_refused_by_name() -> None:
    prediction, target = tensors(2, 3, count=2)
    for c in (torch.tensor(0.1, requires_grad=True), torch.tensor([0.1, 0.2])):
        with pytest.raises(ValueError, match="c must be a number, got a tensor"):
            pseudo_huber_loss(prediction, target, c=c)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("layout", "metric"),
    [
        *(("contiguous", metric) for metric in METRICS),
        *((layout, "pseudo-huber") for layout in ("channels last", "sliced")),
        *((layout, "elementwise pseudo-huber") for layout in ("contiguous", "channels last", "sliced")),
    ],
)
def test_opcheck(layout, metric) -> None:
    student, teacher, *inputs = (LAYOUTS[layout](x) for x in tensors(2, 3, 4, 5))
    student.requires_grad_()
    sigma_next, sigma, weight = torch.rand(3, 2) + 0.1
    for arguments in (
        (student, teacher, *inputs, sigma_next, sigma, weight),
        (student, teacher, None, None, None, None, None),
    ):
        numbers = (0.5, 0.002, 0.1, metric)
        torch.library.opcheck(_loss_op, (*arguments, *numbers, True))
        torch.library.opcheck(_loss_op, (student.detach(), *arguments[1:], *numbers, False))
        _, distance, difference = _loss_op(*arguments, *numbers, True)
        levels, weight = arguments[4], arguments[6]
        given = (torch.rand(2), student.detach(), difference, levels, weight, distance, *numbers)
        torch.library.opcheck(_backward_op, given)


@pytest.mark.parametrize("dynamic", [False, True])
def test_two_shapes_and_layouts_in_one_compiled_function(dynamic) -> None:
    def both(prediction: Tensor, target: Tensor, small: Tensor, weight: Tensor) -> Tensor:
        return pseudo_huber_loss(prediction, target, weight).sum() + pseudo_huber_loss(
            small, small.detach() * 0.5, norm="element", reduction="mean"
        )

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    prediction, target = tensors(3, 3, 6, 5, count=2)
    prediction = prediction.contiguous(memory_format=torch.channels_last)
    small = prediction[:, :2]
    weight = torch.rand(3)
    expected = with_gradient(both, prediction, target, small, weight)
    got = with_gradient(compiled, prediction, target, small, weight)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
