"""Documents for training and documents for validation, before anything is packed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lowvram.data.store import TokenStore
from lowvram.errors import DataError


@dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """Numbers of documents, ascending; together all of the store, none twice."""

    train: NDArray[np.int64]
    validation: NDArray[np.int64]
    note: str | None = None
    """What is worth saying about it: duplicates, or a fraction that cannot be met."""


def split_documents(store: TokenStore, fraction: float, seed: int) -> Split:
    """About `fraction` of all documents for validation, at least one, at most all but one.

    Documents of the same tokens come to the same side. The lengths of documents play no part, nor
    does anything but the store, the fraction and the seed. One distinct document: DataError.
    """
    if not 0 <= fraction < 1:
        raise DataError(
            f"data.validation_fraction is {fraction}: use a number from 0 up to, not including, 1"
        )
    n = len(store)
    everything = np.arange(n, dtype=np.int64)
    if fraction == 0:
        return Split(train=everything, validation=everything[:0])
    _, group, sizes = np.unique(store.hashes, return_inverse=True, return_counts=True)
    if len(sizes) == 1:
        raise one_document(n)
    wanted = max(1, round(fraction * n))
    chosen = choose(sizes, wanted, np.random.default_rng(seed))
    is_validation = np.isin(group, chosen)
    return Split(
        train=everything[~is_validation],
        validation=everything[is_validation],
        note=note(n, len(sizes), wanted, int(is_validation.sum())),
    )


def choose(
    sizes: NDArray[np.int64], wanted: int, generator: np.random.Generator
) -> NDArray[np.int64]:
    """Groups of documents, drawn as long as they fit into the number wanted; never all of them."""
    order = generator.permutation(len(sizes))
    fitting = order[sizes[order] <= wanted]
    if len(fitting) == 0:
        return np.asarray([np.argmin(sizes)])
    count = int(np.searchsorted(np.cumsum(sizes[fitting]), wanted, side="right"))
    return fitting[: min(max(count, 1), len(sizes) - 1)]


def one_document(copies: int) -> DataError:
    found = "one document" if copies == 1 else f"{copies:,} copies of one document"
    return DataError(
        f"data.source holds {found}, which cannot be on both sides of a split. Set data.format: "
        "paragraphs or lines to get more documents of it, or name other text as "
        "data.validation_source, or set data.validation_fraction: 0"
    )


def note(documents: int, distinct: int, wanted: int, got: int) -> str | None:
    parts = []
    if distinct < documents:
        parts.append(
            f"{documents - distinct:,} of {documents:,} documents are copies of others; "
            "copies stay on one side"
        )
    if got != wanted:
        parts.append(f"validation has {got:,} documents where {wanted:,} were asked for")
    return "; ".join(parts) or None
