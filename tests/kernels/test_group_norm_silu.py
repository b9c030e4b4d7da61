"""Group norm with bias, scale-shift, SiLU and dropout, against numpy in float64 and torch's own modules."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ict_kernels import GroupNormSiLU, group_norm_silu
from ict_kernels.philox import dropout_keep_mask


def in_numpy(x, groups, weight, bias, eps, scale, shift, pre_bias, silu) -> np.ndarray:
    """The formula, written out in float64."""
    x = x.detach().double().numpy()
    column = (slice(None), slice(None)) + (None,) * (x.ndim - 2)
    as_columns = [
        None if t is None else np.broadcast_to(t.detach().double().numpy(), x.shape[:2])[column]
        for t in (weight, bias, scale, shift, pre_bias)
    ]
    weight, bias, scale, shift, pre_bias = as_columns
    if pre_bias is not None:
        x = x + pre_bias
    grouped = x.reshape(x.shape[0], groups, -1)
    mean, variance = grouped.mean(2, keepdims=True), grouped.var(2, keepdims=True)
    y = ((grouped - mean) / np.sqrt(variance + eps)).reshape(x.shape)
    y = y if weight is None else y * weight
    y = y if bias is None else y + bias
    y = y if scale is None else y * (1 + scale)
    y = y if shift is None else y + shift
    return y / (1 + np.exp(-y)) if silu else y


def tensors(shape, dtype=torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    n, c = shape[:2]
    return {
        "x": randn(*shape) * 2 + 0.5,
        "weight": randn(c) + 1,
        "bias": randn(c),
        "scale": randn(n, c),
        "shift": randn(n, c),
        "pre_bias": randn(n, c),
    }


SHAPES = [
    ((2, 8, 5, 7), 4),
    ((1, 6, 3, 3), 1),
    ((3, 12), 3),
    ((2, 8, 9), 2),
    ((2, 4, 2, 3, 3), 4),
    ((1, 1, 1, 1), 1),
]


@pytest.mark.parametrize(("shape", "groups"), SHAPES)
@pytest.mark.parametrize("silu", [True, False])
def test_the_formula_holds_for_every_rank(shape, groups, silu):
    t = tensors(shape)
    got = group_norm_silu(num_groups=groups, activation="silu" if silu else None, **t)
    expected = in_numpy(
        t["x"], groups, t["weight"], t["bias"], 1e-5, t["scale"], t["shift"], t["pre_bias"], silu
    )
    np.testing.assert_allclose(got.double().numpy(), expected, rtol=2e-5, atol=2e-5)


def test_each_part_may_be_left_out():
    t = tensors((2, 8, 4, 4))
    for absent in ("weight", "bias", "scale", "shift", "pre_bias"):
        arguments = {**t, absent: None}
        got = group_norm_silu(num_groups=4, eps=1e-3, **arguments)
        order = ("weight", "bias", "scale", "shift", "pre_bias")
        weight, bias, scale, shift, pre_bias = (arguments[name] for name in order)
        expected = in_numpy(t["x"], 4, weight, bias, 1e-3, scale, shift, pre_bias, True)
        np.testing.assert_allclose(got.double().numpy(), expected, rtol=2e-5, atol=2e-5)


def test_a_pre_bias_per_channel_is_a_convolutions_bias():
    convolution = nn.Conv2d(3, 8, 3)
    x, t = torch.randn(2, 3, 6, 6), tensors((2, 8, 4, 4))
    without_bias = nn.functional.conv2d(x, convolution.weight)
    got = group_norm_silu(without_bias, 4, t["weight"], t["bias"], pre_bias=convolution.bias)
    expected = group_norm_silu(convolution(x), 4, t["weight"], t["bias"])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_are_fp32_for_low_precision_inputs(dtype):
    t = tensors((2, 8, 16, 16))
    x = (t["x"] + 30).to(dtype)  # mean 30, deviation 2: fp16 sums of squares would overflow
    got = group_norm_silu(x, 4, t["weight"], t["bias"])
    assert got.dtype == dtype
    exact = torch.from_numpy(in_numpy(x, 4, t["weight"], t["bias"], 1e-5, None, None, None, True))
    one_ulp = torch.finfo(dtype).eps * exact.abs().clamp_min(2**-7)
    assert bool(((got.double() - exact).abs() <= one_ulp).all())


def test_a_large_mean_costs_no_variance():
    x = torch.randn(2, 8, 16, 16) + 1000
    got = group_norm_silu(x, 4, None, None, activation=None)
    exact = in_numpy(x, 4, None, None, 1e-5, None, None, None, False)
    np.testing.assert_allclose(got.numpy(), exact, atol=2e-3)


def test_constant_groups_and_single_values_give_the_bias():
    bias = torch.arange(4.0)
    for x in (torch.full((2, 4, 3, 3), 5.0), torch.full((2, 4, 1, 1), 7.0), torch.full((1, 4), 7.0)):
        got = group_norm_silu(x, 4, torch.ones(4), bias, activation=None)
        expected = bias.view(1, 4, *[1] * (x.dim() - 2)).expand_as(x)
        torch.testing.assert_close(got, expected, rtol=0, atol=7.0 * 2**-23 * 1e-5**-0.5)


@pytest.mark.parametrize("seed", [None, 3])
def test_memory_layout_and_dtype_are_kept(seed):
    for x, layout in (
        (torch.randn(2, 8, 5, 7), torch.channels_last),
        (torch.randn(2, 8, 5, 7), torch.contiguous_format),
        (torch.randn(2, 8, 3, 5, 7), torch.channels_last_3d),
    ):
        x = x.to(torch.bfloat16).contiguous(memory_format=layout)
        got = GroupNormSiLU(4, 8, dropout=0.5)(x, seed=seed)
        assert got.dtype == x.dtype
        assert got.stride() == x.stride()
    sliced = torch.randn(2, 16, 5, 7)[:, ::2]
    expected = group_norm_silu(sliced.contiguous(), 4, None, None)
    assert torch.equal(group_norm_silu(sliced, 4, None, None), expected)


def test_some_channels_of_a_channels_last_tensor_stay_channels_last():
    """Of a chunk or a slice; converted it would cost a pass, and another at the next convolution."""
    for shape, last in (((2, 16, 5, 7), torch.channels_last), ((2, 16, 3, 5, 7), torch.channels_last_3d)):
        x = torch.randn(shape).contiguous(memory_format=last).chunk(2, dim=1)[1]
        y = group_norm_silu(x, 4, None, None)
        assert y.is_contiguous(memory_format=last)
        assert torch.equal(y, group_norm_silu(x.contiguous(memory_format=last), 4, None, None))
    for x in (torch.randn(2, 16, 5, 7)[:, ::2], torch.randn(2, 1, 5, 7).expand(-1, 8, -1, -1)):
        assert group_norm_silu(x, 4, None, None).is_contiguous()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_torch_func_maps_it_and_differentiates_each_sample(layout):
    x = torch.randn(3, 8, 5, 5).contiguous(memory_format=layout)
    weight, bias = torch.rand(8), torch.rand(8)

    def one(weight: Tensor, x: Tensor) -> Tensor:
        return group_norm_silu(x[None], 2, weight, bias)[0]

    y = torch.func.vmap(one, in_dims=(None, 0))(weight, x)
    torch.testing.assert_close(y, group_norm_silu(x, 2, weight, bias))
    by_sample = torch.func.vmap(
        torch.func.grad(lambda weight, x: one(weight, x).square().sum()), in_dims=(None, 0)
    )(weight, x)
    weight.requires_grad_()
    for gradient, each in zip(by_sample, x.contiguous(), strict=True):
        (expected,) = torch.autograd.grad(one(weight, each).square().sum(), weight)
        torch.testing.assert_close(gradient, expected)


def test_the_module_is_nn_group_norm_then_silu_with_its_state_dict():
    stock, ours = nn.GroupNorm(4, 8), GroupNormSiLU(4, 8)
    nn.init.normal_(stock.weight)
    nn.init.normal_(stock.bias)
    assert list(ours.state_dict()) == list(stock.state_dict())
    ours.load_state_dict(stock.state_dict())
    x1 = torch.randn(3, 8, 6, 6, requires_grad=True)
    x2 = x1.detach().clone().requires_grad_()
    y1, y2 = nn.functional.silu(stock(x1)), ours(x2)
    torch.testing.assert_close(y1, y2)
    y1.square().sum().backward()
    y2.square().sum().backward()
    torch.testing.assert_close(x1.grad, x2.grad)
    torch.testing.assert_close(stock.weight.grad, ours.weight.grad)
    torch.testing.assert_close(stock.bias.grad, ours.bias.grad)
    made_late = GroupNormSiLU(4, 8, device="meta").to_empty(device="cpu")
    made_late.reset_parameters()
    assert torch.equal(made_late.weight, torch.ones(8))
    assert torch.equal(made_late.bias, torch.zeros(8))
    assert list(GroupNormSiLU(4, 8, bias=False).state_dict()) == ["weight"]
    assert GroupNormSiLU(4, 8, bias=False)(x2).shape == x2.shape
    bare = GroupNormSiLU(4, 8, affine=False)
    assert list(bare.state_dict()) == []
    torch.testing.assert_close(bare(x2), nn.functional.silu(nn.functional.group_norm(x2, 4)))


def test_a_channels_last_input_that_needs_no_gradient_does_not_crash_the_backward():
    x = torch.randn(6, 4, 5, 5).contiguous(memory_format=torch.channels_last)
    norm, stock = GroupNormSiLU(2, 4), nn.GroupNorm(2, 4)
    y = norm(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    y.square().sum().backward()  # torch.group_norm itself dies here, of a segmentation fault
    nn.functional.silu(stock(x.contiguous())).square().sum().backward()
    torch.testing.assert_close(norm.weight.grad, stock.weight.grad)
    torch.testing.assert_close(norm.bias.grad, stock.bias.grad)


def test_gradients_pass_gradcheck_with_everything_on():
    t = {name: value.requires_grad_() for name, value in tensors((2, 4, 3, 2), torch.float64).items()}
    names = list(t)

    def function(*values: Tensor) -> Tensor:
        return group_norm_silu(num_groups=2, dropout=0.3, seed=4, **dict(zip(names, values, strict=True)))

    assert torch.autograd.gradcheck(function, tuple(t.values()))


# ---------------------------------------------------------------------------------------------------- dropout


def test_dropout_scales_what_the_mask_keeps():
    x = torch.randn(4, 8, 6, 6)
    seed = torch.tensor([5, 6])
    got = group_norm_silu(x, 4, None, None, dropout=0.3, seed=seed, offset=10, layer=7)
    keep = dropout_keep_mask(x, 0.3, seed, 10, 7)
    kept = 1 - round(0.3 * 65536) / 65536
    expected = torch.where(keep, group_norm_silu(x, 4, None, None) / kept, 0.0)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
    assert 0.6 < float(keep.float().mean()) < 0.8


def test_teacher_and_student_share_the_dropout_mask():
    norm = GroupNormSiLU(4, 8, dropout=0.5, layer=2)
    seed = torch.tensor([1, 2])
    student = norm(torch.randn(4, 8, 6, 6), seed=seed)
    with torch.no_grad():
        teacher = norm(torch.randn(4, 8, 6, 6), seed=seed)
    assert torch.equal(student == 0, teacher == 0)


def test_the_mask_depends_on_step_and_layer_but_not_on_layout_or_split():
    x = torch.randn(6, 8, 6, 6)
    seed = torch.tensor([1, 2])
    norm = GroupNormSiLU(4, 8, dropout=0.5, layer=2)
    dropped = norm(x, seed=seed) == 0
    assert torch.equal(norm(x.contiguous(memory_format=torch.channels_last), seed=seed) == 0, dropped)
    halves = torch.cat([norm(x[:3], seed=seed), norm(x[3:], seed=seed, offset=3)])
    assert torch.equal(halves == 0, dropped)
    assert not torch.equal(norm(x, seed=torch.tensor([1, 3])) == 0, dropped)
    assert not torch.equal(GroupNormSiLU(4, 8, dropout=0.5, layer=3)(x, seed=seed) == 0, dropped)


def test_there_is_dropout_if_and_only_if_there_is_a_seed():
    norm = GroupNormSiLU(4, 8, dropout=0.9)
    x = torch.randn(2, 8, 4, 4)
    assert torch.equal(norm.train()(x), norm.eval()(x))
    assert int((norm(x) == 0).sum()) == 0
    assert int((norm.eval()(x, seed=1) == 0).sum()) > 100


def test_the_function_draws_a_seed_when_given_none():
    x = torch.randn(2, 8, 4, 4)
    torch.manual_seed(1)
    first, second = (group_norm_silu(x, 4, None, None, dropout=0.5) for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(group_norm_silu(x, 4, None, None, dropout=0.5), first)
    assert not torch.equal(first, second)


def test_a_wrong_argument_is_named_with_what_would_be_right():
    t = tensors((2, 8, 4, 4))
    for change, message in (
        ({"num_groups": 3}, "num_groups must divide the 8 channels"),
        ({"scale": torch.zeros(8)}, r"scale must have shape \(2, 8\)"),
        ({"pre_bias": torch.zeros(2, 8, 1, 1)}, r"pre_bias must have shape \(8,\) or \(2, 8\)"),
        ({"weight": torch.zeros(1)}, r"weight must have shape \(8,\)"),
        ({"activation": "relu"}, "activation must be"),
        ({"dropout": 1.0}, "dropout must be in"),
        ({"dropout": math.nan}, "dropout must be in"),
        ({"x": torch.zeros(8)}, "x must be floating point"),
    ):
        with pytest.raises(ValueError, match=message):
            group_norm_silu(**{"num_groups": 4, **t, **change})
    with pytest.raises(ValueError, match="num_groups must divide num_channels"):
        GroupNormSiLU(3, 8)
