"""A checkpoint is whole or it is not there; what is altered is named; what is older steps in."""

import errno
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ict_fast import checkpoint as checkpoint_module
from ict_fast.checkpoint import (
    Checkpoint,
    checkpoint_steps,
    latest_checkpoint,
    mark_best,
    open_checkpoint,
    write_checkpoint,
)
from ict_fast.errors import InputError, TrainingError

GROUPS = ("weights", "ema", "optimizer")


def tensors_of(step: int, size: int = 100) -> dict[str, dict[str, torch.Tensor]]:
    """Groups whose values tell the step."""
    return {
        group: {"a": torch.full((size,), step + number / 4), "count": torch.tensor(step)}
        for number, group in enumerate(GROUPS)
    }


def write(run: Path, step: int, keep: int = 2, size: int = 100, loss: float = 0.1) -> Path:
    return write_checkpoint(run, step, tensors_of(step, size), {"step": step, "loss": loss}, keep=keep)


def assert_whole(checkpoint: Checkpoint | None, step: int, size: int = 100) -> None:
    assert checkpoint is not None
    assert (checkpoint.step, checkpoint.state) == (step, {"step": step, "loss": 0.1})
    for group, expected in tensors_of(step, size).items():
        found = checkpoint.tensors(group)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def fail_on_warning(message: str) -> None:
    pytest.fail(message)


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# -------------------------------------------------------------------------------- round trip


def test_tensors_and_state_come_back_as_they_were(tmp_path: Path) -> None:
    path = write(tmp_path, 1000)
    assert path == tmp_path / "checkpoints" / "step-00001000"
    assert {file.name for file in path.iterdir()} == {
        "weights.safetensors",
        "ema.safetensors",
        "optimizer.safetensors",
        "state.json",
        "MANIFEST.json",
    }
    assert_whole(open_checkpoint(path), 1000)
    assert_whole(open_checkpoint(tmp_path), 1000)
    assert_whole(latest_checkpoint(tmp_path, fail_on_warning), 1000)
    assert open_checkpoint(path).names == ("ema", "optimizer", "weights")


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last),
        torch.randn(6, 8).t(),
        torch.arange(12.0)[3:7],
        torch.tensor(3.5),
        torch.zeros(0, 3),
        torch.randn(5).to(torch.bfloat16),
        torch.tensor([2**62, -1]),
        torch.tensor([True, False]),
        torch.randn(3, dtype=torch.float64),
        torch.nn.Parameter(torch.randn(3)),
    ],
    ids=[
        "channels_last",
        "transposed",
        "view",
        "scalar",
        "empty",
        "bf16",
        "int64",
        "bool",
        "fp64",
        "parameter",
    ],
)
def test_any_layout_and_type_keeps_its_values(tmp_path: Path, tensor: torch.Tensor) -> None:
    path = write_checkpoint(tmp_path, 1, {"weights": {"x": tensor}}, {}, keep=2)
    found = open_checkpoint(path).tensors("weights")["x"]
    assert found.dtype == tensor.dtype
    assert found.shape == tensor.shape
    assert torch.equal(found, tensor.detach())


def test_tensors_that_share_memory_are_saved_each(tmp_path: Path) -> None:
    flat = torch.randn(10)
    shared = {"all": flat, "head": flat[:4], "again": flat}
    found = open_checkpoint(write_checkpoint(tmp_path, 1, {"weights": shared}, {}, keep=2)).tensors("weights")
    assert all(torch.equal(found[name], shared[name]) for name in shared)


def test_numbers_of_the_state_keep_every_bit(tmp_path: Path) -> None:
    state = {"x": 0.1 + 0.2, "tiny": 5e-324, "n": 2**63, "nested": {"list": [1, None, "é"]}}
    assert open_checkpoint(write_checkpoint(tmp_path, 1, {}, state, keep=2)).state == state


