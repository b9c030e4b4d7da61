"""One dropout mask for several passes: by rewinding generators, and by a seed."""

import copy
import io
import pickle
from itertools import combinations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ict_kernels import GroupNormSiLU, SharedDropout, seed_dropout
from ict_kernels.philox import dropout_keep_mask

CPU = torch.device("cpu")


def network(p: float = 0.4) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 6, 1), nn.Dropout(p), nn.Conv2d(6, 4, 1), nn.Dropout(p))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 2, 5, 5, generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------------------------------------- rewinding


def test_passes_share_their_masks_and_leave_the_generator_as_one_pass_does(x):
    net = network()
    torch.manual_seed(4)
    first = net(x)
    after_one = torch.get_rng_state()
    torch.manual_seed(4)
    masks = SharedDropout(net, CPU)
    outputs = []
    for _ in range(3):
        with masks:
            outputs.append(net(x))
    assert all(torch.equal(first, each) for each in outputs)
    assert torch.equal(torch.get_rng_state(), after_one)
    assert not torch.equal(net(x), first)


def test_what_is_drawn_between_the_passes_does_not_matter(x):
    net = network()
    masks = SharedDropout(net, CPU)
    with masks:
        first = net(x)
    torch.randn(100)
    with masks, torch.no_grad():
        assert torch.equal(net(x), first)


@pytest.mark.parametrize(("device", "told"), [("cuda:1", (torch.device("cuda:1"),)), ("mps", ())])
def test_the_devices_generator_is_rewound_beside_the_cpus(device, told, monkeypatch):
    """Which public trainers leave out; here with a generator that stands for the device's."""
    generator, calls = torch.Generator(), []

    class Device:
        @staticmethod
        def get_rng_state(*arguments):
            calls.append(arguments)
            return generator.get_state()

        @staticmethod
        def set_rng_state(state, *arguments):
            calls.append(arguments)
            generator.set_state(state)

    monkeypatch.setattr(torch, "get_device_module", lambda device: Device)
    masks = SharedDropout(None, device)
    drawn = []
    for _ in range(3):
        with masks:
            drawn.append((torch.rand(4), torch.rand(4, generator=generator)))
    assert all(torch.equal(a, b) for pair in drawn for a, b in zip(pair, drawn[0], strict=True))
    assert calls == [told] * 3


def test_around_makes_every_call_such_a_pass(x):
    net = network()
    shared = SharedDropout(net, CPU).around(net)
    assert torch.equal(shared(x), shared(x))


def test_a_compiled_network_shares_its_masks(x):
    """One graph with gradients and one without; Inductor draws its seeds from the generator at run time."""
    torch._dynamo.reset()
    net = network()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    masks = SharedDropout(net, CPU)
    with masks, torch.no_grad():
        teacher = compiled(x)
    with masks:
        student = compiled(x)
    assert student.requires_grad
    assert torch.equal(student, teacher)


@pytest.mark.drill
def test_a_network_compiled_by_inductor_shares_its_masks(x):
    torch._dynamo.reset()
    net = network()
    compiled = torch.compile(net, fullgraph=True)
    masks = SharedDropout(net, CPU)
    with masks, torch.no_grad():
        teacher = compiled(x)
    with masks:
        student = compiled(x)
    assert torch.equal(student == 0, teacher == 0)
    assert not torch.equal(compiled(x) == 0, teacher == 0)


