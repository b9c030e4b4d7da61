"""The kernels of group norm + SiLU against the eager definition in float64; dropout's mask bit for bit."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ict_kernels
from ict_kernels import GroupNormSiLU, _ops, group_norm_silu
from ict_kernels.group_norm_plan import planned
from ict_kernels.philox import dropout_keep_mask

module: Any = sys.modules["ict_kernels.group_norm_silu"]  # the function has its module's name

ORDER = ("x", "weight", "bias", "scale", "shift", "pre_bias")
EVERYTHING = frozenset(ORDER)


@pytest.fixture(autouse=True)
def _poison(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that a kernel forgets to write is NaN. Tracing cannot take it; its tests do without."""
    if "traced" in request.node.name:
        return
    for name in ("empty", "empty_like"):
        allocate = getattr(torch, name)

        def poisoned(*arguments: Any, _allocate: Any = allocate, **keywords: Any) -> Tensor:
            fresh = _allocate(*arguments, **keywords)
            return fresh.fill_(torch.nan) if fresh.is_floating_point() else fresh

        monkeypatch.setattr(torch, name, poisoned)


@pytest.fixture(params=["resident", "split"])
def algorithm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Both, whatever `plan_of` would choose; split in several blocks of pixels, and one sample at a time."""
    name: str = request.param
    used = []
    plan = module.plan_of
    monkeypatch.setattr(module, "plan_of", lambda *a, **k: used.append(plan(*a, **k)) or used[-1])
    with planned(resident=False, rows=8, chunk_bytes=1) if name == "split" else nullcontext():
        yield name
    assert all(plan.resident == (name == "resident") for plan in used)


def tensors(shape: tuple[int, ...], given: frozenset[str] = EVERYTHING, **changes: Any) -> dict[str, Any]:
    """float64 arguments of a norm whose weight is not 1; None for what is not given."""
    generator = torch.Generator().manual_seed(11)
    n, c = shape[:2]
    shapes = {"x": shape, "weight": (c,), "bias": (c,), "scale": (n, c), "shift": (n, c), "pre_bias": (n, c)}
    found = {name: torch.randn(shapes[name], generator=generator, dtype=torch.float64) for name in ORDER}
    found["weight"] += 1.5
    found["x"] = found["x"] * 2 + 0.5
    return {name: value if name in given else None for name, value in found.items()} | changes


def compare(
    arguments: dict[str, Any],
    groups: int,
    *,
    dtype: torch.dtype = torch.float32,
    gradient: Tensor | None = None,
    tolerance: float = 1e-5,
    **options: Any,
) -> Tensor:
    """Asserts that y and every gradient are those of the definition in float64; returns y."""
    rounded = {name: value if value is None else value.to(dtype) for name, value in arguments.items()}
    if gradient is None:
        generator = torch.Generator().manual_seed(12)
        gradient = torch.randn(rounded["x"].shape, generator=generator).to(dtype)
    results = []
    for precise in (False, True):
        leaves = {
            name: value if value is None else (value.double() if precise else value).detach().requires_grad_()
            for name, value in rounded.items()
        }
        y = group_norm_silu(num_groups=groups, **leaves, **options)
        names = [name for name in ORDER if leaves[name] is not None]
        upstream = gradient.double() if precise else gradient
        gradients = torch.autograd.grad(y, [leaves[name] for name in names], upstream)
        results.append(dict(zip(["y", *names], [y.detach(), *gradients], strict=True)))
    ours, exact = results
    for name, expected in exact.items():
        assert ours[name].dtype == dtype, name
        assert ours[name].shape == expected.shape, name
        assert expected.isfinite().all(), name
        size = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
        excess = (ours[name].double() - expected).abs() - tolerance * expected.abs()
        assert bool((excess <= tolerance * size).all()), f"{name}: {float(excess.max())}"
    return ours["y"]


# ------------------------------------------------------------------------------------------------ the formula

SHAPES = [
    ((2, 8, 5, 7), 4),  # odd height and width
    ((1, 24, 4, 4), 4),  # N = 1, groups of 6: parts of 16 + 8 channels
    ((2, 24, 3, 5), 2),  # groups of 12
    ((2, 36, 3, 3), 2),  # groups of 18
    ((1, 60, 3, 3), 2),  # groups of 30
    ((1, 72, 2, 3), 2),  # groups of 36
    ((1, 84, 2, 2), 2),  # groups of 42
    ((2, 96, 3, 3), 2),  # groups of 48
    ((2, 1, 5, 3), 1),  # C = 1
    ((3, 6, 1, 1), 2),  # H = W = 1
    ((3, 12), 3),
    ((2, 8, 9), 2),
    ((2, 4, 2, 3, 3), 4),
]


@pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=lambda value: str(value))
def test_output_and_gradients_are_those_of_the_definition(algorithm, shape, groups):
    # a single value per group has variance 0: eps^-1/2 = 316 multiplies every rounding
    single = math.prod(shape[2:]) * shape[1] == groups
    compare(tensors(shape), groups, tolerance=3e-4 if single else 1e-5)


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("given", [{"x"}, {"x", "weight"}, {"x", "bias", "shift"}, {"x", "scale"}], ids=str)
def test_each_part_may_be_left_out(algorithm, given, silu):
    compare(tensors((2, 16, 5, 3), frozenset(given)), 4, activation="silu" if silu else None, eps=1e-3)


def test_a_pre_bias_per_channel_gets_the_sum_of_the_samples_gradients(algorithm):
    arguments = tensors((3, 16, 5, 3))
    arguments["pre_bias"] = arguments["pre_bias"][0]
    compare(arguments, 4, dropout=0.3, seed=5)


def test_scale_and_shift_may_be_halves_of_one_tensor(algorithm):
    arguments = tensors((3, 16, 4, 4))
    embedding = torch.randn(3, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    y = compare(arguments | dict(zip(("scale", "shift"), embedding.chunk(2, 1), strict=True)), 4)
    halves = embedding.float().chunk(2, 1)
    single = {name: value.float() for name, value in arguments.items()}
    with torch.no_grad():
        chunked = group_norm_silu(num_groups=4, **single | dict(zip(("scale", "shift"), halves, strict=True)))
    assert torch.equal(chunked, y)


def test_scale_shift_and_pre_bias_may_have_the_samples_side_by_side(algorithm):
    arguments = tensors((3, 16, 4, 4))
    for name in ("scale", "shift", "pre_bias"):
        arguments[name] = arguments[name].t().contiguous().t()
    compare(arguments, 4)


def test_parameters_may_be_of_another_dtype(algorithm):
    arguments = tensors((2, 16, 4, 4))
    x = arguments.pop("x").half().requires_grad_()
    parameters = {name: value.float().requires_grad_() for name, value in arguments.items()}
    y = group_norm_silu(x, 4, **parameters)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == torch.float16
    assert all(value.grad.dtype == torch.float32 for value in parameters.values())
    exact = group_norm_silu(x.double(), 4, **{name: value.double() for name, value in parameters.items()})
    one_ulp = torch.finfo(torch.float16).eps * exact.abs().clamp_min(2**-7)
    assert bool(((y.double() - exact).abs() <= one_ulp).all())


def test_half_precision_is_rounded_once(algorithm):
    compare(tensors((2, 24, 5, 3)), 4, dtype=torch.float16, tolerance=2**-10)


# ------------------------------------------------------------------------------------------------ statistics


def test_a_mean_of_thirty_deviations_costs_nothing(algorithm):
    arguments = tensors((2, 16, 9, 7))
    arguments["x"] = torch.randn(2, 16, 9, 7, generator=torch.Generator().manual_seed(1)).double() + 30
    compare(arguments, 4, tolerance=2e-5)
    arguments["pre_bias"] += 30
    compare(arguments, 4, tolerance=4e-5)


def test_huge_values_stay_finite(algorithm):
    arguments = tensors((2, 16, 5, 3), frozenset({"x", "weight", "bias"}))
    compare(arguments | {"x": arguments["x"] * 1e12}, 4, eps=1e-6)
    fp16 = arguments | {"x": arguments["x"].sign() * 65504.0}
    compare(fp16, 4, dtype=torch.float16, tolerance=2**-10)
    arguments["bias"] = arguments["bias"].sign() * 3e4  # silu of -30,000 is 0 and not NaN
    compare(arguments, 4)


def test_one_outlier_does_not_hide_the_rest(algorithm):
    arguments = tensors((1, 8, 16, 16), frozenset({"x", "weight"}))
    arguments["x"][0, 0, 0, 0] = 1e4
    compare(arguments, 2)


@pytest.fixture
def in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every resident tile of a forward pass is cut, in fp32 too, where the definition can be met closely."""
    plan = module.plan_of

    def cut(*arguments: Any) -> Any:
        chosen = plan(*arguments)
        return replace(chosen, slices=tuple(min(chosen.rows, most) for most in (8, 4)))

    monkeypatch.setattr(module, "plan_of", cut)


