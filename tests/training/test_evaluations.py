"""Measuring while training: it changes no bit of the run, the best is kept, and no failure ends a run."""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ict_fast.evaluation
from ict_fast import presets
from ict_fast.checkpoint import open_checkpoint
from ict_fast.cli import main
from ict_fast.config import Config
from ict_fast.consistency import ConsistencyModel, load_model
from ict_fast.errors import EXIT_SIGINT, InputError
from ict_fast.training import evaluations as evaluations_module
from ict_fast.training import saving
from ict_fast.training.dry_run import dry_run
from ict_fast.training.run_directory import Run
from ict_fast.training.trainer import train


def _measured(config: Config, **logging: Any) -> Config:
    logging = {"evaluate_every": 4, "evaluate_count": 64, "checkpoint_every": 4, "tracker": "none"} | logging
    return replace(config, logging=replace(config.logging, **logging))


def _lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "evaluations.jsonl").read_text().splitlines()]


def _kept(out: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (out / "checkpoints").glob("step-*"))


@pytest.fixture
def distances(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Stands in for the measurement: each gives, or raises, the next of some values."""

    def script(*values: float | BaseException) -> None:
        left = list(values)

        def evaluate(model: ConsistencyModel, reference: Path, **options: Any) -> dict[str, Any]:
            options["progress"](0.5, "half way")
            value = left.pop(0)
            if isinstance(value, BaseException):
                raise value
            method, words = model.config.method, {1: "one_step", 2: "two_step"}
            return {
                words[number]: {
                    "frechet_distance": value,
                    "sigmas": [method.sigma_max, *[method.second_sigma] * (number - 1)],
                }
                for number in options["steps"]
            } | {"count": options["count"]}

        monkeypatch.setattr(ict_fast.evaluation, "evaluate", evaluate)

    return script


def test_measuring_changes_no_bit_of_the_run_and_writes_what_evaluate_says(
    one_level: Config, tmp_path: Path
) -> None:
    config = replace(one_level, training=replace(one_level.training, total_steps=8))
    with_it, without = tmp_path / "with", tmp_path / "without"
    train(_measured(config, evaluate_steps=(1, 2)), out=with_it, device="cpu")
    train(_measured(config, evaluate_every=0), out=without, device="cpu")
    for name in ("weights", "ema", "optimizer"):
        file = f"checkpoints/step-00000008/{name}.safetensors"
        assert (with_it / file).read_bytes() == (without / file).read_bytes()
    logs = [[json.loads(line) for line in (out / "log.jsonl").open()] for out in (with_it, without)]
    assert [line["loss"] for line in logs[0]] == [line["loss"] for line in logs[1]]
    assert not (without / "evaluations.jsonl").exists()
    assert [line["step"] for line in _lines(with_it)] == [4, 8]
    model = load_model(with_it)
    expected = ict_fast.evaluation.evaluate(model, Path(config.data.path), steps=(1, 2), count=64)
    for steps in ("one_step", "two_step"):
        assert _lines(with_it)[-1][steps] == expected[steps], "of the averaged weights of the last step"


def test_the_best_checkpoint_outlives_the_rotation_and_is_found_by_its_name(
    one_level: Config, tmp_path: Path, distances: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    distances(9.0, 3.0, 7.0, 5.0, 4.0, 8.0)
    train(_measured(one_level, checkpoint_every=2), out=out, device="cpu")
    assert [line["one_step"]["frechet_distance"] for line in _lines(out)] == [9, 3, 7, 5, 4, 8]
    assert (out / "checkpoints/best").read_text() == "step-00000008\n"
    assert _kept(out) == [8, 22, 24], "the best, and the newest two"
    assert open_checkpoint(out / "checkpoints/best").step == 8
    assert open_checkpoint(out).step == 24
    shown = capsys.readouterr().err
    assert "step 8: Fréchet distance 3 in 1 step, the best so far" in shown
    assert "step 24: Fréchet distance 8 in 1 step, best 3 at step 8" in shown


def test_a_step_is_on_the_disk_before_it_is_measured_and_the_best_one_only_if_it_is_there(
    one_level: Config, tmp_path: Path, distances: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A measurement may take the process with it; the checkpoint of step 3 meets a full disk."""
    out, write, there = tmp_path / "run", saving.write_checkpoint, []

    def slowly(out: Path, step: int, *rest: Any, **options: Any) -> Path:
        time.sleep(0.05)
        if step == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(out, step, *rest, **options)

    monkeypatch.setattr(saving, "write_checkpoint", slowly)
    distances(9.0, 3.0, 2.0, 5.0)
    measure = ict_fast.evaluation.evaluate

    def measured(*arguments: Any, **options: Any) -> dict[str, Any]:
        there.append(_kept(out))
        return measure(*arguments, **options)

    monkeypatch.setattr(ict_fast.evaluation, "evaluate", measured)
    config = replace(one_level, training=replace(one_level.training, total_steps=4))
    train(_measured(config, evaluate_every=1, checkpoint_every=1), out=out, device="cpu")
    assert there == [[1], [1, 2], [1, 2], [2, 4]]
    assert open_checkpoint(out / "checkpoints/best").step == 2


def test_the_best_step_is_the_last_one_also_if_the_disk_was_full_at_first(
    one_level: Config, tmp_path: Path, distances: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, write, tried = tmp_path / "run", saving.write_checkpoint, []

    def full(out: Path, step: int, *rest: Any, **options: Any) -> Path:
        tried.append(step)
        if tried == [1, 2]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(out, step, *rest, **options)

    monkeypatch.setattr(saving, "write_checkpoint", full)
    distances(9.0, 3.0)
    config = replace(one_level, training=replace(one_level.training, total_steps=2, batch_size=2))
    train(_measured(config, evaluate_every=1, checkpoint_every=1), out=out, device="cpu")
    assert tried == [1, 2, 2]
    assert (out / "checkpoints/best").read_text() == "step-00000002\n"


def test_a_crash_while_measuring_loses_no_step_that_was_to_be_saved(
    one_level: Config, tmp_path: Path, distances: Callable[..., None]
) -> None:
    distances(9.0, 8.0, SystemExit(9))  # nothing in the run catches this
    with pytest.raises(SystemExit):
        train(_measured(one_level), out=tmp_path / "run", device="cpu")
    assert open_checkpoint(tmp_path / "run").step == 12


def test_the_last_step_is_measured_whatever_its_number(one_level: Config, tmp_path: Path) -> None:
    unused: Any = None
    run = Run(tmp_path, _measured(one_level, evaluate_every=7), None)
    evaluations = evaluations_module.Evaluations(run, unused, unused, unused)
    assert [step for step in range(25) if evaluations.is_due(step)] == [7, 14, 21, 24]


def test_a_measured_step_is_saved_only_if_it_is_the_best(
    one_level: Config, tmp_path: Path, distances: Callable[..., None]
) -> None:
    distances(9.0, 3.0, 7.0, 5.0, 4.0, 8.0)
    train(_measured(one_level, checkpoint_every=24, keep_checkpoints=9), out=tmp_path / "run", device="cpu")
    assert _kept(tmp_path / "run") == [4, 8, 24]


def test_a_run_that_goes_on_cuts_its_measurements_back_and_knows_its_best(
    one_level: Config, tmp_path: Path, distances: Callable[..., None]
) -> None:
    out, config = tmp_path / "run", _measured(one_level, keep_checkpoints=3)
    distances(9.0, 3.0, 7.0, 5.0, 4.0, 2.0)
    train(config, out=out, device="cpu")
    assert _kept(out) == [16, 20, 24]
    for step in (20, 24):
        shutil.rmtree(out / f"checkpoints/step-{step:08d}")
    distances(6.0, 7.0)
    train(config, out=out, device="cpu")
    assert [(line["step"], line["one_step"]["frechet_distance"]) for line in _lines(out)] == [
        *((4, 9), (8, 3), (12, 7), (16, 5)),
        *((20, 6), (24, 7)),
    ]
    assert (out / "checkpoints/best").read_text() == "step-00000020\n", "the old best one is lost"
    distances(6.5, 5.5)
    train(config, out=out, device="cpu", extend=32)
    assert (out / "checkpoints/best").read_text() == "step-00000032\n"
    assert _kept(out) == [24, 28, 32], "the one before is no longer the best"


@pytest.mark.parametrize(
    "error", [InputError("data/x: is not there"), RuntimeError("CUDA out of memory"), KeyError("one_step")]
)
def test_a_measurement_that_fails_warns_and_the_training_goes_on(
    one_level: Config,
    tmp_path: Path,
    distances: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    error: Exception,
) -> None:
    distances(9.0, error, 7.0, float("nan"), 4.0, 8.0)
    assert train(_measured(one_level), out=tmp_path / "run", device="cpu").exit_code == 0
    assert [line["step"] for line in _lines(tmp_path / "run")] == [4, 12, 20, 24]
    shown = capsys.readouterr().err
    assert shown.count("could not be measured") == 2
    assert f"step 8 could not be measured ({error!s}" in shown


def test_a_line_that_a_full_disk_cuts_short_swallows_no_other(
    one_level: Config, tmp_path: Path, distances: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    original, appended = Path.open, 0

    def open_until_full(self: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        nonlocal appended
        if self.name == "evaluations.jsonl" and mode == "a":
            appended += 1
            if appended == 2:
                with original(self, mode) as file:
                    file.write('{"step": 8, "one_')
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(self, mode, *arguments, **options)

    monkeypatch.setattr(Path, "open", open_until_full)
    distances(9.0, 8.0, 3.0, 5.0, 4.0, 6.0, 7.0)
    train(_measured(one_level), out=tmp_path / "run", device="cpu")
    train(_measured(one_level), out=tmp_path / "run", device="cpu", extend=28)
    assert [line["step"] for line in _lines(tmp_path / "run")] == [4, 12, 16, 20, 24, 28]
    assert (tmp_path / "run/checkpoints/best").read_text() == "step-00000012\n"


@pytest.mark.parametrize(
    ("logging", "complaint"),
    [
        ({"evaluate_every": 8}, "evaluate-features FILE"),
        ({"evaluate_every": 8, "evaluate_features": "nowhere.pt"}, "evaluate-features is nowhere.pt"),
        ({"evaluate_every": 8, "evaluate_reference": "nowhere.npz"}, "evaluate-reference is nowhere.npz"),
    ],
)
def test_what_can_never_be_measured_is_refused_at_the_start(
    tmp_path: Path, logging: dict[str, Any], complaint: str
) -> None:
    config = presets.get("cifar10")
    with pytest.raises(InputError, match=complaint):
        train(replace(config, logging=replace(config.logging, **logging)), out=tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_data_that_move_away_while_the_run_goes_on_cost_a_warning(
    one_level: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The loader has its images open; the measurement looks for them anew."""
    data = tmp_path / "data"
    shutil.copytree(one_level.data.path, data)
    config = replace(one_level, data=replace(one_level.data, path=str(data)))
    config = replace(config, training=replace(config.training, total_steps=8))
    original = evaluations_module.Evaluations.is_due

    def moved(self: Any, step: int) -> bool:
        if step == 4:
            data.rename(tmp_path / "elsewhere")
        return original(self, step)

    monkeypatch.setattr(evaluations_module.Evaluations, "is_due", moved)
    assert train(_measured(config, evaluate_every=8), out=tmp_path / "run", device="cpu").exit_code == 0
    assert "step 8 could not be measured" in capsys.readouterr().err


def test_ctrl_c_ends_a_measurement_which_is_made_up_for_when_the_run_goes_on(
    one_level: Config, tmp_path: Path, distances: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, config = tmp_path / "run", _measured(one_level)
    original = evaluations_module.Evaluations._evaluate

    def interrupted(self: Any, model: object) -> dict[str, Any]:
        if (out / "evaluations.jsonl").exists():
            self._stop.exit_code = EXIT_SIGINT  # as the signal's handler does
        return original(self, model)

    distances(9.0, 3.0, 7.0, 5.0, 4.0, 8.0)
    with monkeypatch.context() as patch:
        patch.setattr(evaluations_module.Evaluations, "_evaluate", interrupted)
        result = train(config, out=out, device="cpu")
    assert result.exit_code == EXIT_SIGINT
    assert result.step == 8
    assert [line["step"] for line in _lines(out)] == [4]
    saved = (out / "checkpoints/step-00000008").stat().st_ino
    config = replace(config, logging=replace(config.logging, log_every=3))  # which a checkpoint remembers
    train(config, out=out, device="cpu")
    assert [line["step"] for line in _lines(out)] == [4, 8, 12, 16, 20, 24]
    assert (out / "checkpoints/best").read_text() == "step-00000008\n"
    assert (out / "checkpoints/step-00000008").stat().st_ino == saved, "it is there, and not written anew"


def test_ctrl_c_in_the_last_measurement_says_that_it_is_missing_and_how_to_make_it(
    one_level: Config, tmp_path: Path, distances: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    original = evaluations_module.Evaluations._evaluate

    def interrupted(self: Any, model: object) -> dict[str, Any]:
        if (out / "evaluations.jsonl").exists() and len(_lines(out)) == 5:  # all but the last of 24 steps
            self._stop.exit_code = EXIT_SIGINT
        return original(self, model)

    distances(9.0, 3.0, 7.0, 5.0, 4.0, 8.0)
    monkeypatch.setattr(evaluations_module.Evaluations, "_evaluate", interrupted)
    config = _measured(one_level, evaluate_reference=one_level.data.path)
    result = train(config, out=out, device="cpu")
    assert (result.exit_code, result.step) == (EXIT_SIGINT, 24)
    command = f"`ict-fast evaluate {out} --reference {one_level.data.path} --steps 1 --count 64`"
    assert result.message.endswith(
        f"24 steps are done; their last measurement is missing: {command} makes it"
    )
    assert _kept(out)[-1] == 24
    assert [line["step"] for line in _lines(out)] == [4, 8, 12, 16, 20]
    # As all processes find it that start again, after one was lost meanwhile.
    finished = train(config, out=out, device="cpu")
    measured = "24 steps are done; their last" + result.message.partition("done; their last")[2]
    assert (finished.exit_code, finished.message) == (0, f"{out} is finished: {measured}")
    (out / "checkpoints/evaluation.json").write_text(json.dumps({"step": 24}))
    assert train(config, out=out, device="cpu").message == f"{out} is finished: 24 steps are done"


def test_the_command_for_a_missing_measurement_makes_the_runs_own(one_level: Config, tmp_path: Path) -> None:
    config = _measured(
        replace(one_level, training=replace(one_level.training, total_steps=8)), evaluate_steps=(3, 1)
    )
    out = tmp_path / "a run"
    train(config, out=out, device="cpu")
    program, *words = shlex.split(evaluations_module.evaluate_command(out, config))
    assert program == "ict-fast"
    assert main(words) == 0
    own, made = _lines(out)[-1], json.loads((out / "checkpoints/evaluation.json").read_text())
    assert {*own} - {*made} == {"seconds"}
    assert {*made} - {*own} == {"checkpoint"}
    assert all(made[name] == own[name] for name in {*own} - {"seconds"})


def test_a_last_measurement_that_was_made_is_not_missing(
    one_level: Config, tmp_path: Path, distances: Callable[..., None]
) -> None:
    distances(9.0, 3.0, 7.0, 5.0, 4.0, 8.0)
    result = train(_measured(one_level), out=tmp_path / "run", device="cpu")
    assert (result.exit_code, result.message) == (0, f"{tmp_path / 'run'}: 24 steps are done")


def test_the_best_is_sought_anew_among_measurements_of_another_kind(
    one_level: Config, tmp_path: Path, distances: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    """Of twice as many images: the best before, 3 of step 8, says nothing about them."""
    out, config = tmp_path / "run", _measured(one_level, keep_checkpoints=3)
    distances(9.0, 3.0, 7.0, 5.0, 4.0, 2.0)
    train(config, out=out, device="cpu")
    for step in (20, 24):
        shutil.rmtree(out / f"checkpoints/step-{step:08d}")
    (out / "checkpoints/best").write_text("step-00000008\n")
    distances(6.0, 7.0)
    train(_measured(one_level, keep_checkpoints=3, evaluate_count=128), out=out, device="cpu")
    assert [(line["step"], line["count"]) for line in _lines(out)] == [
        *((step, 64) for step in (4, 8, 12, 16)),
        *((step, 128) for step in (20, 24)),
    ]
    assert (out / "checkpoints/best").read_text() == "step-00000020\n"
    shown = capsys.readouterr().err
    assert shown.count("the first of its kind: that of step 8, the best before, does not compare") == 1
    assert "step 24: Fréchet distance 7 in 1 step, best 6 at step 20" in shown


@pytest.mark.parametrize(
    "change",
    [
        {"count": 65},
        {"features": {"sha256": "another"}},
        {"reference_fingerprint": "another"},
        {"one_step": None, "two_step": {"frechet_distance": 2.0, "sigmas": [80.0, 0.8]}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_measurement_of_other_images_features_or_steps_is_of_another_kind(change: dict[str, Any]) -> None:
    result = {
        "one_step": {"frechet_distance": 2.0, "sigmas": [80.0]},
        "count": 64,
        "features": {"sha256": "one"},
        "reference_fingerprint": "one",
    }
    other = {name: value for name, value in (result | change).items() if value is not None}
    kinds = [evaluations_module._measured(each).kind for each in (result, dict(result), other)]
    assert kinds[0] == kinds[1] != kinds[2]


@pytest.mark.parametrize("steps", [(1, 2), (2, 1)])
def test_another_second_sigma_begins_anew_where_two_steps_are_compared(
    one_level: Config, tmp_path: Path, distances: Callable[..., None], steps: tuple[int, ...]
) -> None:
    """Of one step it changes nothing: the best before, 3 of step 8, stays."""
    out, config = tmp_path / "run", _measured(one_level, keep_checkpoints=3, evaluate_steps=steps)
    distances(9.0, 3.0, 7.0, 5.0, 4.0, 5.0)
    train(config, out=out, device="cpu")
    for step in (20, 24):
        shutil.rmtree(out / f"checkpoints/step-{step:08d}")
    distances(6.0, 7.0)
    other = replace(config, method=replace(config.method, second_sigma=0.4))
    train(other, out=out, device="cpu")
    assert [line["two_step"]["sigmas"][1] for line in _lines(out)] == [0.821] * 4 + [0.4] * 2
    best = 8 if steps[0] == 1 else 20
    assert (out / "checkpoints/best").read_text() == f"step-{best:08d}\n"


def test_measurements_of_old_runs_that_lack_their_noise_levels_are_read(
    one_level: Config, tmp_path: Path, distances: Callable[..., None]
) -> None:
    """Those of one step compare with new ones."""
    out, config = tmp_path / "run", _measured(one_level, keep_checkpoints=3, evaluate_steps=(1,))
    distances(9.0, 3.0, 7.0, 5.0, 4.0, 5.0)
    train(config, out=out, device="cpu")
    shutil.rmtree(out / "checkpoints/step-00000024")
    lines = _lines(out)
    for line in lines:
        del line["one_step"]["sigmas"]
    (out / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    distances(6.0)
    train(config, out=out, device="cpu")
    assert len(_lines(out)) == 6
    assert (out / "checkpoints/best").read_text() == "step-00000008\n"


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("option", ["evaluate_features", "evaluate_reference"])
def test_files_that_can_never_measure_are_refused_before_the_first_step(
    one_level: Config, tmp_path: Path, option: str, processes: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Features that are a pickle; a reference of images of another size."""
    file = tmp_path / ("features.pt" if option == "evaluate_features" else "reference.npz")
    if option == "evaluate_features":
        torch.save({"a": torch.ones(2)}, file)
    else:
        np.savez(file, arr_0=np.zeros((8, 16, 16, 1), np.uint8))
    config, out = _measured(one_level, **{option: str(file)}), tmp_path / "run"
    said = "refused, it is a pickle" if option == "evaluate_features" else "holds images of 16x16"
    with pytest.raises(InputError, match=said) as refused:
        train(config, out=out, device="cpu", processes=processes)
    assert "\n" not in str(refused.value)
    assert not out.exists()
    assert f"measurements: not here: {refused.value}" in dry_run(config, out=out, device="cpu")


def test_a_dry_run_refuses_what_no_machine_can_measure_and_says_what_is_missing_on_this_one(
    one_level: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cifar10 = presets.get("cifar10")
    with pytest.raises(InputError, match="evaluate-features FILE"):
        dry_run(_measured(cifar10), out=tmp_path / "run", device="cpu")
    said = dry_run(_measured(cifar10, evaluate_features="nowhere.pt"), out=tmp_path / "run", device="cpu")
    assert "measurements: not here: --logging.evaluate-features is nowhere.pt, which is not there" in said
    monkeypatch.setattr("ict_fast.training.trackers._is_installed", lambda package: False)
    said = dry_run(_measured(one_level, tracker="wandb"), out=tmp_path / "run", device="cpu")
    assert "tracker: not here: --logging.tracker is wandb, which is not installed" in said
    assert "measurements" not in said


def test_the_run_keeps_what_is_computed_of_a_reference(
    one_level: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []

    def evaluate(model: object, reference: Path, **options: Any) -> dict[str, Any]:
        given.append(options["reference_cache"])
        return {"one_step": {"frechet_distance": 1.0}}

    monkeypatch.setattr(ict_fast.evaluation, "evaluate", evaluate)
    train(_measured(one_level, evaluate_every=12), out=tmp_path / "run", device="cpu")
    assert given == [tmp_path / "run" / "evaluation"] * 2


def test_the_measured_model_leaves_the_training_network_alone(
    one_level: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluate(model: torch.nn.Module, reference: Path, **options: Any) -> dict[str, Any]:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(torch.nan)
        return {"one_step": {"frechet_distance": 1.0}}

    monkeypatch.setattr(ict_fast.evaluation, "evaluate", evaluate)
    assert train(_measured(one_level), out=tmp_path / "run", device="cpu").exit_code == 0
