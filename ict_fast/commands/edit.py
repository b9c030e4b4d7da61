"""`ict-fast edit`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from ict_fast import errors, results
from ict_fast.commands.arguments import (
    Device,
    Ema,
    Run,
    at_least,
    group_of,
    valid_labels,
    valid_seed,
    valid_steps,
)
from ict_fast.errors import InputError, TrainingError, did_you_mean
from ict_fast.screen import counted, live_line

if TYPE_CHECKING:
    import torch

_HOLES = ("center", "left", "right", "top", "bottom")


@dataclass(frozen=True)
class EditOptions:
    """Edit images with a trained model (its EMA weights), which needs no training for it."""

    how: Positional[Literal["inpaint", "colorize", "upscale", "stroke"]]
    """inpaint: fill a hole. colorize: colours for grey images. upscale: details for small images.
    stroke: images like rough ones."""
    run: Positional[Run]
    """Folder of a run, whose newest checkpoint is taken, or of one checkpoint."""
    input: Annotated[tuple[Path, ...], arg(metavar="IMAGE|FOLDER ...")]
    """Images of the model's size (upscale: smaller by a whole factor), or folders of them."""
    mask: Annotated[
        str | None, arg(metavar=f"FILE|{'|'.join(_HOLES)}", help_behavior_hint="(inpaint: required)")
    ] = None
    """The hole: an image of the model's size, white where pixels are to be made; or half of it by name."""
    out: Annotated[Path | None, arg(metavar="PATH", help_behavior_hint="(default: <run>/edited.png)")] = None
    """FILE.png: a grid, the known part on top. A folder: a PNG per image. FILE.npz: arr_0 uint8 NHWC."""
    variants: int = 1
    """Edits of each image, from different noise."""
    labels: Annotated[
        tuple[int, ...] | None, arg(metavar="CLASS ...", help_behavior_hint="(conditional model: required)")
    ] = None
    """The images' classes: one for all, or one for each."""
    steps: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: 40; stroke: 2)")] = None
    """Network evaluations per image."""
    sigma: Annotated[float | None, arg(metavar="SIGMA", help_behavior_hint="(stroke: default 5.38)")] = None
    """Noise level that stroke begins at: the larger, the less of the images stays."""
    seed: int = 0
    """Seed of the noise."""
    ema: Ema = None
    """A further average of the weights, by its decay (0.9999) or its width (power-0.05)."""
    device: Device = "auto"
    """auto: the GPU if the machine has one."""


def run(options: EditOptions) -> int:
    """Runs the command; returns its exit code."""
    _check_options(options)
    results.require_run(options.run)
    files = _files(options.input)
    out = results.run_folder(options.run) / "edited.png" if options.out is None else options.out
    masks = [Path(options.mask)] if options.mask is not None and options.mask not in _HOLES else []
    results.require_sample_place(out, len(files) * options.variants, [*files, *masks])

    import torch

    from ict_fast.consistency import editing, load_model
    from ict_fast.consistency.sampling import DIVERGED
    from ict_fast.data.pictures import image_grid, to_uint8
    from ict_fast.training.launch import configure_torch, resolve_device

    device = resolve_device(options.device, None)
    configure_torch(device, deterministic=False)
    model = load_model(options.run, weights=group_of(options.ema)).to(device)
    network = model.config.network
    total = len(files) * options.variants
    results.require_room(out, total * network.image_channels * network.resolution**2)
    results.require_grid(out, len(files) + total, network.resolution, columns=len(files))
    images = _read(files, 1 if options.how == "colorize" else network.image_channels)
    height, width = images.shape[-2:]
    if options.how != "upscale" and (height, width) != (network.resolution,) * 2:
        raise InputError(
            f"{files[0]}: {width}x{height}; the model makes {network.resolution}x{network.resolution}"
        )
    labels = _labels(options, len(files), network.num_classes)
    more: dict[str, Any] = {} if options.steps is None else {"steps": options.steps}
    if options.how == "inpaint":
        more["hole"] = _hole(str(options.mask), network.resolution)
    if options.sigma is not None:
        more["sigma"] = options.sigma
    work = {name: getattr(editing, name) for name in ("inpaint", "colorize", "upscale", "stroke")}

    # A batch holds all variants, because the noise of an image follows from its number in the batch.
    with live_line() as progress:
        edited = work[options.how](
            model,
            images.repeat(options.variants, 1, 1, 1),
            labels=labels,
            seed=options.seed,
            progress=lambda done: progress(done / total, "editing"),
            **more,
        )
    if not bool(edited.isfinite().all()):
        raise TrainingError(f"the images of {options.run} are not finite: {DIVERGED}")
    if out.suffix == ".png" and not out.is_dir():
        shown = _known(options.how, images, more.get("hole"), network.resolution)
        shown = shown.expand(-1, network.image_channels, -1, -1)
        grid = image_grid(to_uint8(torch.cat([shown, edited.cpu()])), columns=len(files))
        results.write_picture(out, grid)
    else:
        with live_line() as progress:
            results.save_samples(
                to_uint8(edited),
                labels,
                out,
                lambda done: progress(done / total, f"writing {total:,} images"),
            )
    print(f"{options.how}: {counted(len(files), 'image')}, {options.variants} of each: {out}")
    return errors.EXIT_DONE


