"""The directory of a run: what is in it, and when it may be written to.

runs/NAME/recipe.yaml     every setting, the chosen shape included
          start.json      what was measured before the first step
          metrics.jsonl   one line a step
          events.jsonl    what happened on the way: resumed, stopped, out of memory
          checkpoints/    state to go on from
          adapter/        what peft loads
          merged/         the plain checkpoint
          result.json     written last: a run that has it is finished
          .lock           held by the process that runs in it
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lowvram.disk import (
    remove,
    remove_partials,
    room_for,
    size_of,
    sync,
    write_text,
    writing,
)
from lowvram.errors import CheckpointError

# In the order in which they go: a run whose result is gone is not finished, and one without its
# start has not begun, whatever else there is left of it.
_FILES = ("result.json", "start.json", "recipe.yaml", "metrics.jsonl", "events.jsonl")
_FOLDERS = ("checkpoints", "adapter", "merged")


class RunDirectory:
    def __init__(self, path: str | Path) -> None:
        self.path = Path(os.path.expanduser(path))  # the home of an unknown user stays a name
        self.recipe = self.path / "recipe.yaml"
        self.start = self.path / "start.json"
        self.metrics = self.path / "metrics.jsonl"
        self.events = self.path / "events.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.adapter = self.path / "adapter"
        self.merged = self.path / "merged"
        self.result = self.path / "result.json"
        self.lock = self.path / ".lock"

    def check(self, *, resume: bool, overwrite: bool, inputs: Sequence[str] = ()) -> None:
        """Say why it cannot be used, and what to type; nothing is changed.

        `inputs` are files and directories that the run reads: starting anew must not remove them.
        """
        if resume and overwrite:
            raise CheckpointError("--resume goes on and --overwrite starts anew: give one of them")
        if self.path.exists() and not self.path.is_dir():
            raise CheckpointError(f"output_dir: {self.path} is a file; name a directory")
        above = next(p for p in (self.path, *self.path.absolute().parents) if p.exists())
        if not (above.is_dir() and os.access(above, os.W_OK)):
            raise CheckpointError(f"output_dir: {self.path} cannot be made: cannot write {above}")
        started, finished = self.start.exists(), self.result.exists()
        if resume:
            if finished:
                raise CheckpointError(
                    f"output_dir: the run in {self.path} is finished; --overwrite starts it anew"
                )
            if not started and not self.lock.exists():
                raise CheckpointError(
                    f"output_dir: no run has been started in {self.path}; run without --resume"
                )
            if started:
                return
            # One that died before it had begun: it begins now.
        self._keep_inputs(inputs)
        if (finished or started) and not overwrite:
            state = "a finished run" if finished else "an unfinished run"
            go_on = "" if finished else "go on with --resume, or "
            raise CheckpointError(
                f"output_dir: {self.path} holds {state}; {go_on}start anew with --overwrite, or "
                "choose another with --set output_dir=DIR"
            )
        there = [name for name in (*_FOLDERS, *_FILES) if os.path.lexists(self.path / name)]
        if there and not overwrite:
            raise CheckpointError(
                f"output_dir: {self.path} is no run's and holds {', '.join(there)}, which a run "
                "replaces; choose another with --set output_dir=DIR, or allow it with --overwrite"
            )

    def _keep_inputs(self, inputs: Sequence[str]) -> None:
        try:
            replaced = [(self.path / name).resolve() for name in (*_FOLDERS, *_FILES)]
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"output_dir: {self.path} cannot be used: {error}") from error
        for name in inputs:
            path = Path(os.path.expanduser(name))
            if not path.exists():
                continue  # a model or data set of the hub, or a pattern
            try:
                resolved = path.resolve()
            except (OSError, RuntimeError):  # a loop of links, which is told where it is read
                continue
            if any(resolved == own or own in resolved.parents for own in replaced):
                raise CheckpointError(
                    f"output_dir: a new run in {self.path} would replace {name}, which it reads; "
                    "choose another with --set output_dir=DIR"
                )

    @contextmanager
    def held(self) -> Iterator[None]:
        """For this process alone; what a crashed one left half-written is removed.

        The lock is the system's, so that it ends with the process however that ends.
        """
        new = not self.path.exists()
        with writing(f"output_dir: {self.path}"):
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.lock, blocking=False)
            try:
                lock.acquire()
            except Timeout:
                raise CheckpointError(
                    f"output_dir: another run is under way in {self.path}; wait for it, or choose "
                    "another with --set output_dir=DIR"
                ) from None
        try:
            remove_partials(self.path, "|".join(map(re.escape, (*_FILES, *_FOLDERS))))
            remove_partials(self.checkpoints, r"step-\d{8}")
            yield
        finally:
            with suppress(OSError):
                if new and os.listdir(self.path) == [self.lock.name]:
                    self.lock.unlink()  # nothing was begun: leave no trace
                    self.path.rmdir()
            lock.release()

    def require_room(self, needed_bytes: int, for_what: str) -> None:
        """What a run, an older one included, has there already counts as free."""
        own = sum(size_of(self.path / name) for name in (*_FOLDERS, *_FILES))
        enough, free = room_for(self.path, needed_bytes - own)
        if not enough:
            from lowvram.memory.measure import format_gib  # which brings torch

            raise CheckpointError(
                f"output_dir: {self.path} needs up to {format_gib(needed_bytes)} ({for_what}), and "
                f"its disk has {format_gib(free + own)} for it; free some, choose another with "
                "--set output_dir=DIR, or lower train.keep_last"
            )

    def make_empty(self) -> None:
        """Ready for a new run; never removes what is not a run's."""
        with writing(f"output_dir: {self.path}"):
            for name in (*_FILES, *_FOLDERS):
                remove(self.path / name)
            sync(self.path)

    def append_metrics(self, metrics: dict[str, Any]) -> None:
        self._append(self.metrics, metrics)

    def append_event(self, event: str, **facts: Any) -> None:
        now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        self._append(self.events, {"time": now, "event": event, **facts})

    def _append(self, path: Path, record: dict[str, Any]) -> None:
        with writing(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")

    def sync_metrics(self) -> None:
        """Before a checkpoint that is later than they are."""
        if self.metrics.exists():
            with writing(self.metrics):
                sync(self.metrics)

    def read_start(self) -> dict[str, Any]:
        """What was found before the first step."""
        try:
            found = None
            if self.start.is_file():
                found = json.loads(self.start.read_text(encoding="utf-8"))
            if isinstance(found, dict) and {"perplexity", "samples"} <= found.keys():
                return found
            reason = "keys are missing"
        except (OSError, ValueError, RecursionError) as error:
            reason = str(error)
        raise CheckpointError(
            f"{self.start}: is not what was written ({reason}); put it back, or start anew with "
            "--overwrite"
        )

    def read_events(self) -> list[dict[str, Any]]:
        return _whole_lines(self.events)

    def mend_events(self) -> None:
        """Without a last line that a crash has cut, to which the next would be appended."""
        if self.events.exists():
            write_text(self.events, _text_of(self.read_events()))

    def read_metrics(self) -> list[dict[str, Any]]:
        return _whole_lines(self.metrics)

    def keep_metrics(self, steps: int) -> int:
        """Forget the lines after step `steps`: those steps are taken again; how many are kept."""
        lines = self.read_metrics()
        kept = [line for line in lines if type(line.get("step")) is int and line["step"] <= steps]
        write_text(self.metrics, _text_of(kept))
        return len(kept)


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The last one may have been cut by a crash."""
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(values, dict):
            break
        found.append(values)
    return found


def _text_of(lines: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)