@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((2, 32, 8, 8), 4),  # whole groups fill the tile, and pixels its rows
        ((1, 24, 4, 4), 4),  # two parts
        ((2, 24, 5, 5), 2),  # two parts, and rows without pixels in every slice
        ((2, 36, 3, 3), 2),  # channels without a group
        ((1, 72, 2, 3), 2),  # slices of one row
    ],
    ids=str,
)
def test_a_tile_in_slices_gives_what_the_definition_does(in_slices, shape, groups):
    compare(tensors(shape), groups)
    compare(tensors(shape, frozenset({"x", "bias"})), groups, dropout=0.3, seed=5, activation=None)
    thirty = tensors(shape)
    thirty["x"] = thirty["x"] / 2 + 30
    compare(thirty, groups, tolerance=4e-5)


def test_an_outlier_in_the_first_slice_does_not_hide_the_rest(in_slices):
    """It is what the distances of its place are taken from."""
    arguments = tensors((1, 8, 16, 16), frozenset({"x", "weight"}))
    arguments["x"][0, 0, 0, 0] = 1e4
    compare(arguments, 2)


@pytest.mark.parametrize(("size", "dropout"), [(32, 0.0), (32, 0.3), (31, 0.0), (16, 0.3)])
def test_a_tile_that_is_held_in_16_bits_is_rounded_once(size, dropout):
    """Without a wish; at 32 x 32 a thread has 128 elements. 48 channels are two parts."""
    for channels, groups in ((32, 4), *([(48, 2)] if size == 16 else [])):
        plan = module.plan_of(1, channels, size**2, groups, 2, False, dropout > 0)
        assert plan.resident, channels
        assert plan.slices[0] > 1, channels
        arguments = tensors((1, channels, size, size), frozenset({"x", "weight", "bias", "pre_bias"}))
        compare(arguments, groups, dtype=torch.float16, tolerance=2**-10, dropout=dropout, seed=3)


