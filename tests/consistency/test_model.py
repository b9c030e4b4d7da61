"""The consistency function's boundary condition and preconditioning."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ict_fast.checkpoint import write_checkpoint
from ict_fast.config import Config, to_dict
from ict_fast.consistency.model import ConsistencyModel, build_seeded_network, load_model, noise_condition
from ict_fast.errors import InputError


def _awake(model: ConsistencyModel) -> ConsistencyModel:
    """Random weights everywhere: fresh networks have zeros at their ends."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def test_a_foreign_caution_is_shown_and_not_obeyed(
    tiny: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = {"ema": ConsistencyModel(tiny).network.state_dict()}
    for step, caution in enumerate(("ev\x1b[31mil", ["\x1b[31m"])):
        state = {"config": to_dict(tiny), "imported": {"caution": caution}}
        write_checkpoint(tmp_path, step, tensors, state, keep=2)
        load_model(tmp_path)
    assert capsys.readouterr().err == f"warning: {tmp_path} is ev\\x1b[31mil\n"


def test_a_gpu_that_is_not_there_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="device is cuda:99, but torch sees"):
        load_model(tmp_path, device="cuda:99")


def test_f_at_sigma_min_is_the_identity_to_the_last_bit(tiny: Config) -> None:
    model = _awake(ConsistencyModel(tiny))
    x = 3 * torch.randn(16, 1, 8, 8)
    assert torch.equal(model(x, tiny.method.sigma_min), x)
    assert not torch.equal(model(x, 2 * tiny.method.sigma_min), x)


@pytest.mark.parametrize(("data", "low"), [(0.5, 0.002), (0.7, 0.001)])
def test_forward_equals_the_equation_in_float64(tiny: Config, data: float, low: float) -> None:
    config = replace(tiny, method=replace(tiny.method, sigma_data=data, sigma_min=low))
    model = _awake(ConsistencyModel(config))
    x = torch.randn(5, 1, 8, 8)
    sigma = torch.tensor([0.002, 0.1, 0.821, 5.0, 80.0])
    seen = {}

    def record(module: torch.nn.Module, arguments: tuple, output: torch.Tensor) -> None:
        seen.update(input=arguments[0], noise=arguments[1], output=output)

    model.network.register_forward_hook(record)
    denoised = model(x, sigma)
    for i, s in enumerate(sigma.double().tolist()):
        c_in = 1 / math.sqrt(s**2 + data**2)
        c_skip = data**2 / ((s - low) ** 2 + data**2)
        c_out = data * (s - low) / math.sqrt(s**2 + data**2)
        torch.testing.assert_close(seen["input"][i].double(), c_in * x[i].double(), rtol=1e-6, atol=1e-7)
        assert float(seen["noise"][i]) == pytest.approx(math.log(s) / 4, rel=1e-6)
        expected = c_skip * x[i].double() + c_out * seen["output"][i].double()
        torch.testing.assert_close(denoised[i].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("labels", [torch.tensor([3, 20]), torch.tensor([-1, 3]), torch.tensor([3, 1.9])])
def test_labels_of_no_class_are_refused(tiny: Config, labels: torch.Tensor) -> None:
    """NCSN++, which looks for each class among the labels, would leave an unknown one out."""
    model = ConsistencyModel(replace(tiny, network=replace(tiny.network, num_classes=10)))
    with pytest.raises(InputError, match=r"labels must lie in|must be whole numbers"):
        model(torch.randn(2, 1, 8, 8), 1.0, labels)
    assert model(torch.randn(2, 1, 8, 8), 1.0, labels.long().clamp(0, 9)).shape == (2, 1, 8, 8)


def test_adm_noise_condition_is_openais() -> None:
    sigma = torch.tensor([0.002, 1.0, 80.0])
    expected = [250 * math.log(0.002), 0.0, 250 * math.log(80.0)]
    assert noise_condition(sigma, "adm-openai").tolist() == pytest.approx(expected, rel=1e-6)


def test_the_seed_alone_decides_the_initial_weights(tiny: Config) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = build_seeded_network(tiny).state_dict()
    assert torch.equal(torch.random.get_rng_state(), before), "the ambient generator was disturbed"
    torch.manual_seed(6)
    second = build_seeded_network(tiny).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = build_seeded_network(replace(tiny, training=replace(tiny.training, seed=1))).state_dict()
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_the_boundary_may_lie_at_0_as_in_edm(tiny: Config) -> None:
    config = replace(tiny, method=replace(tiny.method, boundary_sigma=0.0))
    model, shifted = (_awake(ConsistencyModel(which)) for which in (config, tiny))
    x = torch.randn(4, 1, 8, 8)
    output = model.network(x / math.sqrt(0.821**2 + 0.25), torch.full((4,), math.log(0.821) / 4))
    skip, out = 0.25 / (0.821**2 + 0.25), 0.5 * 0.821 / math.sqrt(0.821**2 + 0.25)
    torch.testing.assert_close(model(x, 0.821), skip * x + out * output, atol=1e-6, rtol=1e-5)
    assert not torch.equal(model(x, 0.821), shifted(x, 0.821))
    assert not torch.equal(model(x, tiny.method.sigma_min), x)


def test_training_and_sampling_have_the_same_boundary(tiny: Config) -> None:
    """The loss, from raw outputs, against f itself at a boundary of 0."""
    from ict_fast.consistency.objective import ConsistencyObjective
    from ict_kernels import sample_noise_levels
    from ict_kernels.philox import NOISE, normal

    config = replace(tiny, method=replace(tiny.method, boundary_sigma=0.0, metric="l2"))
    model = _awake(ConsistencyModel(config))
    objective = ConsistencyObjective(
        model.network, config.method, c_noise=config.network.c_noise, scales=[11]
    )
    images = torch.rand(6, 1, 8, 8) * 2 - 1
    loss = objective(images, None, num_scales=11, seed=3)
    levels = sample_noise_levels(6, 11, seed=3, scales=(11,))
    noise = normal((6, 1, 8, 8), 3, 0, NOISE, device="cpu")
    seed = {"dropout_seed": 3}

    def f(sigma: torch.Tensor) -> torch.Tensor:
        s = sigma.view(-1, 1, 1, 1)
        x = images + s * noise
        output = model.network(x / (s**2 + 0.25).sqrt(), sigma.log() / 4, None, **seed)
        return 0.25 / (s**2 + 0.25) * x + 0.5 * s / (s**2 + 0.25).sqrt() * output

    expected = levels.weight * (f(levels.sigma_next) - f(levels.sigma)).square().flatten(1).mean(1)
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=2e-5)
