"""From the start of the process to its answer, or to the first step of training.

    python benchmarks/startup.py

Each command runs in a process of its own, by turns, with nothing warm but the disk. It counts wall
clock, from before the process is started to its end; for a run, until the line of the first step
is in metrics.jsonl, with an empty cache of tokens. What each command answers is
compared first. Exit code 1 if an answer is another, or if a median is above what is allowed. Beside
them stands the import of what every training program of this kind imports.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

ALLOWED_HELP, ALLOWED_ERROR, ALLOWED_STEP = 0.4, 0.5, 8.0
POLL_SECONDS = 0.005
LIMIT_SECONDS = 120.0

UNKNOWN_KEY = "model: {name: gpt2}\ndata: {source: x.txt}\ntrain: {lerning_rate: 1}\n"
BAD_VALUE = "model: {name: gpt2}\ndata: {source: x.txt}\ntrain: {epochs: many}\n"
BAD_YAML = "model: {name: gpt2\ndata: {source: x.txt}\n"


class Wrong(Exception):
    """A command did not answer as it should."""


@dataclass(frozen=True, kw_only=True)
class Case:
    label: str
    arguments: tuple[str, ...]
    """Of the Python interpreter."""
    code: int
    answer: str
    """Is in what it prints."""
    allowed: float | None


def lowvram(*arguments: str) -> tuple[str, ...]:
    return ("-m", "lowvram", *arguments)


def cases(directory: Path) -> list[Case]:
    """`directory` gets the recipes with mistakes in them."""

    def refused(label: str, code: int, answer: str, *arguments: str) -> Case:
        return Case(
            label=label,
            arguments=lowvram(*arguments),
            code=code,
            answer=answer,
            allowed=ALLOWED_ERROR,
        )

    def recipe(name: str, text: str) -> str:
        (directory / name).write_text(text, encoding="utf-8")
        return str(directory / name)

    return [
        Case(
            label="`lowvram --help`",
            arguments=lowvram("--help"),
            code=0,
            answer="Fine-tune GPT-2-class language models",
            allowed=ALLOWED_HELP,
        ),
        refused("run: unknown key", 2, "unknown key", "run", recipe("key.yaml", UNKNOWN_KEY)),
        refused("run: bad value", 2, "train.epochs", "run", recipe("value.yaml", BAD_VALUE)),
        refused("run: bad YAML", 2, "not valid YAML", "run", recipe("bad.yaml", BAD_YAML)),
        refused("run: no such recipe", 2, "no recipe of that name", "run", "nonesuch"),
        refused("run: no such data", 3, "no such file",
                "run", "quickstart", "--set", "data.source=/none.txt"),
        refused("probe: unknown card", 6, "unknown card",
                "probe", "quickstart", "--gpu", "rtx-0"),
        refused("probe: bad size", 2, "--vram: found", "probe", "quickstart", "--vram", "12Foo"),
        refused("probe: bad picture", 2, "allowed .png",
                "probe", "quickstart", "--gpu", "rtx-4070-ti", "--plot", "x.foo"),
        refused("evaluate: no such model", 4, "is no directory",
                "evaluate", "/none", "--data", "x.txt"),
        refused("evaluate: no such data", 3, "no such file",
                "evaluate", "gpt2", "--data", "/none.txt"),
        refused("evaluate: no data", 2, "Missing option", "evaluate", "gpt2"),
        Case(
            label="`python -c pass`",
            arguments=("-c", "pass"),
            code=0,
            answer="",
            allowed=None,
        ),
        Case(
            label="`import torch, transformers, peft`",
            arguments=("-c", "import torch, transformers, peft"),
            code=0,
            answer="",
            allowed=None,
        ),
    ]  # fmt: skip


def answer_seconds(case: Case, directory: Path) -> float:
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *case.arguments],
        cwd=directory,
        env=environment(directory / "cache"),
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    seconds = time.perf_counter() - started
    if done.returncode != case.code or case.answer not in done.stdout + done.stderr:
        raise Wrong(f"{case.label}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return seconds


def first_step_seconds(recipe: str, directory: Path) -> float:
    """Until the line of the first step is there; the process is then stopped as by Ctrl-C."""
    with tempfile.TemporaryDirectory(dir=directory) as work:
        metrics = Path(work, "run", "metrics.jsonl")
        started = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *lowvram("run", recipe, "--set", f"output_dir={metrics.parent}")],
            env=environment(Path(work, "cache")),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            while not (metrics.exists() and metrics.stat().st_size):
                if process.poll() is not None or time.perf_counter() - started > LIMIT_SECONDS:
                    raise Wrong(f"{recipe}: no first step: {process.communicate(timeout=5)[1]}")
                time.sleep(POLL_SECONDS)
            return time.perf_counter() - started
        finally:
            process.terminate()
            process.communicate(timeout=LIMIT_SECONDS)


def environment(cache: Path) -> dict[str, str]:
    return {**os.environ, "LOWVRAM_CACHE": str(cache)}


def row(label: str, seconds: list[float], allowed: float | None) -> str:
    bound = "" if allowed is None else f"{allowed:.1f}"
    return (
        f"| {label} | {statistics.median(seconds):.2f} | {min(seconds):.2f} to "
        f"{max(seconds):.2f} | {bound} |"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--recipe", default="quickstart", help="the run whose first step counts")
    options = parser.parse_args()
    step = "`lowvram run`, until its first step"
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        found = cases(directory)
        seconds: dict[str, list[float]] = {case.label: [] for case in found} | {step: []}
        try:
            for case in found:
                answer_seconds(case, directory)  # answers, and what is on disk
            for _ in range(options.repetitions):
                for case in found:
                    seconds[case.label].append(answer_seconds(case, directory))
                seconds[step].append(first_step_seconds(options.recipe, directory))
        except Wrong as error:
            print(error, file=sys.stderr)
            return 1
    bounds = {case.label: case.allowed for case in found} | {step: ALLOWED_STEP}
    print("| seconds, wall clock | median | least to most | allowed |\n|---|--:|--:|--:|")
    for label, times in seconds.items():
        print(row(label, times, bounds[label]))
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    print(f"\n{os.cpu_count()} cores, Python {platform.python_version()}, {versions}; "
          f"{options.repetitions} runs each, by turns; every answer was as expected.")  # fmt: skip
    late = [
        label
        for label, times in seconds.items()
        if (bound := bounds[label]) is not None and statistics.median(times) >= bound
    ]
    for label in late:
        print(f"too slow: {label}", file=sys.stderr)
    return 1 if late else 0


if __name__ == "__main__":
    sys.exit(main())