def test_equal_states_give_equal_bytes(tmp_path: Path) -> None:
    first = write(tmp_path / "a", 7)
    reordered = {name: dict(reversed(group.items())) for name, group in reversed(tensors_of(7).items())}
    second = write_checkpoint(tmp_path / "b", 7, reordered, {"loss": 0.1, "step": 7}, keep=2)
    assert content(first) == content(second)


def test_the_tensor_files_are_what_the_published_format_says(tmp_path: Path) -> None:
    file = write(tmp_path, 3) / "ema.safetensors"
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    start, end = header["a"]["data_offsets"]
    assert header["a"]["dtype"] == "F32"
    np.testing.assert_array_equal(np.frombuffer(data[start:end], "<f4"), np.full(100, 3.25))


# -------------------------------------------------------------------------------- keeping and replacing


def test_the_newest_are_kept_and_the_pointer_names_the_last(tmp_path: Path) -> None:
    for step in range(5):
        write(tmp_path, step * 100, keep=3)
    names = sorted(entry.name for entry in (tmp_path / "checkpoints").iterdir())
    assert names == ["latest", "step-00000200", "step-00000300", "step-00000400"]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000400\n"


def test_what_was_to_be_kept_for_ever_is_kept_whatever_is_asked_for_later(tmp_path: Path) -> None:
    def write_with(step: int, snapshot_every: int) -> None:
        state = {"config": {"logging": {"snapshot_every": snapshot_every}}}
        write_checkpoint(tmp_path, step, tensors_of(step), state, keep=2, snapshot_every=snapshot_every)

    for step in (10, 15, 20, 25, 30):
        write_with(step, 10)
    for step in (35, 40, 45, 50, 55):
        write_with(step, 40)
    for step in (60, 65):
        write_with(step, 0)
    assert sorted(checkpoint_steps(tmp_path)) == [10, 20, 30, 40, 60, 65]


def test_what_may_have_been_to_be_kept_for_ever_is_kept(tmp_path: Path) -> None:
    """Its state cannot be read: here a folder is in its place; of NFS, a stale handle."""
    for step in (10, 15, 20):
        write(tmp_path, step, keep=3)
    state = tmp_path / "checkpoints/step-00000010/state.json"
    state.unlink()
    state.mkdir()
    write(tmp_path, 25)
    assert sorted(checkpoint_steps(tmp_path)) == [10, 20, 25]


@pytest.mark.parametrize(
    "garbage", [None, b"", b"step-99999999\n", b"../../..", b"\xff\x00", b"step-00000100\n"]
)
def test_the_pointer_does_not_matter_for_reading(tmp_path: Path, garbage: bytes | None) -> None:
    write(tmp_path, 100)
    write(tmp_path, 200)
    pointer = tmp_path / "checkpoints" / "latest"
    pointer.unlink() if garbage is None else pointer.write_bytes(garbage)
    assert_whole(latest_checkpoint(tmp_path, fail_on_warning), 200)
    write(tmp_path, 300)
    assert pointer.read_text() == "step-00000300\n"


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    write(tmp_path, 99_999_999)
    write(tmp_path, 100_000_000)
    assert_whole(latest_checkpoint(tmp_path, fail_on_warning), 100_000_000)


def test_saving_the_same_state_again_leaves_the_files_alone(tmp_path: Path) -> None:
    path = write(tmp_path, 5)
    before = {file.name: file.stat().st_ino for file in path.iterdir()}
    write(tmp_path, 5)
    assert before == {file.name: file.stat().st_ino for file in path.iterdir()}


def test_a_broken_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    write(tmp_path, 4)
    (write(tmp_path, 5) / "ema.safetensors").unlink()
    assert_whole(open_checkpoint(write(tmp_path, 5)), 5)
    assert sorted(entry.name for entry in (tmp_path / "checkpoints").iterdir()) == [
        "latest",
        "step-00000004",
        "step-00000005",
    ]


