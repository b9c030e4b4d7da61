"""Exported folders in diffusers' own pipelines: the same images from the same noise as `ict-fast sample`."""

from __future__ import annotations

import inspect
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from ict_fast.checkpoint import Checkpoint, write_checkpoint
from ict_fast.checkpoint import open_checkpoint as open_
from ict_fast.config import Config, MethodConfig, to_dict
from ict_fast.consistency import load_model, sample
from ict_fast.errors import InputError
from ict_fast.interop import diffusers_unet
from ict_fast.interop.diffusers import export_diffusers, import_diffusers, second_step
from ict_kernels.philox import INITIAL, normal

diffusers = pytest.importorskip("diffusers")
COUNT = 4


@pytest.fixture(autouse=True)
def module_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers copies the code that travels with a model into a cache, which is the user's else."""
    from diffusers.utils import dynamic_modules_utils

    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))


def _noises(checkpoint: Checkpoint) -> list[Tensor]:
    """What `sample` draws for its first and second step with seed 0."""
    network = load_model(checkpoint.path).config.network
    shape = (COUNT, network.image_channels, network.resolution, network.resolution)
    return [normal(shape, torch.tensor([0, step]), 0, INITIAL, device="cpu") for step in (0, 1)]


def _expected(checkpoint: Checkpoint, steps: int) -> Tensor:
    return sample(load_model(checkpoint.path), COUNT, steps=steps)


