"""The card that a recipe is for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from fakes import MIB, patch

from lowvram.errors import DeviceError, RecipeError
from lowvram.memory import find_card
from lowvram.prediction import with_budget
from lowvram.recipe import Recipe
from lowvram.target import card_here, limited, named_card

GIB = 2**30
SYSTEMS = ("headless", "desktop", "windows")


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_card_by_its_name(system: Any) -> None:
    """What others hold of it depends on the system, and is settled then."""
    card = named_card("RTX 4070 Ti", None, system)

    assert card is not None
    assert {card.budget(other) for other in SYSTEMS} == {find_card("rtx-4070-ti").budget(system)}


@pytest.mark.parametrize(("size", "budget"), [("12GiB", 12 * GIB), ("11500MiB", 11_500 * MIB)])
def test_a_card_of_a_size(size: str, budget: int) -> None:
    card = named_card(None, size)

    assert card is not None
    assert card.budget() == budget


def test_no_card_is_asked_for() -> None:
    assert named_card(None, None) is None


@pytest.mark.parametrize(
    ("gpu", "vram", "error", "message"),
    [
        ("rtx-4070-ti", "12GiB", DeviceError, "--gpu and --vram: give one of them; "),
        ("rtx-4070-it", None, DeviceError, "unknown card 'rtx-4070-it'. Did you mean rtx-4070-ti"),
        (None, "much", RecipeError, "--vram: found 'much'; "),
        (None, "12", RecipeError, "--vram: found '12'; "),
        (None, "0GiB", RecipeError, "--vram: found '0GiB'; "),
    ],
)
def test_cards_that_are_none(
    gpu: str | None, vram: str | None, error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as raised:
        named_card(gpu, vram)
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize(
    ("free", "budget"), [(9000, 8960), (8960, 8960), (8959, 8896), (63, 0), (0, 0)]
)
def test_what_is_free_on_the_card_here_is_rounded_down_to_64_mib(
    monkeypatch: pytest.MonkeyPatch, free: int, budget: int
) -> None:
    """So that an answer does not change with every window that is opened."""
    found = with_budget(find_card("rtx-4070-ti"), free * MIB)
    patch(monkeypatch, "lowvram.target", card_in_machine=lambda: found)

    card = card_here()

    assert card is not None
    assert card.budget() == budget * MIB


def test_no_card_here() -> None:
    assert card_here() is None


@pytest.mark.parametrize(("vram", "budget"), [("auto", 8), ("6GiB", 6), ("24GiB", 8)])
def test_fit_vram_is_the_most_that_a_run_may_use(
    make_recipe: Callable[..., Recipe], vram: str, budget: int
) -> None:
    card = with_budget(find_card("rtx-4070-ti"), 8 * GIB)

    assert limited(card, make_recipe(**{"fit.vram": vram})).budget() == budget * GIB
