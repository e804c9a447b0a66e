"""Ctrl-C and its kin: in order where there is state to save, at once elsewhere."""

from __future__ import annotations

import signal
import threading

import pytest

from lowvram import interrupts as module
from lowvram.interrupts import GRACE_SECONDS, Interrupts, interrupts

NAMES = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@pytest.mark.parametrize("name", NAMES)
def test_the_first_is_remembered_and_the_second_stops(name: str) -> None:
    number = getattr(signal, name)
    before = signal.getsignal(number)
    with interrupts() as taken, taken.patient():
        assert not taken.asked
        signal.raise_signal(number)
        assert taken.asked
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("name", NAMES)
def test_where_nothing_is_to_be_saved_the_first_stops(name: str) -> None:
    with interrupts(), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(getattr(signal, name))


def test_a_step_is_waited_for_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """Saving has to be done within the 30 s that machines which are taken away give."""
    assert GRACE_SECONDS <= 15
    now = 100.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    taken = Interrupts()
    with taken.patient():
        taken.take(signal.SIGTERM, None)
        assert (taken.asked, taken.urgent) == (True, False)
        now += GRACE_SECONDS + 0.1
        assert taken.urgent


@pytest.mark.skipif("SIGHUP" not in NAMES, reason="a signal of POSIX")
def test_nohup_is_respected() -> None:
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interrupts() as taken, taken.patient():
            signal.raise_signal(signal.SIGHUP)
            assert not taken.asked
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_other_threads_leave_signals_alone() -> None:
    before = signal.getsignal(signal.SIGINT)
    found = []

    def enter() -> None:
        with interrupts() as taken:
            found.append((taken.asked, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [(False, before)]
