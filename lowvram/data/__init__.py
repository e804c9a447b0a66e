"""Text to batches: sources, documents, tokens, a split, blocks, batches, in this order.

It takes plain arguments and knows neither recipes nor models. Everything before `batches` is numpy
on memory-mapped files, so that the size of a data set is limited by the disk.
"""

from __future__ import annotations

from lowvram.data.batches import IGNORED, Batch, make_batch, steps_per_epoch, windows
from lowvram.data.blocks import Blocks, pack
from lowvram.data.cache import cache_directory
from lowvram.data.documents import read_pieces
from lowvram.data.files import resolve
from lowvram.data.source import FORMATS, Origin, Piece, ReadReport, Source
from lowvram.data.split import Split, split_documents
from lowvram.data.store import TokenStore
from lowvram.data.tokens import tokenize

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
    "make_batch",
    "pack",
    "read_pieces",
    "resolve",
    "split_documents",
    "steps_per_epoch",
    "tokenize",
    "windows",
]
