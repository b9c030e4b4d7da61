"""Names come back from the table as from a list."""

import pickle

import pytest

from ict_fast.data.sources.name_table import NameTable

NAMES = ["a/b.jpg", "", "ü/雪.png", "not utf-8 \udcff", "line\nbreak", "z"]


def test_a_table_is_the_list_that_it_was_made_of() -> None:
    table = pickle.loads(pickle.dumps(NameTable(iter(NAMES))))
    assert list(table) == NAMES
    assert len(table) == 6
    assert [table[index] for index in range(-6, 6)] == NAMES * 2
    assert table[1:5:2] == NAMES[1:5:2]
    assert "z" in table
    assert list(NameTable([])) == []
    with pytest.raises(IndexError):
        table[6]


def test_a_table_takes_little_more_than_its_characters() -> None:
    names = [f"n01440764/n01440764_{number}.JPEG" for number in range(10_000)]
    characters = sum(map(len, names))
    assert len(pickle.dumps(NameTable(names))) < characters + 8 * len(names) + 1000


def test_names_need_not_be_ones_of_the_locale(monkeypatch: pytest.MonkeyPatch) -> None:
    def fsencode(name: str) -> bytes:  # of Python without UTF-8 mode where LC_ALL=C
        return name.encode("ascii", "surrogateescape")

    monkeypatch.setattr("os.fsencode", fsencode)
    names = [*NAMES, "as listed there \udcc3\udca9"]  # two bytes that would be a letter elsewhere
    assert list(NameTable(names)) == names
