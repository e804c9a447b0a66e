"""The embedded text: the language reference that every CPython ships for its `help()`.

It needs no file and no network, and it is under the Python licence. Its topics overlap: one can be
wholly contained in another. Here no paragraph comes twice, so that documents kept for validation
share nothing with those trained on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from lowvram.errors import DataError

MIN_CHARACTERS = 400
"""Topics with less than this left are dropped: headings whose text is in a larger topic."""
MAX_CHARACTERS = 8000
"""Longer topics become several documents, so that a tenth of all documents is a fair sample."""
HEADING_CHARACTERS = 3000
"""From this length on a document ends before the next heading."""
LONG_LINE = 60
"""Lines of at least this many characters are never in two documents either."""

BLANK_LINES = re.compile(r"\n\s*\n")
HEADING = re.compile(r".+\n([=*\-~^\"#+])\1+$")


def reference_topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError(
            "this Python has no module pydoc_data.topics (some distributions leave it out), so "
            "embedded:python-reference is not there: use a Python from python.org, conda or uv, "
            "or a file of your own as data.source"
        ) from error
    return dict(topics)


def reference_documents(topics: dict[str, str]) -> Iterator[str]:
    """The documents, those of the largest topic first."""
    seen: set[str] = set()
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        paragraphs = new_paragraphs(topics[name], seen)
        if sum(map(len, paragraphs)) >= MIN_CHARACTERS:
            yield from divided(paragraphs)


def new_paragraphs(text: str, seen: set[str]) -> list[str]:
    """Paragraphs of which neither the whole nor a long line is in `seen`, which they join."""
    new = []
    for paragraph in BLANK_LINES.split(text.strip("\n")):
        lines = (" ".join(line.split()) for line in paragraph.splitlines())
        marks = {" ".join(paragraph.split()), *(line for line in lines if len(line) >= LONG_LINE)}
        if marks.isdisjoint(seen):
            new.append(paragraph)
        seen |= marks
    return new


def divided(paragraphs: list[str]) -> Iterator[str]:
    """Documents of at most MAX_CHARACTERS, or of one longer paragraph, cut before headings."""
    collected: list[str] = []
    size = 0
    for paragraph in paragraphs:
        is_full = size + len(paragraph) > MAX_CHARACTERS
        if collected and (is_full or (size >= HEADING_CHARACTERS and HEADING.match(paragraph))):
            yield "\n\n".join(collected)
            collected, size = [], 0
        collected.append(paragraph)
        size += len(paragraph) + 2
    if collected:
        yield "\n\n".join(collected)
