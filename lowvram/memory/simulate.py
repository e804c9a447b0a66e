"""`simulate`: run real training code on the simulated device and account for every byte."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, TypeVar

import torch

from lowvram.memory.cards import Card
from lowvram.memory.device import simulated_device
from lowvram.memory.initialization import LazyInitialization
from lowvram.memory.listener import listen
from lowvram.memory.redirect import redirected
from lowvram.memory.trace import MemoryTrace
from lowvram.memory.tracer import Tracer

State = TypeVar("State")


def simulate(
    build: Callable[[torch.device], State],
    step: Callable[[State], Any],
    *,
    steps: int = 3,
    card: Card | None = None,
    torch_version: tuple[int, int] | None = None,
) -> MemoryTrace:
    """The memory that `build(device)` and then `steps` times `step(state)` take on `card`.

    `build` makes whatever the code makes, on the device that it is given, and returns it; `step`
    takes one optimizer step. Three steps at least show the peak: the optimizer's states come into
    being at the end of the first, and the second is where they first meet the activations.

    With a card, its budget limits what can be reserved: running out of it ends the simulation,
    and is told in the trace. Without one there is no limit, and the kernels are those of the
    RTX 40 series. `torch_version` is that of the CUDA kernels, which take temporaries of their
    own; the Python code is that of the torch installed. What `step` and `build` raise otherwise
    goes through to the caller.
    """
    if steps < 1:
        raise ValueError(f"steps: found {steps}, allowed 1 or more")
    device = simulated_device()
    tracer = Tracer(card, torch_version)
    with ExitStack() as stack:
        stack.enter_context(redirected(tracer))
        stack.enter_context(listen(tracer))
        stack.enter_context(tracer.watching())
        try:
            with LazyInitialization(), tracer.building():
                state = build(device)
            for _ in range(steps):
                with tracer.step():
                    step(state)
                if tracer.doomed:
                    break
        except torch.OutOfMemoryError:
            if tracer.shortage is None:
                raise
        else:
            if not tracer.doomed:
                tracer.shortage = None  # the code has coped with it
        tracer.close()
    return tracer.trace()
