"""The loop and the run's directory: what is written, what is refused, what survives."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ict_fast import checkpoint as checkpoint_module
from ict_fast import presets
from ict_fast.checkpoint import checkpoint_steps, open_checkpoint, write_checkpoint
from ict_fast.cli import main
from ict_fast.config import Config, to_dict
from ict_fast.consistency import load_model, sample
from ict_fast.errors import DivergedError, InputError, TrainingError
from ict_fast.training import grids, run_directory, saving, trainer
from ict_fast.training.describe import describe, describe_initial_share
from ict_fast.training.dry_run import dry_run
from ict_fast.training.launch import resolve_device
from ict_fast.training.monitor import Monitor
from ict_fast.training.outcome import RunResult
from ict_fast.training.run_directory import Run, lock, open_run, prepare_directory
from ict_fast.training.trainer import train
from ict_fast.training.world import World


def _records(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, digits_store: Path) -> tuple[Config, Path]:
    """A finished run of 24 steps."""
    from ict_fast import presets

    preset = presets.get("digits")
    config = replace(
        preset,
        data=replace(preset.data, path=str(digits_store)),
        network=replace(preset.network, channels=8, dropout=0.1),
        training=replace(preset.training, total_steps=24, batch_size=16),
        logging=replace(preset.logging, log_every=5, grid_every=12, checkpoint_every=8),
    )
    out = tmp_path_factory.mktemp("runs") / "finished"
    assert train(config, out=out, device="cpu").exit_code == 0
    return config, out


@pytest.fixture
def run(finished: tuple[Config, Path], tmp_path: Path) -> tuple[Config, Path]:
    """A copy of the finished run that a test may spoil."""
    config, out = finished
    shutil.copytree(out, tmp_path / "run")
    return config, tmp_path / "run"


def test_a_run_leaves_what_the_design_names(finished: tuple[Config, Path]) -> None:
    _config, out = finished
    assert [record["step"] for record in _records(out)] == [5, 10, 15, 20, 24]
    assert [record["num_scales"] for record in _records(out)] == [21, 81, 161, 641, 1281]
    assert all(record["loss"] > 0 and record["skipped"] == 0 for record in _records(out))
    steps = sorted(path.name for path in (out / "checkpoints").glob("step-*"))
    assert steps == ["step-00000016", "step-00000024"], "the newest two"
    assert json.loads((out / "config.json").read_text())["network"]["channels"] == 8
    for step in (12, 24):
        assert Image.open(out / f"grids/step-{step:08d}.png").size >= (8 * 48, 8 * 48)


def test_the_grid_is_the_ema_weights_sampled_from_fixed_seeds(finished: tuple[Config, Path]) -> None:
    _, out = finished
    from ict_fast.data.pictures import image_grid, to_uint8

    expected = image_grid(to_uint8(sample(load_model(out), 64)))
    seen = Image.open(out / "grids/step-00000024.png")
    assert np.array_equal(np.asarray(seen), np.asarray(expected))
    raw = image_grid(to_uint8(sample(load_model(out, weights="weights"), 64)))
    assert not np.array_equal(np.asarray(seen), np.asarray(raw))


def test_a_finished_run_says_so_and_changes_nothing(finished: tuple[Config, Path]) -> None:
    config, out = finished
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    result = train(config, out=out, device="cpu")
    assert result.exit_code == 0
    assert "is finished" in result.message
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("optimizer", "lr", 1e-3),
        ("network", "dropout", 0.5),
        ("method", "metric", "l2"),
        ("training", "seed", 1),
        ("training", "batch_size", 32),
    ],
)
def test_another_science_is_refused_by_the_fields_name(
    finished: tuple[Config, Path], section: str, field: str, value: object
) -> None:
    config, out = finished
    other = replace(config, **{section: replace(getattr(config, section), **{field: value})})
    with pytest.raises(InputError, match=rf"{section}\.{field} \(there .*, asked {value!r}\)"):
        train(other, out=out, device="cpu")


def test_every_differing_field_is_named(finished: tuple[Config, Path]) -> None:
    config, out = finished
    other = replace(
        config,
        optimizer=replace(config.optimizer, lr=1.0),
        training=replace(config.training, total_steps=30),
    )
    with pytest.raises(InputError, match=r"optimizer\.lr.*training\.total_steps"):
        train(other, out=out, device="cpu")


def test_execution_may_differ_on_resume_and_extend_continues(
    run: tuple[Config, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config, out = run
    other = replace(
        config,
        training=replace(config.training, micro_batch=8),
        logging=replace(config.logging, log_every=2),
    )
    longer = replace(other, training=replace(other.training, total_steps=32))
    with pytest.raises(InputError, match=r"--extend 32"):
        train(longer, out=out, device="cpu")
    result = train(other, out=out, device="cpu", extend=32)
    assert result.step == 32
    shown = capsys.readouterr().err
    assert "resuming at step 24 of 32" in shown
    assert "N = 1281" in shown, "the new curriculum is printed"
    assert _records(out)[-1]["step"] == 32
    assert train(other, out=out, device="cpu", extend=32).message.endswith("32 steps are done")
    train(other, out=out, device="cpu", extend=40)
    state = json.loads((out / "checkpoints/step-00000040/state.json").read_text())
    assert state["extended"] == [[24, 24], [32, 32]], "no run of 40 steps from the start has these weights"
    with pytest.raises(InputError, match="--extend is 8"):
        train(other, out=out, device="cpu", extend=8)


def test_a_run_is_extended_by_its_folder_and_the_steps_alone(
    run: tuple[Config, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The weights are those of the whole configuration, given again; other science is refused by name."""
    config, out = run
    other = tmp_path / "other"
    shutil.copytree(out, other)
    words = ["train", "--device", "cpu", "--out", str(out)]
    assert main(words) == 0
    done, then = capsys.readouterr().out.splitlines()
    assert done == f"{out} is finished: 24 steps are done"
    assert then == f"then: ict-fast sample {out}, ict-fast evaluate {out}, ict-fast report {out}"
    for wrong, said in (
        (["--network.dropout", "0.3"], "differs in network.dropout (there 0.1, asked 0.3); another --out"),
        (["--training.total-steps", "32"], "(there 24, asked 32); --extend 32 continues it"),
        (["--resume", "never"], "there is a run in"),
    ):
        assert main([*words, *wrong]) == 2
        assert said in capsys.readouterr().err
    assert main([*words, "--extend", "32", "--logging.log-every", "2"]) == 0
    train(config, out=other, device="cpu", extend=32)
    for name in ("weights", "ema", "optimizer"):
        file = f"checkpoints/step-00000032/{name}.safetensors"
        assert (out / file).read_bytes() == (other / file).read_bytes()
    stored = json.loads((out / "config.json").read_text())
    changed = replace(
        config,
        training=replace(config.training, total_steps=32),
        logging=replace(config.logging, log_every=2),
    )
    assert stored == to_dict(changed), "what was changed is the run's from then on"


