"""Hugging Face's elementwise Huber losses, where elementwise is what is meant."""

import pytest
import torch

from ict_kernels import pseudo_huber_loss
from ict_kernels.adapters import apply_ict_kernels_to_hf_trainers, hf_trainers


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 3, 6, 5, generator=generator) for _ in range(2)]


@pytest.mark.parametrize("huber_c", [0.1, 0.001, torch.tensor(0.3), torch.full((4, 1, 1, 1), 0.2)])
@pytest.mark.parametrize("loss_type", ["l2", "huber", "smooth_l1"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_it_is_their_loss_in_float64_with_its_gradient(theirs, pair, huber_c, loss_type, reduction):
    prediction, target = pair
    prediction.requires_grad_()
    loss = hf_trainers.conditional_loss(prediction, target, reduction, loss_type, huber_c)
    double = prediction.detach().double().requires_grad_()
    c = huber_c.double() if isinstance(huber_c, torch.Tensor) else huber_c
    expected = theirs.conditional_loss(double, target.double(), reduction, loss_type, c)
    assert loss.shape == expected.shape
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-7)
    (gradient,) = torch.autograd.grad(loss.sum(), prediction)
    (exact_gradient,) = torch.autograd.grad(expected.sum(), double)
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-5, atol=1e-8)


def test_half_precision_loses_the_loss_in_theirs_and_not_in_ours(theirs, pair):
    """c of the consistency distillation scripts in bf16: sqrt(e^2 + c^2) - c cancels."""
    prediction, target = (each.bfloat16() * 0.002 for each in pair)
    exact = theirs.conditional_loss(prediction.double(), target.double(), "mean", "huber", 0.1)
    ours = hf_trainers.conditional_loss(prediction, target, "mean", "huber", 0.1)
    own = theirs.conditional_loss(prediction, target, "mean", "huber", 0.1)
    assert abs(float(ours / exact) - 1) < 1e-4
    assert abs(float(own / exact) - 1) > 0.05


def test_the_written_out_loss_is_a_call_of_the_package(pair):
    """train_lcm_distill_*: mean(sqrt(e^2 + c^2) - c)."""
    prediction, target = pair
    written_out = ((prediction.double() - target.double()) ** 2 + 0.001**2).sqrt() - 0.001
    ours = pseudo_huber_loss(prediction, target, c=0.001, norm="element", reduction="mean")
    torch.testing.assert_close(ours.double(), written_out.mean(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("huber_c", [0.0, torch.tensor(0.0)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_equal_images_have_a_gradient_of_0_also_where_a_schedule_of_c_ends_at_0(pair, huber_c, reduction):
    prediction = pair[0].double().requires_grad_()
    loss = hf_trainers.conditional_loss(prediction, pair[0].double(), reduction, "smooth_l1", huber_c)
    (gradient,) = torch.autograd.grad(loss.sum(), prediction)
    assert loss.dtype == torch.float64
    assert not loss.any()
    assert not gradient.any()


def test_wrong_arguments_are_named(pair):
    with pytest.raises(NotImplementedError, match="Unsupported Loss Type l3"):
        hf_trainers.conditional_loss(*pair, loss_type="l3")
    with pytest.raises(ValueError, match="reduction must be 'none', 'mean' or 'sum', got 'max'"):
        hf_trainers.conditional_loss(*pair, reduction="max", loss_type="huber")
    with pytest.raises(ValueError, match=r"got model_pred \(4, 3, 6, 5\), target \(4, 3, 6\)"):
        hf_trainers.conditional_loss(pair[0], pair[1][..., 0], loss_type="huber")


def test_the_patch_can_be_undone(theirs):
    original = theirs.conditional_loss
    with apply_ict_kernels_to_hf_trainers(theirs):
        assert theirs.conditional_loss is hf_trainers.conditional_loss
        assert apply_ict_kernels_to_hf_trainers(theirs).changed == []
    assert theirs.conditional_loss is original


def test_a_script_without_it_is_refused(a_module):
    with pytest.raises(ValueError, match="'train_dreambooth' has no conditional_loss"):
        apply_ict_kernels_to_hf_trainers(a_module("train_dreambooth"))


def test_a_conditional_loss_that_is_another_is_refused(theirs, a_module):
    """Two of the scripts with a scheduled Huber loss have one: weighted by image; without the factor 2."""

    def weighted(model_pred, target, reduction="mean", loss_type="l2", huber_c=0.1, weighting=None):
        raise AssertionError("tried in vain")

    def half(model_pred, target, reduction="mean", loss_type="l2", huber_c=0.1):
        if loss_type == "smooth_l1":
            raise NotImplementedError
        loss = theirs.conditional_loss(model_pred, target, reduction, loss_type, huber_c)
        return loss if loss_type == "l2" else loss / 2

    for function, reason in ((weighted, "it takes weighting"), (half, "its 'huber' is another")):
        script = a_module("train_lora", conditional_loss=function)
        with pytest.raises(ValueError, match=f"'train_lora' has another conditional_loss.*: {reason}"):
            apply_ict_kernels_to_hf_trainers(script)
        assert script.conditional_loss is function
