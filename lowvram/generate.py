"""Continuations of prompts by a causal language model: all at once, or as they come.

A prompt gets the same tokens alone, in a batch and streamed, but where two tokens tie to the last
digits of floating point. For that, rows are padded on the left, each row has logits processors of
its own that see it without its padding, and each row samples with a generator of its own.

It knows nothing of recipes or files. Shapes: b rows (prompts times beams), s tokens, v vocabulary.
"""

from __future__ import annotations

import hashlib
import inspect
import itertools
import math
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lowvram.errors import ModelError, RecipeError
from lowvram.model import evaluating

_BATCH_TOKENS = 4096  # whose keys and values are cached at once: 288 MiB for GPT-2 in fp32
_OVERLAP = 5  # tokens of the prompt that are decoded along: they decide about leading spaces
_SPACE = (
    "the prompt ends in a space, which most tokenizers join to the next word: "
    "the continuation will be better without it"
)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to choose tokens. Raises RecipeError for values that cannot be."""

    max_new_tokens: int = 64
    temperature: float = 0.8
    """Logits are divided by it; 0 takes the likeliest token each time."""
    top_p: float = 0.95
    """Only the likeliest tokens that together hold this probability are drawn from."""
    top_k: int | None = None
    """Only so many of the likeliest tokens are drawn from."""
    num_beams: int = 1
    """More than 1 is beam search, which does not sample: it needs temperature 0."""
    length_penalty: float = 1.0
    """A beam's log-probability is divided by its length to this power; above 0 favours long."""
    no_repeat_ngram_size: int = 0
    """No n-gram of this size comes twice, the prompt included; 0 is off."""
    repetition_penalty: float = 1.0
    """Logits of tokens seen are divided (if negative, multiplied) by it; 1 is off."""
    seed: int = 0

    def __post_init__(self) -> None:
        allowed = {
            "max_new_tokens": (self.max_new_tokens >= 1, "1 or more"),
            "temperature": (self.temperature >= 0, "0 or more"),
            "top_p": (0 < self.top_p <= 1, "above 0, to 1"),
            "top_k": (self.top_k is None or self.top_k >= 1, "1 or more"),
            "num_beams": (self.num_beams >= 1, "1 or more"),
            "no_repeat_ngram_size": (self.no_repeat_ngram_size >= 0, "0 or more"),
            "repetition_penalty": (self.repetition_penalty > 0, "above 0"),
        }
        for key, (fits, what) in allowed.items():
            if not fits:
                raise RecipeError(f"generate.{key}: found {getattr(self, key)}, allowed {what}")
        for key in ("temperature", "length_penalty", "repetition_penalty"):
            if not math.isfinite(getattr(self, key)):
                raise RecipeError(
                    f"generate.{key}: found {getattr(self, key)}, allowed finite numbers"
                )
        if self.num_beams > 1 and self.temperature > 0:
            raise RecipeError(
                f"generate.num_beams: found {self.num_beams} with temperature {self.temperature}; "
                "beam search does not sample: set temperature to 0, or num_beams to 1"
            )


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """What a model made of a prompt."""

    prompt: str
    text: str
    """Without the prompt and special tokens. A character cut off at the end is left out."""
    tokens: tuple[int, ...]
    """The new ones, with the end-of-text token if it came."""
    finished: bool
    """Whether the end-of-text token came, rather than `max_new_tokens`."""
    notes: tuple[str, ...]
    """What the user should know: the prompt was cut, or its form hurts."""


@dataclass(frozen=True, kw_only=True)
class _Request:
    """A prompt made ready."""

    prompt: str
    ids: list[int]
    notes: tuple[str, ...]
    processors: LogitsProcessorList


def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    allow_special_tokens: bool = False,
) -> list[Continuation]:
    """One continuation per prompt, in order. Equal prompts get different samples.

    A special token spelled out in a prompt is text, unless `allow_special_tokens`. A prompt too
    long for the model loses its beginning, and a note says so. Model and tokenizer are left as
    they were.

    Raises RecipeError if `max_new_tokens` leaves no room for a prompt, ModelError if the
    tokenizer does not belong to the model.
    """
    model, ends = _causal(model), _ends(model, tokenizer)
    requests = _requests(model, tokenizer, prompts, sampling, allow_special_tokens)
    continuations = []
    for batch in _batches(requests, sampling):
        for request, tokens in zip(batch, _run(model, batch, sampling, ends), strict=True):
            text = "".join(_pieces(tokenizer, request, tokens, ends))
            continuations.append(_continuation(request, text, tokens, ends))
    return continuations


