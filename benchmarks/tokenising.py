"""Tokenising a file into the cache, beside the tokenizers library alone; and its peak memory.

    python benchmarks/tokenising.py --tokenizer DIR --text FILE

DIR holds GPT-2's tokenizer or another fast one, and FILE has a document a line; without them, the
embedded model's tokenizer reads the embedded text. The text is repeated to the sizes asked for.

The library gets all lines at once, from memory, with all cores, and its tokens are taken out as
lists; that is all that it does. lowvram reads the file, finds its documents, tokenises them, writes
the tokens with what is known of each document to disk, and checks what it wrote. The same tokens
have to come out. Their turns alternate.

Memory is that of a process of its own for each size and shape of text: many lines, one document
and one line. Exit code 1 if tokens differ, or a claim does not hold: 0.9 of the speed of
`encode_batch_fast`, and at most 1 GiB, with next to nothing added by a file of several times the
size.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import GPT2Tokenizer

from lowvram.data import Source, TokenStore, read_pieces, tokenize
from lowvram.data.source import ReadReport
from lowvram.model import load_tokenizer

EMBEDDED_MODEL, EMBEDDED_TEXT = "embedded:gpt2-docstrings", "embedded:python-reference"
LEAST_SPEED = 0.9
MOST_BYTES = 1 << 30
MOST_GROWTH = 64 << 20
"""Bytes that a file of the larger size may take more than one of the smaller."""
MB = 1_000_000
CHECKED_CHARACTERS = 1 << 20
"""Of the text as one document; the library takes it whole on one core, ever more slowly."""

SHAPES = {"lines": "many lines", "document": "one document", "line": "one line"}


# --- texts ----------------------------------------------------------------------------------------


def read_tokenizer(name: str) -> Any:
    """GPT-2's own two files are enough."""
    if (Path(name) / "merges.txt").exists() and not (Path(name) / "tokenizer.json").exists():
        return GPT2Tokenizer.from_pretrained(name)
    return load_tokenizer(name)


def read_text(name: str | None) -> str:
    if name is not None:
        return Path(name).read_text(encoding="utf-8")
    source = Source(names=(EMBEDDED_TEXT,))
    return "".join(piece.text for piece in read_pieces(source, ReadReport(), split_long=False))


def write_text(path: Path, text: str, size_bytes: int) -> None:
    """The text over and over, without more of it in memory."""
    data = (text.rstrip("\n") + "\n").encode()
    with path.open("wb") as file:
        for _ in range(max(1, round(size_bytes / len(data)))):
            file.write(data)


def write_shape(path: Path, text: str, shape: str, size_bytes: int) -> str:
    """A file of that shape; returns the format that reads it."""
    write_text(path, " ".join(text.split("\n")) if shape == "line" else text, size_bytes)
    if shape != "line":
        return shape
    data = path.read_bytes()  # repeated lines become one
    path.write_bytes(data.replace(b"\n", b" "))
    return "lines"


# --- speed ----------------------------------------------------------------------------------------


def ours(path: Path, tokenizer: Any, text_format: str) -> tuple[float, TokenStore]:
    with tempfile.TemporaryDirectory(dir=path.parent) as cache:
        started = time.perf_counter()
        store = tokenize(
            Source(names=(str(path),), format=text_format), tokenizer, cache_dir=Path(cache)
        )
        return time.perf_counter() - started, store


def library(encode: Callable[..., Any], lines: list[str]) -> tuple[float, list[list[int]]]:
    started = time.perf_counter()
    ids = [encoding.ids for encoding in encode(lines, add_special_tokens=False)]
    return time.perf_counter() - started, ids


def check_tokens(path: Path, tokenizer: Any, backend: Any, lines: list[str]) -> str | None:
    """What is not the same, if anything is."""
    end = [tokenizer.eos_token_id]
    expected = list(itertools.chain.from_iterable(
        ids + end for ids in library(backend.encode_batch, lines)[1]
    ))  # fmt: skip
    if ours(path, tokenizer, "lines")[1].tokens.tolist() != expected:
        return "lines: the tokens are not those of the tokenizers library"
    whole = path.read_text(encoding="utf-8")[:CHECKED_CHARACTERS]
    part = path.with_name("part.txt")
    part.write_text(whole, encoding="utf-8")
    found = ours(part, tokenizer, "document")[1].tokens.tolist()
    if found != backend.encode(whole, add_special_tokens=False).ids + end:
        return "document: the tokens are not those of the tokenizers library"
    return None


def speeds(path: Path, tokenizer: Any, repetitions: int) -> dict[str, list[float]] | str:
    """Seconds of each contestant, or what they do not agree about."""
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True  # as lowvram reads text: special tokens are only text
    lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    wrong = check_tokens(path, tokenizer, backend, lines)
    if wrong is not None:
        return wrong
    contestants: dict[str, Callable[[], float]] = {
        "tokenizers, encode_batch": lambda: library(backend.encode_batch, lines)[0],
        "tokenizers, encode_batch_fast": lambda: library(backend.encode_batch_fast, lines)[0],
        "lowvram, lines": lambda: ours(path, tokenizer, "lines")[0],
        "lowvram, one document": lambda: ours(path, tokenizer, "document")[0],
    }
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(repetitions):
        order = list(contestants) if turn % 2 == 0 else list(reversed(contestants))
        for name in order:
            seconds[name].append(contestants[name]())
    return seconds


