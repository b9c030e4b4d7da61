"""Several processes train the model that one process trains, and lose nothing when one of them is lost."""

from __future__ import annotations

import importlib
import json
import logging
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from forked import ForkedPython
from torch import Tensor
from torch.distributed import HashStore
from torch.distributed.elastic.multiprocessing.api import _terminate_process_handler
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler

from ict_fast import torchrun
from ict_fast.checkpoint import Checkpoint, open_checkpoint
from ict_fast.config import Config, TrainingConfig, to_dict
from ict_fast.data import dali_loader
from ict_fast.errors import InputError, TrainingError
from ict_fast.networks import switches
from ict_fast.networks.switches import configure_torch
from ict_fast.training import outcome, processes, trainer
from ict_fast.training.dry_run import dry_run
from ict_fast.training.failures import closing
from ict_fast.training.launch import resolve_processes, stop_signals
from ict_fast.training.lookout import Lookout
from ict_fast.training.outcome import RunResult
from ict_fast.training.processes import run_processes
from ict_fast.training.reduction import AtOnce, reduction_of
from ict_fast.training.run_directory import Run, read_config
from ict_fast.training.step import TrainStep
from ict_fast.training.trainer import train
from ict_fast.training.world import require_launched

Command = Callable[..., ForkedPython | subprocess.Popen]


# ---- the same model, whatever the number of processes ----

PEER = Path(__file__).with_name("peer.py")


def _together(task: str, size: int, folder: Path, *arguments: object) -> list[str]:
    """Runs `tests/training/peer.py TASK` in `size` processes that find each other; none may fail.

    Returns:
        What each wrote.
    """
    peers = [
        ForkedPython([PEER, task, str(size), folder, *map(str, arguments), str(rank)], folder / f"{rank}.txt")
        for rank in range(size)
    ]
    try:
        written = [peer.communicate(timeout=300)[0] for peer in peers]
    finally:
        for peer in peers:
            peer.kill()
    failed = [text for peer, text in zip(peers, written, strict=True) if peer.returncode]
    assert not failed, failed[0]
    return written


def _weights(config: Config, size: int, folder: Path, dtype: str) -> dict[str, Tensor]:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    _together("train", size, folder, dtype)
    return torch.load(folder / "weights.pt", weights_only=True)


