"""The objective against explicit float64 mathematics, and each switch against what it names."""

from __future__ import annotations

import importlib
import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from ict_fast.config import Config, MethodConfig
from ict_fast.consistency.model import build_seeded_network
from ict_fast.consistency.objective import ConsistencyObjective
from ict_kernels import philox

SCALES = (11, 81)


class Recorder(nn.Module):
    """A stand-in network: a fixed smooth map that remembers its calls."""

    def __init__(self, gain: float = 0.7) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))
        self.calls: list[dict] = []

    def forward(
        self,
        x: Tensor,
        noise: Tensor,
        labels: Tensor | None = None,
        *,
        dropout_seed: Tensor | int | None = None,
        dropout_offset: int = 0,
    ) -> Tensor:
        output = torch.sin(self.gain * x + noise.view(-1, 1, 1, 1))
        self.calls.append(
            {
                "x": x,
                "noise": noise,
                "output": output,
                "grad": torch.is_grad_enabled(),
                "labels": labels,
                "dropout": (dropout_seed, dropout_offset),
            }
        )
        return output


def _images(count: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (count, 8, 8, 1), dtype=torch.uint8, generator=generator)


def _run(method: MethodConfig, scales: int = 81, seed: int = 7, **kwargs: object) -> tuple[Tensor, Recorder]:
    network = Recorder()
    objective = ConsistencyObjective(network, method, c_noise="log", scales=SCALES)
    return objective(_images(), None, num_scales=torch.tensor(scales), seed=seed, **kwargs), network


def _sigma(noise: Tensor) -> Tensor:
    return torch.exp(4 * noise.double())


def _grid(scales: int) -> Tensor:
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    return torch.tensor([(low + i / (scales - 1) * (high - low)) ** 7 for i in range(scales)]).double()


def _float64_loss(network: Recorder, metric: str, weighted: bool, method: MethodConfig) -> Tensor:
    """lambda d(f_student, f_teacher) from what the network saw and said, straight from the equations."""
    teacher, student = network.calls
    data, low = method.sigma_data, method.sigma_min
    images, sigmas = [], []
    for call in (student, teacher):
        s = _sigma(call["noise"]).view(-1, 1, 1, 1)
        x = call["x"].double() * torch.sqrt(s**2 + data**2)
        skip, out = data**2 / ((s - low) ** 2 + data**2), data * (s - low) / torch.sqrt(s**2 + data**2)
        images.append(skip * x + out * call["output"].detach().double())
        sigmas.append(s.flatten())
    difference = (images[0] - images[1]).flatten(1)
    if metric == "pseudo-huber":
        c = 0.00054 * math.sqrt(64) if method.huber_c is None else method.huber_c
        distance = torch.sqrt(difference.square().sum(1) + c**2) - c
    else:
        distance = difference.square().mean(1) if metric == "l2" else difference.abs().mean(1)
    return distance / (sigmas[0] - sigmas[1]) if weighted else distance


@pytest.mark.parametrize("metric", ["pseudo-huber", "l2", "l1"])
@pytest.mark.parametrize("weighting", ["inverse-gap", "uniform"])
def test_loss_equals_the_equation_in_float64(metric: str, weighting: str) -> None:
    method = replace(MethodConfig(), metric=metric, weighting=weighting)
    loss, network = _run(method, scales=11)
    expected = _float64_loss(network, metric, weighting == "inverse-gap", method)
    torch.testing.assert_close(loss.double(), expected, rtol=2e-4, atol=1e-6)


def test_every_number_of_the_method_is_the_equations() -> None:
    """None at its default: levels by the quantiles of the draw, images out of the inputs, the loss."""
    method = replace(
        MethodConfig(),
        p_mean=0.3,
        p_std=0.8,
        sigma_min=0.01,
        sigma_max=20.0,
        rho=3.0,
        sigma_data=0.7,
        huber_c=0.2,
    )
    loss, network = _run(method, scales=81)
    teacher, student = network.calls
    ends = 0.01 ** (1 / 3), 20 ** (1 / 3)
    grid = torch.tensor([(ends[0] + i / 80 * (ends[1] - ends[0])) ** 3 for i in range(81)]).double()
    cdf = torch.special.ndtr((grid.log() - 0.3) / 0.8)
    share = philox.uniform_bits(12, 7, purpose=philox.LEVELS).double() / 2**32
    index = torch.searchsorted((cdf[1:-1] - cdf[0]) / (cdf[-1] - cdf[0]), share, right=True)
    assert len(index.unique()) > 6
    for call, expected in ((teacher, grid[index]), (student, grid[index + 1])):
        torch.testing.assert_close(_sigma(call["noise"]), expected, rtol=1e-5, atol=0)
        s = expected.view(-1, 1, 1, 1)
        noise = philox.normal((12, 1, 8, 8), 7, 0, philox.NOISE).double()
        clean = call["x"].double() * torch.sqrt(s**2 + 0.49) - s * noise
        images = _images().permute(0, 3, 1, 2).double() / 127.5 - 1
        torch.testing.assert_close(clean, images, rtol=0, atol=1e-4)
    torch.testing.assert_close(
        loss.double(), _float64_loss(network, "pseudo-huber", True, method), rtol=1e-3, atol=1e-6
    )


