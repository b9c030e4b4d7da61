"""A source becomes a store: the same bytes whoever reads, whatever interrupts, and nothing half-written."""

import errno
import fcntl
import multiprocessing
import os
import resource
import shutil
import struct
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import ict_fast
from ict_fast.data import partial_store as partial_module
from ict_fast.data import prepare as prepare_module
from ict_fast.data import reading
from ict_fast.data.prepare import prepare_store
from ict_fast.data.sources.folder_files import folder_source
from ict_fast.data.sources.image_source import ImageSource
from ict_fast.data.store import open_store
from ict_fast.errors import InputError
from ict_fast.locks import BusyError

REPOSITORY = Path(ict_fast.__file__).parents[1]
COUNT = 100
FILES = ("images.npy", "labels.npy", "meta.json")


def item(index: int) -> np.ndarray:
    """uint8 (4, 4, 3), another one for every index."""
    return np.random.default_rng(index).integers(0, 256, (4, 4, 3), dtype=np.uint8)


@dataclass
class Numbers:
    """A source that keeps account of what is read of it."""

    bad: dict[int, str] = field(default_factory=dict)
    count: int = COUNT
    version: str = "1"
    changed: dict[int, str] = field(default_factory=dict)
    """Dates of items that are not those of their files' making."""
    reads: list[int] = field(default_factory=list)
    name: str = "numbers"
    recipe: str = "4x4 RGB, random"
    classes: tuple[str, ...] = ("even", "odd")
    resolution: int = 4
    image_channels: int = 3

    @property
    def labels(self) -> np.ndarray:
        return np.arange(self.count) % 2

    def identity(self) -> str:
        return f"{self.version} {self.count} {self.changed}"

    def stamp(self, start: int, stop: int) -> str:
        return f"{self.version} {[self.changed.get(index) for index in range(start, stop)]}"

    def item_name(self, index: int) -> str:
        return f"item {index}"

    def read(self, start: int, stop: int, remarks: object = None) -> tuple[np.ndarray, dict[int, str]]:
        self.reads += range(start, stop)
        pixels = np.stack([item(index) for index in range(start, stop)])
        return pixels, {index: why for index, why in self.bad.items() if start <= index < stop}


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partial_module, "_PIECE_BYTES", 8 * 48)  # eight items


def prepare(source: Numbers, out: Path, max_rejected: float = 0.05) -> Path:
    return prepare_store(source, out, processes=1, max_rejected=max_rejected)


def content(store: Path) -> dict[str, bytes]:
    return {name: (store / name).read_bytes() for name in FILES}


def partial_of(out: Path) -> Path:
    return out.parent / f".{out.name}.partial"


# ----------------------------------------------------------------------------- what is written


def test_every_item_is_in_its_place_with_its_label(tmp_path: Path) -> None:
    store = open_store(prepare(Numbers(), tmp_path / "new/a"))
    np.testing.assert_array_equal(store.images, np.stack([item(index) for index in range(COUNT)]))
    np.testing.assert_array_equal(store.labels, np.arange(COUNT) % 2)
    assert store.meta["source"] == "numbers"
    assert store.meta["recipe"] == "4x4 RGB, random"
    assert store.meta["classes"] == ["even", "odd"]
    assert store.meta["rejected"] == 0
    assert sorted(path.name for path in store.path.iterdir()) == sorted(FILES)
    assert list(store.path.parent.iterdir()) == [store.path]


@pytest.mark.parametrize("bad", [[0], [99], [7, 8], [0, 1, 50, 98, 99], list(range(8, 13))])
def test_rejected_items_leave_no_gap_and_are_listed(tmp_path: Path, bad: list[int]) -> None:
    reasons = {index: f"because of\n{index}" for index in bad}
    store = open_store(prepare(Numbers(reasons), tmp_path / "a"))
    kept = [index for index in range(COUNT) if index not in bad]
    np.testing.assert_array_equal(store.images, np.stack([item(index) for index in kept]))
    np.testing.assert_array_equal(store.labels, np.array(kept) % 2)
    assert store.meta["rejected"] == len(bad)
    assert store.meta["source"] == f"numbers, without {len(bad)} of 100 images"
    listed = (store.path / "rejected.txt").read_text().splitlines()
    assert listed == [f"item {index}\tbecause of\\n{index}" for index in bad]


def test_the_store_is_what_numpy_would_have_saved(tmp_path: Path) -> None:
    store = prepare(Numbers({3: "bad"}), tmp_path / "a")
    np.save(tmp_path / "expected.npy", np.stack([item(index) for index in range(COUNT) if index != 3]))
    assert (store / "images.npy").read_bytes() == (tmp_path / "expected.npy").read_bytes()


