"""The further averages: their recurrences, their files, and lengths that are chosen afterwards."""

from __future__ import annotations

import errno
import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from ict_fast.checkpoint import open_checkpoint, write_whole
from ict_fast.cli import main
from ict_fast.config import Config
from ict_fast.consistency import load_model
from ict_fast.consistency.averaging import Combination, power_exponent
from ict_fast.errors import InputError
from ict_fast.training import reconstruction, saving
from ict_fast.training.step import TrainStep
from ict_fast.training.trainer import train

CPU = torch.device("cpu")
Batches = Callable[..., list]


def _averaged(config: Config, **optimizer: object) -> Config:
    return replace(config, optimizer=replace(config.optimizer, **optimizer))  # type: ignore[arg-type]


def _vector(tensors: Mapping[str, Tensor], names: list[str]) -> Tensor:
    return torch.cat([tensors[name].flatten() for name in names]).double()


def test_each_average_follows_its_recurrence_and_a_skipped_step_advances_none(
    one_level: Config, batches: Batches
) -> None:
    config = _averaged(one_level, ema_decays=(0.5, 0.999), power_ema=(0.1, 0.25), ema_warmup=False)
    train_step = TrainStep(config, CPU)
    names = [name for name, _ in train_step.network.named_parameters()]
    assert train_step.averages.names == ("0.5", "0.999", "power-0.1", "power-0.25")
    expected = {name: _vector(train_step.ema_weights(name), names) for name in train_step.averages.names}
    updates, parameter = 0, next(train_step.network.parameters())
    for step in range(7):
        broken = step in (0, 3)  # the very first as well: no update has been made yet
        hook = parameter.register_hook(lambda gradient: gradient * torch.inf) if broken else None
        train_step(step, batches(config, step))
        if hook is not None:
            hook.remove()
        else:
            updates += 1
            weights = _vector(train_step.network.state_dict(), names)
            for name, average in expected.items():
                width = name.removeprefix("power-")
                power = power_exponent(float(width)) + 1
                decay = (1 - 1 / updates) ** power if width != name else float(name)
                expected[name] = decay * average + (1 - decay) * weights
        for name, average in expected.items():
            ours = _vector(train_step.ema_weights(name), names)
            torch.testing.assert_close(ours, average, rtol=1e-5, atol=1e-7)
    assert int(train_step.updates()) == updates == 5


def test_a_further_average_of_the_first_ones_decay_is_the_first_one(
    one_level: Config, batches: Batches
) -> None:
    config = _averaged(one_level, ema_decays=(one_level.optimizer.ema_decay,))
    train_step = TrainStep(config, CPU)
    for step in range(5):
        train_step(step, batches(config, step))
    first, further = train_step.ema_weights(), train_step.ema_weights("0.999")
    for name, tensor in first.items():
        torch.testing.assert_close(further[name], tensor, rtol=1e-6, atol=1e-8)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, digits_store: Path) -> tuple[Config, Path]:
    """A run of 64 steps with averages of every kind, and snapshots."""
    from ict_fast import presets

    digits = presets.get("digits")
    config = replace(
        digits,
        data=replace(digits.data, path=str(digits_store)),
        network=replace(digits.network, channels=8, num_classes=0),
        optimizer=replace(digits.optimizer, ema_warmup=False, ema_decays=(0.8, 0.9), power_ema=(0.05, 0.1)),
        training=replace(digits.training, total_steps=64, batch_size=16),
        logging=replace(digits.logging, grid_every=0, checkpoint_every=64, power_ema_every=8, tracker="none"),
    )
    out = tmp_path_factory.mktemp("runs") / "averages"
    assert train(config, out=out, device="cpu").exit_code == 0
    return config, out


