"""What a person sees while a data set is prepared, by a clock that the tests turn."""

import pytest

from ict_fast.data import progress as progress_module
from ict_fast.data.progress import ImageProgress, narrated


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress_module, "time", clock)
    return clock


def test_off_a_terminal_a_line_is_printed_every_ten_seconds_and_at_the_end(clock: Clock, capsys) -> None:
    with ImageProgress("preparing", 1_281_167, 1_167) as progress:
        for _ in range(12):
            clock.now += 1
            progress.advance(1000, 1)
        clock.now += 1
        progress.advance(1_268_000)
    assert capsys.readouterr().err.splitlines() == [
        # 1,270,000 images are left, at 1,000 a second.
        "preparing 11,167/1,281,167 (0 %): 1,000 images/s, ETA 0:21:10, 10 rejected",
        "preparing 1,281,167/1,281,167 (100 %): 98,462 images/s, ETA 0:00:00, 12 rejected",
    ]


def test_on_a_terminal_there_is_one_live_line(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with ImageProgress("preparing", 200) as progress:
        progress.advance(100, 3)
    shown = capsys.readouterr().err
    assert "100/200" in shown
    assert "3 rejected" in shown
    assert "100/200 (50 %)" not in shown


def test_a_long_list_says_where_it_is_every_ten_seconds(clock: Clock, capsys) -> None:
    seen = []
    for item in narrated(range(25), lambda item: f"item {item}"):
        seen.append(item)
        clock.now += 1
    assert seen == list(range(25))
    assert capsys.readouterr().err.splitlines() == ["item 10", "item 20"]
