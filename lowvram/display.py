"""What a run shows while it goes: one live bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from lowvram.terminal import printable

_PLAIN_WIDTH = 120
_PLAIN_SECONDS = 10.0  # without a terminal, a line at most this often

Update = Callable[[int, int | None, str], None]
"""(completed, total or None, what to say)."""


def literal(text: str) -> Text:
    """For a cell or a line: text of data or recipes, in which rich reads no markup or emoji."""
    return Text(printable(text))


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Nobody reads on: rich would end the process here, before a run can save its state."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


class Display:
    """Writes to `console`; with `quiet`, only results and warnings."""

    def __init__(self, console: Console | None = None, *, quiet: bool = False) -> None:
        self.console = console or _Console(highlight=False, soft_wrap=True)
        if console is None and not self.console.is_terminal:
            self.console.width = _PLAIN_WIDTH  # a file has no edge to fold paths at
        self.quiet = quiet

    def say(self, text: str) -> None:
        """A line about what is done; text from data or recipes is shown as it is."""
        if not self.quiet:
            self.console.print(literal(text), highlight=False)

    def warn(self, text: str) -> None:
        self.console.print(Text("note:", "yellow") + literal(f" {text}"), highlight=False)

    def show(self, table: Table) -> None:
        self.console.print(table)

    @contextmanager
    def progress(self, title: str, *, every_seconds: float = _PLAIN_SECONDS) -> Iterator[Update]:
        """A bar for as long as the context lasts; the yielded function moves it."""
        if self.quiet:
            yield lambda completed, total, text: None
        elif self.console.is_terminal:
            yield from self._bar(title)
        else:
            yield self._lines(title, every_seconds)

    def _bar(self, title: str) -> Iterator[Update]:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=8),
            TextColumn("{task.fields[text]}", markup=False),
        )
        with Progress(*columns, console=self.console, transient=True) as bar:
            task = bar.add_task(printable(title), total=None, text="")

            def update(completed: int, total: int | None, text: str) -> None:
                share = f"{completed}/{total}" if total else f"{completed}"
                said = printable(f"{share} {text}".rstrip())
                bar.update(task, completed=completed, total=total, text=said)

            yield update

    def _lines(self, title: str, every_seconds: float) -> Update:
        last = time.monotonic()

        def update(completed: int, total: int | None, text: str) -> None:
            nonlocal last
            now = time.monotonic()
            finished = total is not None and completed >= total and completed > 0
            if now - last >= every_seconds or finished:
                last = now
                share = f"{completed}/{total}" if total else str(completed)
                self.console.print(literal(f"{title} {share}  {text}".rstrip()), highlight=False)

        return update


def format_seconds(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
