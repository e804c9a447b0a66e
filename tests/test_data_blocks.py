"""Packing: every token in exactly one place, rows nearly full, no target across a border."""

from __future__ import annotations

import numpy as np
import pytest

from lowvram.data import Blocks, ReadReport, TokenStore, pack
from lowvram.data.bins import best_fit


def make_store(lengths: list[int], prompt_lengths: list[int] | None = None) -> TokenStore:
    """Documents of these lengths; every token is its place in the store."""
    n = len(lengths)
    return TokenStore(
        tokens=np.arange(sum(lengths), dtype=np.uint32),
        starts=np.cumsum([0, *lengths]),
        prompt_lengths=np.array(prompt_lengths or [0] * n, np.int32),
        hashes=np.arange(n, dtype=np.uint64),
        byte_counts=np.ones(n, np.int64),
        word_counts=np.ones(n, np.int64),
        report=ReadReport(documents=n),
        sha256="",
    )


def all_of(store: TokenStore) -> np.ndarray:
    return np.arange(len(store))


def places(blocks: Blocks) -> list[int]:
    """Places in the store of all tokens of all rows, in the order of the rows."""
    rows = (blocks.row(i) for i in range(len(blocks)))
    return [place for row in rows for start, n, _ in row for place in range(start, start + n)]


def pieces(length: int, max_seq_len: int) -> list[tuple[int, int]]:
    """(offset, length) of a document's pieces, by hand: no last token is alone if it need not."""
    found = [(at, min(max_seq_len, length - at)) for at in range(0, length, max_seq_len)]
    if len(found) > 1 and found[-1][1] == 1 and max_seq_len > 2:
        (before, n), (last, _) = found[-2:]
        found[-2:] = [(before, n - 1), (last - 1, 2)]
    return found


def random_lengths(seed: int) -> tuple[list[int], list[int], int]:
    generator = np.random.default_rng(seed)
    n, longest = int(generator.integers(1, 60)), int(generator.integers(1, 100))
    lengths = generator.integers(1, longest + 1, n)
    prompts = generator.integers(0, lengths + 1)
    return lengths.tolist(), prompts.tolist(), int(generator.integers(2, 40))


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("completion_only", [True, False])
def test_nothing_is_lost_and_nothing_comes_twice(
    seed: int, packing: bool, completion_only: bool
) -> None:
    lengths, prompts, max_seq_len = random_lengths(seed)
    store = make_store(lengths, prompts)
    blocks = pack(
        store,
        all_of(store),
        max_seq_len=max_seq_len,
        packing=packing,
        seed=seed,
        completion_only=completion_only,
    )
    found = places(blocks)
    assert len(set(found)) == len(found) == blocks.tokens
    assert blocks.tokens + blocks.dropped_tokens == sum(lengths)

    targets = 0
    for i in range(len(blocks)):
        row = blocks.row(i)
        assert sum(n for _, n, _ in row) == blocks.row_lengths[i] <= max_seq_len
        assert packing or len(row) == 1
        for start, n, document in row:
            first = start - int(store.starts[document])
            assert n >= 2
            assert (first, n) in pieces(lengths[document], max_seq_len)
            of_prompt = prompts[document] if completion_only else 0
            counted = sum(place >= of_prompt for place in range(first + 1, first + n))
            assert counted > 0
            targets += counted
    assert blocks.targets == targets
    # What was dropped has no target: as many as if each document were cut by itself.
    expected = 0
    for length, prompt in zip(lengths, prompts, strict=True):
        of_prompt = prompt if completion_only else 0
        for at, n in pieces(length, max_seq_len):
            expected += sum(place >= of_prompt for place in range(at + 1, at + n))
    assert targets == expected


def test_two_documents_in_a_row_have_no_target_between_them() -> None:
    store = make_store([7, 9])
    blocks = pack(store, all_of(store), max_seq_len=16, packing=True, seed=0)
    assert len(blocks) == 1
    assert sorted(blocks.row(0)) == [(0, 7, 0), (7, 9, 1)]
    assert blocks.targets == 7 - 1 + 9 - 1


