"""Export to diffusers, and back.

An ADM whose noise embedding is fed 250 ln(sigma) is diffusers' own UNet2DModel, and its folder is loaded by
`ConsistencyModelPipeline.from_pretrained` as it is. For every other network two files of code travel with the
weights, which `trust_remote_code=True` loads. Neither way needs diffusers for writing.
"""

from __future__ import annotations

import importlib.resources
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ict_fast.checkpoint import Checkpoint
from ict_fast.config import Config, MethodConfig, NetworkConfig, from_dict
from ict_fast.consistency import load_model
from ict_fast.errors import InputError
from ict_fast.interop import diffusers_unet
from ict_fast.interop.card import model_card
from ict_fast.interop.description import Description, describe, read_description
from ict_fast.interop.export import encode, encode_json, read_json, write_folder
from ict_fast.interop.files import read_state_dict
from ict_fast.interop.imported import Imported, imported
from ict_fast.interop.layouts import Names, diffusers_names, meta_network

UNET_FILE, PIPELINE_FILE = "ict_fast_unet.py", "pipeline.py"
_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
# The grids that a scheduler may have: `timesteps` are integers on it.
_GRIDS = range(40, 1282)
_RECORD = "ict_fast.json"
_LEVELS = ("sigma_min", "sigma_max", "sigma_data", "rho")
_BESIDE_LEVELS = ("boundary_sigma", "second_sigma")
# Of NetworkConfig, in the travelling network's configuration under the same names.
_SAME = (
    "name",
    "channels",
    "channel_mult",
    "num_blocks",
    "attention_resolutions",
    "head_channels",
    "adaptive_norm",
    "c_noise",
)


@dataclass(frozen=True)
class SecondStep:
    """How diffusers' scheduler is told the noise level of the second step."""

    num_train_timesteps: int
    index: int
    """`timesteps=[index, 0]`."""
    sigma: float
    """The level that this is."""


def second_step(method: MethodConfig) -> SecondStep:
    """The scheduler's grid, and the integer on it, that come nearest to `method.second_sigma`.

    diffusers numbers the levels of a descending grid of num_train_timesteps points, sigma_max to sigma_min;
    for `num_inference_steps=2` it would take the middle one, sigma 2.5.
    """
    high, low = (sigma ** (1 / method.rho) for sigma in (method.sigma_max, method.sigma_min))
    place = (high - method.second_sigma ** (1 / method.rho)) / (high - low)
    best = None
    for count in _GRIDS:
        index = min(max(round(place * (count - 1)), 1), count - 2)
        sigma = (high + index / (count - 1) * (low - high)) ** method.rho
        if best is None or abs(sigma - method.second_sigma) < abs(best.sigma - method.second_sigma):
            best = SecondStep(count, index, sigma)
    assert best is not None
    return best