@pytest.mark.parametrize(
    ("sizes", "dtype", "whole", "each"),
    [
        ((2, 4), "float32", 1e-6, 1e-3),
        ((2,), "float64", 1e-10, 1e-10),
        pytest.param((4,), "float64", 1e-10, 1e-10, marks=pytest.mark.drill),
    ],
)
def test_any_number_of_processes_trains_the_same_weights(
    one_level: Config, tmp_path: Path, sizes: tuple[int, ...], dtype: str, whole: float, each: float
) -> None:
    """With dropout, flips and classes, each in two micro-batches; relative differences after 50 steps."""
    training = replace(one_level.training, total_steps=50, batch_size=16)
    clip_norm = 1.0 if dtype == "float32" else 0.0  # the norm is rounded to fp32
    optimizer = replace(
        one_level.optimizer, ema_decays=(0.9,), power_ema=(0.1,), warmup_steps=5, clip_norm=clip_norm
    )
    network = replace(one_level.network, num_classes=10)
    config = replace(one_level, network=network, training=training, optimizer=optimizer)
    one = _weights(config, 1, tmp_path / "1", dtype)
    for size in sizes:
        config = replace(config, training=replace(training, micro_batch=training.batch_size // size // 2))
        several = _weights(config, size, tmp_path / str(size), dtype)
        assert _difference(several, one) < whole
        assert max(_difference({n: several[n]}, {n: one[n]}) for n in one) < each


def test_captured_steps_of_two_processes_are_those_without_capture(tiny: Config, tmp_path: Path) -> None:
    """Bit for bit, in two micro-batches: gradients reduced at once, between two graphs, and overlapped.

    With a loss scale, at which one of the steps overflows.
    """
    training = replace(tiny.training, total_steps=8, batch_size=16, micro_batch=4, precision="fp16")
    config = replace(tiny, training=training)
    overlapped = _weights(config, 2, tmp_path / "overlapped", "float32")
    captured = replace(training, cuda_graph=True)
    at_once = _weights(replace(config, training=captured), 2, tmp_path / "captured", "float32")
    assert all(at_once[name].equal(tensor) for name, tensor in overlapped.items())


def test_three_processes_resume_to_the_last_bit(tiny: Config, tmp_path: Path) -> None:
    """Of two, a + b is b + a: whatever the order of their sums."""
    config = replace(tiny, training=replace(tiny.training, batch_size=12))
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
    _together("resume", 3, tmp_path)


def _difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """||ours - theirs|| / ||theirs|| over all tensors."""
    squares = [((ours[n].double() - theirs[n].double()) ** 2).sum() for n in theirs]
    return float((sum(squares) / sum((theirs[n].double() ** 2).sum() for n in theirs)) ** 0.5)


def _as_by_default(
    tiny: Config, folder: Path, monkeypatch: pytest.MonkeyPatch, compile: str
) -> tuple[Checkpoint, Checkpoint]:
    """The end of a run in one process, and of the same in two: as several GPUs train, but for the device."""
    config = replace(
        tiny,
        method=replace(tiny.method, teacher="ema"),
        training=replace(tiny.training, precision="auto", micro_batch=8, compile=compile, total_steps=16),
    )
    monkeypatch.syspath_prepend(PEER.parent)
    with importlib.import_module("peer").like_gpus():
        train(config, out=folder / "one", device="cpu")
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    _together("default", 2, folder, port)
    return open_checkpoint(folder / "one"), open_checkpoint(folder / "run")


def _log(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def _assert_same_choices(one: Checkpoint, two: Checkpoint) -> None:
    assert two.state["trunk_dtype"] == one.state["trunk_dtype"] == "float16"
    ours, theirs = two.state["roundings"], one.state["roundings"]
    assert [each["step"] for each in ours] == [each["step"] for each in theirs] == [0, 2, 4, 6, 8]
    for each, other in zip(ours, theirs, strict=True):
        assert each["cosine"] == pytest.approx(other["cosine"], abs=1e-4)
        assert each["noise"] == pytest.approx(other["noise"], rel=0.05)
        assert each["batches"] == other["batches"] == 2


def test_two_processes_choose_the_arithmetic_and_train_as_one_does(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path of every run on several GPUs: auto, a switch to fp16 and its loss scale, a micro-batch for
    each process (in pieces for the choice) where one process has two; and an EMA teacher."""
    one, two = _as_by_default(tiny, tmp_path, monkeypatch, "off")
    _assert_same_choices(one, two)
    for name in ("weights", "ema", "teacher"):
        assert _difference(two.tensors(name), one.tensors(name)) < 3e-5, name
    for name in ("loss_scale", "loss_scale_good_steps", "skipped"):
        assert torch.equal(two.tensors("optimizer")[name], one.tensors("optimizer")[name]), name
    assert float(one.tensors("optimizer")["loss_scale"]) < 2**14, "it overflowed at first, in both"
    for ours, theirs in zip(*(_log(tmp_path / name) for name in ("run", "one")), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        for mean, one_mean in zip(ours["loss_by_sigma"], theirs["loss_by_sigma"], strict=True):
            assert mean == (one_mean if one_mean is None else pytest.approx(one_mean, rel=1e-3))


@pytest.mark.drill
def test_two_processes_do_so_compiled(
    one_level: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks compiled one by one under gradients that are reduced, with and without a reduction."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    one, two = _as_by_default(one_level, tmp_path, monkeypatch, "on")
    _assert_same_choices(one, two)
    for name in ("weights", "ema", "teacher"):
        assert _difference(two.tensors(name), one.tensors(name)) < 1e-4, name


def test_processes_that_differ_are_named_and_decisions_are_shared(tmp_path: Path) -> None:
    _together("disagree", 3, tmp_path)


def test_the_others_wait_for_process_0_for_longer_than_a_collective_may_take(tmp_path: Path) -> None:
    _together("wait", 2, tmp_path)


def test_a_signal_to_another_process_ends_the_work_of_process_0(tmp_path: Path) -> None:
    _together("ask", 3, tmp_path)


def test_work_of_process_0_that_raises_or_hangs_or_loses_the_others_ends_in_an_error(tmp_path: Path) -> None:
    for written in _together("fail", 2, tmp_path):
        assert "Traceback" not in written


def test_a_lookout_that_meets_a_recompilation_or_a_measurement() -> None:
    lookout = Lookout(0, 2, HashStore(), 60.0)
    lookout.reached(0)
    lookout.reached(1)
    assert lookout.is_watched
    lookout.compiles()
    assert not lookout.is_watched
    with lookout.waiting("the others"):
        assert lookout.is_watched, "for others it may not wait any longer"
    lookout.reached(2)
    assert lookout.is_watched
    with lookout.doing("measuring"):
        assert lookout.diagnosis().startswith("process 0 gave up at step 2 after 60 s of measuring (--coll")


# ---- the command ----

TORCHRUN = (
    *("-m", "torch.distributed.run", "--local-addr", "localhost"),
    *("--rdzv-backend", "c10d", "--rdzv-id", "job"),
)


@pytest.fixture
def config(one_level: Config) -> Config:
    """Long enough that a kill meets it in the middle."""
    return replace(
        one_level,
        training=replace(one_level.training, total_steps=100),
        logging=replace(one_level.logging, log_every=5, checkpoint_every=5),
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs that nothing happened to, by what they are compared with; made by the first test that asks."""
    return {"folder": tmp_path_factory.mktemp("undisturbed")}


def _undisturbed(config: Config, command: Command, made: dict[str, Path], processes: int = 2) -> Path:
    out = made["folder"] / str(processes)
    if not out.exists():
        process = command(config, out, "--processes", str(processes))
        assert process.wait(timeout=300) == 0, process.communicate()[0]
    return out


def _workers(parent: int) -> list[int]:
    """The training processes that `ict-fast train` has started, by the order of their start."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal():
            continue
        try:
            status = (folder / "stat").read_text().rpartition(")")[2].split()
            words = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if int(status[1]) == parent and status[0] != "Z" and b"multiprocessing-fork" in words:
            found.append(int(folder.name))
    return sorted(found)


def _newest(out: Path) -> int:
    steps = [int(path.name.split("-")[1]) for path in out.glob("checkpoints/step-*")]
    return max(steps, default=0)


def _wait(process: ForkedPython | subprocess.Popen, until: Callable[[], bool]) -> None:
    while process.poll() is None and not until():
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()[0]


def _assert_same_state(ours: Path, theirs: Path, step: int) -> None:
    checkpoint = open_checkpoint(ours / f"checkpoints/step-{step:08d}")
    for name in checkpoint.names:
        file = f"checkpoints/step-{step:08d}/{name}.safetensors"
        assert (ours / file).read_bytes() == (theirs / file).read_bytes(), f"{name} differ"


RESULTS = Path(__file__).parents[2] / "benchmarks/results/kill-drills.json"


@pytest.fixture(scope="module")
def kills() -> Iterator[list[dict]]:
    """What every kill met; kept when `make drills` has run them all."""
    met: list[dict] = []
    yield met
    if len(met) >= 20:
        RESULTS.write_text(json.dumps({"steps": 100, "kills": met}, indent=1) + "\n")


KILLS = [(seed, whole) for seed in range(12) for whole in (False, True)]


@pytest.mark.parametrize(
    ("seed", "whole"),
    [
        pytest.param(*kill, marks=[] if kill in ((0, False), (0, True), (1, False)) else pytest.mark.drill)
        for kill in KILLS
    ],
)
def test_a_kill_nine_of_a_process_or_of_all_changes_no_bit(
    config: Config,
    tmp_path: Path,
    command: Command,
    undisturbed: dict[str, Path],
    kills: list[dict],
    seed: int,
    whole: bool,
) -> None:
    choose, out = random.Random(f"{seed} {whole}"), tmp_path / "killed"
    least = choose.randrange(60)
    processes = 2 if seed < 9 else 3  # of three the sum of the gradients depends on its order
    config = replace(config, training=replace(config.training, batch_size=8 * processes))
    process = command(config, out, "--processes", str(processes))
    _wait(process, lambda: _newest(out) >= least and len(_workers(process.pid)) == processes)
    time.sleep(choose.uniform(0, 0.2))  # the run has 40 steps to go, which may take it a second
    workers, step = _workers(process.pid), _newest(out)
    for pid in (process.pid, *workers) if whole else (choose.choice(workers),):
        os.kill(pid, signal.SIGKILL)
    if whole:
        process.wait()
        for pid in workers:
            while (
                Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]
            ):
                time.sleep(0.05)
        process = command(config, out, "--processes", str(processes))
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    if not whole:
        assert f"was ended by SIGKILL; starting all {processes} processes again from step" in output
    assert "Traceback" not in output
    _assert_same_state(out, _undisturbed(config, command, undisturbed, processes), 100)
    victims = "all" if whole else "one process"
    kills.append(
        {
            "seed": seed,
            "processes": processes,
            "killed": victims,
            "newest_checkpoint": step,
            "same_bits": True,
        }
    )


def test_a_signal_saves_in_all_processes_and_the_same_command_resumes(
    config: Config, tmp_path: Path, command: Command
) -> None:
    config = replace(
        config,
        training=replace(config.training, total_steps=100_000),
        logging=replace(config.logging, log_every=1, checkpoint_every=100_000),
    )
    out = tmp_path / "run"
    process = command(config, out, "--processes", "2")
    _wait(process, (out / "log.jsonl").exists)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 143, output
    assert output.count("stopped and saved at step") == 1
    assert "Traceback" not in output
    step = open_checkpoint(out).step
    assert step > 0
    process = command(config, out, "--processes", "2", "--logging.checkpoint-minutes", "0.01")
    _wait(process, lambda: _newest(out) > step)  # by the clock, so that a kill loses minutes
    # A terminal's Ctrl-C goes to the whole foreground group; the processes get it from the parent, once.
    for pid in [process.pid, *(w for w in _workers(process.pid) if os.getpgid(w) == os.getpgid(process.pid))]:
        os.kill(pid, signal.SIGINT)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 130, output
    assert f"resuming at step {step}" in output
    assert open_checkpoint(out).step > step
    assert "Traceback" not in output


@pytest.mark.parametrize("whom", ["all", 1, pytest.param(0, marks=pytest.mark.drill)])
def test_a_signal_after_the_last_step_ends_a_run_that_is_done(
    config: Config, tmp_path: Path, command: Command, whom: str | int
) -> None:
    """To the launcher, which passes it on, or to one process alone; each notes it while the end is saved."""
    config = replace(
        config,
        training=replace(config.training, total_steps=8),
        logging=replace(config.logging, grid_every=8),  # after the line of the last step
    )
    out = tmp_path / "run"
    process = command(config, out, "--processes", "2")
    _wait(process, lambda: "step 8/8" in process.output())
    workers = _workers(process.pid)
    os.kill(process.pid if isinstance(whom, str) else workers[whom], signal.SIGTERM)
    output = process.communicate(timeout=60)[0]  # torch's agent would wait for 120
    assert process.returncode == 0, output
    assert output.count("8 steps are done") == 1
    assert "warning" not in output, "no second attempt"
    assert open_checkpoint(out).step == 8
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


def test_a_ctrl_c_while_the_processes_start_ends_them_in_one_line(
    config: Config, tmp_path: Path, command: Command
) -> None:
    process = command(config, tmp_path / "run", "--processes", "2")
    _wait(process, lambda: len(_workers(process.pid)) == 2)
    time.sleep(0.5)  # they import torch, and are in the terminal's foreground group
    workers = _workers(process.pid)
    for pid in (process.pid, *workers):
        os.kill(pid, signal.SIGINT)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 130, output
    assert output == f"{tmp_path / 'run'}: stopped by SIGINT; nothing more was saved\n"
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_process_that_hangs_ends_the_run_with_a_diagnosis_and_leaves_nobody(
    config: Config, tmp_path: Path, command: Command, stopped: int
) -> None:
    config = replace(
        config,
        training=replace(config.training, total_steps=100_000),
        logging=replace(config.logging, log_every=1, checkpoint_every=100_000),
    )
    out = tmp_path / "run"
    process = command(config, out, "--processes", "2", "--collective-timeout", "6")
    _wait(process, (out / "log.jsonl").exists)
    workers = _workers(process.pid)
    first = int((out / ".lock").read_text())
    (second,) = set(workers) - {first}
    os.kill((first, second)[stopped], signal.SIGSTOP)
    # Far less than the two minutes that a process has to save itself when it is asked to stop.
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 1, output
    lines = [line for line in output.splitlines() if "gave up" in line]
    assert len(lines) == 1, output
    found = re.search(
        r"process (\d) gave up at step ([\d,]+) after 6 s of waiting for (.*) \(--collective-timeout\):"
        r" process (\d) on \S+ has been silent for \d+ s, since it was .* at step ([\d,]+);",
        lines[0],
    )
    assert found, lines[0]
    assert (int(found[1]), int(found[4])) == (1 - stopped, stopped)
    assert found[3] in ("all processes to begin the step", "the gradients of all processes")
    steps = [int(found[group].replace(",", "")) for group in (2, 5)]
    assert steps[1] <= steps[0]
    assert "Traceback" not in output
    assert "starting all" not in output
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


def test_the_first_of_two_processes_measures_while_the_other_waits(
    tiny: Config, tmp_path: Path, command: Command
) -> None:
    short = replace(tiny, training=replace(tiny.training, total_steps=2))
    measured = ("--logging.evaluate-every", "2", "--logging.evaluate-count", "32")
    process = command(short, tmp_path / "run", "--processes", "2", "--collective-timeout", "60", *measured)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    line = json.loads((tmp_path / "run/evaluations.jsonl").read_text())
    assert {"frechet_distance", "kernel_distance", "inception_score"} <= set(line["one_step"])


def test_a_run_goes_on_in_another_number_of_processes(
    config: Config, tmp_path: Path, command: Command, undisturbed: dict[str, Path]
) -> None:
    """From two to one, and from one to two; the same weights up to the order of sums.

    At N = 1281 five steps make 3e-6 of that, as much as other micro-batches in one process do.
    """
    whole = _undisturbed(config, command, undisturbed)
    expected = open_checkpoint(whole).tensors("weights")
    before = open_checkpoint(whole / "checkpoints/step-00000095").tensors("weights")
    moved = _difference(before, expected)

    # Two to one: the undisturbed run at its last checkpoint but one.
    fewer = tmp_path / "fewer"
    shutil.copytree(whole, fewer)
    shutil.rmtree(fewer / "checkpoints/step-00000100")
    stored = read_config(fewer / "config.json")
    assert train(stored, out=fewer, device="cpu").step == 100
    assert _difference(open_checkpoint(fewer).tensors("weights"), expected) < 2e-5 < 0.01 * moved

    # One to two: stopped in the middle.
    more = tmp_path / "more"

    def interrupted(
        self: TrainStep, number: int, batches: list, original: Callable = TrainStep.__call__
    ) -> None:
        if number == 52:
            raise KeyboardInterrupt
        original(self, number, batches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainStep, "__call__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(stored, out=more, device="cpu")
    assert open_checkpoint(more).step == 50
    process = command(config, more, "--processes", "2")
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    assert "resuming at step 50" in output
    assert _difference(open_checkpoint(more).tensors("weights"), expected) < 1e-4


def test_a_process_that_torchrun_has_started_again_resumes_whatever_it_was_told(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    given = f"TORCHELASTIC_RUN_ID=job MASTER_ADDR=localhost MASTER_PORT={port}"
    for word in f"{given} RANK=0 WORLD_SIZE=1 LOCAL_RANK=0 LOCAL_WORLD_SIZE=1".split():
        monkeypatch.setenv(*word.split("="))
    patiences: list[float] = []

    def lock(run: Run, warn: Callable[[str], None], patience: float) -> AbstractContextManager[None]:
        patiences.append(patience)
        return original(run, warn, patience)

    original = trainer.lock
    monkeypatch.setattr(trainer, "lock", lock)
    config = replace(tiny, training=replace(tiny.training, total_steps=2))
    assert train(config, out=tmp_path / "run", device="cpu", resume="never").step == 2
    with pytest.raises(InputError, match="there is a run in"):
        train(config, out=tmp_path / "run", device="cpu", resume="never")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert train(config, out=tmp_path / "run", device="cpu", resume="never").step == 2
    shutil.rmtree(tmp_path / "run/checkpoints")  # lost before the first one
    assert train(config, out=tmp_path / "run", device="cpu", resume="never").step == 2
    assert patiences == [0.0, 120.0]


def test_two_agents_form_one_job_as_two_nodes_would(
    config: Config, tmp_path: Path, command: Command, undisturbed: dict[str, Path]
) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    out = tmp_path / "run"
    torchrun = (
        *TORCHRUN,
        *("--nnodes", "2", "--nproc-per-node", "1", "--rdzv-endpoint", f"localhost:{port}"),
    )
    agents = [command(config, out, launcher=torchrun) for _ in range(2)]
    outputs = [agent.communicate(timeout=300)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    assert "".join(outputs).count(f"{out}: 100 steps are done") == 1, "one process speaks"
    _assert_same_state(out, _undisturbed(config, command, undisturbed), 100)


# ---- what is refused, and when a run is given up ----


@pytest.mark.parametrize(
    ("extra", "line"),
    [
        (("--training.totl-steps", "3"), "unknown option --training.totl-steps; did you mean"),
        (("--resume", "must"), "there is no run in .* to resume"),
    ],
    ids=["of the command line", "of process 0"],
)
def test_torchrun_does_not_start_again_what_no_attempt_can_do(
    config: Config, tmp_path: Path, command: Command, extra: tuple[str, ...], line: str
) -> None:
    torchrun = (*TORCHRUN, "--nproc-per-node", "2", "--max-restarts", "3", "--rdzv-endpoint", "localhost:0")
    agent = command(config, tmp_path / "run", *extra, launcher=torchrun)
    output = agent.communicate(timeout=120)[0]
    assert agent.returncode == 1, output
    said = [text for text in output.splitlines() if "ict-fast: error" in text]
    assert len(said) == 1, output
    assert re.search(f"{line}.*; torchrun is stopped by SIGTERM, lest it try again$", said[0])
    assert output.count("Traceback") == 1, "that of torchrun, which tells of the signal"
    assert "SignalException" in output


def test_a_batch_that_cannot_be_shared_is_refused_before_a_process_starts(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "run_processes", lambda *_, **__: pytest.fail("a process was started"))
    with pytest.raises(InputError, match="batch-size is 16; it must be a multiple of the 3 processes"):
        train(tiny, out=tmp_path / "run", device="cpu", processes=3)
    small = replace(tiny, training=replace(tiny.training, batch_size=24, micro_batch=8))
    with pytest.raises(InputError, match="micro-batch is 8; it must divide the 12 images that each of 2"):
        train(small, out=tmp_path / "run", device="cpu", processes=2)
    assert "not here: --training.batch-size is 16" in dry_run(
        tiny, out=tmp_path / "run", device="cpu", processes=3
    )
    assert "device: cpu, 2 processes" in dry_run(tiny, out=tmp_path / "run", device="cpu", processes=2)


def test_a_loader_that_is_not_installed_is_refused_before_a_process_starts(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "run_processes", lambda *_, **__: pytest.fail("a process was started"))
    monkeypatch.setattr(dali_loader, "dali_problem", lambda: "DALI is not installed")
    config = replace(tiny, data=replace(tiny.data, loader="dali"))
    with pytest.raises(InputError, match="loader is dali, but DALI is not installed: pip install"):
        train(config, out=tmp_path / "run", device="cpu", processes=2)


def test_how_many_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_processes("cpu", None, 3) == (torch.device("cpu"), 3)
    assert resolve_processes("cpu") == (torch.device("cpu"), 1)
    with pytest.raises(InputError, match="--processes is 0; it must be at least 1"):
        resolve_processes("cpu", None, 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert resolve_processes() == (torch.device("cuda", 0), 8), "every GPU that is visible"
    assert resolve_processes("cuda", 2) == (torch.device("cuda", 0), 2)
    with pytest.raises(InputError, match="--processes is 2, but each GPU has one process"):
        resolve_processes("auto", None, 2)


def test_what_keeps_torchrun_from_starting_lost_processes_again_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As torch itself decides whether the store of an attempt is that of the one before."""
    for disabled, restarts, warned in (("0", "3", True), ("1", "3", False), ("0", "0", False)):
        monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", disabled)
        meeting = DynamicRendezvousHandler.from_backend(
            "job", HashStore(), C10dRendezvousBackend(HashStore(), "job"), 1, 2
        )
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", str(meeting.use_agent_store))
        monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
        said = torchrun.warning()
        assert ("TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in (said or "")) is warned


def test_a_deterministic_run_has_the_algorithms_that_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    """And its gradients reduced at once: see `AtOnce`."""
    modes: list[bool] = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", modes.append)
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    gpu, training = torch.device("cuda"), TrainingConfig(deterministic=True)
    configure_torch(gpu, deterministic=True)
    assert modes == [True]
    assert not torch.backends.cudnn.benchmark
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] in (":4096:8", ":16:8")
    two: Any = SimpleNamespace(size=2, connect=lambda device: None)
    assert isinstance(reduction_of(torch.nn.Linear(2, 2), two, training, gpu), AtOnce)


def test_a_deterministic_run_leaves_no_sum_to_the_switches_between_gpus(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nor does it fill memory that is written anyway."""
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda mode: None)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    for given, expected in (({}, "^NVLS,NVLSTree"), ({"NCCL_ALGO": "Ring"}, "Ring")):
        monkeypatch.setattr(os, "environ", dict(given))
        configure_torch(torch.device("cpu"), deterministic=True)
        assert os.environ["NCCL_ALGO"] == expected
    assert not torch.utils.deterministic.fill_uninitialized_memory


def test_torch_has_no_more_threads_than_a_container_has_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 96)
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    monkeypatch.setattr(switches, "usable_cores", lambda: 4)
    for asked, expected in (({}, [4]), ({"OMP_NUM_THREADS": "6"}, [])):
        monkeypatch.setattr(os, "environ", asked)
        configure_torch(torch.device("cpu"), deterministic=False)
        assert given == expected
        given.clear()


def test_a_number_that_torchrun_did_not_start_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    require_launched(cpu, None)
    require_launched(cpu, 4)
    with pytest.raises(InputError, match="8 processes are asked for, and torchrun has started 4"):
        require_launched(cpu, 8)
    with pytest.raises(InputError, match="--max-restarts is torchrun's here"):
        require_launched(cpu, 4, 3)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    require_launched(gpu, None)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(InputError, match="started 4 processes on this node, where torch sees 2 GPUs; choose"):
        require_launched(gpu, None)
    monkeypatch.setenv("ICT_FAST_OUTCOMES", "folder")  # of our own launcher, which has seen four
    with pytest.raises(TrainingError, match="torch now sees 2 of the 4 GPUs: `ict-fast doctor` may say more"):
        require_launched(gpu, None)


@pytest.mark.parametrize("ends", [True, False], ids=["saves", "hangs"])
def test_any_number_of_signals_leaves_the_processes_the_time_to_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: bool
) -> None:
    """The third one ends the wait of torch's agent, whose handlers raise, and are not left behind."""
    met: list[object] = []

    class Child:
        def join(self, timeout: float) -> None:
            assert 100 < timeout <= 120, "what saving may take"
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
                os.kill(os.getpid(), number)
            met.append("joined")

        def kill(self) -> None:
            met.append("killed")

    def agent(settings: object, entrypoint: object) -> Callable[..., None]:
        for number in stop_signals():
            signal.signal(number, _terminate_process_handler)
        return begun

    def begun(work: object, first: bool, folder: str, parent: int) -> None:
        for rank in (0, 1):
            (Path(folder) / f"{rank}.pid").touch()
        os.kill(parent, signal.SIGTERM)

    monkeypatch.setattr(processes, "elastic_launch", agent)
    children = [Child()]
    monkeypatch.setattr(
        processes.multiprocessing, "active_children", lambda: [] if ends and met else children
    )
    before = [signal.getsignal(number) for number in stop_signals()]
    result = run_processes(crashed, 2, out=tmp_path, warn=lambda text: None)
    assert result.exit_code == 143
    assert met == (["joined"] if ends else ["joined", "killed"])
    assert [signal.getsignal(number) for number in stop_signals()] == before
    assert logging.getLogger("torch.multiprocessing.spawn").level == logging.CRITICAL


@pytest.mark.parametrize(
    ("cause", "error", "line", "attempts"),
    [
        ("bad_input", InputError, "no such thing", 1),
        ("failed_training", TrainingError, "no finite gradient", 1),
        ("crash", TrainingError, "process 0 failed: .*a bug.*; 2 attempts got no further than step 0", 2),
    ],
)
def test_errors_keep_their_meaning_and_crashes_are_tried_again(
    tmp_path: Path, cause: str, error: type[Exception], line: str, attempts: int
) -> None:
    warned: list[str] = []
    sys.path.insert(0, str(PEER.parent))  # the spawned process imports the function by its module's name
    try:
        peer = importlib.import_module("peer")
        with pytest.raises(error, match=line):
            run_processes(getattr(peer, cause), 1, out=tmp_path, warn=warned.append, max_restarts=1)
    finally:
        sys.path.remove(str(PEER.parent))
    assert len(warned) == attempts - 1
    assert (tmp_path / "crash.txt").exists() == (cause == "crash")


def test_a_run_that_saves_between_its_losses_goes_on_whatever_lies_beside_its_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broken checkpoint of step 5,000 is passed over: attempts begin at 4,000, 4,100, 4,200."""
    (tmp_path / "run/checkpoints/step-00005000").mkdir(parents=True)
    monkeypatch.setenv("ICT_FAST_OUTCOMES", "")
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(processes, "usable_cores", lambda: 12)  # as under SLURM, of 96
    saved, losses, threads = [4000], [4100, 4200, 4300, 4300, 4300, 4300], set()

    def attempt(work: object, count: int, first: bool, folder: Path, traceback: Path) -> tuple[str, None]:
        outcome.report_to(folder)
        outcome.report_progress(saved[-1], saved[-1])
        saved.append(losses[len(saved) - 1])
        outcome.report_progress(saved[-2], saved[-1])
        threads.add(os.environ["OMP_NUM_THREADS"])
        return "process 1 was ended by SIGKILL", None

    monkeypatch.setattr(processes, "_attempt", attempt)
    warned: list[str] = []
    with pytest.raises(TrainingError, match="SIGKILL; 3 attempts got no further than step 4,300"):
        run_processes(crashed, 2, out=tmp_path / "run", step=4000, warn=warned.append, max_restarts=2)
    assert [line.rpartition(" ")[2] for line in warned] == ["4,100", "4,200", "4,300", "4,300"]
    assert threads == {"6"}


def test_a_process_that_a_signal_has_met_alone_leaves_after_the_result_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The agent ends all others when one leaves, and what is not told by then is lost."""
    monkeypatch.syspath_prepend(PEER.parent)  # the spawned process imports the function by its module's name
    peer = importlib.import_module("peer")
    warned: list[str] = []
    result = run_processes(peer.done_but_asked_to_stop, 2, out=tmp_path, warn=warned.append)
    assert (result.exit_code, result.message, warned) == (0, "all steps are done", [])


def crashed(first: bool) -> RunResult:
    raise AssertionError


def test_after_the_loss_of_a_process_nobody_waits_for_the_device(tmp_path: Path) -> None:
    closed: list[int] = []
    loader = SimpleNamespace(close=lambda: closed.append(1))
    for size, expected in ((1, [1]), (2, [1])):
        with pytest.raises(RuntimeError), closing(loader, SimpleNamespace(size=size)):  # type: ignore[arg-type]
            raise RuntimeError("Connection closed by peer")
        assert closed == expected
    with closing(loader, SimpleNamespace(size=2)):  # type: ignore[arg-type]
        pass
    assert closed == [1, 1]
