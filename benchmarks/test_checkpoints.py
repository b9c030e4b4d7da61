"""How long a checkpoint holds the training up: `pytest benchmarks/ --benchmark-only`.

The training waits for a copy of the state into host memory; a thread writes it. The baseline is to wait for
the whole: serialise, hash, flush to the disk, rename. Bytes that the wait must move: the state read and
written.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ict_fast import presets
from ict_fast.config import Config
from ict_fast.data.prepare import prepare_digits
from ict_fast.data.store import Store, open_store
from ict_fast.training.monitor import Monitor
from ict_fast.training.run_directory import open_run, prepare_directory
from ict_fast.training.saving import Saver
from ict_fast.training.step import TrainStep

STALL, WHOLE = "the training waits", "until it is on the disk"
NETWORKS = {"digits": 10, "cifar10": 2}  # and how many rounds


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return open_store(prepare_digits(tmp_path_factory.mktemp("digits") / "store"))


@pytest.fixture(scope="module", params=NETWORKS)
def trained(request: pytest.FixtureRequest) -> tuple[Config, TrainStep]:
    """A step whose optimizer has all its state."""
    config = presets.get(request.param)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train_step = TrainStep(replace(config, training=replace(config.training, compile="off")), device)
    for parameter in train_step.network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    train_step.optimizer.step()
    return config, train_step


@pytest.mark.parametrize("what", [STALL, WHOLE])
@pytest.mark.benchmark(group="checkpoints")
def test_checkpoint(
    benchmark: Any, record: Any, trained: tuple[Config, TrainStep], store: Store, tmp_path: Path, what: str
) -> None:
    config, train_step = trained
    run = open_run(config, tmp_path / "run", "never", None, lambda text: None)
    run.out.mkdir()
    prepare_directory(run)
    size = sum(tensor.nbytes for group in train_step.tensors().values() for tensor in group.values())
    steps = iter(range(1, 10**9))
    with (
        Monitor(run, silent=True) as monitor,
        Saver(run, store, train_step, monitor) as saver,
    ):

        def save() -> None:
            saver.save(next(steps))
            if what == WHOLE:
                saver.wait()

        # The one before has been written: at the default interval it always is.
        rounds = NETWORKS[config.preset]
        benchmark.pedantic(save, setup=saver.wait, rounds=rounds, warmup_rounds=1)
        saver.wait()
    record(
        op=f"checkpoint, {config.preset}",
        variant=what,
        baseline=WHOLE,
        minimum_bytes=2 * size,
        state_bytes=size,
    )
