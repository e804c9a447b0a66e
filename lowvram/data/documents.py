"""Documents: from a source to the pieces of text that are tokenised, in a stream.

Of a file no more is in memory than one line, row or paragraph; with `split_long`, which the
tokenizer has to allow (see `pieces`), of a line or a file read as one document no more than what
lies between two places to cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from lowvram.data import text
from lowvram.data.columns import columns_of
from lowvram.data.files import TABLES, resolve
from lowvram.data.hub import hub_rows
from lowvram.data.pieces import PIECE_CHARACTERS, LongStretch, parts, pieces_of, with_end
from lowvram.data.reference import reference_documents, reference_topics
from lowvram.data.source import Origin, Piece, ReadReport, Source
from lowvram.data.tables import Row, read_rows
from lowvram.errors import DataError

TEXT_READERS = {
    "auto": text.lines,
    "lines": text.lines,
    "paragraphs": text.paragraphs,
    "document": text.document,
}


def read_pieces(
    source: Source,
    report: ReadReport,
    *,
    split_long: bool,
    origins: list[Origin] | None = None,
) -> Iterator[Piece]:
    """All documents of a source as pieces, counted in `report`.

    `origins` is what `resolve(source, report)` gave, if that has been asked before. Raises
    DataError for what cannot be read, and in the end if there was no document at all.
    """
    for origin in resolve(source, report) if origins is None else origins:
        try:
            yield from origin_pieces(origin, source, report, split_long)
        except LongStretch as error:
            raise DataError(f"{origin.name}: {error}") from error
    if report.documents == 0:
        raise DataError(
            f"data.source {', '.join(source.names)}: there is no text in it: {report}. "
            "Give a source with at least one text"
        )


def origin_pieces(
    origin: Origin, source: Source, report: ReadReport, split_long: bool
) -> Iterator[Piece]:
    if streams(origin, source, split_long):
        assert origin.path is not None
        yield from STREAMS[source.format](origin.path, source.encoding, report)
        return
    for prompt, completion in examples(origin, source, report):
        if not completion or completion.isspace():
            report.blank += 1
            continue
        report.documents += 1
        yield from pieces_of(prompt, completion, split_long)


def streams(origin: Origin, source: Source, split_long: bool) -> bool:
    """Whether lines or a file may be cut where they are long; a separator has to be looked for."""
    is_text = origin.path is not None and origin.path.suffix.lower() not in TABLES
    return is_text and source.format in STREAMS and split_long and source.separator is None


def stream_document(path: Path, encoding: str, report: ReadReport) -> Iterator[Piece]:
    """One file as the pieces of one document."""
    yield from document_of(text.chunks(path, encoding, report), report)


def stream_lines(path: Path, encoding: str, report: ReadReport) -> Iterator[Piece]:
    """A document a line."""
    found = text.line_parts(path, encoding, report)
    for part in found:
        if part.endswith("\n") and len(part) <= PIECE_CHARACTERS and not part.isspace():
            report.documents += 1
            yield Piece(part[:-1])
        else:
            yield from document_of(rest_of_line(part, found), report)


def rest_of_line(part: str, following: Iterator[str]) -> Iterator[str]:
    """A line of several parts from its first; its line end is left out."""
    while not part.endswith("\n"):
        yield part
        part = next(following, "\n")
    yield part[:-1]


def document_of(chunks: Iterable[str], report: ReadReport) -> Iterator[Piece]:
    """A document as pieces, or as nothing if it is blank."""
    seen = False
    for piece in with_end(parts(chunks)):
        if piece.end and not seen and piece.text.isspace():
            break
        report.documents += not seen
        seen = True
        yield piece
    report.blank += not seen


STREAMS = {"auto": stream_lines, "lines": stream_lines, "document": stream_document}


def examples(origin: Origin, source: Source, report: ReadReport) -> Iterator[tuple[str, str]]:
    """(prompt, completion) of each document; the prompt is empty where there is none."""
    if origin.dataset is not None:
        columns = columns_of(source, origin.dataset.column_names, f"data set {origin.name}")
        rows = hub_rows(origin.dataset, columns)
        yield from row_examples(rows, f"data set {origin.name}, row ", source, report)
    elif origin.path is None:
        texts: Iterable[str] = reference_documents(reference_topics())
        yield from divided(texts, source.separator, report)
    elif origin.path.suffix.lower() in TABLES:
        parquet = origin.path.suffix.lower() == ".parquet"
        where = f"{origin.path}, row " if parquet else f"{origin.path}:"
        yield from row_examples(read_rows(origin.path, source, report), where, source, report)
    else:
        read = TEXT_READERS[source.format]
        texts = read(origin.path, source.encoding, report)
        yield from divided(texts, source.separator, report)


def divided(
    texts: Iterable[str], separator: str | None, report: ReadReport
) -> Iterator[tuple[str, str]]:
    for whole in texts:
        yield divide(whole, separator, report)


def divide(whole: str, separator: str | None, report: ReadReport) -> tuple[str, str]:
    if separator is None or not whole or whole.isspace():
        return "", whole
    head, found, tail = whole.partition(separator)
    if not found:
        report.without_separator += 1
        return "", whole
    return head + found, tail


def row_examples(
    rows: Iterable[Row], where: str, source: Source, report: ReadReport
) -> Iterator[tuple[str, str]]:
    """Rows without text are counted; a value of another type is a DataError with its place."""
    for number, values in rows:
        if values[-1] is None:
            report.nulls += 1
            continue
        for value in values:
            check_text(value, f"{where}{number}")
        if len(values) == 1:
            yield divide(values[0], source.separator, report)
        else:
            yield values[0] or "", values[1]


def check_text(value: object, where: str) -> None:
    if value is None:  # a prompt may be missing
        return
    if not isinstance(value, str):
        raise DataError(
            f"{where}: the text is {shown(value)}, of type {type(value).__name__}: "
            "write it as a string"
        )
    if "\0" in value:
        raise DataError(f"{where}: a NUL character in the text: remove it")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can name them: "\ud83d"
        raise DataError(
            f"{where}: half of a surrogate pair in the text, which is no character: "
            "write both halves, or the character itself"
        ) from None


def shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
