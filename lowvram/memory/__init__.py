"""Memory of a training step, known without a card. Imports torch and nothing of ours but errors."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowvram.memory.allocator import CachingAllocator, OutOfMemory
    from lowvram.memory.cards import Card, card_in_machine, card_of_size, find_card, list_cards
    from lowvram.memory.simulate import simulate
    from lowvram.memory.trace import MemoryTrace

_HOMES = {
    "CachingAllocator": "allocator",
    "Card": "cards",
    "MemoryTrace": "trace",
    "OutOfMemory": "allocator",
    "card_in_machine": "cards",
    "card_of_size": "cards",
    "find_card": "cards",
    "list_cards": "cards",
    "simulate": "simulate",
}

__all__ = [
    "CachingAllocator",
    "Card",
    "MemoryTrace",
    "OutOfMemory",
    "card_in_machine",
    "card_of_size",
    "find_card",
    "list_cards",
    "simulate",
]


def __getattr__(name: str) -> Any:
    """Cards and the allocator need no torch, so it is imported by those who do."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


class _Package(ModuleType):
    """`lowvram.memory.simulate` is the function, also after its module has been imported."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
