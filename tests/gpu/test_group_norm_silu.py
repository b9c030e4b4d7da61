"""Group norm + SiLU on a GPU: every shape of the networks against float64, and how it stands in a program."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ict_kernels import GroupNormSiLU, group_norm_silu
from ict_kernels.group_norm_plan import planned
from ict_kernels.philox import dropout_keep_mask

pytest.importorskip("triton")
sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
kernel_cases: Any = importlib.import_module("kernel_cases.group_norm_silu")

NORMS = sorted(
    kernel_cases.norms_of("cifar10")
    | kernel_cases.norms_of("imagenet64")
    | kernel_cases.norms_of("imagenet64-ct2023")
)
ORDER = ("x", "weight", "bias", "scale", "shift", "pre_bias")
GROUPS = 32


def arguments_of(norm: Any, count: int, mean: float = 0.5, deviation: float = 2.0) -> dict[str, Any]:
    """Tensors on the GPU as the network passes them: x channels last, parameters fp32."""
    generator = torch.Generator("cuda").manual_seed(norm.channels * norm.size)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda")

    c = norm.channels
    x = (randn(count, c, norm.size, norm.size) * deviation + mean).to(
        torch.float32 if norm.fp32 else torch.bfloat16
    )
    scale, shift = (randn(count, 2 * c) / 2).chunk(2, dim=1) if norm.scale_shift else (None, None)
    return {
        "x": x.contiguous(memory_format=torch.channels_last),
        "weight": 1 + randn(c) / 4,
        "bias": randn(c) / 2,
        "scale": scale,
        "shift": shift,
        "pre_bias": randn(count, c) if norm.pre_bias else None,
    }


def options_of(norm: Any) -> dict[str, Any]:
    options: dict[str, Any] = {"activation": "silu" if norm.silu else None}
    if norm.dropout:
        seed = torch.tensor([7, 8], device="cuda")
        options |= {"dropout": 0.3, "seed": seed, "offset": 5, "layer": 3}
    return options


def results(arguments: dict[str, Any], gradient: Tensor, precise: bool, **options: Any) -> dict[str, Tensor]:
    """y and every gradient; `precise` in float64, by the definition."""
    leaves = {
        name: None if value is None else (value.double() if precise else value).detach().requires_grad_()
        for name, value in arguments.items()
    }
    y = group_norm_silu(num_groups=GROUPS, **leaves, **options)
    names = [name for name in ORDER if leaves[name] is not None]
    gradients = torch.autograd.grad(y, [leaves[name] for name in names], gradient.to(y.dtype))
    return dict(zip(["y", *names], [y.detach(), *gradients], strict=True))


def by_torch(arguments: dict[str, Any], gradient: Tensor, **options: Any) -> dict[str, Tensor]:
    """The same by torch's own kernels, as a network without this package would call them."""
    leaves = {name: None if v is None else v.detach().requires_grad_() for name, v in arguments.items()}
    x = leaves["x"]

    def column(values: Tensor) -> Tensor:
        return values[:, :, None, None].to(x.dtype)

    y = x if leaves["pre_bias"] is None else x + column(leaves["pre_bias"])
    y = F.group_norm(y, GROUPS, leaves["weight"].to(x.dtype), leaves["bias"].to(x.dtype), 1e-5)
    if leaves["scale"] is not None:
        y = y * (1 + column(leaves["scale"])) + column(leaves["shift"])
    if options["activation"] == "silu":
        y = F.silu(y)
    if "dropout" in options:
        p, *where = (options[name] for name in ("dropout", "seed", "offset", "layer"))
        y = y * dropout_keep_mask(x, p, *where) / (1 - round(p * 65536) / 65536)
    names = [name for name in ORDER if leaves[name] is not None]
    gradients = torch.autograd.grad(y, [leaves[name] for name in names], gradient.to(y.dtype))
    return dict(zip(["y", *names], [y.detach(), *gradients], strict=True))


def check(ours: dict[str, Tensor], exact: dict[str, Tensor], torchs: dict[str, Tensor] | None = None) -> None:
    """KERNELS.md's bound: one ulp of y, at max(|y|, 2^-7); and at most twice torch's own error."""
    error = (ours["y"].double() - exact["y"]).abs()
    if ours["y"].dtype == torch.float32:
        assert bool((error <= 2.0**-18 * exact["y"].abs().clamp_min(1)).all())
    else:
        ulp = torch.finfo(ours["y"].dtype).eps * exact["y"].abs().clamp_min(2**-7)
        assert bool((error <= ulp).all())
    for name, value in exact.items():
        assert ours[name].isfinite().all(), name
        limit = (torch.finfo(ours[name].dtype).eps / 2 + 1e-5) * value.norm()
        if torchs is not None:
            limit = torch.maximum(limit, 2 * (torchs[name].double() - value).norm())
        assert (ours[name].double() - value).norm() <= limit, name


