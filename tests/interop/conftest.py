"""Files of other code bases, made here from published names and shapes."""

from __future__ import annotations

import functools
import importlib.util
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ict_fast.checkpoint import Checkpoint, open_checkpoint
from ict_fast.interop.edm import import_edm
from ict_fast.interop.imported import save
from ict_fast.interop.openai import import_openai


@pytest.fixture(scope="session")
def published() -> ModuleType:
    """published.py: the layouts, seeded weights for them, and the networks as plain functions."""
    spec = importlib.util.spec_from_file_location("published", Path(__file__).with_name("published.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["published"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


class _Persistent(nn.Module):
    """Pickled as EDM's persistent classes are: state, and source code that their own function executes."""

    def __init__(self, class_name: str, source: str, attributes: dict[str, Any]) -> None:
        super().__init__()
        self.__dict__.update(attributes)
        self.__dict__["_meta"] = (class_name, source)

    def __reduce__(self) -> tuple:
        class_name, source = self._meta
        state = {name: value for name, value in self.__dict__.items() if name != "_meta"}
        meta = {"type": "class", "version": 6, "module_src": source, "class_name": class_name, "state": state}
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (meta,)


class _Loss:
    """As ECT's ECMLoss, a persistent object whose attribute is one of its own methods."""

    def __init__(self, source: str) -> None:
        self._init_args, self._init_kwargs = (), {"P_mean": -1.1, "adj": "sigmoid"}
        self.stage, self.t_to_r, self.source = 3, self.t_to_r_sigmoid, source

    def t_to_r_sigmoid(self, t: float) -> float:
        return t / 2

    def __reduce__(self) -> tuple:
        meta = {"type": "class", "version": 6, "module_src": self.source, "class_name": "ECMLoss"}
        # The very dictionary: the pickle refers to it from within itself.
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (
            meta | {"state": self.__dict__},
        )


@pytest.fixture
def snapshot(monkeypatch: pytest.MonkeyPatch) -> Callable[..., bytes]:
    """Pickles weights as EDM's snapshots: (weights, shape, class of the preconditioning, its attributes).

    `inner` are attributes of every module inside; `loss` stands in for ECT's own.
    """

    def _reconstruct_persistent_obj(meta: dict) -> None:
        raise AssertionError("the restricted unpickler must not come here")

    _reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    persistence = ModuleType("torch_utils.persistence")
    persistence._reconstruct_persistent_obj = _reconstruct_persistent_obj  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_utils", ModuleType("torch_utils"))
    monkeypatch.setitem(sys.modules, "torch_utils.persistence", persistence)

    def make(
        weights: dict[str, Tensor],
        shape: Any,
        precond: str = "EDMPrecond",
        source: str = "raise SystemExit('executed')",
        protocol: int = pickle.DEFAULT_PROTOCOL,
        inner: dict[str, Any] | None = None,
        loss: Any = None,
        **attributes: Any,
    ) -> bytes:
        unet_name = "DhariwalUNet" if shape.kind == "adm" else "SongUNet"
        unet = _Persistent(unet_name, source, {})
        for name, tensor in weights.items():
            module = unet
            for part in name.split(".")[:-1]:
                if part not in module._modules:
                    values = {"skip_scale": np.sqrt(0.5), "dropout": 0.13}
                    if f"{name.rpartition(part)[0]}{part}.qkv.weight" in weights:
                        width = weights[f"{name.rpartition(part)[0]}{part}.qkv.weight"].shape[1]
                        values["num_heads"] = width // shape.head if shape.head else 1
                    values |= inner or {}
                    child = nn.ModuleDict() if part in ("enc", "dec") else _Persistent("Part", source, values)
                    module.add_module(part, child)
                module = module._modules[part]
            last = name.rpartition(".")[2]
            if last in ("resample_filter", "freqs"):
                module.register_buffer(last, tensor)
            else:
                module.register_parameter(last, nn.Parameter(tensor, requires_grad=False))
        precond_state = {
            "img_resolution": shape.size,
            "img_channels": shape.colours,
            "sigma_min": 0.003 if precond == "ECMPrecond" else 0,
            "sigma_max": float("inf"),
            "sigma_data": 0.5,
            "_init_args": (),
            "_init_kwargs": {"img_resolution": shape.size, "model_type": unet_name},
            **attributes,
        }
        whole = _Persistent(precond, source, precond_state)
        whole.add_module("model", unet)
        augment = _Persistent("AugmentPipe", source, {"_init_args": (), "p": 0.12, "xflip": 1e8})
        content = {"ema": whole, "loss_fn": loss or _Loss(source), "augment_pipe": augment}
        return pickle.dumps(content | {"dataset_kwargs": {}}, protocol)

    return make


@pytest.fixture
def edm_checkpoint(published: ModuleType, snapshot: Callable[..., bytes], tmp_path: Path) -> Callable:
    """Imports a network of EDM or ECT: (shape, class of the preconditioning) -> checkpoint."""

    def make(shape: Any, precond: str = "ECMPrecond") -> Checkpoint:
        file = tmp_path / f"{shape.kind}-{precond}.pkl"
        file.write_bytes(snapshot(published.edm_weights(shape), shape, precond))
        save(import_edm(file), tmp_path / file.stem)
        return open_checkpoint(tmp_path / file.stem)

    return make


@pytest.fixture(scope="session")
def openai_checkpoint(published: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """Imports a consistency model of OpenAI's layout, once: (shape) -> checkpoint."""

    @functools.cache
    def make(shape: Any) -> Checkpoint:
        folder = tmp_path_factory.mktemp("openai")
        file = folder / "ct_imagenet64.pt"  # a published name: its second step comes with it
        torch.save(published.seeded(published.openai_layout(shape)), file)
        save(import_openai(file, resolution=shape.size, head_channels=shape.head), folder / "imported")
        return open_checkpoint(folder / "imported")

    return make
