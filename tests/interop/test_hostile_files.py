"""Files that want to run something, or claim what they do not hold: exit code 2, one line, nothing left."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from ict_fast.checkpoint import open_checkpoint, write_checkpoint
from ict_fast.cli import main

CLAIM = 10 * 2**30


class _Call:
    """Pickles as a call of a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.reduced = function, arguments

    def __reduce__(self) -> tuple:
        return self.reduced


class Refused:
    """Runs `ict-fast import` and looks at what it left."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture) -> None:
        self.folder, self.proof, self._capsys = folder, folder / "executed", capsys

    def __call__(self, source: str, name: str, content: bytes, *options: str) -> str:
        """The one line; fails unless it is one, and unless nothing was executed or written."""
        (self.folder / name).write_bytes(content)
        before = set(self.folder.rglob("*"))
        code = main(
            ["import", source, str(self.folder / name), "--out", str(self.folder / "out" / "deep"), *options]
        )
        output = self._capsys.readouterr()
        assert code == 2
        assert output.out == ""
        assert output.err.count("\n") == 1, output.err
        assert output.err.startswith("ict-fast: error: ")
        assert set(self.folder.rglob("*")) == before, "something was written"
        assert not self.proof.exists(), "something was executed"
        return output.err


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> Refused:
    return Refused(tmp_path, capsys)


def _torch_file(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def _small(published: ModuleType) -> tuple[Any, dict[str, Tensor]]:
    shape = published.Shape("ddpmpp", classes=0)
    return shape, published.edm_weights(shape)


# ---- code ----


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("source", ["edm", "openai"])
def test_a_pickle_that_calls_the_system(refused: Refused, source: str, protocol: int) -> None:
    content = pickle.dumps({"ema": _Call(os.system, f"touch {refused.proof}")}, protocol)
    line = refused(source, "weights.pkl", content)
    assert "refused, it asks for 'posix.system'" in line


@pytest.mark.parametrize("source", ["edm", "openai"])
def test_a_torch_file_that_calls_the_system(refused: Refused, source: str) -> None:
    content = _torch_file({"time_embed.0.weight": _Call(os.system, f"touch {refused.proof}")})
    assert "refused, it asks for 'posix.system'" in refused(source, "weights.pt", content)


def test_a_snapshots_source_code_stays_text(
    published: ModuleType, snapshot: Callable, refused: Refused, tmp_path: Path
) -> None:
    shape, weights = _small(published)
    code = f"import pathlib; pathlib.Path({str(refused.proof)!r}).touch()"
    (tmp_path / "a.pkl").write_bytes(snapshot(weights, shape, source=code))
    assert main(["import", "edm", str(tmp_path / "a.pkl"), "--out", str(tmp_path / "out")]) == 0
    assert not refused.proof.exists()


@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        (eval, ("1",), "builtins.eval"),
        (torch.hub.load, ("a", "b"), "torch.hub.load"),
        (torch.nn.Linear, (1, 1), "torch.nn.modules.linear.Linear"),
    ],
)
def test_what_a_snapshot_may_not_name(
    published: ModuleType, snapshot: Callable, refused: Refused, function: Any, arguments: tuple, name: str
) -> None:
    shape, weights = _small(published)
    content = snapshot(weights, shape, extra=_Call(function, *arguments))
    assert f"refused, it asks for {name!r}" in refused("edm", "a.pkl", content)


@pytest.mark.parametrize("arguments", [({}, "get"), (torch.zeros(1), "numpy"), ("", "join")])
def test_a_method_of_something_else_than_edms_objects(
    published: ModuleType, snapshot: Callable, refused: Refused, arguments: tuple
) -> None:
    shape, weights = _small(published)
    content = snapshot(weights, shape, extra=_Call(getattr, *arguments))
    assert "an attribute of something else than EDM's objects" in refused("edm", "a.pkl", content)


def test_a_class_beside_the_weights_is_refused_by_name(refused: Refused) -> None:
    line = refused("openai", "a.pt", _torch_file({"model": torch.nn.Linear(2, 2)}))
    assert "refused, it asks for 'torch.nn.modules.linear.Linear'" in line


# ---- of another code base ----


@pytest.mark.parametrize("form", ["snapshot", "state dict"])
def test_edms_weights_are_no_openais(
    published: ModuleType, snapshot: Callable, refused: Refused, form: str
) -> None:
    shape, weights = _small(published)
    content = snapshot(weights, shape) if form == "snapshot" else _torch_file(weights)
    line = refused("openai", "a.file", content)
    assert "of EDM" in line
    assert f"`ict-fast import edm {refused.folder / 'a.file'}`" in line


def test_openais_weights_are_no_edms(published: ModuleType, refused: Refused) -> None:
    weights = published.seeded(published.openai_layout(published.Shape("adm", channels=128, head=64)))
    line = refused("edm", "a.pt", _torch_file(weights))
    assert "is an ADM of OpenAI" in line
    assert f"`ict-fast import openai {refused.folder / 'a.pt'}`" in line


def test_names_out_of_a_file_do_not_reach_the_terminal_as_they_are(
    published: ModuleType, refused: Refused
) -> None:
    line = refused("edm", "a.pt", _torch_file({"\x1b[2J" + "a" * 3000: 1}), "--kind", "denoiser")
    assert "\x1b" not in line
    assert len(line) < 1100
    names = {f"enc.8x8_block0.\x1b]0;{number}\x07" + "b" * 500: torch.zeros(2) for number in range(3)}
    line = refused("edm", "a.pt", _torch_file(_small(published)[1] | names), "--kind", "denoiser")
    assert r"\x1b]0;0\x07" in line
    assert line[:-1].isprintable()
    assert len(line) < 1100


# ---- what does not fit ----


def _without(weights: dict, name: str) -> dict:
    return {key: value for key, value in weights.items() if key != name}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda w: w | {"map_layer1.weight": torch.zeros(3, 32)}, "map_layer1.weight has the shape (3, 32)"),
        (lambda w: w | {"map_layer1.bias": torch.zeros(())}, "map_layer1.bias has the shape ()"),
        (lambda w: w | {"enc.8x8_conv.weight": torch.zeros(8)}, "enc.8x8_conv.weight has the shape (8,)"),
        (lambda w: _without(w, "dec.4x4_in0.qkv.bias"), "lacks dec.4x4_in0.qkv.bias"),
        (lambda w: _without(w, "enc.8x8_conv.weight"), "lacks enc.8x8_conv.weight"),
        (lambda w: w | {"enc.8x8_block0.extra": torch.zeros(2)}, "has enc.8x8_block0.extra"),
        (lambda w: w | {"map_layer1.bias": torch.full((32,), torch.nan)}, "map_layer1.bias is not finite"),
        (lambda w: w | {"map_layer1.bias": torch.zeros(32, dtype=torch.int64)}, "holds int64, not weights"),
        (lambda w: w | {"map_layer1.bias": "text"}, "'map_layer1.bias' is a str"),
        (lambda w: w | {"map_layer1.bias": torch.zeros(1).expand(32)}, "more than it holds"),
        (lambda w: {}, "holds no state dict"),
        (lambda w: {"a": torch.zeros(2)}, "no network of EDM's"),
    ],
)
def test_a_state_dict_that_is_not_the_networks(
    published: ModuleType, refused: Refused, change: Callable, reason: str
) -> None:
    _, weights = _small(published)
    assert reason in refused("edm", "a.pt", _torch_file(change(weights)), "--kind", "denoiser")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda w: w | {"time_embed.2.bias": torch.zeros(7)}, "time_embed.2.bias has the shape (7,)"),
        (lambda w: _without(w, "out.0.bias"), "lacks out.0.bias"),
        (lambda w: _without(w, "time_embed.0.weight"), "lacks time_embed.0.weight"),
        (lambda w: w | {"input_blocks.0.1.weight": torch.zeros(2)}, "input_blocks.0.1.weight"),
        (lambda w: w | {"input_blocks.2.0.op.weight": torch.zeros(2)}, "resblock_updown False"),
        (lambda w: w | {"middle_block.1.qkv.weight": torch.zeros(2)}, "middle_block.1.qkv.weight"),
        (lambda w: w | {"input_blocks.9.0.in_layers.0.weight": torch.zeros(2)}, "no ADM"),
    ],
)
def test_a_state_dict_that_is_not_openais(
    published: ModuleType, refused: Refused, change: Callable, reason: str
) -> None:
    weights = published.seeded(published.openai_layout(published.Shape("adm", channels=128, head=64)))
    options = ("--kind", "consistency", "--resolution", "8")
    assert reason in refused("openai", "a.pt", _torch_file(change(weights)), *options)


def test_narrow_networks_of_openai_have_other_norms(published: ModuleType, refused: Refused) -> None:
    weights = published.seeded(published.openai_layout(published.Shape("adm", channels=32, head=16)))
    line = refused("openai", "cd_a.pt", _torch_file(weights), "--resolution", "8", "--head-channels", "16")
    assert "32 groups" in line


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ({"img_resolution": 16}, "says another img_resolution"),
        ({"img_channels": [3]}, "says another img_channels"),
        ({"sigma_data": "much"}, "sigma_data is a str"),
        ({"sigma_data": 10**400}, "sigma_data is not finite"),
        ({"sigma_data": float("inf")}, "sigma_data is not finite"),
        ({"precond": "ECMPrecond", "sigma_min": 10**400}, "sigma_min is not finite"),
        ({"inner": {"dropout": 10**400}}, "dropout is not finite"),
        ({"inner": {"dropout": "much"}}, "dropout is a str"),
        ({"inner": {"num_heads": 64}}, "num_heads does not divide"),
        ({"inner": {"num_heads": 3}}, "num_heads does not divide"),
        ({"precond": "VPPrecond"}, "its preconditioning is VPPrecond"),
    ],
)
def test_a_snapshot_that_contradicts_itself(
    published: ModuleType, snapshot: Callable, refused: Refused, shape: dict, reason: str
) -> None:
    kind, weights = _small(published)
    assert reason in refused("edm", "a.pkl", snapshot(weights, kind, **shape))


def test_a_filter_that_is_not_the_networks(
    published: ModuleType, snapshot: Callable, refused: Refused
) -> None:
    kind, weights = _small(published)
    weights["enc.4x4_down.conv0.resample_filter"] = torch.full((1, 1, 2, 2), 0.5)
    assert "is not the filter [1, 1]" in refused("edm", "a.pkl", snapshot(weights, kind))


# ---- sizes ----


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("kind", ["torch", "safetensors", "snapshot"])
def test_a_truncated_file(
    published: ModuleType, snapshot: Callable, refused: Refused, kind: str, share: float
) -> None:
    shape, weights = _small(published)
    content = {
        "torch": lambda: _torch_file(weights),
        "safetensors": lambda: safetensors.torch.save(weights),
        "snapshot": lambda: snapshot(weights, shape),
    }[kind]()
    options = () if kind == "snapshot" else ("--kind", "denoiser")
    line = refused("edm", "a.file", content[: int(share * len(content))], *options)
    assert "truncated" in line or "cannot be read" in line


def test_a_safetensors_header_of_ten_gigabytes(refused: Refused) -> None:
    content = (
        struct.pack("<Q", CLAIM)
        + b'{"a":{"dtype":"F32","shape":[2684354560],"data_offsets":[0,10737418240]}}'
    )
    assert "cannot be read" in refused("edm", "a.safetensors", content, "--kind", "denoiser")


def test_a_safetensors_tensor_of_ten_gigabytes(refused: Refused) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [CLAIM // 4], "data_offsets": [0, CLAIM]}}).encode()
    content = struct.pack("<Q", len(header)) + header + bytes(64)
    assert "cannot be read" in refused("openai", "a.safetensors", content, "--kind", "consistency")


def test_a_zip_member_of_ten_gigabytes(published: ModuleType, refused: Refused) -> None:
    """The directory's entry says so; the member is small."""
    content = bytearray(_torch_file(_small(published)[1]))
    entry = content.index(b"PK\x01\x02")
    content[entry + 20 : entry + 28] = struct.pack("<II", 2**32 - 2, 2**32 - 2)
    line = refused("edm", "a.pt", bytes(content), "--kind", "denoiser")
    assert "claims 4,294,967,294 bytes" in line


