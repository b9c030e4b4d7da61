"""Runs that start together in a fresh folder share the digits that one of them prepares."""

import threading
from dataclasses import replace
from pathlib import Path

import pytest

from ict_fast import presets
from ict_fast.data.store import open_store
from ict_fast.errors import InputError
from ict_fast.locks import WriterLock
from ict_fast.training import run_data
from ict_fast.training.run_data import prepare_if_bundled

DIGITS = presets.get("digits")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()


def test_a_run_waits_for_the_process_that_prepares_its_data(capsys: pytest.CaptureFixture[str]) -> None:
    other = WriterLock(Path("data/.digits.partial"))
    threading.Timer(0.5, other.release).start()
    prepare_if_bundled(DIGITS)
    assert open_store(Path(DIGITS.data.path)).num_images == 1797
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "data/.digits.partial: another process is writing it" in said


def test_a_process_that_does_not_end_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_data, "_PATIENCE", 0.2)
    other = WriterLock(Path("data/.digits.partial"))
    with pytest.raises(InputError, match="another process is writing it"):
        prepare_if_bundled(DIGITS)
    other.release()


def test_other_data_is_left_to_the_person() -> None:
    prepare_if_bundled(replace(DIGITS, data=replace(DIGITS.data, path="data/mine")))
    assert list(Path("data").iterdir()) == []
