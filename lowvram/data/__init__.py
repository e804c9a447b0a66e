"""Text to batches: sources, documents, tokens, a split, blocks, batches, in this order.

It takes plain arguments and knows neither recipes nor models. Everything before `batches` is numpy
on memory-mapped files, so that the size of a data set is limited by the disk.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowvram.data.batches import IGNORED, Batch, make_batch, steps_per_epoch, windows
    from lowvram.data.blocks import Blocks, pack
    from lowvram.data.cache import cache_directory
    from lowvram.data.documents import read_pieces
    from lowvram.data.files import check_names, resolve
    from lowvram.data.source import FORMATS, Origin, Piece, ReadReport, Source
    from lowvram.data.split import Split, split_documents
    from lowvram.data.store import TokenStore
    from lowvram.data.tokens import tokenize

_HOMES = {
    "FORMATS": "source",
    "IGNORED": "batches",
    "Batch": "batches",
    "Blocks": "blocks",
    "Origin": "source",
    "Piece": "source",
    "ReadReport": "source",
    "Source": "source",
    "Split": "split",
    "TokenStore": "store",
    "cache_directory": "cache",
    "check_names": "files",
    "make_batch": "batches",
    "pack": "blocks",
    "read_pieces": "documents",
    "resolve": "files",
    "split_documents": "split",
    "steps_per_epoch": "batches",
    "tokenize": "tokens",
    "windows": "batches",
}

__all__ = [
    "FORMATS",
    "IGNORED",
    "Batch",
    "Blocks",
    "Origin",
    "Piece",
    "ReadReport",
    "Source",
    "Split",
    "TokenStore",
    "cache_directory",
    "check_names",
    "make_batch",
    "pack",
    "read_pieces",
    "resolve",
    "split_documents",
    "steps_per_epoch",
    "tokenize",
    "windows",
]


def __getattr__(name: str) -> Any:
    """Only batches need torch, so that what cannot be read is told before it is imported."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
