"""Where the consistency function is known: the references are right, and training arrives where it must."""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import sys
from datetime import datetime
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.integrate import solve_ivp
from scipy.optimize import minimize_scalar
from scipy.stats import norm

from ict_fast.config import MethodConfig
from ict_kernels import noise_level_grid

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results"
sys.path.append(str(ROOT / "benchmarks"))

closed_forms: Any = importlib.import_module("closed_forms")
picture: Any = importlib.import_module("closed_forms.picture")
fixed_point: Any = importlib.import_module("closed_forms.fixed_point")
dimensions: Any = importlib.import_module("closed_forms.dimensions")
exactness: Any = importlib.import_module("exactness")
trained: Any = importlib.import_module("closed_forms.learned")

PROBLEMS = closed_forms.PROBLEMS
SIGMA_MIN = 0.002
SHARES = np.array([0.02, 0.1, 0.3, 0.45, 0.7, 0.95])


# --------------------------------------------------------------------------------- the exact functions


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("sigma", [0.3, 5.0, 80.0])
def test_the_exact_function_solves_the_probability_flow_ode(name: str, sigma: float) -> None:
    problem = PROBLEMS[name]
    y = problem.quantile(SHARES, sigma)

    def flow(log_sigma: float, x: np.ndarray) -> np.ndarray:  # dx / d ln s = x - E[x0 | x]
        return x - problem.denoiser(x, math.exp(log_sigma))

    # Far below the distance to the data; from there on every x is scaled as in a Gaussian.
    solved = solve_ivp(
        flow, [math.log(sigma), math.log(SIGMA_MIN)], y, method="DOP853", rtol=1e-9, atol=1e-12
    )
    np.testing.assert_allclose(problem.exact(y, sigma, SIGMA_MIN), solved.y[:, -1], atol=2e-6)
    np.testing.assert_allclose(
        problem.exact(y, sigma, SIGMA_MIN), problem.quantile(SHARES, SIGMA_MIN), atol=1e-9
    )


@pytest.mark.parametrize("name", PROBLEMS)
def test_images_are_drawn_from_the_distribution_whose_quantiles_are_given(name: str) -> None:
    problem = PROBLEMS[name]
    generator = exactness.torch.Generator().manual_seed(0)
    images = problem.images(40_000, generator)
    noisy = (
        (images + 0.5 * exactness.torch.randn(images.shape, generator=generator)).double().flatten(1).numpy()
    )
    position = np.linalg.norm(noisy, axis=1) if problem.values == 2 else noisy[:, 0]
    below = (position[:, None] < problem.quantile(SHARES, 0.5)).mean(axis=0)
    np.testing.assert_allclose(below, SHARES, atol=4 * 0.5 / math.sqrt(40_000))
    assert float(images.double().var(dim=0).mean()) == pytest.approx(problem.std**2, rel=0.03)


# --------------------------------------------------------------------------------- the fixed points


@pytest.mark.parametrize("metric_c", [None, 0.00054])
def test_of_gaussian_data_the_fixed_point_is_the_product_of_cosines(metric_c: float | None) -> None:
    std = PROBLEMS["gaussian"].std
    y = np.array([-120.0, -30.0, 50.0])
    for count in (11, 21):
        (point,) = closed_forms.fixed_points(PROBLEMS["gaussian"], count, [80.0], huber_c=metric_c)
        grid = noise_level_grid(count).numpy()
        ratios = (std**2 + grid[:-1] * grid[1:]) / (std**2 + grid[1:] ** 2)
        np.testing.assert_allclose(point(y), ratios.prod() * y, rtol=1e-7)
        exact = math.sqrt((std**2 + SIGMA_MIN**2) / (std**2 + 80.0**2))
        assert closed_forms.gaussian_fixed_point(count, std) == pytest.approx(
            ratios.prod() / exact, rel=1e-12
        )


def test_of_gaussian_data_the_error_is_first_order_in_the_number_of_levels() -> None:
    std = PROBLEMS["gaussian"].std
    constant = closed_forms.gaussian_leading_constant(std, sigma_min=SIGMA_MIN, sigma_max=80.0, rho=7.0)
    found = [
        (1 - closed_forms.gaussian_fixed_point(count, std)) * (count - 1) for count in (161, 1281, 10241)
    ]
    errors = [abs(each - constant) for each in found]
    assert errors[0] > 7 * errors[1] > 49 * errors[2]
    assert found[2] == pytest.approx(constant, rel=2e-4)


