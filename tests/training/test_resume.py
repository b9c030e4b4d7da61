"""A run that was interrupted ends exactly as one that was not."""

from __future__ import annotations

import json
import os
import pty
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from forked import ForkedPython

from ict_fast.checkpoint import open_checkpoint
from ict_fast.config import Config
from ict_fast.training import saving
from ict_fast.training.run_directory import Run, prepare_directory
from ict_fast.training.step import TrainStep
from ict_fast.training.trainer import train

from .conftest import flags  # type: ignore[import-not-found]


def _log(out: Path) -> dict[int, list]:
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert len({record["step"] for record in records}) == len(records), "a step was logged twice"
    names = ("loss", "gradient_norm", "loss_by_sigma", "skipped")
    return {record["step"]: [record[name] for name in names] for record in records}


def _assert_same_run(ours: Path, theirs: Path, step: int) -> None:
    """Weights, EMA, optimizer state (the EMA teacher, if there is one) and log losses, bit for bit."""
    checkpoint = open_checkpoint(ours / f"checkpoints/step-{step:08d}")
    assert {"weights", "ema", "optimizer"} <= set(checkpoint.names)
    assert any(name.endswith("exp_avg_sq") for name in checkpoint.tensors("optimizer"))
    for name in checkpoint.names:
        file = f"checkpoints/step-{step:08d}/{name}.safetensors"
        assert (ours / file).read_bytes() == (theirs / file).read_bytes(), f"{name} differ"
    snapshots = [path.relative_to(theirs) for path in theirs.glob("ema-snapshots/*/*")]
    assert sorted(path.relative_to(ours) for path in ours.glob("ema-snapshots/*/*")) == sorted(snapshots)
    assert all((ours / path).read_bytes() == (theirs / path).read_bytes() for path in snapshots)
    assert _log(ours) == _log(theirs)
    assert max(_log(ours)) == step


