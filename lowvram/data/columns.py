"""Which columns of a table hold the text."""

from __future__ import annotations

import difflib
from collections.abc import Collection

from lowvram.data.source import Source
from lowvram.errors import DataError

COLUMNS_SHOWN = 20


def find_columns(source: Source, available: Collection[str]) -> tuple[str, ...] | None:
    """(text,) or (prompt, completion), the text column first; None where neither is there."""
    if source.text_column in available:
        return (source.text_column,)
    pair = (source.prompt_column, source.completion_column)
    return pair if all(column in available for column in pair) else None


def columns_of(source: Source, available: Collection[str], where: str) -> tuple[str, ...]:
    """Like `find_columns`, but neither is a DataError that says which columns `where` has."""
    found = find_columns(source, available)
    if found is None:
        raise missing_columns(source, available, where)
    return found


def missing_columns(source: Source, available: Collection[str], where: str) -> DataError:
    names = [str(name) for name in available]
    shown = ", ".join(map(repr, names[:COLUMNS_SHOWN]))
    more = len(names) - COLUMNS_SHOWN
    close = difflib.get_close_matches(source.text_column, names, n=1, cutoff=0.5)
    return DataError(
        f"{where}: no column {source.text_column!r}, nor both {source.prompt_column!r} and "
        f"{source.completion_column!r}. It has {shown or 'none'}"
        + (f" and {more} more. " if more > 0 else ". ")
        + (f"Did you mean {close[0]!r}? " if close else "")
        + "Set data.text_column, or data.prompt_column and data.completion_column"
    )
