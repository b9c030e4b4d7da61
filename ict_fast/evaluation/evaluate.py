"""Measures a trained model: samples from it, and what their features say beside those of real images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from ict_fast.consistency import ConsistencyModel
from ict_fast.consistency.sampling import check_sampling
from ict_fast.errors import InputError
from ict_fast.evaluation.chunks import (
    Chunk,
    Finished,
    Work,
    generated_chunks,
    reference_chunks,
    work_part,
)
from ict_fast.evaluation.feature_networks import (
    DigitsNetwork,
    FeatureNetwork,
    TorchScriptNetwork,
    choose_network,
)
from ict_fast.evaluation.manifold import NEIGHBOURS, precision_and_recall
from ict_fast.evaluation.measured_reference import (
    MeasuredReference,
    cache_files,
    chosen_images,
    keep,
    put_together,
    read_cached,
)
from ict_fast.evaluation.metrics import (
    gaussian_images,
    halves,
    inception_score,
    kernel_distance,
    noise_images,
)
from ict_fast.evaluation.processes import compute_chunks, threads_each
from ict_fast.evaluation.provenance import provenance
from ict_fast.evaluation.reference import Reference, check_reference, labels_as_in, open_reference
from ict_fast.evaluation.statistics import Statistics, frechet_distance, statistics, sums, too_few
from ict_fast.evaluation.table import key

Progress = Callable[[float, str], None]

DEFAULT_COUNT = 50_000
# Over three seeds of the samples the distance of two models ranged over 11 and 16 % at 5,000 samples, over
# 3 and 6 % at 20,000.
DEFAULT_DIGITS_COUNT = 10_000


def evaluate(
    model: ConsistencyModel,
    reference: str | Path,
    *,
    steps: Sequence[int] = (1, 2),
    sigmas: Sequence[float] | None = None,
    count: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    features: str | Path | None = None,
    features_sha256: str | None = None,
    allow_other_recipe: bool = False,
    devices: Sequence[torch.device | str] = (),
    checked: Callable[[dict[str, Any]], None] | None = None,
    work_folder: Path | None = None,
    reference_cache: Path | None = None,
) -> dict[str, Any]:
    """Fréchet and kernel distance, Inception score, precision and recall of a model's samples.

    Class-conditional models are given labels with the class frequencies of a reference that has classes, else
    every class equally often. The reference numbers do not depend on `seed`.

    Args:
        model: see `load_model`; evaluated without dropout, and left in the mode that it was in.
        reference: folder of a prepared store, or an .npz with mu and sigma, or with arr_0; see
            `open_reference`.
        steps: numbers of sampling steps, each measured on its own.
        sigmas: the noise levels of steps 2, 3, ..., descending, of the one number in `steps`; by default
            `sampling_sigmas`.
        count: images per number of steps; by default 50,000, for digits 10,000, or as many as a reference of
            digits has if that is more.
        seed: of the samples' noise.
        progress: called with the fraction done in [0, 1] and what is being done.
        features: a TorchScript file, see `TorchScriptNetwork`; None for the digits classifier.
        features_sha256: what the file's SHA-256 must be; None to accept any.
        allow_other_recipe: compare with images whose crop recipe is another one than that of the data that
            the model was trained on.
        devices: one for each process that shares the work; none for this process, where the model is. The
            processes import the caller's main module, so a script must guard its call by
            `if __name__ == "__main__"`.
        checked: called before anything is sampled, once nothing is left to refuse, with what the result will
            say of itself beside its numbers: steps, sigmas, count, seed, and see `provenance`.
        work_folder: an existing folder, in which the same call finds what an earlier one has finished, until
            `discard_work`.
        reference_cache: a folder to keep what is computed of a reference that is no store, or one that
            cannot be written; created if need be. None to compute it again each time.
    Returns:
        JSON-able: one_step, two_step, ..., 9_step, each with frechet_distance, kernel_distance and
        inception_score (with their _std), precision, recall, relative_to_noise, relative_to_gaussian, sigmas
        (those that are not available are missing, see `not_available`); reference (halves, noise, gaussian:
        distances for comparison, see `table`; halves_counts: of images in each half); steps, sigmas (as asked
        for: None for the method's), count, seed and what else the numbers depend on; warnings.
    Raises:
        InputError: references, features, counts, steps or sigmas that cannot work, before anything is
            sampled.
        DivergedError: the samples hold NaN or infinite values.
    """
    report = progress or (lambda fraction, text: None)
    opened = open_reference(Path(reference))
    features = None if features is None else Path(features)
    steps = _checked_steps(steps)
    sigmas = tuple(map(float, sigmas)) if sigmas else None
    levels = {number: check_sampling(model, 1, number, sigmas, None) for number in steps}
    if count is not None and count < 2:
        raise InputError(
            f"--count is {count}; a Fréchet distance needs at least 2 images, and better thousands"
        )
    warnings = check_reference(
        opened,
        model.config,
        allow_other_recipe=allow_other_recipe,
        data_fingerprint=model.data_fingerprint,
    )
    report(0.0, "training the digits classifier" if features is None else "opening the features")
    network = choose_network(opened, model.config.network.resolution, features, features_sha256)
    if isinstance(network, DigitsNetwork):
        assert opened.images is not None
        count = max(DEFAULT_DIGITS_COUNT, len(opened.images)) if count is None else count
    else:
        count = DEFAULT_COUNT if count is None else count

    cached_in = cache_files(opened, network, reference_cache)
    measured = read_cached(cached_in, network)
    image_count = 0 if opened.images is None or measured is not None else len(opened.images)
    work = Work(
        model=model,
        network=network,
        labels=labels_as_in(opened, model.config.network.num_classes, count),
        seed=seed,
        images=opened.images,
        chosen=chosen_images(image_count),
        sigmas=sigmas,
    )
    of_reference = reference_chunks(image_count)
    of_model = {number: generated_chunks(number, count) for number in steps}
    chunks = [*of_reference, *(chunk for part in of_model.values() for chunk in part)]
    places = [torch.device(place) for place in devices] or [next(model.parameters()).device]
    about = {
        "steps": list(steps),
        "sigmas": None if sigmas is None else list(sigmas),
        "count": count,
        "seed": seed,
        **provenance(model, opened, network, places[0]),
    }
    if checked is not None:
        checked(about)
    training = model.training
    with ExitStack() as stack:
        if work_folder is None and len(places) > 1:
            work_folder = Path(stack.enter_context(TemporaryDirectory(prefix="ict-fast-")))
        finished = Finished(
            None
            if work_folder is None
            else work_part(work_folder, work.key(opened.fingerprint, threads_each(len(places))))
        )
        model.eval()
        try:
            total = sum(chunk.cost for chunk in chunks)
            compute_chunks(
                work, chunks, finished, places, lambda done, text: report(0.02 + 0.9 * done / total, text)
            )
        finally:
            model.train(training)
        if measured is None:
            measured = put_together(opened, finished, of_reference)
            keep(cached_in, measured)

        report(0.92, "comparing the sets")
        comparison = _comparison(network, opened, measured, count)
        results: dict[str, Any] = {}
        for number, part in of_model.items():
            begun = 0.93 + 0.07 * len(results) / len(steps)
            values = _measures(
                finished,
                part,
                measured,
                comparison,
                places[0],
                lambda done, begun=begun: report(begun + 0.07 * done / len(steps), "comparing the sets"),  # type: ignore[misc]
            )
            results[key(number)] = {**values, "sigmas": [model.config.method.sigma_max, *levels[number]]}
        finished.are_all()
    report(1.0, "evaluated")
    return {
        **results,
        "reference": {**comparison, "count": measured.count, "kind": opened.kind, "recipe": opened.recipe},
        **about,
        "precision_recall_neighbours": NEIGHBOURS,
        "not_available": _not_available(network, measured, count),
        "warnings": [*warnings, *too_few(network.num_features, count, measured.count)],
    }


def _measures(
    finished: Finished,
    chunks: Sequence[Chunk],
    measured: MeasuredReference,
    comparison: dict[str, Any],
    device: torch.device,
    progress: Callable[[float], None],
) -> dict[str, Any]:
    """Everything that is known of the images of some chunks."""
    features = finished.joined(chunks, "features")
    probabilities = finished.joined(chunks, "probabilities")
    assert features is not None
    distance = frechet_distance(_statistics(features), measured.statistics)
    values: dict[str, Any] = {"frechet_distance": distance}
    for name in ("noise", "gaussian"):
        if name in comparison:
            values[f"relative_to_{name}"] = distance / comparison[name]
    if measured.features is not None:
        mean, deviation = kernel_distance(measured.features, features)
        values |= {"kernel_distance": mean, "kernel_distance_std": deviation}
        both = min(len(measured.features), len(features))  # balls of unequal sets do not compare
        if both > NEIGHBOURS:
            precision, recall = precision_and_recall(
                measured.features[:both], features[:both], device=device, progress=progress
            )
            values |= {"precision": precision, "recall": recall, "precision_recall_count": both}
    if probabilities is not None:
        mean, deviation = inception_score(probabilities)
        values |= {"inception_score": mean, "inception_score_std": deviation}
    return values


def _comparison(
    network: FeatureNetwork, reference: Reference, measured: MeasuredReference, count: int
) -> dict[str, Any]:
    """Distances to read others by: of real halves; for digits also of noise, of a linear model's images."""
    found: dict[str, Any] = {}
    if measured.features is not None and reference.images is not None:
        if isinstance(network, DigitsNetwork):
            images, cpu = reference.images.array, torch.device("cpu")

            def of(pictures: np.ndarray) -> Statistics:
                return _statistics(network(pictures, cpu, probabilities=False)[0])

            parts = halves(images)
            real = [of(part) for part in parts]
            found["gaussian"] = frechet_distance(of(gaussian_images(images, count)), measured.statistics)
            found["noise"] = frechet_distance(of(noise_images(images, count)), measured.statistics)
        else:
            parts = halves(measured.features)
            real = [_statistics(part) for part in parts]
        found["halves"], found["halves_counts"] = frechet_distance(*real), [len(part) for part in parts]
    return found


def _statistics(features: np.ndarray) -> Statistics:
    return statistics([sums(features)])


def _checked_steps(steps: Sequence[int]) -> tuple[int, ...]:
    if not steps or min(steps) < 1:
        shown = ",".join(map(str, steps)) or "empty"
        raise InputError(
            f"--steps is {shown}; it must be numbers of sampling steps, each at least 1, like 1,2"
        )
    return tuple(dict.fromkeys(steps))


def _not_available(network: FeatureNetwork, measured: MeasuredReference, count: int) -> dict[str, str]:
    """Why a measure is missing from the result."""
    missing = {}
    if measured.features is None:
        for name in ("kernel_distance", "precision", "recall"):
            missing[name] = "needs the reference's images, of which there are statistics only"
    elif min(len(measured.features), count) <= NEIGHBOURS:
        missing = dict.fromkeys(("precision", "recall"), f"needs more than {NEIGHBOURS} images of each kind")
    if isinstance(network, TorchScriptNetwork) and not network.has_probabilities:
        missing["inception_score"] = "the features file gives no probabilities of classes"
    return missing
