"""Who hears what the simulated device does: storages that come, kernels that run."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._ops import OpOverload

from lowvram.errors import DeviceError
from lowvram.memory.kernels import Target


class Listener(Protocol):
    """Hears what a card's memory would see."""

    target: Target
    """The card whose kernels are chosen."""

    def allocate(self, size_bytes: int) -> int:
        """A new storage; returns its address. Raises torch.OutOfMemoryError where it is full."""

    def watch(self, storage: torch.UntypedStorage, address: int) -> None:
        """The storage at `address`, so that its end is noticed."""

    def before(
        self, op: OpOverload, args: Sequence[Any], kwargs: dict[str, Any], outputs: Sequence[Tensor]
    ) -> None:
        """A kernel is about to run; `outputs` are given, or tell shapes only.

        What is allocated until `after` are its outputs.
        """

    def after(self, op: OpOverload, outputs: Sequence[Tensor]) -> None:
        """The kernel has run, and its outputs exist."""


class _Silent:
    """Tensors outlive the simulation that made them; nobody counts what they do then."""

    target = Target(compute_capability=(8, 9), multiprocessors=60)
    _addresses = itertools.count(1 << 44, 1 << 32)

    def allocate(self, size_bytes: int) -> int:
        return next(self._addresses) if size_bytes else 0

    def watch(self, storage: torch.UntypedStorage, address: int) -> None:
        pass

    def before(
        self, op: OpOverload, args: Sequence[Any], kwargs: dict[str, Any], outputs: Sequence[Tensor]
    ) -> None:
        pass

    def after(self, op: OpOverload, outputs: Sequence[Tensor]) -> None:
        pass


current: Listener = _Silent()
"""Who hears now."""


@contextmanager
def listen(listener: Listener) -> Iterator[None]:
    """`listener` hears everything until the block ends; simulations do not nest."""
    global current
    if is_simulating():
        raise DeviceError("a simulation is running in this process; it has to end first")
    current = listener
    try:
        yield
    finally:
        current = _Silent()


def target() -> Target:
    return current.target


def is_simulating() -> bool:
    return not isinstance(current, _Silent)
