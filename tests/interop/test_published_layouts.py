"""Imported weights compute what the published networks compute: block by block, and as denoisers."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from ict_fast.config import MethodConfig
from ict_fast.consistency import ConsistencyModel, load_model
from ict_fast.interop import openai
from ict_fast.interop.edm import import_edm
from ict_fast.interop.imported import save
from ict_fast.interop.openai import import_openai
from ict_kernels.adapters.ect import ECMLoss

EDM_SHAPES = {
    "ncsnpp": {"kind": "ncsnpp"},
    "ncsnpp-three-levels-grey": {
        "kind": "ncsnpp",
        "mults": (1, 2, 2),
        "attention": (4, 2),
        "colours": 1,
        "classes": 0,
        "blocks": 2,
    },
    "ddpmpp": {"kind": "ddpmpp", "augmentation": 9},
    "adm": {
        "kind": "adm",
        "channels": 8,
        "head": 4,
        "adaptive": True,
        "mults": (1, 2, 3),
        "attention": (4, 2),
    },
    "adm-unconditional": {"kind": "adm", "head": 8, "adaptive": True, "classes": 0},
}
OPENAI_SHAPES = {
    "adaptive": {"adaptive": True, "mults": (1, 2), "attention": (8, 4)},
    "additive-unconditional": {"classes": 0, "mults": (1, 1, 2), "attention": (4,)},
}


def _inputs(shape: object, count: int = 2) -> tuple[Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, shape.colours, shape.size, shape.size, generator=generator)
    return x, torch.arange(count) % shape.classes if shape.classes else None


def _assert_equal_blocks(
    model: ConsistencyModel, x: Tensor, noise: Tensor, labels: Tensor | None, expected: tuple
) -> None:
    """The outputs of every block in the order in which they run, and of the whole, in float64."""
    network, outputs = model.network.double(), []
    for block in network.blocks():
        block.register_forward_hook(lambda module, arguments, output: outputs.append(output))
    whole = network(x.double(), noise.double(), labels)
    result, seen = expected
    assert len(outputs) == len(seen) > 0
    # 1e-5: the positional frequencies are rounded to fp32 in the network.
    for (name, theirs), ours in zip(seen.items(), outputs, strict=True):
        torch.testing.assert_close(
            ours, theirs, atol=1e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
    torch.testing.assert_close(whole, result, atol=1e-5, rtol=1e-5)
    assert result.std() > 0.1


def _wide(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in weights.items()}


@pytest.mark.parametrize("name", EDM_SHAPES)
def test_edm_networks_block_by_block(published: ModuleType, edm_checkpoint: Callable, name: str) -> None:
    shape = published.Shape(**EDM_SHAPES[name])
    model = load_model(edm_checkpoint(shape).path)
    x, labels = _inputs(shape)
    noise = torch.tensor([0.7, -1.5])
    expected = published.edm(_wide(published.edm_weights(shape)), shape, x.double(), noise.double(), labels)
    _assert_equal_blocks(model, x, noise, labels, expected)


@pytest.mark.parametrize("name", OPENAI_SHAPES)
@pytest.mark.parametrize("order", ["qkv-head-channel", "head-qkv-channel"])
def test_openai_networks_block_by_block(published: ModuleType, tmp_path: Path, name: str, order: str) -> None:
    """The first order in two-dimensional attention, the second as in guided-diffusion, with a variance."""
    shape = published.Shape("adm", channels=128, head=64, **OPENAI_SHAPES[name])
    old = order == "head-qkv-channel"
    weights = published.seeded(published.openai_layout(shape, variance=old, flat=old))
    file = tmp_path / ("64.pt" if old else "ct_small.pt")
    torch.save(weights, file)
    save(import_openai(file, resolution=8, attention_order="legacy" if old else None), tmp_path / "imported")
    model = load_model(tmp_path / "imported")
    x, labels = _inputs(shape)
    noise = torch.tensor([-60.0, 100.0])
    output, seen = published.openai(_wide(weights), shape, x.double(), noise.double(), labels, order)
    _assert_equal_blocks(model, x, noise, labels, (output[:, : shape.colours], seen))


def test_the_new_order_of_guided_diffusion_is_that_of_consistency_models(
    published: ModuleType, tmp_path: Path
) -> None:
    shape = published.Shape("adm", channels=128, head=64)
    weights = published.seeded(published.openai_layout(shape, flat=True))
    torch.save(weights, tmp_path / "a.pt")
    new = import_openai(tmp_path / "a.pt", resolution=8, attention_order="new")
    legacy = import_openai(tmp_path / "a.pt", resolution=8)
    name = "middle.0.attention.qkv.weight"
    assert torch.equal(new.tensors[name][..., 0], weights["middle_block.1.qkv.weight"])
    assert not torch.equal(legacy.tensors[name], new.tensors[name])
    assert (new.kind, new.config.method.identity_sigma) == ("noise-prediction", 0.0)


@pytest.mark.parametrize(("precond", "identity"), [("EDMPrecond", 0.0), ("ECMPrecond", 0.003)])
def test_the_imported_function_is_theirs(
    published: ModuleType, edm_checkpoint: Callable, precond: str, identity: float
) -> None:
    """D(x; s) = c_skip x + c_out F(c_in x, ln(s)/4): EDM without a shift, ECT with one, as it samples."""
    shape = published.Shape("ddpmpp", classes=0)
    model = load_model(edm_checkpoint(shape, precond).path)
    x, _ = _inputs(shape, 4)
    sigma = torch.tensor([0.003, 0.02, 0.821, 80.0])
    weights = _wide(published.edm_weights(shape))
    for i, s in enumerate(sigma.double().tolist()):
        noisy = (x[i : i + 1] * (1 + s)).double()
        total = math.sqrt(s**2 + 0.25)
        output, _ = published.edm(
            weights, shape, noisy / total, torch.tensor([math.log(s) / 4]).double(), None
        )
        skip, out = 0.25 / ((s - identity) ** 2 + 0.25), 0.5 * (s - identity) / total
        torch.testing.assert_close(
            model(noisy.float(), s).double(), skip * noisy + out * output, atol=2e-5, rtol=2e-5
        )


def test_augmentation_labels_are_left_out_because_they_are_zero_in_sampling(
    published: ModuleType, snapshot: Callable, tmp_path: Path
) -> None:
    shape = published.Shape("ddpmpp", augmentation=9)
    (tmp_path / "a.pkl").write_bytes(snapshot(published.edm_weights(shape), shape))
    model = import_edm(tmp_path / "a.pkl")
    assert "map_augment" in " ".join(model.notes)
    assert not any("augment" in name for name in model.tensors)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_snapshot_says_what_its_tensors_do_not(
    published: ModuleType, snapshot: Callable, tmp_path: Path, protocol: int
) -> None:
    shape = published.Shape("ncsnpp")
    file = tmp_path / "a.pkl"
    file.write_bytes(snapshot(published.edm_weights(shape), shape, "ECMPrecond", protocol=protocol))
    model = import_edm(file)
    assert model.kind == "consistency"
    assert model.config.network.dropout == 0.13
    assert (model.config.method.sigma_min, model.config.method.boundary_sigma) == (0.003, None)
    assert torch.equal(
        model.tensors["embedding.features.frequencies"], published.edm_weights(shape)["map_noise.freqs"]
    )
    file.write_bytes(snapshot(published.edm_weights(shape), shape, protocol=protocol))
    model = import_edm(file)
    assert (model.kind, model.config.method.identity_sigma) == ("denoiser", 0.0)


def test_a_snapshot_says_the_deviation_of_its_data(
    published: ModuleType, snapshot: Callable, tmp_path: Path
) -> None:
    shape, file = published.Shape("ddpmpp"), tmp_path / "a.pkl"
    file.write_bytes(snapshot(published.edm_weights(shape), shape, "ECMPrecond", sigma_data=0.25))
    assert import_edm(file).config.method.sigma_data == 0.25


@pytest.mark.parametrize("protocol", [2, 5])
def test_a_snapshot_of_a_trainer_that_has_the_kernels_loss_is_read(
    published: ModuleType, snapshot: Callable, tmp_path: Path, protocol: int
) -> None:
    shape, loss, file = published.Shape("ncsnpp"), ECMLoss(c=0.03), tmp_path / "a.pkl"
    loss.update_schedule(2)
    weights = published.edm_weights(shape)
    file.write_bytes(snapshot(weights, shape, "ECMPrecond", protocol=protocol, loss=loss))
    assert b"ict_kernels.adapters.ect" in file.read_bytes()
    assert import_edm(file).kind == "consistency"


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_plain_state_dicts_of_edm_need_to_be_told_their_kind(
    published: ModuleType, tmp_path: Path, suffix: str
) -> None:
    import safetensors.torch

    shape = published.Shape("adm", head=64, adaptive=True, channels=64)
    weights = {f"model.{name}": tensor for name, tensor in published.edm_weights(shape).items()}
    file = tmp_path / f"a{suffix}"
    if suffix == ".pt":
        torch.save({"ema": {f"module.{name}": tensor.half() for name, tensor in weights.items()}}, file)
    else:
        safetensors.torch.save_file(weights, file)
    model = import_edm(file, kind="consistency")
    assert model.config.method.sigma_min == 0.003
    assert model.config.network.head_channels == 64
    assert all(tensor.dtype == torch.float32 for tensor in model.tensors.values())


def test_published_second_steps_come_with_openais_models(published: ModuleType, tmp_path: Path) -> None:
    """launch.sh: --ts 0,22,39 --steps 40 for the distilled model, 0,106,200 of 201 for the trained one."""
    shape = published.Shape("adm", channels=128, head=64)
    for name, (index, pairs) in {"cd_imagenet64_l2": (22, 39), "ct_imagenet64": (106, 200)}.items():
        torch.save(published.seeded(published.openai_layout(shape)), tmp_path / f"{name}.pt")
        method = import_openai(tmp_path / f"{name}.pt", resolution=8).config.method
        expected = (80 ** (1 / 7) + index / pairs * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
        assert method.second_sigma == pytest.approx(expected)
        assert method.boundary_sigma is None


@pytest.mark.parametrize(
    ("name", "index", "pairs"),
    [
        ("cd_imagenet64_lpips", 22, 39),
        ("cd_imagenet64_l2", 22, 39),
        ("ct_imagenet64", 106, 200),
        ("cd_bedroom256_lpips", 17, 39),
        ("cd_bedroom256_l2", 18, 39),
        ("ct_bedroom256", 67, 150),
        ("ct_cat256", 62, 150),
    ],
)
def test_the_second_steps_are_those_of_the_authors_commands(name: str, index: int, pairs: int) -> None:
    """--ts 0,INDEX,PAIRS of their launch.sh, for each of the files that they have published."""
    expected = (80 ** (1 / 7) + index / pairs * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    assert openai._second_sigma(Path(f"{name}.pt"), MethodConfig()) == pytest.approx(expected)
