"""The split: by document, blind to lengths, copies together, and never a side without documents."""

from __future__ import annotations

import numpy as np
import pytest

from lowvram.data import ReadReport, TokenStore, pack, split_documents
from lowvram.errors import DataError


def make_store(documents: list[list[int]]) -> TokenStore:
    lengths = [len(document) for document in documents]
    n = len(documents)
    return TokenStore(
        tokens=np.array(sum(documents, []), np.uint16),
        starts=np.cumsum([0, *lengths]),
        prompt_lengths=np.zeros(n, np.int32),
        hashes=np.array([hash(tuple(document)) % 2**61 for document in documents], np.uint64),
        byte_counts=np.ones(n, np.int64),
        word_counts=np.ones(n, np.int64),
        report=ReadReport(documents=n),
        sha256="",
    )


def marked(n: int, seed: int = 0) -> list[list[int]]:
    """Documents of different lengths, each of a token of its own."""
    lengths = np.random.default_rng(seed).integers(1, 40, n)
    return [[i] * int(length) for i, length in enumerate(lengths)]


def test_no_document_is_on_both_sides() -> None:
    store = make_store(marked(100))
    split = split_documents(store, 0.1, seed=3)
    assert (len(split.train), len(split.validation), split.note) == (90, 10, None)
    markers = []
    tokens = 0
    for documents in (split.train, split.validation):
        blocks = pack(store, documents, max_seq_len=16, packing=True, seed=0)
        starts, lengths = blocks.starts, blocks.lengths
        rows = [store.tokens[s : s + n] for s, n in zip(starts, lengths, strict=True)]
        markers.append(set(np.concatenate(rows).tolist()))
        tokens += blocks.tokens + blocks.dropped_tokens
    assert markers[0].isdisjoint(markers[1])
    assert tokens == len(store.tokens)


def test_the_split_depends_on_seed_and_documents_only() -> None:
    store = make_store(marked(100))
    first, again = split_documents(store, 0.1, seed=3), split_documents(store, 0.1, seed=3)
    assert np.array_equal(first.validation, again.validation)
    other = split_documents(store, 0.1, seed=4)
    assert not np.array_equal(first.validation, other.validation)
    # Other lengths of the same documents: nothing changes, so no sequence length can change it.
    longer = make_store(marked(100, seed=9))
    object.__setattr__(longer, "hashes", store.hashes)
    assert np.array_equal(split_documents(longer, 0.1, seed=3).validation, first.validation)


def test_copies_stay_together() -> None:
    documents = [[i % 20, 1, 2] for i in range(100)] + [[1000 + i] for i in range(100)]
    store = make_store(documents)
    for seed in range(20):
        split = split_documents(store, 0.2, seed)
        train = {tuple(documents[i]) for i in split.train}
        validation = {tuple(documents[i]) for i in split.validation}
        assert train.isdisjoint(validation)
        assert 30 <= len(split.validation) <= 40
        assert split.note is not None
        assert split.note.startswith(
            "80 of 200 documents are copies of others; copies stay on one side"
        )


@pytest.mark.parametrize("n", [2, 3, 10])
@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.5, 0.99])
def test_each_side_has_a_document(n: int, fraction: float) -> None:
    split = split_documents(make_store(marked(n)), fraction, seed=0)
    assert len(split.train) >= 1
    assert len(split.validation) >= 1
    both = np.sort(np.concatenate([split.train, split.validation]))
    assert both.tolist() == list(range(n))


def test_groups_larger_than_the_fraction() -> None:
    split = split_documents(make_store([[1]] * 6 + [[2]] * 4), 0.1, seed=0)
    assert split.validation.tolist() == [6, 7, 8, 9]
    assert split.note == (
        "8 of 10 documents are copies of others; copies stay on one side; "
        "validation has 4 documents where 1 were asked for"
    )


def test_a_fraction_of_zero() -> None:
    split = split_documents(make_store([[1, 2]]), 0, seed=0)
    assert (split.train.tolist(), split.validation.tolist()) == ([0], [])
    assert split.validation.dtype == np.int64


def test_what_cannot_be_split() -> None:
    cure = (
        "which cannot be on both sides of a split. Set data.format: paragraphs or lines to get "
        "more documents of it, or name other text as data.validation_source, or set "
        "data.validation_fraction: 0"
    )
    with pytest.raises(DataError) as caught:
        split_documents(make_store([[1, 2]]), 0.1, seed=0)
    assert str(caught.value) == f"data.source holds one document, {cure}"
    with pytest.raises(DataError) as caught:
        split_documents(make_store([[1, 2]] * 3), 0.1, seed=0)
    assert str(caught.value) == f"data.source holds 3 copies of one document, {cure}"
    with pytest.raises(DataError) as caught:
        split_documents(make_store([[1], [2]]), 1.0, seed=0)
    assert str(caught.value) == (
        "data.validation_fraction is 1.0: use a number from 0 up to, not including, 1"
    )
