"""The noising kernel against the eager definition in float64, and a whole training pair by the kernels."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from ict_kernels import (
    NoiseLevels,
    consistency_loss,
    noise_images,
    noise_level_grid,
    philox,
    sample_noise_levels,
    set_backend,
)
from ict_kernels.noising import _noise_op

# (N, H, W, C): C of 1, 3, 4 and 6, odd sizes, one element, several samples per program, several programs per
# sample, and a last call of less than 4 elements.
SHAPES = [
    (6, 5, 7, 3),
    (1, 1, 1, 1),
    (9, 8, 8, 1),
    (2, 32, 32, 3),
    (3, 3, 5, 4),
    (2, 19, 31, 6),
    (5, 1, 2, 1),
]


@pytest.fixture(autouse=True)
def _auto() -> Iterator[None]:
    yield
    set_backend("auto")


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan))


def levels_of(count: int, num_scales: int = 11) -> NoiseLevels:
    grid = noise_level_grid(num_scales)
    index = torch.arange(count) % (num_scales - 1)
    return NoiseLevels(index, grid[index].float(), grid[index + 1].float(), torch.ones(count))


def bytes_of(shape: tuple[int, ...]) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def some_flips(count: int) -> Tensor:
    return (torch.arange(count) % 3 != 1).to(torch.uint8)


def formula(
    x_nchw: Tensor, levels: NoiseLevels, seed: Tensor, offset: int, flip: Tensor | None
) -> list[Tensor]:
    """(x + sigma z) / sqrt(sigma^2 + 1/4) in float64, for the student and the teacher."""
    x = x_nchw.double()
    if flip is not None:
        x = torch.stack([image.flip(-1) if bit else image for image, bit in zip(x, flip, strict=True)])
    z = philox.normal(x.shape, seed, offset, philox.NOISE).double()
    inputs = []
    for sigma in (levels.sigma_next, levels.sigma):
        s = sigma.double().view(-1, 1, 1, 1)
        inputs.append((x + s * z) / (s**2 + 0.25).sqrt())
    return inputs


def assert_inputs(got: tuple[Tensor, Tensor], expected: list[Tensor]) -> None:
    for ours, exact in zip(got, expected, strict=True):
        assert ours.dtype == torch.float32
        assert ours.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("flips", [True, False])
def test_bytes_become_both_inputs(shape, flips) -> None:
    images, levels, seed = bytes_of(shape), levels_of(shape[0]), torch.tensor([-5, 9])
    flip = some_flips(shape[0]) if flips else None
    got = noise_images(images, levels, seed=seed, offset=10, flip=flip)
    assert_inputs(got, formula(images.double().permute(0, 3, 1, 2) / 127.5 - 1, levels, seed, 10, flip))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.contiguous(),
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
        lambda x: x[:1].expand(x.shape),
        lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    ],
    ids=["contiguous", "channels last", "sliced", "expanded", "batch last"],
)
def test_floats_of_any_layout_become_both_inputs(dtype, layout: Callable[[Tensor], Tensor]) -> None:
    for shape in ((4, 3, 5, 7), (3, 1, 8, 8), (2, 4, 17, 18)):
        values = torch.rand(shape, generator=torch.Generator().manual_seed(2)) * 2 - 1
        images, levels, seed = layout(values.to(dtype)), levels_of(shape[0]), torch.tensor([3, 4])
        flip = some_flips(shape[0]).bool()
        got = noise_images(images, levels, seed=seed, flip=flip)
        assert_inputs(got, formula(images, levels, seed, 0, flip))


@pytest.mark.parametrize("layout", ["transposed", "cropped", "expanded"])
def test_bytes_of_any_strides(layout) -> None:
    images = bytes_of((4, 6, 6, 3))
    images = {
        "transposed": images.transpose(1, 2),
        "cropped": images[:, 1:4, 2:5],
        "expanded": images[:1].expand(images.shape),
    }[layout]
    levels, flip = levels_of(4), some_flips(4)
    got = noise_images(images, levels, seed=1, flip=flip)
    for a, b in zip(got, noise_images(images.contiguous(), levels, seed=1, flip=flip), strict=True):
        assert torch.equal(a, b)


def test_a_sample_that_spans_more_than_32_bits_of_memory() -> None:
    far = 2**31
    storage = torch.empty(far + 8, dtype=torch.uint8)  # of which two pages are ever touched
    storage[:2], storage[far : far + 2] = torch.tensor([1, 2]), torch.tensor([3, 4])
    images = storage.as_strided((1, 2, 1, 2), (0, far, 2, 1))
    got = noise_images(images, levels_of(1), seed=1)
    near = torch.tensor([1, 2, 3, 4], dtype=torch.uint8).view(1, 2, 1, 2)
    for a, b in zip(got, noise_images(near, levels_of(1), seed=1), strict=True):
        assert torch.equal(a, b)


def test_every_byte_is_its_pixel() -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1)
    silence = NoiseLevels(torch.zeros(1), torch.zeros(1), torch.zeros(1), torch.ones(1))
    student, teacher = noise_images(images, silence, seed=1)
    exact = (images.double() / 127.5 - 1).permute(0, 3, 1, 2) * 2  # c_in(0) = 1 / sigma_data
    torch.testing.assert_close(student.double(), exact, rtol=1.2e-7, atol=0)
    assert torch.equal(student, teacher)
    assert float(student[0, 0, 0, 0]) == -2.0
    assert float(student[0, 0, 15, 15]) == 2.0


def test_the_noise_is_the_definitions_to_1e_6_and_a_flip_leaves_it() -> None:
    zero = torch.zeros(8, 3, 32, 33)
    one = torch.ones(8)
    levels = NoiseLevels(torch.zeros(8), one, one * 0.5, one)
    seed = torch.tensor([77, 88])
    plain = noise_images(zero, levels, seed=seed, offset=3, sigma_data=1e-20)
    noise = philox.normal(zero.shape, seed, 3, philox.NOISE)
    for drawn in plain:  # c_in(sigma) sigma is 1 where sigma_data is nothing
        torch.testing.assert_close(drawn, noise, rtol=0, atol=1e-6)
    flipped = noise_images(zero, levels, seed=seed, offset=3, sigma_data=1e-20, flip=torch.ones(8).bool())
    assert torch.equal(flipped[0], plain[0])


def test_a_flip_mirrors_the_image() -> None:
    images, levels = bytes_of((6, 5, 7, 3)), levels_of(6)
    mirrored = noise_images(images.flip(2), levels, seed=9)
    for flip in (
        torch.ones(6, dtype=torch.uint8),
        torch.full((6,), 2, dtype=torch.uint8),
        torch.ones(6).bool(),
    ):
        flipped = noise_images(images, levels, seed=9, flip=flip)
        assert torch.equal(mirrored[0], flipped[0])
        assert torch.equal(mirrored[1], flipped[1])


@pytest.mark.parametrize("shape", [(10, 5, 7, 3), (10, 4, 4, 1), (10, 20, 20, 3)], ids=str)
def test_inputs_do_not_depend_on_the_micro_batch(shape) -> None:
    images, levels, seed, flip = bytes_of(shape), levels_of(10), torch.tensor([3, 4]), some_flips(10)
    start = 2**32 - 4
    whole = noise_images(images, levels, seed=seed, offset=start, flip=flip)
    for part, offset in ((slice(0, 3), start), (slice(3, 10), torch.tensor(start + 3))):
        few = NoiseLevels(*(t[part] for t in levels))
        got = noise_images(images[part], few, seed=seed, offset=offset, flip=flip[part])
        assert torch.equal(got[0], whole[0][part])
        assert torch.equal(got[1], whole[1][part])


def test_levels_of_any_strides_and_precision() -> None:
    images = bytes_of((4, 4, 4, 3))
    sigma = torch.tensor([0.5, 1.0, 2.0, 4.0])
    expected = noise_images(images, NoiseLevels(sigma, sigma, sigma, sigma), seed=1)
    strided = sigma.repeat_interleave(2)[::2]
    got = noise_images(images, NoiseLevels(sigma, strided.half(), strided, sigma), seed=1)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def test_images_that_need_a_gradient_get_it() -> None:
    images = torch.rand(2, 3, 4, 4, requires_grad=True)
    levels = levels_of(2)
    student, _ = noise_images(images, levels, seed=1, flip=torch.ones(2).bool())
    student.sum().backward()
    scale = (levels.sigma_next**2 + 0.25).rsqrt().view(2, 1, 1, 1)
    torch.testing.assert_close(images.grad, scale.expand(images.shape))
    with torch.no_grad():
        assert not noise_images(images, levels, seed=1)[0].requires_grad


def test_an_empty_batch_is_empty() -> None:
    student, teacher = noise_images(torch.zeros(0, 4, 4, 3, dtype=torch.uint8), levels_of(0), seed=1)
    assert student.shape == teacher.shape == (0, 3, 4, 4)


@pytest.mark.parametrize("images", [bytes_of((3, 4, 5, 3)), torch.rand(3, 2, 4, 5)], ids=["bytes", "floats"])
@pytest.mark.parametrize("optional", [True, False])
def test_opcheck(images, optional) -> None:
    levels, seed = levels_of(3), torch.tensor([1, 2])
    flip, offset = (some_flips(3), torch.tensor(5)) if optional else (None, None)
    torch.library.opcheck(_noise_op, (images, levels.sigma, levels.sigma_next, flip, seed, offset, 7, 0.5))


# ---------------------------------------------------------------------------------------- a training pair


def training_pair(
    weight: Tensor, images: Tensor, flip: Tensor, seed: Tensor, offset: Tensor, num_scales: Tensor
) -> tuple[Tensor, ...]:
    """A step's use of these ops, with a 1x1 convolution for a network."""
    levels = sample_noise_levels(images.shape[0], num_scales, seed=seed, offset=offset)
    student_input, teacher_input = noise_images(images, levels, seed=seed, offset=offset, flip=flip)
    student = torch.nn.functional.conv2d(student_input, weight)
    with torch.no_grad():
        teacher = torch.nn.functional.conv2d(teacher_input, weight)
    loss = consistency_loss(student, teacher, student_input, teacher_input, levels)
    return *levels, student_input, teacher_input, loss


