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

PIECE_CHARACTERS = 1 << 11
"""The tokenizer is at its fastest with texts of about this size, and takes a quarter longer for
those of 16,000 characters."""
CUT = re.compile(r"(?= \S)|(?<=\S\n)(?=\S)")


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
            yield unread[start : cut.start()]
            start = cut.start()
        # Without a place to cut, the part grows; what was searched is not searched again.
        unread = unread[start:]
        searched = len(unread) - 2
    if unread:
        yield unread
