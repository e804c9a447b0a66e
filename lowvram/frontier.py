"""The largest micro-batch that fits, for each length of sequence: what a card can do with a recipe.

Memory is nearly affine in the micro-batch, so few simulations find where the budget is met. What
is answered was simulated and fits, and one more row was simulated and does not. Close to the budget
a few rows more may fit again, since there the allocator gives back what it keeps, sooner or later.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lowvram.checkpointing import Checkpointing
from lowvram.prediction import Predict, Prediction
from lowvram.recipe import Recipe
from lowvram.rehearsal import BatchShape

MOST_ROWS = 4096
"""No search goes beyond."""
_SHORTEST, _LONGEST = 256, 4096
# Memory that grows in steps, or only from some number of rows on, can keep a line from ever
# getting close; so after this many tries, each takes half of what is open.
_BY_LINE = 8


def sequence_lengths(context_length: int) -> list[int]:
    """256, 512, 1024, ... and the model's limit, up to 4,096.

    Beyond, each length takes the time of all before it, and few train on such rows on a small card.
    """
    longest = min(context_length, _LONGEST)
    lengths = []
    length = _SHORTEST
    while length < longest:
        lengths.append(length)
        length *= 2
    return [*lengths, longest]


def frontier(
    recipe: Recipe,
    predict: Predict,
    lengths: Sequence[int],
    progress: Callable[[int, int, str], None] | None = None,
) -> list[Prediction]:
    """For each length, without and with gradient checkpointing; 0 rows where not one fits."""
    found: list[Prediction] = []
    for length in lengths:
        for checkpointing in (False, True):
            if progress is not None:
                progress(len(found), 2 * len(lengths), f"{length} tokens")
            # As many tokens as in the shorter rows before are nearly right.
            like = found[-2].shape if len(found) > 1 else None
            rows = like.micro_batch_size * like.seq_len // length if like else 0
            found.append(largest(recipe, predict, length, checkpointing, near=rows))
    return sorted(found, key=lambda one: (one.shape.seq_len, one.shape.gradient_checkpointing))


def largest(
    recipe: Recipe,
    predict: Predict,
    seq_len: int,
    gradient_checkpointing: Checkpointing,
    *,
    near: int = 0,
) -> Prediction:
    """The prediction for the most rows that fit, or, with `fits` False, for one row.

    `near` is where to look first.
    """

    def at(rows: int) -> Prediction:
        return predict(
            recipe,
            BatchShape(
                micro_batch_size=rows,
                seq_len=seq_len,
                gradient_checkpointing=gradient_checkpointing,
            ),
        )

    first = at(1)
    return most(at, 1, MOST_ROWS, near=max(4, near))[1] if first.fits else first


Tried = tuple[int, Prediction]


def most(at: Callable[[int], Prediction], least: int, limit: int, *, near: int) -> Tried:
    """The largest number up to `limit` for which `at` fits, as it does for `least`.

    Memory is taken to grow with the number. `near` is where to look first.
    """
    first = best = (least, at(least))
    worst: Tried | None = None
    number, tries = near, 0
    while (worst is None or worst[0] > best[0] + 1) and best[0] < limit:
        tried = number, at(number)
        if tried[1].fits:
            best = tried
        else:
            worst = tried
        tries += 1
        number = min(_next(first, best, worst, by_line=tries < _BY_LINE), limit)
    return best


def _next(first: Tried, best: Tried, worst: Tried | None, *, by_line: bool) -> int:
    """Where a straight line meets the budget, or half of what is still open.

    The line is that through what is known on both sides of the budget, or below it.
    """
    low, high = (first, best) if worst is None else (best, worst)
    slope = (high[1].reserved_bytes - low[1].reserved_bytes) / (high[0] - low[0])
    if by_line and slope > 0:
        guess = low[0] + int(low[1].headroom_bytes / slope)
    elif worst is None:
        guess = 4 * best[0]
    else:
        guess = (best[0] + worst[0]) // 2
    guess = max(guess, best[0] + 1)
    return guess if worst is None else min(guess, worst[0] - 1)
