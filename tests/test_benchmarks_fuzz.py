"""benchmarks/fuzz.py finds what it looks for, and runs."""

from __future__ import annotations

import importlib.util
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lowvram.errors import LowVRAMError, RecipeError

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
FINE = b"model: {name: gpt2}\ndata: {source: x.txt}\n"


@pytest.fixture
def judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location("benchmark_fuzz", BENCHMARKS / "fuzz.py")
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    before = signal.getsignal(signal.SIGALRM)
    yield module.Judge("test", 0.2, tmp_path / "kept.yaml")
    signal.signal(signal.SIGALRM, before)


def test_recipes_and_our_errors_are_no_failures(judge: Any) -> None:
    for content in (FINE, FINE + b"x: 1\n", b"\xff"):
        judge.take(content)

    tally = judge.tally
    assert (tally.inputs, tally.accepted, tally.refused, tally.failures) == (3, 1, 2, 0)
    assert not judge.kept.exists()


def hang(*_: object) -> None:
    time.sleep(5)


def fails(error: Exception) -> Any:
    def fail(*_: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("place", "instead"),
    [
        ("lowvram.recipe.load_recipe", fails(ValueError("a bug"))),
        ("lowvram.recipe.load_recipe", fails(RecipeError("names no file"))),
        ("lowvram.recipe.load_recipe", fails(LowVRAMError("my.yaml: a code that says nothing"))),
        ("lowvram.recipe.load_recipe", hang),
        ("lowvram.recipe.dump_recipe", lambda _: "model: {name: other}\ndata: {source: x.txt}\n"),
        ("lowvram.inputs.check_inputs", fails(OSError("a bug"))),
    ],
)
def test_all_else_is_one(
    judge: Any, monkeypatch: pytest.MonkeyPatch, place: str, instead: Any
) -> None:
    monkeypatch.setattr(place, instead)
    started = time.monotonic()

    judge.take(FINE)

    assert judge.tally.failures == 1
    assert judge.kept.read_bytes() == FINE
    assert time.monotonic() - started < 2


def test_a_few_of_each_kind(tmp_path: Path) -> None:
    for engine in ("mutations", "hypothesis"):
        done = subprocess.run(
            [sys.executable, BENCHMARKS / "fuzz.py", "--engine", engine, "--inputs", "40"],
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        cells = [cell.strip() for cell in done.stdout.splitlines()[-1].split("|")[1:-1]]
        assert cells[:2] == [engine, "40"]
        assert int(cells[2]) + int(cells[3]) == 40
        assert float(cells[5]) < 200
