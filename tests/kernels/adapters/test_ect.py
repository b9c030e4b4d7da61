"""ECT's loss class, called as ECT's, EDM's and EDM2's trainers call theirs."""

import copy
import pickle

import pytest
import torch
from torch import nn

from ict_kernels.adapters import apply_ict_kernels_to_ect
from ict_kernels.adapters.ect import ECMLoss

NAME = "ict_kernels.adapters.ect.ECMLoss"


@pytest.fixture
def net(theirs, network):
    return theirs.EDMPrecond(network)


@pytest.mark.parametrize("options", [{}, {"c": 0.03}, {"c": 0.03, "k": 2.0, "b": 3.0, "q": 4}])
@pytest.mark.parametrize("stage", [0, 3])
def test_without_dropout_it_is_ects_loss_in_float64(theirs, images, same_gradients, options, stage):
    torch.manual_seed(0)
    network = nn.Conv2d(3, 3, 3, padding=1)

    class Net(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x, noise):
            return self.inner(x) * noise.clamp(-9, 9).reshape(-1, 1, 1, 1)

    net, double = theirs.EDMPrecond(Net(network)), theirs.EDMPrecond(Net(copy.deepcopy(network).double()))
    loss = ECMLoss(**options)
    loss.update_schedule(stage)
    torch.manual_seed(5)
    value = loss(net=net, images=images, labels=None, augment_pipe=None)
    assert value.shape == (6,)
    assert value.dtype == torch.float32

    torch.manual_seed(5)
    t, y, _, noise = theirs.ect_draws(images, -1.1, 2.0)
    t, y, noise = t.double(), y.double(), noise.double()
    q, k, b, c = options.get("q", 2), options.get("k", 8.0), options.get("b", 1.0), options.get("c", 0.0)
    r = (t * (1 - (1 + k / (1 + (b * t).exp())) / q ** (stage + 1))).clamp(min=0)
    assert bool((r == 0).any()) is (stage == 0 and q == 2)  # so both branches are met

    def denoised(sigma):
        output = double.network((y + noise * sigma) / (sigma**2 + 0.25).sqrt(), sigma.flatten().log() / 4)
        variance = sigma**2 + 0.25
        return 0.25 / variance * (y + noise * sigma) + sigma * 0.5 / variance.sqrt() * output

    teacher = torch.where(r > 0, denoised(torch.where(r > 0, r, t)), y).detach()
    squared = (denoised(t) - teacher).flatten(1).square().sum(1)
    expected = ((squared + c**2).sqrt() - c) / (t - r).flatten()
    torch.testing.assert_close(value.double(), expected, rtol=2e-4, atol=1e-6)
    same_gradients(network, value.mean(), double.network.inner, expected.mean())


def test_it_equals_theirs_on_the_same_draws_where_no_dropout_is(theirs, network, images):
    network.dropout.p = 0.0
    net = theirs.EDMPrecond(network)
    for c in (0.0, 0.03):
        own, ours = theirs.ECMLoss(c=c), ECMLoss(c=c)
        own.stage = 2
        ours.update_schedule(2)
        torch.manual_seed(1)
        expected = own(net, images)
        torch.manual_seed(1)
        torch.testing.assert_close(ours(net, images), expected, rtol=1e-4, atol=1e-5)


def test_at_a_distance_of_zero_the_gradient_is_zero_where_theirs_is_nan(theirs, images):
    """ECT's default c = 0 is a bare root."""

    class Zero(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))

        def forward(self, x, sigma, labels=None, augment_labels=None):
            return self.weight * x

    net = Zero()
    own, ours = theirs.ECMLoss(), ECMLoss()
    for loss, wanted in ((own, False), (ours, True)):
        loss.stage = 20  # r is t but for a millionth, never 0
        (gradient,) = torch.autograd.grad(loss(net, images).sum(), net.parameters())
        assert bool(gradient.isfinite()) is wanted


def test_the_schedule_is_ects():
    loss = ECMLoss(q=4)
    assert (loss.stage, loss.ratio) == (0, 0.0)
    for stage in range(4):
        loss.update_schedule(stage)
        assert loss.ratio == 1 - 4.0 ** -(stage + 1)
    t = torch.logspace(-3, 2, 50, dtype=torch.float64)
    assert (loss.t_to_r(t) < t).all()
    assert torch.equal(ECMLoss(adj="const", q=4).t_to_r(t), t * 0.75)
    with pytest.raises(ValueError, match="adj must be 'sigmoid' or 'const', got 'cosine'"):
        ECMLoss(adj="cosine")


def test_student_and_teacher_share_the_dropout_mask_on_a_cpu_too(theirs, net, network, images):
    ECMLoss()(net, images)
    assert torch.equal(*network.masks)
    network.masks.clear()
    theirs.ECMLoss()(net, images)
    assert not torch.equal(*network.masks)  # theirs rewinds the GPU's generator alone


def test_no_network_sees_a_level_of_zero(net, network, images):
    ECMLoss()(net, images)
    assert all(level.isfinite().all() for _, level in network.inputs)