@pytest.mark.parametrize("norm", NORMS, ids=str)
def test_every_norm_of_the_networks_is_as_exact_as_its_dtype(norm):
    arguments = arguments_of(norm, 3)
    gradient = torch.randn_like(arguments["x"])
    options = options_of(norm)
    ours = results(arguments, gradient, False, **options)
    assert ours["y"].is_contiguous(memory_format=torch.channels_last)
    check(ours, results(arguments, gradient, True, **options), by_torch(arguments, gradient, **options))
    again = results(arguments, gradient, False, **options)
    assert all(torch.equal(again[name], value) for name, value in ours.items())


@pytest.mark.parametrize("norm", [NORMS[0], kernel_cases.Norm(32, 384, GROUPS)], ids=str)
def test_a_mean_of_thirty_deviations_costs_nothing(norm):
    arguments = arguments_of(norm, 2, mean=30.0, deviation=1.0)
    gradient = torch.randn_like(arguments["x"])
    options = options_of(norm)
    check(results(arguments, gradient, False, **options), results(arguments, gradient, True, **options))


@pytest.mark.parametrize(
    "shape", [(1, 96, 7, 5), (2, 96, 1, 1), (2, 192, 33, 31), (1, 32, 301, 299), (2, 64, 9)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_any_other_shape(shape, dtype):
    torch.manual_seed(0)
    x = torch.randn(shape, device="cuda").to(dtype)
    arguments = dict.fromkeys(ORDER) | {"x": x, "weight": torch.rand(shape[1], device="cuda") + 0.5}
    gradient = torch.randn_like(x)
    ours, exact = (results(arguments, gradient, precise, activation="silu") for precise in (False, True))
    if shape[2:] == (1, 1):  # three values per group
        ours, exact = ({"y": each["y"]} for each in (ours, exact))
    check(ours, exact)
    assert ours["y"].is_contiguous()


@pytest.mark.parametrize("size", [16, 32, 64])
@pytest.mark.parametrize(("level", "share"), [(30.0, 0.1), (4000.0, 0.1), (1000.0, 0.0)])
def test_of_two_neighbouring_16_bit_values_or_one_the_output_is_as_exact_as_16_bits(level, share, size):
    """A fused multiply-add rounds once: x times a large 1 / std would not cancel the mean's product."""
    base = torch.tensor(level, dtype=torch.float16)
    below = torch.nextafter(base, torch.tensor(0.0, dtype=torch.float16))
    few = torch.rand(2, 256, size, size, generator=torch.Generator().manual_seed(7)) < share
    x = torch.where(few, below, base).cuda().contiguous(memory_format=torch.channels_last)
    y = group_norm_silu(x, GROUPS, None, None, activation=None)
    check({"y": y}, {"y": group_norm_silu(x.double(), GROUPS, None, None, activation=None)})


def test_a_group_too_long_for_a_tile_may_have_one_pixel():
    x = torch.randn(2, 40_000, device="cuda")
    weight = torch.rand(40_000, device="cuda") + 0.5
    y = group_norm_silu(x, 1, weight, None)
    expected = F.silu(F.group_norm(x.double(), 1, weight.double()))
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "wishes",
    [
        {"resident": False, "rows": 64, "num_warps": 8},
        {"resident": False, "chunk_bytes": 1, "maxnreg": 96},
        {"groups": 8, "num_warps": 16},
        {"num_warps": 8, "maxnreg": 128},
    ],
    ids=str,
)
def test_another_plan_computes_the_same(wishes):
    norm = kernel_cases.Norm(16, 256, GROUPS, dropout=True, pre_bias=True)
    arguments, options = arguments_of(norm, 3), options_of(norm)
    gradient = torch.randn_like(arguments["x"])
    with planned(**wishes):
        ours = results(arguments, gradient, False, **options)
    check(ours, results(arguments, gradient, True, **options))


@pytest.mark.parametrize("size", [16, 64])
def test_inputs_and_gradients_may_have_any_layout(size):
    arguments = arguments_of(kernel_cases.Norm(size, 192, GROUPS, pre_bias=True), 2)
    wide = torch.randn(2, 256, size, size, device="cuda", dtype=torch.bfloat16)
    gradients = {
        "channels last": wide[:, 32:224].contiguous(memory_format=torch.channels_last),
        "NCHW": wide[:, 32:224].contiguous(),
        "sliced": wide.contiguous(memory_format=torch.channels_last)[:, 32:224],
    }
    first = None
    for gradient in gradients.values():
        for layout in (torch.channels_last, torch.contiguous_format):
            x = arguments["x"].contiguous(memory_format=layout)
            found = results(arguments | {"x": x}, gradient, False)
            assert found["y"].is_contiguous(memory_format=layout)
            first = first or found
            assert all(torch.equal(found[name], value) for name, value in first.items())
    expanded = torch.tensor(0.5, device="cuda", dtype=torch.bfloat16).expand_as(arguments["x"])
    check(results(arguments, expanded, False), results(arguments, expanded, True))


def test_the_mask_is_the_cpus_and_does_not_depend_on_the_split():
    for shape, groups in (((4, 64, 16, 16), 32), ((4, 96, 64, 64), 32), ((4, 6, 5, 3), 2)):
        x, seed = torch.randn(shape, device="cuda"), torch.tensor([2**40 + 7, 2**31], device="cuda")
        norm = GroupNormSiLU(groups, shape[1], dropout=0.3, layer=9, device="cuda")
        torch.nn.init.constant_(norm.bias, 9.0)
        with torch.no_grad():
            whole = norm(x, seed=seed)
            parts = [norm(x[:1], seed=seed), norm(x[1:], seed=seed, offset=torch.tensor(1, device="cuda"))]
        assert torch.equal(torch.cat(parts), whole)
        assert torch.equal((whole != 0).cpu(), dropout_keep_mask(shape, 0.3, seed.cpu(), 0, 9))


@pytest.mark.parametrize(
    "norm",
    [kernel_cases.Norm(16, 256, GROUPS, dropout=True, pre_bias=True), kernel_cases.Norm(64, 192, GROUPS)],
    ids=str,
)
def test_a_graph_replays_what_it_captured_with_another_seed_and_offset(norm):
    arguments = {
        name: value if value is None else value.requires_grad_()
        for name, value in arguments_of(norm, 4).items()
    }
    gradient = torch.randn_like(arguments["x"])
    seed, offset = torch.tensor([1, 2], device="cuda"), torch.tensor(0, device="cuda")
    names = [name for name in ORDER if arguments[name] is not None]

    def step() -> list[Tensor]:
        draw = {"dropout": 0.3, "seed": seed, "offset": offset} if norm.dropout else {}
        y = group_norm_silu(num_groups=GROUPS, **arguments, **draw)
        return [y, *torch.autograd.grad(y, [arguments[name] for name in names], gradient)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for number in (1, 2):
        seed[1], offset[...] = 100 + number, 3 * number
        with torch.no_grad():
            arguments["x"].mul_(0.5)
        graph.replay()
        for found, expected in zip(captured, step(), strict=True):
            assert torch.equal(found, expected)


def test_nothing_waits_for_the_device():
    norm = kernel_cases.Norm(64, 192, GROUPS, pre_bias=True)
    arguments = {name: v if v is None else v.requires_grad_() for name, v in arguments_of(norm, 4).items()}
    seed = torch.tensor([1, 2], device="cuda")
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            group_norm_silu(num_groups=GROUPS, dropout=0.2, seed=seed, **arguments).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_compiled_whole_by_inductor_it_gives_the_eager_gradients():
    norm = GroupNormSiLU(GROUPS, 64, dropout=0.3, layer=1, device="cuda")
    conv = torch.nn.Conv2d(64, 64, 3, padding=1, device="cuda").to(memory_format=torch.channels_last)

    def block(x: Tensor, pre_bias: Tensor, seed: Tensor, offset: Tensor) -> Tensor:
        return F.avg_pool2d(norm(conv(x), pre_bias=pre_bias, seed=seed, offset=offset), 2).square().sum()

    compiled = torch.compile(block, fullgraph=True)
    for size in (16, 24):
        x = torch.randn(4, 64, size, size, device="cuda").contiguous(memory_format=torch.channels_last)
        x.requires_grad_()
        pre_bias = torch.randn(4, 64, device="cuda", requires_grad=True)
        draw = torch.tensor([4, 5], device="cuda"), torch.tensor(6, device="cuda")
        found = []
        for function in (compiled, block):
            loss = function(x, pre_bias, *draw)
            found.append([loss, *torch.autograd.grad(loss, [x, pre_bias, *norm.parameters()])])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))


