"""What to read and what was read: the plain values that travel between the readers.

Nothing here opens a file.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowvram.errors import DataError

FORMATS = ("auto", "lines", "paragraphs", "document")

VALUE_CHARACTERS = 1 << 28
"""Of what has to be in memory at once: a line, a row, a paragraph, a value of JSON."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where documents come from. An unknown format or an empty separator is a DataError."""

    names: tuple[str, ...]
    """Files, directories, globs, the id of a hub data set, or `embedded:python-reference`."""
    format: str = "auto"
    """Of text files only: lines, paragraphs or document; auto is lines. Tables ignore it."""
    text_column: str = "text"
    """Of tables: the column that holds the text."""
    prompt_column: str = "prompt"
    """Of tables without the text column: what the model is given."""
    completion_column: str = "completion"
    """Of tables without the text column: what the model has to continue with."""
    separator: str | None = None
    """Splits each text where it first occurs: prompt, with the separator, and completion."""
    encoding: str = "utf-8"
    """Of text, CSV and JSON files. A byte order mark is never part of the text."""
    config: str | None = None
    """Of hub data sets: the configuration."""
    split: str = "train"
    """Of hub data sets: the split."""

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise DataError(f"data.format is {self.format!r}: use one of {', '.join(FORMATS)}")
        if self.separator == "":
            raise DataError("data.separator is empty: leave it out, or give the text to split at")
        if not self.names:
            raise DataError("data.source names nothing: give a file, a directory or a data set")


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a document; its pieces follow each other, those of its prompt first."""

    text: str
    end: bool = True
    """True for the last piece of a document."""
    prompt: bool = False
    """True where the loss may be left out."""


@dataclass(kw_only=True)
class ReadReport:
    """What reading found and what it left out; counts grow while the pieces are being read."""

    files: int = 0
    files_skipped: int = 0
    """Files of a directory or a glob that are empty or not of a kind that is read."""
    bytes_read: int = 0
    documents: int = 0
    blank: int = 0
    """Lines, rows and documents left out because their text is empty or only white space."""
    nulls: int = 0
    """Rows left out because they have no text: it is null, or the key is missing."""
    without_separator: int = 0
    """Documents that were kept, without a prompt, because the separator does not occur in them."""

    @property
    def left_out(self) -> bool:
        """Whether anything of the source is in no document, or not as it was meant."""
        return any((self.files_skipped, self.blank, self.nulls, self.without_separator))

    def __str__(self) -> str:
        parts = [f"{self.documents:,} documents"]
        parts += [f"{self.blank:,} blank ones skipped"] if self.blank else []
        parts += [f"{self.nulls:,} without text skipped"] if self.nulls else []
        parts += [f"{self.files_skipped:,} files skipped"] if self.files_skipped else []
        missing = self.without_separator
        parts += [f"{missing:,} without separator, all completion"] if missing else []
        return ", ".join(parts)


@dataclass(frozen=True, kw_only=True)
class Origin:
    """One file (`path`), one hub data set (`dataset`), or, with neither, the embedded reference."""

    name: str
    path: Path | None = None
    dataset: Any = None

    @property
    def size_bytes(self) -> int | None:
        """None where it is not known before reading."""
        return None if self.path is None else status_of(self.path).st_size


def status_of(path: Path) -> os.stat_result:
    """Of a file that was there when it was looked for."""
    try:
        return path.stat()
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read: {error.strerror or error}: leave it in place while it is used"
        ) from error


def too_long(where: str, what: str) -> DataError:
    return DataError(
        f"{where}: {what} of more than {VALUE_CHARACTERS:,} characters, which has to be in memory "
        "as a whole: break it into several"
    )
