"""Preparing is killed, interrupted, robbed of its workers; the same call again completes the same bytes."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ict_fast
from ict_fast.data import partial_store as partial_module
from ict_fast.data.partial_store import PartialStore, Piece
from ict_fast.data.prepare import prepare_store
from ict_fast.data.sources.folder_files import folder_source
from ict_fast.data.sources.image_source import ImageSource
from ict_fast.data.store import open_store
from ict_fast.errors import InputError

REPOSITORY = Path(ict_fast.__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "kernels")])}
FILES = ("images.npy", "labels.npy", "meta.json", "rejected.txt")
SIDE = 256  # so that a piece holds 21 images
COUNT = 150
BAD = 40


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """150 small images, one of them bad, in two classes."""
    random = np.random.default_rng(1)
    for index in range(COUNT):
        path = tmp_path / f"images/{index * 2 // COUNT}/{index:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if index == BAD:
            path.write_text("bad")
        else:
            Image.fromarray(random.integers(0, 256, (5, 7, 3), dtype=np.uint8)).save(path)
    return tmp_path / "images"


def source(images: Path) -> ImageSource:
    return folder_source(images, crop="center-crop", resolution=SIDE, image_channels=3)


def content(store: Path) -> dict[str, bytes]:
    return {name: (store / name).read_bytes() for name in FILES}


def journalled(out: Path) -> int:
    """Pieces that an unfinished preparation has noted as whole."""
    journal = out.parent / f".{out.name}.partial/journal.jsonl"
    return max(0, len(journal.read_text().splitlines()) - 1) if journal.exists() else 0


def is_running(process: int) -> bool:
    """Whether it runs, and is neither gone nor dead with nobody to take note of it."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_killed_preparation_is_continued_to_the_same_bytes(tmp_path: Path, images: Path) -> None:
    program = """
import multiprocessing, os, signal, sys
from pathlib import Path
from ict_fast.data.sources.folder_files import folder_source
from ict_fast.data.partial_store import PartialStore
from ict_fast.data.prepare import prepare_store

write, written = PartialStore.write, []
def write_three(self, piece):
    write(self, piece)
    written.append(piece.start)
    if len(written) == 3:
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
PartialStore.write = write_three
source = folder_source(Path(sys.argv[1]), crop="center-crop", resolution=256, image_channels=3)
prepare_store(source, Path(sys.argv[2]), processes=2)
"""
    out = tmp_path / "killed"
    killed = subprocess.run(
        [sys.executable, "-c", program, str(images), str(out)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    workers = [int(word) for word in killed.stdout.split()]
    assert len(workers) == 2
    wait_until(lambda: not any(map(is_running, workers)))
    assert not out.exists()
    assert journalled(out) == 3

    read: list[int] = []

    class Watched(ImageSource):
        def read(self, start: int, stop: int, remarks: object = None) -> tuple[np.ndarray, dict[int, str]]:
            read.extend(range(start, stop))
            return super().read(start, stop, remarks)

    prepare_store(Watched(**vars(source(images))), out, processes=1)
    assert len(read) == COUNT - 3 * 21 or len(read) == COUNT - 2 * 21 - COUNT % 21
    unbroken = prepare_store(source(images), tmp_path / "unbroken", processes=1)
    assert content(out) == content(unbroken)
    assert open_store(out).num_images == COUNT - 1
    assert not (tmp_path / ".killed.partial").exists()


def test_a_kill_at_any_moment_leaves_a_whole_store_or_none(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Every call that changes the disk is made to kill: before it, or, if it writes, half-way through it.
    program = """
import os, signal, sys
from pathlib import Path
from ict_fast.data import partial_store
from ict_fast.data.sources.folder_files import folder_source
from ict_fast.data.prepare import prepare_store

def killing(call, left):
    def killed(*arguments, **options):
        left[0] -= 1
        if left[0] == 0:
            if call is os_pwrite:
                call(arguments[0], arguments[1][: len(arguments[1]) // 2], arguments[2])
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments, **options)
    return killed

partial_store._PIECE_BYTES = int(sys.argv[3])
source = folder_source(Path(sys.argv[1]), crop="center-crop", resolution=8, image_channels=3)
options = {"processes": 1, "max_rejected": 0.1}
os_pwrite, moment = os.pwrite, 0
os.fsync = os.fdatasync = lambda descriptor: None  # they cost the most, and the power is not cut here
while True:
    moment += 1
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        left = [moment]
        for name in ("pwrite", "fsync", "fdatasync", "ftruncate", "replace", "mkdir", "unlink"):
            setattr(os, name, killing(getattr(os, name), left))
        prepare_store(source, Path(sys.argv[2]) / str(moment), **options)
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
print(moment)
"""
    for path in sorted(images.rglob("*.png"))[6:-6]:
        path.unlink()
    min(images.rglob("*.png")).write_text("bad")
    piece_bytes = 5 * 8 * 8 * 3
    monkeypatch.setattr(partial_module, "_PIECE_BYTES", piece_bytes)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(os, "fdatasync", lambda descriptor: None)
    run = [sys.executable, "-c", program, str(images), str(tmp_path), str(piece_bytes)]
    moments = int(subprocess.run(run, check=True, capture_output=True, text=True, env=ENVIRONMENT).stdout)
    small = folder_source(images, crop="center-crop", resolution=8, image_channels=3)
    expected = content(prepare_store(small, tmp_path / "unbroken", processes=1, max_rejected=0.1))
    wholes = 0
    for moment in range(1, moments + 1):
        out = tmp_path / str(moment)
        wholes += out.exists()
        if out.exists():
            assert content(out) == expected
        prepare_store(small, out, processes=1, max_rejected=0.1)
        assert content(out) == expected
        assert not (tmp_path / f".{moment}.partial").exists()
        assert not (out / "journal.jsonl").exists()
    assert 1 <= wholes < moments
    assert moments > 20


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_command_says_that_it_can_be_continued(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    (tmp_path / "images").mkdir()
    for index in range(600):  # 12 s of one core at 1024 pixels
        Image.new("RGB", (8, 8), (index % 256, 0, 0)).save(tmp_path / f"images/{index:03d}.png")
    out = tmp_path / "store"
    words = ["prepare", "folder", "images", "--resolution", "1024", "--processes", "2", "--out", "store"]
    running = subprocess.Popen(
        [sys.executable, "-m", "ict_fast", *words],
        cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # the tests may be in the background
    )  # fmt: skip
    wait_until(lambda: journalled(out) > 0 or running.poll() is not None)
    os.killpg(running.pid, number)  # as a terminal and a scheduler do: to all of its processes
    said, complained = running.communicate(timeout=60)
    assert running.returncode == code, complained
    assert said == ""
    assert complained == "ict-fast: interrupted; the same command continues\n"
    assert not out.exists()
    assert 0 < journalled(out) < 600


def test_ctrl_c_reaches_none_of_the_reading_processes(tmp_path: Path, images: Path) -> None:
    program = """
import multiprocessing, signal, sys
from pathlib import Path
from ict_fast.data.sources.folder_files import folder_source
from ict_fast.data.partial_store import PartialStore
from ict_fast.data.prepare import prepare_store

write = PartialStore.write
def write_and_look(self, piece):
    write(self, piece)
    for child in multiprocessing.active_children():
        status = Path(f"/proc/{child.pid}/status").read_text().splitlines()
        [blocked] = [int(line.split()[1], 16) for line in status if line.startswith("SigBlk:")]
        print(blocked >> (signal.SIGINT - 1) & 1)
PartialStore.write = write_and_look
source = folder_source(Path(sys.argv[1]), crop="center-crop", resolution=256, image_channels=3)
prepare_store(source, Path(sys.argv[2]), processes=2)
"""
    command = [sys.executable, "-c", program, str(images), str(tmp_path / "store")]
    run = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert set(run.stdout.split()) == {"1"}


def test_a_worker_that_dies_is_one_line_and_a_rerun_completes(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partial_module, "_PIECE_BYTES", SIDE * SIDE * 3)
    write = PartialStore.write

    def write_and_kill(self: PartialStore, piece: Piece) -> None:
        write(self, piece)
        for child in multiprocessing.active_children():
            child.kill()

    monkeypatch.setattr(PartialStore, "write", write_and_kill)
    with pytest.raises(
        InputError, match=r"a process that reads images has died.*; the same command continues"
    ):
        prepare_store(source(images), tmp_path / "a", processes=2)
    done = journalled(tmp_path / "a")
    assert done > 0
    monkeypatch.setattr(PartialStore, "write", write)
    out = prepare_store(source(images), tmp_path / "a", processes=1)
    assert content(out) == content(prepare_store(source(images), tmp_path / "b", processes=1))
    assert json.loads((out / "meta.json").read_text())["rejected"] == 1
