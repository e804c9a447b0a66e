"""The tokens of documents on disk: arrays that are mapped, not loaded, and written as a stream.

A store is a directory with one raw file an array, and `store.json`. Its digest tells whether it is
whole.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from lowvram.data.source import ReadReport

ARRAYS = {
    "starts": "q",
    "prompt_lengths": "i",
    "hashes": "Q",
    "byte_counts": "q",
    "word_counts": "q",
}
"""What is kept of each document, with its type code."""

BUFFERED_DOCUMENTS = 1 << 14
BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenStore:
    """n documents as one long array of tokens; read-only."""

    tokens: NDArray[Any]  # (n_tokens,) uint16, or uint32 where the vocabulary needs it
    starts: NDArray[np.int64]  # (n + 1,) document i is tokens[starts[i] : starts[i + 1]]
    prompt_lengths: NDArray[np.int32]  # (n,) tokens at the front that belong to the prompt
    hashes: NDArray[np.uint64]  # (n,) equal for documents of equal tokens
    byte_counts: NDArray[np.int64]  # (n,) of the text in UTF-8
    word_counts: NDArray[np.int64]  # (n,) of the text between white space
    report: ReadReport
    sha256: str
    """Of all arrays: a run is only resumed with the data that it began with."""
    cached: bool = False
    """Whether it was found rather than made."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def document(self, i: int) -> NDArray[Any]:
        return self.tokens[self.starts[i] : self.starts[i + 1]]

    def lengths(self, ids: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
        """Tokens of each of these documents; without `ids` of all."""
        if ids is None:
            return np.diff(self.starts)
        return self.starts[ids + 1] - self.starts[ids]


class StoreWriter:
    """Writes a store piece by piece; its memory is a few buffers, whatever the size."""

    def __init__(self, directory: Path, vocabulary_size: int) -> None:
        self.directory = directory
        self.code = "H" if vocabulary_size <= 1 << 16 else "I"
        self.files: dict[str, BinaryIO] = {
            name: (directory / name).open("wb") for name in ("tokens", *ARRAYS)
        }
        self.files["starts"].write(array(ARRAYS["starts"], [0]).tobytes())
        self.rows: list[tuple[int, ...]] = []  # of ARRAYS, a document each
        self.n_tokens = 0
        self.begin()

    def begin(self) -> None:
        self.hash = hashlib.blake2b(digest_size=8)
        self.prompt_length = self.byte_count = self.word_count = 0
        self.open_word = False

    def add(self, text: str, ids: list[int], prompt: bool = False) -> None:
        """More of the current document: text and its tokens; either may be empty."""
        data = array(self.code, ids).tobytes()
        self.files["tokens"].write(data)
        self.hash.update(data)
        self.n_tokens += len(ids)
        self.prompt_length += len(ids) if prompt else 0
        self.byte_count += len(text) if text.isascii() else len(text.encode())
        self.word_count += len(text.split())
        if text:
            # A word that goes on from one piece into the next is counted in both.
            self.word_count -= self.open_word and not text[0].isspace()
            self.open_word = not text[-1].isspace()

    def end(self) -> None:
        """The current document is complete."""
        content = int.from_bytes(self.hash.digest(), "little")
        self.rows.append(
            (self.n_tokens, self.prompt_length, content, self.byte_count, self.word_count)
        )
        if len(self.rows) == BUFFERED_DOCUMENTS:
            self.flush()
        self.begin()

    def flush(self) -> None:
        for (name, code), column in zip(ARRAYS.items(), zip(*self.rows, strict=True), strict=False):
            self.files[name].write(array(code, column).tobytes())
        self.rows.clear()

    def finish(self, report: ReadReport) -> None:
        """Everything to disk; only now the directory is a store."""
        self.flush()
        self.close()
        about = {
            "tokens": {"H": "uint16", "I": "uint32"}[self.code],
            "report": asdict(report),
            "sha256": digest(self.directory),
        }
        (self.directory / "store.json").write_text(json.dumps(about), encoding="utf-8")

    def close(self) -> None:
        """Every file is closed, even where the disk has no room for the rest of another."""
        with ExitStack() as stack:
            for file in self.files.values():
                stack.callback(file.close)


def digest(directory: Path) -> str:
    """The sha256 of all arrays, tokens first, each with its name and size before it."""
    total = hashlib.sha256()
    for name in ("tokens", *ARRAYS):
        path = directory / name
        total.update(f"{name} {path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            while block := file.read(BLOCK_BYTES):
                total.update(block)
    return total.hexdigest()


def is_consistent(tokens: NDArray[Any], starts: NDArray[np.int64], **columns: NDArray[Any]) -> bool:
    """Whether the documents are all of the tokens, and every array is of the same documents."""
    return bool(
        starts[0] == 0
        and starts[-1] == len(tokens)
        and (np.diff(starts) >= 0).all()
        and all(len(column) == len(starts) - 1 for column in columns.values())
    )


def open_store(directory: Path, *, cached: bool) -> TokenStore | None:
    """The store in a directory; None if there is none, or if it is not what was written."""
    try:
        about = json.loads((directory / "store.json").read_text(encoding="utf-8"))
        if digest(directory) != about["sha256"]:
            return None
        arrays = {
            name: np.memmap(directory / name, np.dtype(code), mode="r")
            for name, code in {"tokens": about["tokens"], **ARRAYS}.items()
        }
        report = ReadReport(**about["report"])
        if about["tokens"] not in ("uint16", "uint32") or not is_consistent(**arrays):
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return TokenStore(**arrays, report=report, sha256=about["sha256"], cached=cached)
