"""Data sets of the Hugging Face hub, through `datasets`; nothing here runs code from the hub."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from lowvram.errors import DataError

ROWS_AT_ONCE = 1000


def load_hub(name: str, config: str | None, split: str) -> Any:
    """The downloaded data set, memory-mapped. Raises DataError, with the hub's own words in it."""
    # Imported here: it is slow to import, and most runs read files.
    import datasets

    try:
        return datasets.load_dataset(name, name=config, split=split)
    except Exception as error:  # the hub client raises some twenty unrelated types
        raise DataError(
            f"data.source {name!r}: no such file or directory: {os.path.abspath(name)}, and as "
            f"a hub data set (configuration {config!r}, split {split!r}) it cannot be loaded: "
            f"{type(error).__name__}: {one_line(error)}. {cure(error)}"
        ) from error


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")


def cure(error: Exception) -> str:
    text = str(error)
    if isinstance(error, ConnectionError | TimeoutError) or "offline" in text.lower():
        return (
            "The hub cannot be reached from here: download the data set on another machine "
            "and name its files"
        )
    if "config" in text.lower():
        return "Set data.config to one of those"
    if "split" in text.lower():
        return "Set data.split to one of those"
    if "script" in text.lower():
        return "Such data sets run code of their own: look for a copy of it in Parquet"
    return "Check the spelling of the id; a private data set needs `hf auth login`"


def hub_rows(dataset: Any, columns: tuple[str, ...]) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """Rows with their numbers, from 1, and their values in `columns`."""
    number = 0
    for batch in dataset.select_columns(list(columns)).iter(batch_size=ROWS_AT_ONCE):
        for values in zip(*(batch[column] for column in columns), strict=True):
            number += 1
            yield number, values
