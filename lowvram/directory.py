"""The directory of a run: what is in it, and when it may be written to.

runs/NAME/recipe.yaml     every setting, the chosen shape included
          start.json      what was measured before the first step
          metrics.jsonl   one line a step
          checkpoints/    state to go on from
          adapter/        what peft loads
          merged/         the plain checkpoint
          result.json     written last: a run that has it is finished
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowvram.errors import CheckpointError

_FILES = ("recipe.yaml", "start.json", "metrics.jsonl", "result.json")
_FOLDERS = ("checkpoints", "adapter", "merged")


class RunDirectory:
    def __init__(self, path: str | Path) -> None:
        self.path = Path(os.path.expanduser(path))  # the home of an unknown user stays a name
        self.recipe = self.path / "recipe.yaml"
        self.start = self.path / "start.json"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.adapter = self.path / "adapter"
        self.merged = self.path / "merged"
        self.result = self.path / "result.json"

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
            if not started:
                raise CheckpointError(
                    f"output_dir: no run has been started in {self.path}; run without --resume"
                )
            return
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
        replaced = [(self.path / name).resolve() for name in (*_FOLDERS, *_FILES)]
        for name in inputs:
            path = Path(os.path.expanduser(name))
            if not path.exists():
                continue  # a model or data set of the hub, or a pattern
            resolved = path.resolve()
            if any(resolved == own or own in resolved.parents for own in replaced):
                raise CheckpointError(
                    f"output_dir: a new run in {self.path} would replace {name}, which it reads; "
                    "choose another with --set output_dir=DIR"
                )

    def make_empty(self) -> None:
        """Ready for a new run; never removes what is not a run's."""
        try:
            for name in _FOLDERS:
                if (self.path / name).is_symlink():
                    (self.path / name).unlink()
                elif (self.path / name).exists():
                    shutil.rmtree(self.path / name)
            for name in _FILES:
                (self.path / name).unlink(missing_ok=True)
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"output_dir: {self.path} cannot be used: {error}") from error

    def append_metrics(self, metrics: dict[str, Any]) -> None:
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(metrics, allow_nan=False) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """All whole lines; the last one may have been cut by a crash."""
        if not self.metrics.exists():
            return []
        lines = self.metrics.read_text(encoding="utf-8").splitlines()
        found = []
        for line in lines:
            try:
                found.append(json.loads(line))
            except ValueError:
                break
        return found

    def keep_metrics(self, steps: int) -> None:
        """Forget the lines after step `steps`: those steps are taken again."""
        kept = [metrics for metrics in self.read_metrics() if metrics["step"] <= steps]
        text = "".join(json.dumps(metrics) + "\n" for metrics in kept)
        write_text(self.metrics, text)


def write_json(path: Path, content: Any) -> None:
    """NaN and infinity are refused: JSON has none."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Beside its place first, then renamed: never half a file."""
    partial = path.with_name(f".partial-{path.name}-{os.getpid()}")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
