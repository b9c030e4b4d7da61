"""One step: non-finite gradients, accumulation, precision, the averages."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ict_fast import consistency
from ict_fast.config import Config
from ict_fast.errors import InputError
from ict_fast.training.averages import ema_decay
from ict_fast.training.loss_scale import LossScale
from ict_fast.training.step import TrainStep, describe_trunk, learning_rate, require_arithmetic, trunk_dtype

CPU = torch.device("cpu")
Batches = Callable[..., list]


def _vector(step: TrainStep) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in step.network.parameters()])


def test_a_non_finite_gradient_changes_nothing_and_is_counted(tiny: Config, batches: Batches) -> None:
    train_step = TrainStep(replace(tiny, method=replace(tiny.method, teacher="ema")), CPU)
    train_step(0, batches(tiny))
    before = copy.deepcopy(train_step.tensors())

    def poison(parameter: torch.Tensor) -> None:
        parameter.grad.view(-1)[0] = torch.nan  # type: ignore[union-attr]

    victim = next(iter(train_step.network.parameters()))
    handle = victim.register_post_accumulate_grad_hook(poison)
    train_step(1, batches(tiny, 1))
    train_step(2, batches(tiny, 2))
    after = train_step.tensors()
    for file in ("weights", "ema", "teacher"):
        assert all(torch.equal(before[file][name], after[file][name]) for name in before[file]), file
    moments = [name for name in before["optimizer"] if name.endswith(("exp_avg", "exp_avg_sq", ".step"))]
    assert len(moments) == 3 * len(list(train_step.network.parameters()))
    assert all(torch.equal(before["optimizer"][name], after["optimizer"][name]) for name in moments)
    assert int(train_step.optimizer.skipped) == 2
    assert int(train_step.skipped_in_a_row) == 2

    handle.remove()
    stuck = _vector(train_step)
    train_step(3, batches(tiny, 3))
    assert int(train_step.optimizer.skipped) == 2
    train_step.reset_losses()
    train_step(4, batches(tiny, 4))
    assert int(train_step.skipped_in_a_row) == 0
    assert not torch.equal(_vector(train_step), stuck), "training goes on"


def test_a_step_restored_from_what_another_one_holds_holds_the_same_bits(
    one_level: Config, batches: Batches
) -> None:
    """The counts of skipped steps, too: the gradients of steps 0, 1 and 3 are not finite."""
    config = replace(
        one_level,
        method=replace(one_level.method, teacher="ema"),
        optimizer=replace(one_level.optimizer, ema_decays=(0.9,), power_ema=(0.1,)),
        training=replace(one_level.training, precision="fp16", batch_size=4),
    )
    train_step = TrainStep(config, CPU)
    parameter = next(iter(train_step.network.parameters()))
    for step in range(4):
        factor = 1.0 if step == 2 else torch.inf
        handle = parameter.register_hook(lambda gradient, factor=factor: gradient * factor)
        train_step(step, batches(config, step))
        handle.remove()
    saved = copy.deepcopy(train_step.tensors())
    counts = [int(saved["optimizer"][name]) for name in ("skipped", "skipped_in_a_row", "skipping_since")]
    assert counts == [3, 2, 1]
    restored = TrainStep(config, CPU)
    restored.restore(SimpleNamespace(state={}, tensors=saved.__getitem__))  # type: ignore[arg-type]
    held = restored.tensors()
    assert held.keys() == saved.keys()
    for file, tensors in saved.items():
        assert held[file].keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(held[file][name], tensor), f"{file}/{name}"


def test_a_step_trains_on_the_mirrored_image_where_its_flip_is_set(
    one_level: Config, batches: Batches
) -> None:
    [batch] = batches(one_level)
    mirrored = torch.where(batch.flip.bool().view(-1, 1, 1, 1), batch.images.flip(2), batch.images)
    gradients = []
    for given in (batch, batch._replace(images=mirrored, flip=None), batch._replace(flip=None)):
        train_step = TrainStep(one_level, CPU)
        train_step.begin(0)
        train_step.gradient([given])
        gradients.append(torch.cat([p.grad.flatten() for p in train_step.network.parameters()]))
    assert torch.equal(gradients[0], gradients[1])
    assert not torch.equal(gradients[0], gradients[2])


def test_accumulation_gives_the_gradient_of_the_whole_batch(tiny: Config, batches: Batches) -> None:
    vectors = []
    for size in (16, 4):
        train_step = TrainStep(tiny, CPU)
        for step in range(3):
            train_step(step, batches(tiny, step, size))
        vectors.append(_vector(train_step).double())
    assert float((vectors[0] - vectors[1]).norm() / vectors[0].norm()) < 1e-5


def test_ema_follows_its_recurrence(tiny: Config, batches: Batches) -> None:
    train_step = TrainStep(tiny, CPU)
    expected = _vector(train_step).double()
    for step in range(4):
        train_step(step, batches(tiny, step))
        decay = min(0.999, (step + 1) / (step + 10))
        expected = decay * expected + (1 - decay) * _vector(train_step).double()
    weights = train_step.ema_weights()
    names = [name for name, _ in train_step.network.named_parameters()]
    ours = torch.cat([weights[name].flatten() for name in names]).double()
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-7)


def test_ema_files_hold_the_buffers_of_the_network(tiny: Config, batches: Batches) -> None:
    train_step = TrainStep(tiny, CPU)
    train_step(0, batches(tiny))
    ema, saved = train_step.ema_weights(), train_step.network.state_dict()
    buffers = saved.keys() - dict(train_step.network.named_parameters()).keys()
    assert ema.keys() == saved.keys()
    assert buffers, "NCSN++ has Fourier frequencies"
    assert all(torch.equal(ema[name], saved[name]) for name in buffers)


def test_warm_up_of_the_ema() -> None:
    assert [ema_decay(0.999, k, warmup=True) for k in (0, 9, 10**6)] == pytest.approx([0.1, 10 / 19, 0.999])
    assert ema_decay(0.999, 0, warmup=False) == 0.999


def test_the_learning_rate_falls_in_a_line_to_0_over_the_end_of_the_run(tiny: Config) -> None:
    rate, total = tiny.optimizer.lr, tiny.training.total_steps
    falling = replace(tiny, optimizer=replace(tiny.optimizer, lr_decay=0.25))
    rates = [learning_rate(k, falling) for k in range(total)]
    assert rates[: total * 3 // 4 + 1] == [rate] * (total * 3 // 4 + 1)
    assert np.diff(rates, 2)[total * 3 // 4 :] == pytest.approx(0, abs=1e-12)
    assert rates[-1] == pytest.approx(rate / (total / 4))
    constant = replace(tiny, optimizer=replace(tiny.optimizer, lr_decay=0.0))
    assert {learning_rate(k, constant) for k in range(total)} == {rate}


def test_the_learning_rate_rises_in_a_line_from_0_over_the_warm_up(tiny: Config) -> None:
    rate = tiny.optimizer.lr
    rising = replace(tiny, optimizer=replace(tiny.optimizer, warmup_steps=8, lr_decay=0.5))
    rates = [learning_rate(k, rising) for k in range(24)]
    assert rates[:9] == pytest.approx([rate * k / 8 for k in range(9)])
    assert rates[8:13] == [rate] * 5
    assert rates[12:] == pytest.approx([rate * (24 - k) / 12 for k in range(12, 24)])


@pytest.mark.parametrize(
    ("change", "steps", "ratio"), [({"lr_decay": 1.0}, (0, 12), 0.5), ({"warmup_steps": 8}, (8, 2), 0.25)]
)
def test_a_step_takes_the_learning_rate_of_its_number(
    tiny: Config, batches: Batches, change: dict, steps: tuple[int, int], ratio: float
) -> None:
    """A first RAdam step is -rate times the gradient: so the change of the weights scales with the rate."""
    config = replace(tiny, optimizer=replace(tiny.optimizer, **change))
    changes = []
    for step in steps:
        train_step = TrainStep(config, CPU)
        before = _vector(train_step).double()
        train_step(step, batches(config))
        gradient = torch.cat(
            [p.grad.flatten() for p in train_step.network.parameters() if p.grad is not None]
        )
        changes.append(((before - _vector(train_step).double()).norm() / gradient.norm()).item())
    assert changes[1] / changes[0] == pytest.approx(ratio, rel=1e-3)


def test_a_first_step_is_as_long_as_the_rate_times_the_norm_that_is_clipped_to(
    tiny: Config, batches: Batches
) -> None:
    config = replace(tiny, optimizer=replace(tiny.optimizer, clip_norm=0.25))
    train_step = TrainStep(config, CPU)
    before = _vector(train_step).double()
    train_step(0, batches(config))
    assert train_step.optimizer.grad_norm > 1
    change = (before - _vector(train_step).double()).norm().item()
    assert change == pytest.approx(config.optimizer.lr * 0.25, rel=1e-3)


def test_ema_teacher_follows_its_recurrence(tiny: Config, batches: Batches) -> None:
    config = replace(tiny, method=replace(tiny.method, teacher="ema"))
    train_step = TrainStep(config, CPU)
    assert train_step.teacher is not None
    expected = _vector(train_step).double()
    for step in range(4):
        train_step(step, batches(config, step))
        scales = consistency.num_scales(step, config.training.total_steps, config.method)
        decay = 0.9 ** (config.method.s0 / scales)
        expected = decay * expected + (1 - decay) * _vector(train_step).double()
    teacher = torch.cat([p.flatten() for p in train_step.teacher.parameters()]).double()
    torch.testing.assert_close(teacher, expected, rtol=1e-5, atol=1e-7)


def test_the_ema_teacher_computes_in_tf32_as_the_student_does(one_level: Config, batches: Batches) -> None:
    """Before the first update it is the student: so is the loss, to the last bit."""
    weights = TrainStep(one_level, CPU).network.state_dict()
    generator = torch.Generator().manual_seed(1)
    for name, tensor in weights.items():  # fresh networks end in zeros, where no rounding shows
        weights[name] = tensor + 0.05 * torch.randn(tensor.shape, generator=generator)
    losses = []
    for teacher, precision in (("student", "tf32"), ("ema", "tf32"), ("ema", "fp32")):
        config = replace(
            one_level,
            method=replace(one_level.method, teacher=teacher),
            training=replace(one_level.training, precision=precision),
        )
        train_step = TrainStep(config, CPU, initial=weights)
        train_step(0, batches(config))
        losses.append(float(train_step.losses.sum))
    assert losses[0] == losses[1] != losses[2]


def test_precision_auto_is_what_the_device_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 from Ampere on, fp16 on the tensor cores before it, fp32 on a CPU; a wrong choice is refused."""
    gpu = torch.device("cuda")
    assert trunk_dtype("auto", CPU) is None
    assert trunk_dtype("bf16", CPU) is torch.bfloat16
    assert trunk_dtype("fp16", CPU) is torch.float16
    assert trunk_dtype("fp32", gpu) is None
    require_arithmetic("bf16", CPU)
    for name, capability, auto in (
        ("Tesla V100-SXM2-32GB", (7, 0), torch.float16),
        ("Tesla T4", (7, 5), torch.float16),
        ("NVIDIA A100-SXM4-80GB", (8, 0), torch.bfloat16),
        ("NVIDIA H200", (9, 0), torch.bfloat16),
        ("NVIDIA B200", (10, 0), torch.bfloat16),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, found=name: found)
        assert trunk_dtype("auto", gpu) is auto, name
        require_arithmetic("auto", gpu)
        require_arithmetic("fp16", gpu)
        for precision in ("bf16", "tf32"):
            if auto is torch.float16:
                refusal = rf"precision is {precision}, which {name} \(compute capability 7\.\d\) has not"
                with pytest.raises(InputError, match=refusal):
                    require_arithmetic(precision, gpu)
            else:
                require_arithmetic(precision, gpu)
        said = describe_trunk("auto", gpu)
        assert said is None if auto is torch.bfloat16 else said is not None and said.startswith(name)
        assert describe_trunk("fp32", gpu) is None