def export_diffusers(
    checkpoint: Checkpoint, out: Path, weights: str = "ema", license_id: str | None = None
) -> list[str]:
    """Writes a folder that diffusers loads, with a card that says how.

    Args:
        checkpoint: see `open_checkpoint`.
        out: a new folder, or an empty one.
        weights: "ema" for the averaged weights, "ema-NAME" for a further average, "weights" for the trained
            ones themselves.
        license_id: for the card's front matter, as model hubs spell it; None to name none.
    Returns:
        what a person should know, a line each.
    Raises:
        InputError: if `out` holds anything or cannot be written, or the checkpoint has no such weights.
    """
    model = load_model(checkpoint.path, weights)
    config, tensors = model.config, model.network.state_dict()
    second, reason = second_step(config.method), diffusers_unet.why_not(config)
    record = describe(checkpoint, config, tensors, weights)
    scheduler = {
        "_class_name": "CMStochasticIterativeScheduler",
        "num_train_timesteps": second.num_train_timesteps,
        "clip_denoised": True,
        "s_noise": 1.0,
        **{name: getattr(config.method, name) for name in _LEVELS},
    }
    index: dict[str, Any] = {"scheduler": ["diffusers", "CMStochasticIterativeScheduler"]}
    files = {"scheduler/scheduler_config.json": encode_json(scheduler)}
    if reason:
        index |= {
            "_class_name": ["pipeline", "ICTPipeline"],
            "unet": [UNET_FILE.removesuffix(".py"), "ICTUNet"],
        }
        unet = _travelling_config(config) | {"ict_fast": record}
        files |= {
            f"unet/{UNET_FILE}": _source(UNET_FILE),
            PIPELINE_FILE: _source(PIPELINE_FILE),
            _WEIGHTS: encode(tensors),
        }
    else:
        index |= {"_class_name": "ConsistencyModelPipeline", "unet": ["diffusers", "UNet2DModel"]}
        unet = diffusers_unet.config(config.network)
        files |= {
            _WEIGHTS: encode(diffusers_unet.split(config.network, tensors)),
            _RECORD: encode_json(record),
        }
    usage = _usage(config, second, bool(reason))
    files |= {
        "unet/config.json": encode_json(unet),
        "model_index.json": encode_json(index),
        "README.md": model_card(checkpoint, config, weights, "diffusers", usage, license_id),
    }
    write_folder(out, files)
    if reason:
        return [
            f"with a pipeline file ({PIPELINE_FILE}, unet/{UNET_FILE}), because {reason}",
            "load it with DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)",
            f"two steps: num_inference_steps=2 (sigma {config.method.second_sigma:.6g}), or sigmas=[...]",
        ]
    return [
        "load it with ConsistencyModelPipeline.from_pretrained(folder)",
        f"two steps: num_inference_steps=None, timesteps=[{second.index}, 0] (sigma {second.sigma:.6g})",
    ]


def import_diffusers(path: Path) -> Imported:
    """A consistency model from a folder of diffusers: one that was exported here, or of UNet2DModel.

    Nothing of the folder's code is run.

    Args:
        path: the pipeline's folder.
    Raises:
        InputError: see `read_state_dict` and `imported`; or if the network or the scheduler is another, or
            an export's files contradict each other.
    """
    unet, scheduler = (
        read_json(path / "unet/config.json"),
        read_json(path / "scheduler/scheduler_config.json"),
    )
    file = path / _WEIGHTS
    if scheduler.get("_class_name") != "CMStochasticIterativeScheduler":
        raise InputError(
            f"{path}: its scheduler is {scheduler.get('_class_name')}; it is no consistency model"
        )
    tensors = read_state_dict(file)
    names: Names = _same_names
    if unet.get("_class_name") == "ICTUNet":
        values = _of_travelling(path, unet)
    elif unet.get("_class_name") == "UNet2DModel":
        values, names = diffusers_unet.network(path, unet), diffusers_names
    else:
        raise InputError(
            f"{path}: its network is {unet.get('_class_name')}; UNet2DModel and ICTUNet are read"
        )
    method = {name: scheduler[name] for name in _LEVELS if name in scheduler}
    method |= {name: unet[name] for name in _BESIDE_LEVELS if unet.get(name) is not None}
    described, said = _description(path, unet)
    if described is not None:  # it knows what no file of diffusers has a place for
        theirs = described.config
        for name, value in method.items():
            if getattr(theirs.method, name) != value:
                raise InputError(
                    f"{path}: altered, its {name} is {str(value)[:80]} in one file and"
                    f" {getattr(theirs.method, name)} in {described.file.name}"
                )
        method |= {name: getattr(theirs.method, name) for name in _BESIDE_LEVELS}
        values |= {name: getattr(theirs.network, name) for name in ("dropout", "dropout_max_resolution")}
    config = from_dict({"network": values, "method": method}, str(path))
    if names is diffusers_names:
        diffusers_unet.check_groups(path, config.network, unet)
        tensors = diffusers_unet.join(config.network, tensors)
    model = imported(
        file,
        tensors,
        config.network,
        config.method,
        kind="consistency" if described is None else described.kind,
        layout="diffusers",
        names=names,
        qkv_order="qkv-head-channel",
        notes=[] if described is None else described.notes(),
        origin=None if described is None else described.origin,
    )
    if described is not None:
        field = ", or if they were changed on purpose take `ict_fast` out of that file"
        described.check_fingerprint(said, model.tensors, field if "ict_fast" in unet else "")
    return model