def test_a_zip_that_would_inflate(published: ModuleType, refused: Refused) -> None:
    file = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(_torch_file(_small(published)[1]))) as source,
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for member in source.infolist():
            target.writestr(
                member.filename, bytes(2**20) if "/data/" in member.filename else source.read(member)
            )
    assert "is compressed" in refused("edm", "a.pt", file.getvalue(), "--kind", "denoiser")


def test_a_tensor_of_a_snapshot_that_claims_ten_gigabytes(
    published: ModuleType, snapshot: Callable, refused: Refused
) -> None:
    """The number of elements that a storage claims, in its own little pickle."""
    shape, weights = _small(published)
    weights["map_layer1.bias"] = torch.zeros(54321)
    content = snapshot(weights, shape)
    count = struct.pack("<H", 54321)
    assert content.count(b"M" + count) >= 2  # BININT2: the storage's and the tensor's
    position = content.index(b"M" + count, content.index(b"FloatStorage", content.index(b"map_layer1")))
    grown = bytearray(content)
    grown[position + 1 : position + 3] = struct.pack("<H", 65535)
    assert "claims 65,535 numbers" in refused("edm", "a.pkl", bytes(grown))


def test_a_network_too_large_to_be_built_is_refused_before_it_is(refused: Refused) -> None:
    weights = {
        "time_embed.0.weight": torch.zeros(1, 1).expand(40_000_000, 10_000_000),
    }
    assert "more than it holds" in refused("openai", "cd_a.pt", _torch_file(weights))


