"""The metric, the preconditioning and the whole loss against float64 closed forms."""

import math

import pytest
import torch
from torch import Tensor

from ict_kernels import (
    NoiseLevels,
    c_in,
    c_out,
    c_skip,
    consistency_loss,
    noise_images,
    noise_level_grid,
    pseudo_huber_loss,
    sample_noise_levels,
)


def huber(difference: Tensor, c: float) -> Tensor:
    """The paper's formula, directly, in float64."""
    return (difference.double().flatten(1).square().sum(1) + c**2).sqrt() - c


def batch(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))


# ---------------------------------------------------------------------------------------- the preconditioning


def test_the_consistency_function_is_the_identity_at_sigma_min_to_the_last_bit():
    x, output = batch(4, 3, 8, 8)
    for dtype in (torch.float32, torch.float64):
        sigma = noise_level_grid(11)[:1].to(dtype)
        f = c_skip(sigma) * x.to(dtype) + c_out(sigma) * output.to(dtype)
        assert torch.equal(f, x.to(dtype))


def test_the_preconditioning_is_the_formula():
    for sigma in noise_level_grid(81):
        s = float(sigma)
        assert float(c_skip(sigma)) == pytest.approx(0.25 / ((s - 0.002) ** 2 + 0.25), rel=1e-14)
        assert float(c_out(sigma)) == pytest.approx(0.5 * (s - 0.002) / math.sqrt(s * s + 0.25), rel=1e-13)
        assert float(c_in(sigma)) == pytest.approx(1 / math.sqrt(s * s + 0.25), rel=1e-14)
    for function in (c_skip, c_out, c_in):
        assert function(torch.ones(3, dtype=torch.bfloat16)).dtype == torch.float32
        assert function(torch.ones(3, dtype=torch.float64)).dtype == torch.float64


def test_the_network_sees_unit_variance():
    data_and_noise = torch.randn(200_000, dtype=torch.float64) * math.sqrt(0.25 + 3.0**2)
    assert float((data_and_noise * c_in(torch.tensor(3.0))).std()) == pytest.approx(1, abs=0.01)


# ------------------------------------------------------------------------------------------------- the metric


