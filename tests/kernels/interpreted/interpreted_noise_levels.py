"""The noise-level kernel against the eager definition: every field bit for bit."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from ict_kernels import NoiseLevels, noise_level_grid, sample_noise_levels, set_backend
from ict_kernels.noise_levels import CURRICULUM_SCALES, _sample, _table

# 2^22 words of Philox would seldom meet a threshold; these rows of seeds are only to vary the words.
SEEDS = [torch.tensor([0, 0]), torch.tensor([-3, 2**32 - 1]), torch.tensor([2**63 - 1, 12345])]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every tensor that the op allocates begins as NaN, or as an index that is none."""
    empty = torch.empty

    def poison(*args: object, **options: object) -> Tensor:
        made = empty(*args, **options)
        return made.fill_(torch.nan if made.is_floating_point() else -77)

    monkeypatch.setattr(torch, "empty", poison)
    yield
    set_backend("auto")


def on_both(*arguments: object, **options: object) -> tuple[NoiseLevels, NoiseLevels]:
    set_backend("auto")
    by_kernel = sample_noise_levels(*arguments, **options)
    set_backend("eager")
    return by_kernel, sample_noise_levels(*arguments, **options)


def assert_same(by_kernel: NoiseLevels, defined: NoiseLevels) -> None:
    for name, a, b in zip(NoiseLevels._fields, by_kernel, defined, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert torch.equal(a, b) or (a.isnan() & b.isnan()).all(), name


@pytest.mark.parametrize("seed", SEEDS, ids=str)
@pytest.mark.parametrize("num_scales", CURRICULUM_SCALES)
def test_every_stage_of_the_curriculum(num_scales, seed) -> None:
    assert_same(*on_both(333, torch.tensor(num_scales), seed=seed, offset=5))
    assert_same(*on_both(333, num_scales, seed=seed, offset=5))


@pytest.mark.parametrize("num_scales", [2, 3, 4, 5, 6, 7, 17, 18, 64, 65, 66, 67, 257, 1024, 1026, 5000])
@pytest.mark.parametrize("indices", ["lognormal", "uniform"])
def test_every_size_of_table(num_scales, indices) -> None:
    by_kernel, defined = on_both(500, num_scales, seed=num_scales, indices=indices)
    assert_same(by_kernel, defined)
    assert int(by_kernel.index.max()) <= num_scales - 2


@pytest.mark.parametrize("batch", [0, 1, 2, 31, 32, 33, 100])
def test_every_size_of_batch(batch) -> None:
    assert_same(*on_both(batch, torch.tensor(161), seed=7))


@pytest.mark.parametrize(
    "options",
    [
        {"weighting": "uniform"},
        {"p_mean": 0.4, "p_std": 0.7},
        {"p_mean": -6.0, "p_std": 0.05},  # nearly all thresholds are 0 or 2^32
        {"sigma_min": 0.01, "sigma_max": 50.0, "rho": 3.0},
        {"scales": (12, 40, 11, 41, 7), "indices": "uniform"},
        {"scales": (41,)},
    ],
)
def test_other_distributions_grids_and_curricula(options) -> None:
    assert_same(*on_both(200, torch.tensor(41), **{"seed": 3, "scales": CURRICULUM_SCALES, **options}))


def test_a_threshold_word_belongs_to_the_upper_index() -> None:
    """Thresholds made from the very words that are drawn: equality goes up."""
    seed, count = torch.tensor([5, 6]), 96
    table = _table((99,), -1.1, 2.0, 0.002, 80.0, 7.0, "lognormal", "inverse-gap", torch.device("cpu"))
    from ict_kernels.philox import uniform_bits

    words = uniform_bits(count, seed)
    for shift in (-1, 0, 1):
        thresholds = torch.cat((torch.zeros(1, dtype=torch.int64), words.sort().values + shift))[None]
        index, *_ = _sample(
            None, table.num_scales, thresholds, table.sigma, table.weight, seed, None, count, 0
        )
        assert torch.equal(index, (thresholds <= words[:, None]).sum(1))


def test_a_tensor_num_scales_outside_the_table_is_loud() -> None:
    by_kernel, defined = on_both(5, torch.tensor(12), seed=1)
    assert_same(by_kernel, defined)
    assert (by_kernel.index == 0).all()
    assert all(t.isnan().all() for t in by_kernel[1:])


def test_levels_do_not_depend_on_the_micro_batch() -> None:
    seed = torch.tensor([4, 5])
    whole = sample_noise_levels(100, 161, seed=seed, offset=2**32 - 50)
    parts = [
        sample_noise_levels(30, 161, seed=seed, offset=2**32 - 50),
        sample_noise_levels(70, 161, seed=seed, offset=torch.tensor(2**32 - 20)),
    ]
    for together, *pieces in zip(whole, *parts, strict=True):
        assert torch.equal(together, torch.cat(pieces))
    assert_same(*on_both(100, 161, seed=seed, offset=torch.tensor(2**32 - 50)))


def test_no_seed_follows_torch_manual_seed() -> None:
    drawn = []
    for backend in ("auto", "eager"):
        set_backend(backend)
        torch.manual_seed(1)
        drawn.append(sample_noise_levels(64, torch.tensor(1281)))
    assert_same(*drawn)


def test_the_levels_are_those_of_the_grid() -> None:
    levels = sample_noise_levels(1000, 1281, seed=3)
    grid = noise_level_grid(1281)
    assert torch.equal(levels.sigma, grid[levels.index].float())
    assert torch.equal(levels.sigma_next, grid[levels.index + 1].float())
    assert torch.equal(levels.weight, (1 / grid.diff())[levels.index].float())


@pytest.mark.parametrize("by_tensor", [True, False])
def test_opcheck(by_tensor) -> None:
    scales = (11, 41) if by_tensor else (41,)
    table = _table(scales, -1.1, 2.0, 0.002, 80.0, 7.0, "lognormal", "inverse-gap", torch.device("cpu"))
    num_scales, offset = (torch.tensor(41), torch.tensor(3)) if by_tensor else (None, None)
    torch.library.opcheck(_sample, (num_scales, *table, torch.tensor([1, 2]), offset, 37, 4))


def test_a_new_stage_is_the_same_graph() -> None:
    def draw(num_scales: Tensor, seed: Tensor, offset: Tensor) -> NoiseLevels:
        return sample_noise_levels(24, num_scales, seed=seed, offset=offset)

    compiled = torch.compile(draw, fullgraph=True, backend="aot_eager")
    graphs = None
    for num_scales in CURRICULUM_SCALES:
        arguments = (torch.tensor(num_scales), torch.tensor([3, num_scales]), torch.tensor(7))
        assert_same(compiled(*arguments), draw(*arguments))
        counted = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        graphs = counted if graphs is None else graphs
        assert counted == graphs
