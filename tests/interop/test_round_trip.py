"""Import, export, import again: the same tensors, the same function, the same configuration."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

from ict_fast.checkpoint import Checkpoint, open_checkpoint, write_checkpoint
from ict_fast.cli import main
from ict_fast.config import Config, MethodConfig, to_dict
from ict_fast.consistency import load_model
from ict_fast.consistency.model import build_seeded_network
from ict_fast.errors import InputError
from ict_fast.interop.diffusers import export_diffusers, import_diffusers
from ict_fast.interop.export import export_safetensors, import_safetensors
from ict_fast.interop.imported import save

FORMS = {
    "safetensors": (export_safetensors, import_safetensors),
    "diffusers": (export_diffusers, import_diffusers),
}


def _assert_same(checkpoint: Checkpoint, folder: Path, form: str) -> None:
    export, import_again = FORMS[form]
    export(checkpoint, folder)
    again, tensors = import_again(folder), checkpoint.tensors("ema")
    assert again.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert again.tensors[name].dtype == tensor.dtype
        assert torch.equal(again.tensors[name], tensor), name
    network = load_model(checkpoint.path).config.network
    for field in (
        "name",
        "resolution",
        "channels",
        "channel_mult",
        "num_classes",
        "head_channels",
        "c_noise",
    ):
        assert getattr(again.config.network, field) == getattr(network, field)
    method = load_model(checkpoint.path).config.method
    for field in (
        "identity_sigma",
        "boundary_sigma",
        "second_sigma",
        "sigma_min",
        "sigma_max",
        "rho",
        "sigma_data",
    ):
        assert getattr(again.config.method, field) == getattr(method, field), field
    assert again.kind == checkpoint.state["imported"]["kind"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["ncsnpp", "ddpmpp", "adm"])
def test_edm_in_and_out_and_in(
    published: ModuleType, edm_checkpoint: Callable, tmp_path: Path, kind: str, form: str
) -> None:
    shape = published.Shape(kind, head=4, adaptive=True) if kind == "adm" else published.Shape(kind)
    for precond in ("EDMPrecond", "ECMPrecond"):
        _assert_same(edm_checkpoint(shape, precond), tmp_path / precond, form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("adaptive", [True, False])
def test_openai_in_and_out_and_in(
    published: ModuleType, openai_checkpoint: Callable, tmp_path: Path, form: str, adaptive: bool
) -> None:
    shape = published.Shape("adm", channels=128, head=64, adaptive=adaptive)
    checkpoint = openai_checkpoint(shape)
    assert load_model(checkpoint.path).config.method.second_sigma != MethodConfig().second_sigma
    _assert_same(checkpoint, tmp_path / "out", form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["its own", "another"])
def test_weights_that_are_not_the_described_ones_are_refused(
    trained: Path, tmp_path: Path, form: str, name: str
) -> None:
    export, import_again = FORMS[form]
    export(open_checkpoint(trained), tmp_path / "out")
    (file,) = (tmp_path / "out").rglob("*.safetensors")
    weights = load_file(file)
    if name == "another":
        weights["input.bias"] = weights["input.bias"] + 1e-3
    save_file(weights, file)
    if name == "its own":
        import_again(tmp_path / "out")
        return
    with pytest.raises(InputError, match=r"not the weights that config\.json describes; get it") as refused:
        import_again(tmp_path / "out")
    if "or if they were changed on purpose take `ict_fast` out of that file" in str(refused.value):
        described = tmp_path / "out/unet/config.json"
        values = json.loads(described.read_text())
        del values["ict_fast"]
        described.write_text(json.dumps(values))
        assert import_again(tmp_path / "out").tensors["input.bias"].equal(weights["input.bias"])
    else:
        assert form == "safetensors"


@pytest.mark.parametrize("form", FORMS)
def test_a_card_of_an_export_of_an_export_says_what_the_first_said(
    trained: Path, tmp_path: Path, form: str
) -> None:
    export, import_again = FORMS[form]
    export(open_checkpoint(trained), tmp_path / "out", "weights")
    first = (tmp_path / "out/README.md").read_text()
    for number in range(2):
        save(import_again(tmp_path / "out"), tmp_path / f"in-{number}")
        shutil.rmtree(tmp_path / "out")
        export(open_checkpoint(tmp_path / f"in-{number}"), tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    for fact in ("preset `digits`, 24 of 24 steps of 16 images; the trained, not averaged", "| curriculum |"):
        assert fact in first, fact
        assert fact in card, fact
    for heading in ("## Method", "## Configuration"):
        section = [text.partition(heading)[2].partition("\n## ")[0] for text in (first, card)]
        assert section[0] == section[1] != "", heading
    (fingerprint,) = re.findall(r"fingerprint `(\w{8,})`", first)
    assert fingerprint in card
    assert "their authors'" not in card


@pytest.mark.parametrize("form", FORMS)
def test_an_imported_models_file_is_named_after_two_exports(
    published: ModuleType, edm_checkpoint: Callable, tmp_path: Path, form: str
) -> None:
    export, import_again = FORMS[form]
    checkpoint = edm_checkpoint(published.Shape("ddpmpp"), "EDMPrecond")
    export(checkpoint, tmp_path / "first")
    save(import_again(tmp_path / "first"), tmp_path / "in")
    export(open_checkpoint(tmp_path / "in"), tmp_path / "second")
    for folder in ("first", "second"):
        card = (tmp_path / folder / "README.md").read_text()
        assert f"Weights of `{checkpoint.state['imported']['file']}` (SHA-256" in card
        assert checkpoint.state["imported"]["sha256"] in card
        assert "layout edm" in card
        assert "# A diffusion model (a denoiser): 8x8" in card
        assert "- diffusion\n" in card
        assert "consistency" not in card.partition("## How")[0]


def test_the_commands_do_it_too(
    published: ModuleType, snapshot: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shape = published.Shape("ncsnpp")
    file = tmp_path / "snapshot.pkl"
    file.write_bytes(snapshot(published.edm_weights(shape), shape))
    first, again, folder = (str(tmp_path / name) for name in ("first", "again", "folder"))
    assert main(["import", "edm", str(file), "--out", first]) == 0
    printed = capsys.readouterr().out
    assert "its source code was not executed" in printed
    assert "sampled in one or two steps it gives blurred means" in printed
    assert main(["export", "safetensors", first, "--out", folder]) == 0
    assert main(["import", "safetensors", folder, "--out", again]) == 0
    assert "blurred means" in capsys.readouterr().out, "what the weights are was lost on the way"
    ours, theirs = (open_checkpoint(Path(path)) for path in (first, again))
    name = "ema.safetensors"
    assert (ours.path / name).read_bytes() == (theirs.path / name).read_bytes()
    assert main(["sample", again, "--count", "4", "--steps", "2", "--out", str(tmp_path / "a.png")]) == 0
    assert main(["sample", first, "--count", "4", "--steps", "2", "--out", str(tmp_path / "b.png")]) == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    warnings = capsys.readouterr().err.splitlines()
    assert [line.partition(" is a ")[0] for line in warnings] == [f"warning: {again}", f"warning: {first}"]


def test_the_card_says_what_the_weights_are(trained: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(trained)
    evaluation = {
        "checkpoint": checkpoint.path.name,
        "step": checkpoint.step,
        "one_step": {"frechet_distance": 12.5},
        "count": 100,
        "seed": 0,
        "sigmas": [0.8, 0.3],
        "features": {"name": "some-features"},
    }
    (checkpoint.path.parent / "evaluation.json").write_text(json.dumps(evaluation))
    try:
        export_safetensors(checkpoint, tmp_path / "out")
    finally:
        (checkpoint.path.parent / "evaluation.json").unlink()
    card = (tmp_path / "out/README.md").read_text()
    for fact in (
        "preset `digits`",
        "24 of 24 steps of 16 images",
        "| curriculum | doubling, s0 = 10, s1 = 1280 |",
        "scikit-learn",  # the data's source, from the store
        "| one | 12.5 |",
        "100 samples, seed 0, sigmas 0.8 0.3, features: some-features.",
        "| second step at sigma | 0.821 |",
    ):
        assert fact in card, fact
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["config"]["network"]["channels"] == 8


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (
            {},
            [
                "| curriculum | doubling, s0 = 10, s1 = 1280 |",
                "| noise levels | lognormal, mean -1.1 and deviation 2.0 of ln sigma |",
                "| metric | pseudo-huber, c = 0.00432 |",  # 0.00054 sqrt(64)
                "| teacher | student |",
            ],
        ),
        (
            {"curriculum": "fixed", "indices": "uniform", "metric": "l2", "teacher": "ema"},
            [
                "| curriculum | fixed, s0 = 10 |",
                "| noise levels | uniform |",
                "| metric | l2 |",
                "| teacher | ema, decay exp(s0 ln 0.9 / N) |",
            ],
        ),
        (
            {"huber_c": 0.03, "teacher": "ema", "teacher_ema": 0.95, "teacher_ema_divisor": "pairs"},
            ["| metric | pseudo-huber, c = 0.03 |", "| teacher | ema, decay exp(s0 ln 0.95 / (N - 1)) |"],
        ),
    ],
)
def test_the_card_says_of_the_method_what_was_used(
    trained: Path, tmp_path: Path, method: dict, said: list[str]
) -> None:
    model = open_checkpoint(trained)
    state = copy.deepcopy(model.state)
    state["config"]["method"] |= method
    folder = write_checkpoint(tmp_path, model.step, {"ema": model.tensors("ema")}, state, keep=2)
    export_safetensors(open_checkpoint(folder), tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert [line for line in said if line not in card.splitlines()] == []


def test_the_card_says_that_the_run_was_extended(trained: Path, tmp_path: Path) -> None:
    model = open_checkpoint(trained)
    state = model.state | {"extended": [[8, 12]]}
    folder = write_checkpoint(tmp_path, model.step, {"ema": model.tensors("ema")}, state, keep=2)
    export_safetensors(open_checkpoint(folder), tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert "Until step 8 its curriculum was one for 12 steps (`--extend`)." in card


@pytest.mark.parametrize("form", FORMS)
def test_a_store_whose_name_is_no_text_is_exported_too(trained: Path, tmp_path: Path, form: str) -> None:
    store = tmp_path / "fa\udce7ade"  # as Python reads bytes of Latin-1
    store.mkdir()
    (store / "meta.json").write_text(json.dumps({"source": f"folder {store.name}", "recipe": "as they are"}))
    model = open_checkpoint(trained)
    state = copy.deepcopy(model.state)
    state["config"]["data"]["path"] = str(store)
    folder = write_checkpoint(tmp_path, model.step, {"ema": model.tensors("ema")}, state, keep=2)
    FORMS[form][0](open_checkpoint(folder), tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text(encoding="utf-8")
    assert "Store `fa?ade`" in card
    assert "source: folder fa?ade" in card


@pytest.mark.parametrize("form", FORMS)
def test_the_card_names_the_license_that_is_given_and_else_none(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture, form: str
) -> None:
    words = ["export", form, str(trained), "--out"]
    assert main([*words, str(tmp_path / "none")]) == 0
    assert main([*words, str(tmp_path / "one"), "--license", "cc-by-4.0"]) == 0
    cards = [(tmp_path / name / "README.md").read_text() for name in ("none", "one")]
    front, rest = cards[1].removeprefix("---\n").split("\n---\n", 1)
    assert 'license: "cc-by-4.0"' in front.splitlines()
    front = front.replace('license: "cc-by-4.0"\n', "")
    assert f"---\n{front}\n---\n{rest}" == cards[0]
    for wrong in ("cc by", "a\ntags: b", ".5", ""):
        assert main([*words, str(tmp_path / "wrong"), "--license", wrong]) == 2
    assert "; it must be one word of letters, digits, dots, dashes and pluses, such as cc-by-4.0" in (
        capsys.readouterr().err
    )
    assert not (tmp_path / "wrong").exists()


def test_an_import_takes_another_second_sigma(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    export_safetensors(open_checkpoint(trained), tmp_path / "out")
    words = ["import", "safetensors", str(tmp_path / "out"), "--out", str(tmp_path / "in")]
    assert main([*words, "--second-sigma", "80"]) == 2
    assert "--second-sigma is 80.0; it must be between 0.002 and 80.0" in capsys.readouterr().err
    assert main([*words, "--second-sigma", "0.9"]) == 0
    assert load_model(tmp_path / "in").config.method.second_sigma == 0.9


def test_an_evaluation_of_another_step_is_not_on_the_card(trained: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(trained)
    other = {"checkpoint": "step-00000001", "step": 1, "one_step": {"frechet_distance": 12.5}}
    (checkpoint.path.parent / "evaluation.json").write_text(json.dumps(other))
    try:
        export_safetensors(checkpoint, tmp_path / "out")
    finally:
        (checkpoint.path.parent / "evaluation.json").unlink()
    assert "None were measured" in (tmp_path / "out/README.md").read_text()


def test_a_distance_that_is_not_there_is_not_made_up_on_the_card(trained: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(trained)
    measured = {
        "checkpoint": checkpoint.path.name,
        "step": checkpoint.step,
        "one_step": {"frechet_distance": None},
        "two_step": {"frechet_distance": float("nan")},
        "three_step": {"frechet_distance": 12.5},
        "four_step": {"frechet_distance": 10**400},
        "count": None,
        "features": {"name": None},
    }
    (checkpoint.path.parent / "evaluation.json").write_text(json.dumps(measured))
    try:
        export_safetensors(checkpoint, tmp_path / "out")
    finally:
        (checkpoint.path.parent / "evaluation.json").unlink()
    metrics = (tmp_path / "out/README.md").read_text().partition("## Metrics")[2].partition("\n## ")[0]
    assert (
        "| one | not available |\n| two | not available |\n| three | 12.5 |\n| four | not available |\n"
        in metrics
    )
    assert "None" not in metrics
    assert "features: not named." in metrics


def test_everything_that_was_measured_is_on_the_card(trained: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(trained)
    kernel = {"kernel_distance": 0.61987, "kernel_distance_std": 0.7574}
    measured = {
        "checkpoint": checkpoint.path.name,
        "step": checkpoint.step,
        "one_step": {"frechet_distance": 1.8589, **kernel, "precision": 0.68614, "recall": float("nan")},
        "two_step": {"frechet_distance": 1.9987, "recall": 0.81803},
    }
    (checkpoint.path.parent / "evaluation.json").write_text(json.dumps(measured))
    try:
        export_safetensors(checkpoint, tmp_path / "out")
    finally:
        (checkpoint.path.parent / "evaluation.json").unlink()
    metrics = (tmp_path / "out/README.md").read_text().partition("## Metrics\n\n")[2]
    assert metrics.splitlines()[:4] == [
        "| steps | Fréchet distance | Kernel distance | Precision | Recall |",
        "| --- | --- | --- | --- | --- |",
        "| one | 1.859 | 0.6199 ± 0.76 | 0.686 | not available |",
        "| two | 1.999 | not available | not available | 0.818 |",
    ]


def test_measures_of_the_average_are_not_on_the_card_of_the_trained_weights(
    trained: Path, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(trained)
    measured = {
        "checkpoint": checkpoint.path.name,
        "step": checkpoint.step,
        "one_step": {"frechet_distance": 12.5},
    }
    (checkpoint.path.parent / "evaluation.json").write_text(json.dumps(measured))
    try:
        for weights in ("ema", "weights"):
            export_safetensors(checkpoint, tmp_path / weights, weights)
    finally:
        (checkpoint.path.parent / "evaluation.json").unlink()
    assert "| one | 12.5 |" in (tmp_path / "ema/README.md").read_text()
    assert "12.5" not in (tmp_path / "weights/README.md").read_text()


def test_the_trained_weights_themselves_can_be_exported(trained: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(trained)
    export_safetensors(checkpoint, tmp_path / "out", "weights")
    again = import_safetensors(tmp_path / "out").tensors
    assert all(torch.equal(again[name], tensor) for name, tensor in checkpoint.tensors("weights").items())


def test_an_export_does_not_write_over_anything(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").touch()
    assert main(["export", "safetensors", str(trained), "--out", str(tmp_path / "out")]) == 2
    assert [entry.name for entry in tmp_path.rglob("*")] == ["out", "mine"]


def test_an_export_does_not_take_the_place_of_the_folder_that_one_is_in(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["export", "safetensors", str(trained), "--out", "."]) == 2
    assert "--out is .; the folder is renamed to its place, which needs a name" in capsys.readouterr().err


def test_an_export_that_fails_leaves_nothing(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from ict_fast.interop import export

    def full(path: Path, content: bytes) -> None:
        if path.name == "README.md":
            raise OSError(28, "No space left on device")
        path.write_bytes(content)

    monkeypatch.setattr(export, "write_durably", full)
    assert main(["export", "safetensors", str(trained), "--out", str(tmp_path / "out")]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_import_that_fails_can_be_tried_again(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from ict_fast import checkpoint

    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    assert main(["export", "safetensors", str(trained), "--out", str(tmp_path / "exported")]) == 0
    words = ["import", "safetensors", str(tmp_path / "exported"), "--out", str(tmp_path / "in")]
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_durably", full)
        assert main(words) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert main(words) == 0


def test_noise_levels_that_are_not_the_defaults_go_to_diffusers_and_back(
    tiny: Config, tmp_path: Path
) -> None:
    method = replace(
        tiny.method,
        sigma_min=0.01,
        sigma_max=40.0,
        rho=5.0,
        sigma_data=0.4,
        boundary_sigma=0.005,
        second_sigma=0.5,
    )
    config = replace(tiny, method=method)
    weights = {"ema": build_seeded_network(config).state_dict()}
    state = {"config": to_dict(config)}
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "run", 1, weights, state, keep=2))
    export_diffusers(checkpoint, tmp_path / "out")
    assert import_diffusers(tmp_path / "out").config.method == method
