"""A store comes back as it was written, or says which file is wrong and what to do."""

import hashlib
import json
import os
import pickle
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from ict_fast import cli, presets, screen
from ict_fast.data import store as store_module
from ict_fast.data.prepare import DIGITS_FINGERPRINT, prepare_digits
from ict_fast.data.store import open_store, write_store
from ict_fast.errors import InputError
from ict_fast.locks import BusyError, WriterLock

IMAGES = np.random.default_rng(0).integers(0, 256, (12, 4, 4, 3), dtype=np.uint8)
LABELS = np.arange(12) % 2
ABOUT = {"source": "test", "recipe": "random", "classes": ["even", "odd"]}


def test_images_and_labels_come_back_as_they_were(tmp_path: Path) -> None:
    store = open_store(write_store(tmp_path / "a", IMAGES, LABELS, **ABOUT))
    assert isinstance(store.images, np.memmap)
    np.testing.assert_array_equal(store.images, IMAGES)
    np.testing.assert_array_equal(store.labels, LABELS)
    assert (store.num_images, store.resolution, store.image_channels, store.num_classes) == (12, 4, 3, 2)
    assert (store.meta["source"], store.meta["recipe"], store.meta["classes"]) == tuple(ABOUT.values())
    assert store.images.dtype == np.uint8
    assert store.labels.dtype == np.int64


def test_numpy_alone_can_read_a_store(store_path: Path) -> None:
    meta = json.loads((store_path / "meta.json").read_text())
    assert np.load(store_path / "images.npy", allow_pickle=False).shape == (37, 4, 4, 3)
    for name, entry in meta["files"].items():
        content = (store_path / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_blocks_give_the_same_files_as_one_array(tmp_path: Path) -> None:
    whole = write_store(tmp_path / "whole", IMAGES, LABELS, **ABOUT)
    blocks = (IMAGES[start : start + 5] for start in range(0, 12, 5))
    pieces = write_store(tmp_path / "pieces", blocks, LABELS, **ABOUT)
    for name in ("images.npy", "labels.npy", "meta.json"):
        assert (whole / name).read_bytes() == (pieces / name).read_bytes()


def test_the_fingerprint_is_that_of_the_data_alone(tmp_path: Path) -> None:
    first = open_store(write_store(tmp_path / "a", IMAGES, LABELS, **ABOUT))
    renamed = open_store(write_store(tmp_path / "b", IMAGES, LABELS, **{**ABOUT, "source": "elsewhere"}))
    relabelled = open_store(write_store(tmp_path / "c", IMAGES, 1 - LABELS, **ABOUT))
    repainted = open_store(write_store(tmp_path / "d", IMAGES ^ 1, LABELS, **ABOUT))
    assert first.fingerprint == renamed.fingerprint
    assert len({first.fingerprint, relabelled.fingerprint, repainted.fingerprint}) == 3


def test_images_without_labels_have_no_classes(tmp_path: Path) -> None:
    written = write_store(tmp_path / "a", IMAGES, np.zeros(12, int), source="s", recipe="r", classes=[])
    assert open_store(written).num_classes == 0


# -------------------------------------------------------------------------------- writing


def test_a_finished_equal_store_is_verified_and_not_rebuilt(store_path: Path) -> None:
    before = {file: (file.stat().st_ino, file.stat().st_mtime_ns) for file in store_path.iterdir()}
    store = open_store(store_path)
    about = {key: store.meta[key] for key in ("source", "recipe", "classes")}
    write_store(store_path, np.array(store.images), store.labels, **about)
    assert before == {file: (file.stat().st_ino, file.stat().st_mtime_ns) for file in store_path.iterdir()}

    _flip_byte(store_path / "images.npy", -1)
    with pytest.raises(InputError, match=r"images\.npy: altered"):
        write_store(store_path, np.array(store.images), store.labels, **about)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"images": IMAGES ^ 1}, "images"),
        ({"labels": 1 - LABELS}, "labels"),
        ({"recipe": "another"}, "recipe"),
        ({"classes": ["odd", "even"]}, "classes"),
    ],
)
def test_another_store_in_the_same_place_is_refused(tmp_path: Path, change: dict, named: str) -> None:
    arguments = {"images": IMAGES, "labels": LABELS, **ABOUT}
    write_store(tmp_path / "a", **arguments)
    with pytest.raises(InputError, match=rf"holds another store \(other {named}\)"):
        write_store(tmp_path / "a", **{**arguments, **change})
    np.testing.assert_array_equal(open_store(tmp_path / "a").images, IMAGES)


