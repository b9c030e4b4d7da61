"""One of the processes that test_processes.py starts: `python peer.py TASK SIZE FOLDER ... RANK`."""

from __future__ import annotations

import copy
import gc
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from recording import Recording
from torch import nn

from ict_fast.config import TrainingConfig, from_dict
from ict_fast.data.loaders import Batch, make_loader
from ict_fast.data.store import open_store
from ict_fast.errors import HungError, InputError, TrainingError
from ict_fast.training import graph, precision, trainer
from ict_fast.training import step as step_module
from ict_fast.training.graph import CapturedStep
from ict_fast.training.launch import StopRequest
from ict_fast.training.outcome import RunResult
from ict_fast.training.reduction import Reduction, reduction_of
from ict_fast.training.step import TrainStep
from ict_fast.training.world import SAVE, World
from ict_kernels import radam_ema

CPU = torch.device("cpu")


def train(world: World, folder: Path, dtype: str) -> None:
    """All steps of folder/config.json; process 0 leaves the weights."""
    torch.set_default_dtype(getattr(torch, dtype))
    config = from_dict(json.loads((folder / "config.json").read_text()))
    with pytest.MonkeyPatch.context() as patch:
        _reduce_as_on_gpus(patch)
        step = TrainStep(config, CPU, world)
    assert next(step.network.parameters()).dtype == torch.get_default_dtype()
    store = open_store(Path(config.data.path))
    loader, _ = make_loader(config, store, CPU, rank=world.rank, world_size=world.size)
    places = _watch_gradients(step)
    is_captured = config.training.cuda_graph
    advance = CapturedStep(step) if is_captured else step
    watched = 0
    with loader, _without_cuda():
        for k in range(config.training.total_steps):
            places.clear()
            advance(k, loader.micro_batches(k))
            watched += bool(places)  # Python does nothing in a replay
            assert world.size == 1 or len(set(places)) == bool(places), (
                "gradients only where they are reduced"
            )
    assert (
        0 < watched < config.training.total_steps if is_captured else watched == config.training.total_steps
    )
    world.require_equal_state(step.tensors(), config.training.total_steps)
    assert step.loss_scale is not None or int(step.optimizer.skipped) == 0
    if world.is_first:
        torch.save(step.network.state_dict(), folder / "weights.pt")
    del step.backward  # which holds the step: DDP would outlive the process group, and abort at the end


def _reduce_as_on_gpus(patch: pytest.MonkeyPatch) -> None:
    """By DistributedDataParallel, without which a CPU's processes do, unless steps are captured."""

    def as_on_a_gpu(network: nn.Module, world: World, training: TrainingConfig, _: torch.device) -> Reduction:
        return reduction_of(network, world, training, torch.device("cuda"))

    patch.setattr(step_module, "reduction_of", as_on_a_gpu)


def resume(world: World, folder: Path) -> None:
    """Four steps, and the last two of them once more, by a new step from what the second one left."""
    config = from_dict(json.loads((folder / "config.json").read_text()))
    loader, _ = make_loader(
        config, open_store(Path(config.data.path)), CPU, rank=world.rank, world_size=world.size
    )
    steps = TrainStep(config, CPU, world), TrainStep(config, CPU, world)
    with loader:
        batches = [loader.micro_batches(k) for k in range(4)]
        for k in (0, 1):
            steps[0](k, batches[k])
        saved = copy.deepcopy(steps[0].tensors())
        steps[1].restore(SimpleNamespace(state={}, tensors=saved.__getitem__))  # type: ignore[arg-type]
        for step in steps:
            for k in (2, 3):
                step(k, batches[k])
    whole, resumed = (step.tensors() for step in steps)
    assert any(not tensor.equal(saved["weights"][name]) for name, tensor in whole["weights"].items())
    for file, tensors in whole.items():
        for name, tensor in tensors.items():
            assert tensor.equal(resumed[file][name]), f"{file}/{name}"


