"""One writer at a time, also where several machines share a file system."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import uuid
from contextlib import suppress
from pathlib import Path

from ict_fast.errors import InputError

NO_LOCKS = frozenset((errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP))
"""Of a file system without locks: Lustre without `-o flock`, NFS without its lock service, some FUSE. Any
other error is one."""

_TRIES = 100


class BusyError(InputError):
    """Another process has it; it may be free later."""


def lock_file(descriptor: int) -> bool:
    """Locks an open file until it is closed, at the process's death at the latest.

    Args:
        descriptor: of a regular file that is open for writing: NFS locks nothing else.
    Returns:
        False if the file system has no locks.
    Raises:
        BlockingIOError: another process has the lock.
        OSError: any other reason.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return False
    return True


class WriterLock:
    """Keeps every other process out of a folder from now on until `release`.

    The file `<folder>.lock` is locked, and says who holds it. Where the file system has no locks, the file
    itself is the lock: it is created by one process only, and one of a dead process of this machine counts
    for nothing.

    Args:
        folder: to be written; need not exist.
    Raises:
        BusyError: another process has it.
        OSError: the file cannot be created.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._path = folder, folder.with_name(f"{folder.name}.lock")
        self._ours = f"process {os.getpid()} on {socket.gethostname()} {uuid.uuid4().hex}".encode()
        self._descriptor, is_new = _open(self._path)
        try:
            holder = os.pread(self._descriptor, 512, 0).decode(errors="replace").rpartition(" ")[0]
            remedy = ""
            try:
                is_ours = lock_file(self._descriptor) or is_new or _is_dead(holder)
                remedy = f", or, if it has died, remove {self._path} (this file system has no locks)"
            except BlockingIOError:
                is_ours = False
            if not is_ours:
                raise BusyError(
                    f"{folder}: another process is writing it ({holder or 'unknown'}); wait until it has"
                    f" finished{remedy}"
                )
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, self._ours, 0)
            if not self.is_held():  # its owner has removed it between our opening and our locking it
                raise BusyError(f"{folder}: another process has just written it; run the same command again")
        except BaseException:
            self.release()
            raise

    def is_held(self) -> bool:
        """Whether nobody has taken the lock away, as by removing its file."""
        try:  # without opening it: to close it again would, with locks of POSIX, give up the lock
            is_there = os.path.samestat(self._path.stat(), os.fstat(self._descriptor))
            return is_there and os.pread(self._descriptor, 512, 0) == self._ours
        except OSError:
            return False

    def require(self) -> None:
        """Raises InputError unless `is_held`: what another process may write must not be mixed in."""
        if not self.is_held():
            raise InputError(
                f"{self._folder}: {self._path.name} is no longer this process's, which stops lest two write;"
                " when no other does, the same command continues"
            )

    def release(self) -> None:
        """Lets others in."""
        if self.is_held():
            with suppress(OSError):
                self._path.unlink()
        os.close(self._descriptor)


def _open(path: Path) -> tuple[int, bool]:
    """Opens a file for reading and writing; says whether this call has created it."""
    for _ in range(_TRIES):  # others may create and remove it in between
        with suppress(FileExistsError):
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), True
        with suppress(FileNotFoundError):
            return os.open(path, os.O_RDWR), False
    raise FileNotFoundError(errno.ENOENT, "is there and cannot be opened", str(path))  # a dangling link


def _is_dead(holder: str) -> bool:
    """Whether `holder` was a process of this machine that is no more."""
    number, _, host = holder.removeprefix("process ").partition(" on ")
    return host == socket.gethostname() and number.isdigit() and not Path(f"/proc/{number}").exists()
