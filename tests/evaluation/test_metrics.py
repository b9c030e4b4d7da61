"""Kernel distance and Inception score against their formulas, and the sets that distances are read by."""

import itertools
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from ict_fast.evaluation import metrics
from ict_fast.evaluation.metrics import gaussian_images, halves, inception_score, kernel_distance


def test_the_kernel_distance_is_its_formula():
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(40, 6)), generator.normal(0.3, 1, size=(40, 6))

    def k(a, b):
        return (a @ b / 6 + 1) ** 3

    within = [
        np.mean([k(a, b) for a, b in itertools.permutations(points, 2)])  # a point is never beside itself
        for points in (x, y)
    ]
    between = np.mean([k(a, b) for a in x for b in y])
    mean, deviation = kernel_distance(x, y)
    assert mean == pytest.approx(sum(within) - 2 * between, rel=1e-10)
    assert deviation == pytest.approx(0, abs=1e-12)  # every subset is the whole set


def test_the_kernel_distance_is_unbiased():
    """Over draws from one distribution its mean is zero within the error of that mean, at any sample size."""
    generator = np.random.default_rng(1)
    for size in (10, 40):
        values = np.array(
            [
                kernel_distance(generator.normal(size=(size, 3)), generator.normal(size=(size, 3)))[0]
                for _ in range(100)
            ]
        )
        error = values.std() / np.sqrt(len(values))
        assert abs(values.mean()) < 3 * error
        assert values.min() < -error  # not a distance cut off at zero


def test_the_kernel_distance_is_over_100_subsets_of_1000(monkeypatch, few_subsets):
    from torchmetrics.image import kid

    monkeypatch.setattr(metrics, "_KERNEL_SUBSETS", few_subsets)
    sizes = []

    def distance(x, y, *_):
        sizes.append((len(x), len(y)))
        return torch.tensor(float(len(sizes)))

    monkeypatch.setattr(kid, "poly_mmd", distance)  # of its kernel other tests say what it is
    mean, deviation = kernel_distance(np.zeros((1500, 2)), np.zeros((1200, 2)))
    assert sizes == [(1000, 1000)] * 100
    assert (mean, deviation) == pytest.approx((np.mean(range(1, 101)), np.std(range(1, 101))))


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_the_kernel_distance_is_torchmetrics_to_the_last_bit(few_subsets, kind):
    from torchmetrics.image.kid import KernelInceptionDistance

    generator = np.random.default_rng(6)
    x, y = (generator.normal(mean, 1, size=(1200, 40)).astype(kind) for mean in (0, 0.1))
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(metrics._SHUFFLING_SEED)
        metric = KernelInceptionDistance(nn.Identity(), subsets=metrics._KERNEL_SUBSETS, subset_size=1000)
        for features, real in ((x, True), (y[:1100], False)):
            metric.update(torch.from_numpy(features).double(), real=real)
        expected = tuple(map(float, metric.compute()))
    assert kernel_distance(x, y[:1100]) == expected


def test_the_kernel_distance_takes_no_copy_of_all_features(monkeypatch):
    """At any time there are the subsets of each set in float64, of 1,000 features."""
    from torchmetrics.image import kid

    sizes = []
    double = torch.Tensor.double
    monkeypatch.setattr(torch.Tensor, "double", lambda tensor: sizes.append(len(tensor)) or double(tensor))
    monkeypatch.setattr(kid, "poly_mmd", lambda *_: torch.tensor(0.0))
    kernel_distance(np.zeros((1500, 2), np.float32), np.zeros((1200, 2), np.float32))
    assert set(sizes) == {1000}


def test_the_kernel_distance_tells_distributions_apart():
    generator = np.random.default_rng(2)
    x, same, other = (generator.normal(mean, 1, size=(400, 8)) for mean in (0, 0, 0.5))
    mean, deviation = kernel_distance(x, other)
    assert mean > 5 * deviation > 0
    assert abs(kernel_distance(x, same)[0]) < 0.02 * mean


def test_the_inception_score_of_sure_and_balanced_classes_is_their_number():
    for classes in (2, 10):
        sure = np.eye(classes, dtype=np.float32)[np.arange(2000) % classes]
        score, deviation = inception_score(sure)
        # Within each of ten random parts the classes are not quite balanced.
        assert score == pytest.approx(classes, rel=0.03)
        assert deviation < 0.05 * classes


def test_the_inception_score_is_the_mean_over_ten_parts():
    """Twenty images, each surely of a class of its own: two in each part."""
    assert inception_score(np.eye(20)) == pytest.approx((2, 0))


def test_the_inception_score_of_images_that_say_nothing_is_one():
    assert inception_score(np.full((100, 7), 1 / 7))[0] == pytest.approx(1)
    assert inception_score(np.tile([1.0, 0.0, 0.0], (100, 1)))[0] == pytest.approx(1)


def test_the_inception_score_is_its_formula():
    """Each of ten parts holds the same rows, so that the shuffling changes nothing but their number."""
    row = np.random.default_rng(3).dirichlet(np.ones(4), size=1)
    other = np.random.default_rng(4).dirichlet(np.ones(4), size=1)
    score = inception_score(np.concatenate((row.repeat(3000, 0), other.repeat(3000, 0))))[0]
    mean = (row + other)[0] / 2
    divergence = sum(float((p * np.log(p / mean)).sum()) for p in (row[0], other[0])) / 2
    assert score == pytest.approx(np.exp(divergence), rel=2e-3)


def test_both_are_the_same_at_every_call_and_leave_the_global_generator_alone():
    generator = np.random.default_rng(5)
    x, y = generator.normal(size=(2, 300, 4))
    classes = generator.dirichlet(np.ones(3), size=500)
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    first = kernel_distance(x, y), inception_score(classes)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(1)
    assert (kernel_distance(x, y), inception_score(classes)) == first


def test_gaussian_images_have_the_pixels_mean_and_covariance():
    pixels = np.random.default_rng(0).multivariate_normal([100, 140], [[200, 120], [120, 300]], 20_000)
    images = pixels.round().astype(np.uint8).reshape(-1, 1, 2, 1)
    drawn = gaussian_images(images, 100_000).reshape(-1, 2).astype(float)
    assert drawn.mean(0) == pytest.approx(images.reshape(-1, 2).mean(0), abs=0.3)
    assert np.cov(drawn.T) == pytest.approx(np.cov(images.reshape(-1, 2).T), rel=0.03)


def test_halves_are_disjoint_and_whole():
    first, second = halves(np.arange(11))
    assert (len(first), len(second)) == (5, 6)
    assert sorted([*first, *second]) == list(range(11))


def test_the_metrics_need_neither_torchvision_nor_torch_fidelity():
    code = (
        "import sys; sys.modules.update(torchvision=None, torch_fidelity=None)\n"
        "import numpy as np\n"
        "from ict_fast.evaluation.metrics import inception_score, kernel_distance\n"
        "kernel_distance(np.ones((4, 2)), np.ones((4, 2))); inception_score(np.ones((4, 1)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