def stream(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    sampling: Sampling,
    *,
    allow_special_tokens: bool = False,
) -> Generator[str, None, Continuation]:
    """Yields the text that `generate` gives for this prompt alone, in whole characters.

    Returns the Continuation (`continuation = yield from stream(...)`). It may be left at any time:
    between pieces it holds nothing but memory. Beam search has no text before its end: all of it
    comes at once.
    """
    if sampling.num_beams > 1:
        [whole] = generate(
            model, tokenizer, [prompt], sampling, allow_special_tokens=allow_special_tokens
        )
        yield whole.text
        return whole
    model, ends = _causal(model), _ends(model, tokenizer)
    [request] = _requests(model, tokenizer, [prompt], sampling, allow_special_tokens)
    tokens, for_text = itertools.tee(_tokens(model, request, sampling, ends))
    text = []
    for piece in _pieces(tokenizer, request, for_text, ends):
        text.append(piece)
        yield piece
    return _continuation(request, "".join(text), list(tokens), ends)


def fit_prompt(
    ids: list[int], limit: int | None, max_new_tokens: int
) -> tuple[list[int], str | None]:
    """The last tokens of a prompt that leave room for the new ones, and a note if some had to go.

    `limit` is the number of positions of the model, None if it has no bound. Raises RecipeError
    if not even one token of the prompt has room.
    """
    if limit is None or len(ids) + max_new_tokens <= limit:
        return ids, None
    if max_new_tokens >= limit:
        raise RecipeError(
            f"generate.max_new_tokens: found {max_new_tokens}, allowed 1 to {limit - 1}: the model "
            f"has {limit} positions, and the prompt needs at least one of them"
        )
    room = limit - max_new_tokens
    note = (
        f"the prompt's first {len(ids) - room} of {len(ids)} tokens were left out: with "
        f"{max_new_tokens} new tokens, the model's {limit} positions have room for {room}"
    )
    return ids[-room:], note


class GumbelNoise(LogitsProcessor):
    """Makes taking the likeliest token the same as sampling.

    With g = -ln e, e from the exponential distribution Exp(1), argmax(z + g) is distributed as
    softmax(z): the Gumbel-max trick, https://arxiv.org/abs/1411.0030. Logits of -inf stay so. The
    noise comes from the CPU, so it is the same on every device.
    """

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        noise = torch.empty(scores.shape, dtype=torch.float64)  # (1, v)
        noise.exponential_(generator=self.generator).log_().neg_()
        return scores + noise.to(scores)


class _Rows(LogitsProcessor):
    """Each row's own processors, which see neither the other rows nor the padding.

    The processors of transformers that look at the tokens so far would count padding as text.
    """

    def __init__(self, rows: Sequence[tuple[int, LogitsProcessorList]], beams: int) -> None:
        self.rows = [row for row in rows for _ in range(beams)]  # (padding, processors)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        done = (
            processors(input_ids[row : row + 1, padding:], scores[row : row + 1])  # type: ignore[arg-type]
            for row, (padding, processors) in enumerate(self.rows)
        )
        return torch.cat(list(done))  # (b, v)


def _pieces(
    tokenizer: PreTrainedTokenizerBase,
    request: _Request,
    tokens: Iterable[int],
    ends: frozenset[int],
) -> Iterator[str]:
    """The text of tokens as they come, in whole characters.

    A token may hold part of a character, and a leading space may depend on the token before. So
    the tokens of the last piece are decoded along, and a piece waits while it ends in U+FFFD, the
    mark of a part. What is a part still at the end is left out.
    """

    def decode(ids: list[int]) -> str:
        kept = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        return str(tokenizer.decode(ids, **kept))

    window, new, piece = request.ids[-_OVERLAP:], list[int](), ""
    for token in itertools.takewhile(lambda token: token not in ends, tokens):
        new.append(token)
        piece = decode(window + new)[len(decode(window)) :]
        if piece and not piece.endswith("\ufffd"):
            yield piece
            window, new, piece = new, [], ""
    if whole := piece.rstrip("\ufffd"):
        yield whole


def _continuation(
    request: _Request, text: str, tokens: list[int], ends: frozenset[int]
) -> Continuation:
    return Continuation(
        prompt=request.prompt,
        text=text,
        tokens=tuple(tokens),
        finished=tokens[-1] in ends,
        notes=request.notes,
    )


def _causal(model: nn.Module) -> Any:
    """The causal model of transformers in a PEFT wrapper, which has the adapters inside."""
    whole: Any = model
    return whole.get_base_model() if hasattr(whole, "get_base_model") else whole