def _description(path: Path, unet: dict[str, Any]) -> tuple[Description | None, Any]:
    """What an export of ours says of itself, and the fingerprint in it; None for a folder of others."""
    if isinstance(unet.get("ict_fast"), dict):
        file, values = path / "unet/config.json", unet["ict_fast"]
    elif (path / _RECORD).exists():
        file, values = path / _RECORD, read_json(path / _RECORD)
    else:
        return None, None
    return read_description(file, values), values.get("fingerprint")


def _same_names(network: NetworkConfig) -> dict[str, str]:
    return {name: name for name in meta_network(network).state_dict()}


def _travelling_config(config: Config) -> dict[str, Any]:
    """The arguments of the travelling network, as JSON values."""
    network = config.network
    values = {name: getattr(network, name) for name in _SAME}
    return {
        "_class_name": "ICTUNet",
        "sample_size": network.resolution,
        "in_channels": network.image_channels,
        "out_channels": network.image_channels,
        "num_class_embeds": network.num_classes or None,
        **{name: list(value) if isinstance(value, tuple) else value for name, value in values.items()},
        "noise_embedding": network.embedding,  # `embedding` would hide a module of that name
        "boundary_sigma": config.method.boundary_sigma,
        "second_sigma": config.method.second_sigma,
    }


def _of_travelling(path: Path, unet: dict[str, Any]) -> dict[str, Any]:
    """The fields of a NetworkConfig out of the travelling network's configuration."""
    missing = [name for name in (*_SAME, "noise_embedding", "sample_size", "in_channels") if name not in unet]
    if missing:
        raise InputError(f"{path}: its unet/config.json lacks {', '.join(missing)}")
    return {
        **{name: unet[name] for name in _SAME},
        "embedding": unet["noise_embedding"],
        "resolution": unet["sample_size"],
        "image_channels": unet["in_channels"],
        "num_classes": unet.get("num_class_embeds") or 0,
    }


def _source(name: str) -> bytes:
    """One of the files that travel, which are read, not imported: they import diffusers."""
    return (importlib.resources.files("ict_fast.interop") / "travelling" / name).read_bytes()


def _usage(config: Config, second: SecondStep, with_code: bool) -> str:
    """How to call it, in Markdown."""
    classes = config.network.num_classes
    labels = f", class_labels=[{', '.join(str(i % classes) for i in range(4))}]" if classes else ""
    low, high = config.method.sigma_min, config.method.sigma_max
    if with_code:
        return f"""It needs torch and diffusers; `trust_remote_code=True` runs the two files of code in this
folder, `pipeline.py` and `unet/{UNET_FILE}`.

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("THIS_FOLDER", trust_remote_code=True)
images = pipe(batch_size=4{labels}).images  # one step
images = pipe(batch_size=4{labels}, num_inference_steps=2).images  # two
images = pipe(batch_size=4{labels}, sigmas=[5.0, 0.5]).images  # three steps, at levels of your own
```"""
    return f"""```python
from diffusers import ConsistencyModelPipeline

pipe = ConsistencyModelPipeline.from_pretrained("THIS_FOLDER")
images = pipe(batch_size=4{labels}).images  # one step
images = pipe(batch_size=4{labels}, num_inference_steps=None, timesteps=[{second.index}, 0]).images  # two
```

`timesteps` count on the scheduler's grid of {second.num_train_timesteps} levels from sigma {high} down to
{low}: {second.index} is sigma {second.sigma:.6g}. `num_inference_steps=2` alone would take the
grid's middle instead."""