def test_of_two_points_the_fixed_point_is_the_mean_over_all_paths() -> None:
    count, y = 11, np.array([-60.0, -3.0, 5.0, 40.0])
    grid = noise_level_grid(count).numpy()
    expected = []
    for start in y:
        total = 0.0
        for path in product((-0.5, 0.5), repeat=count - 1):  # which point each level's posterior gives
            state, probability = start, 1.0
            for i, x in zip(range(count - 1, 0, -1), path, strict=True):
                probability /= 1 + math.exp(min(-2 * x * state / grid[i] ** 2, 700.0))
                state += (grid[i - 1] - grid[i]) * (state - x) / grid[i]
            total += probability * state
        expected.append(total)
    (point,) = closed_forms.fixed_points(PROBLEMS["two points"], count, [80.0])
    np.testing.assert_allclose(point(y), expected, atol=1e-6)


def evenly(name: str, count: int = 1000) -> np.ndarray:
    """(count, values) images spread evenly over the distribution, by scipy's normal quantiles or by angle."""
    if name == "ring":
        angle = 2 * math.pi * np.arange(count) / count
        return PROBLEMS["ring"].radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    mixture, parts = PROBLEMS[name], []
    for weight, mean, std in zip(mixture.weights, mixture.means, mixture.stds, strict=True):
        size = round(weight * count)
        parts.append(norm.ppf((np.arange(size) + 0.5) / size, mean, std))
    return np.concatenate(parts)[:, None]


@pytest.mark.parametrize("name", ["mixture", "ring"])
def test_the_fixed_point_is_the_mean_end_of_a_random_walk(name: str) -> None:
    """From y, draw x from the posterior, keep its z, go one level down: Monte Carlo, no quadrature."""
    draw, images = np.random.default_rng(0), evenly(name)
    grid = noise_level_grid(11).numpy()[:8]
    start = np.array([0.8 * grid[-1], 0.0][: PROBLEMS[name].values])
    state = np.repeat(start[None], 5000, axis=0)
    for sigma, lower in zip(grid[:0:-1], grid[-2::-1], strict=True):
        distance = ((state[:, None] - images) ** 2).sum(axis=2) / (2 * sigma**2)
        # The largest of Gumbel-perturbed log-probabilities is a draw from them.
        x = images[(draw.gumbel(size=distance.shape) - distance).argmax(axis=1)]
        state = x + lower * (state - x) / sigma
    (point,) = closed_forms.fixed_points(PROBLEMS[name], 11, [float(grid[-1])])
    expected = float(point(np.array([start[0]]))[0])
    assert abs(expected - state[:, 0].mean()) < 4 * state[:, 0].std() / math.sqrt(len(state))
    exact = float(PROBLEMS[name].exact(np.array([start[0]]), grid[-1], SIGMA_MIN)[0])
    assert abs(expected - exact) > 0.02, "at N = 11 it is another function than the exact one"


def test_of_two_points_the_pseudo_huber_limit_is_that_of_the_whole_tree_of_paths() -> None:
    """Without a table, which smears the jump between the points: every path, scipy's minimum at each node."""
    grid, c = noise_level_grid(7).numpy(), 0.00054

    def student(level: int, y: float) -> float:
        if level == 0:
            return y
        weight = 1 / (1 + math.exp(min(y / grid[level] ** 2, 700.0)))  # of the point -0.5
        low, high = (student(level - 1, x + grid[level - 1] * (y - x) / grid[level]) for x in (-0.5, 0.5))

        def loss(m: float) -> float:
            return weight * math.hypot(low - m, c) + (1 - weight) * math.hypot(high - m, c)

        between = sorted((low, high))
        return float(minimize_scalar(loss, bounds=between, method="bounded", options={"xatol": 1e-9}).x)

    (point,) = closed_forms.fixed_points(PROBLEMS["two points"], 7, [80.0], huber_c=c)
    y = np.array([-90.0, -3.0, -0.2, -1e-2, 1e-3, 0.05, 0.4, 30.0])
    np.testing.assert_allclose(point(y), [student(6, each) for each in y], atol=2e-4)
    assert np.abs(point(y) - PROBLEMS["two points"].exact(y, 80.0, SIGMA_MIN)).max() > 0.01, "c is seen"


