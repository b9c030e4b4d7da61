"""What is read of a run, what is said of what is not there, and that the command repeats it."""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from ict_fast.checkpoint import write_checkpoint
from ict_fast.cli import main
from ict_fast.config import Config, to_dict
from ict_fast.consistency.model import build_seeded_network
from ict_fast.durable import sha256_file
from ict_fast.errors import InputError
from ict_fast.report import page, read_run

pytestmark = pytest.mark.usefixtures("undrawn")


def test_a_whole_run_misses_nothing(run: Path) -> None:
    record = read_run(run)
    assert record.missing == []
    assert record.step == 400
    assert [line["step"] for line in record.log] == list(range(20, 401, 20))
    assert [step for step, _ in record.grids] == list(range(40, 401, 40))
    assert len(record.evaluations) == 2


def test_changed_fields_are_those_that_are_not_the_presets(run: Path) -> None:
    changed = {(field.section, field.name) for field in read_run(run).fields if field.is_changed}
    assert changed == {
        ("data", "flip"),
        ("network", "channel_mult"),
        ("network", "dropout"),
        ("training", "total_steps"),
    }


def test_the_command_means_the_runs_configuration(
    run: Path, config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    words = shlex.split(read_run(run).command())
    assert words[:4] == ["ict-fast", "train", "--preset", "digits"]
    assert words[words.index("--gpus") + 1] == "8"
    without_gpus = words[1 : words.index("--gpus")] + words[words.index("--gpus") + 2 :]
    assert main([*without_gpus, "--device", "cpu", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert json.loads(printed[: printed.index("\nparameters")]) == to_dict(config)


def test_the_command_of_a_scripts_run_needs_no_preset_of_its_name(
    run: Path, config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "config.json").write_text(json.dumps(to_dict(replace(config, preset="mine"))))
    record = read_run(run)
    assert record.missing == ["the preset 'mine': changed fields are shown against those of digits"]
    words = shlex.split(record.command())
    assert "--preset" not in words
    without_gpus = words[1 : words.index("--gpus")] + words[words.index("--gpus") + 2 :]
    assert main([*without_gpus, "--device", "cpu", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert json.loads(printed[: printed.index("\nparameters")]) == to_dict(config)


def test_of_an_imported_model_no_training_is_told(run: Path) -> None:
    file = run / "checkpoints/step-00000400/state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"step": 0, "imported": {"file": "a.pkl"}}))
    values = json.loads(file.read_text())
    values["config"]["preset"] = "imported"
    file.write_text(json.dumps(values))
    for name in ("log.jsonl", "evaluations.jsonl", "checkpoints/evaluation.json", "config.json"):
        (run / name).unlink()
    shutil.rmtree(run / "grids")
    record = read_run(run)
    (metrics,) = record.missing
    assert re.search(r"`ict-fast evaluate \S+ --reference DATA` does it", metrics)
    text = page(record)
    assert "not trained here" in text
    assert "Repeat it" not in text
    assert "<mark>" not in text, "there is no preset that a field could differ from"
    assert "from the preset" not in text


def test_the_command_of_a_run_that_began_with_another_means_its_configuration(
    run: Path, config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the other's network, whose options `--init` makes the defaults, one field is as the run's is not."""
    other = replace(config, network=replace(config.network, num_classes=0))
    weights = build_seeded_network(other).state_dict()
    source = tmp_path / "the other"
    checkpoint = write_checkpoint(source, 7, {"ema": weights}, {"config": to_dict(other)}, keep=2)
    sha256 = sha256_file(checkpoint / "ema.safetensors")
    begun = {"path": str(source), "step": 7, "sha256": sha256}
    (run / "init.json").write_text(json.dumps(begun | {"loaded": []}))
    record = read_run(run)
    words = shlex.split(record.command())
    assert words[words.index("--init") + 1] == str(source)
    without_gpus = words[1 : words.index("--gpus")] + words[words.index("--gpus") + 2 :]
    assert main([*without_gpus, "--device", "cpu", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert json.loads(printed[: printed.index("\nparameters")]) == to_dict(config)
    assert f"init: the averaged weights of {source}, step 7" in printed
    text = page(record)
    assert f"{source}, step 7, sha256 {sha256}" in text
    assert "and the weights that it began with give the same weights" in text


def test_the_newest_measurement_is_the_runs(run: Path) -> None:
    """evaluation.json of step 400 before the line of step 400, and behind one of step 600."""
    assert read_run(run).measured == read_run(run).evaluation
    with (run / "evaluations.jsonl").open("a") as file:
        file.write(json.dumps({"step": 600, "two_step": {"frechet_distance": 0.75}, "count": 500}) + "\n")
    (run / "checkpoints/best").write_text("step-00000200\n")
    record = read_run(run)
    assert record.measured == record.evaluations[-1]
    text = page(record)
    assert "<b>0.75</b><span>Fréchet, two steps, at step 600, 500 samples</span>" in text
    assert "<b>1.609</b><span>best Fréchet, one step, at step 200, 500 samples</span>" in text
    assert "best Fréchet, two steps" not in text


def test_the_best_of_few_samples_is_not_set_beside_a_measurement_of_many(run: Path) -> None:
    """evaluation.json is of 10,000 samples, evaluations.jsonl of 500: their distances do not compare."""
    (run / "checkpoints/best").write_text("step-00000200\n")
    text = page(read_run(run))
    assert "<span>Fréchet, one step, at step 400, 10,000 samples</span>" in text
    assert "best Fréchet" not in text


def test_a_result_of_another_average_is_named(run: Path) -> None:
    file = run / "checkpoints/evaluation.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"ema": "power-0.05"}))
    text = page(read_run(run))
    assert "<span>Fréchet, one step, at step 400, average power-0.05, 10,000 samples</span>" in text
    assert "Step 400; average power-0.05 of the weights; 10,000 samples" in text


def test_a_result_of_other_noise_levels_is_named_and_the_best_is_not_set_beside_it(run: Path) -> None:
    file = run / "checkpoints/evaluation.json"
    measured = json.loads(file.read_text()) | {"count": 500}  # as many as while training
    (run / "checkpoints/best").write_text("step-00000200\n")
    for sigmas in (None, [0.8, 0.3]):
        file.write_text(json.dumps(measured | {"sigmas": sigmas}))
        text = page(read_run(run))
        asked = "" if sigmas is None else ", sigmas 0.8 0.3"
        assert f"<span>Fréchet, two steps, at step 400{asked}, 500 samples</span>" in text
        assert ("500 samples, seed 0; sigmas 0.8 0.3; " in text) == bool(asked)
        assert ("best Fréchet" in text) == (not asked)


def test_the_command_of_a_run_on_cpus_says_so(run: Path) -> None:
    (run / "run.json").write_text(json.dumps({"device": "cpu", "processes": 2}))
    assert "--device cpu --processes 2" in read_run(run).command()


def test_the_command_of_a_run_that_is_named_by_a_dot_has_its_name(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run)
    assert read_run(Path()).command().endswith(" --out everything-again")


def test_an_extended_run_is_not_said_to_be_repeatable(run: Path) -> None:
    """Its curriculum was another one than that of a run of as many steps from the start."""
    file = run / "checkpoints/step-00000400/state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"extended": [[80, 80], [240, 240]]}))
    record = read_run(run)
    assert {stage.first_step for stage in record.stages} >= {10, 20, 70, 80, 90, 240, 250}
    text = page(record)
    assert "give the same weights" not in text
    assert "The run was extended: its curriculum was one for 80 until step 80, 240 until step 240." in text
    file.write_text(json.dumps(json.loads(file.read_text()) | {"extended": "often"}))
    assert read_run(run).missing == ["state.json: its record of --extend is altered"]


def test_measurements_alone_say_how_far_a_run_is(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    (run / "log.jsonl").unlink()
    record = read_run(run)
    assert record.step == 400
    assert "finished" in page(record)


def test_a_gap_in_the_log_is_a_gap(run: Path) -> None:
    steps, values = read_run(run).series("loss")
    assert 100 not in steps
    assert len(steps) == len(values) == 19


def test_damaged_lines_are_left_out_and_counted(run: Path) -> None:
    with (run / "log.jsonl").open("a") as file:
        file.write('{"step": 420, "lo\n[1, 2]\nnull\n{"step": 400, "loss": 7}\n')
    record = read_run(run)
    assert record.log[-1] == {"step": 400, "loss": 7}
    assert record.missing == ["3 lines of log.jsonl: damaged, and left out"]


@pytest.mark.parametrize(
    "line",
    [
        '{"step": Infinity}',
        '{"step": "130"}',
        '{"step": 130.5}',
        '{"step": true}',
        '{"step": -1}',
        '{"step": 1%s}' % ("0" * 400),
        '{"step": 130, "time": 1e30}',
        '{"step": 130, "skipped": "x"}',
        '{"step": 130, "loss": NaN}',
        '{"step": 130, "loss": 1e308}',
        '{"step": 130, "images_per_second": 5e-324}',
        '{"step": 130, "loss_by_sigma": ["x", 1, 1, 1, 1, 1]}',
        '{"step": 130, "loss_by_sigma": 3}',
        "[" * 100_000,
    ],
)
def test_a_line_with_what_is_no_figure_is_left_out_and_counted(run: Path, line: str) -> None:
    for name in ("log.jsonl", "evaluations.jsonl"):
        with (run / name).open("a") as file:
            file.write(line + "\n")
    record = read_run(run)
    assert record.missing == [
        f"1 line of {name}: damaged, and left out" for name in ("log.jsonl", "evaluations.jsonl")
    ]
    assert len(record.log) == 20


@pytest.mark.parametrize("step", ["abc", [1], -1, 1e30, None])
def test_a_damaged_state_is_said_to_be(run: Path, step: object) -> None:
    file = run / "checkpoints/step-00000400/state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"step": step}))
    record = read_run(run)
    assert record.missing == ["the step of the newest checkpoint: its state.json is damaged"]
    assert record.step == 400, "the log's"


@pytest.mark.parametrize("edges", [["a"] * 7, [10**400] * 7])
def test_damaged_borders_of_noise_levels_cost_one_picture(run: Path, edges: list) -> None:
    (run / "run.json").write_text(json.dumps({"sigma_edges": edges, "flops_per_image": 10**400}))
    text = page(read_run(run))
    assert "Loss by noise level" not in text
    assert 'aria-label="Loss"' in text


def test_a_measurement_that_is_no_figure_is_not_drawn(run: Path) -> None:
    measured = {"frechet_distance": math.inf, "recall": math.nan, "precision": 10**400, "recall_std": True}
    line = json.dumps({"step": 400, "one_step": measured}) + "\n"
    with (run / "evaluations.jsonl").open("a") as file:
        file.write(line)
    (run / "checkpoints/evaluation.json").write_text(line)
    text = page(read_run(run))
    assert "<th></th></tr>" in text, "no column"
    assert "Fréchet, one step" not in text


def test_a_run_that_has_left_only_its_configuration_says_what_is_missing(run: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((run / "config.json").read_bytes())
    record = read_run(bare)
    assert [text.partition(":")[0] for text in record.missing] == ["curves", "pictures", "metrics"]
    assert record.step == 0


def test_a_run_of_other_images_than_digits_is_told_to_name_features(run: Path) -> None:
    for name in ("checkpoints/evaluation.json", "evaluations.jsonl"):
        (run / name).unlink()
    assert read_run(run).missing == [f"metrics: the run was not measured; `ict-fast evaluate {run}` does it"]
    file = run / "checkpoints/step-00000400/state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"data_fingerprint": "0" * 64}))  # 8x8 and grey
    assert f"`ict-fast evaluate {run} --features FILE.pt` does it" in read_run(run).missing[-1]
    spaced = run.rename(run.with_name("two words"))
    assert f"`ict-fast evaluate '{spaced}' --features FILE.pt` does it" in read_run(spaced).missing[-1]


def test_a_picture_that_is_none_is_left_out(run: Path) -> None:
    last = run / "grids" / "step-00000400.png"
    last.write_bytes(last.read_bytes()[:-20])
    record = read_run(run)
    assert record.missing == ["step-00000400.png: cannot be read as a picture"]
    assert record.grids[-1][0] == 360


def test_a_lost_configuration_is_taken_from_the_checkpoint(run: Path, config: Config) -> None:
    (run / "config.json").unlink()
    record = read_run(run)
    assert record.config == config
    assert record.missing == ["the configuration: there is no config.json"]


@pytest.mark.parametrize(("content", "said"), [(None, "holds no run"), ("{]", "holds no run")])
def test_a_folder_without_a_run_is_refused(tmp_path: Path, content: str | None, said: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match=said):
        read_run(tmp_path)


def test_the_command_line_writes_the_report_into_the_run(
    run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["report", str(run)]) == 0
    assert (run / "report.html").read_text().startswith("<!doctype html>")
    checkpoint = run / "checkpoints" / "step-00000400"
    assert main(["report", str(checkpoint), "--out", str(tmp_path / "new" / "r.html")]) == 0
    assert (tmp_path / "new" / "r.html").exists()
    (run / "log.jsonl").unlink()
    capsys.readouterr()
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}\nmissing: curves: there is no log.jsonl\n"


def test_a_path_of_bytes_that_are_no_letters_is_reported_too(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As Python names a file whose name is not UTF-8, and JSON writes it."""
    renamed = run.rename(run.with_name("caf\udce9"))
    values = json.loads((renamed / "config.json").read_text())
    values["data"]["path"] = "data/caf\udce9"
    (renamed / "config.json").write_text(json.dumps(values))
    assert main(["report", str(renamed)]) == 0
    assert "data/caf?" in (renamed / "report.html").read_text(encoding="utf-8")


def test_a_run_that_cannot_be_written_is_told_of_the_option(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ict_fast.results.os.access", lambda path, mode: False)
    assert main(["report", str(run)]) == 2
    error = capsys.readouterr().err
    assert f"--out (by default in the run) is {run}, but {run} cannot be written; choose another" in error


@pytest.mark.parametrize(
    ("form", "file"), [("safetensors", "model.safetensors"), ("diffusers", "model_index.json")]
)
def test_an_exported_model_is_said_to_be_one(run: Path, tmp_path: Path, form: str, file: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"format": "ict-fast"}))
    (tmp_path / file).touch()
    said = rf"looks like a model exported as {form}; `ict-fast import {form} {tmp_path} --out DIR` makes"
    with pytest.raises(InputError, match=said):
        read_run(tmp_path)
    (run / file).touch()  # a run is one all the same
    assert read_run(run).step == 400


def test_the_command_line_refuses_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "nothing")]) == 2
    assert "there is no run" in capsys.readouterr().err
