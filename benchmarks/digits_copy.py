"""scikit-learn's digits and the features that compare them, for a machine with torch and numpy alone.

digits.npz is written by `python benchmarks/digits_copy.py` where the project is installed: the 1,797 images
and labels that `ict_fast.data.prepare.load_digits` gives, and the weights of
`ict_fast.evaluation.digits_features` in fp32. A test compares both with what they were made from.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
PATH = ROOT / "benchmarks/digits.npz"


@functools.cache
def load() -> dict[str, np.ndarray]:
    """images (1797, 8, 8, 1) uint8; labels (1797,) int64; the classifier's weights by name."""
    with np.load(PATH, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def features(images: Tensor) -> Tensor:
    """What DigitsFeatures gives for uint8 (N, 1, 8, 8): (N, 64) float64."""
    w = {name: torch.from_numpy(value).double() for name, value in load().items() if "." in name}
    x = images.cpu().double() / 127.5 - 1
    x = F.silu(F.conv2d(x, w["conv1.weight"], w["conv1.bias"], padding=1))
    x = F.silu(F.conv2d(x, w["conv2.weight"], w["conv2.bias"], stride=2, padding=1))
    return F.silu(F.linear(x.flatten(1), w["hidden.weight"], w["hidden.bias"]))


def frechet_distance(ours: Tensor, theirs: Tensor) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of two sets of features (Heusel et al. 2017, equation 6).

    The project's evaluation leaves this to torchmetrics, which a bare machine lacks.
    """
    mean = (ours.mean(0) - theirs.mean(0)).square().sum()
    s1, s2 = torch.cov(ours.T), torch.cov(theirs.T)
    roots = torch.linalg.eigvals(s1 @ s2).sqrt().real.sum()
    return max(0.0, float(mean + s1.trace() + s2.trace() - 2 * roots))


def main() -> int:
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
    from ict_fast.data.prepare import load_digits
    from ict_fast.evaluation import digits_features

    images, labels = load_digits()
    weights = {
        name: value.float().numpy()
        for name, value in digits_features().state_dict().items()
        if not name.startswith("classify")
    }
    np.savez_compressed(PATH, images=images, labels=labels.astype(np.uint8), **weights)
    return 0


if __name__ == "__main__":
    sys.exit(main())
