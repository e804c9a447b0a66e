r"""Long documents in pieces whose tokens, one after the other, are the tokens of the whole.

A byte-level BPE first splits a text into pre-tokens and then encodes each by itself, so a text may
be cut wherever a pre-token ends. Two places are such in the pre-tokenizers of both GPT-2 and
Llama 3, whatever surrounds them:

- before a space that a character other than white space follows;
- after a newline that stands between two characters other than white space.

After just any newline would be wrong: GPT-2 reads the middle of "a\n\nb" as two pre-tokens, but
the end of "a\n\n" as one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from lowvram.data.source import Piece
from lowvram.errors import DataError

PIECE_CHARACTERS = 1 << 11
"""The tokenizer is at its fastest with texts of about this size, and takes a quarter longer for
those of 16,000 characters."""
STRETCH_CHARACTERS = 1 << 25
"""Of a text that is tokenised in one go, for which a tokenizer takes 130 bytes a character."""
CUT = re.compile(r"(?= \S)|(?<=\S\n)(?=\S)")


class LongStretch(DataError):
    """Of which file is for the reader to add."""


def pieces_of(prompt: str, text: str, split_long: bool) -> Iterator[Piece]:
    if prompt:
        for part in parts([prompt], split_long):
            yield Piece(part, end=False, prompt=True)
    yield from with_end(parts([text], split_long))


def with_end(texts: Iterable[str]) -> Iterator[Piece]:
    """The parts of one document as pieces, of which the last ends it."""
    waiting = None
    for text in texts:
        if waiting is not None:
            yield Piece(waiting, end=False)
        waiting = text
    if waiting is not None:
        yield Piece(waiting)


def parts(chunks: Iterable[str], split_long: bool = True) -> Iterator[str]:
    """The text that the chunks make together, cut where that is allowed once a part is long."""
    unread, searched = "", 0
    for chunk in chunks:
        unread += chunk
        start = 0
        while split_long and (cut := CUT.search(unread, max(searched, start + PIECE_CHARACTERS))):
            yield stretch(unread[start : cut.start()])
            start = cut.start()
        # Without a place to cut, the part grows; what was searched is not searched again.
        unread = stretch(unread[start:])
        searched = len(unread) - 2
    if unread:
        yield unread


def stretch(text: str) -> str:
    """The text, if a tokenizer can take it as a whole."""
    if len(text) > STRETCH_CHARACTERS:
        raise LongStretch(
            f"a text that begins {text[:40]!r} goes on for more than {STRETCH_CHARACTERS:,} "
            "characters without a place where the tokenizer lets it be cut: break it into lines, "
            "and set data.format: lines"
        )
    return text
