"""A `lowvram` command in a process of its own, and what happens to it while it runs."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

COUNT, FAIL_ONCE, FAIL_ON, KILL = range(4)
HANGS_AFTER_SECONDS = 120


class Failure(Exception):
    """A trial did not end as it has to."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """Of a process: its exit code, or minus its signal, and what it said."""

    code: int
    said: str
    calls: int
    seconds: float


class Disk:
    """chaos_disk.c, which has been loaded before libc."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL(None)
        self.library.chaos_calls.restype = ctypes.c_long
        self.library.chaos_arm.argtypes = (
            ctypes.c_char_p,
            ctypes.c_long,
            ctypes.c_int,
            ctypes.c_int,
        )

    def arm(self, directory: str, at: int = 0, how: int = COUNT, number: int = 0) -> None:
        self.library.chaos_arm(directory.encode(), at, how, number)

    @property
    def calls(self) -> int:
        return int(self.library.chaos_calls())


@dataclass(frozen=True, kw_only=True)
class Strike:
    """What happens to a command: nothing, unless something is given."""

    at: int = 0
    how: int = COUNT
    error: str = "ENOSPC"
    kill_after: float | None = None
    """Seconds."""
    file_bytes: int | None = None
    """The largest file that it may write."""
    fill_after: float | None = None
    """Seconds after which the file system is filled to its end."""

    def __str__(self) -> str:
        kind = ("nothing", "fails once", "fails from there on", "is the last")[self.how]
        what = f"call {self.at} {kind} ({self.error})" if self.how != COUNT else ""
        other = {
            "killed after": self.kill_after,
            "files up to": self.file_bytes,
            "full after": self.fill_after,
        }
        return what + ", ".join(
            f"{name} {value}" for name, value in other.items() if value is not None
        )


NOTHING = Strike()


def command(home: Path, *arguments: str, strike: Strike = NOTHING) -> Ended:
    """`lowvram ARGUMENTS` in a new process, whose cache and temporary files are in `home`."""
    home.mkdir(parents=True, exist_ok=True)
    (home / "tmp").mkdir(exist_ok=True)
    said, counted = (Path(f"{home}-{name}") for name in ("said", "calls"))
    counted.unlink(missing_ok=True)
    said.write_text("")  # a child may be killed before its first line
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        _be_command(home, arguments, strike, said, counted)
    status = _wait(child, home, strike, started)
    code = os.waitstatus_to_exitcode(status)
    calls = int(counted.read_text()) if counted.exists() and counted.read_text() else 0
    text = said.read_text(encoding="utf-8", errors="replace")
    return Ended(code=code, said=text, calls=calls, seconds=time.monotonic() - started)


def _be_command(
    home: Path, arguments: Sequence[str], strike: Strike, said: Path, counted: Path
) -> None:
    """The child; it does not return."""
    code = 70
    try:
        output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(output, stream)
        os.environ |= {"LOWVRAM_CACHE": str(home / "cache"), "TMPDIR": str(home / "tmp")}
        tempfile.tempdir = None
        if strike.file_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (strike.file_bytes, resource.RLIM_INFINITY))
        disk = Disk()
        disk.arm(f"{home}/", strike.at, strike.how, getattr(errno, strike.error))
        try:
            from lowvram.cli import main

            main(list(arguments), prog_name="lowvram")
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        except BaseException:
            traceback.print_exc()
        calls = disk.calls
        disk.arm("")
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        counted.write_text(str(calls))
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _wait(child: int, home: Path, strike: Strike, started: float) -> int:
    """The status of the child, to which its strike is done while it runs."""
    filled = False
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return status
        now = time.monotonic() - started
        if strike.kill_after is not None and now >= strike.kill_after:
            os.kill(child, signal.SIGKILL)
        if strike.fill_after is not None and now >= strike.fill_after and not filled:
            filled = True
            _fill(home)
        if now > HANGS_AFTER_SECONDS:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise Failure(f"hangs: not done after {HANGS_AFTER_SECONDS} s")
        time.sleep(0.001)


def _fill(home: Path) -> None:
    with (home / "filler").open("wb", buffering=0) as file:
        try:
            while file.write(bytes(1 << 12)):
                pass
        except OSError:
            return
