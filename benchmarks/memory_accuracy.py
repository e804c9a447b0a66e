"""Compare simulated with published memory: training steps that others measured on real cards.

    python benchmarks/memory_accuracy.py --make-venv

prints a table and exits with 1 if a prediction is off by more than 0.3 %. No card is needed. What
is predicted is the most that the allocator reserves, over all steps of `accuracy_rows.py`.

Three rows measured the model code of transformers 4.52, which reserves another amount than that of
today's version. They run in a Python that has it: give one with --transformers-python, or have a
virtual environment made with --make-venv, once; it is kept and found again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
from accuracy_rows import MIB, OLD_TRANSFORMERS, ROWS, Row

LIMIT_PERCENT = 0.3
ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch==2.13.0", f"transformers=={OLD_TRANSFORMERS}.4")
HEADINGS = ("configuration", "card", "measured", "predicted", "error", "seconds")


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came of a row: a prediction, or why there is none."""

    row: Row
    predicted_bytes: int | None = None
    seconds: float = 0.0
    skipped: bool = False
    problem: str = ""
    """The last line of what a failed simulation said."""

    @property
    def error_percent(self) -> float | None:
        if self.predicted_bytes is None:
            return None
        return 100 * (self.predicted_bytes / self.row.measured_bytes - 1)

    @property
    def is_accurate(self) -> bool:
        """A row that was skipped is not held against the simulation; one that failed is."""
        if self.error_percent is None:
            return self.skipped
        return abs(self.error_percent) <= LIMIT_PERCENT


# --- running --------------------------------------------------------------------------------------


def run_row(row: Row, python: Path | None) -> Result:
    """Simulate a row in a process of its own; without a Python for it, skip it."""
    if python is None:
        return Result(row=row, skipped=True)
    done = subprocess.run(
        [str(python), str(ROOT / "benchmarks" / "accuracy_rows.py"), row.name],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return Result(row=row, problem=lines[-1])
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return Result(row=row, predicted_bytes=found["predicted_bytes"], seconds=found["seconds"])


def run_rows(
    rows: Sequence[Row], old_python: Path | None, run: Callable[[Row, Path | None], Result]
) -> list[Result]:
    """Run each row with the Python that it needs."""
    own = Path(sys.executable)
    return [run(row, old_python if row.transformers else own) for row in rows]


# --- the Python with an older transformers --------------------------------------------------------


def venv_directory() -> Path:
    """Return where the virtual environment is, or would be made."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "lowvram" / f"transformers-{OLD_TRANSFORMERS}"


def venv_python(directory: Path) -> Path:
    return directory / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def make_venv(directory: Path) -> None:
    """Make the environment, or finish one whose installation was interrupted."""
    click.echo(f"installing {' and '.join(PACKAGES)} into {directory}", err=True)
    subprocess.run([sys.executable, "-m", "venv", str(directory)], check=True)
    for package in PACKAGES:  # torch first: transformers then finds it there
        command = [str(venv_python(directory)), "-m", "pip", "install", "--quiet", package]
        subprocess.run(command, check=True)


def find_old_python(given: Path | None, make: bool) -> Path | None:
    """Return the Python that was given, or that of the environment, made first if asked for."""
    if given is not None:
        return given
    directory = venv_directory()
    if make:
        make_venv(directory)
    python = venv_python(directory)
    return python if python.exists() else None


# --- printing -------------------------------------------------------------------------------------


def format_mib(size_bytes: int) -> str:
    return f"{size_bytes / MIB:,.0f} MiB"


def cells(result: Result) -> tuple[str, ...]:
    """Return a result as the texts of a table row."""
    row = result.row
    known = (row.configuration, row.card, format_mib(row.measured_bytes))
    if result.predicted_bytes is None:
        return (*known, "skipped" if result.skipped else "failed", "", "")
    return (
        *known,
        format_mib(result.predicted_bytes),
        f"{result.error_percent:+.2f} %",
        f"{result.seconds:.1f}",
    )


def format_table(results: Sequence[Result]) -> str:
    """Return a Markdown table whose columns line up; numbers stand right."""
    lines = [HEADINGS, *(cells(result) for result in results)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    left = 2  # columns of words

    def join(texts: Sequence[str]) -> str:
        padded = [
            text.ljust(width) if i < left else text.rjust(width)
            for i, (text, width) in enumerate(zip(texts, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * width if i < left else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join([join(lines[0]), join(rule), *map(join, lines[1:])])


def remarks(results: Sequence[Result]) -> list[str]:
    """Return what the table leaves open: how to get skipped rows, and why others failed."""
    found = [f"{result.row.name}: {result.problem}" for result in results if result.problem]
    skipped = [result.row.name for result in results if result.skipped]
    if skipped:
        found.append(
            f"Skipped, for want of a Python with transformers {OLD_TRANSFORMERS}: "
            f"{', '.join(skipped)}. Give one with --transformers-python, or --make-venv once."
        )
    return found


@click.command(help=(__doc__ or "").partition("\n")[0])
@click.option(
    "--transformers-python",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help=f"A Python with {' and '.join(PACKAGES)}.",
)
@click.option("--make-venv", "make", is_flag=True, help="Make a virtual environment with them.")
def main(transformers_python: Path | None, make: bool) -> None:
    """Parse the options, run, print."""
    results = run_rows(ROWS, find_old_python(transformers_python, make), run_row)
    click.echo(format_table(results))
    for remark in remarks(results):
        click.echo(remark, err=True)
    if not all(result.is_accurate for result in results):
        sys.exit(1)


if __name__ == "__main__":
    main()
