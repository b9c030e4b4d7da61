"""SIGTERM ends a command that keeps what it has done as Ctrl-C does, but for the exit code."""

from __future__ import annotations

import signal
import threading

import pytest

from ict_fast.interruption import Interrupted, interruptible


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_both_signals_unwind_what_is_inside_and_say_what_was_kept(
    ctrl_c: None, number: signal.Signals, code: int
) -> None:
    done = []

    @interruptible(lambda: f"kept: {done}")
    def work() -> None:
        try:
            signal.raise_signal(number)
            done.append("too much")
        finally:
            done.append("cleared up")

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted) as raised:
        work()
    assert (str(raised.value), raised.value.exit_code) == ("interrupted; kept: ['cleared up']", code)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_the_second_of_two_signals_does_not_disturb_the_clearing_up(
    ctrl_c: None, first: signal.Signals, second: signal.Signals
) -> None:
    done = []

    @interruptible("the same command continues")
    def work() -> None:
        try:
            signal.raise_signal(first)
        finally:
            signal.raise_signal(second)
            done.append("cleared up")

    with pytest.raises(Interrupted) as raised:
        work()
    assert done == ["cleared up"]
    assert raised.value.exit_code == 128 + first


def test_a_sigterm_that_a_library_has_swallowed_can_be_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([0.0, 2.0])
    monkeypatch.setattr("ict_fast.interruption.time.monotonic", lambda: next(seconds))

    @interruptible("the same command continues")
    def work() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted):
        work()


def test_another_thread_leaves_the_signals_to_whoever_has_started_it() -> None:
    done = []

    @interruptible("the same command continues")
    def work() -> None:
        done.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [signal.getsignal(signal.SIGTERM)]
