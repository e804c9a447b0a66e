"""What a run will do, before it does it: the data cut to rows, the shape, the steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from lowvram.build import (
    Corpus,
    Numerics,
    ParameterCount,
    Progress,
    build_blocks,
    build_corpus,
    build_tokenizer,
    choose_numerics,
    count_parameters,
    warmup_steps,
)
from lowvram.checkpointing import in_words
from lowvram.data import Batch, Blocks, steps_per_epoch, windows
from lowvram.errors import DataError
from lowvram.fit import Fit, fit, with_shape
from lowvram.fit_cache import remembered
from lowvram.measurement import measure
from lowvram.memory import Card
from lowvram.memory.device import simulated_device
from lowvram.model import context_length, load_config
from lowvram.prediction import predictor
from lowvram.recipe import Recipe
from lowvram.target import card_here, limited

# What may change between the parts of a resumed run: none of it changes what is learned. Model and
# data may have moved; their content is compared.
_FREE_KEYS = {
    "model": ("name", "revision"),
    "data": ("source", "validation_source"),
    "train": (
        "deterministic",
        "eval_every",
        "keep_best",
        "keep_last",
        "log_every",
        "max_nonfinite_steps",
        "save_every",
        "save_every_minutes",
    ),
    "fit": ("micro_batch_size", "gradient_checkpointing", "vram", "headroom"),
}
_FREE_SECTIONS = {"output_dir", "output_dtype"}


@dataclass(frozen=True, kw_only=True)
class Plan:
    recipe: Recipe
    """With the chosen shape in place of what it left to auto."""
    numerics: Numerics
    tokenizer: PreTrainedTokenizerBase
    corpus: Corpus
    fit: Fit
    blocks: Blocks
    parameters: ParameterCount
    steps_per_epoch: int
    total_steps: int
    context_length: int
    """Tokens that an evaluation window holds: what the model was trained to see."""
    stride: int
    max_new_tokens: int
    notes: tuple[str, ...]
    card: Card | None = None
    """None on a CPU."""

    def windows(self, start: int = 0) -> Iterator[list[Batch]]:
        """The micro-batches of each optimizer step, from step `start` to the last."""
        tokenizer = self.tokenizer
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        for step in range(start, self.total_steps):
            epoch, offset = divmod(step, self.steps_per_epoch)
            if step == start or offset == 0:
                epoch_windows = windows(
                    self.blocks,
                    epoch=epoch,
                    global_batch_size=self.recipe.train.global_batch_size,
                    micro_batch_size=self.fit.micro_batch_size,
                    seed=self.recipe.train.seed,
                    pad_token_id=pad,
                    start=offset,
                )
            yield next(epoch_windows)

    def held_out(self) -> list[tuple[NDArray[np.integer], int, int]]:
        """(tokens, bytes, words) of the held-out documents, at most evaluate.max_tokens tokens.

        Which documents is drawn by the seed; the last one may be cut to keep to the limit.
        """
        store = self.corpus.held_out_store
        order = np.random.default_rng(self.recipe.train.seed).permutation(self.corpus.held_out)
        left = self.recipe.evaluate.max_tokens or int(store.lengths(order).sum())
        chosen: list[tuple[NDArray[np.integer], int, int]] = []
        for number in order:
            tokens = store.document(number)
            n_bytes, words = int(store.byte_counts[number]), int(store.word_counts[number])
            if len(tokens) > left:
                tokens = tokens[:left]
                text = str(self.tokenizer.decode(tokens))
                n_bytes, words = len(text.encode()), len(text.split())
            chosen.append((tokens, n_bytes, words))
            left -= len(tokens)
            if left < 2:  # one token alone has nothing to be predicted from
                break
        return chosen

    def fingerprint(self, base_sha256: str) -> dict[str, Any]:
        """What a checkpoint of this run depends on: base, data, and the keys of the recipe.

        Formats that the recipe leaves to auto are those that were chosen.
        """
        found: dict[str, Any] = {"base": base_sha256, "data": self.corpus.sha256}
        for section, keys in self.recipe.model_dump(mode="json", exclude=_FREE_SECTIONS).items():
            free = _FREE_KEYS.get(section, ())
            found |= {f"{section}.{key}": keys[key] for key in keys if key not in free}
        found["train.precision"] = self.numerics.precision
        found["model.dtype"] = self.numerics.base_dtype
        return found

    def with_micro_batch_size(self, rows: int) -> Plan:
        """The same training, cut into smaller micro-batches."""
        passes = self.recipe.train.global_batch_size // rows
        fit = replace(self.fit, micro_batch_size=rows, gradient_accumulation_steps=passes)
        return replace(self, fit=fit, recipe=with_shape(self.recipe, fit))

    def counts(self) -> dict[str, int]:
        """Every token of the training documents is in a row or dropped."""
        return {
            "documents": len(self.corpus.train),
            "held_out_documents": len(self.corpus.held_out),
            "rows": len(self.blocks),
            "tokens": self.blocks.tokens,
            "targets": self.blocks.targets,
            "dropped_tokens": self.blocks.dropped_tokens,
        }

    def _device(self) -> str:
        if self.card is None:
            return str(self.numerics.device)
        here = self.numerics.device.type == "cuda"
        return f"{self.card.name} ({self.numerics.device if here else 'simulated'})"

    def _speed(self) -> str:
        measured = self.fit.measurement
        if measured is None or not measured.tokens_per_second:
            return ""
        seconds = self.blocks.tokens / measured.tokens_per_second
        return f", about {seconds:,.0f} s as measured"

    def describe(self) -> list[tuple[str, str]]:
        """Name and value, for people."""
        chosen, recipe = self.fit, self.recipe
        share = self.parameters.trainable / self.parameters.total
        return [
            ("device", f"{self._device()}, {self.numerics.precision}"),
            ("base", f"{recipe.model.name}, {self.numerics.base_dtype}"),
            ("trainable", f"{self.parameters.trainable:,} parameters ({share:.2%})"),
            (
                "data",
                "{documents:,} documents to train on, {held_out_documents:,} held out; {rows:,} "
                "rows, {tokens:,} tokens, {targets:,} targets, {dropped_tokens:,} tokens "
                "dropped".format(**self.counts()),
            ),
            (
                "step",
                f"{recipe.train.global_batch_size} rows of up to {chosen.max_seq_len} tokens = "
                f"{chosen.gradient_accumulation_steps} x {chosen.micro_batch_size}, "
                f"{in_words(chosen.gradient_checkpointing, chosen.blocks)} ({chosen.reason})",
            ),
            ("steps", f"{self.total_steps:,} ({self.steps_per_epoch:,} an epoch{self._speed()})"),
        ]


def plan(
    recipe: Recipe, progress: Progress | None = None, *, elsewhere: Card | None = None
) -> Plan:
    """Read and cut the data, choose the shape; no weights are loaded.

    `elsewhere` is a card that the plan is for, if it is not this machine that will run it.
    """
    if elsewhere is not None:
        numerics = choose_numerics(recipe, simulated_device(), elsewhere.compute_capability)
    else:
        numerics = choose_numerics(recipe)
    config = load_config(recipe.model.name, recipe.model.revision)
    parameters = count_parameters(recipe)
    tokenizer = build_tokenizer(recipe, config.get_text_config().vocab_size)
    corpus = build_corpus(recipe, tokenizer, progress)
    card = elsewhere or (card_here() if numerics.device.type == "cuda" else None)
    chosen = choose_fit(
        recipe,
        card,
        context_length=context_length(config),
        longest_document=corpus.longest,
        on_card=elsewhere is None,
    )
    blocks = build_blocks(recipe, corpus, chosen.max_seq_len)
    if len(blocks) == 0:
        raise DataError(
            "data.source: no document has a token to predict; each needs two tokens or more"
        )
    an_epoch = steps_per_epoch(blocks, recipe.train.global_batch_size)
    total = min(recipe.train.epochs * an_epoch, recipe.train.max_steps or 2**62)
    stride, stride_note = _stride(recipe, chosen.max_seq_len)
    new_tokens, new_tokens_note = _max_new_tokens(recipe, context_length(config))
    notes = (
        *numerics.notes,
        *corpus.notes,
        stride_note,
        new_tokens_note,
        warmup_steps(recipe, total)[1],
    )
    return Plan(
        recipe=with_shape(recipe, chosen),
        numerics=numerics,
        tokenizer=tokenizer,
        corpus=corpus,
        fit=chosen,
        blocks=blocks,
        parameters=parameters,
        steps_per_epoch=an_epoch,
        total_steps=total,
        context_length=chosen.max_seq_len,
        stride=stride,
        max_new_tokens=new_tokens,
        notes=tuple(note for note in notes if note),
        card=card,
    )


def choose_fit(
    recipe: Recipe,
    card: Card | None,
    *,
    context_length: int,
    longest_document: int,
    on_card: bool,
) -> Fit:
    """`fit` for a card or, if None, for a CPU; `on_card` says that the card is here to be tried."""
    choose = partial(fit, recipe, context_length=context_length, longest_document=longest_document)
    if card is None:
        return choose()
    card = limited(card, recipe)

    def search() -> Fit:
        with predictor(card) as predict:
            return choose(predict=predict, measure=measure if on_card else None)

    lengths = (context_length, longest_document)
    return remembered(recipe, card, lengths, search) if on_card else search()


def _max_new_tokens(recipe: Recipe, positions: int) -> tuple[int, str | None]:
    """Half of the model's positions at most, so that a prompt has room."""
    wanted = recipe.generate.max_new_tokens
    if wanted <= positions // 2:
        return wanted, None
    return positions // 2, (
        f"generate.max_new_tokens {wanted} leaves a prompt less than half of the model's "
        f"{positions} positions: using {positions // 2}"
    )


def _stride(recipe: Recipe, context: int) -> tuple[int, str | None]:
    wanted = recipe.evaluate.stride
    if wanted == "auto":
        return max(1, context // 2), None
    if wanted < context:
        return wanted, None
    return max(1, context // 2), (
        f"evaluate.stride {wanted} is not below the context of {context} tokens: "
        f"using {max(1, context // 2)}"
    )
