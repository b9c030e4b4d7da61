"""What other trainers pass: dtypes, dimensions, layouts, weights of every accepted shape, and wrong ones."""

import math
import re
import warnings

import pytest
import torch
from torch import Tensor, nn

from ict_kernels import (
    GroupNormSiLU,
    NoiseLevels,
    consistency_loss,
    fir_downsample,
    fir_upsample,
    group_norm_silu,
    noise_images,
    noise_level_grid,
    noise_level_probabilities,
    philox,
    pseudo_huber_loss,
    sample_noise_levels,
    seed_dropout,
)
from ict_kernels.adapters import diffusers_cm, kinyugo
from ict_kernels.adapters.ect import ECMLoss
from ict_kernels.philox import normal

SHAPES = [(4, 3), (4, 3, 16), (4, 3, 8, 8), (4, 3, 2, 8, 8), (1, 3, 8, 8), (0, 3, 8, 8), (4, 1, 1, 1)]
# Functions of (prediction, target, weight) that give a scalar, a loss per sample, and one to multiply.
LOSSES = {
    "pseudo_huber_loss": lambda a, b, w: pseudo_huber_loss(a, b, w, reduction="sum"),
    "diffusers_cm": lambda a, b, w: diffusers_cm.consistency_loss(a, b, w) * len(a),
    "kinyugo": lambda a, b, w: kinyugo.pseudo_huber_loss(a, b, w).sum(),
}


def pair(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(2)]


def dropped(x: Tensor, **draw) -> Tensor:
    return group_norm_silu(x, 1, None, None, dropout=0.5, **{"seed": 0} | draw)


def exact(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    c = 0.00054 * math.sqrt(math.prod(a.shape[1:]))
    squared = (a.double() - b.double()).flatten(1).square().sum(1)
    return weight.double().reshape(-1) * ((squared + c * c).sqrt() - c)


def as_given(x: Tensor, layout: str) -> Tensor:
    if layout == "channels last":
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        return x.contiguous(memory_format=formats[x.dim()]) if x.dim() in formats else x
    if layout == "every second channel":
        wide = torch.zeros(x.shape[0], 2 * x.shape[1], *x.shape[2:], dtype=x.dtype)
        wide[:, ::2] = x
        return wide[:, ::2]
    return x


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels last", "every second channel"])
def test_losses_take_any_dimensions_and_layout(loss, shape, layout):
    a, b = (as_given(each, layout) for each in pair(shape))
    a.requires_grad_()
    weight = torch.linspace(0.5, 9.0, shape[0])
    ones = (shape[0],) + (1,) * (len(shape) - 1)
    expected = exact(a.detach(), b, weight).sum()
    for each in (weight, weight.reshape(ones)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            if shape[0] or loss != "diffusers_cm":
                value = LOSSES[loss](a, b, each)
                torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-7)
                (gradient,) = torch.autograd.grad(value, a)
                assert gradient.shape == a.shape
                assert gradient.isfinite().all()


@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float16", "bfloat16"), ("float32", "float64")])
@pytest.mark.parametrize("loss", LOSSES)
def test_losses_take_mixed_dtypes_and_lose_nothing_by_them(loss, dtypes):
    first, second = (getattr(torch, each) for each in dtypes)
    a, b = pair((4, 3, 8, 8))
    a, b = a.to(first).requires_grad_(), b.to(second)
    weight = torch.linspace(0.5, 9.0, 4, dtype=torch.bfloat16)
    value = LOSSES[loss](a, b, weight)
    assert value.dtype == (torch.float64 if torch.float64 in (first, second) else torch.float32)
    torch.testing.assert_close(value.double(), exact(a.detach(), b, weight).sum(), rtol=1e-5, atol=0)
    (gradient,) = torch.autograd.grad(value, a)
    assert gradient.dtype == first


@pytest.mark.parametrize("shape", [(4, 1, 1, 4), (4, 4), (1, 4), (1,), (), (4, 1), (4, 3, 8, 8)])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_weight_of_another_shape_is_an_error_that_names_both(loss, shape):
    a, b = pair((4, 3, 8, 8))
    message = f"weight must have shape (4,) or (4, 1, 1, 1), got {shape}"
    with pytest.raises(ValueError, match=re.escape(message)):
        LOSSES[loss](a, b, torch.ones(shape))


def test_a_weight_of_the_batch_never_makes_a_matrix_of_losses():
    """(N,) against (N, 1, 1, 1) would broadcast to (N, 1, 1, N), whose mean looks like a loss."""
    a, b = pair((4, 3, 8, 8))
    weight = torch.tensor([1.0, 10.0, 100.0, 1000.0])
    kept = pseudo_huber_loss(a, b, weight, keepdim=True)
    assert kept.shape == (4, 1, 1, 1)
    torch.testing.assert_close(kept.flatten().double(), exact(a, b, weight))
    outside = pseudo_huber_loss(a, b, keepdim=True) * weight
    assert outside.shape == (4, 1, 1, 4)  # what happens outside of this package
    assert not torch.isclose(outside.mean(), kept.mean())


@pytest.mark.parametrize("loss", LOSSES)
def test_images_of_different_shapes_are_an_error_that_names_both(loss):
    a, b = pair((4, 3, 8, 8))
    with pytest.raises(ValueError, match=r"prediction \(4, 3, 8, 8\), target \(4, 3, 8\)"):
        LOSSES[loss](a, b[..., 0], None)
    with pytest.raises(ValueError, match=r"prediction must have shape \(N, \.\.\.\).* got \(4,\)"):
        LOSSES[loss](a[:, 0, 0, 0], b[:, 0, 0, 0], None)
    with pytest.raises(ValueError, match=r"prediction must be floating point, got torch\.int64"):
        LOSSES[loss](a.long(), b.long(), None)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_loss_exports_for_any_batch(weighted):
    class Loss(nn.Module):
        def forward(self, *given: Tensor) -> Tensor:
            return pseudo_huber_loss(*given)

    given = (*pair((4, 3, 8, 8)), *[torch.ones(4)] * weighted)
    batch = {0: torch.export.Dim("batch", min=2, max=64)}
    exported = torch.export.export(Loss(), given, dynamic_shapes=((batch,) * len(given),), strict=False)
    larger = [torch.cat((each, each + 1.0)) for each in given]
    torch.testing.assert_close(exported.module()(*larger), pseudo_huber_loss(*larger))


@pytest.mark.parametrize("shape", [(3, 4, 6), (3, 4, 2, 5, 5)])
def test_the_consistency_loss_takes_sound_and_video(shape):
    tensors = [*pair(shape), *pair(shape)]
    levels = NoiseLevels(torch.zeros(3).long(), torch.rand(3) + 0.1, torch.rand(3) + 1.2, torch.rand(3))
    value = consistency_loss(*tensors, levels)
    double = NoiseLevels(levels.index, *(each.double() for each in levels[1:]))
    expected = consistency_loss(*(each.double() for each in tensors), double)
    assert value.shape == (3,)
    torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-6)
    wrong = levels._replace(weight=torch.ones(3, 1, 1, 3))
    with pytest.raises(
        ValueError, match=r"levels\.weight must have shape \(3,\) or \(3, .*got \(3, 1, 1, 3\)"
    ):
        consistency_loss(*tensors, wrong)


