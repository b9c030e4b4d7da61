"""What a model's images are compared with: a store, a file of samples, or statistics of others."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ict_fast.config import Config
from ict_fast.consistency.model import ConsistencyModel
from ict_fast.data.sources.damage import DAMAGED_ZIP
from ict_fast.data.store import open_store
from ict_fast.data.store_format import image_shape_problem
from ict_fast.durable import sha256_file
from ict_fast.errors import InputError
from ict_fast.evaluation.statistics import Statistics

_LABEL_SEED = 4
_AS_STORED = "as stored"  # somebody else has cropped the images; the store does not know how
# The published files, by their name: resolution, and words of the recipe; docs/data.md has the sources.
_PUBLISHED: dict[str, tuple[int, str]] = {
    "VIRTUAL_imagenet64_labeled.npz": (64, "center-crop-dhariwal"),
    "imagenet-64x64-baseline.npz": (64, "center-crop-dhariwal"),
    "imagenet-64x64.npz": (64, "center-crop"),
    "cifar10-32x32.npz": (32, _AS_STORED),
}


class Images:
    """uint8 (N, H, W, C) images of a .npy or of an .npz's arr_0, read when first used in each process."""

    def __init__(self, path: Path, shape: tuple[int, ...]) -> None:
        self.path, self.shape = path, shape
        self._array: np.ndarray | None = None

    @property
    def array(self) -> np.ndarray:
        """
        Raises:
            InputError: the file cannot be read any more, or this part of an .npz is damaged.
        """
        if self._array is None:
            try:
                if self.path.suffix == ".npz":
                    with np.load(self.path, allow_pickle=False) as archive:
                        self._array = archive["arr_0"]
                else:
                    self._array = np.load(self.path, mmap_mode="r", allow_pickle=False)
            except OSError as error:
                raise InputError(f"{self.path}: cannot be read: {error.strerror or error}") from error
            except DAMAGED_ZIP as error:
                part = "arr_0" if self.path.suffix == ".npz" else "its array"
                raise InputError(f"{self.path}: {part} is damaged ({error}); get the file again") from error
        return self._array

    def __len__(self) -> int:
        return self.shape[0]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_array": None}  # a memory map would be sent by its content


@dataclass(frozen=True)
class Reference:
    """A verified reference: images, or statistics, or both."""

    path: Path
    kind: str
    """store, samples or statistics."""
    fingerprint: str
    """SHA-256 of the content."""
    images: Images | None
    labels: np.ndarray | None = None
    """int64 (N,), of a store with classes."""
    num_classes: int = 0
    statistics: Statistics | None = None
    """As published; they take precedence over those of the images, which may then be a part of the set."""
    resolution: int | None = None
    recipe: str | None = None
    """How the pixels were computed, if it is known."""
    cache: Path | None = None
    """Folder where what was computed of it may be kept."""


def open_reference(path: Path) -> Reference:
    """Opens the folder of a prepared store, or an .npz with mu and sigma (OpenAI, EDM) or arr_0 (samples).

    Raises:
        InputError: naming the file, and what is wrong with it. No pickle is read.
    """
    if path.is_file():
        return _open_archive(path)
    if path.suffix == ".npz" and not path.exists():
        raise InputError(f"{path}: there is no such file; docs/data.md has the addresses of published ones")
    store = open_store(path)
    return Reference(
        path=path,
        kind="store",
        fingerprint=store.fingerprint,
        images=Images(path / "images.npy", store.images.shape),
        labels=store.labels if store.num_classes else None,
        num_classes=store.num_classes,
        resolution=store.resolution,
        recipe=store.meta.get("recipe"),
        cache=path / "evaluation",
    )


