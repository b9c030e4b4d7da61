"""What is offered as features: TorchScript is opened, and a pickle is refused before any of it runs."""

import hashlib
import io
import os
import pickle
import warnings
import zipfile

import pytest
import torch

from ict_fast.errors import InputError
from ict_fast.evaluation import torchscript
from ict_fast.evaluation.torchscript import open_torchscript


class RunsOnLoading:
    """A hostile object: whoever unpickles it creates a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def saved(kind, victim, path):
    hostile = RunsOnLoading(victim)
    if kind == "torch.save":
        torch.save({"weights": torch.zeros(3), "more": hostile}, path)
    elif kind == "torch.save of 2019":
        torch.save({"more": hostile}, path, _use_new_zipfile_serialization=False)
    else:
        path.write_bytes(pickle.dumps(hostile, protocol=kind))
    return path


@pytest.mark.parametrize("kind", [0, 2, 4, 5, "torch.save", "torch.save of 2019"])
@pytest.mark.parametrize("name", ["network.pkl", "network.pt"])
def test_a_pickle_is_refused_and_not_executed(tmp_path, kind, name):
    victim = tmp_path / "executed"
    path = saved(kind, victim, tmp_path / name)
    with pytest.raises(InputError, match=r"refused, it is a pickle.*nothing was executed"):
        open_torchscript(path)
    assert not victim.exists()
    # The bait is live: an ordinary load of it does what it says.
    torch.load(path, weights_only=False) if isinstance(kind, str) else pickle.loads(path.read_bytes())
    assert victim.exists()


def test_torchscript_loads_in_evaluation_mode_without_a_warning(inception):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module, sha256 = open_torchscript(inception)
    assert not module.training
    assert sha256 == hashlib.sha256(inception.read_bytes()).hexdigest()
    assert module(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), return_features=True).shape == (2, 16)


def test_another_sha256_is_refused(inception):
    right = hashlib.sha256(inception.read_bytes()).hexdigest()
    open_torchscript(inception, right.upper())
    with pytest.raises(InputError, match=rf"its SHA-256 is {right}, not 0000"):
        open_torchscript(inception, "0" * 64)


@pytest.mark.parametrize(("keep", "said"), [(0, "truncated, or not"), (40, "truncated, or not")])
def test_a_truncated_file_is_refused(inception, tmp_path, keep, said):
    path = tmp_path / "short.pt"
    path.write_bytes(inception.read_bytes()[:keep])
    with pytest.raises(InputError, match=said):
        open_torchscript(path)


def test_a_damaged_archive_is_refused_in_one_line(inception, tmp_path):
    content = bytearray(inception.read_bytes())
    with zipfile.ZipFile(inception) as archive:
        data = next(member for member in archive.infolist() if member.filename.endswith("/data.pkl"))
    content[data.header_offset + 60 : data.header_offset + 160] = b"\xff" * 100
    path = tmp_path / "damaged.pt"
    path.write_bytes(content)
    with pytest.raises(InputError, match="torch cannot load it") as refused:
        open_torchscript(path)
    assert "\n" not in str(refused.value)


def test_other_archives_and_nothing_are_refused(tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("hello.txt", "hello")
    (tmp_path / "archive.pt").write_bytes(buffer.getvalue())
    with pytest.raises(InputError, match="a ZIP, but not a TorchScript archive"):
        open_torchscript(tmp_path / "archive.pt")
    with pytest.raises(InputError, match="there is no such file"):
        open_torchscript(tmp_path / "nothing.pt")
    with pytest.raises(InputError, match=r"cannot be read|not a file"):
        open_torchscript(tmp_path)


def test_an_archive_that_claims_gigabytes_is_refused_by_its_directory(inception, tmp_path, monkeypatch):
    path = tmp_path / "bomb.pt"
    path.write_bytes(inception.read_bytes())
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/99", bytes(50 << 20))
    monkeypatch.setattr(torchscript, "MOST_BYTES", 10 << 20)
    with pytest.raises(InputError, match=r"a file of .* MB that claims to hold 0\.05\d* GB; not loaded"):
        open_torchscript(path)
