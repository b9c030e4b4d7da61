"""Precision and recall: which part of a generator's images looks real, and which part of the real it covers.

Both sets of features are taken for manifolds: the union of balls around each point that reach to its k-th
nearest neighbour in its own set. Precision is the share of generated points in the real manifold, recall the
share of real points in the generated one (Kynkäänniemi et al. 2019, equations 1 and 2, k = 3).

In float64 throughout: a squared distance is the difference of numbers the size of a squared norm, and in
float32 what is left of it, for near neighbours far from the origin, is rounding. For 50,000 images of 2,048
features that is 3e13 operations, still less than what computes the features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

NEIGHBOURS = 3
_TILE = 2048  # rows and columns of distances held at a time: 34 MB
_SAME = 1e-12  # squared distances below this, relative to the squared norms, are rounding: the same point


def precision_and_recall(
    real: np.ndarray,
    generated: np.ndarray,
    *,
    device: torch.device | str = "cpu",
    progress: Callable[[float], None] = lambda fraction: None,
) -> tuple[float, float]:
    """Precision and recall of `generated`, in [0, 1].

    The balls shrink as points become more, so that only values for equal numbers of points compare; the paper
    uses 50,000 of each.

    Args:
        real, generated: (N, D) and (M, D) features of any float type, N and M above NEIGHBOURS.
        device: where to compute. Holds both sets as they are, and a few tiles of 34 MB.
        progress: called with the fraction done.
    """
    # A common shift changes no distance, and brings the norms, whose rounding counts, down.
    centre = torch.from_numpy(real.mean(0, dtype=np.float64)).to(device)
    sets = [torch.from_numpy(np.ascontiguousarray(points)).to(device) for points in (real, generated)]
    parts = [-(-len(points) // _TILE) for points in sets]
    done, total = 0, parts[0] ** 2 + parts[1] ** 2 + parts[0] * parts[1]

    def tile_done() -> None:
        nonlocal done
        done += 1
        progress(done / total)

    real_radii, generated_radii = (_squared_radii(points, centre, tile_done) for points in sets)
    in_real = torch.zeros(len(generated), dtype=torch.bool, device=device)
    in_generated = torch.zeros(len(real), dtype=torch.bool, device=device)
    for row, rows in _tiles(sets[0], centre):
        for column, columns in _tiles(sets[1], centre):
            squared = _squared_distances(rows, columns)
            in_real[column] |= (squared <= real_radii[row, None]).any(0)
            in_generated[row] |= (squared <= generated_radii[None, column]).any(1)
            tile_done()
    return float(in_real.double().mean()), float(in_generated.double().mean())


def _squared_radii(points: Tensor, centre: Tensor, tile_done: Callable[[], None]) -> Tensor:
    """(N,): the squared distance of each point to its k-th nearest neighbour, itself not counted."""
    radii = []
    for row, rows in _tiles(points, centre):
        nearest = torch.full((len(rows), NEIGHBOURS), torch.inf, dtype=torch.float64, device=points.device)
        for column, columns in _tiles(points, centre):
            squared = _squared_distances(rows, columns)
            if row == column:
                squared.fill_diagonal_(torch.inf)
            nearest = torch.cat((nearest, squared), 1).topk(NEIGHBOURS, 1, largest=False).values
            tile_done()
        radii.append(nearest.max(1).values)
    return torch.cat(radii)


def _squared_distances(rows: Tensor, columns: Tensor) -> Tensor:
    norms = rows.square().sum(1)[:, None] + columns.square().sum(1)[None]
    squared = torch.addmm(norms, rows, columns.T, alpha=-2)
    return torch.where(squared > _SAME * norms, squared, 0.0)


def _tiles(points: Tensor, centre: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Which points, and these in float64, centred."""
    for first in range(0, len(points), _TILE):
        part = slice(first, min(first + _TILE, len(points)))
        yield part, points[part].double() - centre
