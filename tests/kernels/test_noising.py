"""The two network inputs of a training pair."""

import pytest
import torch

from ict_kernels import NoiseLevels, noise_images, noise_level_grid, philox, sample_noise_levels


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(0, 256, (6, 5, 7, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_both_inputs_are_the_formula_in_float64(images):
    levels = sample_noise_levels(6, 11, seed=2)
    flip = torch.tensor([0, 1, 1, 0, 1, 0], dtype=torch.uint8)
    student, teacher = noise_images(images, levels, seed=2, offset=10, flip=flip)
    x = images.double().permute(0, 3, 1, 2) / 127.5 - 1
    x = torch.stack([image.flip(-1) if bit else image for image, bit in zip(x, flip, strict=True)])
    z = philox.normal((6, 3, 5, 7), 2, 10, philox.NOISE).double()
    for got, sigma in ((student, levels.sigma_next), (teacher, levels.sigma)):
        s = sigma.double().view(-1, 1, 1, 1)
        torch.testing.assert_close(got.double(), (x + s * z) / (s**2 + 0.25).sqrt(), rtol=1e-6, atol=1e-6)
        assert got.dtype == torch.float32
        assert got.is_contiguous(memory_format=torch.channels_last)


def test_bytes_and_floats_of_the_same_images_agree_and_no_flip_means_none(images):
    levels = sample_noise_levels(6, 41, seed=2)
    as_float = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    none = torch.zeros(6, dtype=torch.bool)
    for a, b in zip(
        noise_images(images, levels, seed=9),
        noise_images(as_float.contiguous(), levels, seed=9, flip=none),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_a_flip_mirrors_the_image_and_leaves_the_noise(images):
    levels = sample_noise_levels(6, 41, seed=2)
    mirrored = noise_images(images.flip(2), levels, seed=9)
    flipped = noise_images(images, levels, seed=9, flip=torch.ones(6, dtype=torch.uint8))
    assert torch.equal(mirrored[0], flipped[0])
    assert torch.equal(mirrored[1], flipped[1])


def test_inputs_do_not_depend_on_the_micro_batch(images):
    seed = torch.tensor([3, 4])
    whole = noise_images(images, sample_noise_levels(6, 21, seed=seed), seed=seed)
    for half in (slice(0, 3), slice(3, 6)):
        levels = sample_noise_levels(3, 21, seed=seed, offset=half.start)
        part = noise_images(images[half], levels, seed=seed, offset=half.start)
        assert torch.equal(part[0], whole[0][half])
        assert torch.equal(part[1], whole[1][half])


def test_late_in_the_curriculum_the_two_inputs_still_differ_everywhere_under_autocast():
    grid = noise_level_grid(1281)
    index = torch.arange(0, 1280, 20)
    levels = NoiseLevels(index, grid[index].float(), grid[index + 1].float(), torch.ones(64))
    images = torch.rand(64, 3, 16, 16) * 2 - 1
    plain = noise_images(images, levels, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        student, teacher = noise_images(images, levels, seed=1)
    assert student.dtype == teacher.dtype == torch.float32
    assert torch.equal(student, plain[0])
    assert float((student == teacher).float().mean()) < 0.002  # bf16 noising makes 41 % of them equal


def test_low_precision_images_are_widened_before_the_noise():
    levels = sample_noise_levels(3, 11, seed=2)
    images = torch.rand(3, 3, 4, 4) * 2 - 1
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        student, _ = noise_images(images.to(dtype), levels, seed=1)
        expected, _ = noise_images(images.to(dtype).float(), levels, seed=1)
        assert student.dtype == torch.float32
        assert torch.equal(student, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(6, 3, 4, dtype=torch.uint8)}, "uint8 \\(N, H, W, C\\)"),
        ({"images": torch.zeros(6, 3, 4, 4, dtype=torch.int64)}, "uint8 \\(N, H, W, C\\)"),
        ({"images": torch.zeros(5, 4, 4, 3, dtype=torch.uint8)}, "levels.sigma must have shape \\(5,\\)"),
        ({"flip": torch.zeros(6, 1, dtype=torch.uint8)}, "flip must have shape \\(6,\\)"),
        ({"flip": torch.zeros(6)}, "flip must be uint8 or bool"),
    ],
)
def test_a_wrong_shape_or_dtype_is_named(images, change, message):
    arguments = {"images": images, "levels": sample_noise_levels(6, 11, seed=2), "seed": 0, **change}
    with pytest.raises(ValueError, match=message):
        noise_images(**arguments)