def pair(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    masks = SharedDropout(net, CPU)
    with masks, torch.no_grad():
        teacher = net(x)
    with masks:
        return net(x), teacher


def test_inside_a_compiled_step_it_refuses_masks_that_it_cannot_share(x):
    torch._dynamo.reset()
    step = torch.compile(pair, backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match=r"call ict_kernels\.seed_dropout\(network\) once"):
        step(network(), x)


@pytest.mark.parametrize("layer", [nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout])
def test_dropouts_of_other_kinds_are_left_and_named_and_refused_inside_a_compiled_step(x, layer):
    torch._dynamo.reset()
    net = nn.Sequential(network(), layer(0.5))
    assert seed_dropout(net).left == {"1": f"{layer.__name__} is a dropout of its own"}
    step = torch.compile(pair, backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match="dropout masks cannot be shared by rewinding"):
        step(net, x)


def test_inside_a_compiled_step_networks_without_active_dropout_and_seeded_ones_pass(x):
    torch._dynamo.reset()
    step = torch.compile(pair, backend="aot_eager", fullgraph=True)
    seeded = network()
    seed_dropout(seeded)
    for net in (network(0.0), network().eval(), seeded):
        student, teacher = step(net, x)
        assert torch.equal(student, teacher)


# ------------------------------------------------------------------------------------------------ by a seed


def test_masks_are_philoxs_and_scaled(x):
    net = network()
    seed = seed_dropout(net, seed=5)
    assert seed.layers == ["1", "3"]
    assert seed.left == {}
    hidden = net[0](x)
    keep = dropout_keep_mask(hidden, 0.4, 5, layer=0)
    torch.testing.assert_close(net[1](hidden), hidden * keep / (1 - round(0.4 * 65536) / 65536))
    assert net[1](hidden).dtype == hidden.dtype
    assert net[1](hidden.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_is_dropped_as_torchs_dropout_drops_it(dtype, bad):
    """0 times it is NaN: a 0 in its place would hide it, from the loss or from the optimizer."""
    ones = torch.ones(4, 4, 8, 8, dtype=dtype)
    layers = nn.Sequential(nn.Dropout(0.4))
    for seeded in (False, True):
        if seeded:
            seed_dropout(layers, seed=5)
        torch.manual_seed(3)
        keep = layers(ones) != 0
        assert 0.3 < float((~keep).float().mean()) < 0.5
        x = torch.full_like(ones, bad).requires_grad_()
        torch.manual_seed(3)
        y = layers(x)
        y.backward(torch.full_like(ones, bad))
        for values in (y.detach(), x.grad):
            assert bool(values[~keep].isnan().all())
            assert bool((values[keep].isinf() if bad == torch.inf else values[keep].isnan()).all())
        x = torch.full_like(ones, 3.0).requires_grad_()
        torch.manual_seed(3)
        y = layers(x)
        y.backward(ones)
        share = 1 - round(0.4 * 65536) / 65536 if seeded else 0.6
        torch.testing.assert_close(y, 3.0 * keep.to(dtype) / share)
        torch.testing.assert_close(x.grad, keep.to(dtype) / share)


@pytest.mark.parametrize("replaced", [False, True])
def test_a_probability_that_becomes_1_drops_everything_as_torchs_does(replaced):
    """By the layer, and after a norm whose kernel draws the mask otherwise."""
    net = nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU(), nn.Dropout(0.3))
    expected = copy.deepcopy(net)
    seed_dropout(net)
    if replaced:
        assert GroupNormSiLU.replace_in(net).changed
    net[2].p = expected[2].p = 1.0
    outcomes = []
    for each in (net, expected):
        x = torch.linspace(-1, 1, 32).reshape(2, 4, 4).requires_grad_()
        y = each(x)
        outcomes.append((y, *torch.autograd.grad(y.sum(), [x, each[0].weight])))
    assert all(map(torch.equal, *outcomes))
    assert torch.equal(outcomes[0][0], torch.zeros(2, 4, 4))
    net[2].p = 0.5
    assert 0 < net(x).count_nonzero() < 32


def test_a_layer_that_begins_by_dropping_everything_is_seeded_for_later(x):
    net = network(1.0)
    assert seed_dropout(net).layers == ["1", "3"]
    assert not net(x).any()
    net[3].p = 0.5
    assert torch.equal(net(x), net(x))


def test_masks_stay_until_the_seed_advances_and_differ_between_layers(x):
    net = network()
    seed = seed_dropout(net)
    first = net(x)
    torch.randn(9)
    assert torch.equal(net(x), first)
    seed.advance()
    assert not torch.equal(net(x), first)
    ones = torch.ones(64, 4, 8, 8)
    assert not torch.equal(net[1](ones), net[3](ones))
    assert float((net[1](ones) == 0).float().mean()) == pytest.approx(0.4, abs=0.02)


def test_evaluation_drops_nothing(x):
    net = network()
    expected = copy.deepcopy(net).eval()(x)
    seed_dropout(net)
    assert torch.equal(net.eval()(x), expected)


def test_torchs_generator_decides_the_seed_and_no_mask_moves_it(x):
    nets = [network(), network()]
    for net in nets:
        torch.manual_seed(6)
        seed_dropout(net)
    state = torch.get_rng_state()
    assert torch.equal(nets[0](x), nets[1](x))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_network_that_left_its_seed_behind_is_refused(x):
    net = network()
    seed = seed_dropout(net)
    net.to("meta")
    with pytest.raises(RuntimeError, match=r"seed is on cpu, its input on meta; move the network first"):
        net(x.to("meta"))
    seed.undo()
    assert seed_dropout(net).seed.device.type == "meta"
    assert net(x.to("meta")).device.type == "meta"


def test_a_copy_of_the_network_shares_the_masks(x):
    student = network()
    seed = seed_dropout(student)
    teacher = copy.deepcopy(student)
    for _ in range(2):
        assert torch.equal(student(x), teacher(x))
        seed.advance()


def test_a_recomputation_has_the_same_masks(x):
    net = network()
    seed_dropout(net)
    expected = torch.autograd.grad(net(x).square().sum(), list(net.parameters()))
    loss = checkpoint(net, x, use_reentrant=False, preserve_rng_state=False).square().sum()
    assert all(map(torch.equal, torch.autograd.grad(loss, list(net.parameters())), expected))


def test_micro_batches_have_masks_of_their_own_if_the_seed_advances_after_each_backward_pass():
    """Teacher, student and the student's recomputation share one; the gradient is that of all masks."""
    net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.25))
    seed = seed_dropout(net, seed=5)
    images, expected, masks = torch.randn(3, 6, 4), torch.zeros(8, 4), []
    for step, micro_batch in enumerate(images):
        with torch.no_grad():
            teacher = net(micro_batch)
        student = checkpoint(net, micro_batch, use_reentrant=False)
        assert torch.equal(student, teacher)
        student.sum().backward()
        seed.advance()
        keep = dropout_keep_mask((6, 8), 0.25, torch.tensor([5, step]))
        assert torch.equal(student != 0, keep)
        expected += (keep / 0.75).T @ micro_batch
        masks.append(keep)
    torch.testing.assert_close(net[0].weight.grad, expected)
    assert not any(torch.equal(a, b) for a, b in combinations(masks, 2))