def test_a_broken_later_checkpoint_does_not_push_out_whole_ones(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write(tmp_path, step, keep=3)
    (tmp_path / "checkpoints" / "step-00000003" / "state.json").write_text("{}")
    write(tmp_path, 2)  # as after falling back to step 2, with keep=2
    warnings: list[str] = []
    assert_whole(latest_checkpoint(tmp_path, warnings.append), 2)
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000002")
    assert_whole(latest_checkpoint(tmp_path, warnings.append), 1)


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    write(tmp_path, 1)
    left = tmp_path / "checkpoints" / ".tmp-step-00000002"
    left.mkdir()
    (left / "weights.safetensors").write_bytes(b"half")
    (tmp_path / "checkpoints" / ".tmp-latest").write_text("ste")
    assert_whole(latest_checkpoint(tmp_path, fail_on_warning), 1)
    write(tmp_path, 2)
    assert not list((tmp_path / "checkpoints").glob(".tmp-*"))


def test_files_put_beside_a_checkpoint_do_not_break_it(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    (path / "evaluation.json").write_text("{}")
    assert_whole(open_checkpoint(path), 1)
    moved = shutil.copytree(path, tmp_path / "published")
    assert_whole(open_checkpoint(moved), 1)


# -------------------------------------------------------------------------------- what must not be saved


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_state_that_is_not_finite_is_never_saved(tmp_path: Path, group: str, value: float) -> None:
    write(tmp_path, 1)
    before = content(tmp_path)
    tensors = tensors_of(2)
    tensors[group]["a"][17] = value
    with pytest.raises(TrainingError, match=f"{group}: a is not finite"):
        write_checkpoint(tmp_path, 2, tensors, {}, keep=2)
    with pytest.raises(TrainingError, match=r"state\.json"):
        write_checkpoint(tmp_path, 2, tensors_of(2), {"loss": [value]}, keep=2)
    assert content(tmp_path) == before


# -------------------------------------------------------------------------------- disk full


def test_too_little_space_is_noticed_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 1)
    before = content(tmp_path)
    size = sum(tensor.nbytes for group in tensors_of(2).values() for tensor in group.values())
    monkeypatch.setattr(checkpoint_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=size + 99))
    with pytest.raises(OSError, match="a checkpoint needs") as caught:
        write(tmp_path, 2)
    assert caught.value.errno == errno.ENOSPC
    assert content(tmp_path) == before
    with pytest.raises(OSError, match="a checkpoint needs"):
        write(tmp_path / "new", 1)
    assert not (tmp_path / "new").exists()


def test_what_a_killed_process_left_is_removed_before_the_disk_is_found_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 1)
    left = tmp_path / "checkpoints/.tmp-step-00000002"
    left.mkdir()
    monkeypatch.setattr(
        checkpoint_module.shutil,
        "disk_usage",
        lambda path: SimpleNamespace(free=0 if left.exists() else 1 << 40),
    )
    write(tmp_path, 3)
    assert_whole(open_checkpoint(tmp_path), 3)


