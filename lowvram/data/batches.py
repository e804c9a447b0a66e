"""Rows to tensors: micro-batches, and the windows of them that make one optimizer step.

Shapes: b rows of s tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from lowvram.data.blocks import Blocks

IGNORED = -100
"""The label of what is no target, as in Hugging Face's models and torch's cross entropy."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one forward pass gets. It is padded on the right and needs no attention mask."""

    input_ids: torch.Tensor  # (b, s) int64
    labels: torch.Tensor  # (b, s) int64, the token at the same place or -100; the loss shifts them
    position_ids: torch.Tensor | None  # (b, s) int64, from 0 in each segment; the padding is one
    """None when no row holds more than one segment: positions then are 0 .. s - 1."""
    target_tokens: int
    """Labels that are not -100; the first of a row never is one."""
    tokens: int
    """Without padding."""

    def to(self, device: torch.device | str) -> Batch:
        return Batch(
            input_ids=move(self.input_ids, torch.device(device)),
            labels=move(self.labels, torch.device(device)),
            position_ids=None
            if self.position_ids is None
            else move(self.position_ids, torch.device(device)),
            target_tokens=self.target_tokens,
            tokens=self.tokens,
        )


def move(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """To a card from pinned memory, so that the copy does not wait for the step before it."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def make_batch(blocks: Blocks, rows: NDArray[np.int64], pad_token_id: int) -> Batch:
    """These rows, padded to the longest of them.

    Padding is known by length, never by its id: a document's last token is a target even where
    the padding token is the end-of-sequence token.
    """
    row_lengths = blocks.row_lengths[rows]
    width = int(row_lengths.max())
    segments = np.concatenate([np.arange(*blocks.row_starts[row : row + 2]) for row in rows])
    lengths = blocks.lengths[segments]
    places = np.repeat(np.arange(len(rows)), row_lengths)  # (tokens,) row of each token
    columns = counted(row_lengths)  # (tokens,) place of each token in its row
    positions = counted(lengths)  # (tokens,) place of each token in its segment
    ids = blocks.store.tokens[np.repeat(blocks.starts[segments], lengths) + positions]

    input_ids = np.full((len(rows), width), pad_token_id, np.int64)
    labels = np.full((len(rows), width), IGNORED, np.int64)
    position_ids = np.arange(width) - row_lengths[:, None].astype(np.int64)
    is_target = positions >= np.repeat(blocks.ignored[segments], lengths)
    input_ids[places, columns] = ids
    labels[places[is_target], columns[is_target]] = ids[is_target]
    position_ids[places, columns] = positions
    packed = len(segments) > len(rows)
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        labels=torch.from_numpy(labels),
        position_ids=torch.from_numpy(position_ids) if packed else None,
        target_tokens=int(is_target.sum()),
        tokens=len(ids),
    )


def counted(lengths: NDArray[np.int32]) -> NDArray[np.int64]:
    """0, 1, 2, ... anew for each length: [2, 3] gives [0, 1, 0, 1, 2]."""
    ends = np.cumsum(lengths, dtype=np.int64)
    return np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)


def steps_per_epoch(blocks: Blocks, global_batch_size: int) -> int:
    """Optimizer steps that see every row once; the last may have fewer rows."""
    return -(-len(blocks) // global_batch_size)


def windows(
    blocks: Blocks,
    *,
    epoch: int,
    global_batch_size: int,
    micro_batch_size: int,
    seed: int,
    pad_token_id: int,
    start: int = 0,
) -> Iterator[list[Batch]]:
    """The micro-batches of each optimizer step of an epoch, from step `start` of it on.

    Rows come in an order drawn from seed and epoch; which rows make a step depends on
    `global_batch_size` only. Within a step the longest rows come first, so that rows of like length
    share padding and the largest batch is met at once. What is left at the end is a smaller step.
    """
    order = np.random.default_rng([seed, epoch]).permutation(len(blocks))
    for first in range(start * global_batch_size, len(blocks), global_batch_size):
        rows = order[first : first + global_batch_size]
        rows = rows[np.argsort(-blocks.row_lengths[rows], kind="stable")]
        yield [
            make_batch(blocks, rows[i : i + micro_batch_size], pad_token_id)
            for i in range(0, len(rows), micro_batch_size)
        ]
