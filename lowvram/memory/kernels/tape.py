"""How the temporaries of one kernel are written down, and carried out.

Order counts: an allocator gives other addresses to the same sizes in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from lowvram.memory.kernels.target import Target
from lowvram.memory.kernels.tensors import bytes_of

T = TypeVar("T")


@dataclass(frozen=True)
class Scratch:
    """Temporaries of one kernel, in order, before and after its outputs are allocated.

    An entry is either a size in bytes (0 allocates nothing, but counts), or `~i`, which is
    negative and frees the kernel's i-th temporary early; i counts the sizes of `before` and then
    those of `after`, from 0. What is left is freed, last first, when the kernel returns.
    """

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()

    @property
    def peak_bytes(self) -> int:
        """The most these temporaries take at one time, without the allocator's rounding."""
        sizes: list[int] = []
        now = peak = 0
        for entry in (*self.before, *self.after):
            if entry >= 0:
                sizes.append(entry)
                now += entry
            else:
                now -= sizes[~entry]
            peak = max(peak, now)
        return peak


NOTHING = Scratch()


def replay(
    entries: Sequence[int],
    live: list[T | None],
    allocate: Callable[[int], T],
    release: Callable[[T], None],
) -> None:
    """Carry out one half of a `Scratch`; `live` is an empty list, shared by the two halves.

    When the kernel returns, release what `live` still holds from its end to its start.
    """
    for entry in entries:
        if entry > 0:
            live.append(allocate(entry))
        elif entry == 0:
            live.append(None)
        else:
            block = live[~entry]
            live[~entry] = None
            if block is not None:
                release(block)


class Tape:
    """Writes a `Scratch`: `allocate` gives the number that `free` takes."""

    def __init__(self) -> None:
        self._before: list[int] = []
        self._after: list[int] = []
        self._entries = self._before
        self._count = 0

    def allocate(self, size_bytes: int) -> int:
        self._entries.append(size_bytes)
        self._count += 1
        return self._count - 1

    def free(self, *numbers: int) -> None:
        self._entries.extend(~number for number in numbers)

    def brief(self, *sizes: int) -> None:
        """Temporaries that live together for one step and are freed last first."""
        self.free(*reversed([self.allocate(size) for size in sizes]))

    def outputs(self) -> None:
        """From here on the outputs are allocated."""
        self._entries = self._after

    def copy(self, tensor: Tensor) -> None:
        """`tensor.contiguous()`, which takes memory only if the tensor is not contiguous."""
        if not tensor.is_contiguous():
            self.allocate(bytes_of(tensor))

    def scratch(self) -> Scratch:
        if self._count == 0:
            return NOTHING
        return Scratch(tuple(self._before), tuple(self._after))


@dataclass(frozen=True)
class Call:
    """One call of an operator: its arguments by name, its outputs and the card."""

    arguments: Mapping[str, Any]
    outputs: Sequence[Tensor]
    target: Target

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def get(self, name: str) -> Any:
        return self.arguments.get(name)


Kernel = Callable[[Call, Tape], None]