@pytest.mark.parametrize("shape", [(2, 8), (2, 8, 7), (2, 8, 3, 4, 5), (0, 8, 4, 4), (1, 8, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_group_norm_takes_sound_video_and_nothing(shape, dtype):
    (x, _), weight, bias = pair(shape, dtype), torch.linspace(0.5, 2, 8), torch.linspace(-1, 1, 8)
    y = group_norm_silu(x, 4, weight, bias)
    assert (y.shape, y.dtype) == (x.shape, dtype)
    if shape[0] == 0:
        return
    grouped = x.double().reshape(shape[0], 4, -1)
    variance, mean = torch.var_mean(grouped, dim=2, keepdim=True, correction=0)
    per_channel = (1, 8) + (1,) * (len(shape) - 2)
    z = ((grouped - mean) / (variance + 1e-5) ** 0.5).reshape(shape)
    z = z * weight.double().reshape(per_channel) + bias.double().reshape(per_channel)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(y.double(), z * z.sigmoid(), rtol=tolerance, atol=tolerance)


def test_a_replaced_network_takes_an_empty_batch():
    network = nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 2, 1))
    GroupNormSiLU.replace_in(network)
    assert network(torch.zeros(0, 4, 5, 5)).shape == (0, 2, 5, 5)


def test_ects_loss_takes_video():
    loss = ECMLoss(c=0.03)(lambda x, sigma, labels: 0.5 * x, torch.randn(2, 3, 4, 5, 5))
    assert loss.shape == (2,)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a, b: pseudo_huber_loss(a, b, 2.0), r"weight must be a tensor of shape \(2,\) .* got 2\.0"),
        (lambda a, b: pseudo_huber_loss(a, b, 1), r"weight must be a tensor .* got 1"),
        (lambda a, b: group_norm_silu(a, 1, None, None, eps=-1.0), "eps must be at least 0 .* got -1"),
        (lambda a, b: group_norm_silu(a, 1, None, None, eps=math.nan), "eps must be at least 0"),
        (lambda a, b: normal((2, 3), seed=0.9), r"a seed is an int.* got 0\.9"),
        (lambda a, b: sample_noise_levels(2, 11, seed=0.0), r"a seed is an int.* got 0\.0"),
        (lambda a, b: dropped(a, seed=(1, 2)), r"a seed is an int.* got \(1, 2\)"),
        (lambda a, b: seed_dropout(nn.Dropout(), "1"), r"a seed is an int.* got '1'"),
        (lambda a, b: sample_noise_levels(2, 11, seed=0, offset=1.5), r"an offset is an int.* got 1\.5"),
        (lambda a, b: normal((2, 3), 0, torch.tensor([4, 5])), r"an offset is one integer.* shape \(2,\)"),
        (lambda a, b: dropped(a, offset=torch.tensor(1.5)), r"an offset is one integer.* torch\.float32"),
        (lambda a, b: dropped(a, seed=torch.tensor([1])), r"a seed tensor is int64 of shape \(2,\).*\(1,\)"),
        (lambda a, b: pseudo_huber_loss(a, b, reduction="mean", keepdim=True), "keepdim=True is for"),
    ],
)
def test_a_number_that_means_nothing_is_refused_and_not_rounded(call, message):
    with pytest.raises(ValueError, match=message):
        call(*pair((2, 3, 4, 4)))


