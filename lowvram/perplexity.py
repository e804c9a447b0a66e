"""Perplexity of a causal language model over documents.

It knows nothing of recipes, files or tokenizers: documents arrive as token arrays. The protocol:
each document is scored on its own, window by window, and of its N tokens exactly the N - 1 that
have a token before them are scored, each once, whatever the stride.

Shapes: b windows, s tokens in the longest of them, d hidden size, v vocabulary, n scored tokens.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from lowvram.errors import DataError, ModelError, RecipeError
from lowvram.loss import chunk_rows, head_is_plain, log_softmax
from lowvram.memory.measure import SIMULATED, is_out_of_memory, release_memory
from lowvram.model import evaluating

IntArray = npt.NDArray[np.integer[Any]]

_PASS_TOKENS = {"cuda": 4096, "cpu": 2048}  # padded tokens in one forward pass
_LOOK_AHEAD = 64  # forward passes whose windows are sorted by length together
_NOT_REPORTED = ("documents", "bytes", "words")  # properties of the data
_AUTOCAST = {None: None, "fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class PerplexityResult:
    """A perplexity, with what one must know to compare it with another."""

    perplexity: float
    """exp(nll_sum / tokens_scored)."""
    nll_sum: float
    """Sum of -ln p over the scored tokens, in nats."""
    tokens_scored: int
    context_length: int
    stride: int
    bits_per_byte: float | None
    """nll_sum / (ln 2 * bytes), comparable between tokenizers; None where no bytes are known."""
    word_perplexity: float | None
    """exp(nll_sum / words), comparable between tokenizers; None where no words are known."""
    documents: int
    """Those with a token to score. The others count nowhere, in bytes and words neither."""
    bytes: int
    words: int

    def to_json(self) -> dict[str, float | int | None]:
        """The values for a report, ready for json.dumps. JSON has no infinity: it becomes None."""
        values = {name: value for name, value in vars(self).items() if name not in _NOT_REPORTED}
        return {name: None if value == math.inf else value for name, value in values.items()}


class _Row(NamedTuple):
    """What one forward pass scored: the sufficient statistics of a perplexity."""

    nll_sum: float
    tokens: int
    documents: int
    bytes: int
    words: int


def score(
    model: nn.Module,
    documents: Iterable[tuple[IntArray, int, int]],
    *,
    context_length: int,
    stride: int,
    batch_size: int | None = None,
    precision: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> PerplexityResult:
    """Perplexity of `model`, on the device it is on, over (tokens, bytes, words) documents.

    A document's windows hold up to `context_length` tokens and start at 0, stride, 2 * stride, ...;
    each scores the targets that no window before it scored, as in
    https://huggingface.co/docs/transformers/perplexity, whose snippet counts one target too few
    in every window but the first. So from its second window on, a document's tokens are
    predicted from `context_length - stride` tokens or more.

    Token arrays are read a window at a time, so they may be memory-mapped files. Bytes are those of
    the text in UTF-8, words its runs between white space.

    `batch_size` is in windows and changes the speed only. `precision` is what the forward pass is
    autocast to: fp32 (nothing), bf16 or fp16. `progress` is told the tokens scored so far.

    Raises RecipeError for a context length, stride, batch size or precision that cannot be,
    DataError if there is nothing to score or a token is not in the vocabulary, ModelError if
    the model gives NaN.
    """
    _check(model, context_length, stride, batch_size, precision)
    device = next(model.parameters()).device
    pass_tokens = max(context_length, pass_tokens_on(device))
    if batch_size is not None:
        pass_tokens = batch_size * context_length
    # Imported here: `evaluate` brings pandas and pyarrow, 90 MB that training does without.
    from lowvram.metric import Perplexity

    windows = (w for document in documents for w in _windows(*document, context_length, stride))
    metric, scored = Perplexity(), 0
    with torch.no_grad(), evaluating(model), _autocast(device, precision):
        network = _Network(model)
        for ahead in _look_ahead(windows, _LOOK_AHEAD * pass_tokens):
            rows: list[_Row] = []
            for batch in _batches(ahead, batch_size or pass_tokens, pass_tokens):
                found = network.score_in_parts(batch)
                rows += found
                scored += sum(row.tokens for row in found)
                if progress is not None:
                    progress(scored)
            metric.add_batch(
                **{name: [getattr(row, name) for row in rows] for name in _Row._fields}
            )
    sums = metric.compute()
    if math.isnan(sums["nll_sum"]):
        raise ModelError("perplexity: the model gives NaN; try precision fp32 or bf16")
    return PerplexityResult(**sums, context_length=context_length, stride=stride)


def pass_tokens_on(device: torch.device) -> int:
    """Padded tokens in one forward pass, unless a window has more."""
    return _PASS_TOKENS["cpu" if device.type == "cpu" else "cuda"]


def _check(
    model: nn.Module,
    context_length: int,
    stride: int,
    batch_size: int | None,
    precision: str | None,
) -> None:
    positions = getattr(model.config, "max_position_embeddings", None) or math.inf
    if not 2 <= context_length <= positions:
        raise RecipeError(
            f"evaluate.context_length: found {context_length}, "
            f"allowed 2 to {positions}, the positions of the model"
        )
    if not 1 <= stride < context_length:
        raise RecipeError(
            f"evaluate.stride: found {stride}, allowed 1 to {context_length - 1}, one less than "
            f"the context length: with more, the first token of a window would go unscored"
        )
    if batch_size is not None and batch_size < 1:
        raise RecipeError(f"evaluate.batch_size: found {batch_size}, allowed 1 or more")
    if precision not in _AUTOCAST:
        raise RecipeError(f"evaluate.precision: found {precision}, allowed fp32, bf16 or fp16")


def _autocast(device: torch.device, precision: str | None) -> AbstractContextManager[Any]:
    dtype = _AUTOCAST[precision]
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


class _Window(NamedTuple):
    """Up to a context of tokens, and which of them to score."""

    tokens: IntArray  # (length,), a view: read when its batch is built
    first: int  # the targets are tokens[first:]
    documents: int  # this and the next two are of the whole document, on its first window
    bytes: int
    words: int


def _windows(
    tokens: IntArray, n_bytes: int, words: int, context_length: int, stride: int
) -> Iterator[_Window]:
    if len(tokens) < 2:
        return
    of_document, scored = (1, n_bytes, words), 1
    for start in itertools.count(0, stride):
        end = min(start + context_length, len(tokens))
        yield _Window(tokens[start:end], scored - start, *of_document)
        if end == len(tokens):
            return
        of_document, scored = (0, 0, 0), end


def _look_ahead(windows: Iterable[_Window], tokens: int) -> Iterator[list[_Window]]:
    """Lists of windows that together hold `tokens` tokens or just more."""
    ahead: list[_Window] = []
    held = 0
    for window in windows:
        ahead.append(window)
        held += len(window.tokens)
        if held >= tokens:
            yield ahead
            ahead, held = [], 0
    if ahead:
        yield ahead


def _batches(ahead: list[_Window], windows: int, tokens: int) -> Iterator[list[_Window]]:
    """Batches of similar lengths: at most `windows`, and `tokens` with padding (but one window)."""
    batch: list[_Window] = []
    for window in sorted(ahead, key=lambda window: -len(window.tokens)):
        padded = (len(batch) + 1) * len(batch[0].tokens) if batch else 0
        if len(batch) == windows or padded > tokens:
            yield batch
            batch = []
        batch.append(window)
    yield batch


class _Network:
    """A causal language model taken apart, so that only scored tokens get logits."""

    def __init__(self, model: nn.Module) -> None:
        # A PEFT wrapper holds the causal model, with its adapters inside.
        whole: Any = model
        self.model = whole.get_base_model() if hasattr(whole, "get_base_model") else whole
        self.inner = self.model.base_model
        if self.inner is self.model:
            raise ModelError(f"perplexity: {type(self.model).__name__} has no model below its head")
        self.device = next(model.parameters()).device
        self.vocabulary: int = self.model.config.vocab_size
        self.most_tokens = math.inf  # padded, in a forward pass: as many as there was room for
        self.head: Callable[[torch.Tensor], torch.Tensor] = self.model.get_output_embeddings()
        if not head_is_plain(self.model):
            self.head = self._whole_head

    def _whole_head(self, hidden: torch.Tensor) -> torch.Tensor:
        """(n, d) to (n, v) by all that the model itself does to hidden states.

        It is run on one token, and what it computed below its head is replaced by `hidden`. That
        costs little, and unlike `logits_to_keep` it takes any rows of the batch, a few at a time.
        """

        def replace(module: nn.Module, inputs: Any, output: Any) -> Any:
            output.last_hidden_state = hidden.unsqueeze(0)
            return output

        handle = self.inner.register_forward_hook(replace)
        try:
            ids = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
            logits: torch.Tensor = self.model(input_ids=ids, use_cache=False).logits
            return logits.squeeze(0)
        finally:
            handle.remove()

    def score_in_parts(self, batch: Sequence[_Window]) -> list[_Row]:
        """In one forward pass or, where memory is full, in smaller ones from then on."""
        tokens = len(batch) * len(batch[0].tokens)
        if tokens <= self.most_tokens or len(batch) == 1:
            try:
                return [self.score(batch)]
            except (RuntimeError, MemoryError) as error:
                # A simulation is asked whether all of it fits.
                last = len(batch) == 1 or self.device.type == SIMULATED
                if last or not is_out_of_memory(error):
                    raise
            # Here, since the frames that failed keep their tensors until the error is gone.
            release_memory(self.device)
            self.most_tokens = tokens // 2
        half = len(batch) // 2
        return [*self.score_in_parts(batch[:half]), *self.score_in_parts(batch[half:])]

    def score(self, batch: Sequence[_Window]) -> _Row:
        ids, predicting = self._pad(batch)
        # No mask: attention is causal, and the padding is on the right.
        hidden = self.inner(input_ids=ids, use_cache=False).last_hidden_state  # (b, s, d)
        hidden = hidden.flatten(0, 1)[predicting]  # (n, d)
        targets = ids.flatten()[predicting + 1]  # (n,)
        return _Row(
            self._nll_sum(hidden, targets),
            len(targets),
            sum(window.documents for window in batch),
            sum(window.bytes for window in batch),
            sum(window.words for window in batch),
        )

    def _pad(self, batch: Sequence[_Window]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids (b, s), and where in them, flattened, a scored target comes next (n,)."""
        ids = np.zeros((len(batch), max(len(window.tokens) for window in batch)), dtype=np.int64)
        predicting = np.zeros_like(ids, dtype=bool)
        for row, window in enumerate(batch):
            ids[row, : len(window.tokens)] = window.tokens
            predicting[row, window.first - 1 : len(window.tokens) - 1] = True
        if ids.min() < 0 or ids.max() >= self.vocabulary:  # on a GPU this would end the process
            worst = ids.min() if ids.min() < 0 else ids.max()
            raise DataError(
                f"perplexity: found token {worst}, allowed 0 to {self.vocabulary - 1}; "
                "the documents were not made with this model's tokenizer"
            )
        flat = np.flatnonzero(predicting)
        return torch.from_numpy(ids).to(self.device), torch.from_numpy(flat).to(self.device)

    def _nll_sum(self, hidden: torch.Tensor, targets: torch.Tensor) -> float:
        """Sum of -ln p(target) of logits in fp32, summed in fp64."""
        rows = chunk_rows(self.vocabulary, len(targets))
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for h, target in zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True):
            log_p = log_softmax(self.head(h))  # (rows, v)
            total -= log_p.gather(-1, target.unsqueeze(-1)).double().sum()
            del log_p  # before those of the next chunk are made
        return total.item()