def _check_options(options: EditOptions) -> None:
    at_least(1, "variants", options.variants)
    valid_seed(options.seed)
    valid_labels(options.labels or ())
    if options.steps is not None:
        valid_steps(1, [options.steps])
    if (options.mask is None) == (options.how == "inpaint"):
        needs = "needs --mask" if options.how == "inpaint" else "takes no --mask"
        raise InputError(f"{options.how} {needs}: an image that is white in the hole, or {', '.join(_HOLES)}")
    if options.sigma is not None and options.how != "stroke":
        raise InputError(f"--sigma belongs to stroke; {options.how} begins at the largest noise level")


def _files(given: tuple[Path, ...]) -> list[Path]:
    """The image files, those of folders in the order of their names."""
    from ict_fast.data.sources.folder_files import IMAGE_SUFFIXES

    files: list[Path] = []
    for path in given:
        if path.is_dir():
            # What is no file is passed over: a pipe would be waited for.
            inside = sorted(
                entry
                for entry in path.iterdir()
                if entry.suffix.lower() in IMAGE_SUFFIXES and entry.is_file()
            )
            if not inside:
                raise InputError(f"--input {path}: a folder without images")
            files += inside
        elif path.is_file():
            files.append(path)
        else:
            raise InputError(f"--input {path}: {'is no file' if path.exists() else 'does not exist'}")
    return files


def _read(files: list[Path], image_channels: int) -> torch.Tensor:
    """(N, C, H, W) in [-1, 1], all of one size."""
    import numpy as np
    import torch

    from ict_fast.data.sources.folder_files import read_file
    from ict_fast.data.sources.image_decoding import RejectedImage, decode_image

    arrays = []
    for file in files:
        try:
            picture = np.asarray(decode_image(read_file(file), image_channels))
        except RejectedImage as error:
            raise InputError(f"{file}: {error}") from None
        arrays.append(picture.reshape(*picture.shape[:2], image_channels))
        if arrays[-1].shape != arrays[0].shape:
            sizes = [f"{array.shape[1]}x{array.shape[0]}" for array in (arrays[-1], arrays[0])]
            raise InputError(f"{file}: {sizes[0]}, and {files[0]} {sizes[1]}; images of one size are edited")
    pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
    return pixels.float() / 127.5 - 1


def _hole(mask: str, resolution: int) -> torch.Tensor:
    """(H, W) bool, True where pixels are to be made."""
    import torch

    from ict_fast.data.sources.image_decoding import is_transparent

    hole = torch.zeros(resolution, resolution, dtype=torch.bool)
    half, quarter = resolution // 2, resolution // 4
    if mask in _HOLES:
        rows, columns = {
            "center": (slice(quarter, resolution - quarter),) * 2,
            "left": (slice(None), slice(half)),
            "right": (slice(None), slice(half, None)),
            "top": (slice(half), slice(None)),
            "bottom": (slice(half, None), slice(None)),
        }[mask]
        hole[rows, columns] = True
        return hole
    if not Path(mask).is_file():
        raise InputError(f"--mask {mask}: does not exist{did_you_mean(mask, _HOLES)}")
    hole = _read([Path(mask)], 1)[0, 0] > 0
    if is_transparent(Path(mask).read_bytes()):
        raise InputError(
            f"--mask {mask}: has transparent pixels, whose colour nobody sees; it must be opaque, white in"
            " the hole and black elsewhere"
        )
    if tuple(hole.shape) != (resolution, resolution):
        raise InputError(
            f"--mask {mask}: {hole.shape[1]}x{hole.shape[0]}; the model makes {resolution}x{resolution}"
        )
    if not bool(hole.any()):
        raise InputError(f"--mask {mask}: has no white pixel, so there is nothing to make")
    if bool(hole.all()):
        raise InputError(
            f"--mask {mask}: is white everywhere, so nothing of the image is kept; `ict-fast sample` makes"
            " whole images"
        )
    return hole


def _labels(options: EditOptions, count: int, num_classes: int) -> torch.Tensor | None:
    """The classes of all variants of `count` images."""
    import torch

    if options.labels is None:
        if num_classes:
            raise InputError(f"the model is conditional on {num_classes} classes; --labels says the images'")
        return None
    if len(options.labels) not in (1, count):
        raise InputError(f"--labels has {len(options.labels)} values for {count} images; give 1 or {count}")
    classes = torch.tensor(options.labels)
    return classes[torch.arange(count * options.variants) % len(classes)]


def _known(how: str, images: torch.Tensor, hole: torch.Tensor | None, resolution: int) -> torch.Tensor:
    """What the model was given of the images, to be shown."""
    import torch

    if hole is not None:
        return torch.where(hole, torch.zeros(()), images)
    factor = resolution // images.shape[-1] if how == "upscale" else 1
    return images.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
