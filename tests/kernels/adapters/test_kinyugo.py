"""Kinyugo/consistency_models: the package and the submodule it takes its names from, restated and patched."""

import math

import pytest
import torch

from ict_kernels import noise_level_grid, noise_level_probabilities
from ict_kernels.adapters import apply_ict_kernels_to_kinyugo, kinyugo

C = 0.00054 * math.sqrt(3 * 8 * 8)


@pytest.fixture
def library(theirs, a_module):
    package = a_module(
        "consistency_models",
        consistency_models=theirs,
        pseudo_huber_loss=theirs.pseudo_huber_loss,
        ImprovedConsistencyTraining=theirs.ImprovedConsistencyTraining,
    )
    return package


def loss_of(library, output):
    """As their README does."""
    return (library.pseudo_huber_loss(output.predicted, output.target) * output.loss_weights).mean()


def test_the_loss_and_its_gradients_are_the_papers_where_theirs_are_per_element(
    library, network, images, exact
):
    output = library.ImprovedConsistencyTraining()(network, images, 0, 100)
    own = loss_of(library, output)
    weights = output.loss_weights.flatten().double()
    torch.testing.assert_close(
        own.double(), (weights * exact.elementwise(output.predicted, output.target, C)).mean()
    )
    with apply_ict_kernels_to_kinyugo(library):
        loss = loss_of(library, output)
    double = output.predicted.detach().double().requires_grad_()
    expected = (weights * exact.huber(double, output.target, C)).mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    (gradient,) = torch.autograd.grad(loss, output.predicted)
    (exact_gradient,) = torch.autograd.grad(expected, double)
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-5, atol=1e-8)
    assert loss > 3 * own


def test_the_result_takes_weights_of_four_dimensions_and_of_one_inside(images):
    weights = torch.linspace(1.0, 3.0, 6)
    plain = kinyugo.pseudo_huber_loss(images, images.flip(0))
    assert plain.shape == (6, 1, 1, 1)
    product = plain * weights.view(6, 1, 1, 1)
    assert product.shape == (6, 1, 1, 1)
    for each in (weights, weights.view(6, 1, 1, 1)):
        torch.testing.assert_close(kinyugo.pseudo_huber_loss(images, images.flip(0), each), product)


def test_student_and_teacher_share_the_dropout_mask_where_theirs_do_not(library, network, images):
    training = library.ImprovedConsistencyTraining()
    training(network, images, 0, 100)
    assert not torch.equal(*network.masks)
    network.masks.clear()
    with apply_ict_kernels_to_kinyugo(library):
        output = training(network, images, 0, 100)
    assert torch.equal(*network.masks)
    assert output.predicted.requires_grad
    assert not output.target.requires_grad


def test_indices_have_the_papers_distribution():
    for levels in (11, 81):
        for sigmas in (noise_level_grid(levels).float(), noise_level_grid(levels).flip(0)):
            drawn = kinyugo.lognormal_timestep_distribution(8000, sigmas, seed=1)
            assert drawn.shape == (8000,)
            assert drawn.dtype == torch.int64
            expected = noise_level_probabilities(levels)
            expected = expected if sigmas[0] < sigmas[-1] else expected.flip(0)
            counts = torch.bincount(drawn, minlength=levels - 1).double()
            chi_squared = float(((counts - 8e3 * expected).square() / (8e3 * expected)).sum())
            freedom = levels - 2
            assert abs(chi_squared - freedom) < 5 * math.sqrt(2 * freedom)


def test_indices_depend_on_seed_and_place_alone():
    sigmas = noise_level_grid(11).float()
    whole = kinyugo.lognormal_timestep_distribution(8, sigmas, seed=7)
    second_half = kinyugo.lognormal_timestep_distribution(4, sigmas, seed=7, offset=4)
    assert torch.equal(whole[4:], second_half)
    torch.manual_seed(1)
    first = kinyugo.lognormal_timestep_distribution(64, sigmas)
    torch.manual_seed(1)
    assert torch.equal(first, kinyugo.lognormal_timestep_distribution(64, sigmas))
    assert not torch.equal(first, kinyugo.lognormal_timestep_distribution(64, sigmas))


def test_the_readmes_mean_of_their_example_is_another_distribution():
    """lognormal_mean = 1.1 there, -1.1 in the paper."""
    sigmas = noise_level_grid(11).float()
    paper, example = (
        sigmas[kinyugo.lognormal_timestep_distribution(8000, sigmas, mean, 2.0, seed=1)].log().mean()
        for mean in (-1.1, 1.1)
    )
    assert example > paper + 1.5  # a median level of 3 instead of 0.33


@pytest.mark.parametrize("shape", [(1,), (3, 4), ()])
def test_sigmas_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"sigmas must have shape \(levels,\)"):
        kinyugo.lognormal_timestep_distribution(4, torch.ones(shape))
    with pytest.raises(ValueError, match="std must be positive, got 0"):
        kinyugo.lognormal_timestep_distribution(4, torch.ones(3), std=0)


def test_the_patch_reaches_package_and_submodule_and_can_be_undone(library, theirs):
    own = theirs.pseudo_huber_loss, theirs.lognormal_timestep_distribution
    undo = apply_ict_kernels_to_kinyugo(library)
    assert len(undo.changed) == 4
    assert library.pseudo_huber_loss is theirs.pseudo_huber_loss is kinyugo.pseudo_huber_loss
    assert apply_ict_kernels_to_kinyugo(library).changed == []
    undo()
    assert (theirs.pseudo_huber_loss, theirs.lognormal_timestep_distribution) == own
    assert library.pseudo_huber_loss is own[0]


def test_another_package_is_refused(a_module):
    with pytest.raises(ValueError, match="'cm' has no pseudo_huber_loss and no ImprovedConsistencyTraining"):
        apply_ict_kernels_to_kinyugo(a_module("cm"))
