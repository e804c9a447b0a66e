"""Stand-ins for a simulation and for a card, for tests of what is made of their answers."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tokenizer
from transformers import GPT2Config

from lowvram.build import Numerics
from lowvram.measurement import Measurement
from lowvram.memory import Card
from lowvram.prediction import Prediction
from lowvram.recipe import Recipe
from lowvram.rehearsal import BatchShape

MIB = 2**20

Cost = Callable[[BatchShape], int]
"""Bytes that a shape takes."""


class FakePredict:
    """Predicts by a formula; remembers which shapes it was asked for, each once."""

    def __init__(self, cost: Cost, budget_bytes: int) -> None:
        self.cost = cost
        self.budget_bytes = budget_bytes
        self.asked: list[BatchShape] = []

    def __call__(self, recipe: Recipe, shape: BatchShape) -> Prediction:
        if shape not in self.asked:
            self.asked.append(shape)
        size = self.cost(shape)
        return Prediction(
            shape=shape,
            fits=size <= self.budget_bytes,
            reserved_bytes=size,
            allocated_bytes=size - MIB,
            budget_bytes=self.budget_bytes,
            categories={},
        )


class FakeMeasure:
    """A card with `budget_bytes` for what costs `cost`; remembers what was tried, in order."""

    def __init__(self, cost: Cost, budget_bytes: int) -> None:
        self.cost = cost
        self.budget_bytes = budget_bytes
        self.tried: list[BatchShape] = []

    def __call__(self, recipe: Recipe, shape: BatchShape) -> Measurement:
        self.tried.append(shape)
        size = self.cost(shape)
        if size > self.budget_bytes:
            return Measurement(fits=False, error="CUDA out of memory")
        return measurement(size)


def measurement(size_bytes: int, **changes: Any) -> Measurement:
    """Of real steps that went well."""
    values = {
        "fits": True,
        "reserved_bytes": size_bytes,
        "allocated_bytes": size_bytes - MIB,
        "driver_bytes": size_bytes + MIB,
        "seconds_per_step": 0.5,
        "tokens_per_second": 1000.0,
    }
    return Measurement(**(values | changes))


class FakeCuda:
    """In place of `torch.cuda`: a card of `total_bytes` on which a process reserves memory."""

    def __init__(self, total_bytes: int = 12 * 2**30, *, spills: bool = False) -> None:
        self.total_bytes = total_bytes
        self.spills = spills
        """Whether the driver takes memory of the host rather than fail."""
        self.reserved_bytes = self.peak_bytes = 0

    def reserve(self, size_bytes: int) -> None:
        if size_bytes > self.total_bytes and not self.spills:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        self.reserved_bytes = size_bytes
        self.peak_bytes = max(self.peak_bytes, size_bytes)

    def mem_get_info(self) -> tuple[int, int]:
        return max(0, self.total_bytes - self.reserved_bytes), self.total_bytes

    def reset_peak_memory_stats(self) -> None:
        self.peak_bytes = self.reserved_bytes

    def max_memory_reserved(self) -> int:
        return self.peak_bytes

    def max_memory_allocated(self) -> int:
        return self.peak_bytes - MIB

    def synchronize(self) -> None:
        pass


def patch(monkeypatch: pytest.MonkeyPatch, module: str, **values: Any) -> None:
    """Set names of a module; `lowvram.plan` and some others are also names of functions."""
    for name, value in values.items():
        monkeypatch.setattr(import_module(module), name, value)


def forbid(monkeypatch: pytest.MonkeyPatch, module: str, name: str) -> None:
    """From now on, calling it is a failure of the test."""

    def called(*_: Any, **__: Any) -> None:
        raise AssertionError(f"{module}.{name} was called")

    patch(monkeypatch, module, **{name: called})


def put_card(monkeypatch: pytest.MonkeyPatch, card: Card) -> None:
    """Plans are for this card from now on, as if it were in the machine."""
    numerics = Numerics(device=torch.device("cuda", 0), precision="bf16", base_dtype="bf16")
    patch(
        monkeypatch,
        "lowvram.plan",
        choose_numerics=lambda *_: numerics,
        card_here=lambda: card,
    )


def save_without_weights(directory: Path, **changes: Any) -> Path:
    """A model of 3 million parameters as far as a simulation needs it: its sizes, a tokenizer."""
    sizes = {"n_positions": 256, "n_embd": 256, "n_layer": 4, "n_head": 4}
    end = len(make_tokenizer()) - 1
    tokens = {"vocab_size": end + 1, "bos_token_id": end, "eos_token_id": end}
    GPT2Config(**(sizes | tokens | changes)).save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory
