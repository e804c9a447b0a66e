"""Ctrl-C, SIGTERM and a terminal that is closed: stop in order, or at once when asked again."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")
GRACE_SECONDS = 10.0
"""For the step under way. Machines that are taken away give notice of half a minute, and saving
needs the rest of it."""


class Interrupts:
    """A first signal asks for a stop where there is state to save, and stops at once elsewhere.

    A second one stops at once, by KeyboardInterrupt: what is being written is then left out, what
    was there before stays.
    """

    def __init__(self) -> None:
        self.asked_at: float | None = None
        self._patient = False

    @contextmanager
    def patient(self) -> Iterator[None]:
        """Inside, the first signal is only remembered: who runs has to look at `asked`."""
        self._patient = True
        try:
            yield
        finally:
            self._patient = False

    @property
    def asked(self) -> bool:
        return self.asked_at is not None

    @property
    def urgent(self) -> bool:
        """Whether the time for the step under way is over."""
        return self.asked_at is not None and time.monotonic() - self.asked_at > GRACE_SECONDS

    def check(self) -> None:
        """Where the first signal stops at once, and was lost: Python drops what is raised while an
        object is being deleted."""
        if self.asked and not self._patient:
            raise KeyboardInterrupt

    def take(self, number: int, frame: FrameType | None) -> None:
        first, self.asked_at = not self.asked, self.asked_at or time.monotonic()
        if not (first and self._patient):
            raise KeyboardInterrupt


@contextmanager
def interrupts() -> Iterator[Interrupts]:
    """Signals are taken for as long as the context lasts, in the main thread.

    In others they belong to whoever started it. A signal that is ignored, as SIGHUP under nohup,
    stays ignored.
    """
    taken, previous = Interrupts(), {}
    for number in (getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)):
        if signal.getsignal(number) is signal.SIG_IGN:
            continue
        try:
            previous[number] = signal.signal(number, taken.take)
        except ValueError:  # not in the main thread
            break
    try:
        yield taken
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
