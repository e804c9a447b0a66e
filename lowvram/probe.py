"""What a card can do with a recipe: the frontier, or one shape and what would make it smaller."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from lowvram.build import build_corpus, build_tokenizer
from lowvram.checkpointing import block_count, check_blocks
from lowvram.errors import DoesNotFit, LowVRAMError, RecipeError
from lowvram.fit import Fit, choose_seq_len, fit, recomputing, said
from lowvram.fit_cache import remembered
from lowvram.frontier import MOST_ROWS, frontier, sequence_lengths
from lowvram.levers import Lever, levers
from lowvram.measurement import Measure, Measurement, accepted, smaller
from lowvram.memory import Card
from lowvram.model import context_length, known_config
from lowvram.prediction import Prediction, predictor
from lowvram.prices import time_of
from lowvram.recipe import Recipe
from lowvram.rehearsal import BatchShape
from lowvram.target import limited

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, kw_only=True)
class Frontier:
    """The largest micro-batch that fits for each length, and the shape that a run would take."""

    card: Card
    rows: Sequence[Prediction]
    context_length: int
    """Of the model, in tokens; the rows end at 4,096."""
    chosen: Fit | None
    reason: str
    """Why this shape, or why none."""

    def to_json(self) -> dict[str, Any]:
        return {
            "card": self.card.name,
            "budget_bytes": self.card.budget(),
            "context_length": self.context_length,
            "frontier": [_fitting(row) for row in self.rows],
            "chosen": None if self.chosen is None else _chosen(self.chosen, self.reason),
        }


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Whether one shape fits, what is on the card at its peak, and what would save memory."""

    card: Card
    prediction: Prediction
    levers: Sequence[Lever]
    measurement: Measurement | None
    refused: str | None
    """Why the measurement is no proof, if it is none."""
    blocks: int
    """That the model has."""

    @property
    def fits(self) -> bool:
        return self.prediction.fits and self.refused is None

    def to_json(self) -> dict[str, Any]:
        measured = self.measurement
        return {
            "card": self.card.name,
            "budget_bytes": self.card.budget(),
            "fits": self.fits,
            **self.prediction.to_json(),
            "categories": self.prediction.categories,
            "levers": [lever.to_json() for lever in self.levers],
            "measured": None if measured is None else asdict(measured),
            "refused": self.refused,
        }


def _fitting(row: Prediction) -> dict[str, Any]:
    """Where not even one row fits: none, and what one would take."""
    values = row.to_json()
    return values if row.fits else {**values, "micro_batch_size": 0}


def _chosen(chosen: Fit, reason: str) -> dict[str, Any]:
    budget, reserved = chosen.budget_bytes or 0, chosen.predicted_reserved_bytes or 0
    measured = chosen.measurement
    return {
        "seq_len": chosen.max_seq_len,
        "gradient_checkpointing": chosen.gradient_checkpointing,
        "micro_batch_size": chosen.micro_batch_size,
        "gradient_accumulation_steps": chosen.gradient_accumulation_steps,
        "predicted_reserved_bytes": reserved,
        "predicted_allocated_bytes": chosen.predicted_allocated_bytes,
        "headroom_bytes": budget - reserved,
        "measured": None if measured is None else asdict(measured),
        "reason": reason,
    }


def probe(
    recipe: Recipe, card: Card, *, measure: Measure | None = None, progress: Progress | None = None
) -> Frontier:
    """The frontier; with `measure`, the chosen shape is confirmed on the card."""
    positions = _positions(recipe)
    card = limited(card, recipe)
    with predictor(card) as predict:
        rows = frontier(recipe, predict, sequence_lengths(positions), progress)
        search = partial(
            fit,
            recipe,
            context_length=positions,
            longest_document=positions,
            predict=predict,
            measure=measure,
        )
        lengths = (positions, positions)
        chosen: Fit | None = None
        try:
            chosen = remembered(recipe, card, lengths, search) if measure else search()
        except DoesNotFit as error:
            reason = str(error)
        else:
            reason = _why(recipe, chosen)
    return Frontier(card=card, rows=rows, context_length=positions, chosen=chosen, reason=reason)