def test_a_whole_step_compiles_and_sees_the_seed_advance(x):
    torch._dynamo.reset()
    net = network()
    seed = seed_dropout(net)
    step = torch.compile(pair, backend="aot_eager", fullgraph=True)
    outputs = []
    graphs = None
    for _ in range(3):
        student, teacher = step(net, x)
        assert torch.equal(student, teacher)
        assert torch.equal(student, net(x))
        outputs.append(student)
        seed.advance()
        graphs = graphs or torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert not torch.equal(outputs[0], outputs[1])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


def test_the_state_dict_stays_and_the_network_can_be_saved(x):
    net = network()
    keys = list(net.state_dict())
    seed_dropout(net)
    assert list(net.state_dict()) == keys
    again = pickle.loads(pickle.dumps(net))
    assert torch.equal(again(x), net(x))
    buffer = io.BytesIO()
    torch.save(net, buffer)


def test_it_can_be_undone_and_comes_once(x):
    net = network()
    seed = seed_dropout(net)
    assert seed_dropout(net).layers == []
    seed.undo()
    assert type(net[1]) is nn.Dropout
    torch.manual_seed(2)
    expected = network()
    torch.manual_seed(2)
    first = net(x)
    torch.manual_seed(2)
    assert torch.equal(expected(x), first)


def test_other_dropouts_are_left_and_named():
    class Special(nn.Dropout):
        pass

    seed = seed_dropout(nn.Sequential(Special(0.3), nn.Dropout(1.0), nn.Dropout(0.0)))
    assert seed.left == {"0": "Special is a dropout of its own"}
    assert seed.layers == ["1", "2"]