def test_documents_of_one_token_are_dropped_and_counted() -> None:
    store = make_store([1, 5, 1, 9])
    blocks = pack(store, all_of(store), max_seq_len=4, packing=False, seed=0)
    # 5 tokens are cut into 3 and 2, and 9 into 4, 3 and 2, so that no last token is alone.
    assert (blocks.tokens, blocks.dropped_tokens, len(blocks)) == (14, 2, 5)
    nothing = pack(store, np.array([0, 2]), max_seq_len=4, packing=True, seed=0)
    assert (len(nothing), nothing.tokens, nothing.targets, nothing.dropped_tokens) == (0, 0, 0, 2)


@pytest.mark.parametrize("length", range(2, 40))
def test_the_last_token_of_a_document_is_a_target(length: int) -> None:
    """It is the end-of-text: a model learns to stop at documents of any length."""
    store = make_store([length])
    blocks = pack(store, all_of(store), max_seq_len=8, packing=True, seed=0)
    rows = (blocks.row(i) for i in range(len(blocks)))
    targets = {p for row in rows for start, n, _ in row for p in range(start + 1, start + n)}
    assert length - 1 in targets
    assert blocks.dropped_tokens == 0


def test_no_documents() -> None:
    store = make_store([5])
    blocks = pack(store, all_of(store)[:0], max_seq_len=4, packing=True, seed=0)
    assert (len(blocks), blocks.tokens, blocks.dropped_tokens) == (0, 0, 0)


def test_prompts_are_in_the_rows_but_are_no_targets() -> None:
    store = make_store([6, 6, 10], [4, 6, 5])
    blocks = pack(store, all_of(store), max_seq_len=5, packing=False, seed=0, completion_only=True)
    # Document 0: the piece 0..3 is all prompt, 4 and 5 are the other. Document 1 is all prompt.
    # Document 2: its first piece is all prompt; the second begins the completion, with a token
    # that has no context.
    assert sorted(blocks.row(i)[0] for i in range(len(blocks))) == [(4, 2, 0), (17, 5, 2)]
    assert sorted(blocks.ignored.tolist()) == [1, 1]
    assert (blocks.targets, blocks.dropped_tokens) == (1 + 4, 4 + 6 + 5)


def test_the_same_seed_gives_the_same_rows() -> None:
    store = make_store(np.random.default_rng(0).integers(1, 50, 500).tolist())

    def rows(seed: int) -> list[int]:
        return places(pack(store, all_of(store), max_seq_len=32, packing=True, seed=seed))

    assert rows(1) == rows(1)
    assert rows(1) != rows(2)


def test_rows_are_nearly_full() -> None:
    lengths = np.random.default_rng(0).integers(5, 60, 5000).tolist()
    store = make_store(lengths)
    blocks = pack(store, all_of(store), max_seq_len=256, packing=True, seed=0)
    assert blocks.tokens / (len(blocks) * 256) > 0.99


@pytest.mark.parametrize("seed", range(30))
def test_best_fit_is_best_fit_decreasing(seed: int) -> None:
    """As many bins, as full, as item by item: each into the fullest bin that has room."""
    generator = np.random.default_rng(seed)
    capacity = int(generator.integers(5, 60))
    sizes = generator.integers(1, capacity + 1, int(generator.integers(0, 200)))
    found = best_fit(sizes, capacity)
    rooms: list[int] = []
    for size in sorted(sizes.tolist(), reverse=True):
        fitting = [room for room in rooms if room >= size]
        if fitting:
            rooms[rooms.index(min(fitting))] -= size
        else:
            rooms.append(capacity - size)
    filled = np.bincount(found, weights=sizes, minlength=len(rooms)).astype(int)
    assert sorted(capacity - filled) == sorted(rooms)
