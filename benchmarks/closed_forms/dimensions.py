"""Why Pseudo-Huber, which prefers medians, does no harm in images: the mean of many values is what it finds.

The centre m that minimises E sqrt(|T - m|^2 + c^2) weighs each target T by 1 / sqrt(|T - m|^2 + c^2). Of a
single value with c far below its spread that is the median. Of an image with d independent values |T - m| is
nearly the same for all T, and so are the weights: m tends to the mean, as 1/d once d is large. For the
mixture that begins at about 16 values; below, the offset falls more slowly and unevenly.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from closed_forms.mixture import Mixture
from ict_kernels import noise_level_grid
from ict_kernels.consistency_loss import default_huber_c

_NUMBERS = 1 << 23  # random numbers drawn, whatever d is
_SIGMA = 0.5
_ITERATIONS = 40
_NODES = 48


def pseudo_huber_offset(problem: Mixture, values: int, num_scales: int, *, seed: int) -> dict[str, Any]:
    """Distance of the target's Pseudo-Huber centre from its mean, in standard deviations of the target.

    Args:
        problem: of each value of an image, independently.
        values: d.
        num_scales: N; the pair of levels nearest 0.5 is taken.
    Returns:
        values, num_scales, sigma, c, std (root mean square per value, in the data's) and offset.
    """
    grid = noise_level_grid(num_scales).numpy()
    upper = int(np.abs(np.log(grid / _SIGMA)).argmin())
    draw = np.random.default_rng(seed)
    # The same positions for every d, so that only the number of values differs: images tile the line.
    u = (np.arange(max(values, 16)) % 16 + 0.5) / 16
    y = problem.quantile(u, grid[upper])
    position, _, weight = problem.teacher_states(y, grid[upper], grid[upper - 1], _NODES)
    value = problem.exact(position.ravel(), grid[upper - 1], grid[0]).reshape(position.shape)
    c = default_huber_c(values)
    offsets, variances = [], []
    for first in range(0, len(y), values):
        share = range(first, first + values)
        count = _NUMBERS // len(y)
        target = np.stack([draw.choice(value[j], count, p=weight[j]) for j in share], axis=1)
        mean = centre = target.mean(axis=0)
        for _ in range(_ITERATIONS):
            share_of = 1 / np.sqrt(((target - centre) ** 2).sum(axis=1) + c**2)
            centre = share_of @ target / share_of.sum()
        offsets.append(centre - mean)
        variances.append(target.var(axis=0))
    std = float(np.sqrt(np.concatenate(variances).mean()))
    offset = float(np.sqrt((np.concatenate(offsets) ** 2).mean()))
    return {
        "values": values,
        "num_scales": num_scales,
        "sigma": float(grid[upper]),
        "c": c,
        "std": std / problem.std,
        "offset": offset / std,
    }