def test_student_is_one_grid_point_above_the_teacher_on_the_same_noise() -> None:
    _, network = _run(MethodConfig(), scales=81)
    teacher, student = network.calls
    grid = _grid(81)
    lower = torch.searchsorted(grid, _sigma(teacher["noise"]) * (1 - 1e-4))
    torch.testing.assert_close(_sigma(teacher["noise"]), grid[lower], rtol=1e-4, atol=0)
    torch.testing.assert_close(_sigma(student["noise"]), grid[lower + 1], rtol=1e-4, atol=0)
    # x + sigma z with the same x and z: the two equations give both back.
    high, low = (_sigma(c["noise"]).view(-1, 1, 1, 1) for c in (student, teacher))
    x_high = student["x"].double() * torch.sqrt(high**2 + 0.25)
    x_low = teacher["x"].double() * torch.sqrt(low**2 + 0.25)
    z = (x_high - x_low) / (high - low)
    clean = (x_low - low * z).permute(0, 2, 3, 1)
    near = (low < 1).flatten()
    assert near.sum() >= 4
    torch.testing.assert_close(clean[near], (_images().double() / 127.5 - 1)[near], rtol=0, atol=2e-3)


def test_the_teacher_gets_no_gradient() -> None:
    loss, network = _run(MethodConfig())
    teacher, student = network.calls
    assert not teacher["grad"]
    assert student["grad"]
    assert loss.requires_grad
    assert not teacher["output"].requires_grad


def test_student_and_teacher_get_the_label_of_each_image() -> None:
    network, labels = Recorder(), torch.arange(12) % 5
    objective = ConsistencyObjective(network, MethodConfig(), c_noise="log", scales=SCALES)
    objective(_images(), labels, num_scales=81, seed=7)
    assert len(network.calls) == 2
    assert all(torch.equal(call["labels"], labels) for call in network.calls)


def test_student_and_teacher_see_the_image_mirrored_where_its_flip_is_set() -> None:
    """As if it had been mirrored before; the noise stays as it is."""
    flip = torch.tensor([0, 1] * 6, dtype=torch.uint8)
    mirrored = torch.where(flip.bool().view(-1, 1, 1, 1), _images().flip(2), _images())
    assert not torch.equal(mirrored, _images())
    shown = []
    for images, given in ((_images(), flip), (mirrored, None)):
        network = Recorder()
        objective = ConsistencyObjective(network, MethodConfig(), c_noise="log", scales=SCALES)
        objective(images, None, num_scales=81, seed=7, flip=given)
        shown.append([call["x"] for call in network.calls])
    assert all(torch.equal(ours, expected) for ours, expected in zip(*shown, strict=True))


def test_student_and_teacher_get_the_same_dropout_seed_and_offset() -> None:
    _, network = _run(MethodConfig(), offset=5)
    assert network.calls[0]["dropout"] == network.calls[1]["dropout"] == (7, 5)


