"""What the simulated device tells, turned into events of the allocator and remembered."""

from __future__ import annotations

import itertools
import threading
import weakref
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from lowvram.memory.allocator import CachingAllocator, OutOfMemory
from lowvram.memory.cards import Card
from lowvram.memory.device import NAME
from lowvram.memory.kernels import (
    NOTHING,
    Target,
    lt_workspace_bytes,
    replay,
    scratch,
    workspace_bytes,
)
from lowvram.memory.modules import Modules
from lowvram.memory.shapes import tensors_in
from lowvram.memory.trace import Block, Category, MemoryTrace, Phase, Shortage, Step

_C: Any = torch._C

_UNLIMITED = 1 << 40
_USES_CUBLAS = {
    f"aten::{name}"
    for name in (
        "mm addmm _addmm_activation bmm baddbmm addbmm addmv addmv_ mv dot vdot _int_mm _scaled_mm"
    ).split()
}
_USES_CUBLAS_LT = {"aten::addmm", "aten::_addmm_activation"}


class _Ref(weakref.ref[torch.UntypedStorage]):
    __slots__ = ("address",)
    address: int


class Tracer:
    """Turns what the device tells into allocator events, and remembers them."""

    def __init__(self, card: Card | None, torch_version: tuple[int, int] | None = None) -> None:
        self.card = card
        self.target = target_of(card, torch_version)
        self.total_bytes = _UNLIMITED if card is None else card.budget()
        self.compute_capability = self.target.compute_capability
        self.shortage: Shortage | None = None
        self.doomed = False
        """Whether memory has run out and nobody has been told yet."""
        self._allocator = CachingAllocator(
            None if card is None else self.total_bytes, on_segment=self._on_segment
        )
        self._blocks: list[Block] = []
        self._events: list[tuple[Any, ...]] = []
        self._allocated, self._reserved = array("q"), array("q")
        self._steps: list[Step] = []
        self._live: dict[int, int] = {}  # block numbers by address
        self._refs: dict[int, _Ref] = {}
        self._backward = -1  # the last backward pass, by autograd's number
        self._begun: dict[int, int] = {}  # the last backward pass when a block was made
        self._workspaces: set[int] = set()  # threads that have a cuBLAS handle
        self._op = ""
        self._nowhere = itertools.count(1 << 60)
        self._scratch = NOTHING
        self._temporaries: list[int | None] = []
        self._modules = Modules(self._on_root)
        self._optimizing = self._building = False
        self._closed = False

    # What `torch.cuda` answers

    @property
    def allocated_bytes(self) -> int:
        return self._allocator.allocated_bytes

    @property
    def reserved_bytes(self) -> int:
        return self._allocator.reserved_bytes

    @property
    def peak_allocated_bytes(self) -> int:
        return self._allocator.peak_allocated_bytes

    @property
    def peak_reserved_bytes(self) -> int:
        return self._allocator.peak_reserved_bytes

    def reset_peaks(self) -> None:
        self._allocator.reset_peaks()

    def empty_cache(self) -> None:
        self._allocator.empty_cache()

    # What the device tells

    def allocate(self, size_bytes: int) -> int:
        if size_bytes == 0 or self._closed:
            return 0
        if self.doomed:
            return self._fail_when_back()
        try:
            address = self._allocator.malloc(size_bytes)
        except OutOfMemory as error:
            self.shortage = Shortage(
                step=len(self._steps) + (not self._building),
                phase=self._phase(),
                module=self._modules.current(),
                op=self._op or "aten::empty",
                message=str(error),
            )
            self.doomed = True
            return self._fail_when_back()
        number = len(self._blocks)
        block = Block(
            size_bytes,
            address,
            begin=len(self._events),
            phase=self._phase(),
            module=self._modules.current(),
            op=self._op,
        )
        self._blocks.append(block)
        self._begun[number] = self._backward
        self._live[address] = number
        self._record(("A", number, size_bytes, address))
        return address

    def _fail_when_back(self) -> int:
        """Raise what a card would, but not through autograd's engine.

        An error on its way from a recomputation through C++ ends the process, so there the rest of
        the backward pass gets what is not there, uncounted.
        """
        if _C._current_graph_task_id() != -1:
            return next(self._nowhere)
        self.doomed = False
        assert self.shortage is not None
        raise torch.OutOfMemoryError(self.shortage.message)

    def watch(self, storage: torch.UntypedStorage, address: int) -> None:
        reference = _Ref(storage, self._on_end)
        reference.address = address
        self._refs[address] = reference

    def before(
        self, op: OpOverload, args: Sequence[Any], kwargs: dict[str, Any], outputs: Sequence[Tensor]
    ) -> None:
        self._op = op._name
        self._scratch = scratch(op, args, kwargs, outputs, self.target)
        if self._scratch.before:
            self._replay(self._scratch.before)

    def after(self, op: OpOverload, outputs: Sequence[Tensor]) -> None:
        if self._scratch.after:
            self._replay(self._scratch.after)
        if op._schema.name in _USES_CUBLAS:
            self._ensure_workspace(op)
        while self._temporaries:
            self._free(self._temporaries.pop() or 0)
        self._op = ""
        for output in outputs:
            number = self._live.get(output.untyped_storage().data_ptr())
            if number is None:
                continue
            block = self._blocks[number]
            block.op = block.op or op._name  # many operators get their outputs ready made
            if output.dim() and output.shape[-1] == self._modules.vocabulary:
                block.category = block.category or "logits and loss"

    def _replay(self, entries: Sequence[int]) -> None:
        replay(entries, self._temporaries, self._allocate_temporary, self._free)

    def _allocate_temporary(self, size_bytes: int) -> int:
        return self._allocate_as("temporaries", size_bytes)

    # Events

    def _allocate_as(self, category: Category, size_bytes: int) -> int:
        address = self.allocate(size_bytes)
        if address in self._live:
            self._blocks[self._live[address]].category = category
        return address

    def _ensure_workspace(self, op: OpOverload) -> None:
        """Each thread that multiplies matrices has a cuBLAS handle, with workspaces for ever."""
        thread = threading.get_ident()
        if thread not in self._workspaces:
            self._workspaces.add(thread)
            self._allocate_as("workspaces", workspace_bytes(self.target))
        if op._schema.name in _USES_CUBLAS_LT and -thread not in self._workspaces:
            self._workspaces.add(-thread)
            self._allocate_as("workspaces", lt_workspace_bytes(self.target))

    def _on_end(self, reference: weakref.ref[torch.UntypedStorage]) -> None:
        if not self._closed:
            self._free(reference.address)  # type: ignore[attr-defined]

    def _free(self, address: int) -> None:
        self._refs.pop(address, None)
        number = self._live.pop(address, None)
        if number is None:
            return
        self._allocator.free(address)
        block = self._blocks[number]
        block.end, block.end_phase = len(self._events), self._phase()
        # While an error unwinds, what goes would have been kept.
        block.kept = self._backward != self._begun.pop(number) or self.shortage is not None
        self._record(("F", number))

    def _on_segment(self, kind: str, address: int, size: int, stream: int) -> None:
        self._record(("S+" if kind == "segment_alloc" else "S-", address, size))

    def _record(self, event: tuple[Any, ...]) -> None:
        self._events.append(event)
        self._allocated.append(self._allocator.allocated_bytes)
        self._reserved.append(self._allocator.reserved_bytes)

    def _phase(self) -> Phase:
        if self._building:
            return "build"
        if self._optimizing:
            return "optimizer"
        task = _C._current_graph_task_id()
        if task == -1:
            return "forward"
        self._backward = task
        return "recompute" if torch.is_grad_enabled() else "backward"

    # Steps, modules and optimizers

    @contextmanager
    def building(self) -> Iterator[None]:
        self._building = True
        try:
            yield
        finally:
            self._building = False

    @contextmanager
    def step(self) -> Iterator[None]:
        first = len(self._events)
        try:
            yield
        finally:
            reserved, allocated = self._reserved[first:], self._allocated[first:]
            self._steps.append(
                Step(
                    first_event=first,
                    last_event=len(self._events) - 1,
                    peak_reserved_bytes=max(reserved, default=self.reserved_bytes),
                    peak_allocated_bytes=max(allocated, default=self.allocated_bytes),
                )
            )

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks of this process, for every module and optimizer; removed at the end."""
        handles = [
            register_module_forward_pre_hook(self._modules.enter),
            register_module_forward_hook(self._modules.leave, always_call=True),
            register_optimizer_step_pre_hook(self._before_optimizer),
            register_optimizer_step_post_hook(self._after_optimizer),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _before_optimizer(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._optimizing = True
        for parameter in _parameters(optimizer):
            self._assign("gradients", parameter.grad)

    def _after_optimizer(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._optimizing = False
        for parameter in _parameters(optimizer):
            self._assign("optimizer states", optimizer.state.get(parameter))

    def _on_root(self, module: nn.Module) -> None:
        parameters = list(module.parameters())
        frozen = any(not parameter.requires_grad for parameter in parameters)
        for parameter in parameters:
            adapts = frozen and parameter.requires_grad
            self._assign("adapters" if adapts else "base weights", parameter)

    def _assign(self, category: Category, value: Any) -> None:
        for tensor in tensors_in(value):
            if tensor.device.type != NAME:
                continue
            try:
                address = tensor.untyped_storage().data_ptr()
            # A wrapper of torch.func has no storage, and neither has a lazy parameter yet.
            except (NotImplementedError, ValueError):
                continue
            number = self._live.get(address)
            if number is not None:
                self._blocks[number].category = category

    def close(self) -> None:
        """What ends from here on is not counted."""
        self._closed = True

    def trace(self) -> MemoryTrace:
        return MemoryTrace(
            blocks=self._blocks,
            events=self._events,
            allocated_bytes=self._allocated,
            reserved_bytes=self._reserved,
            steps=self._steps,
            out_of_memory=self.shortage,
            card=None if self.card is None else self.card.name,
            budget_bytes=None if self.card is None else self.total_bytes,
            peak_reserved_bytes=max(self._reserved, default=0),
            peak_allocated_bytes=max(self._allocated, default=0),
            segments=self._allocator.segments,
        )


def target_of(card: Card | None, torch_version: tuple[int, int] | None = None) -> Target:
    """The kernels of a card; without one, those of the RTX 40 series."""
    if torch_version is None:
        major, minor = torch.__version__.split(".")[:2]
        torch_version = int(major), int(minor)
    return Target(
        compute_capability=(8, 9) if card is None else card.compute_capability,
        multiprocessors=60 if card is None else card.multiprocessors,
        torch_version=torch_version,
    )


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]