def test_adm_is_diffusers_own_pipeline(
    published: ModuleType, openai_checkpoint: Callable, exported_adm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = published.Shape("adm", channels=128, head=64, adaptive=True)
    checkpoint = openai_checkpoint(shape)
    assert not list(exported_adm.rglob("*.py"))
    pipe = diffusers.ConsistencyModelPipeline.from_pretrained(exported_adm)
    pipe.set_progress_bar_config(disable=True)
    first, second = _noises(checkpoint)
    arguments = {
        "batch_size": COUNT,
        "class_labels": [i % shape.classes for i in range(COUNT)],
        "latents": first,
        "output_type": "pt",
    }
    one = pipe(**arguments).images * 2 - 1
    torch.testing.assert_close(one, _expected(checkpoint, 1), atol=1e-4, rtol=0)
    from diffusers.schedulers import scheduling_consistency_models

    monkeypatch.setattr(scheduling_consistency_models, "randn_tensor", lambda *shape, **options: second)
    level = second_step(load_model(checkpoint.path).config.method)
    two = pipe(**arguments, num_inference_steps=None, timesteps=[level.index, 0]).images * 2 - 1
    torch.testing.assert_close(two, _expected(checkpoint, 2), atol=1e-4, rtol=0)
    assert (one - two).abs().max() > 0.01
    card = (exported_adm / "README.md").read_text()
    assert f"timesteps=[{level.index}, 0]" in card
    assert f"{level.index} is sigma {level.sigma:.6g}" in card


def test_additive_adm_of_ours_is_expressible_too(tmp_path: Path, adm_of_ours: Callable) -> None:
    checkpoint = adm_of_ours(c_noise="adm-openai")
    export_diffusers(checkpoint, tmp_path / "out")
    pipe = diffusers.ConsistencyModelPipeline.from_pretrained(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    levels = pipe.scheduler.config
    assert (levels.sigma_min, levels.sigma_max, levels.rho) == (0.002, 80.0, 7.0)
    # Grey latents are beyond the pipeline's own check of three colours, so its generator makes them.
    images = pipe(batch_size=COUNT, generator=torch.Generator().manual_seed(3), output_type="pt").images
    noise = torch.randn(COUNT, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    model = load_model(checkpoint.path)
    expected = model(80 * noise, 80.0).clamp(-1, 1) / 2 + 0.5
    torch.testing.assert_close(images, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["ncsnpp", "ddpmpp", "adm", "denoiser"])
def test_every_other_network_brings_its_pipeline_along(
    published: ModuleType, edm_checkpoint: Callable, tmp_path: Path, kind: str
) -> None:
    shape = published.Shape("ddpmpp" if kind == "denoiser" else kind, classes=0 if kind == "ddpmpp" else 5)
    if kind == "adm":
        shape = published.Shape("adm", head=4, adaptive=True, mults=(1, 2, 2), attention=(4, 2))
    checkpoint = edm_checkpoint(shape, "EDMPrecond" if kind == "denoiser" else "ECMPrecond")
    export_diffusers(checkpoint, tmp_path / "out")
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out", trust_remote_code=True)
    first, second = _noises(checkpoint)
    arguments = {"batch_size": COUNT, "latents": first, "output_type": "pt"}
    for steps in (1, 2):
        images = pipe(**arguments, noises=[second], num_inference_steps=steps).images * 2 - 1
        torch.testing.assert_close(images, _expected(checkpoint, steps), atol=1e-4, rtol=0)
    three = pipe(**arguments, sigmas=[5.0, 0.5], generator=torch.Generator().manual_seed(0)).images
    assert three.isfinite().all()


def test_the_pipeline_that_travels_makes_pictures(trained: Path, tmp_path: Path) -> None:
    """As the card calls it: grey pictures of a run trained here."""
    export_diffusers(open_(trained), tmp_path / "out")
    pipe = diffusers.DiffusionPipeline.from_pretrained(
        tmp_path / "out", custom_pipeline=tmp_path / "out", trust_remote_code=True
    )
    pictures = pipe(batch_size=3, num_inference_steps=2).images
    assert [(picture.size, picture.mode) for picture in pictures] == [((8, 8), "L")] * 3
    arrays = pipe(batch_size=3, output_type="np", return_dict=False)[0]
    assert arrays.shape == (3, 8, 8, 1)
    with pytest.raises(ValueError, match="sigmas"):
        pipe(num_inference_steps=3)


def test_code_that_travels_needs_the_readers_consent(trained: Path, tmp_path: Path) -> None:
    export_diffusers(open_(trained), tmp_path / "out")
    with pytest.raises(ValueError, match="trust_remote_code"):
        diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("sigma", [0.05, 0.821, 1.526, 2.5, 20.0])
def test_the_scheduler_reaches_any_second_sigma(sigma: float) -> None:
    level = second_step(MethodConfig(second_sigma=sigma))
    scheduler = diffusers.CMStochasticIterativeScheduler(num_train_timesteps=level.num_train_timesteps)
    scheduler.set_timesteps(timesteps=[level.index, 0])
    assert float(scheduler.sigmas[0]) == pytest.approx(80.0)
    assert float(scheduler.sigmas[1]) == pytest.approx(level.sigma, rel=1e-6)
    assert level.sigma == pytest.approx(sigma, rel=1e-4)
    np.testing.assert_allclose(scheduler.timesteps[1], 250 * np.log(level.sigma), rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"downsample_type": "conv"}, "downsample_type is 'conv'"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type is 'fourier'"),
        ({"down_block_types": ["DownBlock2D", "AttnDownBlock2D"]}, "has a block DownBlock2D"),
        ({"block_out_channels": [128]}, "lacks sizes"),
        ({"block_out_channels": [128, 200]}, "no multiples"),
        ({"layers_per_block": 2}, "lacks"),
        ({"norm_eps": 1e-6}, "norm_eps"),
        ({"norm_num_groups": 16}, "norm_num_groups is 16; a network of these widths has 32 here"),
        ({"norm_num_groups": [32]}, "norm_num_groups"),
        ({"attn_norm_num_groups": 16}, "attn_norm_num_groups is 16; its other norms have 32 groups"),
        (
            {"attn_norm_num_groups": None, "resnet_time_scale_shift": "scale_shift"},
            "attn_norm_num_groups is None; its other norms have 32",
        ),
        ({"_class_name": "UNet2DConditionModel"}, "UNet2DConditionModel"),
        ({"layers_per_block": "many"}, "network.num_blocks"),
    ],
)
def test_a_network_of_diffusers_that_is_no_adm_is_refused(
    exported_adm: Path, tmp_path: Path, change: dict, reason: str
) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(exported_adm, folder, copy_function=os.symlink)
    file = folder / "unet/config.json"
    values = json.loads(file.read_text()) | change
    file.unlink()
    file.write_text(json.dumps(values))
    with pytest.raises(InputError, match=reason):
        import_diffusers(folder)


def test_what_a_configuration_does_not_say_is_what_diffusers_takes() -> None:
    parameters = inspect.signature(diffusers.UNet2DModel.__init__).parameters
    said = {
        "sample_size": 32,
        "block_out_channels": [128],
        "down_block_types": ["ResnetDownsampleBlock2D"],
        "up_block_types": ["ResnetUpsampleBlock2D"],
        "downsample_type": "resnet",
        "upsample_type": "resnet",
    }
    found = diffusers_unet.network(Path("folder"), said)
    for ours, theirs in (
        ("image_channels", "in_channels"),
        ("head_channels", "attention_head_dim"),
        ("num_blocks", "layers_per_block"),
    ):
        assert found[ours] == parameters[theirs].default, theirs
    assert found["num_classes"] == (parameters["num_class_embeds"].default or 0)
    assert found["adaptive_norm"] == (parameters["resnet_time_scale_shift"].default == "scale_shift")


@pytest.fixture(scope="module")
def exported_adm(
    published: ModuleType, openai_checkpoint: Callable, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder that diffusers reads without code of ours."""
    folder = tmp_path_factory.mktemp("exported") / "adm"
    export_diffusers(openai_checkpoint(published.Shape("adm", channels=128, head=64, adaptive=True)), folder)
    return folder


@pytest.fixture
def adm_of_ours(tmp_path: Path, tiny: Config) -> Callable:
    """A checkpoint of an ADM as the presets have it: additive, grey, its weights random everywhere."""

    def make(**network: object) -> Checkpoint:
        config = replace(
            tiny,
            network=replace(
                tiny.network, name="adm", channels=128, embedding="positional", channel_mult=(1, 2), **network
            ),
        )
        from ict_fast.consistency.model import build_seeded_network

        weights = build_seeded_network(config).state_dict()
        generator = torch.Generator().manual_seed(2)
        for name, tensor in weights.items():
            scale = tensor[0].numel() ** -0.5 if tensor.ndim > 1 else 0.2
            offset = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            weights[name] = offset + scale * torch.randn(tensor.shape, generator=generator)
        return open_(
            write_checkpoint(tmp_path / "ours", 1, {"ema": weights}, {"config": to_dict(config)}, keep=2)
        )

    return make


def test_a_run_with_the_papers_noise_embedding_is_not_forced_into_diffusers_network(
    tmp_path: Path, adm_of_ours: Callable
) -> None:
    lines = export_diffusers(adm_of_ours(c_noise="log"), tmp_path / "out")
    assert "because its c_noise is ln(sigma)/4" in lines[0]
    assert (tmp_path / "out/pipeline.py").exists()
