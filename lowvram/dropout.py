"""Dropout for CPUs: random numbers are drawn several at a time, and a byte is kept of each.

On a CPU, torch draws a number of 32 bits for each element, one after the other, and keeps a mask in
the dtype of the input for the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

# 16 random bits decide over an element, so four are had from each number that is drawn.
_LEVELS = 2**16


def keep_probability(p: float) -> float:
    """1 - p, rounded to a multiple of 2**-16: what `keep_mask` keeps, exactly."""
    return 1.0 - round(p * _LEVELS) / _LEVELS


def keep_mask(shape: Sequence[int], p: float) -> torch.Tensor:
    """Booleans of this shape on the CPU, each true with `keep_probability(p)`, independently.

    They are drawn from torch's default generator.
    """
    count = math.prod(shape)
    numbers = torch.empty(-(-count // 4), dtype=torch.int64)
    numbers.random_(-(2**63), None)  # None: all 64 bits
    lowest_kept = round(p * _LEVELS) - _LEVELS // 2
    if lowest_kept == _LEVELS // 2:
        return torch.zeros(shape, dtype=torch.bool)
    return numbers.view(torch.int16)[:count].view(shape) >= lowest_kept


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, p: float) -> torch.Tensor:
        mask = keep_mask(inputs.shape, p)
        ctx.save_for_backward(mask)
        ctx.scale = 1.0 / keep_probability(p)
        return inputs.mul(mask).mul_(ctx.scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (mask,) = ctx.saved_tensors
        return gradient.mul(mask).mul_(ctx.scale), None


class FastDropout(nn.Dropout):
    """As nn.Dropout, with other random numbers."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not self.training or keep_probability(self.p) in (0.0, 1.0):
            return super().forward(input)
        output: torch.Tensor = _Drop.apply(input, self.p)  # type: ignore[no-untyped-call]
        return output


def speed_up_dropout(model: nn.Module) -> int:
    """Replace the dropout modules of a model that is trained on the CPU; how many."""
    replaced = 0
    for module in model.modules():
        if type(module) is nn.Dropout and not module.inplace:
            module.__class__ = FastDropout
            replaced += 1
    return replaced
