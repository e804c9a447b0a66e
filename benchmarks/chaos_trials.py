"""Kinds of trials: each torments one command, and ends with a run that has come through."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from chaos_command import FAIL_ON, FAIL_ONCE, KILL, NOTHING, Ended, Failure, Strike, command
from chaos_place import (
    SCENARIOS,
    Place,
    Reference,
    check_said,
    check_visible,
    compare,
    end_of,
    flags_asked_for,
    sha256,
)

ERRNOS = ("ENOSPC", "EIO", "EROFS", "EDQUOT", "EMFILE", "ESTALE")
MOST_KILLS = 4


@dataclass(kw_only=True)
class Trial:
    place: Place
    home: Path
    scenario: str
    kills: int = 0
    faults: int = 0
    said: list[str] = field(default_factory=list)

    @property
    def reference(self) -> Reference:
        return self.place.references[self.scenario]

    @property
    def run(self) -> Path:
        return self.home / "run"

    def start(self, flags: Sequence[str] = (), strike: Strike = NOTHING) -> Ended:
        recipe = str(self.place.recipe(self.scenario))
        arguments = ("run", recipe, "--quiet", "--set", f"output_dir={self.run}", *flags)
        return self.told(command(self.home, *arguments, strike=strike), strike, flags)

    def told(self, ended: Ended, strike: Strike, flags: Sequence[str]) -> Ended:
        self.said.append(
            f"{' '.join(flags)} [{strike}] -> {ended.code}: {ended.said.strip()[-500:]}"
        )
        check_said(ended)
        self.kills += ended.code == -signal.SIGKILL
        return ended

    def under(self, strikes: Sequence[Strike]) -> None:
        """A run that is struck again and again, then left in peace."""
        flags: list[str] = []
        for strike in strikes:
            ended = self.start(flags, strike)
            if asked := flags_asked_for(ended):
                ended = self.start(flags := asked, strike)
            if "--overwrite" in flags:
                flags = []
            check_visible(self.run, self.reference)
            if ended.code == 0:
                break
        self.in_peace(flags)

    def in_peace(self, flags: Sequence[str] = ()) -> None:
        if (self.run / "result.json").exists():
            compare(end_of(self.run), self.reference.end)
            return
        for _ in range(3):
            ended = self.start(flags)
            if ended.code == 0:
                break
            flags = flags_asked_for(ended)
            if not flags:
                raise Failure(f"cannot be gone on with: {ended.said[-2000:]}")
        compare(end_of(self.run), self.reference.end)
        left = [str(path.relative_to(self.home)) for path in self.run.rglob(".partial-*")]
        if left:
            raise Failure(f"left behind: {', '.join(left)}")


def killed(trial: Trial, rng: random.Random) -> None:
    longest = 1.1 * trial.reference.seconds
    times = [rng.uniform(0, longest) for _ in range(rng.randint(1, MOST_KILLS))]
    trial.under([Strike(kill_after=seconds) for seconds in times])


def killed_at_a_call(trial: Trial, rng: random.Random) -> None:
    trial.under([Strike(at=rng.randint(1, trial.reference.calls), how=KILL)])


def fault(trial: Trial, rng: random.Random) -> None:
    at, how = rng.randint(1, trial.reference.calls), rng.choice((FAIL_ONCE, FAIL_ON))
    trial.faults += 1
    trial.under([Strike(at=at, how=how, error=rng.choice(ERRNOS))])


def file_limit(trial: Trial, rng: random.Random) -> None:
    trial.faults += 1
    trial.under([Strike(file_bytes=rng.randint(0, 1 << 17))])


def full_disk(trial: Trial, rng: random.Random) -> None:
    """On a file system that is filled by another program in mid-run, and emptied again."""
    trial.faults += 1
    trial.home.mkdir(parents=True)
    with mounted(trial.home):
        ended = trial.start(strike=Strike(fill_after=rng.uniform(0, trial.reference.seconds)))
        check_visible(trial.run, trial.reference)
        (trial.home / "filler").unlink(missing_ok=True)
        trial.in_peace(["--resume"] if ended.code and (trial.run / "start.json").exists() else [])


@contextmanager
def mounted(directory: Path) -> Iterator[None]:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(directory)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)


def can_mount(directory: Path) -> bool:
    directory.mkdir()
    try:
        with mounted(directory):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


def overwritten(trial: Trial, rng: random.Random) -> None:
    """A finished run is started anew, killed or struck while the old one goes, and finished."""
    shutil.copytree(trial.place.directory / "references" / trial.scenario / "run", trial.run)
    strike = Strike(at=rng.randint(1, trial.reference.calls), how=rng.choice((KILL, FAIL_ONCE)))
    ended = trial.start(["--overwrite"], strike)
    check_visible(trial.run, trial.reference)
    trial.faults += ended.code > 0
    trial.in_peace()


def merged(trial: Trial, rng: random.Random) -> None:
    """`lowvram merge` of a finished run, killed or struck, then left in peace."""
    adapter = trial.place.directory / "references" / trial.scenario / "run" / "adapter"
    output = trial.home / "merged"
    arguments = ("merge", str(adapter), "--output", str(output))
    calls = trial.place.references["merge"].calls
    seconds = trial.place.references["merge"].seconds
    strike = rng.choice(
        [
            Strike(kill_after=rng.uniform(0, seconds)),
            Strike(at=rng.randint(1, calls), how=KILL),
            Strike(
                at=rng.randint(1, calls),
                how=rng.choice((FAIL_ONCE, FAIL_ON)),
                error=rng.choice(ERRNOS),
            ),
        ]
    )
    ended = trial.told(command(trial.home, *arguments, strike=strike), strike, ())
    trial.faults += ended.code > 0
    wanted = {
        k.removeprefix("merged/"): v
        for k, v in trial.reference.end.items()
        if k.startswith("merged/")
    }
    if not output.exists():
        ended = trial.told(command(trial.home, *arguments), NOTHING, ())
        if ended.code:
            raise Failure(f"cannot be merged again: {ended.said[-2000:]}")
    compare({path.name: sha256(path) for path in output.iterdir()}, wanted)
    if left := [path.name for path in trial.home.glob(".partial-*")]:
        raise Failure(f"left behind: {', '.join(left)}")


def evaluated(trial: Trial, rng: random.Random) -> None:
    """`lowvram evaluate`, killed; the next one clears up after it."""
    model = str(trial.place.directory / "references" / next(iter(SCENARIOS)) / "run")
    arguments = ("evaluate", model, "--data", str(trial.place.directory / "text.txt"), "--json")
    strike = Strike(kill_after=rng.uniform(0, trial.place.references["evaluate"].seconds))
    trial.told(command(trial.home, *arguments, strike=strike), strike, ())
    ended = trial.told(command(trial.home, *arguments), NOTHING, ())
    if ended.said != trial.place.references["evaluate"].end["said"]:
        raise Failure("gives another perplexity")
    if left := list((trial.home / "tmp").iterdir()):
        raise Failure(f"left behind: {', '.join(path.name for path in left)}")


KINDS: dict[str, tuple[Callable[[Trial, random.Random], None], int]] = {
    "kills at random moments": (killed, 8),
    "kills at a call": (killed_at_a_call, 4),
    "calls that fail": (fault, 6),
    "file size limits": (file_limit, 1),
    "disks that fill up": (full_disk, 1),
    "runs started anew": (overwritten, 1),
    "merges": (merged, 2),
    "evaluations": (evaluated, 1),
}
"""Each with its share of the trials."""
