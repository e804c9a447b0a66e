"""Rows of CSV, TSV, JSON, JSON Lines and Parquet files. Nothing is converted: text stays text.

A row is its number (a line, in Parquet a row, from 1) and its values: one, the text, or two, prompt
and completion. A value may still be anything here, None too.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lowvram.data import source as limits
from lowvram.data.columns import columns_of, find_columns, missing_columns
from lowvram.data.json_values import json_values, malformed
from lowvram.data.source import ReadReport, Source, status_of, too_long
from lowvram.data.text import checked_lines, chunks, open_text
from lowvram.errors import DataError

ROWS_AT_ONCE = 256
BUFFER_BYTES = 1 << 20

Row = tuple[int, tuple[Any, ...]]


def read_rows(path: Path, source: Source, report: ReadReport) -> Iterator[Row]:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return parquet_rows(path, source, report)
    if suffix in (".csv", ".tsv"):
        return csv_rows(path, source, report)
    values = json_lines if suffix in (".jsonl", ".ndjson") else json_file
    return json_rows(path, values(path, source.encoding, report), source)


def csv_rows(path: Path, source: Source, report: ReadReport) -> Iterator[Row]:
    # A limit of the whole process, 128 KiB at first; it is read while parsing, so it stays raised.
    csv.field_size_limit(max(csv.field_size_limit(), limits.VALUE_CHARACTERS))
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with open_text(path, source.encoding, report, newline="") as file:
        # strict: an unbalanced quote would otherwise swallow the rest of the file as one field.
        lines = RecordLines(path, checked_lines(file, path))
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        try:
            yield from records(path, reader, lines, source, report)
        except csv.Error as error:
            raise DataError(
                f"{path}:{reader.line_num}: malformed: {error}. A field that begins with a quote "
                "ends with one, and quotes inside it are doubled"
            ) from error


class RecordLines:
    """The lines of a file, as long as those of one record, which quotes may join, are not many."""

    def __init__(self, path: Path, lines: Iterator[str]) -> None:
        self.path = path
        self.lines = lines
        self.number = 0
        self.characters = 0
        """Since the record before."""

    def __iter__(self) -> Iterator[str]:
        for line in self.lines:
            self.number += 1
            self.characters += len(line)
            if self.characters > limits.VALUE_CHARACTERS:
                raise too_long(f"{self.path}:{self.number}", "a record")
            yield line


def records(
    path: Path, reader: Any, lines: RecordLines, source: Source, report: ReadReport
) -> Iterator[Row]:
    header: list[str] = next(reader, [])
    columns = columns_of(source, header, f"{path}: the first line names the columns")
    if len(set(header)) < len(header):
        raise DataError(f"{path}:1: a column name occurs twice: {', '.join(header)}. Rename one")
    places = [header.index(column) for column in columns]
    for fields in reader:
        lines.characters = 0
        if not fields:
            report.blank += 1
        elif len(fields) != len(header):
            raise DataError(
                f"{path}:{reader.line_num}: {len(fields)} fields, but the first line names "
                f"{len(header)}: {', '.join(header)}. A field that holds a tab or a comma that "
                "separates nothing needs quotes around it"
            )
        else:
            yield reader.line_num, tuple(fields[place] for place in places)


def json_lines(path: Path, encoding: str, report: ReadReport) -> Iterator[tuple[int, Any]]:
    with open_text(path, encoding, report) as file:
        for number, line in enumerate(checked_lines(file, path), start=1):
            if line.isspace():
                report.blank += 1
                continue
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{path}:{number}: malformed JSON: {error}. "
                    "In JSON Lines every line is one complete value"
                ) from error
            except (ValueError, RecursionError) as error:
                raise malformed(f"{path}:{number}", error) from error
            yield number, value


def json_file(path: Path, encoding: str, report: ReadReport) -> Iterator[tuple[int, Any]]:
    return json_values(path, chunks(path, encoding, report))


def json_rows(path: Path, values: Iterator[tuple[int, Any]], source: Source) -> Iterator[Row]:
    """Objects reduced to their text, strings as they are. A key that no object has: DataError."""
    rows = found = 0
    keys: dict[str, None] = {}
    for number, value in values:
        if isinstance(value, str):
            yield number, (value,)
            continue
        if not isinstance(value, dict):
            raise DataError(
                f"{path}:{number}: expected an object or a string, found "
                f"{type(value).__name__}: write each example as {{{source.text_column!r}: ...}}"
            )
        columns = find_columns(source, value)
        rows, found = rows + 1, found + (columns is not None)
        keys.update(dict.fromkeys(value) if not found else {})
        yield number, tuple(value[column] for column in columns) if columns else (None,)
    if rows and not found:
        raise missing_columns(source, keys, str(path))


def parquet_rows(path: Path, source: Source, report: ReadReport) -> Iterator[Row]:
    # Imported here: only those who read such files have to wait for it.
    import pyarrow
    import pyarrow.parquet

    number, size_bytes = 0, status_of(path).st_size
    try:
        # With a buffer, column chunks are streamed; without one, whole row groups are loaded.
        with pyarrow.parquet.ParquetFile(path, buffer_size=BUFFER_BYTES) as file:
            columns = columns_of(source, file.schema_arrow.names, str(path))
            already, total = report.bytes_read, max(1, file.metadata.num_rows)
            for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, columns=list(columns)):
                for values in zip(*(batch[column].to_pylist() for column in columns), strict=True):
                    number += 1
                    yield number, values
                report.bytes_read = already + size_bytes * number // total
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise DataError(f"{path}: cannot be read as Parquet: {error}. Write it again") from error
    report.files += 1
