"""`GroupNormSiLU.replace_in` on the blocks of other code bases: the same numbers, names and state dict."""

import copy
import importlib
import io
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ict_kernels import GroupNormSiLU, get_backend, seed_dropout
from ict_kernels import block_patterns as patterns
from ict_kernels.shared_dropout import SeededDropout

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
theirs = importlib.import_module("other_trainers")


# --------------------------------------------------------------------- EDM's block, restated for these tests


class GroupNorm(nn.Module):
    """EDM's own: no subclass of torch's."""

    def __init__(self, num_channels: int, num_groups: int = 4, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_groups, self.eps = num_groups, eps
        self.weight, self.bias = (
            nn.Parameter(torch.ones(num_channels)),
            nn.Parameter(torch.zeros(num_channels)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class AttentionOp(torch.autograd.Function):
    """softmax(q^T k / sqrt(c)), in fp32."""

    @staticmethod
    def forward(ctx, q, k):
        w = torch.einsum("ncq,nck->nqk", q.float(), k.float() / k.shape[1] ** 0.5).softmax(dim=2).to(q.dtype)
        ctx.save_for_backward(q, k, w)
        return w

    @staticmethod
    def backward(ctx, dw):
        q, k, w = ctx.saved_tensors
        db = w.float() * (dw.float() - (dw.float() * w.float()).sum(2, keepdim=True))
        scale = k.shape[1] ** -0.5
        dq, dk = torch.einsum("nck,nqk->ncq", k.float(), db), torch.einsum("ncq,nqk->nck", q.float(), db)
        return (dq * scale).to(q.dtype), (dk * scale).to(k.dtype)


class UNetBlock(nn.Module):
    """SiLU is a function here, norms are not torch's, and sums are made in place."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        adaptive_scale: bool = True,
        heads: int = 0,
    ) -> None:
        super().__init__()
        self.in_channels, self.num_heads, self.dropout, self.skip_scale = in_channels, heads, 0.2, 0.5**0.5
        self.adaptive_scale = adaptive_scale
        self.norm0, self.norm1 = GroupNorm(in_channels), GroupNorm(out_channels)
        self.conv0 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.affine = nn.Linear(emb_channels, out_channels * (2 if adaptive_scale else 1))
        self.conv1 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None
        if heads:
            self.norm2 = GroupNorm(out_channels)
            self.qkv, self.proj = (
                nn.Conv2d(out_channels, 3 * out_channels, 1),
                nn.Conv2d(out_channels, out_channels, 1),
            )

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        orig = x
        x = self.conv0(F.silu(self.norm0(x)))
        params = self.affine(emb)[:, :, None, None].to(x.dtype)
        if self.adaptive_scale:
            scale, shift = params.chunk(2, dim=1)
            x = F.silu(torch.addcmul(shift, self.norm1(x), scale + 1))
        else:
            x = F.silu(self.norm1(x.add_(params)))
        x = self.conv1(F.dropout(x, p=self.dropout, training=self.training))
        x = x.add_(orig if self.skip is None else self.skip(orig)) * self.skip_scale
        if self.num_heads:
            size = x.shape[0] * self.num_heads, x.shape[1] // self.num_heads, 3, -1
            q, k, v = self.qkv(self.norm2(x)).reshape(*size).unbind(2)
            a = torch.einsum("nqk,nck->ncq", AttentionOp.apply(q, k), v)
            x = self.proj(a.reshape(*x.shape)).add_(x) * self.skip_scale
        return x


# --------------------------------------------------------------------------------------------- what is equal


def untrained_to_trained(network: nn.Module) -> nn.Module:
    """Nothing at 0 or 1, where wrong code hides."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return network


def outcome(network: nn.Module, *inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The output of a training pass, dropout included, and all gradients."""
    torch.manual_seed(8)
    leaves = [each.detach().clone().requires_grad_() for each in inputs]
    output = network(*leaves)
    output = getattr(output, "sample", output)
    parameters = [each for each in network.parameters() if each.requires_grad]
    return output, list(torch.autograd.grad(output.square().sum(), [*parameters, *leaves], allow_unused=True))


def assert_same(ours: tuple[Tensor, list[Tensor]], expected: tuple[Tensor, list[Tensor]]) -> None:
    torch.testing.assert_close(ours[0], expected[0], rtol=1e-4, atol=1e-5)
    # Some gradients are 0 but for rounding, such as of a bias before a norm.
    largest = max(float(b.abs().max()) for b in expected[1] if b is not None)
    for a, b in zip(ours[1], expected[1], strict=True):
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5 * float(b.abs().max()) + 2e-6 * largest)


def calls_of_ours(network: nn.Module, monkeypatch: pytest.MonkeyPatch, *inputs: Tensor) -> int:
    """How often a pass calls group_norm_silu."""
    calls = []

    def counted(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    original = patterns.group_norm_silu
    monkeypatch.setattr(patterns, "group_norm_silu", counted)
    network(*inputs)
    monkeypatch.setattr(patterns, "group_norm_silu", original)
    return len(calls)


def guided(**options):
    return theirs.ResBlock(8, 12, 0.2, **options), (torch.randn(2, 8, 8, 6), torch.randn(2, 12))


def half(x):
    return F.avg_pool2d(x, 2)


class Middle(nn.Module):
    def forward(self, x):
        return half(x)


CASES = {
    "sequential": lambda: (
        nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(4, 8), nn.SiLU(), nn.Conv2d(8, 4, 1)),
        (torch.randn(2, 3, 5, 5),),
        1,
    ),
    "sequential, video, without weights": lambda: (
        nn.Sequential(nn.Conv3d(3, 8, 1), nn.GroupNorm(4, 8, affine=False, eps=1e-3), nn.SiLU()),
        (torch.randn(2, 3, 4, 5, 5),),
        1,
    ),
    "guided": lambda: (*guided(), 2),
    "guided, scale and shift": lambda: (*guided(use_scale_shift_norm=True), 2),
    "guided, other width": lambda: (*guided(out_channels=16, use_scale_shift_norm=True), 2),
    "guided, down": lambda: (*guided(updown=Middle()), 2),
    "edm, adaptive": lambda: (UNetBlock(8, 8, 6), (torch.randn(2, 8, 5, 5), torch.randn(2, 6)), 2),
    "edm, added, wider, attention": lambda: (
        UNetBlock(8, 16, 6, adaptive_scale=False, heads=2),
        (torch.randn(2, 8, 4, 4), torch.randn(2, 6)),
        2,
    ),
    "a U-Net of guided blocks": lambda: (
        theirs.Unet(8, 2, 0.2, num_groups=4),
        (torch.randn(2, 3, 8, 8), torch.randn(2)),
        15,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_numbers_gradients_and_state_dict_stay(name, monkeypatch):
    torch.manual_seed(0)
    network, inputs, norms = CASES[name]()
    untrained_to_trained(network)
    expected, keys = outcome(network, *inputs), list(network.state_dict())
    parameters = list(network.parameters())
    report = GroupNormSiLU.replace_in(network)
    assert report.left == {"norm2": _NO_SILU} if "attention" in name else report.left == {}
    assert calls_of_ours(network, monkeypatch, *inputs) == norms
    assert list(network.state_dict()) == keys
    assert all(a is b for a, b in zip(network.parameters(), parameters, strict=True))
    assert_same(outcome(network, *inputs), expected)


_NO_SILU = "no SiLU module follows it, nor is its block one known here"


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith(("guided", "edm"))])
def test_one_embedding_is_for_all_images_as_samplers_give_it(name):
    network, (x, embedding), _ = CASES[name]()
    untrained_to_trained(network)
    expected = outcome(network, x, embedding[:1])
    GroupNormSiLU.replace_in(network)
    assert_same(outcome(network, x, embedding[:1]), expected)


def assert_exports_for_any_batch(network: nn.Module, *inputs: Tensor) -> None:
    """Non-strict, as torch.export is by default: what asks for a size as a number makes it a constant."""
    network.eval()
    batch = {0: torch.export.Dim("batch", min=2, max=63)}  # diffusers does otherwise from 64 on
    exported = torch.export.export(network, inputs, dynamic_shapes=(batch,) * len(inputs), strict=False)
    larger = [torch.cat((each, each.flip(0), each)) for each in inputs]
    ours, expected = exported.module()(*larger), network(*larger)
    torch.testing.assert_close(getattr(ours, "sample", ours), getattr(expected, "sample", expected))
    network.train()


@pytest.mark.parametrize("name", ["guided", "guided, scale and shift", "sequential"])
def test_a_replaced_block_exports_for_any_batch(name):
    network, inputs, _ = CASES[name]()
    GroupNormSiLU.replace_in(untrained_to_trained(network))
    assert_exports_for_any_batch(network, *inputs)


@pytest.mark.parametrize("name", ["sequential", "guided, scale and shift", "edm, adaptive"])
def test_it_comes_once_and_can_be_undone(name, monkeypatch):
    network, inputs, norms = CASES[name]()
    classes = [type(each) for each in network.modules()]
    first = GroupNormSiLU.replace_in(network)
    again = GroupNormSiLU.replace_in(network)
    assert len(first.changed) == 1
    assert again.changed == {}
    assert set(again.left.values()) == {"replaced before"}
    assert len(again.left) == norms
    again.undo()
    assert calls_of_ours(network, monkeypatch, *inputs) == norms
    first.undo()
    assert [type(each) for each in network.modules()] == classes
    assert calls_of_ours(network, monkeypatch, *inputs) == 0


@pytest.mark.parametrize("name", ["sequential", "guided, scale and shift", "edm, adaptive"])
def test_copies_stay_replaced_and_pickles_hold_the_original(name, monkeypatch):
    network, inputs, norms = CASES[name]()
    original = type(network)
    GroupNormSiLU.replace_in(network)
    assert isinstance(network, original)
    ema = copy.deepcopy(network)
    assert calls_of_ours(ema, monkeypatch, *inputs) == norms
    assert all(a is not b for a, b in zip(ema.parameters(), network.parameters(), strict=True))
    again = pickle.loads(pickle.dumps(network))
    assert type(again) is original
    assert_same(outcome(again, *inputs), outcome(network, *inputs))
    buffer = io.BytesIO()
    torch.save(network, buffer)
    buffer.seek(0)
    assert type(torch.load(buffer, weights_only=False)) is original


@pytest.mark.parametrize("name", ["sequential", "guided, scale and shift", "edm, adaptive"])
def test_it_compiles_whole(name):
    torch._dynamo.reset()
    network, inputs, _ = CASES[name]()
    GroupNormSiLU.replace_in(network.eval())
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), network(*inputs))


SEEDED = {
    "sequential": lambda: (
        nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU(), nn.Dropout(0.3), nn.Conv2d(4, 4, 1)),
        (torch.randn(2, 4, 6, 5),),
    ),
    "guided, scale and shift": lambda: guided(use_scale_shift_norm=True),
    "guided, added": lambda: guided(),
}


@pytest.mark.parametrize("name", SEEDED)
def test_seeded_dropout_after_a_norm_goes_into_its_op_with_the_same_mask(name, monkeypatch):
    network, inputs = SEEDED[name]()
    untrained_to_trained(network)
    seed = seed_dropout(network, seed=11)
    for _ in range(2):
        expected = outcome(network, *inputs)
        report = GroupNormSiLU.replace_in(network)
        with monkeypatch.context() as patch:
            for layer in (nn.Dropout, SeededDropout):
                patch.setattr(layer, "forward", None)  # none is called
            assert_same(outcome(network, *inputs), expected)
        assert_same(outcome(network.eval(), *inputs), outcome(copy.deepcopy(network), *inputs))
        network.train()
        report.undo()
        seed.advance()


def test_a_block_may_get_a_class_of_its_own_afterwards():
    """As fully_shard gives one to each module that it shards: its mixin, and then the module's class."""
    block, inputs, _ = CASES["edm, added, wider, attention"]()
    untrained_to_trained(block)
    expected = outcome(block, *inputs)
    GroupNormSiLU.replace_in(block)

    class FSDPModule:
        pass

    block.__class__ = type("FSDPUNetBlock", (FSDPModule, type(block)), {})
    assert_same(outcome(block, *inputs), expected)
    assert type(pickle.loads(pickle.dumps(block))) is UNetBlock


def test_activation_checkpointing_around_a_guided_block_stays():
    """Their forward wraps _forward in it; only _forward is replaced."""
    block, _ = guided(use_scale_shift_norm=True)
    GroupNormSiLU.replace_in(block)
    assert type(block).forward is theirs.ResBlock.forward
    assert type(block)._forward is not theirs.ResBlock._forward


def test_parts_of_a_replaced_sequential_can_be_taken_out():
    network = untrained_to_trained(nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 4, 1)))
    x = torch.randn(2, 4, 3, 3)
    norm, rest, head = network[0](x), network[1:], network[:2]
    expected_rest, expected_head = rest(norm), head(x)
    GroupNormSiLU.replace_in(network)
    torch.testing.assert_close(network[0](x), norm)
    torch.testing.assert_close(network[1:](norm), expected_rest)
    torch.testing.assert_close(network[:2](x), expected_head)


def test_training_goes_on_with_the_same_optimizer():
    network, inputs, _ = CASES["guided"]()
    untrained_to_trained(network)
    other = copy.deepcopy(network)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.01) for each in (network, other)]
    GroupNormSiLU.replace_in(network)
    for _ in range(2):
        for each, optimizer in zip((network, other), optimizers, strict=True):
            optimizer.zero_grad()
            torch.manual_seed(3)
            each(*inputs).square().mean().backward()
            optimizer.step()
    for a, b in zip(network.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_blocks_whose_convolutions_are_half_precision_and_embeddings_are_not():
    """guided-diffusion's convert_to_fp16, in the half precision that a CPU convolves in."""
    block, (x, emb) = guided(use_scale_shift_norm=True)
    for module in untrained_to_trained(block).modules():
        if isinstance(module, nn.Conv2d):
            module.bfloat16()
    expected = block.eval()(x.bfloat16(), emb).double()
    assert list(GroupNormSiLU.replace_in(block).changed) == [""]
    torch.testing.assert_close(block(x.bfloat16(), emb).double(), expected, rtol=0.05, atol=0.05)


def test_modes_backend_and_generators_are_untouched():
    network = CASES["a U-Net of guided blocks"]()[0]
    network.middle[0].eval()
    modes, state = [each.training for each in network.modules()], torch.get_rng_state()
    GroupNormSiLU.replace_in(network)
    assert [each.training for each in network.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert get_backend() == "auto"
    assert all(not each._forward_pre_hooks for each in network.modules())


# ----------------------------------------------------------------------------------------- what is left alone


def test_blocks_of_a_known_name_that_compute_something_else_are_left():
    class ResBlock(theirs.ResBlock):
        def _forward(self, x, emb):
            return super()._forward(x, 1.01 * emb)

    class UNetBlockOfOthers(UNetBlock):
        def forward(self, x, emb):
            return super().forward(x, emb.flip(0))

    UNetBlockOfOthers.__name__ = "UNetBlock"
    block = ResBlock(8, 12, 0.0, use_scale_shift_norm=True)
    report = GroupNormSiLU.replace_in(nn.ModuleList([block, UNetBlockOfOthers(8, 8, 6)]))
    assert type(block) is ResBlock
    assert report.left["1.norm0"] == "UNetBlock is another one than this package knows"
    # its Sequentials are what they are, and can be
    assert report.changed == {"0.in_layers": "Sequential, 0", "0.out_layers": "Sequential, 0"}
    x, emb = torch.randn(2, 8, 8, 8), torch.randn(2, 12)
    expected = ResBlock(8, 12, 0.0, use_scale_shift_norm=True)
    expected.load_state_dict(block.state_dict())
    torch.testing.assert_close(block(x, emb), expected(x, emb))


def test_another_norm_of_that_name_is_left():
    class GroupNorm32(nn.GroupNorm):
        def forward(self, input):
            return super().forward(input) + 1

    report = GroupNormSiLU.replace_in(nn.Sequential(GroupNorm32(2, 4), nn.SiLU()))
    assert report.left == {"0": "GroupNorm32 computes something else than group norm"}
    report = GroupNormSiLU.replace_in(nn.Sequential(GroupNorm32(2, 4, affine=False), nn.SiLU()))
    assert report.left["0"].startswith("GroupNorm32 could not be tried")


class GainSiLU(nn.SiLU):
    """EDM2's, which keeps the variance."""

    def forward(self, input):
        return super().forward(input) / 0.596


class ClippedSiLU(nn.SiLU):
    """Another function far from 0 alone, where a norm of untrained weights does not get to."""

    def forward(self, input):
        return super().forward(input).clamp(max=20.0)


class LearntSiLU(nn.SiLU):
    """SiLU only until it is trained."""

    def __init__(self):
        super().__init__()
        self.beta = nn.Parameter(torch.ones(()))

    def forward(self, input):
        return input * torch.sigmoid(self.beta * input)


def named_silu(forward) -> nn.Module:
    return type("SiLU", (nn.Module,), {"forward": lambda self, x: forward(x)})()


class UNet2DModel(nn.Module):
    """The end of diffusers' U-Nets."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.conv_norm_out, self.conv_act = nn.GroupNorm(2, 8), act

    def forward(self, x):
        return self.conv_act(self.conv_norm_out(x))


def guided_with(act: nn.Module) -> nn.Module:
    block = theirs.ResBlock(8, 12, 0.0)
    block.in_layers[1], block.out_layers[1] = act, copy.deepcopy(act)
    return block


def diffusers_with(act: nn.Module) -> nn.Module:
    resnet = pytest.importorskip("diffusers.models.resnet")
    block = resnet.ResnetBlock2D(in_channels=8, temb_channels=12, groups=4)
    block.nonlinearity = act
    return block


PLACES = {
    "Sequential": lambda act: nn.Sequential(nn.GroupNorm(2, 8), act),
    "UNet2DModel": UNet2DModel,
    "ResBlock": guided_with,
    "ResnetBlock2D": diffusers_with,
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "act", [GainSiLU(), ClippedSiLU(), named_silu(lambda x: x * torch.sigmoid(1.702 * x)), LearntSiLU()]
)
def test_an_activation_that_is_no_silu_is_left(act, place):
    network = PLACES[place](act)
    classes = [type(each) for each in network.modules()]
    report = GroupNormSiLU.replace_in(network)
    assert [type(each) for each in network.modules()] == classes
    why = "has parameters of its own" if isinstance(act, LearntSiLU) else "computes something else than SiLU"
    assert set(report.left.values()) == {f"{type(act).__name__} {why}"}


@pytest.mark.parametrize("place", PLACES)
def test_a_silu_of_another_class_that_computes_it_is_replaced(place):
    """guided-diffusion's."""
    report = GroupNormSiLU.replace_in(PLACES[place](named_silu(lambda x: x * torch.sigmoid(x))))
    assert (list(report.changed), report.left) == ([""], {})


def test_an_edm_block_whose_activation_is_another_function_is_left(monkeypatch):
    silu = F.silu
    functions = SimpleNamespace(**vars(F) | {"silu": lambda x: silu(x) / 0.596})
    monkeypatch.setitem(UNetBlock.forward.__globals__, "F", functions)
    report = GroupNormSiLU.replace_in(UNetBlock(8, 8, 6))
    assert report.left == dict.fromkeys(
        ("norm0", "norm1"), "UNetBlock is another one than this package knows"
    )


def test_the_end_of_a_unet_whose_silu_has_hooks_or_was_patched_is_left():
    network = UNet2DModel(nn.SiLU())
    handle = network.conv_act.register_forward_pre_hook(lambda _, given: (2 * given[0],))
    assert GroupNormSiLU.replace_in(network).left == {
        "conv_norm_out": "the SiLU has hooks, which would not run"
    }
    handle.remove()
    network.conv_act.forward = F.relu
    assert "replaced by something else" in GroupNormSiLU.replace_in(network).left["conv_norm_out"]


def test_norms_with_hooks_and_patched_blocks_are_left():
    network = nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU())
    for kind in ("forward", "forward_pre", "full_backward", "full_backward_pre"):
        handle = getattr(network[0], f"register_{kind}_hook")(lambda *_: None)
        assert GroupNormSiLU.replace_in(network).left == {"0": "the norm has hooks, which would not run"}
        handle.remove()
    network.forward = lambda x: x
    assert "replaced by something else before" in GroupNormSiLU.replace_in(network).left["0"]


@pytest.mark.parametrize("hooked", ["in_layers", "in_layers.1", "out_layers", "out_layers.1"])
def test_hooks_on_parts_of_a_block_run_as_before(hooked):
    block, inputs = guided()
    calls = []
    block.get_submodule(hooked).register_forward_hook(lambda *_: calls.append(hooked))
    report = GroupNormSiLU.replace_in(block)
    assert "" not in report.changed  # its Sequentials may be
    calls.clear()
    block(*inputs)
    assert calls == [hooked]


def test_a_silu_with_hooks_or_a_patched_pass_is_left():
    network = nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU())
    handle = network[1].register_forward_hook(lambda *_: None)
    assert GroupNormSiLU.replace_in(network).left == {"0": "the SiLU has hooks, which would not run"}
    handle.remove()
    network[1].forward = lambda x: x
    assert "replaced by something else before" in GroupNormSiLU.replace_in(network).left["0"]


