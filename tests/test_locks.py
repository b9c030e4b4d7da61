"""A folder has one writer, on file systems of every kind; the other is told who it is."""

import errno
import fcntl
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ict_fast.locks import BusyError, WriterLock

NO_LOCKS = [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP]


def failing(number: int) -> Callable[[int, int], None]:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    return flock


def like_nfs(descriptor: int, operation: int) -> None:
    """Linux turns flock on NFS into a lock of a range of bytes, for which a file must be open for writing."""
    if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    fcntl.lockf(descriptor, operation)


def elsewhere(folder: Path) -> str:
    """What another process on this file system says when it wants the folder."""
    program = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
import fcntl, test_locks
fcntl.flock = test_locks.like_nfs
try:
    test_locks.WriterLock(Path({str(folder)!r})).release()
except test_locks.BusyError as busy:
    print(busy)
"""
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=Path.cwd()
    ).stdout


def test_the_lock_holds_where_locks_need_a_writable_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", like_nfs)
    lock = WriterLock(tmp_path / "work")
    said = elsewhere(tmp_path / "work")
    assert f"another process is writing it (process {os.getpid()} on {socket.gethostname()})" in said
    assert "remove" not in said
    assert lock.is_held()
    lock.release()
    assert elsewhere(tmp_path / "work") == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", NO_LOCKS)
def test_without_locks_the_file_is_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(number))
    lock = WriterLock(tmp_path / "work")
    with pytest.raises(BusyError, match=r"if it has died, remove .*/work\.lock \(this file system has no"):
        WriterLock(tmp_path / "work")
    lock.release()
    WriterLock(tmp_path / "work").release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("holder", "is_free"),
    [
        ("process {dead} on {here} 0a1b", True),
        ("process {alive} on {here} 0a1b", False),
        ("process {dead} on another-{here} 0a1b", False),
        ("", False),
        ("process x", False),
    ],
)
def test_without_locks_only_a_dead_process_of_this_machine_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, holder: str, is_free: bool
) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(errno.ENOLCK))
    with subprocess.Popen(["true"]) as ended:
        pass
    words = holder.format(dead=ended.pid, alive=os.getpid(), here=socket.gethostname())
    (tmp_path / "work.lock").write_text(words)
    if is_free:
        WriterLock(tmp_path / "work").release()
    else:
        with pytest.raises(BusyError):
            WriterLock(tmp_path / "work")
        assert (tmp_path / "work.lock").read_text() == words


def test_an_error_that_is_no_want_of_locks_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        WriterLock(tmp_path / "work")


def test_a_dangling_link_is_an_error_and_no_endless_loop(tmp_path: Path) -> None:
    (tmp_path / "work.lock").symlink_to("nowhere")
    with pytest.raises(OSError, match="is there and cannot be opened"):
        WriterLock(tmp_path / "work")


def test_what_a_killed_process_left_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "work.lock").write_text("process 1 on another machine")
    lock = WriterLock(tmp_path / "work")
    assert lock.is_held()
    (tmp_path / "work.lock").write_text("process 2 on another machine")
    assert not lock.is_held()
    lock.release()
    assert (tmp_path / "work.lock").exists()  # it is not ours


def test_a_lock_on_a_file_that_its_owner_has_just_removed_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work.lock").touch()
    flock = fcntl.flock

    def late(descriptor: int, operation: int) -> None:
        (tmp_path / "work.lock").unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(BusyError, match="has just written it; run the same command again"):
        WriterLock(tmp_path / "work")