def of_two_neighbours(level: float, *shape: int) -> Tensor:
    """In fp16; a tenth is the smaller one."""
    base = torch.tensor(level, dtype=torch.float16)
    below = torch.nextafter(base, torch.tensor(0.0, dtype=torch.float16))
    few = torch.rand(shape, generator=torch.Generator().manual_seed(7)) < 0.1
    return torch.where(few, below, base).contiguous(memory_format=torch.channels_last)


def assert_within_one_unit(y: Tensor, exact: Tensor) -> None:
    """In the last place of fp16, from 2^-7 on."""
    unit = 2.0 ** (exact.abs().clamp_min(2**-7).log2().floor() - 10)
    assert float(((y.double() - exact).abs() / unit).max()) < 1.0


@pytest.mark.parametrize("level", [30.0, 4000.0])
def test_of_two_neighbouring_16_bit_values_the_output_is_within_one_unit_in_the_last_place(level):
    """The distance from the mean is taken first: of x times a large 1 / std the last bits would be lost."""
    x = of_two_neighbours(level, 1, 32, 32, 32)
    assert module.plan_of(1, 32, 1024, 4, 2, False).slices[0] > 1
    y = group_norm_silu(x, 4, None, None, activation=None)
    assert_within_one_unit(y, torch.group_norm(x.double(), 4))