def test_norms_without_a_silu_are_left_and_named():
    network = nn.Sequential(nn.GroupNorm(2, 4), nn.ReLU(), nn.GroupNorm(2, 4))
    report = GroupNormSiLU.replace_in(network)
    assert report.left == {"0": _NO_SILU, "2": _NO_SILU}
    text = str(report)
    assert text.splitlines()[0] == "group norm + SiLU: 0 blocks replaced, 2 norms left"
    assert f"  left      2: {_NO_SILU}" in text


def test_a_silu_that_serves_in_other_places_too_is_left():
    network = UNet2DModel(nn.SiLU())
    network.time_embedding = nn.Sequential(nn.Linear(8, 8), network.conv_act)  # as older diffusers has it
    report = GroupNormSiLU.replace_in(network)
    assert report.left == {"conv_norm_out": "its SiLU is used in other places too"}
    assert type(network.conv_act) is nn.SiLU


def test_blocks_on_the_meta_device_are_left():
    with torch.device("meta"):
        block = UNetBlock(8, 8, 6)
    assert "meta device" in GroupNormSiLU.replace_in(block).left["norm0"]


def test_a_block_is_tried_where_it_is_whatever_torchs_default_device():
    block, _ = guided()
    with torch.device("meta"):
        report = GroupNormSiLU.replace_in(block)
    assert report.changed, report


