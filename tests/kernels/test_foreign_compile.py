"""torch.compile(fullgraph=True) of a small trainer in each code base's style, against the same in eager."""

import copy
import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ict_kernels import GroupNormSiLU, SharedDropout, pseudo_huber_loss, sample_noise_levels, seed_dropout
from ict_kernels.adapters import diffusers_cm, hf_trainers, kinyugo, openai_cm
from ict_kernels.adapters.ect import ECMLoss

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
theirs = importlib.import_module("other_trainers")

SEED = torch.tensor([7, 0])  # of the noise levels: an int would be a new graph for each value


def openai(network: nn.Module, images: Tensor, noise: Tensor) -> Tensor:
    denoiser = theirs.KarrasDenoiser()
    losses = openai_cm.consistency_losses(denoiser, network, images, 21, noise=noise, seed=SEED)
    return losses["loss"].mean()


def ect(network: nn.Module, images: Tensor, noise: Tensor) -> Tensor:
    return ECMLoss(c=0.03)(network, images).mean()


def diffusers(network: nn.Module, images: Tensor, noise: Tensor) -> Tensor:
    sigmas = theirs.ascending_grid(11)
    index = kinyugo.lognormal_timestep_distribution(len(images), sigmas, seed=SEED)
    masks = SharedDropout(network, images.device)

    def denoised(sigma: Tensor) -> Tensor:
        c_skip, c_out, c_in = (theirs.spread(each, images) for each in diffusers_cm.precondition(sigma))
        x_t = images + theirs.spread(sigma, images) * noise
        with masks:
            return c_skip * x_t + c_out * network(c_in * x_t, 250 * sigma.log())

    student = denoised(sigmas[index + 1])
    with torch.no_grad():
        teacher = denoised(sigmas[index])
    return diffusers_cm.consistency_loss(student, teacher, theirs.spread(1 / sigmas.diff()[index], images))


def kinyugos(network: nn.Module, images: Tensor, noise: Tensor) -> Tensor:
    sigmas = theirs.ascending_grid(11)
    index = kinyugo.lognormal_timestep_distribution(len(images), sigmas, seed=SEED)
    shared = SharedDropout(network, images.device).around(network)
    student = shared(images + theirs.spread(sigmas[index + 1], images) * noise, sigmas[index + 1])
    with torch.no_grad():
        teacher = shared(images + theirs.spread(sigmas[index], images) * noise, sigmas[index])
    weights = theirs.spread(1 / sigmas.diff()[index], images)
    return (kinyugo.pseudo_huber_loss(student, teacher) * weights).mean()


def hugging_face(network: nn.Module, images: Tensor, noise: Tensor) -> Tensor:
    prediction = network(images + noise, torch.ones(len(images)))
    scheduled = hf_trainers.conditional_loss(prediction, noise, "mean", "huber", 0.1)
    return scheduled + pseudo_huber_loss(prediction, noise, c=0.001, norm="element", reduction="mean")


TRAINERS = [openai, ect, diffusers, kinyugos, hugging_face]


def check(trainer, backend):
    torch._dynamo.reset()
    torch.manual_seed(0)
    network = theirs.Unet(8, 1, dropout=0.2, num_groups=2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    network = theirs.EDMPrecond(network) if trainer is ect else network
    GroupNormSiLU.replace_in(network)
    seed = seed_dropout(network)  # a whole step in one graph cannot rewind generators
    other = copy.deepcopy(network)
    optimizers = [torch.optim.SGD(each.parameters(), lr=1e-4) for each in (network, other)]
    compiled = torch.compile(trainer, fullgraph=True, backend=backend, dynamic=False)
    graphs = None
    for step in range(2):
        images, noise = torch.randn(2, 4, 3, 8, 8).unbind()
        losses = []
        for function, each, optimizer in zip((compiled, trainer), (network, other), optimizers, strict=True):
            torch.manual_seed(step)
            optimizer.zero_grad()
            loss = function(each, images, noise)
            loss.backward()
            losses.append(loss.detach())
            optimizer.step()
        if backend != "inductor" or trainer is not ect:  # Inductor draws ECT's noise by its own generator
            torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-4)
            for a, b in zip(network.parameters(), other.parameters(), strict=True):
                torch.testing.assert_close(
                    a.grad, b.grad, rtol=1e-2, atol=1e-3 * float(b.grad.abs().max()) + 1e-6
                )
        assert losses[0].isfinite()
        seed.advance()
        graphs = graphs or torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


@pytest.mark.parametrize("trainer", TRAINERS, ids=lambda each: each.__name__)
def test_a_trainer_compiles_whole_and_once(trainer):
    check(trainer, "aot_eager")


@pytest.mark.parametrize("dynamic", [None, True])
def test_levels_compile_whole_whatever_becomes_of_their_numbers(dynamic):
    """Of a number that has changed torch.compile makes a symbol, of which there is no table."""
    torch._dynamo.reset()

    def draw(num_scales: int | Tensor, p_mean: float) -> Tensor:
        return sample_noise_levels(64, num_scales, p_mean=p_mean, seed=SEED).sigma

    compiled = torch.compile(draw, fullgraph=True, backend="eager", dynamic=dynamic)
    for arguments in ((11, -1.1), (21, -1.1), (41, -0.9), (torch.tensor(81), -0.9), (11, -1.1)):
        assert torch.equal(compiled(*arguments), draw(*arguments))


@pytest.mark.drill
@pytest.mark.parametrize("trainer", TRAINERS, ids=lambda each: each.__name__)
def test_a_trainer_compiles_with_inductor(trainer):
    check(trainer, "inductor")