VARIANTS: dict[str, Callable[[Config], Config]] = {
    "dropout": lambda config: config,
    "accumulated": lambda config: replace(config, training=replace(config.training, micro_batch=8)),
    "ema-teacher": lambda config: replace(config, method=replace(config.method, teacher="ema")),
    "averages": lambda config: replace(
        config,
        optimizer=replace(config.optimizer, ema_decays=(0.9, 0.99), power_ema=(0.05, 0.1)),
        logging=replace(config.logging, power_ema_every=4),
    ),
    "conditional": lambda config: replace(config, network=replace(config.network, num_classes=10)),
    "fp16": lambda config: replace(config, training=replace(config.training, precision="fp16")),
    "adm-bf16": lambda config: replace(
        config,
        network=replace(config.network, name="adm"),
        training=replace(config.training, precision="bf16"),
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_stopping_anywhere_and_resuming_changes_no_bit(
    tiny: Config, one_level: Config, tmp_path: Path, variant: str
) -> None:
    config = VARIANTS[variant](tiny if variant in ("dropout", "adm-bf16") else one_level)
    train(config, out=tmp_path / "whole", device="cpu")
    _interrupt_at(config, tmp_path / "broken", steps=[3, 11, 17])
    _assert_same_run(tmp_path / "whole", tmp_path / "broken", 24)


def test_a_run_resumed_while_it_skips_steps_goes_on_exactly(
    one_level: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ict_fast.training.step import TrainStep

    original = TrainStep.__call__

    def poisoned(self: TrainStep, step: int, batches: object) -> None:
        """Steps 8 to 12 have an infinite gradient; the checkpoint of step 10 falls between them."""
        parameter = next(iter(self.network.parameters()))
        handle = parameter.register_hook(lambda gradient: gradient * (torch.inf if 8 <= step < 13 else 1))
        original(self, step, batches)  # type: ignore[arg-type]
        handle.remove()

    monkeypatch.setattr(TrainStep, "__call__", poisoned)
    train(one_level, out=tmp_path / "whole", device="cpu")
    _interrupt_at(one_level, tmp_path / "broken", steps=[11])
    _assert_same_run(tmp_path / "whole", tmp_path / "broken", 24)
    assert int(open_checkpoint(tmp_path / "broken").tensors("optimizer")["skipped"]) == 5


def test_a_kill_or_a_crash_while_the_run_is_being_made_is_forgotten(
    one_level: Config, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / ".tmp-config.json").write_text('{"preset": "dig')
    (out / "crash.txt").write_text("Traceback of processes that could not find each other")
    # One that was to begin with weights which are not here any more; this one begins at random.
    (out / "init.json").write_text(json.dumps({"path": str(tmp_path / "gone"), "step": 1, "sha256": "0"}))
    assert train(one_level, out=out, device="cpu").step == 24
    assert not (out / "init.json").exists()
    assert "init" not in open_checkpoint(out).state


def _interrupt_at(config: Config, out: Path, steps: list[int]) -> None:
    """Runs `config` in this process, abandoned without saving when each of `steps` is reached."""
    from ict_fast.training.step import TrainStep

    class PowerCut(Exception):
        pass

    original = TrainStep.__call__
    for cut in steps:

        def until(self: TrainStep, step: int, batches: object, cut: int = cut) -> None:
            if step == cut:
                raise PowerCut
            original(self, step, batches)

        TrainStep.__call__ = until  # type: ignore[method-assign]
        try:
            with pytest.raises(PowerCut):
                train(config, out=out, device="cpu")
        finally:
            TrainStep.__call__ = original  # type: ignore[method-assign]
    assert train(config, out=out, device="cpu").step == config.training.total_steps


@pytest.mark.parametrize(
    ("seed", "threads"), [(0, 1), *(pytest.param(s, 2, marks=pytest.mark.drill) for s in range(1, 9))]
)
def test_two_kill_nines_and_reruns_of_the_command_change_no_bit(
    one_level: Config,
    tmp_path: Path,
    command: Callable[..., ForkedPython],
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
    threads: int,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", str(threads))
    # Long enough that a kill meets it in the middle; checkpoints at odd steps.
    config = replace(
        one_level,
        training=replace(one_level.training, total_steps=100, micro_batch=8),
        logging=replace(one_level.logging, log_every=10, checkpoint_every=7),
    )
    whole = command(config, tmp_path / "whole", spawned=True)
    assert whole.wait(timeout=300) == 0
    out, choose = tmp_path / "killed", random.Random(seed)
    for _ in range(2):
        before = _newest(out)
        process = command(config, out, spawned=True)
        while _newest(out) <= before and process.poll() is None:
            time.sleep(0.01)
        time.sleep(choose.uniform(0, 0.6))
        assert process.poll() is None, process.communicate()[0]
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    process = command(config, out, spawned=True)
    assert process.wait(timeout=120) == 0, process.communicate()[0]
    _assert_same_run(tmp_path / "whole", out, 100)


def _newest(out: Path) -> int:
    pointer = out / "checkpoints" / "latest"
    return int(pointer.read_text().strip().split("-")[-1]) if pointer.exists() else 0


def test_a_signal_saves_and_stops_and_the_same_command_resumes(
    one_level: Config, tmp_path: Path, command: Callable[..., ForkedPython]
) -> None:
    config = replace(
        one_level,
        training=replace(one_level.training, total_steps=100_000),
        logging=replace(one_level.logging, log_every=1, checkpoint_every=100_000),
    )
    out, saved = tmp_path / "run", 0
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        process = command(config, out)
        while (
            not (out / "log.jsonl").exists() or max(_log(out), default=0) <= saved
        ) and process.poll() is None:
            time.sleep(0.1)
        process.send_signal(number)
        output = process.communicate(timeout=60)[0]
        assert process.returncode == code, output
        assert "stopped and saved at step" in output
        assert "Traceback" not in output
        assert ("resuming at step" in output) == (saved > 0)
        assert open_checkpoint(out).step > saved
        saved = open_checkpoint(out).step


@pytest.mark.parametrize("ignored", [False, True], ids=["ssh", "nohup"])
def test_the_end_of_the_terminal_saves_and_stops_unless_it_is_ignored(
    one_level: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ignored: bool
) -> None:
    original = TrainStep.__call__

    def hung_up(self: TrainStep, number: int, batches: list) -> None:
        if number == 3:
            os.kill(os.getpid(), signal.SIGHUP)
        original(self, number, batches)

    monkeypatch.setattr(TrainStep, "__call__", hung_up)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        result = train(one_level, out=tmp_path / "run", device="cpu")
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (result.exit_code, result.step) == ((0, 24) if ignored else (143, 4))
    assert open_checkpoint(tmp_path / "run").step == result.step


@pytest.mark.drill
@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_real_terminal_that_is_closed(one_level: Config, tmp_path: Path, processes: str) -> None:
    config = replace(
        one_level,
        training=replace(one_level.training, total_steps=100_000),
        logging=replace(one_level.logging, log_every=1, checkpoint_every=100_000),
    )
    out = tmp_path / "run"
    words = ("-m", "ict_fast", "train", "--device", "cpu", "--processes", processes, "--out", str(out))
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup
        os.execv(sys.executable, [sys.executable, *words, *flags(config)])
    while not (out / "log.jsonl").exists():
        if select.select([terminal], [], [], 0.1)[0]:
            os.read(terminal, 65536)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 143
    assert open_checkpoint(out).step > 0


def test_ctrl_c_that_ends_a_compiler_too_stops_the_run_and_is_no_error(
    one_level: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compiled(self: TrainStep, number: int, batches: list) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        raise RuntimeError("g++ ended with exit status -2")

    monkeypatch.setattr(TrainStep, "__call__", compiled)
    result = train(one_level, out=tmp_path / "run", device="cpu")
    assert (result.exit_code, result.step) == (130, 0)
    assert "stopped before the first step" in result.message
    monkeypatch.undo()
    assert train(one_level, out=tmp_path / "run", device="cpu").exit_code == 0


@pytest.mark.parametrize("raised", [True, False])
def test_a_second_ctrl_c_interrupts_once_and_the_handlers_come_back(
    one_level: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: bool
) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    original, interrupts = TrainStep.__call__, 0

    def pressed(self: TrainStep, number: int, batches: list) -> None:
        nonlocal interrupts
        if number == 3:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.4)
            try:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.5)
            except KeyboardInterrupt:
                interrupts += 1
            for _ in range(50):  # more of them would come at once
                try:
                    time.sleep(0.02)
                except KeyboardInterrupt:
                    interrupts += 1
            if raised:
                raise KeyboardInterrupt
        original(self, number, batches)

    monkeypatch.setattr(TrainStep, "__call__", pressed)
    if raised:
        with pytest.raises(KeyboardInterrupt):
            train(one_level, out=tmp_path / "run", device="cpu")
    else:
        assert train(one_level, out=tmp_path / "run", device="cpu").exit_code == 130
    assert interrupts == 1
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_checkpoints_by_the_clock_come_between_those_by_steps_and_change_no_bit(
    one_level: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step takes a minute."""
    original, minutes, broken = TrainStep.__call__, [0.0], [13]

    def step(self: TrainStep, number: int, batches: object) -> None:
        if number in broken:
            broken.remove(number)
            raise KeyboardInterrupt
        original(self, number, batches)  # type: ignore[arg-type]
        minutes[0] += 1

    config = replace(one_level, logging=replace(one_level.logging, checkpoint_every=10))
    assert train(config, out=tmp_path / "plain", device="cpu").step == 24
    monkeypatch.setattr(TrainStep, "__call__", step)
    monkeypatch.setattr(saving, "monotonic", lambda: 60 * minutes[0])

    def save(self: saving.Saver, number: int, save: Callable = saving.Saver.save) -> None:
        save(self, number)
        self.wait()  # else the next one may wait for this one's end

    monkeypatch.setattr(saving.Saver, "save", save)
    config = replace(config, logging=replace(config.logging, checkpoint_minutes=2.5, keep_checkpoints=9))
    out = tmp_path / "timed"
    with pytest.raises(KeyboardInterrupt):
        train(config, out=out, device="cpu")
    config = replace(config, logging=replace(config.logging, checkpoint_minutes=6.0, keep_checkpoints=4))
    assert _checkpoints(out) == [3, 6, 9, 10, 13]
    train(config, out=out, device="cpu")
    assert _checkpoints(out) == [13, 19, 20, 24]
    _assert_same_run(out, tmp_path / "plain", 24)


def _checkpoints(out: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (out / "checkpoints").glob("step-*"))


@pytest.mark.parametrize(("step", "kept"), [(0, ["mine.png"]), (20, ["mine.png", "step-00000020.png"])])
def test_pictures_of_later_steps_than_the_checkpoints_are_another_historys(
    one_level: Config, tmp_path: Path, step: int, kept: list[str]
) -> None:
    """As the lines of the log are. A report would show them as the newest of the run that goes on."""
    (tmp_path / "grids").mkdir()
    for name in ("mine.png", "step-00000020.png", "step-00000600.png"):
        (tmp_path / "grids" / name).touch()
    checkpoint: Any = SimpleNamespace(step=step) if step else None
    prepare_directory(Run(tmp_path, one_level, checkpoint))
    assert sorted(path.name for path in (tmp_path / "grids").iterdir()) == kept


_FIRST_INPUT = """
import hashlib, os, sys
import ict_fast.consistency.objective as objective
from ict_fast.cli import main

noise_images = objective.noise_images

def first(*arguments, **options):
    student_input, _ = noise_images(*arguments, **options)
    print(hashlib.sha256(student_input.numpy().tobytes()).hexdigest(), flush=True)
    os._exit(0)

objective.noise_images = first
main(["train", "--data", sys.argv[1], "--out", sys.argv[2], "--device", "cpu", "--logging.tracker", "none"])
"""


@pytest.mark.drill
def test_the_first_batch_of_every_process_has_the_same_bits(digits_store: Path, tmp_path: Path) -> None:
    """With two threads: an eighth had others, before one thread was the first to call MKL's functions."""
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    found = set()
    for number in range(40):
        command = [sys.executable, "-c", _FIRST_INPUT, str(digits_store), str(tmp_path / str(number))]
        found.add(subprocess.check_output(command, env=environment, text=True, stderr=subprocess.DEVNULL))
    assert len(found) == 1