def speed_rows(seconds: dict[str, list[float]], size_bytes: int) -> tuple[list[str], list[str]]:
    """The table, and the claims that do not hold: quotients of medians over all turns."""
    peer = statistics.median(seconds["tokenizers, encode_batch_fast"])
    rows = [
        "| | MB/s, median | least to most | of encode_batch_fast |",
        "|---|--:|--:|--:|",
    ]
    failed = []
    for name, times in seconds.items():
        share = peer / statistics.median(times)
        rates = [size_bytes / MB / t for t in times]
        rows.append(
            f"| {name} | {statistics.median(rates):.2f} | {min(rates):.2f} to {max(rates):.2f} "
            f"| {share:.2f} |"
        )
        if name.startswith("lowvram") and share < LEAST_SPEED:
            failed.append(f"{name}: {share:.2f} of the speed of encode_batch_fast")
    return rows, failed


# --- memory ---------------------------------------------------------------------------------------


def peak_bytes() -> int:
    """Of this process, resident. VmHWM is its own; ru_maxrss may be its parent's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM in /proc/self/status")


def measure(path: Path, tokenizer_name: str, text_format: str) -> None:
    """In a process of its own: prints what tokenising that file took."""
    tokenizer = read_tokenizer(tokenizer_name)
    before = peak_bytes()
    seconds, store = ours(path, tokenizer, text_format)
    print(json.dumps({
        "before": before,
        "peak": peak_bytes(),
        "seconds": seconds,
        "documents": len(store),
        "tokens": len(store.tokens),
    }))  # fmt: skip


def measured(path: Path, tokenizer_name: str, text_format: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--tokenizer", tokenizer_name]
    command += ["--measure", str(path), text_format]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def memory_rows(
    text: str, tokenizer_name: str, sizes: list[int], shapes: list[str], directory: Path
) -> tuple[list[str], list[str]]:
    rows = [
        "| text | MB | documents | tokens | seconds | peak MiB | of it before tokenising |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    failed = []
    path = directory / "text.txt"
    for shape in shapes:
        peaks = []
        for size in sorted(sizes):
            text_format = write_shape(path, text, shape, size * MB)
            found = measured(path, tokenizer_name, text_format)
            peaks.append(found["peak"])
            rows.append(
                f"| {SHAPES[shape]} | {path.stat().st_size / MB:,.0f} | {found['documents']:,} | "
                f"{found['tokens']:,} | {found['seconds']:.1f} | {found['peak'] / 2**20:.0f} | "
                f"{found['before'] / 2**20:.0f} |"
            )
        path.unlink()
        if max(peaks) >= MOST_BYTES:
            failed.append(f"{SHAPES[shape]}: {max(peaks) / 2**20:.0f} MiB")
        if peaks[-1] - peaks[0] > MOST_GROWTH:
            failed.append(f"{SHAPES[shape]}: grew by {(peaks[-1] - peaks[0]) / 2**20:.0f} MiB")
    return rows, failed


# --- all ------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", default=EMBEDDED_MODEL, help="directory or model")
    parser.add_argument("--text", help="a file with a document a line")
    parser.add_argument("--mb", type=int, default=20, help="size of the text for the speed")
    parser.add_argument("--repetitions", type=int, default=5, help="0: no speed")
    parser.add_argument("--memory-mb", type=int, nargs="*", default=[20, 80], help="sizes of files")
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--work", help="directory for the files; default: the system's")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(Path(options.measure[0]), options.tokenizer, options.measure[1])
        return 0
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    text, failed = read_text(options.text), []
    with tempfile.TemporaryDirectory(dir=options.work) as name:
        path = Path(name, "speed.txt")
        if options.repetitions:
            write_text(path, text, options.mb * MB)
            seconds = speeds(path, read_tokenizer(options.tokenizer), options.repetitions)
            if isinstance(seconds, str):
                print(seconds, file=sys.stderr)
                return 1
            rows, late = speed_rows(seconds, path.stat().st_size)
            print("\n".join(rows), end="\n\n")
            failed += late
        if options.memory_mb:
            rows, grown = memory_rows(
                text, options.tokenizer, options.memory_mb, options.shapes, Path(name)
            )
            print("\n".join(rows), end="\n\n")
            failed += grown
    packages = ("tokenizers", "transformers")
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    same = f"; {options.repetitions} turns; the tokens were the same" if options.repetitions else ""
    print(f"{os.cpu_count()} cores, Python {platform.python_version()}, {versions}{same}.")
    for claim in failed:
        print(f"does not hold: {claim}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