def training_data(model: ConsistencyModel) -> Path:
    """The store that a model was trained on.

    Raises:
        InputError: it is not here, or other images are in its place.
    """
    path, expected = Path(model.config.data.path), model.data_fingerprint
    name = "name a prepared store with --reference"
    if not path.exists():
        raise InputError(f"the run's data, {path}, are not here{_whence(path, expected)}; {name}")
    if expected is not None and (found := open_store(path).fingerprint) != expected:
        raise InputError(
            f"{path} holds other images than the model was trained on (fingerprint {found[:12]}, before"
            f" {expected[:12]}); {name}"
        )
    return path


def check_reference(
    reference: Reference,
    config: Config,
    *,
    allow_other_recipe: bool,
    data_fingerprint: str | None = None,
) -> list[str]:
    """Checks that a model's images compare with the reference's.

    Args:
        config: of the model. If the data that it was trained on are still there, their recipe is read.
        data_fingerprint: of those data; None: whatever is there is taken for them.
        allow_other_recipe: take a reference of another recipe all the same.
    Returns:
        Warnings: what could not be checked.
    Raises:
        InputError: another resolution or number of channels; another recipe; other classes; too few images.
    """
    network, name = config.network, reference.path
    use = "name the data that it was trained on as --reference"
    if reference.images is not None:
        ours = (network.resolution, network.resolution, network.image_channels)
        if reference.images.shape[1:] != ours:
            theirs = _size(reference.images.shape[1:])
            raise InputError(f"{name}: holds images of {theirs}, the model makes {_size(ours)}; {use}")
        if len(reference.images) < 4:
            count = len(reference.images)
            raise InputError(f"{name}: holds {count} images; two halves to compare need at least 4")
    elif reference.resolution not in (None, network.resolution):
        raise InputError(
            f"{name}: statistics of images of {reference.resolution}x{reference.resolution}, the model makes"
            f" {network.resolution}x{network.resolution}; {use}"
        )
    # Without classes it is compared with all the same: see `labels_as_in`.
    if reference.num_classes and network.num_classes not in (0, reference.num_classes):
        raise InputError(
            f"{name}: has {reference.num_classes} classes, the model {network.num_classes}; {use}"
        )
    data = Path(config.data.path)
    trained = _recipe_of_data(data, data_fingerprint)
    if trained is None and reference.fingerprint == data_fingerprint:  # the very images, elsewhere
        trained = reference.recipe
    if reference.recipe is None or trained is None:
        which = "the reference" if reference.recipe is None else "the data that the model was trained on"
        if reference.recipe is not None and not data.exists() and (whence := _whence(data, data_fingerprint)):
            which += f" ({data}, not here{whence})"
        return [f"the crop recipe of {which} is not known; distances between recipes mean little"]
    theirs_words, ours_words = _words(reference.recipe), _words(trained)
    if theirs_words == ours_words or allow_other_recipe:
        return []
    if _AS_STORED in (theirs_words, ours_words):
        return [
            f"the model was trained on images {ours_words!r}, the reference's are {theirs_words!r}; whether"
            " these are one recipe is not known"
        ]
    raise InputError(
        f"{name}: its images were made by the recipe {reference.recipe!r}, those that the model was trained"
        f" on by {trained!r}, which do not compare; --allow-other-recipe compares them all the same"
    )


def labels_as_in(reference: Reference, num_classes: int, count: int) -> torch.Tensor | None:
    """(count,) labels of a class-conditional model, drawn from the reference's where it has any.

    Every class equally often where it has none; None for an unconditional model (num_classes = 0).
    """
    if not num_classes:
        return None
    if reference.labels is None:
        return torch.arange(count) % num_classes
    drawn = np.random.default_rng(_LABEL_SEED).integers(0, len(reference.labels), count)
    return torch.from_numpy(reference.labels[drawn])


def _whence(path: Path, fingerprint: str | None) -> str:
    """Why the data of a run, of which imported weights have no fingerprint, may seem to be missing."""
    if path.is_absolute() or fingerprint is None:
        return ""
    return ": the path is from the directory in which the run was trained"


def _recipe_of_data(path: Path, fingerprint: str | None) -> str | None:
    try:
        store = open_store(path)
    except (InputError, OSError):
        return None
    return store.meta.get("recipe") if fingerprint in (None, store.fingerprint) else None


