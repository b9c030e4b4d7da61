"""NVIDIA apex as a backend, against a stand-in with the signatures that apex publishes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import ict_kernels
from ict_kernels import apex_backend

# What apex.contrib.group_norm.group_norm offers, by PyTorch's own group norm: custom ops, whose backward pass
# takes channels-last gradients alone. `calls` is the test's.
STAND_IN = """
import torch
import torch.nn.functional as F
from torch import Tensor

calls = []


class GroupNorm(torch.nn.Module):
    SUPPORTED_CHANNELS = frozenset([128, 256, 3136])
    SUPPORTED_GROUPS = frozenset([16, 32])
    SUPPORTED_DTYPES = frozenset([(torch.float32, torch.float32), (torch.bfloat16, torch.float32)])


@torch.library.custom_op("apex::stand_in_fprop", mutates_args=())
def fprop(x: Tensor, G: int, weight: Tensor, bias: Tensor, eps: float, act: str, passes: int) -> Tensor:
    calls.append((f"{passes} pass", tuple(x.shape), G, eps, act))
    assert x.is_contiguous(memory_format=torch.channels_last)
    y = F.group_norm(x.float(), G, weight, bias, eps)
    y = F.silu(y) if act == "silu" else y
    return y.to(x.dtype).contiguous(memory_format=torch.channels_last)


@fprop.register_fake
def _(x, G, weight, bias, eps, act, passes):
    return torch.empty_like(x)


@torch.library.custom_op("apex::stand_in_bprop", mutates_args=())
def bprop(
    grad_output: Tensor, x: Tensor, G: int, weight: Tensor, bias: Tensor, eps: float, act: str
) -> tuple[Tensor, Tensor, Tensor]:
    assert grad_output.is_contiguous(memory_format=torch.channels_last), "Only support NHWC layout."
    dtype, x, gradient = x.dtype, x.float().contiguous(), grad_output.float().contiguous()
    sizes = x.shape[0], x.shape[1], x.shape[2] * x.shape[3], G
    y, mean, rstd = torch.ops.aten.native_group_norm(x, weight, bias, *sizes, eps)
    if act == "silu":
        gradient = torch.ops.aten.silu_backward(gradient, y)
    dx, dweight, dbias = torch.ops.aten.native_group_norm_backward(
        gradient, x, mean, rstd, weight, *sizes, [True] * 3
    )
    return dx.to(dtype).contiguous(memory_format=torch.channels_last), dweight, dbias


@bprop.register_fake
def _(grad_output, x, G, weight, bias, eps, act):
    assert grad_output.is_contiguous(memory_format=torch.channels_last), "Only support NHWC layout."
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)


def setup_context(ctx, inputs, output):
    x, ctx.G, weight, bias, ctx.eps, ctx.act, _ = inputs
    ctx.save_for_backward(x, weight, bias)


def backward(ctx, grad_output):
    x, weight, bias = ctx.saved_tensors
    dx, dweight, dbias = bprop(grad_output, x, ctx.G, weight, bias, ctx.eps, ctx.act)
    return dx, None, dweight, dbias, None, None, None


fprop.register_autograd(backward, setup_context=setup_context)


def cuda_group_norm_nhwc_one_pass(x, G, weight, bias, eps, act=""):
    return fprop(x, G, weight, bias, eps, act, 1)


def cuda_group_norm_nhwc_two_pass(x, G, weight, bias, eps, act=""):
    return fprop(x, G, weight, bias, eps, act, 2)
