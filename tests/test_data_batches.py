"""Batches: labels and positions to the letter, windows without a lost row."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lowvram.data import (
    IGNORED,
    Batch,
    Blocks,
    ReadReport,
    TokenStore,
    make_batch,
    pack,
    steps_per_epoch,
    windows,
)

EOS = 99
PAD = EOS


def make_blocks(
    documents: list[list[int]], prompt_lengths: list[int] | None = None, **options: Any
) -> Blocks:
    n = len(documents)
    store = TokenStore(
        tokens=np.array(sum(documents, []), np.uint16),
        starts=np.cumsum([0, *(len(document) for document in documents)]),
        prompt_lengths=np.array(prompt_lengths or [0] * n, np.int32),
        hashes=np.arange(n, dtype=np.uint64),
        byte_counts=np.ones(n, np.int64),
        word_counts=np.ones(n, np.int64),
        report=ReadReport(documents=n),
        sha256="",
    )
    options = {"max_seq_len": 8, "packing": False, "seed": 0, **options}
    return pack(store, np.arange(n), **options)


def rows_of(blocks: Blocks, *documents: int) -> np.ndarray:
    """The rows that begin with these documents."""
    first = [blocks.row(i)[0][2] for i in range(len(blocks))]
    return np.array([first.index(document) for document in documents])


def run(blocks: Blocks, **options: Any) -> list[list[Batch]]:
    options = {"epoch": 0, "global_batch_size": 4, "micro_batch_size": 1, "seed": 0, **options}
    return list(windows(blocks, pad_token_id=PAD, **options))


def test_padding_is_not_mistaken_for_the_end_of_a_document() -> None:
    blocks = make_blocks([[5, 6, EOS], [1, 2, 3, 4, 5, EOS]])
    batch = make_batch(blocks, rows_of(blocks, 0, 1), pad_token_id=PAD)
    assert batch.input_ids.tolist() == [[5, 6, EOS, PAD, PAD, PAD], [1, 2, 3, 4, 5, EOS]]
    assert batch.labels.tolist() == [
        [IGNORED, 6, EOS, IGNORED, IGNORED, IGNORED],
        [IGNORED, 2, 3, 4, 5, EOS],
    ]
    assert int((batch.labels == EOS).sum()) == 2
    assert batch.position_ids is None
    assert (batch.tokens, batch.target_tokens) == (9, 7)
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64


def test_packed_rows_restart_positions_and_hide_first_tokens() -> None:
    blocks = make_blocks([[1, 2, 3, 4, EOS], [5, 6, EOS], [7, 8]], packing=True)
    batch = make_batch(blocks, rows_of(blocks, 0, 2), pad_token_id=PAD)
    assert batch.input_ids.tolist() == [
        [1, 2, 3, 4, EOS, 5, 6, EOS],
        [7, 8, PAD, PAD, PAD, PAD, PAD, PAD],
    ]
    assert batch.labels.tolist() == [
        [IGNORED, 2, 3, 4, EOS, IGNORED, 6, EOS],
        [IGNORED, 8, *[IGNORED] * 6],
    ]
    assert batch.position_ids is not None
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 0, 1, 2, 3, 4, 5]]
    assert (batch.tokens, batch.target_tokens) == (10, 5 - 1 + 3 - 1 + 2 - 1)


def test_prompts_are_no_labels() -> None:
    documents = [[1, 2, 3, 4, EOS], [5, 6, 7, 8, 9, 10, 11, 12, 13, 14]]
    blocks = make_blocks(documents, [3, 9], max_seq_len=10, completion_only=True)
    batch = make_batch(blocks, rows_of(blocks, 0, 1), pad_token_id=PAD)
    assert batch.labels.tolist() == [
        [IGNORED, IGNORED, IGNORED, 4, EOS, *[IGNORED] * 5],
        [*[IGNORED] * 9, 14],
    ]
    assert batch.target_tokens == 3
    everything = make_blocks(documents, [3, 9], max_seq_len=10)
    assert everything.targets == 4 + 9


def test_moving_a_batch() -> None:
    blocks = make_blocks([[1, 2, 3], [4, 5]], packing=True)
    batch = make_batch(blocks, np.array([0]), pad_token_id=PAD)
    moved = batch.to("meta")
    assert moved.position_ids is not None
    assert {moved.input_ids.device.type, moved.labels.device.type} == {"meta"}
    assert moved.position_ids.device.type == "meta"
    assert (moved.tokens, moved.target_tokens) == (batch.tokens, batch.target_tokens)


def test_the_last_window_of_an_epoch_is_smaller() -> None:
    blocks = make_blocks([[i, i, EOS] for i in range(10)])
    assert [len(window) for window in run(blocks)] == [4, 4, 2]
    assert steps_per_epoch(blocks, 4) == 3
    assert steps_per_epoch(blocks, 5) == 2
    sizes = [[len(b.input_ids) for b in window] for window in run(blocks, micro_batch_size=3)]
    assert sizes == [[3, 1], [3, 1], [2]]


@pytest.mark.parametrize("packing", [True, False])
def test_every_row_comes_once_an_epoch(packing: bool) -> None:
    generator = np.random.default_rng(0)
    documents = [[i] * int(generator.integers(1, 20)) for i in range(50)]
    blocks = make_blocks(documents, packing=packing)
    for micro in (1, 3, 4):
        batches = [batch for window in run(blocks, micro_batch_size=micro) for batch in window]
        assert sum(batch.tokens for batch in batches) == blocks.tokens
        assert sum(batch.target_tokens for batch in batches) == blocks.targets
        for batch in batches:
            assert batch.target_tokens == int((batch.labels[:, 1:] != IGNORED).sum())
        counts = np.bincount(
            np.concatenate([b.labels[b.labels != IGNORED].numpy() for b in batches])
        )
        expected = [sum(i % 8 != 0 for i in range(len(document))) for document in documents]
        assert counts.tolist() == expected[: len(counts)]


def test_micro_batches_change_nothing_but_their_size() -> None:
    generator = np.random.default_rng(1)
    blocks = make_blocks([[i] * int(generator.integers(2, 9)) for i in range(30)])

    def rows(micro: int) -> list[list[list[int]]]:
        """The targets of every row, window by window, in their order."""
        return [
            [row[row != IGNORED].tolist() for batch in window for row in batch.labels]
            for window in run(blocks, micro_batch_size=micro, global_batch_size=8)
        ]

    assert rows(1) == rows(3) == rows(8)
    for window in rows(1):
        lengths = [len(row) for row in window]
        assert lengths == sorted(lengths, reverse=True)


def test_order_depends_on_seed_and_epoch_and_can_be_resumed() -> None:
    blocks = make_blocks([[i, i] for i in range(40)])

    def order(**options: Any) -> list[list[list[int]]]:
        return [[b.input_ids.tolist() for b in window] for window in run(blocks, **options)]

    assert order() == order()
    assert order() != order(epoch=1)
    assert order() != order(seed=1)
    for start in (0, 3, 10):
        assert order(start=start) == order()[start:]


@pytest.mark.gpu
def test_to_a_card() -> None:
    blocks = make_blocks([[1, 2, 3], [4, 5]], packing=True)
    batch = make_batch(blocks, np.array([0]), pad_token_id=PAD)
    moved = batch.to("cuda")
    assert moved.input_ids.is_cuda
    assert moved.labels.tolist() == batch.labels.tolist()
