"""openai/consistency_models: `KarrasDenoiser.consistency_losses`, restated and patched."""

import copy
import math

import pytest
import torch

from ict_fast.config import MethodConfig
from ict_fast.consistency.curriculum import num_scales
from ict_kernels import noise_level_grid, sample_noise_levels
from ict_kernels.adapters import apply_ict_kernels_to_openai_cm, openai_cm

C = 0.00054 * math.sqrt(3 * 8 * 8)


def call(theirs, network, images, **options):
    """As their training loop does."""
    losses = theirs.KarrasDenoiser(**options).consistency_losses(
        network, images, 11, target_model=copy.deepcopy(network), model_kwargs={}
    )
    return losses["loss"]


def test_under_autocast_every_weight_has_its_gradient(theirs, network, images, monkeypatch):
    """Older torch gives the student the casts that the teacher made without gradients; 2.13 does not."""
    calls = []
    clear = torch.clear_autocast_cache
    monkeypatch.setattr(torch, "clear_autocast_cache", lambda: (calls.append("forget"), clear()))
    network.register_forward_hook(lambda *_: calls.append("pass"))
    with torch.autocast("cpu", torch.bfloat16), apply_ict_kernels_to_openai_cm(theirs):
        loss = call(theirs, network, images).mean()
        assert calls[:3] == ["pass", "forget", "pass"]
    loss.backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []


def test_loss_and_gradients_are_the_papers(theirs, network, images, exact, same_gradients):
    noise = torch.randn_like(images)
    with apply_ict_kernels_to_openai_cm(theirs):
        torch.manual_seed(3)
        denoiser = theirs.KarrasDenoiser()
        losses = denoiser.consistency_losses(network, images, 81, target_model=network, noise=noise)
    assert losses.keys() == {"loss"}
    assert losses["loss"].shape == (6,)
    assert losses["loss"].dtype == torch.float32

    torch.manual_seed(3)
    levels = sample_noise_levels(6, 81)
    grid = noise_level_grid(81)
    sigma, sigma_next = grid[levels.index], grid[levels.index + 1]  # theirs: t2 and t, on a descending grid
    state = torch.get_rng_state()
    double = copy.deepcopy(network).double()

    def denoised(sigma_n):
        torch.set_rng_state(state)
        x_t = images.double() + sigma_n[:, None, None, None] * noise.double()
        keep = torch.nn.functional.dropout(torch.ones(6, 8, 8, 8), 0.4)  # float64 draws another mask
        variance = sigma_n.view(-1, 1, 1, 1) ** 2 + 0.25
        hidden = double.first(x_t / variance.sqrt())
        level = (250 * torch.log(sigma_n + 1e-44)).view(-1, 1, 1, 1)
        output = double.last(keep * (hidden + 0.1 * level.tanh()))
        above = sigma_n.view(-1, 1, 1, 1) - 0.002
        return 0.5 * above / variance.sqrt() * output + 0.25 / (above**2 + 0.25) * x_t

    expected = exact.huber(denoised(sigma_next), denoised(sigma).detach(), C) / (sigma_next - sigma)
    torch.testing.assert_close(losses["loss"].double(), expected, rtol=1e-4, atol=1e-6)
    same_gradients(network, losses["loss"].mean(), double, expected.mean())


def test_the_student_is_at_the_noisier_level_and_alone_has_gradients(theirs, network, images):
    with apply_ict_kernels_to_openai_cm(theirs):
        call(theirs, network, images)
    (teacher, student), (_, by_student) = network.inputs, network.with_gradient
    assert by_student
    assert not network.with_gradient[0]
    assert (student[1] > teacher[1]).all()  # 250 ln sigma


def test_theirs_is_the_recipe_of_2023_and_ours_that_of_2024(theirs, network, images):
    """Uniform indices and weight, mean of squares, an EMA teacher: named, and gone."""
    target = copy.deepcopy(network)
    theirs.KarrasDenoiser().consistency_losses(network, images, 11, target_model=target)
    assert len(target.inputs) == 1  # theirs evaluates the EMA copy
    with apply_ict_kernels_to_openai_cm(theirs):
        theirs.KarrasDenoiser().consistency_losses(network, images, 11, target_model=target)
    assert len(target.inputs) == 1  # ours does not
    assert len(network.inputs) == 3


def test_student_and_teacher_share_the_dropout_mask(theirs, network, images):
    with apply_ict_kernels_to_openai_cm(theirs):
        call(theirs, network, images)
    assert torch.equal(*network.masks)
    assert 0.2 < network.masks[0].float().mean() < 0.6


def test_distillation_from_a_teacher_model_stays_theirs(theirs, network, images):
    with apply_ict_kernels_to_openai_cm(theirs):
        denoiser = theirs.KarrasDenoiser()
        losses = denoiser.consistency_losses(network, images, 11, teacher_model=network, target_model=network)
    assert torch.equal(losses["loss"], torch.full((6,), 7.0))


def test_without_the_boundary_condition_it_refuses(theirs, network, images):
    with apply_ict_kernels_to_openai_cm(theirs), pytest.raises(ValueError, match="distillation=True"):
        call(theirs, network, images, distillation=False)


def test_a_number_of_scales_is_never_cut_off(theirs, network, images):
    denoiser = theirs.KarrasDenoiser()
    with apply_ict_kernels_to_openai_cm(theirs):
        with pytest.raises(ValueError, match=r"num_scales .* must be an int, got 20\.7"):
            denoiser.consistency_losses(network, images, 20.7)
        torch.manual_seed(5)
        by_tensor = denoiser.consistency_losses(network, images, torch.tensor(20))["loss"]
        torch.manual_seed(5)
        assert torch.equal(denoiser.consistency_losses(network, images, 20)["loss"], by_tensor)


def test_the_patch_can_be_undone_and_comes_once(theirs):
    original = theirs.KarrasDenoiser.consistency_losses
    undo = apply_ict_kernels_to_openai_cm(theirs)
    assert undo.changed == ["KarrasDenoiser.consistency_losses"]
    assert apply_ict_kernels_to_openai_cm(theirs).changed == []
    assert theirs.KarrasDenoiser.consistency_losses is not original
    undo()
    assert theirs.KarrasDenoiser.consistency_losses is original


def test_another_module_is_refused(a_module):
    with pytest.raises(ValueError, match=r"'cm\.unet' has no KarrasDenoiser; pass cm\.karras_diffusion"):
        apply_ict_kernels_to_openai_cm(a_module("cm.unet"))


@pytest.mark.parametrize("total", [1, 7, 8, 1000, 400_000])
def test_the_scales_are_those_of_the_curriculum(total):
    scales = openai_cm.ict_ema_and_scales_fn(total)
    for step in {0, total // 3, total // 2, total - 1, total}:
        assert scales(step) == (0.0, num_scales(step, total, MethodConfig()))
