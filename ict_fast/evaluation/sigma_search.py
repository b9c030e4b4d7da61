"""The noise level of the second sampling step, by a ternary search on a distance to real images.

Song et al. (2023) and Song & Dhariwal (2024) choose it so. The search assumes that the distance has one
valley in ln sigma: it never looks again where it has once turned away from. Every candidate is sampled from
the same noise with the same labels, so that two of them differ by their sigma alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ict_fast.config import MethodConfig
from ict_fast.consistency.model import ConsistencyModel
from ict_fast.consistency.sampling import BATCH_SIZE, DIVERGED, sampling_step
from ict_fast.data.pictures import to_uint8
from ict_fast.errors import InputError, TrainingError

Measure = Callable[[float], float]
Progress = Callable[[float, str], None]
DEFAULT_INTERVAL = (0.05, 20.0)
DEFAULT_TOLERANCE = 1.1


@dataclass
class SigmaSearch:
    """What was tried, in order, and what came of it.

    Attributes:
        low, high: the interval that is left.
        tried: (sigma, distance) pairs.
        without: the distance without the step that the sigma is for, if it was measured.
    """

    low: float
    high: float
    tried: list[tuple[float, float]] = field(default_factory=list)
    without: float | None = None

    @property
    def best(self) -> tuple[float, float]:
        """The sigma with the smallest distance, and that distance."""
        return min(self.tried, key=lambda pair: pair[1])

    def as_dict(self) -> dict[str, Any]:
        """The search as JSON values."""
        sigma, distance = self.best
        return {
            "sigma": sigma,
            "distance": distance,
            "distance_without_this_step": self.without,
            "interval": [self.low, self.high],
            "tried": [{"sigma": sigma, "distance": distance} for sigma, distance in self.tried],
            "single_valley": self.is_single_valley(),
        }

    def is_single_valley(self) -> bool:
        """Whether the distances tried fall and then rise: what the search takes for granted."""
        distances = [distance for _, distance in sorted(self.tried)]
        lowest = distances.index(min(distances))
        return all(
            b <= a if later <= lowest else b >= a
            for later, (a, b) in enumerate(itertools.pairwise(distances), start=1)
        )


def evaluations(low: float, high: float, tolerance: float) -> int:
    """How many distances a search measures."""
    return 2 * max(0, math.ceil(math.log(math.log(high / low) / math.log(tolerance)) / math.log(1.5)))


def search_sigma(
    measure: Measure,
    low: float,
    high: float,
    *,
    tolerance: float = DEFAULT_TOLERANCE,
    advanced: Callable[[SigmaSearch], None] = lambda search: None,
) -> SigmaSearch:
    """Searches for the sigma with the smallest distance.

    Each round measures at a third and two thirds of the interval in ln sigma, and drops the third beyond the
    worse of the two.

    Args:
        measure: the distance at a sigma.
        low, high: the interval to search, 0 < low < high.
        tolerance: the ratio of the interval's ends at which the search stops, above 1.
        advanced: called at the beginning and after each measurement with the search so far.
    Returns:
        the trace; `best` is the smallest distance seen.
    Raises:
        InputError: an empty interval, or a tolerance that would stop before the first measurement.
    """
    if not 0 < low < high:
        raise InputError(f"the interval is {low} to {high}; it must be two positive ascending numbers")
    if not 1 < tolerance < high / low:
        raise InputError(f"the tolerance is {tolerance}; it must be above 1 and below {high / low:.4g}")
    search = SigmaSearch(low, high)
    advanced(search)
    for _ in range(evaluations(low, high, tolerance) // 2):
        logs = math.log(search.low), math.log(search.high)
        third = (logs[1] - logs[0]) / 3
        pair = math.exp(logs[0] + third), math.exp(logs[1] - third)
        for sigma in pair:
            search.tried.append((sigma, measure(sigma)))
            advanced(search)
        (_, left), (_, right) = search.tried[-2:]
        if left <= right:
            search.high = pair[1]
        else:
            search.low = pair[0]
    return search


def check_interval(interval: tuple[float, float], method: MethodConfig) -> None:
    """Raises InputError unless the levels of an interval, ascending, are between those of the method."""
    if not method.sigma_min < interval[0] < interval[1] < method.sigma_max:
        raise InputError(
            f"the interval is {interval[0]} to {interval[1]}; it must lie between sigma_min ="
            f" {method.sigma_min} and sigma_max = {method.sigma_max}"
        )


def search_sampling_sigmas(
    model: ConsistencyModel,
    distance: Callable[[np.ndarray], float],
    *,
    count: int,
    steps: int = 2,
    interval: tuple[float, float] = DEFAULT_INTERVAL,
    tolerance: float = DEFAULT_TOLERANCE,
    labels: Tensor | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    tried: Callable[[list[SigmaSearch]], None] = lambda searches: None,
) -> list[SigmaSearch]:
    """Searches for the level of the second step, then with that one fixed for that of the third, and so on.

    What comes before the step in question is sampled once, and every candidate goes on from there; the images
    are those that `sample` makes with these sigmas.

    Args:
        model: see `load_model`; evaluated without dropout.
        distance: of uint8 (N, H, W, C) images to real ones, such as `DistanceToReference(...).to`.
        count: images per candidate.
        steps: sampling steps, at least 2; a search for each after the first.
        interval: of the second sigma; a later one lies below the one before.
        tolerance: see `search_sigma`.
        labels: (count,) for a class-conditional model.
        seed: of the noise.
        progress: called with the fraction done in [0, 1] and what is being done.
        tried: called after each candidate with the searches so far.
    Returns:
        a search for each step after the first; fewer if a step's sigma leaves the next one no interval.
    Raises:
        InputError: see `search_sigma`; or an interval beyond the model's noise levels.
        TrainingError: images that are not finite.
    """
    method, network = model.config.method, model.config.network
    check_interval(interval, method)
    if steps < 2:
        raise InputError(f"steps is {steps}; one step has no sigma to search for")
    report = progress or (lambda fraction, text: None)
    size = network.resolution
    start = torch.zeros(count, network.image_channels, size, size)
    report(0.0, f"sampling {count:,} images in one step")
    images = _stepped(model, start, method.sigma_max, 0, labels, seed)
    found: list[SigmaSearch] = []
    low, high = interval
    for number in range(1, steps):
        before, total = images, evaluations(low, high, tolerance)

        def measure(sigma: float, before: Tensor = before, number: int = number) -> float:
            return distance(to_uint8(_stepped(model, before, sigma, number, labels, seed)))

        def advanced(search: SigmaSearch, number: int = number, total: int = total) -> None:
            done = len(search.tried)
            if done:
                tried([*found, search])
            share = (number - 1 + done / total) / (steps - 1)
            report(share, f"step {number + 1}: {done} of {total} candidates")

        search = search_sigma(measure, low, high, tolerance=tolerance, advanced=advanced)
        search.without = distance(to_uint8(before))
        found.append(search)
        if number < steps - 1:
            high = search.best[0]
            if not high > low * tolerance:
                break
            images = _stepped(model, before, high, number, labels, seed)
    report(1.0, "searched")
    return found


def _stepped(
    model: ConsistencyModel, images: Tensor, sigma: float, number: int, labels: Tensor | None, seed: int
) -> Tensor:
    """One sampling step of all images, which stay on the CPU."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    stepped = []
    try:
        for first in range(0, len(images), BATCH_SIZE):
            last = first + BATCH_SIZE
            classes = None if labels is None else labels[first:last].to(device)
            x = sampling_step(
                model, images[first:last].to(device), sigma, number, classes, seed=seed, offset=first
            )
            stepped.append(x.cpu())
    finally:
        model.train(training)
    result = torch.cat(stepped)
    if not bool(result.isfinite().all()):
        raise TrainingError(f"images at sigma {sigma:.4g} are not finite: {DIVERGED}")
    return result