@pytest.mark.parametrize("level", [30.0, 4000.0])
def test_split_the_mean_of_neighbouring_16_bit_values_is_rounded_once(level):
    """Sums of means would lose its last bits; and y is as exact as if the mean had more bits than fp32."""
    x = of_two_neighbours(level, 1, 256, 64, 64)
    with planned(resident=False):
        y, stats = module._forward(x, 32, *[None] * 7, 0, 0, 0, 1e-5, False)
    assert_within_one_unit(y, torch.group_norm(x.double(), 32))
    mean = x.double().reshape(32, -1).mean(1)
    half_a_unit = 2.0 ** (math.floor(math.log2(level)) - 24)
    assert float((stats[0, :, 0] - mean).abs().max()) <= 1.05 * half_a_unit


@pytest.mark.parametrize("offset", [1.0, 100.0, 1e4])
def test_a_pre_bias_that_takes_an_offset_away_costs_no_bits_in_fp32(algorithm, offset):
    """As in the definition, which adds it to x first. Gradients too; rows without pixels, and two parts."""
    arguments = tensors((2, 24, 5, 3), frozenset({"x", "weight"}))
    arguments["pre_bias"] = torch.linspace(-offset, offset, 24, dtype=torch.float64).float()
    x = (arguments["x"].float() - arguments["pre_bias"][:, None, None]).double()
    compare(arguments | {"x": x, "pre_bias": arguments["pre_bias"].double()}, 4, tolerance=4e-6)


