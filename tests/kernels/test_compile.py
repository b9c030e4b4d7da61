"""Every op inside torch.compile(fullgraph=True), on the CPU, against itself in eager."""

import pytest
import torch
from torch import Tensor, nn

import ict_kernels.noise_levels
from ict_kernels import (
    GroupNormSiLU,
    RAdamEMA,
    consistency_loss,
    noise_images,
    radam_ema,
    sample_noise_levels,
)
from ict_kernels.philox import dropout_keep_mask


def training_pair(
    norm: GroupNormSiLU, images: Tensor, flip: Tensor, seed: Tensor, offset: Tensor, num_scales: Tensor
) -> tuple[Tensor, ...]:
    """A whole step's use of this package, with a norm for a network."""
    levels = sample_noise_levels(images.shape[0], num_scales, seed=seed, offset=offset)
    student_input, teacher_input = noise_images(images, levels, seed=seed, offset=offset, flip=flip)
    student = norm(student_input, seed=seed, offset=offset)
    with torch.no_grad():
        teacher = norm(teacher_input, seed=seed, offset=offset)
    loss = consistency_loss(student, teacher, student_input, teacher_input, levels)
    return *levels, student_input, teacher_input, loss, student == 0, teacher == 0


@pytest.fixture
def arguments() -> list[Tensor]:
    images = torch.randint(
        0, 256, (6, 5, 5, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    return [images, torch.tensor([0, 1] * 3, dtype=torch.uint8), torch.tensor([5, 7]), torch.tensor(3)]


def check_against_eager(backend: str, arguments: list[Tensor]) -> None:
    norm = GroupNormSiLU(2, 4, dropout=0.3, layer=3)
    nn.init.normal_(norm.weight)
    compiled = torch.compile(training_pair, fullgraph=True, backend=backend)
    compilations = torch._dynamo.utils.counters["stats"]
    graphs = None
    for num_scales in (11, 161, 1281):  # a new stage of the curriculum is the same graph
        results, gradients = [], []
        for function in (compiled, training_pair):
            norm.zero_grad()
            results.append(function(norm, *arguments, torch.tensor(num_scales)))
            results[-1][-3].sum().backward()
            gradients.append(norm.weight.grad.clone())
        names = ("index", "sigma", "sigma_next", "weight", "student", "teacher", "loss", "mask", "mask again")
        for name, a, b in zip(names, *results, strict=True):
            if a.is_floating_point() and name in ("student", "teacher", "loss"):
                torch.testing.assert_close(a, b, rtol=2e-4 if name == "loss" else 1e-6, atol=2e-6)
            else:
                assert torch.equal(a, b), name
        assert torch.equal(results[0][-1], results[0][-2])  # teacher and student share the mask
        # Weights of up to 25,585 multiply what rounding leaves of small differences.
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)
        graphs = compilations["unique_graphs"] if graphs is None else graphs
    assert compilations["unique_graphs"] == graphs


def test_a_step_traces_whole_and_once(arguments):
    check_against_eager("aot_eager", arguments)


@pytest.mark.parametrize("shape", [(5, 3, 7, 5), (16, 8, 8, 8), (2, 3, 256, 64)])
def test_a_dropout_mask_has_the_same_bits_through_inductor(shape):
    seed, offset = torch.tensor([-3, 9]), torch.tensor(4)
    torch._dynamo.reset()  # else the second shape is compiled as a symbol, by other code
    compiled = torch.compile(
        lambda s, o: dropout_keep_mask(shape, 0.3, s, o, layer=2), fullgraph=True, dynamic=False
    )
    assert torch.equal(compiled(seed, offset), dropout_keep_mask(shape, 0.3, seed, 4, layer=2))


@pytest.mark.drill
def test_a_step_compiles_with_inductor(arguments):
    check_against_eager("inductor", arguments)


def test_the_optimizer_traces_whole_and_never_again():
    p = nn.Parameter(torch.ones(3, 4))
    q = nn.Parameter(torch.ones(3, 4))
    traced, eager = RAdamEMA([p], lr=torch.tensor(0.1)), RAdamEMA([q], lr=torch.tensor(0.1))
    for optimizer, parameter in ((traced, p), (eager, q)):
        parameter.grad = torch.arange(12.0).view(3, 4)
        optimizer.step()
    step = torch.compile(lambda: traced.step(), fullgraph=True, backend="aot_eager")
    step()
    eager.step()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for _ in range(10):
        step()
        eager.step()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    torch.testing.assert_close(p, q)
    assert float(traced.state[p]["step"]) == 12


def test_the_private_names_in_use_are_those_of_torchs_public_functions():
    """All stand for a public function that would import Dynamo, with the package or with an optimizer."""

    def function() -> int:
        return 1

    ours = ict_kernels.noise_levels._table
    marked = vars(torch.compiler.assume_constant_result(function))
    assert {name: value for name, value in marked.items() if value is True} == vars(ours)
    assert radam_ema._not_traced is torch._disable_dynamo
    assert radam_ema._add_param_group is torch.optim.Optimizer.add_param_group.__wrapped__
    kept_out = radam_ema._not_traced(lambda x: x + 1)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(lambda x: kept_out(x) * 2, backend="eager", fullgraph=True)(torch.ones(2))
