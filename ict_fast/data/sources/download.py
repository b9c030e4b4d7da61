"""Downloads CIFAR-10: continues what was begun, and puts a file in place only if it is the published one."""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import BinaryIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from ict_fast.data.sources.array_sources import CIFAR10_ARCHIVE, CIFAR10_MD5, md5_file
from ict_fast.durable import flush_directory
from ict_fast.errors import InputError
from ict_fast.locks import lock_file
from ict_fast.screen import say

CIFAR10_ADDRESS = f"https://www.cs.toronto.edu/~kriz/{CIFAR10_ARCHIVE}"

_BLOCK = 1 << 18  # bytes
_TIMEOUT = 60.0  # seconds without a byte
_LINE_INTERVAL = 10.0  # seconds between lines where there is no terminal
_MB = 1_000_000


def download_cifar10(
    folder: Path, *, address: str = CIFAR10_ADDRESS, md5: str = CIFAR10_MD5[CIFAR10_ARCHIVE]
) -> Path:
    """Downloads cifar-10-python.tar.gz; the same call again continues where an earlier one ended.

    What has come so far is kept beside as cifar-10-python.tar.gz.part. A file that is there already is
    checked, not downloaded again. Progress goes to standard error.

    Args:
        folder: where the file goes; created if need be.
        address: where it comes from; a mirror, for instance.
        md5: of the whole file, in hexadecimal.
    Returns:
        the path of the file, whose MD5 is right.
    Raises:
        InputError: `folder` is a file or named as an archive; no connection, or one that breaks; a full disk;
            another file than the published one.
    """
    if folder.is_file() or (not folder.is_dir() and folder.name.endswith((".gz", ".tgz", ".tar"))):
        raise InputError(
            f"PATH is {folder}; with --download it names the folder that {CIFAR10_ARCHIVE} comes into,"
            " without it that file"
        )
    final = folder / CIFAR10_ARCHIVE
    partial = folder / f"{CIFAR10_ARCHIVE}.part"
    created: list[Path] = []
    try:
        if final.exists():
            if md5_file(final) != md5:
                raise InputError(f"{final}: is not the published file (its MD5 is not {md5}); move it away")
            return final
        created = [each for each in (folder, *folder.parents) if not each.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with partial.open("ab") as file:
            _lock(file, partial)
            try:
                _fetch(address, file)
            except BaseException:
                if not file.tell():
                    partial.unlink()  # nothing has come
                raise
            file.flush()
            os.fsync(file.fileno())
            seen = md5_file(partial)
            if seen != md5:
                partial.unlink()  # or the next call would continue it
                raise InputError(
                    f"{address}: gave another file than the published one (MD5 {seen} instead of {md5});"
                    " it is deleted; try again, or get the file by hand"
                )
            os.replace(partial, final)
        flush_directory(folder)
    except BaseException as error:
        for each in created:
            with contextlib.suppress(OSError):  # something has come into it
                each.rmdir()
        if isinstance(error, OSError):
            raise InputError(f"{error.filename or partial}: {error.strerror or error}") from error
        raise
    return final


def _fetch(address: str, file: BinaryIO) -> None:
    """Appends to `file`, open for appending, what it lacks of what is at the address."""
    begun = file.tell()
    request = urllib.request.Request(address, headers={"Range": f"bytes={begun}-"} if begun else {})
    again = "; the same command continues the download"
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
            if begun and response.status != http.client.PARTIAL_CONTENT:  # it sends everything
                begun = 0
                file.truncate(0)
            length = response.headers.get("Content-Length")
            total = begun + int(length) if length else None
            _require_space(file, begun, total)
            done = begun
            with _progress(done, total) as progress:
                while block := response.read(_BLOCK):
                    file.write(block)
                    done += len(block)
                    progress(done)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            return  # nothing is lacking; if there is too much, the MD5 tells
        raise InputError(f"{address}: the server answers {error.code} {error.reason}; try later") from error
    except urllib.error.URLError as error:
        raise InputError(f"{address}: no connection ({_why(error.reason)}); is there a network?") from error
    except (http.client.HTTPException, ConnectionError, TimeoutError) as error:
        raise InputError(f"{address}: the connection broke ({_why(error)}){again}") from error
    if total is not None and done < total:
        raise InputError(
            f"{address}: the connection ended after {done / _MB:.1f} of {total / _MB:.1f} MB{again}"
        )


def _require_space(file: BinaryIO, begun: int, total: int | None) -> None:
    free = shutil.disk_usage(Path(file.name).parent).free
    if total is not None and free < total - begun:
        raise InputError(
            f"{file.name}: needs {(total - begun) / _MB:.1f} MB and the disk has {free / _MB:.1f} MB left"
        )


def _lock(file: BinaryIO, partial: Path) -> None:
    """Until the file is closed, or its process has died."""
    try:
        lock_file(file.fileno())  # where there are no locks, the MD5 tells what two have made
    except BlockingIOError:
        raise InputError(
            f"{partial}: another process is downloading it; wait until it has finished"
        ) from None


def _why(reason: object) -> str:
    return getattr(reason, "strerror", None) or str(reason) or type(reason).__name__


@contextlib.contextmanager
def _progress(begun: int, total: int | None) -> Iterator[Callable[[int], None]]:
    """To be called with the bytes there so far: a live line on a terminal, plain lines elsewhere."""
    console = Console(stderr=True)
    if console.is_terminal and not console.is_dumb_terminal:
        columns = (
            TextColumn(CIFAR10_ARCHIVE),
            BarColumn(bar_width=None),
            DownloadColumn(),
            TransferSpeedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, transient=True) as live:
            task = live.add_task("", total=total, completed=begun)
            yield lambda done: live.update(task, completed=done)
        return

    started = time.monotonic()
    last_line = started - _LINE_INTERVAL  # the first block is announced

    def line(done: int) -> None:
        nonlocal last_line
        now = time.monotonic()
        if now - last_line < _LINE_INTERVAL and done != total:
            return
        last_line = now
        rate = (done - begun) / max(now - started, 1e-3)
        of = "" if total is None else f" of {total / _MB:.1f}"
        eta = "" if total is None else f", ETA {timedelta(seconds=round((total - done) / rate))}"
        say(f"{CIFAR10_ARCHIVE}: {done / _MB:.1f}{of} MB, {rate / _MB:.1f} MB/s{eta}")

    yield line
