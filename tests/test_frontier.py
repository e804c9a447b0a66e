"""The largest micro-batch that fits: it fits, one more does not, and few predictions find it."""

from __future__ import annotations

import random
from typing import Any

import pytest
from fakes import MIB, Cost, FakePredict

from lowvram.frontier import MOST_ROWS, frontier, largest, sequence_lengths
from lowvram.memory import card_of_size
from lowvram.prediction import Prediction, predict, predictor
from lowvram.rehearsal import BatchShape

BUDGET = 12_000 * MIB


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (1024, [256, 512, 1024]),
        (2048, [256, 512, 1024, 2048]),
        (1000, [256, 512, 1000]),
        (257, [256, 257]),
        (256, [256]),
        (64, [64]),
        (4096, [256, 512, 1024, 2048, 4096]),
        (65_536, [256, 512, 1024, 2048, 4096]),
    ],
)
def test_lengths_double_up_to_the_models_limit(limit: int, expected: list[int]) -> None:
    assert sequence_lengths(limit) == expected


# --- fake costs -----------------------------------------------------------------------------------


def affine(rows: int) -> float:
    return 500 + 73.0 * rows


def light(rows: int) -> float:
    """Two thousand rows fit."""
    return 1000 + 5.5 * rows


def heavy(rows: int) -> float:
    """Three rows fit."""
    return 3000 + 2800.0 * rows


def floor(rows: int) -> float:
    """An evaluation takes more than up to 500 rows of training."""
    return max(9000.0, 1500 + 15.0 * rows)


def jump(rows: int) -> float:
    """The second row costs nearly all there is, the others next to nothing."""
    return 300 + (11_000 if rows > 1 else 0) + 0.9 * rows


def steps(rows: int) -> float:
    """Segments of 640 MiB."""
    return 640 * -(-(700 + 31 * rows) // 640)


def noisy(rows: int) -> float:
    """Up to 5 % of fragmentation, another share for each size: more rows may take less."""
    return (800 + 52.0 * rows) * (1 + random.Random(rows).uniform(0, 0.05))


COSTS = [affine, light, heavy, floor, jump, steps, noisy]


def cost_of(megabytes: Any) -> Cost:
    return lambda shape: int(megabytes(shape.micro_batch_size) * MIB)


def search(megabytes: Any, near: int = 0) -> tuple[Prediction, FakePredict]:
    asked = FakePredict(cost_of(megabytes), BUDGET)
    recipe: Any = None  # the formula does not look at it
    return largest(recipe, asked, 512, False, near=near), asked


@pytest.mark.parametrize("near", [0, 1, 3, 700, MOST_ROWS])
@pytest.mark.parametrize("megabytes", COSTS)
def test_the_answer_fits_and_one_more_does_not(megabytes: Any, near: int) -> None:
    """Both were asked for. The worst is `jump`: 8 tries by line that all fall short, 6 that go up
    fourfold and 12 that halve what is open; a bisection of 4096 rows takes 13.
    """
    found, asked = search(megabytes, near)

    rows = found.shape.micro_batch_size
    assert found.fits
    assert megabytes(rows) * MIB <= BUDGET < megabytes(rows + 1) * MIB
    assert {rows, rows + 1} <= {shape.micro_batch_size for shape in asked.asked}
    assert len(asked.asked) <= (26 if megabytes is jump else 13)
    assert search(megabytes, near)[0] == found


@pytest.mark.parametrize("megabytes", [affine, light, heavy])
def test_a_straight_line_is_found_with_four_predictions(megabytes: Any) -> None:
    """One row, four rows, where the line meets the budget, and one more."""
    _, asked = search(megabytes)

    assert len(asked.asked) <= 4


def drawn(draw: random.Random) -> Any:
    """A line with a floor, with steps and with noise."""
    base, row = draw.uniform(100, 3000), 10 ** draw.uniform(0.5, 3)
    least, step, noise = draw.uniform(0, 6000), draw.uniform(1, 300), draw.uniform(0, 0.05)

    def megabytes(rows: int) -> float:
        more = 1 + random.Random(rows).uniform(0, noise)
        return step * (max(least, base + row * rows) * more // step + 1)

    return megabytes


def test_few_predictions_are_enough_on_the_average() -> None:
    """7.8 for each of 300 curves; bisections of 4096 rows would take 13."""
    draw = random.Random(0)
    counts = []
    for _ in range(300):
        megabytes = drawn(draw)
        found, asked = search(megabytes)
        rows = found.shape.micro_batch_size
        assert megabytes(rows) * MIB <= BUDGET < megabytes(rows + 1) * MIB
        counts.append(len(asked.asked))

    assert sum(counts) / len(counts) < 8
    assert max(counts) <= 20


def test_where_not_one_row_fits_one_is_asked_for() -> None:
    found, asked = search(lambda rows: 12_001 + rows)

    assert not found.fits
    assert found.shape.micro_batch_size == 1
    assert len(asked.asked) == 1


def test_the_search_ends_at_the_most_rows() -> None:
    found, asked = search(lambda rows: 500 + rows / 10)

    assert found.fits
    assert found.shape.micro_batch_size == MOST_ROWS
    assert max(shape.micro_batch_size for shape in asked.asked) == MOST_ROWS


def test_rows_come_by_length_without_checkpointing_first() -> None:
    def cost(shape: BatchShape) -> int:
        share = 0.2 if shape.gradient_checkpointing else 1.0
        return int((600 + share * shape.micro_batch_size * shape.seq_len / 8) * MIB)

    asked, told = FakePredict(cost, BUDGET), []
    recipe: Any = None

    found = frontier(
        recipe, asked, [256, 512, 1024], lambda done, total, text: told.append((done, total, text))
    )

    assert [
        (row.shape.seq_len, row.shape.gradient_checkpointing, row.shape.micro_batch_size)
        for row in found
    ] == [
        (256, False, 356),
        (256, True, 1781),
        (512, False, 178),
        (512, True, 890),
        (1024, False, 89),
        (1024, True, 445),
    ]
    assert all(row.fits for row in found)
    assert [(done, total) for done, total, _ in told] == [(done, 6) for done in range(6)]
    assert told[-1][2] == "1024 tokens"
    # The first length takes 4 predictions for each; from there on the tokens of the one before are
    # right to a row: one row, that, and its neighbour.
    assert len(asked.asked) <= 2 * 4 + 4 * 3


# --- the real predictor ---------------------------------------------------------------------------


def test_a_simulated_answer_holds_when_asked_again(make_recipe: Any) -> None:
    """The neighbours are predicted anew, by nobody who remembers anything.

    The tiny model and an evaluation of it take 46 MiB, 64 rows 52 MiB.
    """
    recipe, card = make_recipe(), card_of_size(60 * MIB)
    with predictor(card) as remembering:
        found = largest(recipe, remembering, 64, False)
    with predictor(card) as remembering:
        again = largest(recipe, remembering, 64, False)

    def fits(rows: int) -> bool:
        shape = BatchShape(micro_batch_size=rows, seq_len=64, gradient_checkpointing=False)
        return predict(card, recipe, shape).fits

    rows = found.shape.micro_batch_size
    assert found == again
    assert found.allocated_bytes <= found.reserved_bytes <= found.budget_bytes == 60 * MIB
    assert rows > 64
    assert fits(rows)
    assert not fits(rows + 1)


def test_a_card_too_small_for_the_model(make_recipe: Any) -> None:
    with predictor(card_of_size(40 * MIB)) as remembering:
        found = frontier(make_recipe(), remembering, [64])

    assert [row.fits for row in found] == [False, False]
    assert all(row.headroom_bytes < 0 for row in found)
