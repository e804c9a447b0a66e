"""From a source to its token store: read, tokenise and write in one stream, once for all runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lowvram.data.cache import cache_directory, cache_key, make_entry, open_entry
from lowvram.data.documents import read_pieces
from lowvram.data.encoder import Encoder
from lowvram.data.files import resolve
from lowvram.data.source import Origin, Piece, ReadReport, Source
from lowvram.data.store import StoreWriter, TokenStore
from lowvram.errors import DataError

BATCH_CHARACTERS = 1 << 21
BATCH_PIECES = 1 << 14
BATCHES_AHEAD = 2


def tokenize(
    source: Source,
    tokenizer: Any,
    *,
    cache_dir: Path | None = None,
    append_eos: bool = True,
    allow_special_tokens: bool = False,
    progress: Callable[[int, int | None], None] | None = None,
) -> TokenStore:
    """The tokens of all documents of a source, from the cache if it has them.

    A document is what the tokenizer itself puts in front of a text, the tokens of the text, and
    with `append_eos` the end-of-sequence token. Text that spells a special token is tokenised as
    the characters that it is, unless `allow_special_tokens`. `progress` is told the bytes read and
    the bytes in all, None where that is unknown. Raises DataError.
    """
    encoder = Encoder(tokenizer, append_eos, allow_special_tokens)
    report = ReadReport()
    origins = resolve(source, report)
    key = cache_key(source, origins, encoder.key())
    entry = (cache_dir or cache_directory()) / key
    found = open_entry(entry, cached=True)
    if found is not None:
        return found
    total_bytes = size_bytes(origins)

    def tell() -> None:
        if progress is not None:
            progress(report.bytes_read, total_bytes)

    def fill(directory: Path) -> None:
        pieces = read_pieces(source, report, split_long=encoder.may_split, origins=origins)
        write_store(directory, pieces, encoder, report, tell)
        if cache_key(source, origins, encoder.key()) != key:
            raise DataError(
                f"data.source {', '.join(source.names)}: was changed while it was read: start again"
            )

    return make_entry(entry, fill)


def size_bytes(origins: list[Origin]) -> int | None:
    """Bytes of all files; None as soon as one origin is no file."""
    sizes = [origin.size_bytes for origin in origins]
    known = [size for size in sizes if size is not None]
    return sum(known) if len(known) == len(sizes) else None


def write_store(
    directory: Path,
    pieces: Iterable[Piece],
    encoder: Encoder,
    report: ReadReport,
    tell: Callable[[], None],
) -> None:
    writer = StoreWriter(directory, encoder.vocabulary_size)
    text_tokens, at_start = 0, True
    try:
        for batch, tokens in encoded(batches(pieces), encoder):
            for piece, ids in zip(batch, tokens, strict=True):
                front = encoder.prefix if at_start else []
                back = encoder.suffix if piece.end else []
                writer.add(piece.text, front + ids + back, piece.prompt)
                if piece.end:
                    writer.end()
                text_tokens, at_start = text_tokens + len(ids), piece.end
            tell()
        if text_tokens == 0:
            raise no_tokens(report, encoder)
        writer.finish(report)
    finally:
        writer.close()


def no_tokens(report: ReadReport, encoder: Encoder) -> DataError:
    return DataError(
        f"the tokenizer makes no token of {report.documents:,} documents; its vocabulary has "
        f"{encoder.vocabulary_size:,} entries: load it from the directory of a tokenizer"
    )


def encoded(
    batches: Iterable[list[Piece]], encoder: Encoder
) -> Iterator[tuple[list[Piece], list[list[int]]]]:
    """Each batch with its tokens; while one is being written, the next ones are tokenised.

    There are two, so that no core waits for the last text of one of them.
    """
    with ThreadPoolExecutor(max_workers=BATCHES_AHEAD) as pool:
        jobs: deque[tuple[list[Piece], Future[list[list[int]]]]] = deque()
        for batch in batches:
            jobs.append((batch, pool.submit(encoder.encode, [piece.text for piece in batch])))
            if len(jobs) > BATCHES_AHEAD:
                done, job = jobs.popleft()
                yield done, job.result()
        while jobs:
            done, job = jobs.popleft()
            yield done, job.result()


def batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Enough at a time for all threads of the tokenizer, of which a text is the work of one, and
    little memory; the tokenizer takes about a kilobyte even for a text of one character."""
    batch: list[Piece] = []
    characters = 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece.text)
        if characters >= BATCH_CHARACTERS or len(batch) == BATCH_PIECES:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