@pytest.mark.parametrize("shape", [(3, 7), (3, 5, 7), (3, 2, 5, 7), (2, 3, 2, 5, 7), (1, 1, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_norm_is_over_the_whole_sample(shape, dtype):
    prediction, target = batch(*shape, dtype=dtype)
    c = 0.00054 * math.sqrt(math.prod(shape[1:]))
    loss = pseudo_huber_loss(prediction, target)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 1e-13 if dtype == torch.float64 else 1e-6
    expected = huber(prediction.double() - target.double(), c)
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=0)


def test_the_default_c_is_the_papers_for_cifar_and_imagenet():
    for size, c in ((32, 0.0299), (64, 0.0599)):
        zero = torch.zeros(1, 3, size, size, dtype=torch.float64)
        far = zero.clone()
        far[0, 0, 0, 0] = 3.0
        assert float(pseudo_huber_loss(far, zero)) == pytest.approx(math.sqrt(9 + c * c) - c, abs=6e-5)


@pytest.mark.parametrize("c", [None, 0.0, 1e-30, 1e-8, 1.0])
def test_identical_images_have_zero_loss_and_zero_gradient(c):
    prediction, _ = batch(2, 3, 4, 4)
    prediction.requires_grad_()
    loss = pseudo_huber_loss(prediction, prediction.detach(), c=c)
    loss.sum().backward()
    assert torch.equal(loss, torch.zeros(2))
    assert torch.equal(prediction.grad, torch.zeros_like(prediction))


@pytest.mark.parametrize("size", [1e-12, 1e-6, 1e-3, 1.0, 1e6, 1e15])
def test_tiny_and_huge_distances_keep_their_digits(size):
    prediction, _ = batch(2, 3, 8, 8)
    prediction = prediction * size
    prediction.requires_grad_()
    loss = pseudo_huber_loss(prediction, torch.zeros_like(prediction), c=0.03)
    loss.sum().backward()
    wide = prediction.detach().double()
    squared = wide.flatten(1).square().sum(1)
    root = (squared + 0.03**2).sqrt()
    torch.testing.assert_close(loss.double(), squared / (root + 0.03), rtol=1e-6, atol=0)
    expected = wide / root.view(2, 1, 1, 1)
    torch.testing.assert_close(prediction.grad.double(), expected, rtol=2e-6, atol=0)


def test_weight_reduction_and_keepdim():
    prediction, target = batch(4, 3, 5, 5)
    weight = torch.tensor([1.0, 2.0, 0.0, 25_585.0])
    plain = pseudo_huber_loss(prediction, target)
    weighted = pseudo_huber_loss(prediction, target, weight)
    assert torch.equal(weighted, plain * weight)
    assert torch.equal(pseudo_huber_loss(prediction, target, weight.view(4, 1, 1, 1)), weighted)
    assert pseudo_huber_loss(prediction, target, weight, keepdim=True).shape == (4, 1, 1, 1)
    for reduction in ("mean", "sum"):
        reduced = pseudo_huber_loss(prediction, target, weight, reduction=reduction)
        assert torch.equal(reduced, getattr(weighted, reduction)())


def test_the_element_norm_is_the_mean_of_each_elements_own_distance():
    prediction, target = batch(4, 3, 5, 5)
    c = 0.00054 * math.sqrt(75)
    elements = ((prediction.double() - target.double()) ** 2 + c * c).sqrt() - c
    got = pseudo_huber_loss(prediction, target, norm="element")
    torch.testing.assert_close(got.double(), elements.mean((1, 2, 3)), rtol=1e-6, atol=0)


def test_layouts_and_strides_do_not_matter():
    prediction, target = batch(4, 6, 5, 8)
    expected = pseudo_huber_loss(prediction[:, ::2], target[:, ::2])
    channels_last = prediction.contiguous(memory_format=torch.channels_last)
    got = pseudo_huber_loss(channels_last[:, ::2], target.contiguous()[:, ::2])
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


def test_the_target_receives_no_gradient_and_gradcheck_passes():
    prediction, target = batch(3, 2, 3, 3, dtype=torch.float64)
    prediction.requires_grad_()
    target.requires_grad_()
    pseudo_huber_loss(prediction, target).sum().backward()
    assert target.grad is None
    weight = torch.rand(3, dtype=torch.float64)
    for norm in ("sample", "element"):
        assert torch.autograd.gradcheck(
            lambda p, norm=norm: pseudo_huber_loss(p, target, weight, c=0.1, norm=norm), (prediction,)
        )


def test_an_empty_batch_is_empty():
    empty = torch.zeros(0, 3, 4, 4)
    assert pseudo_huber_loss(empty, empty).shape == (0,)
    assert pseudo_huber_loss(empty, empty, torch.zeros(0), keepdim=True).shape == (0, 1, 1, 1)


@pytest.mark.parametrize("weight_shape", [(), (1,), (3,), (4, 4), (1, 4), (4, 1), (4, 1, 1), (1, 1, 1, 4)])
def test_a_weight_that_would_broadcast_is_refused(weight_shape):
    prediction, target = batch(4, 3, 2, 4)
    with pytest.raises(ValueError, match=r"weight must have shape \(4,\) or \(4, 1, 1, 1\), got"):
        pseudo_huber_loss(prediction, target, torch.ones(weight_shape))


def test_other_bad_arguments_are_named():
    prediction, target = batch(4, 3, 2, 4)
    for change, message in (
        ({"target": target[:1]}, "shapes must be equal"),
        ({"target": target.long()}, "floating point"),
        ({"c": -1.0}, "c must be at least 0"),
        ({"c": math.nan}, "c must be at least 0"),
        ({"c": math.inf}, "c must be at least 0 and finite"),
        ({"norm": "l2"}, "norm must be"),
        ({"reduction": "avg"}, "reduction must be"),
    ):
        with pytest.raises(ValueError, match=message):
            pseudo_huber_loss(**{"prediction": prediction, "target": target, **change})
    with pytest.raises(ValueError, match="at least 2 dimensions"):
        pseudo_huber_loss(torch.zeros(3), torch.zeros(3))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("c", [torch.tensor(0.1, requires_grad=True), torch.tensor([0.1, 0.2, 0.1, 0.2])])
def test_a_tensor_c_is_refused_by_name(c, compiled):
    """By the kernels it would have no gradient, and in a graph no value."""
    a, b = batch(4, 3, 2, 4)
    levels = sample_noise_levels(4, 11, seed=0)

    def total(a: Tensor, b: Tensor, c: Tensor, metric: str | None) -> Tensor:
        if metric is None:
            return pseudo_huber_loss(a, b, c=c).sum()
        return consistency_loss(a, b, a, b, levels, c=c, metric=metric).sum()

    for metric in (None, "pseudo-huber", "l2"):
        torch._dynamo.reset()
        function = torch.compile(total, backend="eager") if compiled else total
        with pytest.raises(ValueError, match=r"c must be a number, got a tensor of shape \((4,)?\)"):
            function(a, b, c, metric)


# --------------------------------------------------------------------------------------------- the whole loss


@pytest.fixture
def pair() -> dict[str, Tensor | NoiseLevels]:
    levels = sample_noise_levels(6, 81, seed=5)
    images = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(3)) * 2 - 1
    student_input, teacher_input = noise_images(images, levels, seed=5)
    student_output, teacher_output = batch(6, 3, 8, 8)
    return {
        "student_output": student_output,
        "teacher_output": teacher_output,
        "student_input": student_input,
        "teacher_input": teacher_input,
        "levels": levels,
    }


def loss_of_the_paper(pair, metric: str = "pseudo-huber") -> Tensor:
    """From the noisy images, as the paper writes it, in float64; L2 and L1 as the authors' code averages."""
    levels = pair["levels"]

    def f(output, scaled_input, sigma):
        s = sigma.double().view(-1, 1, 1, 1)
        noisy = scaled_input.double() * (s**2 + 0.25).sqrt()
        skip = 0.25 / ((s - 0.002) ** 2 + 0.25)
        return skip * noisy + 0.5 * (s - 0.002) / (s**2 + 0.25).sqrt() * output.double()

    student = f(pair["student_output"], pair["student_input"], levels.sigma_next)
    teacher = f(pair["teacher_output"], pair["teacher_input"], levels.sigma)
    difference = (student - teacher).flatten(1)
    distance = {
        "pseudo-huber": huber(difference, 0.00054 * math.sqrt(192)),
        "l2": difference.square().mean(1),
        "l1": difference.abs().mean(1),
    }[metric]
    return levels.weight.double() * distance


@pytest.mark.parametrize("metric", ["pseudo-huber", "l2", "l1"])
def test_the_loss_is_the_papers_for_each_metric(pair, metric):
    got = consistency_loss(**pair, metric=metric)
    assert got.shape == (6,)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), loss_of_the_paper(pair, metric), rtol=2e-5, atol=0)


