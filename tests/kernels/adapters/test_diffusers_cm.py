"""diffusers' research script: the preconditioning and the loss it should have."""

import math

import pytest
import torch

from ict_kernels import noise_level_grid
from ict_kernels.adapters import apply_ict_kernels_to_diffusers_cm, diffusers_cm

C = 0.00054 * math.sqrt(3 * 8 * 8)


def test_the_preconditioning_is_the_formula_in_float64():
    sigma = noise_level_grid(41)
    c_skip, c_out, c_in = diffusers_cm.precondition(sigma.float())
    torch.testing.assert_close(c_skip.double(), 0.25 / ((sigma - 0.002) ** 2 + 0.25), rtol=1e-6, atol=0)
    exact_out = 0.5 * (sigma - 0.002) / (sigma**2 + 0.25).sqrt()
    torch.testing.assert_close(c_out.double(), exact_out, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(c_in.double(), (sigma**2 + 0.25) ** -0.5, rtol=1e-6, atol=0)
    assert (float(c_skip[0]), float(c_out[0])) == (1.0, 0.0)


def test_the_preconditioning_is_that_of_the_pipeline_that_samples():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.CMStochasticIterativeScheduler()
    for sigma in noise_level_grid(11).float():
        ours = diffusers_cm.precondition(sigma)
        torch.testing.assert_close(ours[:2], scheduler.get_scalings_for_boundary_condition(sigma))


def test_the_scripts_own_preconditioning_is_wrong_in_three_ways(theirs):
    sigma = torch.tensor([0.002, 0.5, 80.0])
    _, c_out, c_in = diffusers_cm.precondition(sigma)
    own_skip, own_out = theirs.scalings_for_boundary_conditions(sigma)
    own_in = theirs.get_input_preconditioning(sigma)
    torch.testing.assert_close(own_in, c_in**2)  # no square root
    assert float(own_out[2] / c_out[2]) == pytest.approx(2.0, rel=1e-3)  # no sigma_data
    assert own_skip[0] < 1.0  # f(x, sigma_min) is not x,
    assert own_out[0] > 0.0  # and F is in it
    unit = torch.randn(20_000, generator=torch.Generator().manual_seed(0)) * (sigma[1] ** 2 + 0.25).sqrt()
    assert float((c_in[1] * unit).var()) == pytest.approx(1.0, rel=0.05)
    assert float((own_in[1] * unit).var()) == pytest.approx(2.0, rel=0.05)


def test_the_loss_and_its_gradient_are_the_papers(images, exact):
    student, teacher = images.clone().requires_grad_(), images.flip(0).requires_grad_()
    weight = torch.linspace(0.5, 40.0, 6)
    for lambda_t in (weight, weight.view(6, 1, 1, 1)):
        loss = diffusers_cm.consistency_loss(student, teacher, lambda_t)
        assert loss.shape == ()
        double = student.detach().double().requires_grad_()
        expected = (weight * exact.huber(double, teacher, C)).mean()
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
        (gradient,) = torch.autograd.grad(loss, student)
        (exact_gradient,) = torch.autograd.grad(expected, double)
        torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-5, atol=1e-8)
    assert teacher.grad is None


def test_the_scripts_own_loss_is_per_element(theirs, images, exact):
    weight = torch.linspace(0.5, 40.0, 6)
    own = theirs.diffusers_loss(images, images.flip(0), weight.view(6, 1, 1, 1), C)
    torch.testing.assert_close(own.double(), (weight * exact.elementwise(images, images.flip(0), C)).mean())
    assert diffusers_cm.consistency_loss(images, images.flip(0), weight, huber_c=C) > 5 * own


def test_a_flattened_weight_matrix_is_refused(images):
    with pytest.raises(ValueError, match=r"weight must have shape \(6,\) or \(6, 1, 1, 1\), got \(1, 6\)"):
        diffusers_cm.consistency_loss(images, images, torch.ones(1, 6))


def test_the_patch_replaces_both_functions(theirs):
    original = theirs.get_input_preconditioning
    sigma = torch.tensor([0.3])
    with apply_ict_kernels_to_diffusers_cm(theirs) as patch:
        assert len(patch.changed) == 2
        torch.testing.assert_close(theirs.get_input_preconditioning(sigma), (sigma**2 + 0.25) ** -0.5)
        # the script calls append_dims on what it gets, which fails on its own 1
        assert theirs.get_input_preconditioning(sigma, input_precond_type="none").shape == (1,)
        assert theirs.scalings_for_boundary_conditions(torch.tensor([0.002]))[1] == 0
        with pytest.raises(ValueError, match="must be 'cm' or 'none', got 'edm'"):
            theirs.get_input_preconditioning(sigma, input_precond_type="edm")
    assert theirs.get_input_preconditioning is original


def test_the_boundary_is_the_scripts_sigma_min(theirs):
    """--sigma_min of the script, which its scheduler takes too."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.CMStochasticIterativeScheduler(sigma_min=0.02)
    with apply_ict_kernels_to_diffusers_cm(theirs, sigma_min=0.02):
        assert apply_ict_kernels_to_diffusers_cm(theirs, sigma_min=0.02).changed == []
        for sigma in torch.tensor([0.02, 0.3, 80.0]):
            ours = theirs.scalings_for_boundary_conditions(sigma)
            torch.testing.assert_close(ours, scheduler.get_scalings_for_boundary_condition(sigma))


def test_a_module_without_them_is_refused(a_module):
    with pytest.raises(ValueError, match="'train' has no get_input_preconditioning and no scalings_for"):
        apply_ict_kernels_to_diffusers_cm(a_module("train"))
