"""The trunk's arithmetic is chosen by what its rounding does, and the choice lasts."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import signal
import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ict_fast.checkpoint import open_checkpoint
from ict_fast.config import Config
from ict_fast.data.loaders import Batch
from ict_fast.errors import DivergedError
from ict_fast.networks import unet
from ict_fast.planning import make_plan
from ict_fast.planning.plan import CALIBRATION_PIECES, GRADIENTS_ALIVE, RUNTIME_BYTES
from ict_fast.training import precision, step
from ict_fast.training.loss_by_sigma import BUCKETS
from ict_fast.training.precision import PIECES, Rounding, measure_rounding
from ict_fast.training.reduction import Alone
from ict_fast.training.step import TrainStep
from ict_fast.training.trainer import train
from ict_fast.training.world import World

CPU = torch.device("cpu")


@pytest.fixture
def like_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """auto means bf16, here too."""
    original = step.trunk_dtype
    for module in (step, precision):
        monkeypatch.setattr(
            module, "trunk_dtype", lambda name, device: original("bf16" if name == "auto" else name, device)
        )


def test_the_rounding_is_what_float64_statistics_of_the_gradients_say(
    tiny: Config, batches: Callable
) -> None:
    config = replace(tiny, training=replace(tiny.training, batch_size=8))
    steps = {
        name: TrainStep(replace(config, training=replace(config.training, precision=name)), CPU)
        for name in ("fp32", "bf16")
    }
    drawn = [batches(config, number, 4) for number in range(5)]
    gradients = {}
    for name, each in steps.items():
        with torch.no_grad():  # fresh networks end in zeros, where every gradient but the last is zero
            for number, parameter in enumerate(each.network.parameters()):
                generator = torch.Generator().manual_seed(number)
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        each.num_scales.fill_(641)
        rows = []
        for number, batch in enumerate(drawn):
            each.seed_and_step[1].fill_(100 + number)
            each.gradient(batch)
            rows.append(torch.cat([p.grad.flatten().double() for p in each.network.parameters()]))
        gradients[name] = torch.stack(rows)
    exact, rounded = gradients["fp32"], gradients["bf16"]
    means = rounded.mean(0), exact.mean(0)
    found = measure_rounding(steps["bf16"], 100, drawn)
    assert found.cosine == pytest.approx(float(torch.cosine_similarity(*means, dim=0)), abs=1e-6)
    deviations = ((each - each.mean(0)).square().sum(1) for each in (rounded - exact, exact))
    noises, variances = (each.numpy() for each in deviations)
    noise = noises.sum() / variances.sum()
    assert found.noise == pytest.approx(noise, rel=1e-3)
    assert 0 < found.noise < 0.5
    assert found.batches == 5
    # The jackknife's estimate of the same error, to which it comes close where batches are alike.
    without = (noises.sum() - noises) / (variances.sum() - variances)
    jackknife = (4 / 5 * ((without - without.mean()) ** 2).sum()) ** 0.5
    assert found.noise_error == pytest.approx(jackknife, rel=0.5)
    assert steps["bf16"].autocast_dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("cosine", "noise", "harmless"), [(0.998, 0.1, True), (0.9979, 0.0, False), (1.0, 0.11, False)]
)
def test_the_bounds_of_what_is_harmless(cosine: float, noise: float, harmless: bool) -> None:
    assert Rounding(cosine, noise).is_harmless == harmless


def test_fewer_batches_than_six_say_nothing_and_bf16_stays() -> None:
    assert Rounding(math.nan, math.nan, math.nan, 0).is_harmless
    assert Rounding(0.5, 1.0, 0.0, 5).is_harmless
    assert not Rounding(0.5, 1.0, 0.0, 6).is_harmless
    assert not Rounding(0.5, 1.0, 0.0, 5).is_clear


@pytest.mark.parametrize(
    ("cosine", "noise", "error", "clear"),
    [
        (0.9999, 0.01, 0.02, True),
        (0.9999, 0.01, 0.04, False),  # less than three errors from 0.1
        (0.9985, 0.01, 0.02, False),  # harmless so far, but not by far
        (0.99, 0.01, 0.0, False),  # over more batches it may be harmless
        (0.99, 0.3, 0.05, True),
        (0.9999, 0.3, 0.1, False),
    ],
)
def test_when_more_batches_would_say_the_same(cosine: float, noise: float, error: float, clear: bool) -> None:
    assert Rounding(cosine, noise, error, 6).is_clear == clear


class Given:
    """In place of a TrainStep: gradients that are given, by batch, in fp32 and in bf16."""

    def __init__(self, exact: Tensor, rounded: Tensor) -> None:
        self.world, self.loss_scale = World(), None
        self.autocast_dtype: torch.dtype | None = torch.bfloat16
        self.seed_and_step = torch.zeros(2, dtype=torch.int64)
        self.network = torch.nn.Linear(exact.shape[1], 1, bias=False)
        self.reduction = Alone(self.network)
        self._exact, self._rounded = exact, rounded

    def gradient(self, micro_batches: list[Batch]) -> None:
        rows = self._exact if self.autocast_dtype is None else self._rounded
        self.network.weight.grad = rows[int(self.seed_and_step[1])].clone()[None]


def _measured(exact: Tensor, rounded: Tensor) -> tuple[Rounding, int]:
    """What is measured of these gradients, and how many batches it took."""
    empty = Batch(torch.zeros(1, 8, 8, 1), torch.zeros(1), None, 0)
    given = Given(exact, rounded)
    batches = iter([[empty]] * len(exact))
    return measure_rounding(given, 0, batches), len(exact) - len(list(batches))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("noise", "harmless", "at_least", "at_most"),
    [(0.01, True, 6, 8), (0.085, True, 20, 24), (0.11, False, 20, 24), (0.4, False, 6, 8)],
)
def test_no_more_batches_are_taken_than_the_verdict_needs(
    noise: float, harmless: bool, at_least: int, at_most: int
) -> None:
    """Gradients that differ from batch to batch by as much as they are long, in some batches by more."""
    generator = torch.Generator().manual_seed(1)
    mean, spread, error = (torch.randn(each, 4000, generator=generator) for each in (1, 24, 24))
    uneven = torch.randn(24, 1, generator=generator).div(4).exp()
    found, taken = _measured(mean + spread, mean + spread + uneven * noise**0.5 * error)
    assert found.noise == pytest.approx(noise, rel=0.3)
    assert found.is_harmless == harmless
    assert at_least <= taken <= at_most
    assert found.batches == taken


def test_each_batch_is_a_sign_that_a_process_gets_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them may take longer than a process may be silent."""
    signs: list[World] = []
    monkeypatch.setattr(World, "get_on", lambda self: signs.append(self))
    exact = torch.randn(24, 8, generator=torch.Generator().manual_seed(4))
    _, taken = _measured(exact, exact)
    assert len(signs) == taken >= 6