def test_only_the_student_output_receives_a_gradient(pair):
    tensors = [pair[name].requires_grad_() for name in pair if name != "levels"]
    consistency_loss(**pair).sum().backward()
    assert [t.grad is not None for t in tensors] == [True, False, False, False]


def test_the_gradient_of_the_loss_is_right_in_float64(pair):
    wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in pair.items()}
    wide["levels"] = NoiseLevels(pair["levels"].index, *(t.double() for t in pair["levels"][1:]))
    wide = {k: NoiseLevels(*(t[:2] for t in v)) if k == "levels" else v[:2] for k, v in wide.items()}
    output = wide.pop("student_output")[:, :2, :2, :2].clone().requires_grad_()
    small = {k: v if k == "levels" else v[:, :2, :2, :2] for k, v in wide.items()}
    for metric in ("pseudo-huber", "l2"):
        assert torch.autograd.gradcheck(
            lambda o, metric=metric: consistency_loss(o, **small, c=0.1, metric=metric), (output,)
        )


def test_autocast_and_low_precision_outputs_leave_the_arithmetic_in_fp32(pair):
    plain = consistency_loss(**pair)
    outputs = pair["student_output"], pair["teacher_output"]
    distance = pseudo_huber_loss(*outputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(consistency_loss(**pair), plain)
        assert torch.equal(pseudo_huber_loss(*outputs), distance)
    for dtype in (torch.bfloat16, torch.float16):
        low = dict(pair, student_output=pair["student_output"].to(dtype))
        same = dict(pair, student_output=low["student_output"].float())
        assert torch.equal(consistency_loss(**low), consistency_loss(**same))


def test_identical_pairs_have_zero_loss_and_gradient(pair):
    levels = pair["levels"]._replace(sigma_next=pair["levels"].sigma)
    output = pair["student_output"].requires_grad_()
    same = (output, output.detach(), pair["student_input"], pair["student_input"], levels)
    for c in (None, 0.0):
        loss = consistency_loss(*same, c=c)
        (gradient,) = torch.autograd.grad(loss.sum(), output)
        assert torch.equal(loss, torch.zeros(6))
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_levels_of_another_batch_are_refused(pair):
    short = NoiseLevels(*(t[:5] for t in pair["levels"]))
    with pytest.raises(ValueError, match=r"levels.sigma_next must have shape \(6,\)"):
        consistency_loss(**dict(pair, levels=short))
    with pytest.raises(ValueError, match="metric must be"):
        consistency_loss(**pair, metric="lpips")
    with pytest.raises(ValueError, match="shapes must be equal"):
        consistency_loss(**dict(pair, teacher_input=pair["teacher_input"][:, :1]))