def test_a_folder_of_other_things_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="exists and is not a prepared store"):
        write_store(tmp_path, IMAGES, LABELS, **ABOUT)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_run_is_not_taken_for_a_place_of_images(tmp_path: Path) -> None:
    (tmp_path / "runs/digits/checkpoints").mkdir(parents=True)
    with pytest.raises(InputError, match="is a run; name a folder of images") as refused:
        open_store(tmp_path / "runs/digits")
    assert "prepare digits" not in str(refused.value)


def test_an_empty_folder_is_used(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    assert open_store(write_store(tmp_path / "a", IMAGES, LABELS, **ABOUT)).num_images == 12


def test_a_link_to_an_empty_folder_is_followed(tmp_path: Path) -> None:
    (tmp_path / "large disk").mkdir()
    (tmp_path / "a").symlink_to("large disk")
    write_store(tmp_path / "a", IMAGES, LABELS, **ABOUT)
    assert open_store(tmp_path / "large disk").num_images == 12
    assert (tmp_path / "a").is_symlink()


def test_two_writers_do_not_mix(tmp_path: Path) -> None:
    def blocks() -> Iterator[np.ndarray]:
        with pytest.raises(BusyError, match=rf"another process is writing it \(process {os.getpid()} on"):
            write_store(tmp_path / "a", IMAGES, LABELS, **ABOUT)
        yield IMAGES

    write_store(tmp_path / "a", blocks(), LABELS, **ABOUT)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_writer_that_was_robbed_of_its_folder_leaves_the_robbers_alone(tmp_path: Path) -> None:
    def blocks() -> Iterator[np.ndarray]:
        (tmp_path / ".a.partial.lock").write_text("process 1 on another host")
        yield IMAGES

    with pytest.raises(InputError, match=r"\.a\.partial\.lock is no longer this process's"):
        write_store(tmp_path / "a", blocks(), LABELS, **ABOUT)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".a.partial", ".a.partial.lock"]


def test_a_store_that_another_process_finishes_meanwhile_is_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lock_late(folder: Path) -> WriterLock:
        monkeypatch.setattr(store_module, "WriterLock", WriterLock)
        write_store(tmp_path / "a", IMAGES, LABELS, **ABOUT)
        return WriterLock(folder)

    monkeypatch.setattr(store_module, "WriterLock", lock_late)
    write_store(tmp_path / "a", IMAGES, LABELS, **ABOUT)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_mount_point_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "disk")
    with pytest.raises(InputError, match=r"disk: is a mount point.*name a folder in it"):
        prepare_digits(tmp_path / "disk")


