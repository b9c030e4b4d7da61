"""Turns a source of images into a store."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np

from ict_fast.data.partial_store import JOURNAL_NAME, PartialStore, kept_name, partial_store
from ict_fast.data.progress import ImageProgress
from ict_fast.data.reading import read_pieces
from ict_fast.data.sources.source import Source
from ict_fast.data.store import is_taken, open_store, place, write_store
from ict_fast.errors import InputError

DIGITS_FINGERPRINT = "d2565e4b836aebf8ef7a1c8b3d4a3f4db10d5723ecc72b26abe7b43d4682f51a"
"""Of the store that `prepare_digits` makes."""

# Beyond the share that is allowed, so many are still looked for: a person wants the list, not its first line.
_LISTED_AT_LEAST = 1000


def prepare_store(
    source: Source,
    out: Path,
    *,
    processes: int | None = None,
    max_rejected: float = 0.01,
    restart: bool = False,
) -> Path:
    """Reads a source with all cores into a store, which is there whole or not at all.

    A call that was stopped, by whatever, is continued by the next one with the same source; what was made of
    files that have changed since is made again. A finished store of the same source is verified and not
    rebuilt. Pixels do not gather in memory. Progress goes to standard error.

    Args:
        source: the images. It goes to processes that are spawned, so a script that calls this must do it
            under `if __name__ == "__main__"`.
        out: the folder to create; it must not exist, be empty, or hold the store of the same source.
        processes: that read and decode; by default one per usable core. 1: this process alone.
        max_rejected: share of the items that may be unusable. They are left out, and listed in rejected.txt.
        restart: delete what an earlier call has left unfinished.
    Returns:
        out.
    Raises:
        InputError: `out` holds something else or another process is writing it; what was begun is of another
            source or recipe; too many unusable items; the source or the disk failed. What is done is kept.
    """
    if is_taken(out):
        return _keep_finished(source, out)
    out = place(out)
    count = len(source.labels)
    with partial_store(out, source, restart=restart) as partial:
        allowed = max_rejected * count
        if len(partial.rejected) > allowed:
            partial.forget_rejected()
        missing = partial.missing()
        done = count - sum(stop - start for start, stop in missing)
        with (
            ImageProgress("preparing", count, done) as progress,
            closing(read_pieces(source, missing, processes)) as pieces,
        ):
            for piece in pieces:
                partial.write(piece)
                progress.advance(len(piece.pixels), len(piece.rejected))
                if len(partial.rejected) > max(allowed, _LISTED_AT_LEAST):
                    break
        if partial.rejected:
            _list_rejected(source, partial, allowed)
        partial.finish()
    return out


def prepare_digits(out: Path) -> Path:
    """The handwritten digits that come with scikit-learn: 1797 scans, 8x8, grey, ten classes.

    They need no download, so that every machine can train on real images.

    Args:
        out: the store's folder; a finished one is verified, not rebuilt.
    Returns:
        out.
    Raises:
        InputError: if `out` holds something else or cannot be written.
    """
    images, labels = load_digits()
    return write_store(
        out,
        images,
        labels,
        source="scikit-learn load_digits (UCI optical recognition of handwritten digits, test part)",
        recipe="8x8 grey, round(value * 255 / 16)",
        classes=[str(digit) for digit in range(10)],
    )


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """The 1,797 digits of scikit-learn as the project stores them.

    Returns:
        images (1797, 8, 8, 1) uint8, the 17 grey levels v mapped to round(255 v / 16); labels (1797,) int64.
    """
    from sklearn import datasets  # takes a second, and only this source needs it

    bundled = datasets.load_digits()
    images = np.rint(bundled.images * (255 / 16)).astype(np.uint8)[..., np.newaxis]
    return images, bundled.target.astype(np.int64)


def _keep_finished(source: Source, out: Path) -> Path:
    """Verifies the store at `out` and that it was made from this source."""
    if not (out / "meta.json").is_file():
        raise InputError(f"{out}: exists and is not a prepared store; name another --out")
    there = open_store(out, verify=True).meta
    ours = {
        "source": kept_name(source, there.get("rejected", 0)),
        "recipe": source.recipe,
        "classes": list(source.classes),
        "names, sizes, dates or labels of the files": source.identity(),
    }
    theirs = {**there, "names, sizes, dates or labels of the files": there.get("identity")}
    different = [name for name, value in ours.items() if theirs.get(name) != value]
    if different:
        raise InputError(f"{out}: holds another store (other {different[0]}); name another --out")
    (out / JOURNAL_NAME).unlink(missing_ok=True)  # of a process that died between its last two steps
    return out


def _list_rejected(source: Source, partial: PartialStore, allowed: float) -> None:
    """Writes rejected.txt; raises InputError if it has more lines than are allowed."""
    first, *others = sorted(partial.rejected)
    names = [source.item_name(index) for index in (first, *others)]
    path = partial.list_rejected(names)
    if len(names) > allowed:
        seen = len(source.labels) - sum(stop - start for start, stop in partial.missing())
        raise InputError(
            f"{len(names):,} of {seen:,} images cannot be used, such as {names[0]}"
            f" ({partial.rejected[first]}); {path} lists them; repair them in place (to remove"
            " one is to read again all behind it), or allow a larger share with --max-rejected"
        )
