"""The shape of a step: what fits into the memory there is, without changing the training.

`global_batch_size` is the recipe's and stays; the micro-batch only decides into how many forward
passes a step is cut. On a card, every shape is simulated before it is taken. A CPU has no such
limit, and gets as many tokens at a time as keep it busy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from lowvram.checkpointing import Checkpointing, block_count, check_blocks, in_words
from lowvram.errors import DoesNotFit, RecipeError
from lowvram.frontier import most
from lowvram.levers import levers
from lowvram.measurement import Measure, Measurement, accepted, smaller
from lowvram.memory.measure import format_gib
from lowvram.model import known_config
from lowvram.prediction import Predict, Prediction
from lowvram.prices import time_of
from lowvram.recipe import Recipe, with_overrides
from lowvram.rehearsal import BatchShape

LONGEST_AUTO = 1024
"""Tokens; longer rows have to be asked for."""
_CPU_TOKENS = 2048
# With fewer tokens in a forward pass a card waits for its next kernel rather than for memory, and
# recomputing activations to get a larger pass is worth its third of the time. More bring nothing.
_USEFUL_TOKENS = 4096
_MOST_TRIES = 3


@dataclass(frozen=True, kw_only=True)
class Fit:
    """`micro_batch_size` sequences of up to `max_seq_len` tokens in one forward pass."""

    micro_batch_size: int
    max_seq_len: int
    gradient_checkpointing: Checkpointing
    gradient_accumulation_steps: int
    reason: str
    blocks: int
    """That the model has."""
    predicted_reserved_bytes: int | None = None
    """None on a CPU."""
    predicted_allocated_bytes: int | None = None
    budget_bytes: int | None = None
    measurement: Measurement | None = None
    """Of real steps of this shape, before the run."""


def fit(
    recipe: Recipe,
    *,
    context_length: int,
    longest_document: int,
    predict: Predict | None = None,
    measure: Measure | None = None,
) -> Fit:
    """Choose what the recipe leaves to `auto`.

    `predict` is for a card; None stands for a CPU. With `measure` the shape is tried on the card
    before it is taken. Raises RecipeError for what cannot be, DoesNotFit for what the card has no
    room for.
    """
    seq_len = choose_seq_len(recipe.fit.max_seq_len, context_length, longest_document)
    blocks = block_count(known_config(recipe.model.name, recipe.model.revision))
    check_blocks(recipe.fit.gradient_checkpointing, blocks)
    if predict is None:
        return _for_cpu(recipe, seq_len, blocks)
    refused: dict[BatchShape, str] = {}
    for shape in _fitting(recipe, seq_len, blocks, predict):
        if shape in refused:
            continue
        prediction = predict(recipe, shape)
        if measure is None:
            return _chosen(recipe, prediction, None, blocks)
        measurement = measure(recipe, shape)
        reason = accepted(measurement, prediction.budget_bytes, smaller(recipe, shape, measure))
        if reason is None:
            return _chosen(recipe, prediction, measurement, blocks)
        refused[shape] = f"{_words(shape, blocks)}: {reason}"
        if len(refused) == _MOST_TRIES:
            break
    if refused:
        raise DoesNotFit(
            f"the card refuses what should fit: {'; '.join(refused.values())}. Other programs may "
            "have taken its memory meanwhile: see nvidia-smi, or set fit.vram to less than it has"
        )
    raise DoesNotFit(_refusal(recipe, predict, predict(recipe, _least(recipe, seq_len)), blocks))


def with_shape(recipe: Recipe, chosen: Fit) -> Recipe:
    """The recipe with the chosen shape in place of what it left to auto."""
    return with_overrides(
        recipe,
        {
            "fit.micro_batch_size": chosen.micro_batch_size,
            "fit.max_seq_len": chosen.max_seq_len,
            "fit.gradient_checkpointing": chosen.gradient_checkpointing,
        },
    )


def choose_seq_len(wanted: str | int, context_length: int, longest_document: int) -> int:
    if isinstance(wanted, int):
        if wanted > context_length:
            raise RecipeError(
                f"fit.max_seq_len: found {wanted}, the model has {context_length} positions; "
                f"allowed 2 to {context_length}"
            )
        return wanted
    # The next power of two that holds the longest document: shorter rows cut it, longer ones
    # cost memory and bring nothing.
    needed = 1 << max(4, (longest_document - 1).bit_length())
    return min(needed, context_length, LONGEST_AUTO)


def _rooms(recipe: Recipe) -> tuple[int, ...]:
    """Bytes to leave free; rather than refuse, none."""
    if recipe.fit.micro_batch_size != "auto":
        return (0,)
    return (recipe.fit.headroom_bytes, 0)


Fits = Callable[[BatchShape], Prediction]
"""A prediction whose `fits` and `headroom_bytes` allow for what is to be left free."""


def _fitting(recipe: Recipe, seq_len: int, blocks: int, predict: Predict) -> Iterator[BatchShape]:
    """Shapes that are predicted to fit, the best first."""
    for room in _rooms(recipe):

        def at(shape: BatchShape, room: int = room) -> Prediction:
            found = predict(recipe, shape)
            fits = found.fits and found.headroom_bytes >= room
            return replace(found, fits=fits, budget_bytes=found.budget_bytes - room)

        for shape in _options(recipe, seq_len, blocks, at):
            if at(shape).fits:
                yield shape


def _options(recipe: Recipe, seq_len: int, blocks: int, at: Fits) -> Iterator[BatchShape]:
    """Shapes that the recipe allows, the best first.

    As many rows as divide the global batch, the more the better, as long as a forward pass is of
    a useful size and nothing has to be recomputed. Else the fewest rows of a useful size, with
    what takes least time of what fits. Else fewer rows, with as little recomputation.
    """
    rows, wanted = _rows(recipe), recipe.fit.gradient_checkpointing
    shapes = [
        BatchShape(micro_batch_size=n, seq_len=seq_len, gradient_checkpointing=False) for n in rows
    ]
    if wanted != "auto":
        yield from (replace(shape, gradient_checkpointing=wanted) for shape in shapes)
        return
    useful = [shape for shape in shapes if shape.micro_batch_size * seq_len >= _USEFUL_TOKENS]
    least_useful = max(1, len(useful)) - 1
    yield from shapes[:least_useful]
    for shape in shapes[least_useful:]:
        yield shape
        yield from recomputing(shape, blocks, recipe.method.name, at)


def recomputing(shape: BatchShape, blocks: int, method: str, at: Fits) -> Iterator[BatchShape]:
    """The same rows, with some recomputation, by what it costs.

    Two simulations where not even recomputing all helps, else four to seven for most models.
    """
    every = replace(shape, gradient_checkpointing=True)
    if at(every).fits and not at(shape).fits:

        def keeping(kept: int) -> BatchShape:
            again: Checkpointing = {0: True, blocks: False}.get(kept, blocks - kept)
            return replace(shape, gradient_checkpointing=again)

        kept, _ = most(lambda kept: at(keeping(kept)), 0, blocks, near=blocks)
        some, selective = keeping(kept), replace(shape, gradient_checkpointing="selective")
        times = [time_of(x.gradient_checkpointing, blocks, method) for x in (selective, some)]
        if times[0] < times[1] and at(selective).fits:
            yield selective
        yield some
    yield every
    yield replace(shape, gradient_checkpointing="offload")


def _rows(recipe: Recipe) -> list[int]:
    """Of a micro-batch, the most first."""
    size, wanted = recipe.train.global_batch_size, recipe.fit.micro_batch_size
    if wanted != "auto":
        return [wanted]
    if recipe.train.fused_backward:
        return [size]
    return [n for n in range(size, 0, -1) if size % n == 0]


def _least(recipe: Recipe, seq_len: int) -> BatchShape:
    """What takes the least memory of all that the recipe allows."""
    wanted = recipe.fit.gradient_checkpointing
    return BatchShape(
        micro_batch_size=_rows(recipe)[-1],
        seq_len=seq_len,
        gradient_checkpointing="offload" if wanted == "auto" else wanted,
    )


def _chosen(
    recipe: Recipe, prediction: Prediction, measurement: Measurement | None, blocks: int
) -> Fit:
    shape = prediction.shape
    reason = (
        f"predicted peak {format_gib(prediction.reserved_bytes)} of "
        f"{format_gib(prediction.budget_bytes)}"
    )
    if measurement is not None:
        reason += f", measured {format_gib(measurement.reserved_bytes)}"
    return Fit(
        micro_batch_size=shape.micro_batch_size,
        max_seq_len=shape.seq_len,
        gradient_checkpointing=shape.gradient_checkpointing,
        gradient_accumulation_steps=recipe.train.global_batch_size // shape.micro_batch_size,
        reason=reason,
        blocks=blocks,
        predicted_reserved_bytes=prediction.reserved_bytes,
        predicted_allocated_bytes=prediction.allocated_bytes,
        budget_bytes=prediction.budget_bytes,
        measurement=measurement,
    )


def _for_cpu(recipe: Recipe, seq_len: int, blocks: int) -> Fit:
    wanted, size = recipe.fit, recipe.train.global_batch_size
    if wanted.micro_batch_size != "auto":
        micro, reason = wanted.micro_batch_size, "as the recipe says"
    elif recipe.train.fused_backward:
        micro, reason = size, "one micro-batch a step, for train.fused_backward"
    else:
        rows = [n for n in range(1, size + 1) if size % n == 0]
        micro = max(n for n in rows if n == 1 or n * seq_len <= _CPU_TOKENS)
        reason = f"on a CPU, up to {_CPU_TOKENS:,} tokens at a time"
    return Fit(
        micro_batch_size=micro,
        max_seq_len=seq_len,
        gradient_checkpointing=said(wanted.gradient_checkpointing),
        gradient_accumulation_steps=size // micro,
        reason=reason,
        blocks=blocks,
    )


def said(wanted: Checkpointing | Literal["auto"]) -> Checkpointing:
    """What a recipe says, where nobody chooses."""
    return False if wanted == "auto" else wanted


def _refusal(recipe: Recipe, predict: Predict, least: Prediction, blocks: int) -> str:
    """What is missing, and what would give it."""
    text = (
        f"{_words(least.shape, blocks)} take {format_gib(least.reserved_bytes)}, and the card has "
        f"{format_gib(least.budget_bytes)} for them (predicted). "
    )
    found = levers(recipe, predict, least)
    enough = [lever for lever in found if lever.prediction.fits]
    shown = ", ".join(
        f"{lever.change} ({format_gib(lever.prediction.reserved_bytes)}, {lever.price})"
        for lever in (enough or found)[:4]
    )
    if enough:
        return text + f"Each of these would fit: {shown}"
    tried = "Nothing in the recipe makes it smaller"
    if found:
        tried = f"No single change is enough; the largest are {shown}"
    return f"{text}{tried}. Else: a smaller model, or a larger card"


def _words(shape: BatchShape, blocks: int) -> str:
    recomputed = in_words(shape.gradient_checkpointing, blocks)
    return f"{shape.micro_batch_size} x {shape.seq_len} tokens with {recomputed}"