@pytest.mark.parametrize(("count", "channels", "size"), [(2050, 1024, 32), (5, 32, 4096)])
def test_more_than_two_to_the_31_elements(count, channels, size):
    elements = count * channels * size * size
    assert elements > 2**31
    if torch.cuda.mem_get_info()[0] < 20 * elements:
        pytest.skip(f"needs {20 * elements / 2**30:.0f} GiB of GPU memory")
    x = (
        torch.empty(count, size, size, channels, device="cuda", dtype=torch.bfloat16)
        .normal_()
        .permute(0, 3, 1, 2)
    )
    x.requires_grad_()
    weight = torch.rand(channels, device="cuda") + 0.5
    draw = {"dropout": 0.3, "seed": torch.tensor([1, 2], device="cuda")}
    y = group_norm_silu(x, GROUPS, weight, None, **draw)
    (dx,) = torch.autograd.grad(y, x, y.detach())
    with torch.no_grad():
        last = x[-1:].detach().clone(memory_format=torch.channels_last)
    last.requires_grad_()
    expected = group_norm_silu(last, GROUPS, weight, None, offset=count - 1, **draw)
    (expected_dx,) = torch.autograd.grad(expected, last, expected.detach())
    assert torch.equal(y[-1:], expected)
    assert torch.equal(dx[-1:], expected_dx)