@pytest.mark.parametrize("size", [8, 32])
def test_where_squares_overflow_the_output_is_that_of_an_infinite_variance(size):
    """In a tile that is cut and in one that is not, as by the definition: silu(bias), not NaN."""
    x = torch.full((1, 32, size, size), 2e19, dtype=torch.bfloat16).contiguous(
        memory_format=torch.channels_last
    )
    x[:, :, size // 2 :] *= -1
    assert (module.plan_of(1, 32, size**2, 4, 2, False).slices[0] > 1) == (size == 32)
    weight, bias = torch.ones(32), torch.linspace(-1.0, 1.0, 32)
    y = group_norm_silu(x, 4, weight, bias)
    expected = torch.nn.functional.silu(bias).to(torch.bfloat16)[None, :, None, None].expand_as(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(
        module._definition(x, 4, weight, bias, 1e-5, *[None] * 3, "silu", 0.0, 0, 0, 0), y
    )


@pytest.mark.parametrize(("channels", "pixels"), [(600, 2), (2, 33)])
def test_partial_sums_are_merged_in_several_rounds(channels, pixels):
    """A group of 1,200 partial statistics and of 600 channels; 33 blocks of pixels."""
    with planned(resident=False, rows=1):
        compare(tensors((1, channels, pixels, 1)), 1)


def test_samples_are_summed_in_several_rounds():
    rows, sums = torch.randn(3, 7, 10, generator=torch.Generator().manual_seed(8)), torch.empty(3, 10)
    pointers = {f"to{k}_ptr": each for k, each in enumerate(sums)}
    module.launch(module.sum_samples, (2, 3), from_ptr=rows, **pointers, rows=7, CHANNELS=10, ROWS=4, WIDTH=8)
    torch.testing.assert_close(sums, rows.sum(1))


def test_output_and_gradients_repeat_bit_for_bit(algorithm):
    arguments = {name: value.float() for name, value in tensors((2, 24, 5, 3)).items()}
    gradient = torch.randn(2, 24, 5, 3, generator=torch.Generator().manual_seed(3))
    runs = []
    for _ in range(2):
        leaves = {name: value.clone().requires_grad_() for name, value in arguments.items()}
        y = group_norm_silu(num_groups=4, dropout=0.2, seed=1, **leaves)
        runs.append([y, *torch.autograd.grad(y, list(leaves.values()), gradient)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


# --------------------------------------------------------------------------------------------------- layouts


def gradients_of_layout(name: str) -> Tensor:
    dense = torch.randn(2, 16, 5, 3, generator=torch.Generator().manual_seed(4))
    if name == "NCHW":
        return dense.contiguous()
    if name == "sliced":
        wide = torch.randn(2, 40, 5, 3, generator=torch.Generator().manual_seed(5))
        return wide.contiguous(memory_format=torch.channels_last)[:, 8:24]
    if name == "every other pixel":
        return torch.randn(2, 16, 5, 6, generator=torch.Generator().manual_seed(6))[..., ::2]
    if name == "expanded":
        return torch.tensor(0.5).expand(2, 16, 5, 3)
    return dense.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("layout", ["NCHW", "channels last", "sliced", "every other pixel", "expanded"])
def test_a_gradient_may_have_any_layout(algorithm, layout):
    gradient = gradients_of_layout(layout)
    for memory_format in (torch.channels_last, torch.contiguous_format):
        arguments = tensors((2, 16, 5, 3))
        arguments["x"] = arguments["x"].contiguous(memory_format=memory_format)
        y = compare(arguments, 4, gradient=gradient)
        assert y.is_contiguous(memory_format=memory_format)


def test_memory_layout_is_kept_and_slices_are_read_where_they_are(algorithm):
    for shape, layout in (
        ((2, 8, 5, 7), torch.channels_last),
        ((2, 8, 5, 7), torch.contiguous_format),
        ((2, 8, 3, 5, 7), torch.channels_last_3d),
        ((2, 8, 3, 5, 7), torch.contiguous_format),
    ):
        x = torch.randn(shape).contiguous(memory_format=layout)
        assert group_norm_silu(x, 4, None, None).stride() == x.stride()
    wide = torch.randn(2, 16, 5, 7).contiguous(memory_format=torch.channels_last)
    expected = group_norm_silu(wide[:, 4:12].contiguous(), 4, None, None)
    assert torch.equal(group_norm_silu(wide[:, 4:12], 4, None, None), expected)


@pytest.mark.parametrize("shape", [(0, 8, 3, 3), (0, 8)])
def test_an_empty_batch_gives_an_empty_output_and_zero_gradients(shape):
    x = torch.zeros(shape, requires_grad=True)
    weight = torch.ones(8, requires_grad=True)
    y = group_norm_silu(x, 4, weight, None)
    y.sum().backward()
    assert y.shape == x.grad.shape == x.shape
    assert torch.equal(weight.grad, torch.zeros(8))


# --------------------------------------------------------------------------------------------------- dropout


@pytest.mark.parametrize(
    "shape", [(3, 16, 5, 3), (3, 24, 4, 4), (3, 6, 5, 3), (2, 12), (2, 1, 7, 3), (2, 8, 2, 3, 2)]
)
def test_the_mask_is_the_definitions_bit_for_bit(algorithm, shape):
    for p in (0.3, 2**-16, 0.999):
        seed = torch.tensor([-5, 2**32 - 1])
        bias = torch.full(shape[1:2], 9.0)  # no silu of what is kept is 0
        draw = {"dropout": p, "seed": seed, "offset": 2**32 - 2, "layer": 65535}
        y = group_norm_silu(torch.randn(shape), 1, None, bias, **draw)
        assert torch.equal(y != 0, dropout_keep_mask(shape, p, seed, 2**32 - 2, 65535))


def test_dropout_and_its_gradients_are_those_of_the_definition(algorithm):
    for shape in ((2, 16, 5, 3), (2, 6, 5, 3), (1, 24, 4, 4), (1, 72, 3, 3)):
        for silu in ("silu", None):
            draw = {"dropout": 0.4, "seed": torch.tensor([3, 4]), "offset": 7, "layer": 2}
            compare(tensors(shape), 2, activation=silu, **draw)


def test_the_mask_does_not_depend_on_layout_batch_split_or_the_form_of_the_offset(algorithm):
    x, seed = torch.randn(3, 16, 4, 5), torch.tensor([1, 2])
    norm = GroupNormSiLU(4, 16, dropout=0.5, layer=3)
    with torch.no_grad():
        whole = norm(x, seed=seed)
        last = norm(x.contiguous(memory_format=torch.channels_last), seed=seed)
        parts = [norm(x[:1], seed=seed), norm(x[1:], seed=seed, offset=torch.tensor(1))]
    assert torch.equal(last, whole)
    assert torch.equal(torch.cat(parts), whole)


def test_a_probability_that_rounds_to_zero_drops_nothing(algorithm):
    x = torch.randn(2, 8, 3, 3)
    assert torch.equal(
        group_norm_silu(x, 2, None, None, dropout=1e-6, seed=1), group_norm_silu(x, 2, None, None)
    )


# ----------------------------------------------------------------------------------------------- integration


def test_every_float_but_float64_goes_to_the_kernels(monkeypatch):
    launched = []
    monkeypatch.setattr(module, "launch", lambda kernel, *a, **k: launched.append(kernel))
    for dtype, expected in ((torch.float32, 1), (torch.float16, 1), (torch.bfloat16, 1), (torch.float64, 0)):
        launched.clear()
        group_norm_silu(torch.ones(2, 4, 3, 3, dtype=dtype), 2, None, None)
        assert len(launched) == expected
    launched.clear()
    ict_kernels.set_backend("eager")
    try:
        group_norm_silu(torch.ones(2, 4, 3, 3), 2, None, None)
    finally:
        ict_kernels.set_backend("auto")
    assert launched == []


def test_double_backward_is_refused():
    x = torch.randn(2, 8, 3, 3, requires_grad=True)
    (dx,) = torch.autograd.grad(group_norm_silu(x, 2, None, None).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(dx.sum(), x)


def test_a_frozen_norm_gives_the_gradients_that_were_asked_for():
    arguments = {name: value.float() for name, value in tensors((2, 8, 3, 3)).items()}
    everything = {name: value.clone().requires_grad_() for name, value in arguments.items()}
    group_norm_silu(num_groups=2, **everything).square().sum().backward()
    for name in ORDER:
        leaves = {each: value.clone().requires_grad_(each == name) for each, value in arguments.items()}
        group_norm_silu(num_groups=2, **leaves).square().sum().backward()
        assert torch.equal(leaves[name].grad, everything[name].grad)


def op_arguments(dropout: bool) -> tuple[Any, ...]:
    arguments = {name: value.float() for name, value in tensors((2, 8, 3, 5)).items()}
    x = arguments.pop("x").contiguous(memory_format=torch.channels_last)
    drawn = (torch.tensor([1, 2]), torch.tensor(3)) if dropout else (None, None)
    parameters = [value.requires_grad_() for value in arguments.values()]
    return (x.requires_grad_(), 2, *parameters, *drawn, 0, 3 << 16, 9999 if dropout else 0, 1e-5, True)


OPS = getattr(torch.ops, _ops.NAMESPACE)


@pytest.mark.parametrize("dropout", [False, True])
def test_traced_by_opcheck_the_ops_pass(dropout):
    arguments = op_arguments(dropout)
    torch.library.opcheck(OPS.group_norm_silu, arguments)
    with torch.no_grad():
        y, stats = OPS.group_norm_silu(*arguments)
        x, groups, *others = (each.detach() if isinstance(each, Tensor) else each for each in arguments)
        *tensors, offset, stream, threshold, _, silu = others
        numbers = (offset, stream, threshold, silu, [True, True, True, False, True])
        torch.library.opcheck(
            OPS.group_norm_silu_backward,
            (torch.randn_like(y), x, stats, groups, *tensors, *numbers),
        )


def test_traced_whole_with_two_shapes_it_gives_the_eager_gradients():
    norm = GroupNormSiLU(2, 8, dropout=0.3, layer=1)
    nn.init.normal_(norm.weight)

    def block(x: Tensor, pre_bias: Tensor, seed: Tensor, offset: Tensor) -> Tensor:
        y = norm(x * 1.5, pre_bias=pre_bias, seed=seed, offset=offset)
        return (y + norm(torch.nn.functional.avg_pool2d(y, 2)).mean()).square().sum()

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for memory_format in (torch.channels_last, torch.contiguous_format):
        x = torch.randn(2, 8, 6, 4).contiguous(memory_format=memory_format).requires_grad_()
        pre_bias = torch.randn(2, 8, requires_grad=True)
        results = []
        for function in (compiled, block):
            loss = function(x, pre_bias, torch.tensor([4, 5]), torch.tensor(6))
            results.append([loss, *torch.autograd.grad(loss, [x, pre_bias, *norm.parameters()])])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
