"""Perplexity as a metric of `evaluate`, from sums that several batches or processes have made."""

from __future__ import annotations

import math
from collections.abc import Sequence

from evaluate import Metric

# evaluate re-exports the first and the last from datasets, whose one home here is the data module.
from evaluate.info import Features, MetricInfo, Value

from lowvram.errors import DataError

# Of one forward pass: the sufficient statistics of a perplexity.
_COLUMNS = {
    "nll_sum": "float64",
    "tokens": "int64",
    "documents": "int64",
    "bytes": "int64",
    "words": "int64",
}


class Perplexity(Metric):  # type: ignore[misc]  # evaluate ships no types
    """Corpus perplexity from sums: add_batch() any number of times, then compute() once.

    perplexity = exp(sum of nll_sum / sum of tokens): each token weighs the same, unlike in a mean
    of perplexities or of batch losses. It needs no model name, network or cache directory, and
    keeps a row per forward pass, not per token.
    """

    def __init__(self) -> None:
        # With a seed given, evaluate leaves numpy's global state out of it.
        super().__init__(keep_in_memory=True, seed=0)

    def _info(self) -> MetricInfo:
        return MetricInfo(
            description="Token-weighted corpus perplexity from sums of -ln p.",
            citation="",
            inputs_description="nll_sum in nats, and the tokens, documents, bytes and words of it.",
            features=Features({name: Value(kind) for name, kind in _COLUMNS.items()}),
        )

    def _build_data_dir(self) -> str:
        return ""  # evaluate would make a directory even when it keeps everything in memory

    def _finalize(self) -> None:
        if self.writer is None:  # evaluate cannot compute() before the first add_batch()
            self.add_batch(**{name: [] for name in _COLUMNS})
        super()._finalize()

    def _compute(self, **columns: Sequence[float]) -> dict[str, float | int | None]:
        nll_sum = math.fsum(columns.pop("nll_sum"))
        tokens, documents, n_bytes, words = (int(sum(column)) for column in columns.values())
        if tokens == 0:
            raise DataError("perplexity: nothing to score, no document has two tokens or more")
        return {
            "perplexity": _exp(nll_sum / tokens),
            "nll_sum": nll_sum,
            "tokens_scored": tokens,
            "bits_per_byte": nll_sum / (math.log(2) * n_bytes) if n_bytes else None,
            "word_perplexity": _exp(nll_sum / words) if words else None,
            "documents": documents,
            "bytes": n_bytes,
            "words": words,
        }


def _exp(x: float) -> float:
    return math.inf if x > 709 else math.exp(x)  # math.exp raises from 709.8 on