def test_the_error_of_the_noise_is_the_jackknifes_where_that_is_exact() -> None:
    """Of pairs of opposite gradients of one length, where no mean depends on which batch is left out."""
    (along, across), signs = torch.eye(2, 8), torch.tensor([1.0, -1.0]).repeat(3)[:, None]
    sizes = torch.tensor([0.1, 0.2, 0.4]).repeat_interleave(2)[:, None]
    found, _ = _measured(signs * along, signs * (along + sizes * across))
    noises = sizes.flatten().double().square().numpy()
    without = (noises.sum() - noises) / 5
    assert found.noise == pytest.approx(noises.mean())
    assert found.noise_error == pytest.approx((5 / 6 * ((without - without.mean()) ** 2).sum()) ** 0.5)


def test_batches_whose_gradient_is_not_finite_do_not_count() -> None:
    generator = torch.Generator().manual_seed(2)
    exact, error = (torch.randn(24, 500, generator=generator) for _ in range(2))
    rounded = exact + 0.3 * error
    clean, _ = _measured(exact[[0, *range(2, 24)]], rounded[[0, *range(2, 24)]])
    for broken in (math.nan, math.inf):
        spoilt = [gradients.clone() for gradients in (exact, rounded)]
        for gradients in spoilt:
            gradients[1, 7] = broken
        for gradients in ((spoilt[0], rounded), (exact, spoilt[1]), spoilt):
            found, taken = _measured(*gradients)
            assert found == clean
            assert taken == clean.batches + 1
    found, taken = _measured(torch.full((24, 500), math.nan), rounded)
    assert (found.batches, taken) == (0, 24)
    assert found.is_harmless


