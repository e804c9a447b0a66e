r"""Text files as lines, paragraphs or whole documents, decoded strictly.

Only \n, \r\n and a lone \r end a line, and all three arrive as \n: a form feed, U+2028 or U+0085
is text. A byte order mark is left out. A file is what it was when reading began: one that
grows meanwhile is an error.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from lowvram.data import source
from lowvram.data.encoding import check_encoding, likely_encoding, wrong_bytes
from lowvram.data.source import ReadReport, too_long
from lowvram.errors import DataError

CHUNK_CHARACTERS = 1 << 20
BUFFER_BYTES = 1 << 18


class CountedFile(io.FileIO):
    """A file that adds the bytes read from it to a report; bytes read twice count once."""

    def __init__(self, path: Path, report: ReadReport) -> None:
        super().__init__(path)
        self.report = report
        self.counted_bytes = 0
        self.size_bytes = os.fstat(self.fileno()).st_size

    def readinto(self, buffer: Any, /) -> int:
        n = super().readinto(buffer)
        new = max(0, self.tell() - self.counted_bytes)
        self.report.bytes_read += new
        self.counted_bytes += new
        if self.counted_bytes > self.size_bytes:
            raise DataError(f"{self.name}: grows while it is read: give a copy of it")
        return n

    def readall(self) -> bytes:
        data = super().readall()
        self.readinto(bytearray(1))  # at the end: counts what readall has read
        return data


@contextmanager
def open_text(
    path: Path, encoding: str, report: ReadReport, newline: str | None = None
) -> Iterator[TextIO]:
    """The file as text, after the byte order mark; bytes that are no text become a DataError."""
    check_encoding(encoding)
    try:
        try:
            raw = io.BufferedReader(CountedFile(path, report), buffer_size=BUFFER_BYTES)
            with io.TextIOWrapper(raw, encoding=encoding, newline=newline) as file:
                if file.read(1) != "\ufeff":
                    file.seek(0)
                yield file
        except UnicodeError as error:
            raise wrong_bytes(path, encoding) from error
    except OSError as error:  # also where the file is looked at again
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    report.files += 1


def checked_lines(file: TextIO, path: Path) -> Iterator[str]:
    """The lines of an open file, line ends included, as long as they are text."""
    number = 0
    while line := file.readline(source.VALUE_CHARACTERS + 1):
        number += 1
        if "\0" in line:
            raise binary(path, f"line {number}")
        if len(line) > source.VALUE_CHARACTERS:
            raise too_long(f"{path}:{number}", "a line")
        yield line


def chunks(path: Path, encoding: str, report: ReadReport) -> Iterator[str]:
    r"""The whole text in stretches of about 1 MiB, every line end as \n."""
    with open_text(path, encoding, report) as file:
        line = 1
        while chunk := file.read(CHUNK_CHARACTERS):
            if "\0" in chunk:
                raise binary(path, f"line {line + chunk[: chunk.index(chr(0))].count(chr(10))}")
            line += chunk.count("\n")
            yield chunk


def binary(path: Path, where: str) -> DataError:
    likely = likely_encoding(path)
    if likely.startswith("utf-16"):
        return DataError(
            f"{path}: NUL characters in {where}: the file looks like {likely}: "
            f"set data.encoding: {likely}"
        )
    return DataError(
        f"{path}: a NUL character in {where}: this is no text file. Name files of text, "
        "or convert this one"
    )


def line_parts(path: Path, encoding: str, report: ReadReport) -> Iterator[str]:
    r"""The text in lines, a long one in stretches of 1 MiB; what ends with \n ends a line."""
    with open_text(path, encoding, report) as file:
        number = 1
        while part := file.readline(CHUNK_CHARACTERS):
            if "\0" in part:
                raise binary(path, f"line {number}")
            number += part.endswith("\n")
            yield part


def lines(path: Path, encoding: str, report: ReadReport) -> Iterator[str]:
    """One text a line, without its line end; blank lines too."""
    with open_text(path, encoding, report) as file:
        for line in checked_lines(file, path):
            yield line[:-1] if line.endswith("\n") else line


def paragraphs(path: Path, encoding: str, report: ReadReport) -> Iterator[str]:
    r"""Texts separated by blank lines; the line ends inside are kept as \n."""
    collected: list[str] = []
    size = 0
    for number, line in enumerate(lines(path, encoding, report), start=1):
        if line and not line.isspace():
            collected.append(line)
            size += len(line) + 1
            if size > source.VALUE_CHARACTERS:
                raise too_long(f"{path}:{number}", "a paragraph")
        elif collected:
            yield "\n".join(collected)
            collected, size = [], 0
    if collected:
        yield "\n".join(collected)


def document(path: Path, encoding: str, report: ReadReport) -> Iterator[str]:
    """The whole file as one text."""
    collected: list[str] = []
    size = 0
    for chunk in chunks(path, encoding, report):
        collected.append(chunk)
        size += len(chunk)
        if size > source.VALUE_CHARACTERS:
            raise too_long(str(path), "a document")
    yield "".join(collected)
