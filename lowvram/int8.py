"""Frozen int8 layers that keep nothing of their input.

bitsandbytes keeps the input of each layer for the backward pass, outside of what autograd knows to
be kept: so recomputing a block does not save it either. The gradient of the input needs the weight
alone: with int8 values C and the largest value s of each row, grad_x = grad_y (C s / 127).
"""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.nn import Linear8bitLt
from torch import nn
from torch.autograd.function import once_differentiable


class FrozenInt8Linear(Linear8bitLt):  # type: ignore[misc]  # it has no types
    """bitsandbytes' layer, with its own forward pass."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if any(parameter.requires_grad for parameter in self.parameters()):
            output: torch.Tensor = super().forward(x)
        else:
            output = _Frozen.apply(x, self)  # type: ignore[no-untyped-call]
        return output


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: FrozenInt8Linear) -> torch.Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        output: torch.Tensor = Linear8bitLt.forward(layer, x)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        state = ctx.layer.state
        scales = state.SCB.unsqueeze(1).mul(1.0 / 127.0)
        weight = state.CB.to(ctx.dtype, copy=True).mul_(scales)  # (outputs, inputs)
        return torch.matmul(gradient.to(ctx.dtype), weight), None


def keep_no_inputs(model: nn.Module) -> int:
    """Replace the int8 layers of a model; how many."""
    replaced = 0
    for module in model.modules():
        if type(module) is Linear8bitLt:
            module.__class__ = FrozenInt8Linear
            replaced += 1
    return replaced
