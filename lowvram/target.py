"""The card that a recipe is for: the one named, the one of a size, or the one that is here."""

from __future__ import annotations

from lowvram.errors import DeviceError, RecipeError
from lowvram.memory import Card, card_in_machine, card_of_size, find_card
from lowvram.memory.cards import System
from lowvram.prediction import with_budget
from lowvram.recipe import Recipe, parse_size

# What is free on a card changes all the time; an answer should not.
_STEP = 64 * 2**20


def named_card(gpu: str | None, vram: str | None, system: System = "headless") -> Card | None:
    """For --gpu and --vram; None if neither is given."""
    if gpu is not None and vram is not None:
        raise DeviceError("--gpu and --vram: give one of them; a card has its own memory")
    if gpu is not None:
        card = find_card(gpu)
        return with_budget(card, card.budget(system))
    if vram is None:
        return None
    try:
        return card_of_size(parse_size(vram))
    except ValueError as error:
        raise RecipeError(f"--vram: found {vram!r}; {error}") from error


def card_here() -> Card | None:
    """The card in this machine, with what is free on it now."""
    card = card_in_machine()
    return None if card is None else with_budget(card, card.budget() // _STEP * _STEP)


def limited(card: Card, recipe: Recipe) -> Card:
    """At most what `fit.vram` allows."""
    allowed = recipe.fit.vram_bytes
    return card if allowed is None else with_budget(card, min(allowed, card.budget()))