@pytest.mark.parametrize("out", [".", "empty/.."])
def test_a_folder_without_a_name_is_refused(
    out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"which needs a name; name a folder in it"):
        prepare_digits(Path(out))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (IMAGES.astype(np.float32), LABELS, "float32; a store holds uint8"),
        (IMAGES[:, :3], LABELS, "must be"),
        (IMAGES[..., :2], LABELS, "must be"),
        (IMAGES[:11], LABELS, "11 images for 12 labels"),
        (iter([IMAGES[:6], np.zeros((6, 8, 8, 3), np.uint8)]), LABELS, "one shape"),
        (iter([]), LABELS, "0 images for 12 labels"),
        (IMAGES, LABELS + 1, "labels from 1 to 2; there are 2 classes"),
        (IMAGES, LABELS - 1, "labels from -1 to 0"),
        (IMAGES, LABELS / 1, "must be integers"),
    ],
)
def test_what_the_format_cannot_hold_is_refused_and_leaves_nothing(
    tmp_path: Path, images: np.ndarray, labels: np.ndarray, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        write_store(tmp_path / "a", images, labels, **ABOUT)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_too_small_is_noticed_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(InputError, match="the disk has"):
        write_store(tmp_path / "a", IMAGES, LABELS, **ABOUT)
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    large = np.zeros((100, 32, 32, 3), np.uint8)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(InputError, match="cannot be written: File too large"):
            write_store(tmp_path / "a", large, np.zeros(100, int), **ABOUT)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_a_kill_at_any_moment_leaves_a_whole_store_or_none(tmp_path: Path) -> None:
    script = """
import os, signal, sys
from pathlib import Path
import numpy as np
from ict_fast.data.store import write_store
out, moment = Path(sys.argv[1]), 0
while True:
    moment += 1
    child = os.fork()
    if child == 0:
        left = moment
        def count(event, arguments):
            global left
            if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.listdir"):
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(count)
        blocks = (np.full((4, 8, 8, 3), number, np.uint8) for number in range(3))
        write_store(out / str(moment), blocks, np.zeros(12, int), source="s", recipe="r", classes=[])
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
print(moment)
"""
    run = [sys.executable, "-c", script, str(tmp_path)]
    moments = int(subprocess.run(run, check=True, capture_output=True, text=True).stdout)
    assert moments > 6  # or nothing was tried
    images = np.repeat(np.arange(3, dtype=np.uint8), 4)[:, None, None, None] * np.ones((1, 8, 8, 3), np.uint8)
    wholes = 0
    for moment in range(1, moments + 1):
        out = tmp_path / str(moment)
        wholes += out.exists()
        if out.exists():
            np.testing.assert_array_equal(open_store(out).images, images)
        write_store(out, images, np.zeros(12, int), source="s", recipe="r", classes=[])  # a rerun completes
        assert not (tmp_path / f".{moment}.partial").exists()
    assert 1 <= wholes < moments


# -------------------------------------------------------------------------------- opening


def _flip_byte(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def _replace_array(folder: Path, name: str, content: bytes) -> None:
    """Puts another file in place, and meta.json in agreement with it: the array itself must be looked at."""
    (folder / name).write_bytes(content)
    meta = json.loads((folder / "meta.json").read_text())
    meta["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "meta.json").write_text(json.dumps(meta))


def _npy(array: np.ndarray, folder: Path) -> bytes:
    np.save(folder / "other.npy", array)
    content = (folder / "other.npy").read_bytes()
    (folder / "other.npy").unlink()
    return content


def _edit_meta(folder: Path, **changes: object) -> None:
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, **changes}))


class _Payload:
    """What a hostile .npy would run on loading."""

    def __reduce__(self) -> tuple:
        return (os.mkdir, (os.environ["ICT_FAST_TEST_PAYLOAD"],))


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "images missing": (lambda p: (p / "images.npy").unlink(), r"images\.npy: missing"),
    "labels missing": (lambda p: (p / "labels.npy").unlink(), r"labels\.npy: missing"),
    "meta missing": (lambda p: (p / "meta.json").unlink(), r"meta\.json: missing"),
    "images truncated": (lambda p: _cut(p / "images.npy"), r"images\.npy: truncated"),
    "labels truncated": (lambda p: _cut(p / "labels.npy"), r"labels\.npy: truncated"),
    "images too long": (
        lambda p: (p / "images.npy").write_bytes((p / "images.npy").read_bytes() + b"x"),
        r"images\.npy: altered",
    ),
    "a byte of the images": (lambda p: _flip_byte(p / "images.npy", -5), r"images\.npy: altered.*SHA-256"),
    "a byte of the labels": (lambda p: _flip_byte(p / "labels.npy", -24), r"labels\.npy: altered.*SHA-256"),
    "the header of the images": (lambda p: _flip_byte(p / "images.npy", 0), r"images\.npy: not a plain"),
    "images empty": (lambda p: _replace_array(p, "images.npy", b""), r"images\.npy: not a plain"),
    "labels of another type": (
        lambda p: _replace_array(p, "labels.npy", _npy(np.zeros(37, np.int32), p)),
        r"labels\.npy: holds int32",
    ),
    "images of another type": (
        lambda p: _replace_array(p, "images.npy", _npy(np.zeros((37, 4, 4, 3), np.float32), p)),
        r"images\.npy: holds float32",
    ),
    "images in two dimensions": (
        lambda p: _replace_array(p, "images.npy", _npy(np.zeros((37, 48), np.uint8), p)),
        r"images\.npy: holds uint8 in 2 dimensions",
    ),
    "images not square": (
        lambda p: _replace_array(p, "images.npy", _npy(np.zeros((37, 4, 5, 3), np.uint8), p)),
        r"images\.npy: shape",
    ),
    "images in Fortran order": (
        lambda p: _replace_array(p, "images.npy", _npy(np.zeros((37, 4, 4, 3), np.uint8, "F"), p)),
        r"images\.npy: in Fortran order",
    ),
    "fewer labels": (
        lambda p: _replace_array(p, "labels.npy", _npy(np.zeros(36, np.int64), p)),
        r"labels\.npy: 36 labels for 37 images",
    ),
    "labels out of range": (
        lambda p: _replace_array(p, "labels.npy", _npy(np.arange(37), p)),
        r"labels\.npy: labels from 0 to 36; there are 3 classes",
    ),
    "a pickle": (
        lambda p: _replace_array(p, "labels.npy", _npy(np.array([_Payload()]), p)),
        r"labels\.npy: not a plain",
    ),
    "a bare pickle": (
        lambda p: _replace_array(p, "images.npy", pickle.dumps(_Payload())),
        r"images\.npy: not a plain",
    ),
    "meta not JSON": (lambda p: (p / "meta.json").write_text("{"), r"meta\.json: not readable as JSON"),
    "meta binary": (lambda p: (p / "meta.json").write_bytes(b"\xff\0"), r"meta\.json: not readable as JSON"),
    "meta a list": (lambda p: (p / "meta.json").write_text("[]"), r"meta\.json: not written by ict-fast"),
    "meta nested": (lambda p: (p / "meta.json").write_text("[" * 10**6), r"meta\.json: not readable"),
    "a later version": (lambda p: _edit_meta(p, version=99), r"meta\.json: format version 99"),
    "no file entries": (lambda p: _edit_meta(p, files={}), r"meta\.json: altered"),
    "a foreign file entry": (
        lambda p: _edit_meta(p, files={"../../etc/passwd": {"bytes": 1, "sha256": ""}}),
        r"meta\.json: altered",
    ),
    "class count": (lambda p: _edit_meta(p, num_classes=10), r"meta\.json: altered"),
}


