"""The shape of a step where the recipe leaves it open, and what it may not be."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lowvram.errors import RecipeError
from lowvram.fit import Fit, fit

CPU = torch.device("cpu")
CARD = torch.device("cuda", 0)
SMALL, LARGE = 124_000_000, 1_558_000_000


def shape(recipe: Any, **changes: Any) -> Fit:
    given = {
        "context_length": 1024,
        "longest_document": 5000,
        "parameters": SMALL,
        "device": CPU,
    }
    return fit(recipe, **(given | changes))


def test_more_tokens_than_positions_are_refused_before_anything_is_loaded(
    make_recipe: Any,
) -> None:
    recipe = make_recipe(**{"fit.max_seq_len": 2048})
    with pytest.raises(RecipeError) as error:
        shape(recipe)
    assert str(error.value) == (
        "fit.max_seq_len: found 2048, the model has 1024 positions; allowed 2 to 1024"
    )


@pytest.mark.parametrize(
    ("longest", "context", "expected"),
    [(5000, 1024, 1024), (5000, 131072, 1024), (100, 1024, 128), (128, 1024, 128), (3, 64, 16)],
)
def test_rows_are_as_long_as_the_data_needs(
    make_recipe: Any, longest: int, context: int, expected: int
) -> None:
    found = shape(make_recipe(), longest_document=longest, context_length=context)
    assert found.max_seq_len == expected


@pytest.mark.parametrize("size", [1, 2, 12, 30, 32])
def test_the_micro_batch_divides_the_global_one(make_recipe: Any, size: int) -> None:
    found = shape(make_recipe(**{"train.global_batch_size": size}))
    assert found.micro_batch_size * found.gradient_accumulation_steps == size
    assert found.micro_batch_size * found.max_seq_len <= 2048
    assert "by rule of thumb, not measured" in found.reason


def test_less_memory_and_larger_models_get_smaller_batches(make_recipe: Any) -> None:
    def micro(vram: str, parameters: int) -> int:
        recipe = make_recipe(**{"train.global_batch_size": 64, "fit.vram": vram})
        return shape(recipe, parameters=parameters, device=CARD).micro_batch_size

    assert micro("12GiB", SMALL) == 8
    assert micro("24GiB", SMALL) == 16
    assert micro("6GiB", SMALL) == 4
    assert micro("12GiB", LARGE) == 1


@pytest.mark.parametrize(
    ("device", "parameters", "expected"),
    [(CARD, SMALL, False), (CARD, LARGE, True), (CPU, LARGE, False)],
)
def test_large_models_on_a_card_are_recomputed(
    make_recipe: Any, device: torch.device, parameters: int, expected: bool
) -> None:
    recipe = make_recipe(**{"fit.vram": "12GiB"})
    found = shape(recipe, device=device, parameters=parameters)
    assert found.gradient_checkpointing is expected


def test_what_the_recipe_says_stays(make_recipe: Any) -> None:
    settings = {
        "fit.micro_batch_size": 2,
        "fit.max_seq_len": 48,
        "fit.gradient_checkpointing": True,
    }
    assert shape(make_recipe(**settings), parameters=LARGE) == Fit(
        micro_batch_size=2,
        max_seq_len=48,
        gradient_checkpointing=True,
        gradient_accumulation_steps=2,
        reason="as the recipe says",
    )