def test_many_processes_give_the_same_store_as_one(tmp_path: Path) -> None:
    for index in range(40):
        (tmp_path / f"images/{index % 3}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(item(index)).save(tmp_path / f"images/{index % 3}/{index:02d}.png")
    (tmp_path / "images/0/bad.png").write_text("bad")
    source = folder_source(tmp_path / "images", crop="none", resolution=4, image_channels=3)
    stores = [
        content(prepare_store(source, tmp_path / str(number), processes=number, max_rejected=0.03))
        for number in (1, 3)
    ]
    assert stores[0] == stores[1]
    images = open_store(tmp_path / "3").images
    names = [source.item_name(index) for index in range(len(source.labels)) if index != 14]
    assert source.item_name(14) == "0/bad.png"
    np.testing.assert_array_equal(images, np.stack([item(int(name[2:4])) for name in names]))


@dataclass
class Bulky(Numbers):
    """Its names take more than a pipe holds: whoever sends it waits for its reader."""

    names: bytes = bytes(2**20)


def test_processes_start_all_at_once_however_large_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads stand in for them; none reads before all have started."""
    all_started = threading.Barrier(3)

    def serve(connection: Connection) -> None:
        all_started.wait(timeout=10)
        reading._serve(connection)
        connection.close()

    def start() -> tuple[Connection, SimpleNamespace]:
        ours, theirs = multiprocessing.Pipe()
        thread = threading.Thread(target=serve, args=(theirs,), daemon=True)
        thread.start()
        return ours, SimpleNamespace(kill=ours.close, join=thread.join)

    monkeypatch.setattr(reading, "_start_worker", start)
    pieces = [(start, start + 8) for start in range(0, 96, 8)]
    read = list(reading.read_pieces(Bulky(), pieces, 3))
    assert sorted((piece.start, piece.stop) for piece in read) == pieces
    for piece in read:
        np.testing.assert_array_equal(piece.pixels, [item(index) for index in range(piece.start, piece.stop)])


def test_a_process_whose_parent_dies_within_a_message_just_ends() -> None:
    ours, theirs = multiprocessing.Pipe()
    os.write(ours.fileno(), struct.pack("!i", 100) + b"the first of a hundred bytes")
    ours.close()
    reading._serve(theirs)


def test_reading_processes_import_no_torch() -> None:
    program = "import sys, ict_fast.data.prepare, ict_fast.data.sources; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False, cwd=REPOSITORY).returncode == 0


def test_memory_does_not_grow_with_the_number_of_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Blank(Numbers):
        def read(self, start: int, stop: int, remarks: object = None) -> tuple[np.ndarray, dict[int, str]]:
            return np.zeros((stop - start, 64, 64, 3), np.uint8), {start: "bad"}

    monkeypatch.setattr(partial_module, "_PIECE_BYTES", 2**19)
    peaks = []
    for count in (400, 4000):  # 5 MB, 49 MB
        tracemalloc.start()
        prepare(Blank(count=count, resolution=64), tmp_path / str(count))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert 2**19 < peaks[1] < peaks[0] + 2**19


# ----------------------------------------------------------------------------- bad items


def test_too_many_rejected_items_fail_with_the_list_and_keep_the_work(tmp_path: Path) -> None:
    out, source = tmp_path / "a", Numbers({index: f"reason {index}" for index in range(0, 12, 2)})
    with pytest.raises(InputError) as caught:
        prepare(source, out)
    listed = partial_of(out) / "rejected.txt"
    assert str(caught.value) == (
        f"6 of 100 images cannot be used, such as item 0 (reason 0); {listed} lists them; repair them in"
        " place (to remove one is to read again all behind it), or allow a larger share with --max-rejected"
    )
    assert len(listed.read_text().splitlines()) == 6
    assert not out.exists()
    source.reads.clear()
    assert open_store(prepare(source, out, max_rejected=0.06)).num_images == 94
    assert source.reads == []


def test_what_was_repaired_is_read_again(tmp_path: Path) -> None:
    out, source = tmp_path / "a", Numbers(dict.fromkeys(range(8, 16), "no permission"))
    with pytest.raises(InputError, match="8 of 100 images cannot be used"):
        prepare(source, out)
    source.bad.clear()
    source.reads.clear()
    store = open_store(prepare(source, out))
    assert source.reads == list(range(8, 16))
    assert store.num_images == COUNT
    assert not (out / "rejected.txt").exists()


def test_a_repaired_file_is_read_again_with_its_piece_only(tmp_path: Path, capsys) -> None:
    out, source = tmp_path / "a", Numbers(dict.fromkeys(range(8, 16), "cut short"))
    with pytest.raises(InputError, match="8 of 100 images cannot be used"):
        prepare(source, out)
    repaired = Numbers(dict.fromkeys(range(9, 12), "cut short"), changed={8: "today", 15: "today"})
    capsys.readouterr()
    prepare(repaired, out)
    assert repaired.reads == list(range(8, 16))
    said = f"{partial_of(out)}: 1 of 13 pieces were made from files that have changed; they are read again"
    assert capsys.readouterr().err.splitlines()[0] == said
    assert content(out) == content(prepare(repaired, tmp_path / "b"))


def test_a_removed_file_costs_what_lies_behind_it_and_no_more(tmp_path: Path) -> None:
    root = tmp_path / "images"
    root.mkdir()
    for index in range(40):
        Image.fromarray(item(index)).save(root / f"{index:02d}.png")
    (root / "20.png").write_text("bad")

    def images() -> ImageSource:
        return folder_source(root, crop="none", resolution=4, image_channels=3)

    with pytest.raises(InputError, match="1 of 40 images cannot be used"):
        prepare_store(images(), tmp_path / "a", processes=1)
    (root / "20.png").unlink()
    read: list[int] = []

    class Watched(ImageSource):
        def read(self, start: int, stop: int, remarks: object = None) -> tuple[np.ndarray, dict[int, str]]:
            read.extend(range(start, stop))
            return super().read(start, stop, remarks)

    prepare_store(Watched(**vars(images())), tmp_path / "a", processes=1)
    assert read == list(range(16, 39))
    assert content(tmp_path / "a") == content(prepare_store(images(), tmp_path / "b", processes=1))


def test_a_hopeless_source_is_given_up_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "_LISTED_AT_LEAST", 20)
    source = Numbers(dict.fromkeys(range(COUNT), "bad"))
    with pytest.raises(InputError, match="24 of 24 images cannot be used"):
        prepare(source, tmp_path / "a")
    assert len(source.reads) == 24


def test_a_class_that_loses_all_its_images_is_refused(tmp_path: Path) -> None:
    source = Numbers(dict.fromkeys(range(1, COUNT, 2), "bad"))
    with pytest.raises(InputError, match=r"every image of class odd was rejected; see .*rejected\.txt"):
        prepare(source, tmp_path / "a", max_rejected=1.0)
    source.bad.pop(1)
    assert open_store(prepare(source, tmp_path / "a", max_rejected=1.0)).num_images == 51


# ----------------------------------------------------------------------------- again


def test_a_finished_store_is_verified_and_neither_read_nor_rebuilt(tmp_path: Path) -> None:
    out = prepare(Numbers({4: "bad"}), tmp_path / "a")
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in out.iterdir()}
    again = Numbers({4: "bad"})
    assert prepare(again, out) == out
    assert again.reads == []
    assert before == {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in out.iterdir()}
    with (out / "images.npy").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"?")
    with pytest.raises(InputError, match=r"images\.npy: altered"):
        prepare(again, out)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"recipe": "another"}, "recipe"),
        ({"name": "letters"}, "source"),
        ({"classes": ("odd", "even")}, "classes"),
        ({"version": "2"}, "names, sizes, dates or labels of the files"),
    ],
)
def test_another_store_in_the_same_place_is_refused(tmp_path: Path, change: dict, named: str) -> None:
    out = prepare(Numbers(), tmp_path / "a")
    before = content(out)
    with pytest.raises(InputError, match=rf"holds another store \(other {named}\)"):
        prepare(Numbers(**change), out)
    assert content(out) == before


def test_a_folder_of_other_things_and_a_mount_point_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="exists and is not a prepared store"):
        prepare(Numbers(), tmp_path / "other")
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "disk")
    source = Numbers()
    with pytest.raises(InputError, match=r"disk: is a mount point.*name a folder in it"):
        prepare(source, tmp_path / "disk")
    assert source.reads == []


def test_the_current_folder_is_not_said_to_be_written_by_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"^\.: a store is renamed to its place.*name a folder in it"):
        prepare(Numbers(), Path())


def test_a_link_to_an_empty_folder_is_followed(tmp_path: Path) -> None:
    (tmp_path / "large disk").mkdir()
    (tmp_path / "a").symlink_to("large disk")
    prepare(Numbers(), tmp_path / "a")
    assert open_store(tmp_path / "large disk").num_images == COUNT
    assert (tmp_path / "a").is_symlink()


class Disturbed(Numbers):
    """Something happens when it comes to item 40."""

    happens: Callable[[], object]

    def read(self, start: int, stop: int, remarks: object = None) -> tuple[np.ndarray, dict[int, str]]:
        if start == 40:
            self.happens()
        return super().read(start, stop, remarks)


def no_locks(descriptor: int, operation: int) -> None:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


@pytest.mark.parametrize("has_locks", [True, False])
def test_two_writers_do_not_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_locks: bool) -> None:
    if not has_locks:
        monkeypatch.setattr(fcntl, "flock", no_locks)

    def second() -> None:
        with pytest.raises(BusyError, match="another process is writing it"):
            prepare(Numbers(), tmp_path / "a")

    source = Disturbed()
    source.happens = second
    prepare(source, tmp_path / "a")
    assert content(tmp_path / "a") == content(prepare(Numbers(), tmp_path / "b"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_writer_that_was_robbed_of_its_folder_stops(tmp_path: Path) -> None:
    def rob() -> None:  # as a person who takes it for left over
        (tmp_path / ".a.partial.lock").unlink()
        shutil.rmtree(partial_of(tmp_path / "a"))
        prepare(Numbers(version="2"), tmp_path / "a")

    source = Disturbed()
    source.happens = rob
    with pytest.raises(InputError, match=r"\.a\.partial\.lock is no longer this process's, which stops"):
        prepare(source, tmp_path / "a")
    assert open_store(tmp_path / "a", verify=True).meta["identity"] == "2 100 {}"


@pytest.mark.parametrize("damage", [b"", b"?" * 48 * 8])
def test_pieces_that_were_altered_after_they_were_written_are_not_taken(
    tmp_path: Path, damage: bytes
) -> None:
    def alter() -> None:
        with (partial_of(tmp_path / "a") / "images.npy").open("r+b") as file:
            file.seek(128 + 16 * 48)
            file.write(damage)
            file.truncate()

    source = Disturbed(count=48)
    source.happens = alter
    with pytest.raises(InputError, match=r"images\.npy: altered by another process; the same command reads"):
        prepare(source, tmp_path / "a")
    source = Numbers(count=48)
    prepare(source, tmp_path / "a")
    assert source.reads == [*range(16, 40)]
    assert content(tmp_path / "a") == content(prepare(Numbers(count=48), tmp_path / "b"))


# ----------------------------------------------------------------------------- interrupted


class Stopped(Numbers):
    """Fails when it comes to item 40."""

    error: BaseException = OSError(errno.EIO, "Input/output error")

    def read(self, start: int, stop: int, remarks: object = None) -> tuple[np.ndarray, dict[int, str]]:
        if start == 40:
            raise self.error
        return super().read(start, stop, remarks)


def test_a_rerun_reads_only_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"numbers: cannot be read: .*Input/output error; .*continues"):
        prepare(Stopped({3: "bad"}), tmp_path / "a")
    assert not (tmp_path / "a").exists()
    source = Numbers({3: "bad"})
    prepare(source, tmp_path / "a")
    assert source.reads == list(range(40, COUNT))
    assert content(tmp_path / "a") == content(prepare(Numbers({3: "bad"}), tmp_path / "b"))


def interrupted(out: Path) -> Path:
    """The folder of a preparation that was stopped at item 40."""
    with pytest.raises(InputError):
        prepare(Stopped(), out)
    return partial_of(out)


def test_what_no_longer_matches_its_checksum_is_read_again(tmp_path: Path) -> None:
    with (interrupted(tmp_path / "a") / "images.npy").open("r+b") as file:
        file.seek(128 + 20 * 48)
        file.write(b"??")
    source = Numbers()
    prepare(source, tmp_path / "a")
    assert source.reads == [*range(16, 24), *range(40, COUNT)]
    assert content(tmp_path / "a") == content(prepare(Numbers(), tmp_path / "b"))


@pytest.mark.parametrize("tail", [b'{"start": 40, "stop"', b"\0" * 100, b"\xff\xfe\n", b"5\n{}\n"])
def test_a_journal_that_was_cut_short_or_altered_counts_as_far_as_it_goes(
    tmp_path: Path, tail: bytes
) -> None:
    with (interrupted(tmp_path / "a") / "journal.jsonl").open("ab") as file:
        file.write(tail)
    source = Numbers()
    prepare(source, tmp_path / "a")
    assert source.reads == list(range(40, COUNT))
    assert content(tmp_path / "a") == content(prepare(Numbers(), tmp_path / "b"))


@pytest.mark.parametrize("head", [b"", b"not JSON", b'{"recipe": "other"}\n', b"\xff\xfe"])
def test_work_without_pieces_in_its_journal_is_begun_anew(tmp_path: Path, head: bytes) -> None:
    (interrupted(tmp_path / "a") / "journal.jsonl").write_bytes(head)
    source = Numbers()
    prepare(source, tmp_path / "a")
    assert source.reads == list(range(COUNT))
    assert content(tmp_path / "a") == content(prepare(Numbers(), tmp_path / "b"))


def test_work_on_files_that_have_all_changed_is_done_again(tmp_path: Path, capsys) -> None:
    interrupted(tmp_path / "a")
    source = Numbers(version="2")
    prepare(source, tmp_path / "a")
    assert source.reads == list(range(COUNT))
    assert "5 of 5 pieces were made from files that have changed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"recipe": "4x4 RGB, other"}, r'recipe \("4x4 RGB, random", now "4x4 RGB, other"\)'),
        ({"recipe": "8x8 RGB", "resolution": 8}, r'recipe \("4x4 RGB, random", now "8x8 RGB"\)'),
        ({"name": "letters", "version": "2"}, r'source \("numbers", now "letters"\)'),
    ],
)
def test_work_with_other_options_is_kept_until_the_person_says_otherwise(
    tmp_path: Path, change: dict, named: str
) -> None:
    interrupted(tmp_path / "a")
    source = Numbers(**change)
    with pytest.raises(InputError, match=f"5 pieces were made with another {named}; .* --restart, which del"):
        prepare(source, tmp_path / "a")
    assert source.reads == []
    prepare(right := Numbers(), tmp_path / "a")
    assert right.reads == list(range(40, COUNT))
    if source.resolution == 4:
        interrupted(tmp_path / "b")
        prepare_store(source, tmp_path / "b", processes=1, restart=True)
        assert source.reads == list(range(COUNT))
        assert content(tmp_path / "b") == content(prepare(Numbers(**change), tmp_path / "c"))


def test_a_disk_too_small_is_noticed_before_anything_is_read_or_left_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = interrupted(tmp_path / "b") / "images.npy"
    begun = images.read_bytes()
    monkeypatch.setattr(partial_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    source = Numbers()
    with pytest.raises(InputError, match=r"needs 4\.93e-06 GB and the disk has 1e-07 GB left"):
        prepare(source, tmp_path / "a")
    assert source.reads == []
    assert list(tmp_path.iterdir()) == [images.parent]
    monkeypatch.setattr(partial_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=-(10**6)))
    with pytest.raises(InputError, match="and the disk has"):
        prepare(source, tmp_path / "b")
    assert images.read_bytes() == begun, "what an earlier one has made stays"


def test_a_disk_that_fills_up_is_one_line_and_a_rerun_completes(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (128 + 50 * 48, limits[1])
    )  # the kernel writes the 50th in part
    try:
        with pytest.raises(InputError, match=r"cannot be written: File too large; .*continues") as caught:
            prepare(Numbers(), tmp_path / "a")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "a").exists()
    source = Numbers()
    prepare(source, tmp_path / "a")
    assert source.reads == list(range(48, COUNT))
    assert content(tmp_path / "a") == content(prepare(Numbers(), tmp_path / "b"))


def test_pieces_of_another_pillow_are_not_mixed_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(tmp_path / "a")
    monkeypatch.setattr(partial_module.metadata, "version", lambda package: f"another {package}")
    with pytest.raises(InputError, match=r'another version of Pillow \(".*", now "another pillow"\)'):
        prepare(Numbers(), tmp_path / "a")
    prepare_store(Numbers(), tmp_path / "a", processes=1, restart=True)
    assert open_store(tmp_path / "a").meta["pillow"] == "another pillow"


def test_want_of_memory_is_one_line_and_no_bad_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(
        self: Numbers, start: int, stop: int, remarks: object = None
    ) -> tuple[np.ndarray, dict[int, str]]:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Numbers, "read", read)
        with pytest.raises(
            InputError, match=r"out of memory; the same command continues, and a smaller --processes"
        ):
            prepare(Numbers(), tmp_path / "a")
    prepare(Numbers(), tmp_path / "a")
    assert open_store(tmp_path / "a").num_images == COUNT
