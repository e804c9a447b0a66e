"""Packing: documents cut to the sequence length and put together to rows.

A document longer than a row becomes consecutive segments, without overlap. What could never be a
target is left out and counted, everything else is in exactly one row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lowvram.data.bins import best_fit
from lowvram.data.store import TokenStore

Int64 = NDArray[np.int64]
Int32 = NDArray[np.int32]


@dataclass(frozen=True, kw_only=True, eq=False)
class Blocks:
    """r rows of n segments: stretches of one document, whose first token is never a target."""

    store: TokenStore
    max_seq_len: int
    starts: Int64  # (n,) of segments, in store.tokens; segments of a row follow each other
    lengths: Int32  # (n,) of segments, 2 .. max_seq_len
    documents: Int64  # (n,) which document each segment is of
    ignored: Int32  # (n,) tokens at the front of each segment that are no targets, 1 or more
    row_starts: Int64  # (r + 1,) row i is segments row_starts[i] .. row_starts[i + 1] - 1
    row_lengths: Int32  # (r,) tokens in each row
    tokens: int
    """In all rows."""
    targets: int
    """Tokens of all rows that are predicted and count in the loss."""
    dropped_tokens: int
    """Tokens of the documents that are in no row: alone in a segment, or prompts without text."""

    def __len__(self) -> int:
        return len(self.row_lengths)

    def row(self, i: int) -> list[tuple[int, int, int]]:
        """(start in store.tokens, length, document) of each segment of a row."""
        part = slice(int(self.row_starts[i]), int(self.row_starts[i + 1]))
        arrays = (self.starts[part], self.lengths[part], self.documents[part])
        return list(zip(*(array.tolist() for array in arrays), strict=True))


def pack(
    store: TokenStore,
    documents: Int64,
    *,
    max_seq_len: int,
    packing: bool,
    seed: int,
    completion_only: bool = False,
) -> Blocks:
    """Rows of at most `max_seq_len` tokens from these documents, in an order drawn with `seed`.

    With `packing` short segments share rows (best fit decreasing, which fills nearly all of a row);
    without it every segment has a row of its own. With `completion_only` tokens of prompts are in
    the rows but are no targets. Tokens of rows = tokens of documents - dropped_tokens.
    """
    shuffled = np.random.default_rng(seed).permutation(documents)
    owner, offsets, lengths = cut(store.lengths(shuffled), max_seq_len)
    ids = shuffled[owner]
    ignored = np.ones(len(ids), np.int64)
    if completion_only:
        ignored = np.maximum(store.prompt_lengths[ids] - offsets, ignored)
    useful = lengths > ignored
    dropped_tokens = int(lengths[~useful].sum())
    ids, offsets, lengths, ignored = (a[useful] for a in (ids, offsets, lengths, ignored))
    rows = best_fit(lengths, max_seq_len) if packing else np.arange(len(ids))
    order = np.argsort(rows, kind="stable")
    row_starts = np.searchsorted(rows[order], np.arange(rows.max(initial=-1) + 2))
    ends = np.concatenate(([0], np.cumsum(lengths[order])))
    return Blocks(
        store=store,
        max_seq_len=max_seq_len,
        starts=(store.starts[ids] + offsets)[order],
        lengths=lengths[order].astype(np.int32),
        documents=ids[order],
        ignored=ignored[order].astype(np.int32),
        row_starts=row_starts,
        row_lengths=np.diff(ends[row_starts]).astype(np.int32),
        tokens=int(lengths.sum()),
        targets=int((lengths - ignored).sum()),
        dropped_tokens=dropped_tokens,
    )


def cut(lengths: Int64, max_seq_len: int) -> tuple[Int64, Int64, Int64]:
    """Segments of documents of these lengths: whose, from which of its tokens on, how many.

    A last token that would be alone, mostly the end-of-text, takes the one before it along: alone
    it could not be a target, and documents of such lengths would never learn to end.
    """
    counts = -(-lengths // max_seq_len)
    owner = np.repeat(np.arange(len(lengths)), counts)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    offsets = (np.arange(len(owner)) - first) * max_seq_len
    sizes = np.minimum(lengths[owner] - offsets, max_seq_len)
    if max_seq_len > 2:
        alone = np.flatnonzero((sizes == 1) & (offsets > 0))
        sizes[alone - 1] -= 1
        offsets[alone] -= 1
        sizes[alone] += 1
    return owner, offsets, sizes
