"""How damaged archives make themselves known."""

from __future__ import annotations

import lzma
import struct
import zipfile
import zlib

DAMAGED_ZIP: tuple[type[Exception], ...] = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    LookupError,  # a member without a name, before Python 3.12
    OverflowError,  # places beyond what a file can have
    RuntimeError,  # NotImplementedError too: an unknown way of compressing
    ValueError,
)
"""What `zipfile` raises on a damaged archive beside OSError: whatever its parsers run into."""
