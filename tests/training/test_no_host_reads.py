"""Nothing in a step brings a value to the host: seen where torch dispatches, not where Python calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ict_fast.config import Config
from ict_fast.training.figures import figures
from ict_fast.training.step import TrainStep
from ict_fast.training.trainer import train
from ict_kernels import radam_ema

# Operators whose result the host must wait for: a value, a shape that depends on values, a comparison.
_WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique2", "_unique2"}


class HostReads(TorchDispatchMode):
    """Collects the operators that would wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        boolean_index = name in ("index", "index_put_") and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool
            for index in args[1]
            if index is not None
        )
        if name in _WAITING or boolean_index:
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_the_watch_sees_a_read() -> None:
    with HostReads() as watch:
        torch._foreach_add_([torch.zeros(2)], torch.tensor(1.0))
        float(torch.ones(()))
    assert watch.seen == ["aten._local_scalar_dense.default"] * 2


@pytest.mark.parametrize(("teacher", "num_classes"), [("student", 0), ("student", 10), ("ema", 0)])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_a_step_never_waits_for_the_device(
    tiny: Config,
    batches: Callable[..., list],
    teacher: str,
    num_classes: int,
    precision: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(radam_ema, "_may_look", lambda device: False)  # as on a GPU
    config = replace(
        tiny,
        network=replace(tiny.network, num_classes=num_classes),
        method=replace(tiny.method, teacher=teacher),
        optimizer=replace(tiny.optimizer, ema_decays=(0.9, 0.99), power_ema=(0.05, 0.1)),
        training=replace(tiny.training, precision=precision),
    )
    train_step = TrainStep(config, torch.device("cpu"))
    for step in range(2):  # tables are built on the first one
        train_step(step, batches(config, step, 8))
    ready = [batches(config, step, 8) for step in (2, 3)]  # a stage's last, and the next one's first
    with HostReads() as watch:
        for step, batch in enumerate(ready, start=2):
            train_step(step, batch)
    assert watch.seen == []
    with HostReads() as watch:
        assert figures(train_step, 4)["loss"] > 0
    assert watch.seen, "the figures of a log line are what waits"


def test_the_loop_reads_on_log_steps_alone(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole loop, TensorBoard included, from one log line to before the next one."""
    monkeypatch.setattr(radam_ema, "_may_look", lambda device: False)
    read_at: dict[int, list[str]] = {}
    original, watch = TrainStep.__call__, HostReads()

    def watched(self: TrainStep, step: int, micro_batches: list) -> None:
        read_at[step] = list(watch.seen)  # since the step before
        original(self, step, micro_batches)
        watch.seen.clear()

    monkeypatch.setattr(TrainStep, "__call__", watched)
    logging = replace(tiny.logging, log_every=4, checkpoint_every=24, tracker="tensorboard")
    with watch:
        train(replace(tiny, logging=logging), out=tmp_path / "run", device="cpu")
    assert [step for step, seen in read_at.items() if seen and step > 0] == [4, 8, 12, 16, 20]