def test_bytes_with_channels_first_are_not_taken_for_channels_last():
    levels = sample_noise_levels(2, 11, seed=0)
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"\(2, 3, 32, 32\) looks like \(N, C, H, W\)"):
        noise_images(images, levels, seed=0)
    student, teacher = noise_images(images.permute(0, 2, 3, 1), levels, seed=0)
    assert student.shape == teacher.shape == images.shape


@pytest.mark.parametrize("shape", [(4096,), (64, 64), (0,)])
def test_seeded_dropout_takes_vectors(shape):
    layer = nn.Sequential(nn.Dropout(0.25))
    seed = seed_dropout(layer, 3)
    y = layer(torch.ones(shape))
    assert y.shape == shape
    assert torch.equal(y, layer(torch.ones(shape)))
    assert set(y.unique().tolist()) <= {0.0, float(torch.tensor(1 / 0.75))}
    assert not y.numel() or float((y == 0).double().mean()) == pytest.approx(0.25, abs=0.03)
    seed.advance()
    assert not y.numel() or not torch.equal(y, layer(torch.ones(shape)))


def test_a_scalar_has_no_samples_to_draw_for():
    layer = nn.Sequential(nn.Dropout(0.25))
    seed_dropout(layer, 3)
    with pytest.raises(ValueError, match=r"for a shape \(N, \.\.\.\), which a scalar does not have"):
        layer(torch.ones(()))


def test_on_the_meta_device_every_op_has_shapes():
    """As those count who want to know what a step takes."""
    a, b = (each.to("meta").requires_grad_() for each in pair((4, 8, 6, 6)))
    levels = sample_noise_levels(4, 11, seed=0, device="meta")
    student, teacher = noise_images(a.detach(), levels, seed=0)
    assert consistency_loss(a, b, student, teacher, levels).shape == (4,)
    assert pseudo_huber_loss(a, b, levels.weight, keepdim=True).shape == (4, 1, 1, 1)
    y = fir_downsample(fir_upsample(group_norm_silu(a, 2, None, None, dropout=0.1, seed=0)))
    (gradient,) = torch.autograd.grad(pseudo_huber_loss(y, b, norm="element", reduction="mean"), a)
    assert y.shape == gradient.shape == a.shape


def seeded_dropout() -> Tensor:
    network = nn.Sequential(nn.Linear(4, 4, device="cpu"), nn.Dropout(0.5))
    seed_dropout(network)
    return network[1](torch.ones(64, 4, device="cpu"))


@pytest.mark.parametrize(
    "call",
    [
        lambda: noise_level_grid(7),
        lambda: noise_level_probabilities(7),
        lambda: noise_level_probabilities(7, indices="uniform"),
        lambda: sample_noise_levels(5, 7, p_mean=-1.2).sigma,
        lambda: sample_noise_levels(5, 7, p_mean=-1.3, seed=3, device="cpu").sigma,
        lambda: normal((2, 3, 4), seed=None),
        lambda: normal((3, 64, 64, 64), seed=3),
        seeded_dropout,
    ],
)
def test_what_belongs_on_the_cpu_is_made_there_whatever_torchs_default_device(call, monkeypatch):
    """As under torch.set_default_device("cuda"); meta stands for that here, and has no values."""
    monkeypatch.setattr(philox, "_compiled", None)
    monkeypatch.setattr(philox, "_no_compiler", None)
    torch.manual_seed(0)
    with torch.device("meta"):
        value = call()
    torch.manual_seed(0)
    assert torch.equal(value, call())