def test_student_and_teacher_share_the_dropout_mask(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    op = importlib.import_module(
        "ict_kernels.group_norm_silu"
    )  # the package hands on a function of that name

    masks: list[Tensor] = []
    draw = op.dropout_keep_mask

    def record(*args: object, **kwargs: object) -> Tensor:
        masks.append(draw(*args, **kwargs))
        return masks[-1]

    monkeypatch.setattr(op, "dropout_keep_mask", record)
    network = build_seeded_network(tiny)
    objective = ConsistencyObjective(network, tiny.method, c_noise="log", scales=SCALES)
    objective(_images(), None, num_scales=11, seed=7).sum().backward()
    half = len(masks) // 2
    assert half >= 3
    assert all(torch.equal(a, b) for a, b in zip(masks[:half], masks[half:], strict=True))
    kept = torch.cat([mask.flatten() for mask in masks[:half]]).float().mean()
    assert float(kept) == pytest.approx(0.8, abs=0.02)
    alike = [pair for pair in itertools.combinations(masks[:half], 2) if pair[0].shape == pair[1].shape]
    assert alike
    assert not any(torch.equal(*pair) for pair in alike)


def test_a_batch_in_parts_has_the_losses_of_the_whole(tiny: Config) -> None:
    network = build_seeded_network(tiny)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05)
    objective = ConsistencyObjective(network, tiny.method, c_noise="log", scales=SCALES)
    images, flip = _images(12), torch.tensor([0, 1] * 6, dtype=torch.uint8)
    whole = objective(images, None, num_scales=11, seed=7, flip=flip)
    parts = [
        objective(images[i : i + 4], None, num_scales=11, seed=7, offset=i, flip=flip[i : i + 4])
        for i in (0, 4, 8)
    ]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-5)


def test_each_switch_changes_exactly_what_it_names() -> None:
    ict = MethodConfig()
    reference_loss, reference = _run(ict)

    def same_inputs(network: Recorder) -> bool:
        return all(
            torch.equal(a[key], b[key])
            for a, b in zip(network.calls, reference.calls, strict=True)
            for key in ("x", "noise")
        )

    for change in ({"metric": "l2"}, {"metric": "l1"}, {"weighting": "uniform"}, {"huber_c": 0.3}):
        loss, network = _run(replace(ict, **change))
        assert same_inputs(network), f"{change} changed the inputs"
        assert not torch.allclose(loss, reference_loss), f"{change} changed nothing"
    loss, network = _run(replace(ict, indices="uniform"))
    assert not same_inputs(network)
    # The weighting's only effect is the factor lambda.
    unweighted, network = _run(replace(ict, weighting="uniform"))
    gaps = _sigma(network.calls[1]["noise"]) - _sigma(network.calls[0]["noise"])
    torch.testing.assert_close(reference_loss.double() * gaps, unweighted.double(), rtol=1e-3, atol=1e-6)


def test_curriculum_dropout_and_teacher_change_nothing_but_what_they_name(tiny: Config) -> None:
    """What the networks are shown at each step, by variant: (x, noise) of every call."""
    from ict_fast.data.loaders import Batch
    from ict_fast.training.step import TrainStep

    images = _images(16)
    batch = Batch(images, torch.zeros(16, dtype=torch.int64), None, 0)

    def shown(config: Config, step: int) -> tuple[list[Tensor], float]:
        seen: list[Tensor] = []
        train_step = TrainStep(config, torch.device("cpu"))
        for network in {train_step.objective.student, train_step.objective.teacher}:
            network.register_forward_pre_hook(lambda _, arguments: seen.extend(arguments[:2]))
        train_step(step, [batch])
        return seen, float(train_step.losses.sum)

    def same(a: list[Tensor], b: list[Tensor]) -> bool:
        return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))

    method = tiny.method
    plain = replace(tiny, network=replace(tiny.network, dropout=0.0))
    reference, loss = shown(plain, step=4)  # the second stage, N = 21
    with_dropout = replace(tiny, network=replace(tiny.network, dropout=0.5))
    ema_teacher = replace(plain, method=replace(method, teacher="ema"))
    fixed_n = replace(plain, method=replace(method, curriculum="fixed", s0=20))
    other_n = replace(plain, method=replace(method, curriculum="fixed", s0=10))
    assert same(shown(with_dropout, 4)[0], reference)
    assert shown(ema_teacher, 4)[1] == loss, "before the first update the EMA teacher is the student"
    assert same(shown(ema_teacher, 4)[0], reference)
    assert same(shown(fixed_n, 4)[0], reference), "N(4) = 21 either way: the curriculum is N(k) and no more"
    assert not same(shown(other_n, 4)[0], reference)


def test_the_ema_teacher_is_the_network_that_answers_for_the_teacher() -> None:
    student, teacher = Recorder(0.7), Recorder(0.2)
    objective = ConsistencyObjective(student, MethodConfig(), c_noise="log", scales=SCALES, teacher=teacher)
    objective(_images(), None, num_scales=11, seed=7)
    assert len(student.calls) == len(teacher.calls) == 1
    assert not teacher.calls[0]["grad"]


def test_an_n_that_the_run_does_not_visit_is_loud() -> None:
    loss, _ = _run(MethodConfig(), scales=12)
    assert torch.isnan(loss).all()
