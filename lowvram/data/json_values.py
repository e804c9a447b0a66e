"""The values of a JSON file one after the other, without the whole file in memory.

A file is an array of values, or values that follow each other: one object, or JSON Lines that are
called .json.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lowvram.data import source
from lowvram.data.source import too_long
from lowvram.errors import DataError

TOKEN_CHARACTERS = 16
BETWEEN = re.compile(r"[\s,]*")


class Reader:
    """A window on the text: `text[position:]` is unread."""

    def __init__(self, path: Path, chunks: Iterator[str]) -> None:
        self.path = path
        self.chunks = chunks
        self.text = ""
        self.position = 0
        self.line = 1

    def more(self) -> bool:
        """Double what is unread, so that time stays linear in a long value; False at the end."""
        unread = self.text[self.position :]
        if len(unread) > source.VALUE_CHARACTERS:
            raise too_long(f"{self.path}:{self.line}", "a value")
        parts = [unread]
        wanted = max(1, len(unread))
        while wanted > 0 and (chunk := next(self.chunks, "")):
            parts.append(chunk)
            wanted -= len(chunk)
        if len(parts) == 1:
            return False
        self.text, self.position = "".join(parts), 0
        return True

    def move(self, end: int) -> None:
        self.line += self.text.count("\n", self.position, end)
        self.position = end

    def skip(self) -> str:
        """Skip white space and commas; the next character, or "" at the end."""
        while True:
            match = BETWEEN.match(self.text, self.position)
            assert match is not None
            self.move(match.end())
            if self.position < len(self.text):
                return self.text[self.position]
            if not self.more():
                return ""


def json_values(path: Path, chunks: Iterator[str]) -> Iterator[tuple[int, Any]]:
    """Values with the line that each begins in. Malformed JSON: DataError."""
    reader = Reader(path, chunks)
    is_array = reader.skip() == "["
    if is_array:
        reader.move(reader.position + 1)
    while (character := reader.skip()) and not (is_array and character == "]"):
        line = reader.line
        yield line, next_value(reader)
    if is_array:
        finish(reader)


def next_value(reader: Reader) -> Any:
    decoder = json.JSONDecoder()
    while True:
        position = reader.position
        try:
            value, end = decoder.raw_decode(reader.text, position)
        except json.JSONDecodeError as error:
            if may_be_cut_off(error) and reader.more():
                continue
            line = reader.line + error.doc.count("\n", position, error.pos)
            raise DataError(
                f"{reader.path}:{line}: malformed JSON: {error.msg}. "
                "A .json file is an array of objects or strings"
            ) from error
        except (ValueError, RecursionError) as error:  # of a number, of brackets in brackets
            raise malformed(f"{reader.path}:{reader.line}", error) from error
        # A number may go on beyond the window; objects and strings end by themselves.
        if end < len(reader.text) or isinstance(value, dict | list | str) or not reader.more():
            reader.move(end)
            return value


def malformed(where: str, error: Exception) -> DataError:
    """For JSON that is well formed and still cannot be read."""
    deep = isinstance(error, RecursionError)
    found = "brackets in brackets, too many" if deep else "a number of thousands of digits"
    return DataError(f"{where}: malformed JSON: {found}: write the text as a string")


def may_be_cut_off(error: json.JSONDecodeError) -> bool:
    """Whether more text could cure the error: no token but a string is longer than this."""
    return error.msg.startswith("Unterminated") or len(error.doc) - error.pos < TOKEN_CHARACTERS


def finish(reader: Reader) -> None:
    """After the last value of an array: its bracket, and nothing else."""
    if reader.skip() != "]":
        raise DataError(f"{reader.path}:{reader.line}: malformed JSON: the array has no end: add ]")
    reader.move(reader.position + 1)
    if reader.skip():
        raise DataError(
            f"{reader.path}:{reader.line}: malformed JSON: text after the end of the array"
        )
