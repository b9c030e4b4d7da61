"""Noise levels: the grid, the distribution of indices, the weight, and the draw."""

import functools
import math

import pytest
import torch

from ict_kernels import noise_level_grid, noise_level_probabilities, noise_levels, philox, sample_noise_levels
from ict_kernels.noise_levels import CURRICULUM_SCALES

scipy_special = pytest.importorskip("scipy.special")
scipy_stats = pytest.importorskip("scipy.stats")


@pytest.mark.parametrize("num_scales", [2, 3, 11, 1281])
def test_the_grid_is_the_formula_of_karras_ascending_with_exact_ends(num_scales):
    grid = noise_level_grid(num_scales)
    assert grid.dtype == torch.float64
    assert grid.shape == (num_scales,)
    assert float(grid[0]) == 0.002
    assert float(grid[-1]) == 80.0
    assert (grid.diff() > 0).all()
    ramp = torch.linspace(0, 1, num_scales, dtype=torch.float64)
    expected = (0.002 ** (1 / 7) + ramp * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7
    torch.testing.assert_close(grid, expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("num_scales", [2, 11, 161, 1281])
def test_the_probabilities_are_the_erf_differences_over_the_pairs(num_scales):
    log_sigma = noise_level_grid(num_scales).log().numpy()
    normal = scipy_stats.norm(loc=-1.1, scale=2.0)  # erf differences are normal CDF differences, twice
    expected = torch.from_numpy(normal.cdf(log_sigma[1:]) - normal.cdf(log_sigma[:-1]))
    probabilities = noise_level_probabilities(num_scales)
    assert probabilities.shape == (num_scales - 1,)
    assert float(probabilities.sum()) == pytest.approx(1, abs=1e-14)
    torch.testing.assert_close(probabilities, expected / expected.sum(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("num_scales", [11, 161, 1281])
@pytest.mark.parametrize("indices", ["lognormal", "uniform"])
def test_a_million_draws_follow_the_distribution(num_scales, indices):
    count = 1_000_000
    index = sample_noise_levels(count, num_scales, seed=num_scales, indices=indices).index
    observed = torch.bincount(index, minlength=num_scales - 1).double()
    expected = noise_level_probabilities(num_scales, indices=indices) * count
    assert observed.shape == expected.shape
    statistic = float(((observed - expected) ** 2 / expected).sum())
    assert 1e-4 < scipy_stats.chi2.sf(statistic, num_scales - 2) < 1 - 1e-4


def test_the_teacher_is_at_the_lower_level_and_the_weight_is_the_inverse_gap():
    levels = sample_noise_levels(10_000, 1281, seed=3)
    grid = noise_level_grid(1281)
    assert levels.index.dtype == torch.int64
    assert torch.equal(levels.sigma, grid[levels.index].float())
    assert torch.equal(levels.sigma_next, grid[levels.index + 1].float())
    # Of float64 levels: fp32 ones would lose a fifth decimal of the gap at the low end.
    assert torch.equal(levels.weight, (1 / (grid[levels.index + 1] - grid[levels.index])).float())
    assert {t.dtype for t in levels[1:]} == {torch.float32}
    assert torch.equal(sample_noise_levels(9, 11, seed=3, weighting="uniform").weight, torch.ones(9))


def test_the_weights_of_the_last_stage_span_four_decades():
    gaps = noise_level_grid(1281).diff()
    assert 1 / float(gaps.max()) == pytest.approx(2.9, abs=0.1)
    assert 1 / float(gaps.min()) == pytest.approx(25_585, abs=1)


@pytest.mark.parametrize("num_scales", CURRICULUM_SCALES)
def test_a_tensor_num_scales_draws_what_the_int_draws(num_scales):
    seed = torch.tensor([8, num_scales])
    by_int = sample_noise_levels(1000, num_scales, seed=seed)
    by_tensor = sample_noise_levels(1000, torch.tensor(num_scales), seed=seed)
    for a, b in zip(by_int, by_tensor, strict=True):
        assert torch.equal(a, b)


def test_a_tensor_num_scales_outside_the_table_is_loud():
    levels = sample_noise_levels(5, torch.tensor(12), seed=1)
    assert levels.sigma.isnan().all()
    assert levels.sigma_next.isnan().all()
    assert levels.weight.isnan().all()
    held = sample_noise_levels(5, torch.tensor(12), seed=1, scales=(12, 40))
    assert torch.equal(held.sigma, sample_noise_levels(5, 12, seed=1).sigma)


def test_two_levels_leave_one_pair():
    levels = sample_noise_levels(100, 2, seed=1)
    assert (levels.index == 0).all()
    assert torch.equal(levels.sigma, torch.full((100,), 0.002))
    assert torch.equal(levels.sigma_next, torch.full((100,), 80.0))
    torch.testing.assert_close(levels.weight, torch.full((100,), 1 / 79.998))


def test_a_threshold_word_belongs_to_the_upper_index(monkeypatch):
    cdf = noise_level_probabilities(11).cumsum(0)
    thresholds = [math.floor(2**32 * float(x)) for x in cdf[:-1]]
    words = torch.tensor([0, *thresholds, *(t - 1 for t in thresholds), 2**32 - 1])
    monkeypatch.setattr("ict_kernels.noise_levels.uniform_bits", lambda *args, **kwargs: words)
    expected = [0, *range(1, 10), *range(9), 9]
    assert sample_noise_levels(20, 11, seed=0).index.tolist() == expected


def test_levels_do_not_depend_on_the_micro_batch():
    seed = torch.tensor([4, 5])
    whole = sample_noise_levels(10, 161, seed=seed)
    halves = [sample_noise_levels(5, 161, seed=seed, offset=offset) for offset in (0, torch.tensor(5))]
    for together, *parts in zip(whole, *halves, strict=True):
        assert torch.equal(together, torch.cat(parts))


def test_the_word_is_the_first_of_the_levels_stream():
    word = philox.uniform_bits(1000, 6, purpose=philox.LEVELS)
    uniform = sample_noise_levels(1000, 1281, seed=6, indices="uniform").index
    assert torch.equal(uniform, (word.double() / 2**32 * 1280).floor().long())


def test_an_empty_batch_is_empty():
    assert [tuple(t.shape) for t in sample_noise_levels(0, 11, seed=1)] == [(0,)] * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_scales": 1}, "at least 2"),
        ({"num_scales": 11, "sigma_min": 80.0}, "sigma_min < sigma_max"),
        ({"num_scales": 11, "indices": "normal"}, "indices must be"),
        ({"num_scales": 11, "weighting": "snr"}, "weighting must be"),
        ({"num_scales": 11, "p_std": 0.0}, "p_std must be positive"),
        ({"num_scales": 11, "p_mean": 1e4}, "no level"),
    ],
)
def test_a_value_out_of_range_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        sample_noise_levels(4, seed=0, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sigma_max": math.inf}, "all finite; got sigma_min=0.002, sigma_max=inf, rho=7.0"),
        ({"sigma_max": math.nan}, "sigma_max=nan"),
        ({"sigma_min": math.nan}, "sigma_min=nan"),
        ({"sigma_min": 0.0}, "sigma_min=0.0"),
        ({"rho": 0.0}, "rho=0.0"),
        ({"rho": -7.0}, "rho=-7.0"),
        ({"rho": math.inf}, "rho=inf"),
        ({"rho": 1e-5}, "float64 does not tell apart 11 levels from 0.002 to 80.0 with rho=1e-05"),
        ({"rho": 1e17}, r"float64 does not tell apart .* rho=1e\+17"),
        ({"num_scales": 20.7}, r"must be an int, got 20\.7"),
        ({"num_scales": math.inf}, "must be an int, got inf"),
        ({"num_scales": True}, "must be an int, got True"),
        ({"num_scales": "20"}, "must be an int, got '20'"),
    ],
)
@pytest.mark.parametrize(
    "function", [noise_level_grid, noise_level_probabilities, functools.partial(sample_noise_levels, 4)]
)
def test_a_grid_that_is_none_is_refused_wherever_it_is_asked_for(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(**{"num_scales": 11} | arguments)


def test_a_whole_number_of_scales_may_be_a_float():
    assert torch.equal(noise_level_grid(20.0), noise_level_grid(20))
    assert torch.equal(sample_noise_levels(9, 20.0, seed=1).sigma, sample_noise_levels(9, 20, seed=1).sigma)


@pytest.mark.parametrize("num_scales", [torch.tensor(21.0), torch.tensor(True), torch.tensor([21] * 8)])
def test_a_tensor_num_scales_is_one_integer(num_scales):
    with pytest.raises(ValueError, match="a tensor num_scales is one integer; got torch"):
        sample_noise_levels(4, num_scales, seed=1)


@pytest.mark.parametrize("devices", [("cpu", "meta"), ("meta", "cpu")])
def test_tensors_on_two_devices_are_refused_unless_it_is_said_where_the_levels_go(devices):
    num_scales, seed = (
        torch.tensor(11, device=devices[0]),
        torch.zeros(2, dtype=torch.int64, device=devices[1]),
    )
    message = (
        f"num_scales is on {devices[0]} and seed on {devices[1]}: put them on one device, or give device="
    )
    with pytest.raises(RuntimeError, match=message):
        sample_noise_levels(4, num_scales, seed=seed)
    assert sample_noise_levels(4, num_scales, seed=seed, device="meta").sigma.device.type == "meta"


def test_a_first_call_in_inference_mode_leaves_tables_that_a_compiled_step_can_record(monkeypatch):
    monkeypatch.setattr(noise_levels, "_tables", {})
    with torch.inference_mode():
        first = sample_noise_levels(4, 11, seed=1)
    (table,) = noise_levels._tables.values()
    assert not any(t.is_inference() for t in table)

    def weighted(x):
        levels = sample_noise_levels(4, 11, seed=1)
        return (x * levels.sigma * levels.weight).sum()

    x = torch.ones(4, requires_grad=True)
    torch.compile(weighted, backend="aot_eager", fullgraph=True)(x).backward()
    torch.testing.assert_close(x.grad, (first.sigma * first.weight).clone())


def test_cuda_without_a_number_is_the_table_of_the_current_gpu(monkeypatch):
    class Asked(dict):
        """Has every table, and says which was asked for."""

        def __contains__(self, key):
            return True

        def __getitem__(self, key):
            return key

    monkeypatch.setattr(noise_levels, "_tables", Asked())

    def table_on(name, current):
        monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
        levels = (-1.1, 2.0, 0.002, 80.0, 7.0, "lognormal", "uniform")
        return noise_levels._table((11,), *levels, torch.device(name))

    assert table_on("cuda", 0) == table_on("cuda:0", 0)
    assert table_on("cuda", 1) == table_on("cuda:1", 0) != table_on("cuda", 0)
