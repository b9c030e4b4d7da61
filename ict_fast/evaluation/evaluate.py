"""Measures a trained model: samples from it, and their Fréchet distance to real images in digits features."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from ict_fast.consistency import ConsistencyModel, sample, sampling_sigmas
from ict_fast.data.pictures import to_uint8
from ict_fast.data.prepare import load_digits
from ict_fast.data.store import Store, open_store
from ict_fast.errors import InputError, TrainingError
from ict_fast.evaluation.features import DigitsFeatures, digits_features
from ict_fast.evaluation.metrics import FrechetDistance, gaussian_images, halves, noise_images
from ict_fast.version import __version__

Progress = Callable[[float, str], None]

# Over three seeds of the samples the distance of two models ranged over 11 and 16 % at 5,000 samples, over
# 3 and 6 % at 20,000.
DEFAULT_COUNT = 10_000
LABEL_SEED = 4
_NUMBER_WORDS = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven", 8: "eight"}


def evaluate(
    model: ConsistencyModel,
    reference: Path,
    *,
    steps: Sequence[int] = (1, 2),
    count: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The Fréchet distance between a model's samples and real digits, with what is needed to read it.

    Class-conditional models are given labels with the reference's class frequencies. The reference numbers do
    not depend on `seed`.

    Args:
        model: see `load_model`; evaluated without dropout, and left in the mode that it was in.
        reference: folder of a prepared store of digits.
        steps: numbers of sampling steps, each measured on its own.
        count: images per number of steps; by default 10,000, or as many as the reference has if that is more.
        seed: of the samples' noise.
        progress: called with the fraction done in [0, 1] and what is being done.
    Returns:
        JSON-able: one_step, two_step, ..., 9_step (each frechet_distance, relative_to_noise,
        relative_to_gaussian, sigmas); reference (halves, noise, gaussian: distances for comparison, see
        `table`); count, seed and what else the numbers depend on.
    Raises:
        InputError: a reference of another resolution or channel count than the model's, or that does not hold
            digits; too few images; no or senseless steps.
        TrainingError: the samples hold NaN or infinite values.
    """
    report = progress or (lambda fraction, text: None)
    store = open_store(reference)
    steps = _checked_steps(steps)
    count = max(DEFAULT_COUNT, store.num_images) if count is None else count
    _check_reference(model, store, count)
    labels = _labels(model, store, count)

    report(0.0, "training the digits classifier that gives the features")
    features = digits_features()
    report(0.1, "measuring the real images")
    distance = FrechetDistance(features, store.images)
    noise = distance.to(noise_images(store.images, count))
    gaussian = distance.to(gaussian_images(store.images, count))
    first_half, second_half = halves(store.images)

    measured = {}
    done, total = 0, sum(steps)
    for number in steps:
        text = f"sampling {count:,} images in {_in_words(number)}"

        def images_done(images: int, begun: int = done, number: int = number, text: str = text) -> None:
            report(0.2 + 0.79 * (begun + number * images / count) / total, text)

        value = distance.to(_sampled(model, count, number, labels, seed, images_done))
        measured[_key(number)] = {
            "frechet_distance": value,
            "relative_to_noise": value / noise,
            "relative_to_gaussian": value / gaussian,
            "sigmas": [model.config.method.sigma_max, *sampling_sigmas(number, model.config.method)],
        }
        done += number
    report(1.0, "evaluated")
    return {
        **measured,
        "reference": {
            "halves": FrechetDistance(features, first_half).to(second_half),
            "gaussian": gaussian,
            "noise": noise,
            "count": store.num_images,
        },
        "steps": list(steps),
        "count": count,
        "seed": seed,
        "features": {"name": DigitsFeatures.name, "accuracy": features.accuracy},
        "reference_path": str(reference),
        "reference_fingerprint": store.fingerprint,
        "versions": {
            "ict_fast": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "torchmetrics", "numpy", "scikit-learn")},
        },
    }