@contextmanager
def _without_cuda() -> Iterator[None]:
    """While open, the operations of what would be captured are recorded, and repeated."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph, "capture", Recording)
        patch.setattr(graph, "run_aside", lambda work: work())
        patch.setattr(radam_ema, "_may_look", lambda device: False)  # as on a GPU
        yield


def default(folder: Path) -> None:
    """The run of folder/config.json as several GPUs would train it by default: see `like_gpus`."""
    config = from_dict(json.loads((folder / "config.json").read_text()))
    with like_gpus():
        assert trainer.train(config, out=folder / "run", device="cpu").exit_code == 0


@contextmanager
def like_gpus() -> Iterator[None]:
    """While open, `--training.precision auto` is bf16, measured on two batches, and fp16 from step 8 on."""
    dtype, measure = step_module.trunk_dtype, precision.measure_rounding

    def bf16(name: str, device: torch.device) -> torch.dtype | None:
        return dtype("bf16" if name == "auto" else name, device)

    def measured(train_step: TrainStep, first_step: int, batches: Any) -> precision.Rounding:
        found = measure(train_step, first_step, batches)
        return replace(found, noise=1.0) if first_step == 8 else found

    with pytest.MonkeyPatch.context() as patch:
        _reduce_as_on_gpus(patch)
        patch.setattr(step_module, "trunk_dtype", bf16)
        patch.setattr(precision, "measure_rounding", measured)
        patch.setattr(precision, "BATCHES", 2)
        patch.setattr(precision, "_FEWEST_BATCHES", 2)
        yield


def _watch_gradients(step: TrainStep) -> list[frozenset[int]]:
    """Where the gradients lie after each micro-batch from now on: the addresses of their storages."""
    places: list[frozenset[int]] = []
    original = step.backward

    def watched(batch: Batch) -> torch.Tensor:
        figures = original(batch)
        gradients = [p.grad for p in step.network.parameters() if p.grad is not None]
        places.append(frozenset(gradient.untyped_storage().data_ptr() for gradient in gradients))
        return figures

    step.backward = watched  # type: ignore[method-assign]
    return places


def wait(world: World, folder: Path) -> None:
    """Process 0 works for longer than a collective may take; see the main program for how long that is."""

    def work() -> tuple[int, str]:
        for _ in range(30):
            time.sleep(0.2)
            world.get_on()
        return world.rank, "done"

    assert world.while_first(work, "working", StopRequest()) == (0, "done")
    assert world.decide(lambda: 3) == 3, "and they go on together"


def ask(world: World, folder: Path) -> None:
    """Process 1 is asked to stop while process 0 works."""
    stop = StopRequest()

    def work() -> int | None:
        for _ in range(300):
            if stop.exit_code is not None:
                break
            time.sleep(0.1)
            world.get_on()
        return stop.exit_code

    if world.rank == 1:
        threading.Timer(0.5, lambda: setattr(stop, "exit_code", 143)).start()
    assert world.while_first(work, "working", stop) == 143
    assert stop.exit_code == (None if world.rank == 2 else 143)


def fail(world: World, folder: Path) -> None:
    """Work of process 0 that is of no use: it raises, it hangs, the other process is lost meanwhile."""

    def broken() -> None:
        raise ZeroDivisionError

    def hang() -> None:
        time.sleep(5)

    def others_lost() -> None:
        time.sleep(2)

    for work, ours in ((broken, ZeroDivisionError), (hang, None)):
        world = World(timeout=1.5)
        started = time.monotonic()
        try:
            world.while_first(work, "working", StopRequest())
        except ZeroDivisionError:
            assert world.is_first
            assert ours is ZeroDivisionError
        except RuntimeError:  # of the wait for what process 0 does not say, or of its last word
            assert not world.is_first or ours is None
        else:
            raise AssertionError("nothing came of it")
        if not world.is_first:
            assert time.monotonic() - started < 4.5, "before the work that hangs is done"
    world = World(timeout=5)
    if not world.is_first:
        os._exit(0)
    with pytest.raises(RuntimeError, match=r"(?i)connection|peer|closed|timed out"):
        world.while_first(others_lost, "working", StopRequest())
    os._exit(0)


def _raise(error: Exception) -> None:
    raise error


def disagree(world: World, folder: Path) -> None:
    state = {"weights": {"a": torch.ones(3), "b": torch.ones(2)}}
    world.require_equal_state(state, 7)
    if world.rank == 2:
        state["weights"]["b"][1] += 1e-6
    with pytest.raises(TrainingError, match=r"at step 7: weights/b of process 2 is not that of process 0"):
        world.require_equal_state(state, 7)
    world.require_equal("images", "the images")
    with pytest.raises(InputError, match=r"the images differ between process 0 and process 1$"):
        world.require_equal("others" if world.rank == 1 else "images", "the images")
    with pytest.raises(InputError, match=r"the dtypes differ between .* and process 2; fp16 is one$"):
        world.require_equal(world.rank == 2, "the dtypes", "fp16 is one")
    assert world.least(7 - world.rank, "their memory") == 5
    assert world.decide(lambda: world.rank + 10) == 10
    for error in (InputError("no such data"), TrainingError("a disk is gone")):
        with pytest.raises(type(error), match=str(error)):
            world.decide(partial(_raise, error))
    assert int(world.add(torch.tensor(world.rank))) == 3
    assert [world.any(world.rank == rank) for rank in range(4)] == [True, True, True, False]
    assert world.together(lambda: world.rank) == world.rank
    host = os.uname().nodename
    for kind in (InputError, HungError):
        whose = "alone$" if world.rank == 1 else f"^process 1 on {host}: alone$"
        with pytest.raises(kind, match=whose):
            world.together(partial(_raise, kind("alone")) if world.rank == 1 else lambda: None)
    with pytest.raises(InputError, match=f"^all, {world.rank}$"):
        world.together(partial(_raise, InputError(f"all, {world.rank}")))
    asked = {(1, 2): 143, (0, 2): SAVE, (0, 4): SAVE}
    codes = [world.stop_code(asked.get((world.rank, step))) for step in range(7)]
    assert codes == [None, None, None, 143, None, SAVE, None], "all at one step, that after it was asked for"


# What `run_processes` is given, in place of training.


def bad_input(first: bool) -> RunResult:
    raise InputError("no such thing")


def failed_training(first: bool) -> RunResult:
    raise TrainingError("no finite gradient")


def crash(first: bool) -> RunResult:
    """With a thread that waits for ever, as for a device; the process must end all the same."""
    threading.Thread(target=threading.Event().wait).start()
    raise ZeroDivisionError("a bug")


def done_but_asked_to_stop(first: bool) -> RunResult:
    """Process 1 has been sent SIGTERM; process 0, which has not, takes two seconds longer to end."""
    if os.environ["RANK"] == "1":
        return RunResult(Path(), 1, 0, "all steps are done", stop_code=143)
    while not Path(os.environ["ICT_FAST_OUTCOMES"], "1.pid").exists():
        time.sleep(0.05)
    time.sleep(2)
    return RunResult(Path(), 1, 0, "all steps are done")


if __name__ == "__main__":
    task, size, folder, *arguments, rank = sys.argv[1:]
    if task == "default":  # finds the others as torchrun's processes do
        os.environ.update(RANK=rank, WORLD_SIZE=size, LOCAL_RANK=rank, LOCAL_WORLD_SIZE=size)
        os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=arguments[0], TORCHELASTIC_RUN_ID="job")
        default(Path(folder))
        sys.exit()
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=int(rank), world_size=int(size))
    world = World(timeout=3.0) if task in ("wait", "ask") else World()
    tasks = {"train": train, "resume": resume, "disagree": disagree, "wait": wait, "ask": ask, "fail": fail}
    tasks[task](world, Path(folder), *arguments)
    gc.collect()
    dist.destroy_process_group()