def _distance(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    squares = sum(float(((ours[name].double() - theirs[name].double()) ** 2).sum()) for name in theirs)
    return float((squares / sum(float((t.double() ** 2).sum()) for t in theirs.values())) ** 0.5)


@pytest.mark.parametrize(("decay", "poor"), [("0.8", 0.005), ("0.9", 0.015)])
def test_a_reconstructed_decay_is_the_one_that_was_tracked(
    run: tuple[Config, Path], tmp_path: Path, decay: str, poor: float
) -> None:
    """As near, of the way from the last weights to the average, as it says of its profile: a true fit, of 16
    averages to the profile of 64 steps."""
    _, out = run
    assert main(["ema", str(out), "--decay", decay, "--out", str(tmp_path / "made")]) == 0
    checkpoint, made = open_checkpoint(out), open_checkpoint(tmp_path / "made")
    average, said = made.tensors("ema"), made.state["reconstruction"]
    tracked, last = checkpoint.tensors(f"ema-{decay}"), checkpoint.tensors("weights")
    assert average.keys() == tracked.keys()
    assert said["snapshots"] == 16
    assert 1e-4 < said["profile_error"] < poor
    assert _distance(average, tracked) < 1e-3
    assert _distance(average, tracked) < said["profile_error"] * _distance(last, tracked)
    assert _distance(last, tracked) > 1e-3


def test_a_reconstructed_width_is_the_one_that_another_run_tracked(
    run: tuple[Config, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, out = run
    other = _averaged(config, ema_decays=(), power_ema=(0.15,))
    train(other, out=tmp_path / "other", device="cpu")
    assert main(["ema", str(out), "--sigma-rel", "0.15"]) == 0
    tracked = open_checkpoint(tmp_path / "other").tensors("ema-power-0.15")
    made = open_checkpoint(out / "ema/sigma-rel-0.15")
    error, checkpoint = made.state["reconstruction"]["profile_error"], open_checkpoint(out)
    assert 0.02 < error < 0.04
    assert "a profile met to 3.2% is not the one that was asked for" in capsys.readouterr().err
    for name in ("weights", "ema-power-0.1"):
        away = _distance(checkpoint.tensors(name), tracked)
        assert away > 1e-3
        assert _distance(made.tensors("ema"), tracked) < error * away


@pytest.mark.parametrize("warmup", [True, False])
def test_an_exponential_average_is_made_with_the_warm_up_of_its_run(one_level: Config, warmup: bool) -> None:
    """What is left of the initial weights is the product of the decays."""
    profile = reconstruction._profile(_averaged(one_level, ema_warmup=warmup), 30, None, 0.9)
    decays = [min(0.9, (k + 1) / (k + 10)) if warmup else 0.9 for k in range(30)]
    left = [math.prod(decays[k:]) for k in (0, 5, 29)]
    assert profile(np.array([0, 5, 29])) == pytest.approx(left)


def test_snapshots_are_added_up_in_float64_and_rounded_once() -> None:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(500, generator=generator) for _ in range(2)]
    parts: Any = [
        (SimpleNamespace(tensors=lambda name, value=value: {"a": value}), 0.1, None) for value in values
    ]
    made = reconstruction._combined(parts, np.array([300.7, -299.7]), lambda fraction, text: None)
    expected = 300.7 * values[0].double() - 299.7 * values[1].double()
    assert torch.equal(made["a"], expected.float())


def test_a_large_coefficient_is_said(
    run: tuple[Config, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    coefficients = np.array([0.0] * 14 + [300.0, -299.0])
    monkeypatch.setattr(reconstruction, "combine", lambda *profiles: Combination(coefficients, 0.001))
    assert main(["ema", str(run[1]), "--sigma-rel", "0.15", "--out", str(tmp_path / "made")]) == 0
    assert "a coefficient of 3e+02 magnifies the rounding of the snapshots" in capsys.readouterr().err


def test_a_reconstruction_is_sampled_and_says_what_it_is(
    run: tuple[Config, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out = run
    made = tmp_path / "made"
    for _ in range(2):  # an older one is replaced
        assert main(["ema", str(out), "--sigma-rel", "0.07", "--out", str(made)]) == 0
    assert "from 16 averages, its profile met to 1.28%" in capsys.readouterr().out
    state = open_checkpoint(made).state
    assert state["reconstruction"]["sigma_rel"] == 0.07
    assert main(["sample", str(made), "--count", "2", "--out", str(tmp_path / "a.png")]) == 0


def test_a_reconstruction_says_what_its_run_began_with(run: tuple[Config, Path], tmp_path: Path) -> None:
    config, begun = run
    for total in (4, 6):
        training = replace(config.training, total_steps=total)
        extend = None if total == 4 else total
        result = train(
            replace(config, training=training),
            out=tmp_path / "tuned",
            device="cpu",
            init=begun,
            extend=extend,
        )
        assert result.exit_code == 0
    assert main(["ema", str(tmp_path / "tuned"), "--decay", "0.9", "--out", str(tmp_path / "made")]) == 0
    state, made = (open_checkpoint(tmp_path / name).state for name in ("tuned", "made"))
    for name in ("data_fingerprint", "init", "extended"):
        assert made[name] == state[name], name
    assert main(["export", "safetensors", str(tmp_path / "made"), "--out", str(tmp_path / "out")]) == 0
    card = (tmp_path / "out/README.md").read_text()
    assert f"Its training began with the weights of `{state['init']['path']}`." in card
    assert "Until step 4 its curriculum was one for 4 steps" in card
    assert state["data_fingerprint"] in card


@pytest.mark.parametrize("form", ["safetensors", "diffusers"])
def test_exports_of_two_averages_are_told_apart(
    run: tuple[Config, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    config, out = run
    expected = {
        "--sigma-rel 0.07": "the power-function average of relative width (sigma_rel) 0.07",
        "--decay 0.9": "the exponential average of decay 0.9",
    }
    for words, average in expected.items():
        made, exported, imported, again = (str(tmp_path / f"{word}{words}") for word in "meia")
        assert main(["ema", str(out), *words.split(), "--out", made]) == 0
        assert main(["export", form, made, "--out", exported]) == 0
        capsys.readouterr()
        assert main(["import", form, exported, "--out", imported]) == 0
        said = f"{average}, made from the snapshots of the run {out.name}"
        assert f"64 steps; {said}\n" in capsys.readouterr().out
        assert main(["export", form, imported, "--out", again]) == 0
        for folder in (exported, again):
            card = (Path(folder) / "README.md").read_text()
            assert f"64 of 64 steps of {config.training.batch_size} images; the averaged (EMA)" in card
            assert f"weights, fp32: {said}." in card
            assert f"EMA {config.optimizer.ema_decay}" not in card, "not that of the run itself"


def test_the_averages_that_a_run_keeps_are_exported_by_name(
    run: tuple[Config, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out = run
    checkpoint = open_checkpoint(out)
    expected = {
        "0.8": "exponential average of decay 0.8",
        "power-0.05": "power-function average of relative width (sigma_rel) 0.05",
    }
    for name, average in expected.items():
        exported = tmp_path / name
        assert main(["export", "safetensors", str(out), "--ema", name, "--out", str(exported)]) == 0
        tensors, kept = load_file(exported / "model.safetensors"), checkpoint.tensors(f"ema-{name}")
        assert all(tensors[each].equal(kept[each]) for each in kept)
        card = (exported / "README.md").read_text()
        assert f"averaged (EMA) weights, fp32: the {average}, kept beside the run's own." in card
    for words, problem in (
        ("--ema 0.5", "has no average 0.5"),
        ("--ema 0.9 --weights weights", "choose one"),
    ):
        assert main(["export", "safetensors", str(out), *words.split(), "--out", str(tmp_path / "no")]) == 2
        assert problem in capsys.readouterr().err
        assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("record", [[], {}, {"sigma_rel": "0.1"}, {"decay": 0.9, "run": "a\nb"}])
def test_an_altered_record_of_an_average_is_refused(
    run: tuple[Config, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], record: object
) -> None:
    checkpoint = open_checkpoint(run[1])
    state = {"config": checkpoint.state["config"], "reconstruction": record}
    write_whole(tmp_path / "made", checkpoint.step, {"ema": checkpoint.tensors("ema")}, state)
    assert main(["export", "safetensors", str(tmp_path / "made"), "--out", str(tmp_path / "out")]) == 2
    assert "state.json: altered, its r" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_too_few_snapshots_are_said(
    run: tuple[Config, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run[1], tmp_path / "run")
    for step in range(8, 56, 8):
        shutil.rmtree(tmp_path / f"run/ema-snapshots/step-{step:08d}")
    assert main(["ema", str(tmp_path / "run"), "--decay", "0.5"]) == 0
    told = capsys.readouterr()
    assert "from 4 averages" in told.out
    assert "is not the one that was asked for: the snapshots are too few" in told.err


def test_sample_and_evaluate_take_an_average_by_its_name(
    run: tuple[Config, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out = run
    names = ("0.9", "power-0.05", "ema-power-0.05")
    for name in names:
        words = ["sample", str(out), "--count", "2", "--ema", name, "--out", str(tmp_path / f"{name}.npz")]
        assert main(words) == 0
    pictures = [
        np.load(tmp_path / f"{name}.npz")["arr_0"] for name in ("0.9", "power-0.05", "ema-power-0.05")
    ]
    assert np.array_equal(pictures[1], pictures[2])
    assert not np.array_equal(pictures[0], pictures[1])
    with torch.no_grad():
        ours = next(load_model(out, weights="ema-0.9").parameters())
    theirs = open_checkpoint(out).tensors("ema-0.9")
    assert any(torch.equal(ours, tensor) for tensor in theirs.values() if tensor.shape == ours.shape)
    capsys.readouterr()
    for command in ("sample", "evaluate", "search-sigma"):
        assert main([command, str(out), "--ema", "0.95"]) == 2
        assert 'has no average 0.95; did you mean "0.9"?' in capsys.readouterr().err
    assert main(["sample", str(out), "--ema", "ema"]) == 2
    assert "has no average ema; choose one of: 0.8, 0.9, power-0.05" in capsys.readouterr().err


def test_edit_and_search_sigma_take_an_average_by_its_name(
    run: tuple[Config, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As they take a model that is this average alone: an import of its export."""
    config, out = run
    whole, exported, alone = (tmp_path / name for name in ("whole", "exported", "alone"))
    shutil.copytree(out, whole)
    assert main(["export", "safetensors", str(whole), "--ema", "0.9", "--out", str(exported)]) == 0
    assert main(["import", "safetensors", str(exported), "--out", str(alone)]) == 0
    Image.fromarray(np.load(Path(config.data.path) / "images.npy")[0, :, :, 0]).save(tmp_path / "digit.png")
    pixels = []
    for model in ([str(whole), "--ema", "0.9"], [str(alone)], [str(whole)]):
        edit = ["edit", "stroke", *model, "--input", str(tmp_path / "digit.png")]
        assert main([*edit, "--out", str(tmp_path / "edited.npz")]) == 0
        pixels.append(np.load(tmp_path / "edited.npz")["arr_0"])
        words = ["--reference", config.data.path, "--count", "16", "--tolerance", "20"]
        assert main(["search-sigma", *model, *words]) == 0
    assert np.array_equal(pixels[0], pixels[1])
    assert not np.array_equal(pixels[0], pixels[2])
    files = (whole / "search-sigma-0.9.json", alone / "search-sigma.json", whole / "search-sigma.json")
    traces = [json.loads(file.read_text()) for file in files]
    assert traces[0]["searches"] == traces[1]["searches"] != traces[2]["searches"]
    assert [trace.get("ema") for trace in traces] == ["0.9", None, None]
    said = capsys.readouterr().out
    [sigma] = traces[0]["sigmas"]
    assert f"--steps 2 --sigmas {sigma:.4g} --ema 0.9\n" in said
    assert main([*edit, "--ema", "0.95", "--out", str(tmp_path / "no.npz")]) == 2
    assert 'has no average 0.95; did you mean "0.9"?' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give --sigma-rel or --decay, and not both"),
        (["--sigma-rel", "0.1", "--decay", "0.9"], "give --sigma-rel or --decay, and not both"),
        (["--sigma-rel", "0.3"], "--sigma-rel is 0.3; it must be one of the numbers from 0.01 to 0.288"),
        (["--decay", "1"], "--decay is 1.0; it must be in [0, 1)"),
        (["--decay", "0.9", "--out", "{run}"], "which holds something else"),
        (["--decay", "0.9", "--out", "{run}/config.json"], "is not a folder"),
    ],
)
def test_what_cannot_be_made_is_refused_in_one_line(
    run: tuple[Config, Path], capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    _, out = run
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert main(["ema", str(out), *(word.format(run=out) for word in words)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_a_run_without_snapshots_says_how_to_get_them(
    run: tuple[Config, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run[1], tmp_path / "run")
    shutil.rmtree(tmp_path / "run/ema-snapshots")
    assert main(["ema", str(tmp_path / "run"), "--decay", "0.9"]) == 2
    assert "has no ema-snapshots; a run that starts with --optimizer.power-ema" in capsys.readouterr().err


def test_a_broken_snapshot_is_passed_over_and_said(
    run: tuple[Config, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run[1], tmp_path / "run")
    file = tmp_path / "run/ema-snapshots/step-00000040/ema-power-0.1.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert main(["ema", str(tmp_path / "run"), "--decay", "0.9", "--out", str(tmp_path / "made")]) == 0
    told = capsys.readouterr()
    assert "ema-power-0.1.safetensors: truncated" in told.err
    assert "from 14 averages" in told.out


@pytest.mark.parametrize(
    ("field", "value"), [("ema_decays", ()), ("ema_decays", (0.8, 0.9, 0.99)), ("power_ema", (0.05,))]
)
def test_other_averages_are_refused_on_resume(
    run: tuple[Config, Path], field: str, value: tuple[float, ...]
) -> None:
    config, out = run
    with pytest.raises(InputError, match=rf"differs in optimizer\.{field} .*an average begins with its run"):
        train(_averaged(config, **{field: value}), out=out, device="cpu")


def test_a_full_disk_costs_a_snapshot_and_not_the_run(
    run: tuple[Config, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config, whole = run
    original, out = saving.write_whole, tmp_path / "run"

    def full(path: Path, *arguments: object) -> Path:
        if path.name == "step-00000032":
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(path, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(saving, "write_whole", full)
    assert train(config, out=out, device="cpu").exit_code == 0
    assert "the averages of step 32 could not be kept (No space left on device)" in capsys.readouterr().err
    names = {path.name for path in (out / "ema-snapshots").iterdir()}
    assert {path.name for path in (whole / "ema-snapshots").iterdir()} - names == {"step-00000032"}
    assert main(["ema", str(out), "--decay", "0.9"]) == 0
    tracked = open_checkpoint(out).tensors("ema-0.9")
    assert _distance(open_checkpoint(out / "ema/decay-0.9").tensors("ema"), tracked) < 1e-3


def test_a_snapshot_counts_the_steps_that_changed_the_weights(
    one_level: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not those that were skipped. An average that was tracked is then made of itself."""
    original = TrainStep.__call__

    def poisoned(self: TrainStep, number: int, drawn: object) -> None:
        parameter = next(self.network.parameters())
        factor = torch.inf if number == 1 else 1.0
        handle = parameter.register_hook(lambda gradient: gradient * factor)
        original(self, number, drawn)  # type: ignore[arg-type]
        handle.remove()

    monkeypatch.setattr(TrainStep, "__call__", poisoned)
    config = _averaged(one_level, power_ema=(0.05, 0.1))
    config = replace(config, training=replace(config.training, total_steps=8, batch_size=4))
    config = replace(config, logging=replace(config.logging, power_ema_every=4, tracker="none"))
    train(config, out=tmp_path / "run", device="cpu")
    states = [
        json.loads((tmp_path / f"run/ema-snapshots/step-{step:08d}/state.json").read_text())
        for step in (4, 8)
    ]
    assert [state["updates"] for state in states] == [3, 7]
    made = reconstruction.reconstruct(
        tmp_path / "run", tmp_path / "made", sigma_rel=0.1, warn=pytest.fail, progress=lambda *_: None
    )
    assert made.profile_error < 1e-9


def test_snapshots_past_the_checkpoint_are_cut_back(one_level: Config, tmp_path: Path) -> None:
    """A run that goes on from an earlier checkpoint makes its own: at other steps, if it is asked to."""
    config, out = _averaged(one_level, power_ema=(0.1,)), tmp_path / "run"
    config = replace(config, logging=replace(config.logging, power_ema_every=2, checkpoint_every=8))
    train(config, out=out, device="cpu")
    shutil.rmtree(out / "checkpoints/step-00000024")
    train(replace(config, logging=replace(config.logging, power_ema_every=5)), out=out, device="cpu")
    steps = sorted(int(path.name[5:]) for path in (out / "ema-snapshots").iterdir())
    assert steps == [*range(2, 17, 2), 20, 24]
    states = [json.loads((out / f"ema-snapshots/step-{step:08d}/state.json").read_text()) for step in steps]
    assert [state["updates"] for state in states] == steps