# ---- exports that were changed ----


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format": "another"}, "not written by"),
        ({"config": 3}, "holds no configuration"),
        ({"imported": {"kind": "magic"}}, "says kind 'magic'"),
        ({"imported": {"kind": ["magic"]}}, "altered"),
        ({"imported": 3}, "altered"),
        ({"imported": {"kind": "consistency", "origin": {"config": {}, "step": -1}}}, "altered"),
        ({"imported": {"kind": "consistency", "file": "\x1b[2J"}}, "its file is no line of text"),
        ({"step": "many"}, "its step is no number"),
        ({"ict_fast": None}, "its ict_fast is no line of text"),
        ({"fingerprint": "0" * 64}, "not the weights that config.json describes; get it again"),
        ({"fingerprint": None}, "not the weights that config.json describes; get it again"),
        ({"config": {"network": {"channels": "many"}}}, "network.channels"),
        ({"config": {"network": {"channels": 64}}}, "has the shape"),
    ],
)
def test_an_altered_export(trained: Path, tmp_path: Path, capsys: Any, change: dict, reason: str) -> None:
    assert main(["export", "safetensors", str(trained), "--out", str(tmp_path / "a")]) == 0
    file = tmp_path / "a/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    capsys.readouterr()
    assert main(["import", "safetensors", str(tmp_path / "a"), "--out", str(tmp_path / "out")]) == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