def table(result: dict[str, Any]) -> Table:
    """The result of `evaluate` for people: each distance, and what it is the distance of.

    Args:
        result: what `evaluate` returned, or what was read back from its JSON.
    """
    reference = result["reference"]
    count = f"{result['count']:,}"
    rows = [
        (
            "real images, one half to the other",
            reference["halves"],
            "as near as real images are to each other",
        ),
        *(
            (
                f"generated in {_in_words(number)}",
                result[_key(number)]["frechet_distance"],
                f"the model: {count} samples, seed {result['seed']}",
            )
            for number in result["steps"]
        ),
        (
            "Gaussian fitted to the pixels",
            reference["gaussian"],
            "what a linear model achieves; be well below",
        ),
        ("uniform noise", reference["noise"], "no image at all"),
    ]
    shown = Table(
        title=f"Fréchet distance to {reference['count']:,} real images (lower is better)",
        caption=f"features: {result['features']['name']}, right on {result['features']['accuracy']:.1%}"
        " of digits that it has not seen. Compare only with distances of the same features and count.",
    )
    shown.add_column("images")
    shown.add_column("distance", justify="right")
    shown.add_column("of noise", justify="right")
    shown.add_column("what it says")
    for name, value, meaning in rows:
        style = "bold" if name.startswith("generated") else None
        shown.add_row(name, f"{value:.3f}", f"{value / reference['noise']:.2%}", meaning, style=style)
    return shown


def _key(number: int) -> str:
    return f"{_NUMBER_WORDS.get(number, number)}_step"


def _in_words(number: int) -> str:
    return f"{_NUMBER_WORDS.get(number, number)} step{'s' if number > 1 else ''}"


def _checked_steps(steps: Sequence[int]) -> tuple[int, ...]:
    if not steps or min(steps) < 1:
        shown = ",".join(map(str, steps)) or "empty"
        raise InputError(
            f"--steps is {shown}; it must be numbers of sampling steps, each at least 1, like 1,2"
        )
    return tuple(dict.fromkeys(steps))


def _check_reference(model: ConsistencyModel, store: Store, count: int) -> None:
    network = model.config.network
    if count < 2:
        raise InputError(
            f"--count is {count}; a Fréchet distance needs at least 2 images, and better thousands"
        )
    ours = (network.resolution, network.resolution, network.image_channels)
    theirs = (store.resolution, store.resolution, store.image_channels)
    if ours != theirs:
        raise InputError(
            f"{store.path}: holds images of {_size(theirs)}, the model makes {_size(ours)};"
            " name the data that it was trained on as --reference"
        )
    known = {image.tobytes() for image in load_digits()[0]}
    if any(image.tobytes() not in known for image in store.images):
        raise InputError(
            f"{store.path}: holds other images than scikit-learn's digits, and this version has features for"
            " these only; name a store made by `ict-fast prepare digits` as --reference"
        )
    if store.num_images < 4:
        raise InputError(
            f"{store.path}: holds {store.num_images} images; two halves to compare need at least 4"
        )


def _size(shape: tuple[int, int, int]) -> str:
    height, width, channels = shape
    return f"{height}x{width} with {channels} channel{'s' if channels > 1 else ''}"


def _labels(model: ConsistencyModel, store: Store, count: int) -> torch.Tensor | None:
    """(count,) labels drawn from the reference's, for a class-conditional model."""
    num_classes = model.config.network.num_classes
    if not num_classes:
        return None
    if store.num_classes != num_classes:
        raise InputError(
            f"{store.path}: has {store.num_classes} classes, the model {num_classes};"
            " name the data that it was trained on as --reference"
        )
    drawn = np.random.default_rng(LABEL_SEED).integers(0, store.num_images, count)
    return torch.from_numpy(store.labels[drawn])


def _sampled(
    model: ConsistencyModel,
    count: int,
    steps: int,
    labels: torch.Tensor | None,
    seed: int,
    images_done: Callable[[int], None],
) -> np.ndarray:
    """Samples as uint8 (count, H, W, C)."""
    training = model.training
    model.eval()
    try:
        images = sample(model, count, steps=steps, labels=labels, seed=seed, progress=images_done)
    finally:
        model.train(training)
    broken = int((~images.isfinite()).flatten(1).any(1).sum())
    if broken:
        raise TrainingError(
            f"{broken} of {count} images sampled in {_in_words(steps)} hold NaN or infinite values: the"
            " model's training has diverged; evaluate an earlier checkpoint, or train again with a lower"
            " learning rate"
        )
    return to_uint8(images)