@pytest.mark.parametrize("damage", BROKEN)
def test_a_damaged_store_names_the_file_and_the_remedy(
    store_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ICT_FAST_TEST_PAYLOAD", str(store_path.parent / "executed"))
    break_it, message = BROKEN[damage]
    break_it(store_path)
    with pytest.raises(InputError, match=message) as caught:
        open_store(store_path)
    assert "\n" not in str(caught.value)
    if "labels from" not in message:
        assert re.search("ict-fast prepare", str(caught.value))
    assert not (store_path.parent / "executed").exists()


def test_a_missing_folder_names_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"`ict-fast prepare digits --out {tmp_path}/digits`"):
        open_store(tmp_path / "digits")


@pytest.mark.parametrize("preset", presets.names())
def test_a_preset_without_its_data_names_the_command_that_makes_it(
    preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)  # `make demo` leaves data/digits in the checkout
    (tmp_path / "setup.py").touch()
    with pytest.raises(InputError) as caught:
        open_store(Path(presets.get(preset).data.path))
    (command,) = re.findall(r"`ict-fast (prepare .*)`", str(caught.value))
    assert "<source>" not in command
    words = command.replace("ILSVRC2012_img_train.tar", "nowhere").replace("--download", "nowhere").split()
    assert cli.main(["prepare", *words[1:-1], "setup.py"]) == 2  # understood, but for its place
    assert "--out is setup.py, but" in capsys.readouterr().err


def test_a_large_store_is_hashed_only_when_asked(
    store_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(store_module, "HASH_ALWAYS_BELOW", 100)
    monkeypatch.setattr(screen, "LINE_INTERVAL", 0.0)
    open_store(store_path, verify=True)
    assert re.search(rf"verifying {store_path} \(\d+%\), ETA 0:00:00\n", capsys.readouterr().err)
    _flip_byte(store_path / "images.npy", -1)
    open_store(store_path)
    with pytest.raises(InputError, match="SHA-256"):
        open_store(store_path, verify=True)


# -------------------------------------------------------------------------------- digits


def test_digits_are_scikit_learns(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    store = open_store(prepare_digits(tmp_path / "digits"))
    source = load_digits()
    assert store.images.shape == (1797, 8, 8, 1)
    assert store.num_classes == 10
    assert store.fingerprint == DIGITS_FINGERPRINT
    np.testing.assert_array_equal(store.labels, source.target)
    # 16 is full white in the source; half a grey level is the most that rounding may cost.
    assert np.abs(store.images[..., 0] / 255 - source.images / 16).max() <= 0.5 / 255 + 1e-12
    assert store.images.min() == 0
    assert store.images.max() == 255
    assert prepare_digits(tmp_path / "digits") == tmp_path / "digits"
