"""A step can be captured: it is the same operations with the same numbers, whatever the step and the stage.

Here capturing is a stand-in that keeps the operations, and the tensors that they read and write; the real
thing is tests/gpu/test_graph.py's.
"""

from __future__ import annotations

import importlib
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from ict_fast.config import Config, differences
from ict_fast.errors import InputError
from ict_fast.training import graph, precision
from ict_fast.training import step as step_module
from ict_fast.training.dry_run import dry_run
from ict_fast.training.graph import CapturedStep, require_capturable
from ict_fast.training.precision import Rounding
from ict_fast.training.step import TrainStep
from ict_fast.training.trainer import train
from ict_fast.training.world import World
from ict_kernels import radam_ema

sys.path.append(str(Path(__file__).parent))
Recording: Any = importlib.import_module("recording").Recording
CPU = torch.device("cpu")


class Operations(TorchDispatchMode):
    """The name and every number, flag and shape of each operation, in order; and the tensors it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not str(func).startswith("profiler."):
            leaves, structure = tree_flatten((args, kwargs or {}))
            self.seen.append((str(func), str(structure), *map(_described, leaves)))
        return func(*args, **(kwargs or {}))


def _described(leaf: Any) -> Any:
    return (tuple(leaf.shape), leaf.stride(), leaf.dtype) if isinstance(leaf, Tensor) else repr(leaf)


@pytest.mark.parametrize(
    ("teacher", "optimizer", "precision"),
    [("student", "radam", "fp32"), ("student", "radam", "fp16"), ("ema", "adam", "tf32")],
)
def test_a_step_is_the_same_operations_with_the_same_numbers_in_every_stage(
    tiny: Config,
    batches: Callable,
    monkeypatch: pytest.MonkeyPatch,
    teacher: str,
    optimizer: str,
    precision: str,
) -> None:
    monkeypatch.setattr(radam_ema, "_may_look", lambda device: False)  # as on a GPU
    config = replace(
        tiny,
        method=replace(tiny.method, teacher=teacher),
        optimizer=replace(
            tiny.optimizer,
            name=optimizer,
            warmup_steps=5,
            lr_decay=1.0,
            clip_norm=1.0,
            ema_decays=(0.99, 0.9),
            power_ema=(0.05, 0.1),
        ),
        training=replace(tiny.training, precision=precision),
    )
    step = TrainStep(config, CPU)
    for number in range(2):
        step(number, batches(config, number, 8))
    recorded = []
    for number in (2, 3, 17, 23):
        step.begin(number)
        given = batches(config, number, 8)
        with Operations() as watch:
            step.advance(given)
        recorded.append(watch.seen)
    assert len(recorded[0]) > 500
    for later in recorded[1:]:
        assert later == recorded[0]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[Callable]:
    """In place of CUDA: operations are recorded and repeated. Gives what was captured."""
    captured: list[Callable] = []

    def capture(work: Callable[[], object]) -> Callable[[], None]:
        captured.append(work)
        return Recording(work)

    monkeypatch.setattr(graph, "capture", capture)
    monkeypatch.setattr(graph, "run_aside", lambda work: work())
    monkeypatch.setattr(radam_ema, "_may_look", lambda device: False)  # as on a GPU
    return captured


def _state(step: TrainStep) -> dict[str, Tensor]:
    return {f"{file}/{name}": t for file, group in step.tensors().items() for name, t in group.items()}


def test_captured_steps_have_the_bits_of_plain_ones_and_are_captured_when_they_must(
    tiny: Config, batches: Callable, stand_in: list[Callable]
) -> None:
    optimizer = replace(tiny.optimizer, ema_decays=(0.9,), power_ema=(0.1,))
    config = replace(tiny, training=replace(tiny.training, precision="bf16"), optimizer=optimizer)
    plain, inner = TrainStep(config, CPU), TrainStep(config, CPU)
    captured = CapturedStep(inner)
    captures = []
    for number in range(20):
        if number == 8:  # a switch of precision
            plain.set_trunk(torch.float16)
            inner.set_trunk(torch.float16)
        size = 8 if number < 14 else 4  # a new plan of micro-batches
        given = batches(config, number, size)
        plain(number, given)
        captured(number, given)
        captures.append(captured.captures)
        for batch in given:  # the graph must have read its own copies
            batch.images.fill_(0)
    assert captures == [0] * 3 + [1] * 8 + [2] * 6 + [3] * 3
    assert len(stand_in) == 2 * 3, "what is before the communication, and what is after it"
    ours, theirs = _state(inner), _state(plain)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


def test_the_losses_of_replays_are_added_up_where_processes_keep_their_own_for_many_steps(
    tiny: Config, batches: Callable, stand_in: list[Callable], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(World, "connect", lambda self, device: None)
    monkeypatch.setattr(World, "add", lambda self, value: value)  # the other process has nothing to add
    config = replace(tiny, training=replace(tiny.training, cuda_graph=True))
    sums = []
    for is_captured in (False, True):
        world = World()
        world.size = 2
        step = TrainStep(config, CPU, world)
        advance = CapturedStep(step) if is_captured else step
        for number in range(8):
            advance(number, batches(config, number, 8))
        sums.append(step.tensors()["optimizer"])
    assert int(sums[1]["loss_count"]) == 8
    for name in ("loss_sum", "loss_count", "loss_by_sigma"):
        assert torch.equal(sums[0][name], sums[1][name]), name
    assert len(stand_in) == 2


def test_a_run_with_a_captured_step_is_the_run_without(
    tiny: Config, tmp_path: Path, stand_in: list[Callable], monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tiny, out=tmp_path / "plain", device="cpu")
    monkeypatch.setattr("ict_fast.training.trainer.require_capturable", lambda *_: None)
    training = replace(tiny.training, cuda_graph=True)
    asked = replace(tiny, training=training, data=replace(tiny.data, loader="resident"))
    assert differences(asked, tiny) == [], "how it executes, not what it computes"
    train(asked, out=tmp_path / "captured", device="cpu")
    assert len(stand_in) == 2
    for name in ("weights", "ema", "optimizer"):
        files = [
            tmp_path / run / f"checkpoints/step-00000024/{name}.safetensors" for run in ("plain", "captured")
        ]
        assert files[0].read_bytes() == files[1].read_bytes()


class Replay:
    """Stands for a CUDA graph: as long as it lives, so does its memory."""

    alive: ClassVar[weakref.WeakSet[Replay]] = weakref.WeakSet()

    def __init__(self, work: Callable[[], None]) -> None:
        self.work = work
        Replay.alive.add(self)

    def __call__(self) -> None:
        self.work()


def test_a_graph_and_the_gradients_in_it_are_gone_while_the_device_has_other_work(
    one_level: Config, tmp_path: Path, stand_in: list[Callable], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Choosing the arithmetic and drawing, which need as much memory as a step; and the numbers stay."""
    original = step_module.trunk_dtype
    monkeypatch.setattr(  # auto means bf16, here too
        step_module,
        "trunk_dtype",
        lambda name, device: original("bf16" if name == "auto" else name, device),
    )
    monkeypatch.setattr("ict_fast.training.trainer.require_capturable", lambda *_: None)
    monkeypatch.setattr(graph, "capture", Replay)
    seen: list[tuple[str, int]] = []

    def nothing_is_held(what: str, number: int, train_step: TrainStep) -> None:
        assert not Replay.alive
        if train_step.config.training.cuda_graph:
            assert all(p.grad is None for p in train_step.network.parameters())
        seen.append((what, number))

    def measure(train_step: TrainStep, first_step: int, drawn: object) -> Rounding:
        nothing_is_held("choose", first_step, train_step)
        return Rounding(0.9, 1.0) if first_step == 18 else Rounding(1.0, 0.0)

    def draw(train_step: TrainStep, number: int, path: Path, monitor: object) -> None:
        nothing_is_held("draw", number, train_step)

    def advance(
        self: CapturedStep, number: int, drawn: list, original: Callable = CapturedStep.__call__
    ) -> None:
        original(self, number, drawn)
        if Replay.alive:
            seen.append(("replay", number))

    monkeypatch.setattr(precision, "measure_rounding", measure)
    monkeypatch.setattr("ict_fast.training.loop.save_grid", draw)
    training = replace(one_level.training, precision="auto", total_steps=48)
    config = replace(one_level, training=training, logging=replace(one_level.logging, grid_every=22))
    train(config, out=tmp_path / "plain", device="cpu")
    seen.clear()
    monkeypatch.setattr(CapturedStep, "__call__", advance)
    asked = replace(
        config,
        training=replace(training, cuda_graph=True),
        data=replace(one_level.data, loader="resident"),
    )
    train(asked, out=tmp_path / "captured", device="cpu")
    replays = [number for what, number in seen if what == "replay"]
    # Stages of six steps: after each choice, and each picture, three steps as usual.
    assert replays == [3, 4, 5, 9, 10, 11, 15, 16, 17, 21, *range(25, 44), 47]
    assert [each for each in seen if each[0] != "replay"] == [
        *(("choose", number) for number in (0, 6, 12, 18)),
        *(("draw", number) for number in (22, 44, 48)),
    ]
    for name in ("weights", "ema", "optimizer"):
        files = [
            tmp_path / run / f"checkpoints/step-00000048/{name}.safetensors" for run in ("plain", "captured")
        ]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_what_a_captured_step_needs_is_refused_by_name(tiny: Config, tmp_path: Path) -> None:
    gpu = torch.device("cuda")
    require_capturable(gpu, "resident")
    for device, loader, message in (
        (CPU, "resident", "needs an NVIDIA GPU"),
        (gpu, "auto", "--data.loader is auto; add --data.loader resident"),
    ):
        with pytest.raises(InputError, match=message):
            require_capturable(device, loader)
    asked = replace(tiny, training=replace(tiny.training, cuda_graph=True))
    with pytest.raises(InputError, match="cuda-graph needs an NVIDIA GPU"):
        train(asked, out=tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()
    assert "--training.cuda-graph needs an NVIDIA GPU" in dry_run(asked, out=tmp_path / "run", device="cpu")