def test_gradients_that_are_all_equal_or_zero_are_judged_without_a_division_by_zero() -> None:
    exact = torch.randn(1, 500, generator=torch.Generator().manual_seed(3)).expand(24, 500)
    assert _measured(exact, exact)[0].is_harmless
    found, _ = _measured(exact, exact.abs())
    assert not found.is_harmless, "its direction is another"
    assert found.noise < 1e-3
    assert _measured(torch.zeros(24, 500), exact)[0].batches == 0
    found, _ = _measured(exact, torch.zeros(24, 500))
    assert (found.cosine, found.is_harmless) == (0.0, False)


@pytest.mark.usefixtures("like_a_gpu")
def test_the_choice_is_made_at_the_borders_of_stages_lasts_and_is_resumed(
    one_level: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(one_level, training=replace(one_level.training, precision="auto", max_skipped_steps=20))
    measured: list[int] = []

    def measure(train_step: TrainStep, first_step: int, drawn: object) -> Rounding:
        measured.append(first_step)
        return Rounding(0.9, 1.0) if first_step == 12 else Rounding(1.0, 0.0)

    monkeypatch.setattr(precision, "measure_rounding", measure)
    monkeypatch.setattr(step, "compiles", lambda *_: True)  # as it is said, without the minutes
    monkeypatch.setattr(step, "compile_blocks", lambda *_, **__: 5)
    not_watched: list[World] = []
    monkeypatch.setattr(World, "compiles", lambda self: not_watched.append(self))
    train(config, out=tmp_path / "whole", device="cpu")
    assert len(not_watched) == 1, "the step after the switch may take minutes, too"
    assert measured == [0, 3, 6, 9, 12], "every third step begins a stage; after the switch none is measured"
    said = capsys.readouterr().err
    assert "N = 81: bf16 stays (cosine 1.0000" in said
    assert "N = 161: bf16 is too coarse, fp16 from here on (cosine 0.9000" in said
    told = [line for line in said.splitlines() if re.search("^N = (11|161):|compil", line)]
    assert [line.split(":")[0].split(";")[0].split(" in ")[0] for line in told] == [
        *("compiling 5 blocks", "N = 11", "compiled"),
        *("N = 161", "compiling 5 blocks for fp16", "compiled"),
    ]
    dtypes = {
        number: json.loads((tmp_path / f"whole/checkpoints/step-{number:08d}/state.json").read_text())[
            "trunk_dtype"
        ]
        for number in (20, 24)
    }
    assert dtypes == {20: "float16", 24: "float16"}

    original = TrainStep.__call__
    for cut in (11, 17):  # before the switch, and after it

        def until(self: TrainStep, number: int, drawn: object, cut: int = cut) -> None:
            if number == cut:
                raise KeyboardInterrupt
            original(self, number, drawn)  # type: ignore[arg-type]

        monkeypatch.setattr(TrainStep, "__call__", until)
        with pytest.raises(KeyboardInterrupt):
            train(config, out=tmp_path / "broken", device="cpu")
    monkeypatch.setattr(TrainStep, "__call__", original)
    train(config, out=tmp_path / "broken", device="cpu")
    ours, theirs = open_checkpoint(tmp_path / "broken"), open_checkpoint(tmp_path / "whole")
    for name in theirs.names:
        assert (ours.path / f"{name}.safetensors").read_bytes() == (
            theirs.path / f"{name}.safetensors"
        ).read_bytes(), f"{name} differ"


@pytest.mark.usefixtures("like_a_gpu")
def test_bf16_stays_where_activations_are_beyond_fp16(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A norm reads them, so bf16 trains; in fp16 every step would be skipped, at whatever loss scale."""
    config = replace(tiny, training=replace(tiny.training, precision="auto", max_skipped_steps=20))
    original = unet.to_trunk
    monkeypatch.setattr(unet, "to_trunk", lambda x_nchw: original(3e5 * x_nchw))
    monkeypatch.setattr(precision, "measure_rounding", lambda *_: Rounding(0.9, 1.0))
    train(config, out=tmp_path / "run", device="cpu")
    said = capsys.readouterr().err
    assert "N = 161: bf16 is too coarse, and stays, as activations overflow fp16 (cosine 0.9000" in said
    end = open_checkpoint(tmp_path / "run")
    assert end.state["trunk_dtype"] == "bfloat16"
    assert int(end.tensors("optimizer")["skipped"]) == 0
    assert "loss_scale" not in end.tensors("optimizer")
    assert [each["fp16_overflows"] for each in end.state["roundings"]] == 8 * [True], "asked in every stage"
    assert not precision.is_too_coarse(end.state["roundings"]), "nor does a resumed run take fp16"


@pytest.mark.parametrize(("asked", "auto"), [("fp16", torch.bfloat16), ("auto", torch.float16)])
def test_fp16_that_was_not_chosen_is_not_left(
    one_level: Config, monkeypatch: pytest.MonkeyPatch, asked: Any, auto: torch.dtype
) -> None:
    """It was asked for, or the GPU has no bf16."""
    monkeypatch.setattr(precision, "trunk_dtype", lambda name, device: auto)
    monkeypatch.setattr(precision, "_overflows_fp16", lambda *_: pytest.fail("the batch was tried"))
    config = replace(one_level, training=replace(one_level.training, precision=asked))
    train_step: Any = SimpleNamespace(config=config, autocast_dtype=torch.float16, device=CPU)
    loader: Any = SimpleNamespace(micro_batches=lambda number: [])
    assert precision.leave_fp16(train_step, loader, 3) is None


@pytest.mark.parametrize("loss", [1.0, math.inf, math.nan])
def test_activations_that_overflow_in_one_process_have_overflowed_for_all(loss: float) -> None:
    """Each sees the loss of its own images; were fp16 some processes' choice, their states would differ."""
    asked: list[bool] = []
    cleared: list[bool] = []
    train_step: Any = SimpleNamespace(
        autocast_dtype=torch.bfloat16,
        seed_and_step=torch.zeros(2, dtype=torch.int64),
        set_trunk=lambda dtype: None,
        compute=lambda batches: torch.tensor([loss]),
        reduction=SimpleNamespace(clear=lambda: cleared.append(True)),
        world=SimpleNamespace(any=lambda here: asked.append(here) or True),  # in another one
    )
    assert precision._overflows_fp16(train_step, 3, [])
    assert asked == [not math.isfinite(loss)]
    assert train_step.seed_and_step.tolist() == [0, 3], "with the noise of that step, in a resumed run too"
    assert cleared, "no gradient of what may not be used stays"


@pytest.mark.usefixtures("like_a_gpu")
@pytest.mark.parametrize("grow", ["activations", "gradients"])
def test_a_run_returns_to_bf16_when_activations_outgrow_fp16_and_ends_if_that_is_not_why(
    one_level: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    grow: str,
) -> None:
    config = replace(
        one_level,
        network=replace(one_level.network, num_blocks=1, attention_resolutions=()),
        training=replace(
            one_level.training, precision="auto", max_skipped_steps=1, total_steps=3, batch_size=2
        ),
        logging=replace(one_level.logging, log_every=1, checkpoint_every=2, tracker="none"),
    )
    scale, call, original = [1.0], TrainStep.__call__, unet.to_trunk

    def growing(self: TrainStep, number: int, drawn: Any) -> None:
        if number == 1 and grow == "activations":
            scale[0] = 3e5
        if number == 1 and grow == "gradients":
            next(self.network.parameters()).register_hook(lambda gradient: gradient * math.inf)
        call(self, number, drawn)

    monkeypatch.setattr(TrainStep, "__call__", growing)
    monkeypatch.setattr(unet, "to_trunk", lambda x_nchw: original(scale[0] * x_nchw))
    monkeypatch.setattr(precision, "measure_rounding", lambda *_: Rounding(0.9, 1.0))
    monkeypatch.setattr(step, "compiles", lambda *_: True)  # as it is said, without the minutes
    monkeypatch.setattr(step, "compile_blocks", lambda *_, **__: 5)
    not_watched: list[World] = []
    monkeypatch.setattr(World, "compiles", lambda self: not_watched.append(self))
    out = tmp_path / "run"
    if grow == "gradients":
        with pytest.raises(DivergedError, match=r"^1 steps in a row up to step 2 had no finite gradient"):
            train(config, out=out, device="cpu")
        return
    train(config, out=out, device="cpu")
    assert len(not_watched) == 2, "to fp16, and back"
    assert "warning: N = 21: activations overflow fp16 by now, bf16 from here" in capsys.readouterr().err
    end = open_checkpoint(out)
    assert end.state["trunk_dtype"] == "bfloat16"
    assert int(end.tensors("optimizer")["skipped"]) == 1, "step 1, and none in bf16"
    chosen = [(each["step"], each["num_scales"], each["fp16_overflows"]) for each in end.state["roundings"]]
    assert chosen == [(0, 11, False), (1, 21, True), (2, 41, True)], "the next stage asks again"

    weights = end.tensors("weights")
    shutil.rmtree(end.path)
    train(config, out=out, device="cpu")  # from step 2, at which it went back
    again = open_checkpoint(out)
    assert again.state["roundings"] == end.state["roundings"]
    assert all(torch.equal(tensor, weights[name]) for name, tensor in again.tensors("weights").items())


def test_the_choice_outlives_another_device_and_is_made_up_for_after_one(
    one_level: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(one_level, training=replace(one_level.training, precision="auto", max_skipped_steps=20))
    config = replace(config, logging=replace(config.logging, checkpoint_every=1))
    original, call = step.trunk_dtype, TrainStep.__call__
    measured: list[int] = []
    harmful: set[int] = set()
    used: dict[int, torch.dtype | None] = {}

    def measure(train_step: TrainStep, first_step: int, drawn: object) -> Rounding:
        measured.append(first_step)
        return Rounding(0.9, 1.0) if first_step in harmful else Rounding(1.0, 0.0)

    monkeypatch.setattr(precision, "measure_rounding", measure)

    def go_on(out: Path, kind: str, until: int) -> None:
        """The steps before `until` on a device of a kind, which is lost then."""

        def trunk(name: str, device: torch.device) -> torch.dtype | None:
            return original("bf16" if name == "auto" and kind == "gpu" else name, device)

        def steps(self: TrainStep, number: int, drawn: object) -> None:
            if number == until:
                raise KeyboardInterrupt
            call(self, number, drawn)  # type: ignore[arg-type]
            used[number] = self.autocast_dtype

        monkeypatch.setattr(step, "trunk_dtype", trunk)
        monkeypatch.setattr(TrainStep, "__call__", steps)
        with contextlib.suppress(KeyboardInterrupt):
            train(config, out=out, device="cpu")

    harmful = {6}
    for kind, until in (("gpu", 8), ("cpu", 10), ("gpu", 14)):
        go_on(tmp_path / "there and back", kind, until)
    assert (measured, used[5], used[7], used[9]) == ([0, 3, 6], torch.bfloat16, torch.float16, None)
    assert {used[number] for number in range(10, 14)} == {torch.float16}

    measured.clear()
    harmful = {13}  # in the middle of the last stage
    for kind, until in (("cpu", 13), ("gpu", 15), ("gpu", 17)):
        go_on(tmp_path / "from a cpu", kind, until)
    assert (measured, used[12]) == ([13], None)
    assert {used[number] for number in range(13, 17)} == {torch.float16}


@pytest.mark.usefixtures("like_a_gpu")
def test_a_signal_during_the_choice_abandons_it_and_the_run_goes_on_from_there(
    one_level: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signalled: dict[int, int] = {}
    drawn_at: dict[int, int] = {}

    def measure(train_step: TrainStep, first_step: int, drawn: Iterable) -> Rounding:
        drawn_at[first_step] = 0
        for _ in drawn:
            drawn_at[first_step] += 1
            if drawn_at[first_step] == signalled.get(first_step):
                os.kill(os.getpid(), signal.SIGTERM)
        return Rounding(1.0, 0.0)

    monkeypatch.setattr(precision, "measure_rounding", measure)
    config = replace(one_level, training=replace(one_level.training, precision="auto"))
    config = replace(config, logging=replace(config.logging, checkpoint_every=24))
    train(config, out=tmp_path / "whole", device="cpu")
    out = tmp_path / "stopped"
    for border, batches_until in ((0, 2), (12, 5), (12, 1)):
        signalled = {border: batches_until}
        result = train(config, out=out, device="cpu")
        assert (result.exit_code, result.step) == (143, border)
        assert drawn_at[border] == batches_until, "the next one is not drawn"
        assert border == 0 or open_checkpoint(out).step == border
    signalled = {}
    assert train(config, out=out, device="cpu").step == 24
    assert drawn_at[12] == 24
    ours, theirs = open_checkpoint(out), open_checkpoint(tmp_path / "whole")
    for name in theirs.names:
        file = f"{name}.safetensors"
        assert (ours.path / file).read_bytes() == (theirs.path / file).read_bytes(), f"{name} differ"
    assert ours.state["roundings"] == theirs.state["roundings"]


def test_what_is_measured_are_the_batches_of_the_steps_that_come_next(
    one_level: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []

    def measure(train_step: TrainStep, first_step: int, batches: Iterable) -> Rounding:
        assert int(train_step.num_scales) == 81
        drawn.extend(batches)
        return Rounding(1.0, 0.0)

    monkeypatch.setattr(precision, "measure_rounding", measure)
    loader: Any = SimpleNamespace(micro_batches=lambda number: number)
    precision.choose_trunk(TrainStep(one_level, CPU), loader, 9)
    assert drawn == list(range(9, 9 + precision.BATCHES))


@pytest.mark.usefixtures("like_a_gpu")
def test_a_run_measures_its_own_gradients_and_keeps_what_it_found_whatever_the_micro_batch(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(precision, "BATCHES", 2)
    monkeypatch.setattr(precision, "_FEWEST_BATCHES", 2)
    found = {}
    for micro_batch in (0, 4):
        training = replace(tiny.training, precision="auto", total_steps=2, micro_batch=micro_batch)
        config = replace(tiny, training=training)
        train(config, out=tmp_path / str(micro_batch), device="cpu")
        lines = [line for line in capsys.readouterr().err.splitlines() if "bf16" in line]
        assert lines[0].startswith("N = 11: bf16 stays (cosine ")
        found[micro_batch] = open_checkpoint(tmp_path / str(micro_batch)).state["roundings"]
    assert [(each["step"], each["num_scales"]) for each in found[0]] == [(0, 11), (1, 21)]
    first, again = found[0][0], found[4][0]
    assert 0.998 <= first["cosine"] < 1
    assert 0 < first["noise"] < 0.1
    assert again["cosine"] == pytest.approx(first["cosine"], abs=1e-5), "the sums' order alone differs"
    assert again["noise"] == pytest.approx(first["noise"], rel=0.02)


class Alive(TorchDispatchMode):
    """Bytes of the storages that operations have made and that are still in use."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self._seen: weakref.WeakSet = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in given and storage not in self._seen:
                    self._seen.add(storage)
                    self.bytes += storage.nbytes()
                    weakref.finalize(storage, self._freed, storage.nbytes())
        return made

    def _freed(self, size: int) -> None:
        self.bytes -= size


@pytest.mark.parametrize("micro_batch", [16, 2, 1])
def test_measuring_takes_no_more_memory_than_the_plan_says(
    tiny: Config, batches: Callable, monkeypatch: pytest.MonkeyPatch, micro_batch: int
) -> None:
    """What is alive when a pass begins, with what the pass itself needs, in either arithmetic."""
    config = replace(tiny, training=replace(tiny.training, precision="auto", micro_batch=micro_batch))
    planned = make_plan(config, "h100", 1)
    train_step = TrainStep(replace(config, training=replace(config.training, precision="bf16")), CPU)
    kept = sum(planned.memory[kind] for kind in ("weights", "gradients", "optimizer", "EMA"))
    parameters, cost = list(train_step.network.parameters()), planned.cost
    peaks: dict[torch.dtype | None, float] = {}
    alive = Alive()

    def backward(batch: Batch) -> Tensor:
        dtype = train_step.autocast_dtype
        itemsize = 4 if dtype is None else 2
        beside = alive.bytes - sum(p.grad.nbytes for p in parameters if p.grad is not None)
        each = cost.activation_bytes(itemsize) + GRADIENTS_ALIVE * cost.widest_values * itemsize
        copies = 0 if dtype is None else 2 * cost.parameters
        peaks[dtype] = max(peaks.get(dtype, 0.0), kept + beside + copies + len(batch.images) * each)
        for number, parameter in enumerate(parameters):
            parameter.grad = torch.full_like(parameter, 1.0 + batch.offset + number % 3)
        return torch.zeros(1 + 2 * BUCKETS)

    monkeypatch.setattr(train_step, "backward", backward)
    with alive:
        drawn = [batches(config, k, micro_batch) for k in range(3)]
        for k, several in enumerate(drawn):  # another gradient for each, of which there is a variance
            drawn[k] = [batch._replace(offset=batch.offset + k) for batch in several]
        given = alive.bytes
        measure_rounding(train_step, 0, drawn)
    assert peaks.keys() == {None, torch.bfloat16}
    planned_bytes = sum(planned.memory.values()) - RUNTIME_BYTES
    peak = max(peaks.values()) - given - 4 * (1 + 2 * BUCKETS)  # the sums of the losses are in no plan
    assert 0.98 * planned_bytes < peak <= planned_bytes


@pytest.mark.parametrize("images", [1, 3, 4, 6, 16])
def test_the_pieces_of_a_micro_batch_are_its_images_in_order_with_their_numbers(
    one_level: Config, batches: Callable, images: int
) -> None:
    batch = batches(one_level)[0]
    batch = Batch(batch.images[:images], batch.labels[:images], batch.flip[:images], 40)
    pieces = precision.cut(batch)
    for part in ("images", "labels", "flip"):
        assert torch.equal(torch.cat([getattr(piece, part) for piece in pieces]), getattr(batch, part)), part
    assert [piece.offset for piece in pieces] == [
        40 + sum(len(p.images) for p in pieces[:k]) for k in range(len(pieces))
    ]
    assert max(len(piece.images) for piece in pieces) == -(-images // PIECES)
    assert PIECES == CALIBRATION_PIECES