def test_edms_trainers_make_it_by_name_and_pickle_it(theirs, net, images):
    loss = theirs.construct_class_by_name(
        class_name=NAME, P_mean=-0.8, P_std=1.6, sigma_data=0.5, q=2, c=0.06
    )
    loss.update_schedule(1)
    again = pickle.loads(pickle.dumps({"ema": None, "loss_fn": loss}))["loss_fn"]
    values = []
    for each in (loss, again):
        torch.manual_seed(2)
        values.append(each(net=net, images=images, labels=None))
        values[-1].sum().mul(1 / 6).backward()  # EDM's reduction
    assert torch.equal(*values)
    assert again.stage == 1


def test_edm2s_checkpoints_take_its_state_without_pickled_classes(tmp_path):
    loss = ECMLoss(c=0.06, adj="const")
    loss.update_schedule(4)
    torch.save({"loss_fn": loss.__getstate__()}, tmp_path / "state.pt")
    other = ECMLoss()
    other.__dict__.clear()
    other.__dict__.update(torch.load(tmp_path / "state.pt", weights_only=True)["loss_fn"])
    assert vars(other) == vars(loss)


def test_networks_that_normalise_their_weights_in_place_can_be_trained(images):
    """EDM2's do, in training mode: the teacher's pass after the student's is an error in its gradient."""

    class Normalised(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 3, 1, 1))

        def forward(self, x, sigma, labels=None):  # and it knows no augment_labels
            with torch.no_grad():
                self.weight.copy_(self.weight / self.weight.norm())
            return nn.functional.conv2d(x, self.weight / self.weight.norm())

    net = Normalised()
    student = net(images, None)
    with torch.no_grad():
        net(images, None)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        student.sum().backward()
    ECMLoss()(net, images).mean().backward()
    assert net.weight.grad.isfinite().all()


def test_edm2s_network_trains_with_ddp_once_what_its_own_loss_reads_is_frozen(images, tmp_path):
    class Precond(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.logvar_linear = nn.Conv2d(3, 3, 1), nn.Linear(4, 1)

        def forward(self, x, sigma, labels=None, return_logvar=False):
            return self.conv(x)

    def train(net):
        parallel = nn.parallel.DistributedDataParallel(net)
        for _ in range(3):
            ECMLoss()(parallel, images).mean().backward()

    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        with pytest.raises(RuntimeError, match="parameters that were not used"):
            train(Precond())
        net = Precond()
        net.logvar_linear.requires_grad_(False)
        train(net)
        assert net.conv.weight.grad.abs().sum() > 0
    finally:
        torch.distributed.destroy_process_group()


def test_under_autocast_every_weight_has_its_gradient(net, images, monkeypatch):
    """Older torch gives the student the casts that the teacher made without gradients; 2.13 does not."""
    calls = []
    clear = torch.clear_autocast_cache
    monkeypatch.setattr(torch, "clear_autocast_cache", lambda: (calls.append("forget"), clear()))
    net.register_forward_hook(lambda *_: calls.append("pass"))
    with torch.autocast("cpu", torch.bfloat16):
        loss = ECMLoss()(net, images).mean()
        between = "".join(calls).split("pass")[1]  # the two passes
        assert "forget" in between
    loss.backward()
    without = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


def test_labels_and_augmentation_reach_the_network(images):
    calls = []

    def net(x, sigma, labels, augment_labels=None):
        calls.append((sigma.shape, labels, augment_labels))
        return 0.5 * x

    labels, augment_labels = torch.eye(6), torch.ones(6, 9)
    loss = ECMLoss()(net, images, labels, lambda each: (each.flip(3), augment_labels))
    assert len(calls) == 2
    assert all(shape == (6, 1, 1, 1) and a is labels and b is augment_labels for shape, a, b in calls)
    assert loss.shape == (6,)


def test_an_empty_batch_gives_an_empty_loss(net):
    assert ECMLoss()(net, torch.zeros(0, 3, 8, 8)).shape == (0,)


def test_the_patch_puts_it_where_ects_trainer_finds_it(theirs, a_module):
    module = a_module("training.loss", ECMLoss=theirs.ECMLoss)
    with apply_ict_kernels_to_ect(module) as patch:
        assert patch.changed == ["training.loss.ECMLoss"]
        assert module.ECMLoss is ECMLoss
        assert apply_ict_kernels_to_ect(module).changed == []
    assert module.ECMLoss is theirs.ECMLoss
    with pytest.raises(ValueError, match="has no ECMLoss"):
        apply_ict_kernels_to_ect(a_module("training"))


@pytest.mark.parametrize(("q", "last"), [(2, 21), (4, 10), (256, 1)])
def test_stages_end_where_fp32_tells_the_levels_apart_no_more(q, last):
    images = torch.rand(256, 3, 4, 4)
    for adj in ("sigmoid", "const"):
        loss = ECMLoss(q=q, adj=adj)
        loss.update_schedule(last)
        assert loss(lambda x, sigma, labels: 0.9 * x, images).isfinite().all()
        with pytest.raises(ValueError, match=f"stop at stage {last} or before"):
            loss.update_schedule(last + 1)
        assert loss.stage == last
