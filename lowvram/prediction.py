"""What a run would take on a card, from a simulation of its own steps."""

from __future__ import annotations

import dataclasses
import functools
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from lowvram.build import choose_numerics
from lowvram.memory import Card, MemoryTrace, simulate
from lowvram.memory.device import simulated_device
from lowvram.recipe import Recipe
from lowvram.rehearsal import STEPS, BatchShape, Rehearsal, pinned, rehearse

_UNLIMITED = 1 << 45


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """All sizes in bytes."""

    shape: BatchShape
    fits: bool
    reserved_bytes: int
    """At the peak. For what does not fit: what it would take if there were enough."""
    allocated_bytes: int
    budget_bytes: int
    categories: dict[str, int]
    """Live bytes at the peak, by what they are for."""

    @property
    def headroom_bytes(self) -> int:
        return self.budget_bytes - self.reserved_bytes

    def to_json(self) -> dict[str, Any]:
        return {
            "seq_len": self.shape.seq_len,
            "gradient_checkpointing": self.shape.gradient_checkpointing,
            "micro_batch_size": self.shape.micro_batch_size,
            "predicted_reserved_bytes": self.reserved_bytes,
            "predicted_allocated_bytes": self.allocated_bytes,
            "headroom_bytes": self.headroom_bytes,
        }


Predict = Callable[[Recipe, BatchShape], Prediction]


def with_budget(card: Card, budget_bytes: int) -> Card:
    """The same card, with another amount for the allocator."""
    held = card.total_bytes - card.context_bytes - budget_bytes
    return dataclasses.replace(card, held_bytes=held)


def trace(recipe: Recipe, card: Card, shape: BatchShape) -> MemoryTrace:
    """The rehearsal of a run, on the simulated device; `card` limits it to its budget."""
    recipe = pinned(recipe, shape)
    numerics = choose_numerics(recipe, simulated_device(), card.compute_capability)
    return simulate(lambda _: rehearse(recipe, numerics), Rehearsal.step, steps=STEPS, card=card)


def predict(card: Card, recipe: Recipe, shape: BatchShape) -> Prediction:
    """Without a limit first: what stays below the budget never meets it.

    What goes above it may still fit, since the allocator gives back what it keeps for later
    before it fails.
    """
    budget = card.budget()
    found = trace(recipe, with_budget(card, _UNLIMITED), shape)
    fits = found.peak_reserved_bytes <= budget
    if not fits and found.peak_allocated_bytes <= budget:
        limited = trace(recipe, card, shape)
        if limited.out_of_memory is None:
            found, fits = limited, True
    return Prediction(
        shape=shape,
        fits=fits,
        reserved_bytes=found.peak_reserved_bytes,
        allocated_bytes=found.peak_allocated_bytes,
        budget_bytes=budget,
        categories={name: size for name, size in found.by_category().items()},
    )


@contextmanager
def predictor(card: Card) -> Iterator[Predict]:
    """A function that predicts for `card`; what it was asked before it remembers.

    With a card in the machine, the simulation gets a process of its own in which the card is
    hidden: the simulated device changes for good what PyTorch takes for the accelerator of its
    process.
    """
    known: dict[Any, Prediction] = {}
    with _somewhere() as submit:

        def remembered(recipe: Recipe, shape: BatchShape) -> Prediction:
            key = (recipe.model_dump_json(), shape)
            if key not in known:
                known[key] = submit(card, recipe, shape)
            return known[key]

        yield remembered


@contextmanager
def _somewhere() -> Iterator[Callable[[Card, Recipe, BatchShape], Prediction]]:
    if not torch.cuda.is_available():
        yield predict
        return
    context = multiprocessing.get_context("spawn")
    hidden = functools.partial(os.environ.__setitem__, "CUDA_VISIBLE_DEVICES", "")
    with ProcessPoolExecutor(1, mp_context=context, initializer=hidden) as executor:
        yield lambda *args: executor.submit(predict, *args).result()
