"""A large store is read once in the order of its file, where that helps."""

from pathlib import Path

import pytest

from ict_fast.data import page_cache
from ict_fast.data.page_cache import read_ahead
from ict_fast.data.store import Store


def bytes_read() -> int:
    """By this process so far, from files in memory too."""
    counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counts["rchar"])


def test_a_store_is_read_whole_in_the_background(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_cache, "HASH_ALWAYS_BELOW", 0)
    monkeypatch.setattr(page_cache, "_BLOCK", 100)
    monkeypatch.setattr(page_cache, "available_memory", lambda: store.images.nbytes)
    before = bytes_read()
    reader = read_ahead(store)
    assert reader is not None
    assert reader.daemon  # the end of the program does not wait for it
    reader.join()
    assert bytes_read() - before >= store.meta["files"]["images.npy"]["bytes"]


def test_it_is_not_read_where_that_is_in_vain(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_ahead(store) is None  # small: opening it has read it
    monkeypatch.setattr(page_cache, "HASH_ALWAYS_BELOW", 0)
    for available in (None, store.images.nbytes - 1):
        monkeypatch.setattr(page_cache, "available_memory", lambda available=available: available)
        assert read_ahead(store) is None
    monkeypatch.undo()
    monkeypatch.setattr(page_cache, "HASH_ALWAYS_BELOW", 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert read_ahead(store) is None


def test_a_store_that_has_gone_ends_the_reading_and_nothing_else(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_cache, "HASH_ALWAYS_BELOW", 0)
    (store.path / "images.npy").unlink()
    reader = read_ahead(store)
    assert reader is not None
    reader.join()
