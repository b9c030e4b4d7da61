"""Images in a ZIP, read in place; and ZIPs that mean harm."""

from __future__ import annotations

import hashlib
import os
import stat
import zipfile
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from ict_fast.data.sources.damage import DAMAGED_ZIP
from ict_fast.data.sources.image_decoding import MAX_ENCODED_BYTES, RejectedImage
from ict_fast.data.sources.name_table import NameTable
from ict_fast.errors import InputError


@dataclass(frozen=True)
class ZipFiles:
    """Members of a ZIP, stored or deflated; `EncodedFiles`. zipfile itself takes 650 MB in every worker."""

    archive: Path
    names: NameTable
    headers: np.ndarray
    """int64 (N,), of the members' local headers in the archive, in bytes."""
    sizes: np.ndarray
    """int64 (N,), bytes."""
    packed: np.ndarray
    """int64 (N,), bytes that a deflated member takes; 0 for a stored one."""
    checksums: np.ndarray
    """uint32 (N,), CRC-32 of the members' content."""
    modified: int
    """The archive's date of change, in nanoseconds."""

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        """The member's name."""
        return self.names[index]

    def stamp(self, start: int, stop: int) -> str:
        """As `EncodedFiles.stamp`."""
        digest = hashlib.sha256(repr((self.modified, *self.names[start:stop])).encode())
        for column in (self.headers, self.sizes, self.packed, self.checksums):
            digest.update(column[start:stop].tobytes())
        return digest.hexdigest()

    def read(self, index: int) -> bytes:
        """As `EncodedFiles.read`."""
        size, packed, start = (int(column[index]) for column in (self.sizes, self.packed, self.headers))
        if size > MAX_ENCODED_BYTES:
            raise RejectedImage(f"a file of {size} bytes, more than {MAX_ENCODED_BYTES}")
        with self.archive.open("rb", buffering=0) as file:
            header = os.pread(file.fileno(), 30, start)
            # The local header repeats the name, and may have another extra field than the directory's.
            lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
            content = os.pread(file.fileno(), packed or size, start + 30 + lengths)
        if packed:
            with suppress(zlib.error):  # then its checksum is wrong
                content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, size + 1)
        if header[:4] != b"PK\x03\x04" or zlib.crc32(content) != self.checksums[index]:
            raise RejectedImage("damaged: not what the archive's checksum says")
        return content


def zip_members(opened: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    r"""What an archive lists; names that a program of Windows wrote as `cat\1.png` are `cat/1.png` here.

    `opened` still reads them.
    """
    members = opened.infolist()
    for member in members:
        member.filename = member.filename.replace("\\", "/")
    return members


def is_zip(archive: Path) -> bool:
    """Whether a file begins as a ZIP does, and can be read."""
    with suppress(OSError), archive.open("rb") as file:
        return file.read(2) == b"PK"
    return False


def checked_members(archive: Path) -> tuple[list[zipfile.ZipInfo], int]:
    """The members of a ZIP, folders included, and its date of change in nanoseconds.

    Raises:
        InputError: as `check_members`; a damaged archive.
        OSError: it cannot be read.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            members, status = zip_members(opened), archive.stat()
        check_members(archive, members, status.st_size)
    except DAMAGED_ZIP as error:
        raise InputError(f"{archive}: not a whole ZIP ({error}); get it again") from error
    return members, status.st_mtime_ns


def zip_files(archive: Path, members: Sequence[zipfile.ZipInfo], modified: int) -> ZipFiles:
    """Those members of an archive, in that order; `check_members` has let them pass.

    Raises:
        InputError: a member that is neither stored nor deflated.
    """
    for member in members:
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise InputError(f"{archive}: {member.filename} is neither stored nor deflated; pack it as usual")
    packed = [0 if each.compress_type == zipfile.ZIP_STORED else each.compress_size for each in members]
    return ZipFiles(
        archive,
        NameTable(member.filename for member in members),
        np.array([member.header_offset for member in members], np.int64),
        np.array([member.file_size for member in members], np.int64),
        np.array(packed, np.int64),
        np.array([member.CRC for member in members], np.uint32),
        modified,
    )


def check_members(archive: Path, members: Sequence[zipfile.ZipInfo], archive_bytes: int) -> None:
    """Refuses an archive with a member that could mean harm, or that cannot be read.

    Raises:
        InputError: a link, an absolute name, `..`, a name that comes twice; encryption; an end beyond the
            archive's.
    """
    seen: set[str] = set()
    for member in members:
        path = PurePosixPath(member.filename)
        if path.is_absolute() or ".." in path.parts:
            raise InputError(f"{archive}: member {member.filename!r} leads elsewhere; it is refused")
        if stat.S_ISLNK(member.external_attr >> 16):
            raise InputError(f"{archive}: member {member.filename!r} is a link; it is refused")
        if str(path) in seen:
            raise InputError(f"{archive}: has the member {member.filename} twice; it is refused")
        seen.add(str(path))
        if member.flag_bits & 1:
            raise InputError(f"{archive}: member {member.filename} is encrypted")
        if not 0 <= member.header_offset <= archive_bytes - member.compress_size:
            raise InputError(
                f"{archive}: member {member.filename} lies beyond the archive's end; get it again"
            )