"""


@pytest.fixture
def no_apex(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(apex_backend, "_apex", None)
    monkeypatch.setattr(apex_backend, "_seen", {})
    yield
    ict_kernels.set_backend("auto")
    for name in [name for name in sys.modules if name.partition(".")[0] == "apex"]:
        del sys.modules[name]


@pytest.fixture
def apex(no_apex: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list:
    """The stand-in, chosen as the backend; gives the list of its calls."""
    folder = tmp_path / "apex/contrib/group_norm"
    folder.mkdir(parents=True)
    for package in ("apex", "apex/contrib", "apex/contrib/group_norm"):
        (tmp_path / package / "__init__.py").touch()
    (folder / "group_norm.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(apex_backend, "DEVICES", ("cuda", "cpu"))
    ict_kernels.set_backend("apex")
    return sys.modules["apex.contrib.group_norm.group_norm"].calls


def image(channels: int = 128, size: int = 4, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(channels + size)
    x = torch.randn(2, channels, size, size, generator=generator, dtype=torch.float64)
    return (3 * x + 1).to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()


@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize(("size", "algorithm"), [(4, "1 pass"), (32, "1 pass"), (33, "2 pass")])
def test_a_norm_that_apex_takes_goes_there(
    apex: list, size: int, algorithm: str, activation: str | None
) -> None:
    x = image(size=size)
    weight = torch.linspace(0.5, 2, 128, requires_grad=True)
    bias = torch.linspace(-1, 1, 128, requires_grad=True)
    y = ict_kernels.group_norm_silu(x, 32, weight, bias, eps=1e-6, activation=activation)
    assert apex == [(algorithm, (2, 128, size, size), 32, 1e-6, activation or "")]
    expected = F.group_norm(x.double(), 32, weight.double(), bias.double(), 1e-6)
    expected = F.silu(expected) if activation else expected
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    assert y.is_contiguous(memory_format=torch.channels_last)
    gradients = torch.autograd.grad(y.square().sum(), (x, weight, bias))
    for ours, right in zip(
        gradients, torch.autograd.grad(expected.square().sum(), (x, weight, bias)), strict=True
    ):
        torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-3)
    assert ict_kernels.apex_report() == {f"128 x {size} x {size}, 32 groups": "apex"}


@pytest.mark.parametrize(("size", "algorithm"), [(22, "1 pass"), (23, "2 pass")])
def test_the_widest_norms_take_apexs_two_passes_from_512_pixels_on(
    apex: list, size: int, algorithm: str
) -> None:
    x = image(3136, size)[:1].detach()
    ict_kernels.group_norm_silu(x, 32, torch.ones(3136), torch.zeros(3136))
    assert [call[0] for call in apex] == [algorithm]


def gradients_of(y: torch.Tensor, layout: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    if layout == "expanded":
        return torch.ones(()).expand(y.shape)
    gradient = torch.randn(*y.shape, 2, generator=generator)
    if layout == "sliced":
        return gradient[..., 0]
    return gradient[..., 0].contiguous(memory_format=getattr(torch, layout))


@pytest.mark.parametrize("layout", ["expanded", "sliced", "contiguous_format", "channels_last"])
def test_apex_gets_gradients_of_any_layout(apex: list, layout: str) -> None:
    x, weight, bias = image(), torch.linspace(0.5, 2, 128, requires_grad=True), torch.zeros(128)
    y = ict_kernels.group_norm_silu(x, 32, weight, bias)
    assert len(apex) == 1
    gradient = gradients_of(y, layout)
    ours = torch.autograd.grad(y, (x, weight), gradient)
    expected = F.silu(F.group_norm(x.double(), 32, weight.double(), bias.double()))
    for each, right in zip(ours, torch.autograd.grad(expected, (x, weight), gradient.double()), strict=True):
        torch.testing.assert_close(each, right, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_block_calls_apex_and_gives_the_eager_gradients(apex: list, backend: str) -> None:
    x, weight = image(), torch.linspace(0.5, 2, 128, requires_grad=True)
    bias = torch.linspace(-1, 1, 128, requires_grad=True)

    def block(x: torch.Tensor) -> torch.Tensor:
        y = ict_kernels.group_norm_silu(x, 32, weight, bias)
        return ict_kernels.group_norm_silu(y, 8, weight, bias) + x  # 8 groups: not for apex

    compiled = torch.compile(block, fullgraph=True, backend=backend)
    results = []
    for function in (block, compiled):
        y = function(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), (x, weight, bias))])
    for eager, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, eager)
    assert {call[:3] for call in apex} == {("1 pass", (2, 128, 4, 4), 32)}
    # Another backend is another graph.
    before = len(apex)
    ict_kernels.set_backend("eager")
    torch.testing.assert_close(compiled(x), results[0][0])
    assert len(apex) == before


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"pre_bias": torch.ones(128)}, "apex knows no pre_bias"),
        ({"scale": torch.ones(2, 128), "shift": torch.ones(2, 128)}, "apex knows no scale or shift"),
        ({"dropout": 0.5, "seed": 1}, "apex knows no dropout"),
        ({"weight": None}, "apex needs weight and bias"),
        ({"x": image().detach().contiguous()}, "apex needs a channels-last image"),
        ({"x": image(96), "weight": torch.ones(96), "bias": torch.ones(96)}, "no kernel for 96 channels"),
        ({"num_groups": 8}, "apex has no kernel for 8 groups"),
        ({"weight": torch.ones(128).half()}, "apex does not take torch.float32 with parameters of"),
    ],
)
def test_a_norm_that_apex_does_not_take_is_computed_here_and_reported(
    apex: list, arguments: dict, reason: str
) -> None:
    given = {"x": image(), "num_groups": 32, "weight": torch.ones(128), "bias": torch.zeros(128)} | arguments
    y = ict_kernels.group_norm_silu(**given)
    assert apex == []
    [said] = ict_kernels.apex_report().values()
    assert reason in said
    ict_kernels.set_backend("eager")
    assert torch.equal(y, ict_kernels.group_norm_silu(**given))


def test_a_tensor_that_is_not_on_a_gpu_stays_here(apex: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apex_backend, "DEVICES", ("cuda",))
    ict_kernels.group_norm_silu(image(), 32, torch.ones(128), torch.zeros(128))
    assert apex == []


def test_where_there_is_no_apex_the_backend_is_refused(
    no_apex: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apex_backend.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"apex is not installed; NVIDIA's is built from"):
        ict_kernels.set_backend("apex")
    assert ict_kernels.get_backend() == "auto"


def test_the_toolkit_for_pyramid_is_not_taken_for_nvidias(
    no_apex: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex/__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RuntimeError, match="is not NVIDIA's"):
        ict_kernels.set_backend("apex")


def test_an_apex_without_its_group_norm_is_refused(
    no_apex: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "apex/contrib").mkdir(parents=True)
    (tmp_path / "apex/__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RuntimeError, match="without its group norm"):
        ict_kernels.set_backend("apex")