def _ends(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The token ids that end a text, of the tokenizer and of the model's generation settings."""
    of_model = _causal(model).generation_config.eos_token_id
    of_model = of_model if isinstance(of_model, list) else [of_model]
    return frozenset(end for end in [tokenizer.eos_token_id, *of_model] if end is not None)


def _requests(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    sampling: Sampling,
    allow_special_tokens: bool,
) -> list[_Request]:
    config: Any = model.config
    limit = getattr(config, "max_position_embeddings", None)
    requests, times_seen = [], Counter[str]()
    for prompt in prompts:
        ids = _encode(tokenizer, prompt, allow_special_tokens)
        if max(ids) >= config.vocab_size:  # on a GPU this would end the process
            raise ModelError(
                f"the tokenizer does not belong to the model: it made token {max(ids)} of "
                f"{prompt!r}, and the model knows 0 to {config.vocab_size - 1}"
            )
        ids, cut = fit_prompt(ids, limit, sampling.max_new_tokens)
        notes = tuple(note for note in (cut, prompt.endswith(" ") and _SPACE) if note)
        processors = _processors(sampling, prompt, times_seen[prompt])
        requests.append(_Request(prompt=prompt, ids=ids, notes=notes, processors=processors))
        times_seen[prompt] += 1
    return requests


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str, special: bool) -> list[int]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    setting = getattr(backend, "encode_special_tokens", None)
    # verbose=False: "longer than the maximum length" is said by fit_prompt, for the real maximum.
    ids: list[int] = tokenizer(prompt, split_special_tokens=not special, verbose=False)["input_ids"]
    if backend is not None:
        backend.encode_special_tokens = setting  # transformers leaves its own there
    if ids:
        return ids
    for start in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if start is not None:
            return [start]
    raise ModelError("an empty prompt needs a tokenizer with a token that begins or ends a text")


def _processors(sampling: Sampling, prompt: str, occurrence: int) -> LogitsProcessorList:
    """What changes the logits of one row, in the order of transformers' own generation."""
    processors = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty)))
    if sampling.no_repeat_ngram_size > 0:
        processors.append(NoRepeatNGramLogitsProcessor(sampling.no_repeat_ngram_size))
    if sampling.temperature > 0:
        processors.append(TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_k is not None:
            processors.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            processors.append(TopPLogitsWarper(sampling.top_p))
        # Neither the batch nor the place in it may matter, but equal prompts must differ.
        key = f"{sampling.seed}\n{occurrence}\n{prompt}".encode(errors="surrogatepass")
        seed = int.from_bytes(hashlib.sha256(key).digest()[:8])
        processors.append(GumbelNoise(seed))
    return processors


def _batches(requests: list[_Request], sampling: Sampling) -> Iterator[list[_Request]]:
    """In order, each with at most _BATCH_TOKENS tokens once all are there (but one request)."""
    batch: list[_Request] = []
    longest = 0
    for request in requests:
        longest = max(longest, len(request.ids))
        tokens = (len(batch) + 1) * sampling.num_beams * (longest + sampling.max_new_tokens)
        if batch and tokens > _BATCH_TOKENS:
            yield batch
            batch, longest = [], len(request.ids)
        batch.append(request)
    if batch:
        yield batch


def _run(
    model: Any, batch: list[_Request], sampling: Sampling, ends: frozenset[int]
) -> list[list[int]]:
    """The new tokens of each request, up to and with the one that ends its text."""
    longest = max(len(request.ids) for request in batch)
    rows = [(longest - len(request.ids), request) for request in batch]  # padding, request
    pad = min(ends, default=0)  # any id will do, the mask hides it
    ids = torch.tensor([[pad] * n + request.ids for n, request in rows])  # (b, s)
    mask = torch.tensor([[0] * n + [1] * len(request.ids) for n, request in rows])
    settings = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        num_beams=sampling.num_beams,
        length_penalty=float(sampling.length_penalty),
        do_sample=False,
        use_cache=True,
        eos_token_id=sorted(ends) or None,
        pad_token_id=pad,
    )
    processors = _Rows([(n, request.processors) for n, request in rows], sampling.num_beams)
    device = next(model.parameters()).device
    with torch.no_grad(), _undisturbed(model):
        output = model.generate(
            ids.to(device),
            attention_mask=mask.to(device),
            generation_config=settings,
            logits_processor=LogitsProcessorList([processors]),
        )
    new = output[:, longest:].tolist()
    lengths = (next((n for n, i in enumerate(row, 1) if i in ends), len(row)) for row in new)
    return [row[:length] for row, length in zip(new, lengths, strict=True)]


def _tokens(
    model: Any, request: _Request, sampling: Sampling, ends: frozenset[int]
) -> Iterator[int]:
    """What `_run` gives for one request, a forward pass each, over cached keys and values."""
    # Without it, the logits of the whole prompt are made to use the last row only.
    knows = inspect.signature(model.forward).parameters
    keep = {"logits_to_keep": 1} if "logits_to_keep" in knows else {}
    named = "cache" if "cache" in knows else "past_key_values"  # before transformers 5.24
    seen = torch.tensor([request.ids], device=next(model.parameters()).device)  # (1, s)
    fed, cache = seen, None
    for _ in range(sampling.max_new_tokens):
        with torch.no_grad(), _undisturbed(model):
            output = model(input_ids=fed, use_cache=True, **{named: cache}, **keep)
            scores = request.processors(seen, output.logits[:, -1].float())  # type: ignore[arg-type]
        fed, cache = scores.argmax(-1, keepdim=True), output[named]  # (1, 1)
        seen = torch.cat([seen, fed], dim=1)
        yield int(fed)
        if int(fed) in ends:
            return


@contextmanager
def _undisturbed(model: Any) -> Iterator[None]:
    """Dropout off and no generation settings of the model's own, which would mix with ours."""
    settings = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        with evaluating(model):
            yield
    finally:
        model.generation_config = settings