def test_our_own_modules_are_no_group_norms_to_replace():
    report = GroupNormSiLU.replace_in(nn.Sequential(GroupNormSiLU(2, 4), nn.SiLU()))
    assert (report.changed, report.left) == ({}, {})


# ----------------------------------------------------------------------------------------- the real diffusers


@pytest.mark.parametrize("norm", ["default", "scale_shift"])
def test_a_real_unet_of_diffusers(norm, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    network = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        resnet_time_scale_shift=norm,
        dropout=0.2,
        attention_head_dim=8,
    )
    untrained_to_trained(network)
    inputs = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 700.0])
    expected, keys = outcome(network, *inputs), list(network.state_dict())
    report = GroupNormSiLU.replace_in(network)
    blocks = [name for name, each in network.named_modules() if type(each).__name__ == "ResnetBlock2D"]
    assert set(report.changed) == {"", *blocks}
    assert len(blocks) >= 8
    assert all("attentions" in name for name in report.left)
    assert calls_of_ours(network, monkeypatch, *inputs) == 2 * len(blocks) + 1
    assert list(network.state_dict()) == keys
    assert_same(outcome(network, *inputs), expected)
    assert_exports_for_any_batch(network, *inputs)
    report.undo()
    assert calls_of_ours(network, monkeypatch, *inputs) == 0
    assert torch.equal(outcome(network, *inputs)[0], expected[0])
