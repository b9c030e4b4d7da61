"""`train --init`: a run begins with another model's averaged weights, once, and says what it took."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ict_fast import presets
from ict_fast.checkpoint import open_checkpoint, write_checkpoint, write_whole
from ict_fast.cli import main
from ict_fast.config import Config, to_dict
from ict_fast.errors import InputError
from ict_fast.training.dry_run import dry_run
from ict_fast.training.initial import find_initial, initial_weights
from ict_fast.training.run_directory import open_run, prepare_directory
from ict_fast.training.step import TrainStep
from ict_fast.training.trainer import train

CPU = torch.device("cpu")


@pytest.fixture
def short(tiny: Config) -> Config:
    """Three steps of the network that the run `trained` has."""
    return replace(
        tiny,
        data=replace(tiny.data, flip=False),
        network=replace(tiny.network, dropout=0.0),
        training=replace(tiny.training, total_steps=3),
        logging=replace(tiny.logging, checkpoint_every=1),
    )


def _weights(trained: Path, config: Config) -> tuple[dict[str, torch.Tensor], list[str]]:
    tensors, report = initial_weights(find_initial(trained), config)
    return tensors, report.lines()


@pytest.mark.parametrize("teacher", ["student", "ema"])
def test_everything_that_averages_begins_with_the_averaged_weights(
    trained: Path, short: Config, teacher: str
) -> None:
    config = replace(short, method=replace(short.method, teacher=teacher))
    tensors, lines = _weights(trained, config)
    step = TrainStep(config, CPU, initial=tensors)
    expected = open_checkpoint(trained).tensors("ema")
    groups = [dict(step.network.state_dict()), step.ema_weights()]
    if step.teacher is not None:
        groups.append(dict(step.teacher.state_dict()))
    assert len(groups) == (3 if teacher == "ema" else 2)
    for group in groups:
        assert group.keys() == expected.keys()
        assert all(torch.equal(group[name], tensor) for name, tensor in expected.items())
    trained_ones = open_checkpoint(trained).tensors("weights")
    assert any(not torch.equal(trained_ones[name], tensor) for name, tensor in expected.items())
    count = len(expected)
    assert f"{count} of {count} tensors, 100.00% of the numbers" in lines[0]
    assert len(lines) == 1


@pytest.mark.parametrize(
    ("network", "reasons"),
    [
        ({"num_classes": 10}, ["drawn anew: embedding.label: there is none of that name there"]),
        ({"channel_mult": (1, 3)}, ["shape (16,) there, (24,) here"]),
        ({"channel_mult": (1, 2, 2), "attention_resolutions": (2,)}, ["there is none of that name here"]),
        ({"adaptive_norm": True}, ["adaptive norm here, not there (--network.adaptive-norm)"]),
        ({"image_channels": 3}, ["images of 1 channels there, 3 here"]),
        ({"c_noise": "adm-openai"}, ["note: the weights were trained with --network.c-noise log"]),
        (
            {"name": "ddpmpp", "embedding": "positional"},
            ["encoder.1.pyramid.conv: there is none", "--network.name"],
        ),
        ({"resolution": 16, "attention_resolutions": (8,)}, ["--network.resolution 8, this run has 16"]),
    ],
)
def test_the_report_says_what_was_left_and_why(
    trained: Path, short: Config, network: dict, reasons: list[str]
) -> None:
    config = replace(short, network=replace(short.network, **network))
    tensors, lines = _weights(trained, config)
    for reason in reasons:
        assert any(reason in line for line in lines[1:]), "\n".join(lines)
    step, fresh = TrainStep(config, CPU, initial=tensors), TrainStep(config, CPU)
    theirs = open_checkpoint(trained).tensors("ema")
    for name, tensor in step.network.state_dict().items():
        same = name in theirs and theirs[name].shape == tensor.shape
        expected = theirs[name] if same else fresh.network.state_dict()[name]
        assert torch.equal(tensor, expected), name


def test_labels_of_another_number_of_classes_are_drawn_anew(tmp_path: Path, short: Config) -> None:
    source = replace(short, network=replace(short.network, num_classes=7))
    tensors = {"ema": dict(TrainStep(source, CPU).network.state_dict())}
    write_checkpoint(tmp_path / "a", 5, tensors, {"config": to_dict(source)}, keep=2)
    lines = _weights(tmp_path / "a", replace(short, network=replace(short.network, num_classes=10)))[1]
    # The bias does not depend on the number of classes.
    assert "  drawn anew: embedding.label.weight: 7 classes there, 10 here" in lines
    assert "  not used: embedding.label.weight: 7 classes there, 10 here" in lines


def test_weights_that_were_replaced_since_they_were_chosen_are_refused(
    trained: Path, short: Config, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(trained)
    chosen = shutil.copytree(checkpoint.path, tmp_path / "chosen")
    initial = find_initial(chosen)
    others = {"ema": {name: tensor + 1 for name, tensor in checkpoint.tensors("ema").items()}}
    write_whole(chosen, checkpoint.step, others, checkpoint.state)
    with pytest.raises(InputError, match="has changed since the run was opened"):
        initial_weights(initial, short)


def test_nothing_that_fits_is_refused(trained: Path, short: Config, tmp_path: Path) -> None:
    config = replace(short, network=replace(short.network, name="adm", channels=12))
    with pytest.raises(InputError, match=r"1 of its 145 tensors have the name and shape"):
        train(config, out=tmp_path / "run", device="cpu", init=trained)
    assert not (tmp_path / "run/checkpoints").exists()


def test_a_run_begins_once(trained: Path, short: Config, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert train(short, out=out, device="cpu", init=trained).step == 3
    record = json.loads((out / "init.json").read_text())
    newest = open_checkpoint(trained)
    assert (record["path"], record["step"]) == (str(trained), newest.step)
    assert record["loaded"] == sorted(newest.tensors("ema"))
    assert open_checkpoint(out).state["init"]["sha256"] == record["sha256"]

    # Stopped after one step and resumed, with and without --init: the same weights, bit for bit.
    for number, init in enumerate((trained, None)):
        again = tmp_path / f"again{number}"
        (again / "checkpoints").mkdir(parents=True)
        for name in ("config.json", "init.json"):
            shutil.copy(out / name, again / name)
        first = sorted((out / "checkpoints").glob("step-*"))[0]
        shutil.copytree(first, again / "checkpoints" / first.name)
        assert train(short, out=again, device="cpu", init=init).step == 3
        for name in ("weights", "ema"):
            ours, theirs = (open_checkpoint(path).path / f"{name}.safetensors" for path in (again, out))
            assert ours.read_bytes() == theirs.read_bytes()


def test_another_beginning_is_refused(trained: Path, short: Config, tmp_path: Path) -> None:
    out, other, plain = tmp_path / "run", tmp_path / "other", tmp_path / "plain"
    one = replace(short, training=replace(short.training, total_steps=2))
    train(one, out=plain, device="cpu")
    train(one, out=out, device="cpu", init=trained)
    with pytest.raises(InputError, match="has others; another --out starts a new run"):
        train(one, out=out, device="cpu", init=plain)
    with pytest.raises(InputError, match="began at random, not with --init"):
        train(one, out=plain, device="cpu", init=trained)
    # The same weights from another place are the same beginning.
    shutil.copytree(trained, other)
    assert train(one, out=out, device="cpu", init=other).step == 2
    shutil.rmtree(other)
    with pytest.raises(InputError, match="does not exist"):
        train(one, out=out, device="cpu", init=other)


def test_the_same_command_resumes_when_what_it_began_with_was_trained_on_or_is_gone(
    trained: Path, short: Config, tmp_path: Path
) -> None:
    source, out = tmp_path / "source", tmp_path / "run"
    shutil.copytree(trained, source)
    one, two = (replace(short, training=replace(short.training, total_steps=steps)) for steps in (1, 2))
    train(one, out=out, device="cpu", init=source)
    newer = {"ema": {name: tensor + 1 for name, tensor in open_checkpoint(source).tensors("ema").items()}}
    write_checkpoint(source, 30, newer, open_checkpoint(source).state, keep=2)
    assert train(two, out=out, device="cpu", init=source, extend=2).step == 2
    shutil.rmtree(source)
    assert train(two, out=out, device="cpu", init=source, extend=3).step == 3


def test_a_run_killed_before_its_first_checkpoint_begins_again_with_the_same(
    trained: Path, short: Config, tmp_path: Path
) -> None:
    out, whole = tmp_path / "run", tmp_path / "whole"
    train(short, out=whole, device="cpu", init=trained)
    out.mkdir()
    for name in ("init.json", "config.json"):
        shutil.copy(whole / name, out / name)
    train(short, out=out, device="cpu")  # --init was forgotten, its record was not
    ours, theirs = (open_checkpoint(path).path / "ema.safetensors" for path in (out, whole))
    assert ours.read_bytes() == theirs.read_bytes()


def test_a_run_that_begins_at_random_is_not_taken_for_one_that_ended_while_it_was_made(
    short: Config, tmp_path: Path
) -> None:
    (tmp_path / "init.json").write_text("{}")  # of an --init whose config.json was never written
    prepare_directory(open_run(short, tmp_path, "auto", None, pytest.fail))
    opened = open_run(short, tmp_path, "auto", None, pytest.fail)  # as after a kill
    assert opened.initial is None
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_dry_run_reports_it(trained: Path, short: Config, tmp_path: Path) -> None:
    config = replace(short, network=replace(short.network, num_classes=10))
    text = dry_run(config, out=tmp_path / "run", device="cpu", init=trained)
    assert f"init: the averaged weights of {trained}" in text
    assert "drawn anew: embedding.label" in text
    assert not (tmp_path / "run").exists()


def test_several_processes_begin_with_the_same(
    trained: Path, short: Config, tmp_path: Path, command: Callable
) -> None:
    process = command(short, tmp_path / "two", "--processes", "2", "--init", str(trained))
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    assert output.count("init: the averaged weights of") == 1
    train(short, out=tmp_path / "one", device="cpu", init=trained)
    ours, theirs = (open_checkpoint(tmp_path / name).tensors("weights") for name in ("two", "one"))
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], atol=1e-5, rtol=1e-4)


def test_the_networks_options_come_from_what_it_begins_with(
    trained: Path, digits_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """`trained` has 8 channels and no classes; the preset 24 and 10."""
    words = ["train", "--data", str(digits_store), "--device", "cpu", "--out", str(tmp_path / "run")]
    short = ["--training.total-steps", "2", "--training.batch-size", "8", "--logging.grid-every", "0"]
    assert main([*words, *short, "--init", str(trained), "--network.dropout", "0.25"]) == 0
    network = json.loads((tmp_path / "run/config.json").read_text())["network"]
    assert (network["channels"], network["num_classes"], network["dropout"]) == (8, 0, 0.25)
    assert "100.00% of the numbers" in capsys.readouterr().err
    # The same run goes on without the option, or after the other is gone.
    assert main([*words, *short]) == 0
    assert main([*words, *short, "--init", str(trained)]) == 0
    assert main([*words, *short, "--init", str(tmp_path / "gone")]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_a_run_that_began_at_random_says_that_it_is_another_network(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Of 24 channels, as the preset's; it was stopped before its first checkpoint."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text(json.dumps(to_dict(presets.get("digits"))))
    words = ["train", "--device", "cpu", "--out", str(tmp_path / "run"), "--init", str(trained)]
    assert main(words) == 2
    assert "network.channels (there 24, asked 8); another --out starts a new run" in capsys.readouterr().err


def test_the_same_command_resumes_when_what_it_began_with_and_its_configuration_are_gone(
    trained: Path, digits_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A checkpoint is all that it needs; without one, a line says what is missing."""
    source, out = tmp_path / "source", tmp_path / "run"
    shutil.copytree(trained, source)
    words = ["train", "--data", str(digits_store), "--device", "cpu", "--out", str(out)]
    words += ["--training.batch-size", "8", "--logging.grid-every", "0"]
    begun = ["--training.total-steps", "2", "--init", str(source)]
    assert main([*words, *begun]) == 0
    shutil.rmtree(source)
    (out / "config.json").unlink()
    for more, step in ((["--init", str(source)], 3), ([], 4)):
        assert main([*words, *more, "--extend", str(step)]) == 0
        assert open_checkpoint(out).step == step
    shutil.rmtree(out / "checkpoints")
    capsys.readouterr()
    assert main([*words, "--training.total-steps", "4"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "has no checkpoint, and cannot begin again with the weights of its --init" in error
    assert f"{source}: does not exist" in error
    (out / "config.json").unlink()
    assert main([*words, *begun]) == 2
    error = capsys.readouterr().err
    assert error == f"ict-fast: error: --init {source}: there is no run, checkpoint or imported model\n"


@pytest.mark.parametrize("where", ["nowhere", "empty"])
def test_a_beginning_that_is_not_there_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture, where: str
) -> None:
    (tmp_path / "empty").mkdir()
    words = ["train", "--init", str(tmp_path / where), "--out", str(tmp_path / "run"), "--device", "cpu"]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "no run, checkpoint or imported model" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("form", ["safetensors", "diffusers"])
def test_an_exported_folder_is_to_be_imported_first(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture, form: str
) -> None:
    folder = tmp_path / "exported"
    assert main(["export", form, str(trained), "--out", str(folder)]) == 0
    words = ["--out", str(tmp_path / "run"), "--device", "cpu"]
    assert main(["train", "--init", str(folder), *words]) == 2
    assert f"`ict-fast import {form} {folder} --out DIR` first" in capsys.readouterr().err
    assert main(["import", form, str(folder), "--out", str(tmp_path / "imported")]) == 0
    assert main(["train", "--init", str(tmp_path / "imported"), *words, "--dry-run"]) == 0


def test_adaptive_norms_are_warned_of_where_they_come_from_the_weights(tmp_path: Path, short: Config) -> None:
    config = replace(short, network=replace(short.network, adaptive_norm=True))
    weights = {"ema": dict(TrainStep(config, CPU).network.state_dict())}
    write_checkpoint(tmp_path / "adaptive", 0, weights, {"config": to_dict(config)}, keep=2)
    _, lines = _weights(tmp_path / "adaptive", config)
    assert any("diverge" in line and "--network.no-adaptive-norm" in line for line in lines)
    _, lines = _weights(tmp_path / "adaptive", short)
    assert not any("diverge" in line for line in lines)


def test_an_imported_model_is_no_run_to_resume(
    tmp_path: Path, short: Config, capsys: pytest.CaptureFixture
) -> None:
    tensors = {"ema": dict(TrainStep(short, CPU).network.state_dict())}
    state = {"config": to_dict(short), "imported": {"kind": "denoiser"}}
    write_checkpoint(tmp_path / "a", 0, tensors, state, keep=2)
    with pytest.raises(InputError, match=r"is an imported model, not a run; `--init .*` begins a run"):
        train(short, out=tmp_path / "a", device="cpu")
    assert train(short, out=tmp_path / "b", device="cpu", init=tmp_path / "a").step == 3
