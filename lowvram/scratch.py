"""Memory on the CPU for what is gone before a function returns, the same every time.

Fresh memory is cold and, with glibc, seldom the place that a tensor of the same size has left.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch

_kept = threading.local()


def scratch(*shapes: Sequence[int]) -> list[torch.Tensor]:
    """A tensor in fp32 for each shape, with anything in it.

    They are overwritten by whoever asks next in this thread: nothing of them may be kept, given
    away, or used across a call of other code.
    """
    sizes = [-(-torch.Size(shape).numel() // 16) * 16 for shape in shapes]  # cache lines
    memory: torch.Tensor | None = getattr(_kept, "memory", None)
    if memory is None or memory.numel() < sum(sizes):
        _kept.memory = None  # before more is taken
        with torch.inference_mode(False):  # whose tensors no training could use afterwards
            memory = torch.empty(sum(sizes), dtype=torch.float32, device="cpu")
        _kept.memory = memory
    parts = memory[: sum(sizes)].split(sizes)
    return [
        part[: torch.Size(shape).numel()].view(*shape)
        for part, shape in zip(parts, shapes, strict=True)
    ]