def test_an_extension_says_that_n_falls_and_what_was_trained_before(
    run: tuple[Config, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """24 steps end at N = 1281. Of 64, step 24 is the first of the fourth stage of eight steps each."""
    config, out = run
    warning = (
        "warning: the curriculum is laid over 64 steps anew (--extend): N falls from 1281 to 81 at step 24"
    )
    planned = dry_run(config, out=out, device="cpu", extend=64)
    assert planned.count(warning) == 1
    train(config, out=out, device="cpu", extend=64)
    shown = capsys.readouterr().err
    assert shown.count(f"ict-fast: {warning}\n") == 1
    for text in (planned, shown):
        lines = re.findall(r"\d+: steps (\d+) to (\d+), N = (\d+)", text)
        by_step = {step: int(n) for first, last, n in lines for step in range(int(first), int(last) + 1)}
        assert list(by_step) == list(range(64))
        assert all(record["num_scales"] == by_step[record["step"] - 1] for record in _records(out))
    assert "N falls" not in dry_run(config, out=out, device="cpu", extend=64), "it has been extended"


def test_no_other_extension_is_warned_of(
    one_level: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fixed = replace(
        one_level,
        method=replace(one_level.method, curriculum="fixed"),
        training=replace(one_level.training, total_steps=2),
    )
    early = replace(one_level, training=replace(one_level.training, total_steps=1))  # from N = 11 to 21
    for name, config in (("fixed", fixed), ("early", early)):
        for extend in (None, 4):
            train(config, out=tmp_path / name, device="cpu", extend=extend)
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("step", "decay", "extend", "rates"),
    [
        (18, 0.5, 48, "0.000583 to 0.001"),  # 7/12 of 1e-3 was the last one of 24 steps
        (24, 0.5, 36, "8.33e-05 to 0.000667"),  # from 1/12 to 12/18
        (18, 0.5, 25, ""),  # from 7/12 to 7/12.5
        (18, 0.0, 48, ""),
        (3, 0.5, 48, ""),  # in the warm-up, whatever the plan
    ],
)
def test_an_extension_says_that_the_learning_rate_rises(
    one_level: Config, tmp_path: Path, step: int, decay: float, extend: int, rates: str
) -> None:
    config = replace(
        one_level,
        optimizer=replace(one_level.optimizer, lr=1e-3, warmup_steps=8, lr_decay=decay),
        method=replace(one_level.method, curriculum="fixed"),
    )
    state = {"step": step, "config": to_dict(config)}
    write_checkpoint(tmp_path, step, {"weights": {"a": torch.ones(1)}}, state, keep=2)
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
    warnings: list[str] = []
    open_run(config, tmp_path, "auto", extend, warnings.append)
    assert warnings == rates.count("to") * [
        f"the learning rate's decay is laid over {extend} steps anew (--extend): it rises from {rates} at"
        f" step {step}"
    ]


def test_what_has_no_effect_is_warned_of_in_one_line(
    one_level: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is not as in the preset, and is not used beside the rest: not p_mean, which is the preset's."""
    method = replace(
        one_level.method, metric="l2", huber_c=0.1, teacher_ema=0.5, indices="uniform", p_std=1.0, rho=6.0
    )
    config = replace(
        one_level,
        method=method,
        training=replace(one_level.training, total_steps=1),
        logging=replace(one_level.logging, evaluate_count=100),
    )
    warning = (
        "warning: without effect: --method.p-std (with --method.indices uniform), --method.huber-c (with"
        " --method.metric l2), --method.teacher-ema (with --method.teacher student),"
        " --logging.evaluate-count (with --logging.evaluate-every 0)\n"
    )
    assert dry_run(config, out=tmp_path / "run", device="cpu").count(warning) == 1
    train(config, out=tmp_path / "run", device="cpu")
    assert capsys.readouterr().err.count(f"ict-fast: {warning}") == 1
    config = replace(config, preset="of a script", method=replace(method, huber_c=None))
    train(config, out=tmp_path / "another", device="cpu")
    shown = capsys.readouterr().err
    assert "without effect: --method.p-std (" in shown
    assert "huber-c" not in shown
    train(one_level, out=tmp_path / "plain", device="cpu")
    assert "without effect" not in capsys.readouterr().err


def test_an_average_that_the_run_is_too_short_for_is_warned_of_once(
    one_level: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A decay of 0.8 leaves 0.005 of the initial weights after 24 steps."""
    optimizer = replace(one_level.optimizer, ema_warmup=False, ema_decay=0.9, ema_decays=(0.8, 0.99))
    config, out = replace(one_level, optimizer=optimizer), tmp_path / "run"
    warning = (
        "warning: after 24 steps the averaged weights are still in part the initial ones: 8 % with a decay of"
        " 0.9, 79 % with a decay of 0.99; --optimizer.ema-warmup leaves nothing of them, a decay of 0.82 at"
        " most 1 %\n"
    )
    assert dry_run(config, out=out, device="cpu").count(warning) == 1
    train(config, out=out, device="cpu")
    assert capsys.readouterr().err.count(f"ict-fast: {warning}") == 1
    train(config, out=out, device="cpu", extend=25)  # its decays can no longer be changed
    assert "initial ones" not in capsys.readouterr().err
    for fitting in (replace(optimizer, ema_warmup=True), replace(optimizer, ema_decay=0.82, ema_decays=())):
        assert describe_initial_share(replace(config, optimizer=fitting)) is None


def test_the_share_of_the_initial_weights_is_what_an_average_over_the_run_keeps() -> None:
    """cifar10 in 20,000 steps; the preset's own 400,000 leave nothing."""
    config = presets.get("cifar10")
    assert describe_initial_share(config) is None
    config = replace(config, training=replace(config.training, total_steps=20_000))
    average = 0.0
    for _ in range(20_000):
        average += (1 - config.optimizer.ema_decay) * (1 - average)
    line = describe_initial_share(config)
    assert line is not None
    assert f"{1 - average:.0%}".replace("%", " %") + " with a decay of 0.99993" in line
    assert "a decay of 0.99976 at most" in line
    assert 0.99976**20_000 <= 0.01 < 0.99978**20_000


def test_resume_never_and_must(run: tuple[Config, Path], tmp_path: Path) -> None:
    config, out = run
    with pytest.raises(InputError, match="there is a run in"):
        train(config, out=out, device="cpu", resume="never")
    with pytest.raises(InputError, match="there is no run in"):
        train(config, out=tmp_path / "new", device="cpu", resume="must")
    with pytest.raises(InputError, match=r"no run in .* to extend"):
        train(config, out=tmp_path / "new", device="cpu", extend=99)
    assert not (tmp_path / "new").exists()
    with pytest.raises(InputError, match="--resume is maybe"):
        train(config, out=out, device="cpu", resume="maybe")


def test_a_directory_that_is_something_else_is_not_touched(one_level: Config, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(InputError, match="holds no run"):
        train(one_level, out=tmp_path, device="cpu")
    with pytest.raises(InputError, match="--out must name a directory"):
        train(one_level, out=tmp_path / "thesis.tex", device="cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_broken_config_file_is_named(run: tuple[Config, Path]) -> None:
    config, out = run
    (out / "config.json").write_text('{"network": ')
    with pytest.raises(InputError, match=r"config\.json cannot be read"):
        train(config, out=out, device="cpu")
    (out / "config.json").write_text('{"netwrk": {}}')
    with pytest.raises(InputError, match=r'netwrk; did you mean "network"'):
        train(config, out=out, device="cpu")


def test_a_checkpoint_of_another_run_is_refused(run: tuple[Config, Path]) -> None:
    config, out = run
    other = replace(config, optimizer=replace(config.optimizer, lr=1.0))
    (out / "config.json").write_text(json.dumps(to_dict(other)))
    with pytest.raises(InputError, match=r"step-00000024 was trained with other optimizer\.lr than "):
        train(other, out=out, device="cpu", extend=32)
    (out / "config.json").write_text(json.dumps(to_dict(config)))
    shutil.rmtree(out / "checkpoints/step-00000024")
    assert train(config, out=out, device="cpu", extend=32).step == 32


def test_the_log_has_the_learning_rate_of_its_last_step(one_level: Config, tmp_path: Path) -> None:
    config = replace(one_level, optimizer=replace(one_level.optimizer, lr=1e-3, warmup_steps=8, lr_decay=0.5))
    train(config, out=tmp_path / "run", device="cpu")
    rates = {record["step"]: record["learning_rate"] for record in _records(tmp_path / "run")}
    # Of steps 3, 7, 11, ..., counted from 0: up to step 8, and down from 12 to 24.
    expected = {4: 3 / 8, 8: 7 / 8, 12: 1.0, 16: 9 / 12, 20: 5 / 12, 24: 1 / 12}
    assert rates == {step: pytest.approx(1e-3 * share) for step, share in expected.items()}


def test_a_share_that_does_not_fit_is_taken_in_parts_and_one_that_was_asked_for_is_warned_of(
    one_level: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ict_fast.networks.cost import network_cost
    from ict_fast.planning.plan import RUNTIME_BYTES, USABLE, memory_bytes
    from ict_fast.training.step import TrainStep

    config = replace(one_level, training=replace(one_level.training, total_steps=2))
    cost = network_cost(TrainStep(config, torch.device("cpu")).network)
    of_four = sum(memory_bytes(config, cost, 4).values())
    assert RUNTIME_BYTES < of_four < sum(memory_bytes(config, cost, 8).values())
    monkeypatch.setattr(trainer, "_memory", lambda device: 2**40)
    monkeypatch.setattr(World, "least", lambda *_: int(of_four / USABLE) + 1)  # another process's
    taken: list[list[int]] = []
    original = TrainStep.__call__

    def noted(self: TrainStep, step: int, batches: Any) -> None:
        taken.append([len(batch.images) for batch in batches])
        original(self, step, batches)

    monkeypatch.setattr(TrainStep, "__call__", noted)
    train(config, out=tmp_path / "parts", device="cpu")
    assert taken == [[4] * 4] * 2
    said = capsys.readouterr().err
    assert "\n16 images at a time need about " in said
    assert ": it takes 4 at a time (--training.micro-batch" in said
    stored = json.loads((tmp_path / "parts/config.json").read_text())
    assert stored["training"]["micro_batch"] == 0, "on another GPU it may take more"

    taken.clear()
    asked = replace(config, training=replace(config.training, micro_batch=8))
    train(asked, out=tmp_path / "asked", device="cpu")
    assert taken == [[8] * 2] * 2
    assert "warning: 8 images at a time need about " in capsys.readouterr().err


def test_gpus_that_choose_other_arithmetics_are_refused_before_the_step_is_made(
    one_level: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def require_equal(self: World, value: object, what: str, cure: str = "") -> None:
        if "--training.precision auto" in what:
            raise InputError(f"{value}: {cure}")

    monkeypatch.setattr(World, "require_equal", require_equal)
    monkeypatch.setattr(trainer, "trunk_dtype", lambda precision, device: torch.bfloat16)
    monkeypatch.setattr(trainer, "TrainStep", lambda *_: pytest.fail("the step was made"))
    with pytest.raises(InputError, match=r"^torch\.bfloat16: fp16 is one that all have$"):
        train(one_level, out=tmp_path / "run", device="cpu")


def test_data_that_are_not_here_are_not_to_be_prepared_anew(
    run: tuple[Config, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config, out = run
    data = Path(config.data.path)
    monkeypatch.chdir(data.parent)
    config = replace(config, data=replace(config.data, path=data.name))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"the data of .*run, digits, are not here \(a relative path"):
        train(config, out=out, device="cpu", extend=25)
    monkeypatch.chdir(data.parent)
    assert train(config, out=out, device="cpu", extend=25).step == 25


def test_a_run_whose_objective_meant_something_else_when_it_began_does_not_go_on(
    one_level: Config, tmp_path: Path
) -> None:
    from ict_fast.consistency import objective

    config, out = replace(one_level, method=replace(one_level.method, metric="l2")), tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objective, "_REVISIONS", {})
        train(config, out=out, device="cpu")
    before = (out / "log.jsonl").read_bytes()
    for extend in (None, 32):
        with pytest.raises(
            InputError, match=r"step-00000024 was trained by another version, .* --method\.metric l2"
        ):
            train(config, out=out, device="cpu", extend=extend)
    assert (out / "log.jsonl").read_bytes() == before
    begun_now = replace(config, training=replace(config.training, total_steps=1))
    for extend in (None, 2):
        assert train(begun_now, out=tmp_path / "now", device="cpu", extend=extend).step == (extend or 1)


@pytest.mark.parametrize(
    ("metric", "expected", "rev"), [("pseudo-huber", 0.5, 1), ("l2", 0.0625, 2), ("l1", 0.25, 2)]
)
def test_what_an_objective_computes_has_the_number_that_runs_remember(
    one_level: Config, metric: Any, expected: float, rev: int
) -> None:
    """Change the number, in `_REVISIONS`, with what is computed."""
    from ict_fast.consistency.objective import revision
    from ict_kernels import NoiseLevels, consistency_loss

    method = replace(one_level.method, metric=metric, huber_c=0.0)
    ones = torch.ones(1)
    levels = NoiseLevels(torch.zeros(1, dtype=torch.int64), ones, ones, ones)
    # At sigma = sigma_min c_skip is 1 and c_out 0: each of four values differs by 0.25.
    inputs = torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
    inputs[0].fill_(0.25 / (1 + method.sigma_data**2) ** 0.5)
    outputs = torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
    loss = consistency_loss(
        *outputs, *inputs, levels, sigma_data=method.sigma_data, sigma_min=1.0, c=0.0, metric=metric
    )
    assert (float(loss), revision(method)) == (pytest.approx(expected), rev)


def test_an_altered_newest_checkpoint_falls_back_to_the_one_before(
    finished: tuple[Config, Path], run: tuple[Config, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config, out = run
    victim = out / "checkpoints/step-00000024/weights.safetensors"
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    assert train(config, out=out, device="cpu").step == 24
    shown = capsys.readouterr().err
    assert "weights.safetensors" in shown
    assert "resuming at step 16 of 24" in shown
    whole = finished[1] / "checkpoints/step-00000024/weights.safetensors"
    assert victim.read_bytes() == whole.read_bytes(), "trained again, bit for bit"
    assert [record["step"] for record in _records(out)] == [5, 10, 15, 20, 24], "the log was cut back"


def test_a_broken_checkpoint_does_not_push_out_the_whole_one_that_the_run_goes_on_from(
    run: tuple[Config, Path],
) -> None:
    config, out = run
    (out / "checkpoints/step-00000024/ema.safetensors").unlink()
    warnings: list[str] = []
    opened = open_run(config, out, "auto", None, warnings.append)
    assert "step-00000024/ema.safetensors: missing; passing over" in warnings[0]
    prepare_directory(opened)
    again = open_run(config, out, "auto", None, pytest.fail)  # as after a kill
    assert (opened.step, again.step) == (16, 16)
    write_checkpoint(out, 28, {"weights": {"a": torch.ones(1)}}, {}, keep=2)
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == [
        *("latest", "step-00000016", "step-00000028")
    ]


def test_a_missing_config_file_is_restored_from_the_checkpoint(
    run: tuple[Config, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config, out = run
    content = (out / "config.json").read_bytes()
    (out / "config.json").unlink()
    shutil.rmtree(out / "checkpoints/step-00000024")
    assert train(config, out=out, device="cpu").step == 24
    assert "is missing; what it said is restored from" in capsys.readouterr().err
    assert (out / "config.json").read_bytes() == content
    (out / "config.json").unlink()
    other = replace(config, optimizer=replace(config.optimizer, lr=1.0))
    with pytest.raises(InputError, match=r"differs in optimizer\.lr"):
        train(other, out=out, device="cpu")


def test_a_run_that_lost_its_checkpoints_says_that_it_starts_again(
    run: tuple[Config, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config, out = run
    shutil.rmtree(out / "checkpoints")
    assert train(config, out=out, device="cpu").step == 24
    assert "has a log of 24 steps and no checkpoint; the run starts again" in capsys.readouterr().err
    assert [record["step"] for record in _records(out)] == [5, 10, 15, 20, 24]


def test_two_processes_do_not_train_in_one_directory(one_level: Config, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / ".lock").write_text("12345678901234\n")  # of one that is gone
    with lock(Run(out, one_level, None), pytest.fail):
        with pytest.raises(InputError, match=rf"another process \(number {os.getpid()}\) is training in"):
            train(one_level, out=out, device="cpu")
        assert [path.name for path in out.iterdir()] == [".lock"]
    assert train(one_level, out=out, device="cpu").exit_code == 0, (
        "the lock of a process that is gone does not count"
    )


def test_the_lock_of_a_lost_node_is_waited_for(
    one_level: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path / "run", one_level, None)
    with ExitStack() as lost:
        lost.enter_context(lock(run, pytest.fail))
        waited: list[float] = []

        def sleep(seconds: float) -> None:
            waited.append(seconds)
            if len(waited) == 5:
                lost.close()

        monkeypatch.setattr(run_directory.time, "monotonic", lambda: sum(waited))
        monkeypatch.setattr(run_directory.time, "sleep", sleep)
        with lock(run, pytest.fail, 60.0):
            assert waited == [1.0] * 5


@pytest.mark.parametrize(
    ("restarts", "timeout", "patience"), [(0, 600.0, 0.0), (1, 600.0, 120.0), (1, 60.0, 30.0)]
)
def test_a_lock_is_waited_for_after_a_restart_and_for_less_than_the_other_processes_wait(
    one_level: Config, monkeypatch: pytest.MonkeyPatch, restarts: int, timeout: float, patience: float
) -> None:
    told: list[Any] = []

    def begin(config: Config, out: Path, *rest: Any) -> RunResult:
        told.extend(rest)
        return RunResult(out, 0, 0, "")

    for name, stand_in in (
        ("launched", lambda: True),
        ("require_launched", lambda *_: None),
        ("joined", lambda *_: nullcontext(World())),
        ("local_rank", lambda: 0),
        ("_train", begin),
    ):
        monkeypatch.setattr(trainer, name, stand_in)
    monkeypatch.setattr(trainer.torchrun, "restarts", lambda: restarts)
    train(one_level, device="cpu", resume="never", collective_timeout=timeout)
    assert told[2] == ("auto" if restarts else "never")
    assert told[-1] == patience


def test_a_run_that_moved_on_between_reading_and_locking_is_not_trained_from_the_older_checkpoint(
    one_level: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"

    def open_late(*arguments: Any) -> Run:
        """Reads the directory; then, before the caller can lock it, another process finishes the run."""
        opened = open_run(*arguments)
        monkeypatch.undo()
        train(one_level, out=out, device="cpu")
        return opened

    monkeypatch.setattr(trainer, "open_run", open_late)
    with pytest.raises(InputError, match="another process has just saved a checkpoint in"):
        train(one_level, out=out, device="cpu")
    log = (out / "log.jsonl").read_bytes()
    assert "is finished" in train(one_level, out=out, device="cpu").message
    assert (out / "log.jsonl").read_bytes() == log


def test_a_dry_run_says_what_would_happen_and_writes_nothing(
    run: tuple[Config, Path], tmp_path: Path
) -> None:
    config, out = run
    assert f"run: {out} is finished" in dry_run(config, out=out, device="cpu")
    extended = dry_run(config, out=out, device="cpu", extend=48)
    assert f"run: {out} would go on from step 24 of 48" in extended
    assert "48 steps of 16 images" in extended
    assert "data: " in extended
    assert "1,797 images" in extended
    with pytest.raises(InputError, match="differs in"):
        dry_run(replace(config, method=replace(config.method, rho=6.0)), out=out, device="cpu")
    assert f"run: {tmp_path / 'new'} would start" in dry_run(config, out=tmp_path / "new", device="cpu")
    assert not (tmp_path / "new").exists()


def test_memory_that_does_not_suffice_is_one_line(
    one_level: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(*arguments: object) -> None:
        torch.empty(2**60)

    monkeypatch.setattr(trainer, "TrainStep", build)
    with pytest.raises(TrainingError, match=r"out of memory: .*; a smaller --training\.micro-batch"):
        train(one_level, out=tmp_path / "run", device="cpu")


@pytest.mark.parametrize(("loader", "images"), [("memmap", 0), ("resident", 1797 * (8 * 8 + 8))])
def test_images_that_a_gpu_holds_leave_less_for_the_micro_batch(
    one_level: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loader: str, images: int
) -> None:
    """Each a byte per pixel, and eight of its label."""
    left: list[float] = []

    def choose(config: Config, cost: object, gpus: int, memory: float) -> None:
        left.append(memory)
        raise InputError("the end")

    monkeypatch.setattr(trainer, "_memory", lambda device: 10**9)
    monkeypatch.setattr(trainer, "choose_micro_batch", choose)
    config = replace(one_level, data=replace(one_level.data, loader=loader))
    with pytest.raises(InputError, match="the end"):
        train(config, out=tmp_path / "run", device="cpu")
    assert left == [10**9 - images]


def test_a_run_whose_checkpoints_are_all_broken_is_refused(run: tuple[Config, Path]) -> None:
    config, out = run
    for file in out.glob("checkpoints/*/ema.safetensors"):
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(InputError, match=r"ema\.safetensors|broken|whole"):
        train(config, out=out, device="cpu")


def test_other_images_under_the_same_name_are_refused(run: tuple[Config, Path], tmp_path: Path) -> None:
    from ict_fast.data.store import open_store, write_store

    config, out = run
    store = open_store(Path(config.data.path))
    images, labels = np.array(store.images), np.array(store.labels)
    images[0] ^= 1
    write_store(tmp_path / "other", images, labels, source="test", recipe="test", classes=list("0123456789"))
    other = replace(config, data=replace(config.data, path=str(tmp_path / "other")))
    shutil.rmtree(out / "checkpoints/step-00000024")
    with pytest.raises(InputError, match="holds other images"):
        train(other, out=out, device="cpu")


def test_data_that_do_not_fit_the_network_are_refused(one_level: Config, tmp_path: Path) -> None:
    larger = replace(
        one_level, network=replace(one_level.network, resolution=16, attention_resolutions=(16,))
    )
    with pytest.raises(InputError, match=r"8x8 images of 1 channels; .* 16x16"):
        train(larger, out=tmp_path / "run", device="cpu")
    missing = replace(one_level, data=replace(one_level.data, path=str(tmp_path / "nothing")))
    with pytest.raises(InputError, match=r"ict-fast prepare"):
        train(missing, out=tmp_path / "run", device="cpu")
    few = replace(one_level, network=replace(one_level.network, num_classes=5))
    with pytest.raises(InputError, match=r"10 classes; --network.num-classes is 5"):
        train(few, out=tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


@contextmanager
def _full_disk(monkeypatch: pytest.MonkeyPatch, times: int) -> Iterator[None]:
    """The next `times` checkpoints meet a full disk."""
    write, left = saving.write_checkpoint, [times]

    def full(*args: object, **kwargs: object) -> object:
        if left[0]:
            left[0] -= 1
            raise OSError(28, "No space left on device")
        return write(*args, **kwargs)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(saving, "write_checkpoint", full)
        yield


def test_a_full_disk_costs_a_warning_and_no_training(
    one_level: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with _full_disk(monkeypatch, 2):
        assert train(one_level, out=tmp_path / "run", device="cpu").exit_code == 0
    shown = capsys.readouterr().err
    assert shown.count("could not be written (No space left on device); there is none before it") == 2
    assert open_checkpoint(tmp_path / "run").step == 24


@pytest.fixture
def brief(one_level: Config) -> Config:
    """Four steps of one block at a time, a checkpoint after each."""
    return replace(
        one_level,
        network=replace(one_level.network, num_blocks=1, attention_resolutions=()),
        training=replace(one_level.training, total_steps=4, batch_size=2),
        logging=replace(one_level.logging, log_every=1, checkpoint_every=1, tracker="none"),
    )


@pytest.mark.parametrize("place", ["thread", "copy", "picture"])
def test_memory_that_a_checkpoint_or_a_picture_lacks_costs_a_warning_and_no_training(
    brief: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    place: str,
) -> None:
    module, name = {
        "thread": (checkpoint_module, "_encode_state"),
        "copy": (saving, "_on_host"),
        "picture": (grids, "sample"),
    }[place]
    original, calls = getattr(module, name), []

    def greedy(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            torch.empty(2**60)
        return original(*arguments)

    monkeypatch.setattr(module, name, greedy)
    config = replace(brief, logging=replace(brief.logging, grid_every=1, snapshot_every=1))
    assert train(config, out=tmp_path / "run", device="cpu").exit_code == 0
    [warning] = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert "DefaultCPUAllocator: can't allocate memory" in warning
    drawn = place == "picture"
    what = "/grids/step-00000002.png cannot be" if drawn else "the checkpoint of step 2 could not be written"
    assert what in warning
    kept = [int(path.name.removeprefix("step-")) for path in (tmp_path / "run/checkpoints").glob("step-*")]
    assert sorted(kept) == ([1, 2, 3, 4] if drawn else [1, 3, 4])


def test_a_step_is_saved_before_its_picture_is_drawn(
    brief: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*arguments: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(grids, "sample", crash)
    config = replace(brief, logging=replace(brief.logging, grid_every=2))
    with pytest.raises(RuntimeError, match="a bug"):
        train(config, out=tmp_path / "run", device="cpu")
    assert open_checkpoint(tmp_path / "run").step == 2


def test_the_training_goes_on_while_a_checkpoint_is_written(
    one_level: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint of step 5 is not written before step 8 is done, and holds the state of step 5."""
    from ict_fast.training.step import TrainStep

    original, write, reached = TrainStep.__call__, saving.write_checkpoint, threading.Event()

    def step(self: TrainStep, number: int, batches: object) -> None:
        original(self, number, batches)  # type: ignore[arg-type]
        if number == 7:
            reached.set()

    def late(*args: object, **kwargs: object) -> object:
        assert reached.wait(timeout=60)
        return write(*args, **kwargs)  # type: ignore[arg-type]

    config = replace(one_level, logging=replace(one_level.logging, checkpoint_every=9, snapshot_every=5))
    assert train(config, out=tmp_path / "plain", device="cpu").step == 24
    monkeypatch.setattr(TrainStep, "__call__", step)
    monkeypatch.setattr(saving, "write_checkpoint", late)
    assert train(config, out=tmp_path / "late", device="cpu").step == 24
    kept = sorted(path.name for path in (tmp_path / "late/checkpoints").glob("step-*"))
    assert kept == [f"step-{number:08d}" for number in (5, 10, 15, 20, 24)], "snapshots are never deleted"
    for name in ("weights", "ema", "optimizer"):
        file = f"checkpoints/step-00000005/{name}.safetensors"
        assert (tmp_path / "late" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()


def test_a_checkpoint_by_the_clock_is_not_due_while_one_is_written(
    one_level: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training would wait for it."""
    clock, writing = [0.0], Future[Path]()
    monkeypatch.setattr(saving, "monotonic", lambda: clock[0])
    config = replace(one_level, logging=replace(one_level.logging, checkpoint_minutes=2))
    train_step: Any = SimpleNamespace(world=World())
    with saving.Saver(Run(tmp_path, config, None), None, train_step, None) as saver:  # type: ignore[arg-type]
        clock[0] = 119.0
        assert not saver.is_due()
        clock[0], saver._writing = 121.0, (1, writing)
        assert not saver.is_due()
        writing.set_result(tmp_path)
        assert saver.is_due()
        assert not saver.is_due(), "once"


def test_a_file_system_that_fails_ends_the_training_and_is_no_bad_input(
    one_level: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ict_fast.training.step import TrainStep

    errors = [OSError(errno.ESTALE, "Stale file handle", "images.npy"), BrokenPipeError()]

    def fails(self: TrainStep, number: int, batches: object) -> None:
        raise errors.pop(0)

    monkeypatch.setattr(TrainStep, "__call__", fails)
    with pytest.raises(TrainingError, match=r"^images.npy: Stale file handle; the same command resumes"):
        train(one_level, out=tmp_path / "run", device="cpu")
    with pytest.raises(BrokenPipeError):  # `ict-fast train | head`, which the command line knows
        train(one_level, out=tmp_path / "run", device="cpu")


def test_a_file_system_without_locks_is_warned_of(
    one_level: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_locks(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(run_directory.fcntl, "flock", no_locks)
    assert train(one_level, out=tmp_path / "run", device="cpu").exit_code == 0
    assert "cannot be locked (No locks available)" in capsys.readouterr().err


def test_a_lock_that_fails_for_another_reason_ends_the_run(
    one_level: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stale(*arguments: object) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(run_directory.fcntl, "flock", stale)
    with (
        pytest.raises(TrainingError, match=r"run cannot be locked \(Stale file handle\)$"),
        lock(Run(tmp_path / "run", one_level, None), pytest.fail),
    ):
        pass


def test_a_disk_that_is_full_when_a_run_goes_on_is_no_fault_of_the_command(
    run: tuple[Config, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, out = run
    opened = open_run(config, out, "auto", None, pytest.fail)
    log = (out / "log.jsonl").read_bytes()

    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(run_directory, "replace_durably", full)
    prepare_directory(opened)  # nothing has to change
    with (out / "log.jsonl").open("a") as file:
        file.write('{"step": 25}\n')
    cut = r"cannot be written \(No space left on device\); with room for it .* resumes at step 24$"
    with pytest.raises(TrainingError, match=cut):
        prepare_directory(opened)
    monkeypatch.undo()
    prepare_directory(opened)
    assert (out / "log.jsonl").read_bytes() == log

    def over_quota(*arguments: object) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    for failing, message in ((full, cut), (over_quota, r"Disk quota exceeded\); with room for it .* 24$")):
        monkeypatch.setattr(run_directory.os, "open", failing)
        with pytest.raises(TrainingError, match=message), lock(opened, pytest.fail):
            pass
    new = replace(opened, checkpoint=None)
    with pytest.raises(InputError, match=r"exceeded\); choose another --out$"), lock(new, pytest.fail):
        pass


def test_what_one_process_alone_may_meet_is_met_together(
    run: tuple[Config, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images that are missing on one node, a tracker that process 0 cannot start: see `World.together`."""
    config, out = run
    inside, met = [False], []

    def together(self: World, work: Callable[[], Any]) -> Any:
        inside[0] = True
        try:
            return work()
        finally:
            inside[0] = False

    def watched(place: object, name: str) -> None:
        original = getattr(place, name)

        def call(*arguments: object, **options: object) -> object:
            met.append((name, inside[0]))
            if name == "open_tracker":
                raise InputError("the end")
            return original(*arguments, **options)

        monkeypatch.setattr(place, name, call)

    monkeypatch.setattr(World, "together", together)
    watched(trainer.TrainStep, "restore")
    for name in ("open_data", "make_loader", "describe_run", "open_tracker"):
        watched(trainer, name)
    with pytest.raises(InputError, match="the end"):
        train(config, out=out, device="cpu", extend=25)
    names = ("open_data", "restore", "make_loader", "describe_run", "open_tracker")
    assert met == [(name, True) for name in names]


def test_an_end_that_could_not_be_saved_is_a_failure(
    one_level: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        _full_disk(monkeypatch, 100),
        pytest.raises(TrainingError, match="step 24 could not be saved"),
    ):
        train(one_level, out=tmp_path / "run", device="cpu")


@pytest.mark.parametrize(("capacity", "quota"), [(1, False), (2, False), (2, True)])
def test_on_a_full_disk_the_end_takes_the_place_of_an_older_checkpoint_or_is_a_failure(
    brief: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capacity: int, quota: bool
) -> None:
    """The disk, or its user, has room for so many checkpoints; the newest whole one is never given up."""
    out = tmp_path / "run"

    def disk_usage(path: Path) -> SimpleNamespace:
        is_full = len(checkpoint_steps(out)) >= capacity
        if quota and is_full:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        return SimpleNamespace(free=1000 if is_full else 1 << 40)

    monkeypatch.setattr(checkpoint_module.shutil, "disk_usage", disk_usage)
    if capacity == 2:
        assert train(brief, out=out, device="cpu").step == 4
        assert checkpoint_steps(out) == {2, 4}
    else:
        needed = r"\(a checkpoint needs \d+\.\d MB and the disk has 0\.0 MB left\)"
        with pytest.raises(TrainingError, match=rf"^step 4 could not be saved {needed}; .* holds step 1$"):
            train(brief, out=out, device="cpu")
    assert open_checkpoint(out).step == (4 if capacity == 2 else 1)


def test_no_checkpoint_is_given_up_for_an_end_that_failed_for_another_reason(
    brief: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = saving.write_checkpoint

    def broken(out: Path, step: int, *rest: Any, **options: Any) -> Path:
        if step > 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return write(out, step, *rest, **options)

    monkeypatch.setattr(saving, "write_checkpoint", broken)
    failure = re.escape("step 4 could not be saved (Input/output error)")
    with pytest.raises(TrainingError, match=f"^{failure}"):
        train(brief, out=tmp_path / "run", device="cpu")
    assert checkpoint_steps(tmp_path / "run") == {1, 2}


def test_too_many_non_finite_steps_in_a_row_end_the_run(
    one_level: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ict_fast.training.step import TrainStep

    config = replace(one_level, training=replace(one_level.training, max_skipped_steps=6))
    original = TrainStep.__call__

    def poisoned(self: TrainStep, step: int, batches: object) -> None:
        if step == 9:
            next(iter(self.network.parameters())).register_hook(lambda gradient: gradient * torch.inf)
        original(self, step, batches)  # type: ignore[arg-type]

    monkeypatch.setattr(TrainStep, "__call__", poisoned)
    with pytest.raises(TrainingError, match=r"steps in a row up to step 16 .*a smaller --optimizer.lr, in"):
        train(config, out=tmp_path / "run", device="cpu")
    records = _records(tmp_path / "run")
    assert records[-1]["step"] == 16
    assert records[-1]["skipped"] == 7
    assert records[-1]["loss"] > 0, "the loss itself stays finite here"
    weights = open_checkpoint(tmp_path / "run").tensors("weights")
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())


@pytest.mark.parametrize(("skipped", "warned"), [("every", True), ("most", True), ("few", False)])
def test_a_run_that_learns_from_no_step_fails_and_one_that_learns_from_few_says_so(
    one_level: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    skipped: str,
    warned: bool,
) -> None:
    from ict_fast.training import failures
    from ict_fast.training.step import TrainStep

    original = TrainStep.compute

    def poisoned(self: TrainStep, batches: Any) -> torch.Tensor:
        figures = original(self, batches)
        step = int(self.seed_and_step[1])
        if {"every": True, "most": step % 3 > 0, "few": step % 3 == 0}[skipped]:
            for parameter in self.network.parameters():
                parameter.grad.fill_(torch.nan)  # type: ignore[union-attr]
        return figures

    monkeypatch.setattr(TrainStep, "compute", poisoned)
    monkeypatch.setattr(failures, "_FEWEST_STEPS", 10)
    out = tmp_path / "run"
    if skipped == "every":
        for _ in range(2):  # a finished run that is started again says so too
            with pytest.raises(
                DivergedError, match="none of the 24 steps had a finite gradient: the weights"
            ):
                train(one_level, out=out, device="cpu")
    else:
        assert train(one_level, out=out, device="cpu").exit_code == 0
    assert open_checkpoint(out).step == 24
    told = [line for line in capsys.readouterr().err.splitlines() if "steps had no finite gradient" in line]
    assert len(told) == warned, "once"


@pytest.mark.parametrize(("adaptive", "hint"), [(False, ""), (True, " or --network.no-adaptive-norm")])
def test_weights_that_overflow_are_not_saved_and_the_line_says_what_may_help(
    one_level: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str], adaptive: bool, hint: str
) -> None:
    words = ["--data", one_level.data.path, "--out", str(tmp_path / "run"), "--network.channels", "8"]
    words += ["--training.batch-size", "4", "--training.total-steps", "2", "--optimizer.lr", "3e38"]
    words += ["--network.adaptive-norm"] if adaptive else []
    assert main(["train", "--device", "cpu", "--logging.tracker", "none", *words]) == 1
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ict-fast: error")]
    assert "is not finite; this state is not saved: the training has diverged" in line
    assert f"; a smaller --optimizer.lr{hint}, in a new --out, may help (log: " in line
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))


def test_a_log_that_cannot_be_written_is_reported_once(
    one_level: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monitor = Monitor(Run(tmp_path / "gone", one_level, None))
    for step in (1, 2):
        monitor.record(step, {"loss": 1.0, "num_scales": 11, "skipped": 0, "loss_by_sigma": []})
    assert capsys.readouterr().err.count("cannot be written (No such file or directory)") == 1


def test_dry_run_text_names_configuration_parameters_and_stages() -> None:
    from ict_fast import presets

    text = describe(presets.get("cifar10"))
    assert '"batch_size": 1024' in text
    assert "8: steps 350,000 to 399,999, N = 1281" in text
    count = int(
        next(line for line in text.splitlines() if line.startswith("parameters")).split()[1].replace(",", "")
    )
    assert count == pytest.approx(56.40e6, rel=0.005)
    long = describe(presets.get("cifar10-ct2023"))
    assert "stages: 150 (square-root)" in long, "N = 2, ..., 151"
    assert "..." in long


def test_devices_that_do_not_exist_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"--gpus is 8, but torch sees no GPU here; .*cpu runs without"):
        resolve_device("auto", 8)
    with pytest.raises(InputError, match="--device is cuda"):
        resolve_device("cuda", None)
    with pytest.raises(InputError, match="exclude each other"):
        resolve_device("cpu", 1)
    with pytest.raises(InputError, match="--gpus is 0"):
        resolve_device("auto", 0)
    with pytest.raises(InputError, match="must be auto, cuda or cpu"):
        resolve_device("tpu", None)
    assert resolve_device("cpu") == torch.device("cpu")


def test_a_gpu_that_torch_cannot_use_is_never_passed_over_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    from ict_fast.training import launch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(launch, "nvidia_device", lambda: "/dev/nvidia0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(InputError, match=r"NVIDIA device \(/dev/nvidia0\) that torch cannot use"):
        resolve_device("auto")
    assert resolve_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert resolve_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(InputError, match="--gpus is 8, but torch sees 4"):
        resolve_device("auto", 8)


def test_progress_that_cannot_be_shown_never_ends_a_run(
    one_level: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open("/dev/full", "wb", buffering=0) as full, monkeypatch.context() as patch:
        patch.setattr("sys.stderr", io.TextIOWrapper(full, write_through=True))
        assert train(one_level, out=tmp_path / "run", device="cpu").exit_code == 0
        patch.setattr("sys.stderr", None)
        assert train(one_level, out=tmp_path / "other", device="cpu").exit_code == 0


def test_a_trunk_in_another_arithmetic_is_said(
    run: tuple[Config, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, out = run
    state = out / "checkpoints/step-00000024/state.json"
    assert json.loads(state.read_text())["trunk_dtype"] == "float32"
    train(config, out=out, device="cpu", extend=25)
    assert "goes on in" not in capsys.readouterr().err
    monkeypatch.setattr(trainer, "trunk_name", lambda train_step: "bfloat16")
    train(config, out=out, device="cpu", extend=26)
    warning = "warning: the run so far has a trunk in float32, on this device it goes on in bfloat16\n"
    assert warning in capsys.readouterr().err