def test_a_first_write_that_fails_leaves_an_empty_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "new", 1)
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize("call", range(1, 12))
def test_whichever_write_fails_the_old_checkpoint_stays(
    tmp_path: Path, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 1)
    flush, calls = os.fsync, 0

    def fail(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise OSError(errno.ENOSPC, "No space left on device")
        flush(descriptor)

    monkeypatch.setattr("os.fsync", fail)
    try:
        write(tmp_path, 2)
        failed = False
    except OSError as error:
        failed = error.errno == errno.ENOSPC
    monkeypatch.undo()
    # Five files, their folder and the two above it make a checkpoint; the pointer after them may fail.
    assert failed == (call <= 8)
    assert failed or (calls >= 9 and open_checkpoint(tmp_path).step == 2)
    assert not list((tmp_path / "checkpoints").glob(".tmp-*"))
    assert_whole(open_checkpoint(tmp_path / "checkpoints" / "step-00000001"), 1)
    assert latest_checkpoint(tmp_path, fail_on_warning) is not None
    write(tmp_path, 3)
    assert_whole(latest_checkpoint(tmp_path, fail_on_warning), 3)


def test_a_write_error_of_the_system_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, 1)
    before = content(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write(tmp_path, 2, size=100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert content(tmp_path) == before
    assert sorted(entry.name for entry in (tmp_path / "checkpoints").iterdir()) == ["latest", "step-00000001"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("a full disk needs the mount command")
    if done.returncode:
        pytest.skip(f"a full disk needs the right to mount a tmpfs: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("announced", [True, False], ids=["seen-beforehand", "hit-while-writing"])
def test_a_really_full_disk_leaves_the_old_checkpoint(
    small_disk: Path, announced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(small_disk, 1, size=50_000)  # 0.6 of 1 MiB
    before = content(small_disk)
    if not announced:  # as when another program fills the disk in between
        monkeypatch.setattr(
            checkpoint_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 40)
        )
    with pytest.raises(OSError) as caught:
        write(small_disk, 2, size=50_000)
    assert caught.value.errno == errno.ENOSPC
    assert content(small_disk) == before
    assert_whole(latest_checkpoint(small_disk, fail_on_warning), 1, size=50_000)
    write(small_disk, 3, size=1000)  # smaller, it fits: the failed one left nothing
    assert_whole(latest_checkpoint(small_disk, fail_on_warning), 3, size=1000)


# -------------------------------------------------------------------------------- kill -9

_KILLED_AT_EACH_FILE_OPERATION = """
import os, shutil, signal, sys
from pathlib import Path
import torch
from ict_fast.checkpoint import write_checkpoint
source, out, moment = Path(sys.argv[1]), Path(sys.argv[2]), 0
EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "shutil.rmtree")
while True:
    moment += 1
    run = out / str(moment)
    shutil.copytree(source, run)
    child = os.fork()
    if child == 0:
        left = moment
        def count(event, arguments):
            global left
            if event in EVENTS:
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(count)
        groups = ("weights", "ema", "optimizer")
        tensors = {
            group: {"a": torch.full((100,), 3 + number / 4), "count": torch.tensor(3)}
            for number, group in enumerate(groups)
        }
        write_checkpoint(run, 3, tensors, {"step": 3, "loss": 0.1}, keep=2)
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
print(moment)
"""


def test_a_kill_at_any_file_operation_leaves_a_whole_newest_checkpoint(tmp_path: Path) -> None:
    write(tmp_path / "source", 1)
    write(tmp_path / "source", 2)
    command = [sys.executable, "-c", _KILLED_AT_EACH_FILE_OPERATION, str(tmp_path / "source"), str(tmp_path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    moments = int(done.stdout)
    assert moments > 15  # or nothing was tried
    found = []
    for moment in range(1, moments + 1):
        run = tmp_path / str(moment)
        checkpoint = latest_checkpoint(run, fail_on_warning)  # nothing half-written is even met
        assert checkpoint is not None
        assert_whole(checkpoint, checkpoint.step)
        found.append(checkpoint.step)
        for path in (run / "checkpoints").glob("step-*"):
            assert_whole(open_checkpoint(path), int(path.name.removeprefix("step-")))
        write(run, 3)  # the rerun saves again, and clears up
        assert_whole(latest_checkpoint(run, fail_on_warning), 3)
        names = sorted(entry.name for entry in (run / "checkpoints").iterdir())
        assert names == ["latest", "step-00000002", "step-00000003"]
    assert found == sorted(found)  # the old one up to some moment, the new one from there on
    assert set(found) == {2, 3}


def test_a_kill_while_a_step_is_saved_again_costs_neither_what_was_there_nor_what_is_new(
    tmp_path: Path,
) -> None:
    write(tmp_path / "source", 2)
    write(tmp_path / "source", 3, loss=0.2)  # of other options, or made by another version
    command = [sys.executable, "-c", _KILLED_AT_EACH_FILE_OPERATION, str(tmp_path / "source"), str(tmp_path)]
    moments = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    found = []
    for moment in range(1, moments + 1):
        run = tmp_path / str(moment)
        checkpoint = latest_checkpoint(run, fail_on_warning)
        assert checkpoint is not None
        assert checkpoint.step == 3
        assert checkpoint.tensors("ema")["a"][0] == 3.25
        found.append(checkpoint.state["loss"])
        write(run, 4)
        assert sorted(entry.name for entry in (run / "checkpoints").iterdir()) == [
            "latest",
            "step-00000003",
            "step-00000004",
        ]
        assert open_checkpoint(run / "checkpoints/step-00000003").state["loss"] == found[-1]
    assert found == sorted(found, reverse=True)
    assert set(found) == {0.1, 0.2}


def test_a_rename_that_fails_leaves_the_checkpoint_of_the_same_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 3, loss=0.2)
    original, left = os.replace, iter((True, False, True))

    def replace(source: Path, target: Path) -> None:
        if not next(left):
            raise OSError(errno.ENOSPC, "No space left on device")
        original(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, 3)
    monkeypatch.undo()
    assert open_checkpoint(tmp_path / "checkpoints/step-00000003").state["loss"] == 0.2


_KILLED_AT_RANDOM = """
import itertools, os, random, signal, sys, time
from pathlib import Path
import torch
from ict_fast.checkpoint import latest_checkpoint, write_checkpoint
run, delays = Path(sys.argv[1]), random.Random(0)
def fail(message):
    raise SystemExit(message)
newest, attempts, scale = 0, 0, 1.0
while attempts < 12 or newest < 5:
    attempts += 1
    child = os.fork()
    if child == 0:
        for step in itertools.count(newest + 1):
            tensors = {"weights": {"a": torch.full((50_000,), float(step))}}
            write_checkpoint(run, step, tensors, {"step": step}, keep=2)
    time.sleep(delays.uniform(0.02, 0.15) * scale)
    scale *= 1.1  # on a slow disk too, some are written
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    checkpoint = latest_checkpoint(run, fail)
    if checkpoint is not None:
        assert checkpoint.step >= newest and checkpoint.state == {"step": checkpoint.step}
        assert (checkpoint.tensors("weights")["a"] == checkpoint.step).all()
        newest = checkpoint.step
print(newest)
"""


def test_kills_at_random_moments_never_cost_more_than_the_step_being_written(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _KILLED_AT_RANDOM, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0


# -------------------------------------------------------------------------------- damage


def _flip_byte(file: Path, position: int = -1) -> None:
    raw = bytearray(file.read_bytes())
    raw[position] ^= 1
    file.write_bytes(raw)


def _edit_manifest(path: Path, **changes: Any) -> None:
    manifest = json.loads((path / "MANIFEST.json").read_text())
    (path / "MANIFEST.json").write_text(json.dumps({**manifest, **changes}))


def _name_in_manifest(path: Path, name: str) -> None:
    manifest = json.loads((path / "MANIFEST.json").read_text())
    manifest["files"][name] = manifest["files"]["state.json"]
    (path / "MANIFEST.json").write_text(json.dumps(manifest))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (lambda p: (p / "weights.safetensors").unlink(), r"weights\.safetensors: missing"),
    "no state": (lambda p: (p / "state.json").unlink(), r"state\.json: missing"),
    "no manifest": (lambda p: (p / "MANIFEST.json").unlink(), r"MANIFEST\.json: missing"),
    "truncated": (lambda p: os.truncate(p / "ema.safetensors", 50), r"ema\.safetensors: truncated, 50 of"),
    "emptied": (lambda p: os.truncate(p / "state.json", 0), r"state\.json: truncated"),
    "too long": (lambda p: os.truncate(p / "ema.safetensors", 9999), r"ema\.safetensors: altered"),
    "a byte of the ema": (lambda p: _flip_byte(p / "ema.safetensors"), r"ema\.safetensors: altered"),
    "a byte of the optimizer": (
        lambda p: _flip_byte(p / "optimizer.safetensors", 9),
        r"optimizer.*: altered",
    ),
    "a byte of the state": (lambda p: _flip_byte(p / "state.json", 5), r"state\.json: altered"),
    "manifest cut": (
        lambda p: os.truncate(p / "MANIFEST.json", 60),
        r"MANIFEST\.json: altered, not readable",
    ),
    "manifest binary": (lambda p: (p / "MANIFEST.json").write_bytes(b"\xff\xfe"), r"MANIFEST\.json: altered"),
    "manifest nested": (lambda p: (p / "MANIFEST.json").write_text("[" * 10**6), r"MANIFEST\.json: altered"),
    "manifest a list": (lambda p: (p / "MANIFEST.json").write_text("[]"), r"MANIFEST\.json: altered"),
    "a pickle": (lambda p: (p / "MANIFEST.json").write_bytes(pickle.dumps(1)), r"MANIFEST\.json: altered"),
    "another program's": (lambda p: _edit_manifest(p, format="x"), r"MANIFEST\.json: not written by"),
    "another step": (lambda p: _edit_manifest(p, step=3), r"MANIFEST\.json: altered, it says step 3"),
    "step a text": (lambda p: _edit_manifest(p, step="2"), r"MANIFEST\.json: altered"),
    "no files": (lambda p: _edit_manifest(p, files={}), r"MANIFEST\.json: altered"),
    "an entry of no sense": (
        lambda p: _edit_manifest(p, files={"state.json": {"bytes": "1"}}),
        r"MANIFEST\.json: altered at state\.json",
    ),
    "a path upwards": (lambda p: _name_in_manifest(p, "../../secret"), r"refused, .*'\.\./\.\./secret'"),
    "dots": (lambda p: _name_in_manifest(p, ".."), r"refused, .*'\.\.'"),
    "an absolute path": (lambda p: _name_in_manifest(p, "/etc/passwd"), r"refused, .*'/etc/passwd'"),
    "a newline": (lambda p: _name_in_manifest(p, "a\nb"), r"refused"),
    "a folder as file": (
        lambda p: [(p / "state.json").unlink(), (p / "state.json").mkdir()],
        r"state\.json: missing",
    ),
    "a pipe as file": (
        lambda p: [(p / "ema.safetensors").unlink(), os.mkfifo(p / "ema.safetensors")],
        r"ema\.safetensors: missing",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_and_the_previous_checkpoint_steps_in(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, 1)
    newest = write(tmp_path, 2)
    break_it, message = DAMAGE[damage]
    break_it(newest)

    with pytest.raises(InputError, match=message) as caught:
        open_checkpoint(newest)
    assert "\n" not in str(caught.value)

    warnings: list[str] = []
    assert_whole(latest_checkpoint(tmp_path, warnings.append), 1)
    assert len(warnings) == 1
    assert str(newest) in warnings[0]
    assert_whole(open_checkpoint(tmp_path), 1)
    assert str(newest) in capsys.readouterr().err


def test_a_newest_checkpoint_that_may_be_whole_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 1)
    newest = write(tmp_path, 2)

    def stale(file: Path) -> str:
        raise OSError(errno.ESTALE, "Stale file handle")

    with monkeypatch.context() as patch:  # as of NFS: no word on what the file holds
        patch.setattr(checkpoint_module, "sha256_file", stale)
        with pytest.raises(InputError, match=r"-00000002/.*: cannot be read: Stale file handle; moved else"):
            latest_checkpoint(tmp_path, fail_on_warning)
    _edit_manifest(newest, version=2)
    with pytest.raises(InputError, match=r"-00000002/MANIFEST\.json: format version 2; this ict-fast reads"):
        open_checkpoint(tmp_path)
    newest.rename(tmp_path / "elsewhere")
    assert_whole(latest_checkpoint(tmp_path, fail_on_warning), 1)


def test_a_run_of_broken_checkpoints_alone_is_not_taken_for_a_new_one(tmp_path: Path) -> None:
    for step in (1, 2):
        _flip_byte(write(tmp_path, step) / "ema.safetensors")
    warnings: list[str] = []
    with pytest.raises(InputError, match="none of the 2 checkpoints is whole"):
        latest_checkpoint(tmp_path, warnings.append)
    assert len(warnings) == 2


def test_a_run_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "nowhere", fail_on_warning) is None
    (tmp_path / "checkpoints").mkdir()
    assert latest_checkpoint(tmp_path, fail_on_warning) is None
    with pytest.raises(InputError, match="has no checkpoint"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("file", "source"), [("model.safetensors", "safetensors"), ("model_index.json", "diffusers")]
)
def test_an_exported_model_is_to_be_imported_first(tmp_path: Path, file: str, source: str) -> None:
    (tmp_path / "config.json").touch()
    (tmp_path / file).touch()
    with pytest.raises(InputError, match=f"`ict-fast import {source} {tmp_path} --out DIR`"):
        open_checkpoint(tmp_path)


def test_a_path_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        open_checkpoint(tmp_path / "nowhere")
    file = write(tmp_path, 1) / "weights.safetensors"
    with pytest.raises(InputError, match="is a file"):
        open_checkpoint(file)


def test_a_group_that_is_not_there_names_the_nearest(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write(tmp_path, 1))
    with pytest.raises(InputError, match=r'no weight\.safetensors; did you mean "weights"'):
        checkpoint.tensors("weight")


def test_a_checkpoint_deleted_after_opening_is_an_input_error(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write(tmp_path, 1))
    shutil.rmtree(checkpoint.path)
    with pytest.raises(InputError, match=r"weights\.safetensors: cannot be read"):
        checkpoint.tensors("weights")


def test_a_tensor_file_of_another_format_with_a_right_hash_is_an_input_error(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    (path / "ema.safetensors").write_bytes(pickle.dumps({"a": 1}))
    entry = checkpoint_module._write(path / "ema.safetensors", (path / "ema.safetensors").read_bytes())
    manifest = json.loads((path / "MANIFEST.json").read_text())
    _edit_manifest(path, files={**manifest["files"], "ema.safetensors": entry})
    with pytest.raises(InputError, match=r"ema\.safetensors: cannot be read"):
        open_checkpoint(path).tensors("ema")


def test_loaded_tensors_outlive_the_files(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write(tmp_path, 1))
    tensors = checkpoint.tensors("weights")
    shutil.rmtree(checkpoint.path)
    assert torch.equal(tensors["a"], torch.full((100,), 1.0))
    tensors["a"].add_(1)


def test_the_best_one_is_kept_until_there_is_a_better_one_and_is_found_by_its_pointer(tmp_path: Path) -> None:
    for step, best in ((1, False), (2, True), (3, False), (4, False), (5, True), (6, False), (7, False)):
        write_checkpoint(tmp_path, step, tensors_of(step), {"step": step}, keep=2, best=best)
        found = open_checkpoint(tmp_path / "checkpoints" / "latest")
        assert found.step == step
        if step == 4:
            assert sorted(checkpoint_steps(tmp_path)) == [2, 3, 4]
            assert open_checkpoint(tmp_path / "checkpoints" / "best").step == 2
    assert sorted(checkpoint_steps(tmp_path)) == [5, 6, 7]


@pytest.mark.parametrize("content", [b"../../elsewhere", b"", b"step-1/../..", b"\xff\xfe"])
def test_a_pointer_that_was_altered_is_refused_and_keeps_nothing_from_working(
    tmp_path: Path, content: bytes
) -> None:
    write(tmp_path, 1)
    pointer = tmp_path / "checkpoints" / "best"
    pointer.write_bytes(content)
    with pytest.raises(InputError, match=r"checkpoints/best: (altered|cannot be read)"):
        open_checkpoint(pointer)
    for step in (2, 3):
        write(tmp_path, step)
    assert open_checkpoint(tmp_path).step == 3
    assert sorted(checkpoint_steps(tmp_path)) == [1, 2, 3], "any of them may be the best"
    mark_best(tmp_path, 3, keep=2, snapshot_every=0)
    assert sorted(checkpoint_steps(tmp_path)) == [2, 3]