def run_pair(function: Callable[..., tuple[Tensor, ...]], num_scales: int) -> tuple[Tensor, ...]:
    weight = torch.eye(3).view(3, 3, 1, 1).clone().requires_grad_()
    arguments = bytes_of((6, 5, 7, 3)), some_flips(6), torch.tensor([5, 7]), torch.tensor(3)
    results = function(weight, *arguments, torch.tensor(num_scales))
    results[-1].sum().backward()
    return *(r.detach() for r in results), weight.grad


def test_a_training_pair_traces_whole_and_once() -> None:
    compiled = torch.compile(training_pair, fullgraph=True, backend="aot_eager")
    graphs = None
    for num_scales in (11, 161, 1281):
        for a, b in zip(run_pair(compiled, num_scales), run_pair(training_pair, num_scales), strict=True):
            assert torch.equal(a, b)
        counted = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        graphs = counted if graphs is None else graphs
        assert counted == graphs


def test_a_training_pair_by_the_kernels_is_that_of_the_definitions() -> None:
    for num_scales in (11, 161):
        set_backend("auto")
        by_kernel = run_pair(training_pair, num_scales)
        set_backend("eager")
        defined = run_pair(training_pair, num_scales)
        for a, b in zip(by_kernel[:4], defined[:4], strict=True):
            assert torch.equal(a, b)
        for a, b in zip(by_kernel[4:6], defined[4:6], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        # Inputs that differ by 1e-7 leave differences of neighbouring levels that differ by more.
        torch.testing.assert_close(by_kernel[6], defined[6], rtol=2e-4, atol=1e-5)
        torch.testing.assert_close(by_kernel[7], defined[7], rtol=1e-3, atol=1e-3)
