"""Layer norms that keep what they are given.

Autocast raises the input of a layer norm to fp32, keeps that copy for the backward pass and gives
its output in fp32, which the next matrix product rounds to 16 bits. The kernel computes in fp32
inside anyway: with input and weights in 16 bits, its output in 16 bits is that same number.
"""

from __future__ import annotations

import torch
from torch import nn


class LeanLayerNorm(nn.LayerNorm):
    """Outside of autocast where input and weight have the same format of 16 bits."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if input.dtype == self.weight.dtype != torch.float32:
            with torch.autocast(input.device.type, enabled=False):
                return super().forward(input)
        return super().forward(input)


def make_norms_lean(model: nn.Module) -> int:
    """Replace the layer norms of a model; how many."""
    replaced = 0
    for module in model.modules():
        if type(module) is nn.LayerNorm and module.elementwise_affine:
            module.__class__ = LeanLayerNorm
            replaced += 1
    return replaced
