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

# What apex.contrib.group_norm.group_norm offers, by PyTorch's own group norm; `calls` is the test's.
STAND_IN = """
import torch
import torch.nn.functional as F

calls = []


class GroupNorm(torch.nn.Module):
    SUPPORTED_CHANNELS = frozenset([128, 256])
    SUPPORTED_GROUPS = frozenset([16, 32])
    SUPPORTED_DTYPES = frozenset([(torch.float32, torch.float32), (torch.bfloat16, torch.float32)])


def _norm(name, x, G, weight, bias, eps, act):
    calls.append((name, tuple(x.shape), G, eps, act))
    y = F.group_norm(x.float(), G, weight, bias, eps)
    return (F.silu(y) if act == "silu" else y).to(x.dtype)


def cuda_group_norm_nhwc_one_pass(x, G, weight, bias, eps, act=""):
    return _norm("one pass", x, G, weight, bias, eps, act)


def cuda_group_norm_nhwc_two_pass(x, G, weight, bias, eps, act=""):
    return _norm("two passes", x, G, weight, bias, eps, act)
"""


@pytest.fixture
def no_apex(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    apex_backend._group_norm.cache_clear()
    monkeypatch.setattr(apex_backend, "_seen", {})
    yield
    apex_backend._group_norm.cache_clear()
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
@pytest.mark.parametrize(("size", "algorithm"), [(4, "one pass"), (32, "one pass"), (33, "two passes")])
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
    monkeypatch.undo()
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
