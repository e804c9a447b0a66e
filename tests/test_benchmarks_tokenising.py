"""What benchmarks/tokenising.py and benchmarks/startup.py reckon, and that what they compare is."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lowvram.model import load_tokenizer

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look for it there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tokenising() -> Any:
    return script("tokenising")


@pytest.fixture(scope="module")
def startup() -> Any:
    return script("startup")


def test_every_contestant_makes_the_same_tokens(tokenising: Any, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("one line\n\n  another, indented\n" * 50)
    tokenizer = load_tokenizer(tokenising.EMBEDDED_MODEL)
    seconds = tokenising.speeds(path, tokenizer, 2)
    assert len(seconds) == 4
    assert all(len(times) == 2 for times in seconds.values())


def test_other_tokens_are_found(
    tokenising: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "text.txt"
    path.write_text("one line\nanother\n")
    tokenizer = load_tokenizer(tokenising.EMBEDDED_MODEL)
    real = tokenising.ours

    def other(path: Path, tokenizer: Any, text_format: str) -> Any:
        (path.parent / "other.txt").write_text("one lime\nanother\n")
        return real(path.parent / "other.txt", tokenizer, text_format)

    monkeypatch.setattr(tokenising, "ours", other)
    assert tokenising.speeds(path, tokenizer, 1).startswith("lines: the tokens are not those")


def test_a_claim_of_speed_is_about_medians(tokenising: Any) -> None:
    seconds = {
        "tokenizers, encode_batch_fast": [2.0, 1.0, 1.0],
        "lowvram, lines": [9.0, 1.1, 1.1],
        "lowvram, one document": [1.2, 1.0, 1.3],
    }
    rows, failed = tokenising.speed_rows(seconds, 11_000_000)
    assert "| lowvram, lines | 10.00 | 1.22 to 10.00 | 0.91 |" in rows
    assert failed == ["lowvram, one document: 0.83 of the speed of encode_batch_fast"]


@pytest.mark.parametrize(("shape", "lines"), [("lines", 8), ("document", 8), ("line", 0)])
def test_texts_of_a_size_and_a_shape(
    tokenising: Any, tmp_path: Path, shape: str, lines: int
) -> None:
    path = tmp_path / "text.txt"
    text_format = tokenising.write_shape(path, "a b\nc", shape, 24)
    assert path.read_bytes().count(b"\n") == lines
    assert path.read_text().split() == ["a", "b", "c"] * 4
    assert text_format == ("document" if shape == "document" else "lines")


def test_answers_are_compared(startup: Any, tmp_path: Path) -> None:
    def case(code: int, answer: str) -> Any:
        return startup.Case(
            label="x", arguments=("-c", "print('yes')"), code=code, answer=answer, allowed=1.0
        )

    assert startup.answer_seconds(case(0, "yes"), tmp_path) > 0
    for wrong in (case(1, "yes"), case(0, "no")):
        with pytest.raises(startup.Wrong, match="x: exit code 0"):
            startup.answer_seconds(wrong, tmp_path)
    assert startup.row("x", [1.0, 3.0, 2.0], 0.5) == "| x | 2.00 | 1.00 to 3.00 | 0.5 |"
    labels = [case.label for case in startup.cases(tmp_path)]
    assert len(labels) == len(set(labels))
