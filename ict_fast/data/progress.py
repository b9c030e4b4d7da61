"""How far the preparation of a data set is: one live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from types import TracebackType
from typing import TypeVar

from ict_fast.screen import LINE_INTERVAL, live_bar, say

Item = TypeVar("Item")


class ImageProgress:
    """Counts images, on standard error.

    Args:
        doing: what is done to them, one word.
        total: number of images.
        done: of them, before this process began: they count for the bar and not for the rate.
    """

    def __init__(self, doing: str, total: int, done: int = 0) -> None:
        self._doing, self._total, self._first, self._done = doing, total, done, done
        self._rejected = 0
        self._started = self._last_line = time.monotonic()
        self._live = live_bar(doing)
        if self._live is not None:
            self._task = self._live.add_task("", total=total, completed=done, status="starting")

    def __enter__(self) -> ImageProgress:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def advance(self, images: int, rejected: int = 0) -> None:
        """So many more images are done, and so many of them were rejected."""
        self._done += images
        self._rejected += rejected
        now = time.monotonic()
        rate = (self._done - self._first) / max(now - self._started, 1e-9)
        remaining = timedelta(seconds=round((self._total - self._done) / rate))
        status = f"{rate:,.0f} images/s, ETA {remaining}"
        if self._rejected:
            status += f", {self._rejected:,} rejected"
        if self._live is not None:
            self._live.update(self._task, completed=self._done, status=status)
        elif now - self._last_line >= LINE_INTERVAL or self._done == self._total:
            self._last_line = now
            percent = 100 * self._done // self._total
            say(f"{self._doing} {self._done:,}/{self._total:,} ({percent} %): {status}")


def narrated(items: Iterable[Item], describe: Callable[[Item], str]) -> Iterator[Item]:
    """Passes the items on; when that takes long, says where it is, at most every ten seconds."""
    last_line = time.monotonic()
    for item in items:
        if time.monotonic() - last_line >= LINE_INTERVAL:
            last_line = time.monotonic()
            say(describe(item))
        yield item
