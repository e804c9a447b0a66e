"""What a simulation saw: every block of memory, when it lived, what for and how much there was."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

Category = Literal[
    "base weights",
    "adapters",
    "gradients",
    "optimizer states",
    "activations",
    "logits and loss",
    "workspaces",
    "temporaries",
]
CATEGORIES: tuple[Category, ...] = get_args(Category)
Phase = Literal["build", "forward", "recompute", "backward", "optimizer"]


class Block:
    """One allocation. Times are numbers of events."""

    __slots__ = (
        "address",
        "begin",
        "category",
        "end",
        "end_phase",
        "kept",
        "module",
        "op",
        "phase",
        "size",
    )

    def __init__(
        self, size: int, address: int, *, begin: int, phase: Phase, module: str, op: str
    ) -> None:
        self.size = size
        """Bytes asked for."""
        self.address = address
        self.begin = begin
        self.end: int | None = None
        """None while it lives."""
        self.end_phase: Phase | None = None
        self.kept = True
        """Whether a backward pass began before its end."""
        self.phase = phase
        self.module = module
        self.op = op
        self.category: Category | None = None


@dataclass(frozen=True, kw_only=True)
class Step:
    """One optimizer step; peaks in bytes."""

    first_event: int
    last_event: int
    peak_reserved_bytes: int
    peak_allocated_bytes: int


@dataclass(frozen=True, kw_only=True)
class Shortage:
    """Where memory ran out."""

    step: int
    """Counted from 1; 0 while building."""
    phase: Phase
    module: str
    op: str
    message: str
    """What torch says on a card."""

    def __str__(self) -> str:
        place = "building" if self.step == 0 else f"step {self.step}, {self.phase}"
        return f"{place}, {self.module or 'outside of any module'} ({self.op}): {self.message}"


@dataclass(frozen=True, kw_only=True)
class MemoryTrace:
    """All sizes in bytes. `reserved` is what the process takes from the card, next to its context.

    The timeline has one entry an event: what was allocated and reserved after it.
    """

    blocks: Sequence[Block]
    events: Sequence[tuple[Any, ...]]
    """("A", block number, bytes, address), ("F", block number), and segments that came ("S+") or
    went ("S-") as ("S+", address, bytes), each before the allocation that needed it."""
    allocated_bytes: array[int]
    reserved_bytes: array[int]
    steps: Sequence[Step]
    out_of_memory: Shortage | None
    card: str | None
    budget_bytes: int | None
    peak_reserved_bytes: int
    peak_allocated_bytes: int
    segments: Sequence[Any] = field(default=(), repr=False)
    """Of the allocator, at the end."""

    @property
    def peak_event(self) -> int:
        """The first event with the most allocated: what is live then has to fit."""
        return self.allocated_bytes.index(max(self.allocated_bytes)) if self.blocks else 0

    def live(self, event: int | None = None) -> Iterator[Block]:
        """Blocks that live after `event`; the peak's if none is given."""
        moment = self.peak_event if event is None else event
        for block in self.blocks:
            if block.begin <= moment and (block.end is None or block.end > moment):
                yield block

    def by_category(self, event: int | None = None) -> dict[Category, int]:
        """Live bytes, as asked for; every category is there."""
        sizes: Counter[Category] = Counter()
        for block in self.live(event):
            sizes[self.category(block)] += block.size
        return {category: sizes[category] for category in CATEGORIES}

    def by_module(self, event: int | None = None) -> dict[str, int]:
        """Live bytes by the module that was running when they were asked for, largest first."""
        sizes: Counter[str] = Counter()
        for block in self.live(event):
            sizes[block.module] += block.size
        return dict(sizes.most_common())

    def category(self, block: Block) -> Category:
        if block.category is not None:
            return block.category
        if block.phase == "build":
            return "temporaries" if block.end_phase == "build" else "base weights"
        if block.phase == "forward" and block.kept:
            return "activations"  # for the backward pass, or until the step ends
        if block.phase == "recompute" and block.end_phase != "recompute":
            return "activations"
        return "temporaries"

    def save(self, path: str | Path) -> None:
        """A file for PyTorch's memory visualiser (pytorch.org/memory_viz)."""
        from lowvram.memory.snapshot import save_snapshot

        save_snapshot(self, Path(path))

    def plot(self, path: str | Path) -> None:
        """The timeline by category, as PNG or HTML by the name's suffix."""
        from lowvram.memory.plot import plot_trace

        plot_trace(self, Path(path))