@pytest.mark.parametrize("metric_c", [None, 0.00054])
def test_the_distance_of_a_fixed_point_is_not_that_of_its_table(
    metric_c: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem, found = PROBLEMS["two points"], []
    y, exact = (problem.quantile(exactness.FINE_SHARES, sigma) for sigma in (2.0, SIGMA_MIN))
    for positions in (401, 1601):
        monkeypatch.setattr(fixed_point, "POSITIONS", positions)
        (point,) = closed_forms.fixed_points(problem, 21, [2.0], huber_c=metric_c)
        at = y if point.sigma == 2.0 else problem.quantile(exactness.FINE_SHARES, point.sigma)
        found.append(exactness.distances((point(at) - exact)[:, None], problem)["rms"])
    assert found[0] == pytest.approx(found[1], abs=2e-4)


def test_of_skewed_data_the_pseudo_huber_limit_follows_the_posteriors_median(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With c far below the noise the target's median counts; f increases, so it is f at the median of x."""
    monkeypatch.setattr(fixed_point, "POSITIONS", 501)
    problem, grid = PROBLEMS["mixture"], noise_level_grid(11).numpy()
    x = np.linspace(-1.6, 1.9, 8001)
    parts = zip(problem.weights, problem.means, problem.stds, strict=True)
    density = sum(weight * norm.pdf(x, mean, std) for weight, mean, std in parts)
    at = state = problem.quantile(SHARES, 80.0)
    for sigma, lower in zip(grid[:0:-1], grid[-2::-1], strict=True):
        below = (density * np.exp(-((state[:, None] - x) ** 2) / (2 * sigma**2))).cumsum(axis=1)
        median = np.array([np.interp(share[-1] / 2, share, x) for share in below])
        state = median + lower * (state - median) / sigma
    (huber,) = closed_forms.fixed_points(problem, 11, [80.0], huber_c=0.00054)
    (squared,) = closed_forms.fixed_points(problem, 11, [80.0])
    np.testing.assert_allclose(huber(at), state, atol=5e-3)
    assert np.abs(squared(at) - state).max() > 0.1, "the conditional mean is another function"


@pytest.mark.parametrize(
    ("name", "figure", "power"),
    [("two points", "rms", -0.25), ("two points", "mean", -0.5), ("ring", "rms", -0.5)],
)
def test_where_the_exact_function_jumps_the_error_falls_more_slowly(
    name: str, figure: str, power: float
) -> None:
    problem, exact = PROBLEMS[name], PROBLEMS[name].quantile(exactness.SHARES, SIGMA_MIN)
    y = problem.quantile(exactness.SHARES, 80.0)
    errors = []
    for count in (21, 81):
        (point,) = closed_forms.fixed_points(problem, count, [80.0])
        errors.append(exactness.distances((point(y) - exact)[:, None], problem)[figure])
    assert math.log(errors[1] / errors[0]) / math.log(81 / 21) == pytest.approx(power, abs=0.04)


# --------------------------------------------------------------------------------- the target, the metric


def test_the_targets_bias_and_variance_of_gaussian_data_are_those_of_the_closed_form() -> None:
    std, y = PROBLEMS["gaussian"].std, np.array([-1.0, 0.0, 2.0])
    upper, lower = 1.1, 0.7

    def slope(sigma: float) -> float:
        return math.sqrt((std**2 + SIGMA_MIN**2) / (std**2 + sigma**2))

    bias, variance = closed_forms.target_statistics(PROBLEMS["gaussian"], y, upper, lower, SIGMA_MIN)
    mean = slope(lower) * (std**2 + lower * upper) / (std**2 + upper**2)
    np.testing.assert_allclose(bias, (mean - slope(upper)) * y, atol=1e-12)
    expected = slope(lower) ** 2 * std**2 * (upper - lower) ** 2 / (std**2 + upper**2)
    np.testing.assert_allclose(variance, expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["mixture", "two points", "ring"])
def test_the_targets_bias_and_variance_are_those_of_weighted_draws(name: str) -> None:
    problem, images = (
        PROBLEMS[name],
        evenly(name, 4000) if name != "two points" else np.array([[-0.5], [0.5]]),
    )
    upper, lower, y = 0.9, 0.6, 0.4
    at = np.array([y, 0.0][: problem.values])
    weight = np.exp(-((at - images) ** 2).sum(axis=1) / (2 * upper**2))
    state = images + lower * (at - images) / upper
    length = np.linalg.norm(state, axis=1) if problem.values == 2 else state[:, 0]
    target = problem.exact(length, lower, SIGMA_MIN)[:, None] * state / length[:, None]
    mean = np.average(target, axis=0, weights=weight)
    variance = np.average(((target - mean) ** 2).sum(axis=1), weights=weight)
    bias, found = closed_forms.target_statistics(problem, np.array([y]), upper, lower, SIGMA_MIN)
    assert bias[0] == pytest.approx(mean[0] - problem.exact(np.array([y]), upper, SIGMA_MIN)[0], abs=2e-4)
    assert found[0] == pytest.approx(variance, rel=2e-3)


@pytest.mark.parametrize("jump", [None, 0.0, 0.3, 0.5])
def test_clustered_shares_integrate_over_all_shares(jump: float | None) -> None:
    share, weight = exactness.clustered_shares(jump, 100)
    assert np.all((share > 0) & (share < 1))
    for power in (0, 1, 2):
        assert weight @ share**power == pytest.approx(1 / (power + 1), abs=2e-4)


def test_between_two_points_the_targets_noise_falls_with_the_root_of_the_share_that_reaches_the_jump() -> (
    None
):
    coarse, fine = (exactness.target_figures("two points", count)[2] for count in (81, 1281))
    assert coarse["near"] == fine["near"] == 0.8
    ratio = (coarse["sigma"] / fine["sigma"], coarse["std"] / fine["std"])
    assert ratio[0] == pytest.approx(1, abs=0.1)
    assert ratio[1] == pytest.approx(4, rel=0.15), "sixteen times the levels"


def test_the_pseudo_huber_centre_is_the_minimum_that_scipy_finds() -> None:
    draw = np.random.default_rng(1)
    along, across, weight = draw.normal(size=(3, 20)) ** 2, draw.random((3, 20)), draw.dirichlet([1] * 20, 3)
    centre = closed_forms.Targets(along, across, weight).pseudo_huber_centre(0.01)
    for row in range(3):

        def loss(m: float, row: int = row) -> float:
            distance = np.sqrt((along[row] - m) ** 2 + across[row] ** 2 + 0.01**2)
            return float((weight[row] * distance).sum())

        assert centre[row] == pytest.approx(minimize_scalar(loss, (0, 1), tol=1e-10).x, abs=1e-4)


def test_over_many_values_the_pseudo_huber_centre_is_nearly_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dimensions, "_NUMBERS", 1 << 20)
    offsets = [
        dimensions.pseudo_huber_offset(PROBLEMS["mixture"], values, 161, seed=0)["offset"]
        for values in (16, 64)
    ]
    assert offsets[0] / offsets[1] == pytest.approx(4, rel=0.2), "as 1/d"


# --------------------------------------------------------------------------------- what is learned


@pytest.mark.parametrize("name", ["mixture", "ring"])
def test_training_arrives_at_the_fixed_point_and_not_at_the_denoiser(name: str) -> None:
    method = MethodConfig(metric="l2", curriculum="fixed", s0=10, s1=10)
    training = trained.Training(steps=1200, batch_size=256)
    network = trained.learn(PROBLEMS[name], method, training, seed=0)
    levels, _ = exactness.learned_errors(network, name, method)
    middle = [level for level in levels if 0.5 < level["sigma"] < 5]
    assert middle
    for level in middle:
        assert level["to_fixed_point"] < 0.1
        assert level["to_exact"] > 2 * level["to_fixed_point"]
        assert level["to_denoiser"] > 2 * level["to_fixed_point"]


# --------------------------------------------------------------------------------- the report


def test_the_command_writes_a_report_makes_page_and_picture_of_it_alone_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(exactness, "limits", cache(exactness.limits.__wrapped__))  # coarse ones of its own
    monkeypatch.setattr(fixed_point, "POSITIONS", 301)
    monkeypatch.setattr(fixed_point, "_NODES_OF_CENTRE", 24)
    monkeypatch.setattr(exactness, "SCALES", (11, 21))
    monkeypatch.setattr(exactness, "HUBER_SCALES", (11, 21))
    monkeypatch.setattr(exactness, "DIMENSIONS", (1, 4))
    monkeypatch.setattr(dimensions, "_NUMBERS", 1 << 14)
    monkeypatch.setattr(exactness, "TARGET_LEVELS", (0.2, 0.8, 3.0))
    monkeypatch.setattr(exactness, "SHARES", exactness.SHARES[5::10])
    monkeypatch.setattr(exactness, "QUICK_STEPS", 10)
    plotted: list[dict[str, Any]] = []

    def plot(report: dict[str, Any], path: Path) -> None:
        plotted.append(json.loads(json.dumps(report)))
        Image.new("L", (4, 4)).save(path)

    monkeypatch.setattr(exactness, "plot", plot)
    words = ["--quick", "--seeds", "3", "--out", str(tmp_path)]
    assert exactness.main(words) == 0
    written = (tmp_path / "exactness-quick.json").read_bytes()
    report = json.loads(written)
    assert plotted == [report]
    with Image.open(tmp_path / "exactness-quick.png") as drawn:
        assert drawn.info["source-sha256"] == hashlib.sha256(written).hexdigest()
    assert report["command"] == "python benchmarks/exactness.py --quick --seeds 3"
    assert datetime.fromisoformat(report["date"]).tzinfo is not None
    assert capsys.readouterr().out.strip() == exactness.section(report).strip()
    assert len(report["learned"]) == 2 * len(PROBLEMS)
    picture.plot(report, tmp_path / "exactness.png")
    assert (tmp_path / "exactness.png").stat().st_size > 20_000

    # A run that was interrupted goes on: what is there stays, what is missing is measured.
    removed = report["learned"].pop(2)
    report["targets"][0]["levels"][0]["bias"] = 42.0
    (tmp_path / "exactness-quick.json").write_text(json.dumps(report))
    assert exactness.main(words) == 0
    again = json.loads((tmp_path / "exactness-quick.json").read_text())
    assert again["learned"][2] == removed, "measured again, to the last bit, in its place"
    assert again["targets"][0]["levels"][0]["bias"] == 42.0

    # Of another table of positions nothing is taken over.
    monkeypatch.setattr(fixed_point, "POSITIONS", 201)
    monkeypatch.setattr(exactness, "measure", lambda report, *rest: plotted.append(report))
    with pytest.raises(IndexError):  # there is nothing to describe
        exactness.main(words)
    assert plotted[-1]["fixed_points"] == []


@pytest.fixture
def committed() -> dict[str, Any]:
    report: dict[str, Any] = json.loads((RESULTS / "exactness.json").read_text())
    return report


def test_the_page_says_who_wins_between_curriculum_and_fixed_n(committed: dict[str, Any]) -> None:
    """The verdict is counted from the records of the same seeds and the same N."""
    nothing, helps = "brings nothing", "curriculum helps"
    records = [
        record
        for record in committed["learned"]
        if (record["metric"], record["num_scales"]) == ("l2", exactness.LAST_SCALES)
    ]
    for better, word, other in (("doubling", helps, nothing), ("fixed", nothing, helps)):
        for record in records:
            for level in record["levels"]:
                level["to_exact"] = 0.1 if record["curriculum"] == better else 0.2
        text = exactness.section(committed)
        count = len(PROBLEMS) if better == "doubling" else 0
        assert f"{count} of {len(PROBLEMS)} at sigma 80" in text
        assert word in text
        assert other not in text
    committed["learned"] = [record for record in committed["learned"] if record["curriculum"] == "doubling"]
    text = exactness.section(committed)
    assert all(word not in text for word in (nothing, helps)), "without the other side there is no verdict"


def test_the_page_prints_the_command_date_and_factors_of_its_report(committed: dict[str, Any]) -> None:
    committed |= {
        "command": "python benchmarks/exactness.py --seeds 7",
        "seeds": [7],
        "date": "2031-02-03T04:05",
    }
    for record, offset in zip(committed["dimensions"], (0.8, 0.4, 0.1, 0.02, 0.005), strict=True):
        record["offset"] = offset
    text = exactness.section(committed)
    assert "`python benchmarks/exactness.py --seeds 7` (2031-02-03;" in text
    assert "; seed 7)" in text
    assert "by factors of 2.0, 4.0, 5.0, 4.0 from" in text


def test_the_committed_report_has_every_problem_and_its_picture(committed: dict[str, Any]) -> None:
    text = exactness.section(committed)
    for name in PROBLEMS:
        assert f"| {name}, root mean square |" in text
        assert f"| {name} | l2 | doubling, N = {exactness.LAST_SCALES} |" in text
    assert [record["num_scales"] for record in committed["fixed_points"][:8]] == list(exactness.SCALES)
    assert committed["command"] == exactness.command(False, committed["seeds"])
    assert sorted({record["seed"] for record in committed["learned"]}) == committed["seeds"]
    assert json.loads(json.dumps(exactness.head(False)))["table"] == committed["table"]
    assert 20_000 < (RESULTS / "exactness.png").stat().st_size < 200_000
    with Image.open(RESULTS / "exactness.png") as drawn:
        of = hashlib.sha256((RESULTS / "exactness.json").read_bytes()).hexdigest()
        assert drawn.info["source-sha256"] == of