def ask(
    recipe: Recipe,
    card: Card,
    *,
    seq_len: int | None,
    micro_batch_size: int | None,
    measure: Measure | None = None,
) -> Answer:
    """One shape. What is not given is the recipe's: where that says auto, the whole global batch,
    the longest rows and the cheapest recomputation that fits.
    """
    card = limited(card, recipe)
    positions = _positions(recipe)
    blocks = block_count(known_config(recipe.model.name, recipe.model.revision))
    with predictor(card) as predict:
        shape = _asked(recipe, positions, seq_len, micro_batch_size)
        prediction = predict(recipe, shape)
        if recipe.fit.gradient_checkpointing == "auto" and not prediction.fits:
            at = partial(predict, recipe)
            for other in recomputing(shape, blocks, recipe.method.name, at):
                prediction = at(other)
                if prediction.fits:
                    break
        shape = prediction.shape
        found = levers(recipe, predict, prediction)
    measured, refused = None, None
    if measure is not None and prediction.fits:
        measured = measure(recipe, shape)
        refused = accepted(measured, card.budget(), smaller(recipe, shape, measure))
    return Answer(
        card=card,
        prediction=prediction,
        levers=found,
        measurement=measured,
        refused=refused,
        blocks=blocks,
    )


def epoch_seconds(recipe: Recipe, measured: Measurement) -> float | None:
    """From the measured speed and the tokens of the data; None where it cannot be read."""
    if not measured.tokens_per_second:
        return None
    try:
        config = known_config(recipe.model.name, recipe.model.revision)
        tokenizer = build_tokenizer(recipe, config.get_text_config().vocab_size)
        corpus = build_corpus(recipe, tokenizer)
    except LowVRAMError:
        return None
    return float(corpus.store.lengths(corpus.train).sum() / measured.tokens_per_second)


def _positions(recipe: Recipe) -> int:
    """Tokens that the model has positions for; what it has not is refused before any search."""
    config = known_config(recipe.model.name, recipe.model.revision)
    positions = context_length(config)
    choose_seq_len(recipe.fit.max_seq_len, positions, positions)
    check_blocks(recipe.fit.gradient_checkpointing, block_count(config))
    return positions


def _asked(
    recipe: Recipe, positions: int, seq_len: int | None, micro_batch_size: int | None
) -> BatchShape:
    wanted = recipe.fit
    if seq_len is not None and not 2 <= seq_len <= positions:
        raise RecipeError(f"--seq-len: found {seq_len}, the model allows 2 to {positions}")
    length = seq_len or choose_seq_len(wanted.max_seq_len, positions, positions)
    rows = micro_batch_size or wanted.micro_batch_size
    if rows != "auto" and rows > MOST_ROWS:
        raise RecipeError(f"--micro-batch-size: found {rows}, allowed 1 to {MOST_ROWS}")
    return BatchShape(
        micro_batch_size=recipe.train.global_batch_size if rows == "auto" else rows,
        seq_len=length,
        gradient_checkpointing=said(wanted.gradient_checkpointing),
    )


def _why(recipe: Recipe, chosen: Fit) -> str:
    size, kind = recipe.train.global_batch_size, chosen.gradient_checkpointing
    if chosen.micro_batch_size == size:
        rows = "the whole global batch at once"
    elif kind is False:
        rows = f"the most rows that fit and divide the global batch of {size}"
    else:
        rows = f"as many rows as fit or keep a card busy, of those that divide the {size} of a step"
    if recipe.fit.gradient_checkpointing != "auto":
        return f"{rows}; recomputation as the recipe says"
    time = time_of(True if kind is False else kind, chosen.blocks, recipe.method.name)
    if kind is False:
        return f"{rows}; recomputing all blocks would take {time:.2f} x the time"
    return f"{rows}; the cheapest recomputation that fits, {time:.2f} x the time of none"