def _words(recipe: str) -> str:
    """The recipe without its size: "64x64 RGB, center-crop" and "center-crop" are one."""
    return recipe.rpartition(", ")[2]


def _open_archive(path: Path) -> Reference:
    kinds = "an .npz with mu and sigma, or with arr_0, or the folder of a prepared store"
    arrays, shape = {}, None
    try:
        with path.open("rb") as file:
            start = file.read(6)
        if start == b"\x93NUMPY":
            raise InputError(f"{path}: is a single array; --reference takes {kinds}")
        if not start.startswith(b"PK"):  # which numpy would call a pickle
            raise InputError(f"{path}: no .npz, or truncated or damaged; --reference takes {kinds}")
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            names = set(archive.files)
            for name in {"mu", "sigma"} & names:
                arrays[name] = np.asarray(archive[name])
        if "arr_0" in names:
            shape = _shape_in_archive(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    except DAMAGED_ZIP as error:
        why = "holds a pickle, which is not read" if "allow_pickle" in str(error) else "truncated or damaged"
        raise InputError(f"{path}: {why}; --reference takes {kinds}") from error
    if arrays.keys() == {"mu", "sigma"}:
        statistics = _checked_statistics(path, arrays["mu"], arrays["sigma"])
    elif shape is None:
        found = ", ".join(sorted(names)[:5]) or "nothing"
        raise InputError(f"{path}: holds {found}; --reference takes {kinds}")
    else:
        statistics = None
    resolution, recipe = _PUBLISHED.get(path.name, (None, None))
    return Reference(
        path=path,
        kind="samples" if statistics is None else "statistics",
        fingerprint=sha256_file(path),
        images=None if shape is None else Images(path, shape),
        statistics=statistics,
        resolution=resolution if shape is None else shape[1],
        recipe=recipe,
    )


def _shape_in_archive(path: Path) -> tuple[int, ...]:
    """The shape of arr_0, from its header alone."""
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
        version = np.lib.format.read_magic(file)
        read = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = read(file)
    problem = image_shape_problem(shape)
    if dtype != np.uint8 or problem:
        raise InputError(f"{path}: arr_0 is {dtype} of {problem or f'shape {shape}'}; samples are uint8 NHWC")
    return shape


def _checked_statistics(path: Path, mean: np.ndarray, covariance: np.ndarray) -> Statistics:
    if mean.ndim != 1 or not len(mean) or covariance.shape != (len(mean), len(mean)):
        raise InputError(
            f"{path}: mu has shape {mean.shape} and sigma {covariance.shape}; they must be (D,) and (D, D)"
        )
    if (mean.dtype.kind, covariance.dtype.kind) != ("f", "f"):
        raise InputError(f"{path}: mu is {mean.dtype} and sigma {covariance.dtype}; they must be floats")
    mean, covariance = mean.astype(np.float64), covariance.astype(np.float64)
    # Beyond any network's features, and their squares can still be summed.
    if not (np.abs(mean).max() < 1e50 and np.abs(covariance).max() < 1e100):
        raise InputError(f"{path}: mu or sigma hold NaN, infinite or huge values; get the file again")
    if not np.allclose(covariance, covariance.T, rtol=1e-4, atol=1e-8 * max(1.0, np.abs(covariance).max())):
        raise InputError(f"{path}: sigma is not symmetric, so it is no covariance")
    values = torch.linalg.eigvalsh(torch.from_numpy(covariance))
    if values[0] < -1e-3 * values[-1]:  # what single precision leaves of a singular one is less
        raise InputError(f"{path}: sigma has the eigenvalue {float(values[0]):.3g}, so it is no covariance")
    return Statistics(mean, covariance)


def _size(shape: tuple[int, ...]) -> str:
    height, width, channels = shape
    return f"{height}x{width} with {channels} channel{'s' if channels > 1 else ''}"