@pytest.mark.parametrize(("half", "least"), [("bf16", 0.99), ("fp16", 0.9999)])
def test_gradients_of_a_half_precision_trunk_are_those_of_fp32_up_to_its_rounding(
    tiny: Config, batches: Batches, half: str, least: float
) -> None:
    gradients = []
    for precision in ("fp32", half):
        config = replace(tiny, training=replace(tiny.training, precision=precision))
        train_step = TrainStep(config, CPU)
        with torch.no_grad():  # fresh networks end in zeros, where every gradient but the last is zero
            for number, parameter in enumerate(train_step.network.parameters()):
                generator = torch.Generator().manual_seed(number)
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        train_step(0, batches(config))
        parameters = dict(train_step.network.named_parameters())
        missing = [name for name, parameter in parameters.items() if parameter.grad is None]
        assert missing == []
        assert {p.grad.dtype for p in parameters.values()} == {torch.float32}  # type: ignore[union-attr]
        gradients.append(torch.cat([p.grad.flatten() for p in parameters.values()]))  # type: ignore[union-attr]
    cosine = torch.nn.functional.cosine_similarity(*gradients, dim=0)
    assert least < float(cosine) < 1 - 1e-9


def test_the_loss_scale_halves_with_a_step_that_overflows_and_doubles_after_many_that_did_not() -> None:
    scale = LossScale(CPU)
    no, yes = torch.tensor(False), torch.tensor(True)
    first = float(scale.value)
    seen = []
    for skipped in [*[no] * 399, yes, *[no] * 400, *[no] * 400]:
        scale.advance(skipped)
        seen.append(float(scale.value) / first)
    assert seen == [1] * 399 + [0.5] * 400 + [1.0] * 400 + [2.0]
    for _ in range(40):
        scale.advance(yes)
    assert float(scale.value) == 1


def test_the_loss_scale_changes_no_weight_and_an_overflow_skips_the_step(
    tiny: Config, batches: Batches
) -> None:
    """Powers of two scale exactly, but for what is too small for fp16."""
    config = replace(tiny, training=replace(tiny.training, precision="fp16"))
    ends = []
    for first in (2.0**6, 2.0**10):
        train_step = TrainStep(config, CPU)
        assert train_step.loss_scale is not None
        train_step.loss_scale.value.fill_(first)
        for step in range(3):
            train_step(step, batches(config, step))
        assert int(train_step.optimizer.skipped) == 0
        ends.append(_vector(train_step))
    torch.testing.assert_close(*ends, rtol=1e-3, atol=1e-5)
    train_step.loss_scale.value.fill_(1e30)
    train_step(3, batches(config, 3))
    assert int(train_step.optimizer.skipped) == 1
    assert torch.equal(_vector(train_step), ends[1])
    assert float(train_step.loss_scale.value) < 1e30