_THEIRS = {"file": "a.pkl", "sha256": "0", "layout": "edm"}
_ORIGIN = {"config": {}, "step": 1, "ict_fast": "0", "weights": "ema"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"imported": "x"}, "its record of an import is a str"),
        ({"imported": {}}, "its file is no line of text"),
        ({"imported": {"kind": "consistency"}}, "its file is no line of text"),
        ({"imported": {**_THEIRS, "kind": "zzz"}}, "it says kind 'zzz'"),
        ({"imported": {**_THEIRS, "kind": "denoiser", "origin": "z"}}, "the model's origin holds no config"),
        (
            {"imported": {**_THEIRS, "kind": "denoiser", "origin": {**_ORIGIN, "imported": 3}}},
            "its record of an import is a int",
        ),
        ({"init": "x"}, "its record of --init is a str"),
        ({"init": {"path": 3}}, "its path is no line of text"),
        ({"extended": 3}, "its record of --extend is altered"),
    ],
)
def test_an_altered_state_of_a_checkpoint(
    trained: Path, tmp_path: Path, capsys: Any, change: dict, reason: str
) -> None:
    """By somebody who has written a manifest for it, too."""
    model = open_checkpoint(trained)
    state = model.state | change
    folder = write_checkpoint(tmp_path / "run", model.step, {"ema": model.tensors("ema")}, state, keep=2)
    for form in ("safetensors", "diffusers"):
        assert main(["export", form, str(folder), "--out", str(tmp_path / form)]) == 2
        error = capsys.readouterr().err
        assert reason in error.replace("\n", " "), error
        assert not (tmp_path / form).exists()
    if "extended" not in change:  # the search does not ask for it
        assert main(["search-sigma", str(folder)]) == 2
        assert reason in capsys.readouterr().err.replace("\n", " ")


# ---- the command's own refusals ----


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("edm missing.pkl", "missing.pkl: does not exist"),
        ("edm . --kind denoiser", "is a folder"),
        ("edm a.pt", "give --kind consistency or --kind denoiser"),
        ("edm a.pt --kind denoser", 'did you mean "denoiser"'),
        ("edm a.pt --kind denoiser --resolution 8", "--resolution does not belong to edm"),
        ("openai b.pt --resolution 8", "is it a consistency model, or a diffusion model"),
        (
            "openai b.pt --kind consistency --attention-order new --resolution 8",
            "leave --attention-order out",
        ),
        ("openai b.pt --kind consistency", "give --resolution"),
        ("openai b.pt --kind consistency --resolution 0", "--resolution is 0"),
        ("openai b.pt --kind consistency --resolution 8 --head-channels 48", "network.head-channels is 48"),
        ("safetensors .", "config.json: does not exist"),
        ("diffusers .", "unet/config.json: does not exist"),
        ("opnai b.pt", 'did you mean "openai"'),
        ("edm note.txt --kind denoiser", "truncated, or not a pickle that can be read"),
    ],
)
def test_what_the_command_line_can_get_wrong(
    published: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    words: str,
    reason: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("note.txt").write_text("not weights\n")
    if "a.pt" in words:
        torch.save(_small(published)[1], "a.pt")
    if "b.pt" in words:
        shape = published.Shape("adm", channels=128, head=64)
        torch.save(published.seeded(published.openai_layout(shape)), "b.pt")
    assert main(["import", *words.split(), "--out", "out"]) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert error.count("\n") == 1
    assert not Path("out").exists()


def test_an_import_does_not_write_over_anything(
    published: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    torch.save(_small(published)[1], tmp_path / "a.pt")
    words = ["import", "edm", str(tmp_path / "a.pt"), "--kind", "denoiser", "--out", str(tmp_path / "out")]
    assert main(words) == 0
    before = sorted(path.name for path in tmp_path.rglob("*"))
    assert main(words) == 2
    assert "is not empty" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
