"""What a run would take on a card, from a simulation of its own steps."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from lowvram.build import choose_numerics
from lowvram.errors import DeviceError
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
        categories=dict(found.by_category().items()),
    )


@contextmanager
def predictor(card: Card) -> Iterator[Predict]:
    """A function that predicts for `card`; what it was asked before it remembers.

    With a card in the machine, the simulation gets a process of its own in which the card is
    hidden: the simulated device changes for good what PyTorch takes for the accelerator of its
    process.
    """
    known: dict[Any, Prediction] = {}
    with _somewhere() as call:

        def remembered(recipe: Recipe, shape: BatchShape) -> Prediction:
            key = (recipe.model_dump_json(), shape)
            if key not in known:
                known[key] = call(predict, card, recipe, shape)
            return known[key]

        yield remembered


def plot(card: Card, recipe: Recipe, shape: BatchShape, path: Path) -> None:
    """The timeline of a shape, drawn where it is simulated."""
    with _somewhere() as call:
        call(_plot, card, recipe, shape, path)


def _plot(card: Card, recipe: Recipe, shape: BatchShape, path: Path) -> None:
    trace(recipe, card, shape).plot(path)


@contextmanager
def _somewhere() -> Iterator[Callable[..., Any]]:
    """Calls a function of a module with arguments that can be pickled."""
    if not torch.cuda.is_available():
        yield lambda function, *args: function(*args)
        return
    # Libraries look for a card as they are imported, so it has to be hidden before.
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", _OTHER_END]
    pipe = subprocess.PIPE
    with (
        tempfile.TemporaryFile() as said,
        subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=said, env=hidden) as process,
    ):
        yield functools.partial(_ask, process, said)


def _ask(process: subprocess.Popen[bytes], said: IO[bytes], *question: Any) -> Any:
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        pickle.dump(question, process.stdin)
        process.stdin.flush()
        found = pickle.load(process.stdout)
    except (EOFError, OSError):
        with contextlib.suppress(OSError):
            process.stdin.close()  # what is left in its buffer has nowhere to go
        code = process.wait()
        said.seek(0)
        lines = said.read().decode(errors="replace").split("\n")
        reason = next((line for line in reversed(lines) if line.strip()), f"exit code {code}")
        raise DeviceError(f"the process that simulates has ended: {reason.strip()}") from None
    if isinstance(found, Exception):
        raise found
    return found


# Libraries that print, as they are imported or later, must not mix with the answers.
_OTHER_END = """
import os
output = os.dup(1)
os.dup2(2, 1)
from lowvram.prediction import answer
answer(output)
"""


def answer(output: int) -> None:
    """Write results, or errors, until nobody asks any more."""
    answers = os.fdopen(output, "wb")
    while True:
        try:
            function, *args = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        found: Any
        try:
            found = function(*args)
        except Exception as error:
            found = error
        pickle.dump(found, answers)
        answers.flush()
