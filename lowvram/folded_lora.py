"""LoRA's two small products added where the base's product already is.

peft makes three more tensors of the size of the output in each adapted layer: B A x, the same
scaled, and the sum. Here the scaled product is added to the base's output in place, and to the
gradient of the input likewise.

Shapes: n tokens, i inputs, o outputs, r rank.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners import lora
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D


class FoldedLinear(lora.Linear):  # type: ignore[misc]  # peft has no types
    """peft's layer; only the forward pass of the plain case is another."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        base, names = self.get_base_layer(), self.active_adapters
        plain = not (self.disable_adapters or self.merged or args or kwargs or len(names) != 1)
        if not plain or any(p.requires_grad for p in base.parameters()):
            output: torch.Tensor = super().forward(x, *args, **kwargs)
            return output
        name = names[0]
        dtype = _compute_dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            dropped = self.lora_dropout[name](x)
            output = _Folded.apply(  # type: ignore[no-untyped-call]
                x.to(dtype),
                None if dropped is x else dropped.to(dtype),
                base.weight if isinstance(base, Conv1D) else base.weight.T,
                base.bias,
                self.lora_A[name].weight,
                self.lora_B[name].weight,
                self.scaling[name],
            )
        return output


def _compute_dtype(x: torch.Tensor) -> torch.dtype:
    """That which autocast would compute a matrix product in."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


class _Folded(torch.autograd.Function):
    """x W + c + s d A^T B^T, where d is x or what dropout has left of it; the base is frozen.

    All products are in the dtype of x, whatever that of the weights is. The base's weight is cast
    anew in the backward pass, rather than kept in two formats.
    """

    @staticmethod
    def forward(  # noqa: PLR0913
        ctx: Any,
        x: torch.Tensor,  # (..., i)
        dropped: torch.Tensor | None,  # (..., i)
        weight: torch.Tensor,  # (i, o)
        bias: torch.Tensor | None,  # (o,)
        a: torch.Tensor,  # (r, i)
        b: torch.Tensor,  # (o, r)
        scaling: float,
    ) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])  # (n, i)
        low_in = rows if dropped is None else dropped.reshape(rows.shape)
        low = low_in @ a.to(x.dtype).T  # (n, r)
        wide, up = weight.to(x.dtype), b.to(x.dtype).T  # (i, o), (r, o)
        if bias is None:
            output = torch.mm(rows, wide).addmm_(low, up, alpha=scaling)  # (n, o)
        elif x.device.type == "cpu":
            # A bias costs a pass over the output of its own there, unless it is a row of B.
            with_one = torch.cat([low * scaling, low.new_ones(low.shape[0], 1)], 1)
            with_bias = torch.cat([up, bias.to(x.dtype)[None]])
            output = torch.mm(rows, wide).addmm_(with_one, with_bias)
        else:
            output = torch.addmm(bias.to(x.dtype), rows, wide).addmm_(low, up, alpha=scaling)
        ctx.save_for_backward(low_in, low, weight, a, b)
        ctx.settings = scaling, dropped is not None
        return output.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        low_in, low, weight, a, b = ctx.saved_tensors
        scaling, has_dropout = ctx.settings
        dtype, shape = low_in.dtype, (*gradient.shape[:-1], -1)
        rows = gradient.reshape(-1, gradient.shape[-1])  # (n, o)
        # Products of a wide and a narrow matrix are fastest with the narrow one on the left.
        grad_low = (b.to(dtype).T @ rows.T).mul_(scaling).T  # (n, r)
        grad_a = (grad_low.T @ low_in).to(a.dtype)
        grad_b = (low.T @ rows).to(b.dtype).mul_(scaling).T
        grad_x = torch.mm(rows, weight.to(dtype).T) if ctx.needs_input_grad[0] else None
        grad_dropped = None
        if not has_dropout and grad_x is not None:
            grad_x.addmm_(grad_low, a.to(dtype))
        elif has_dropout and ctx.needs_input_grad[1]:
            grad_dropped = (grad_low @ a.to(dtype)).view(shape)
        if grad_x is not None:
            grad_x = grad_x.view(shape)
        return grad_x, grad_dropped, None, None, grad_a, grad_b, None


def fold(model: nn.Module) -> int:
    """Let the plain LoRA layers of a model with adapters compute in one step; how many.

    Left alone: DoRA and other variants, quantised bases, trained biases.
    """
    folded = 0
    module: Any
    for module in model.modules():
        if type(module) is not lora.Linear or module.lora_variant:
            continue
        base = module.get_base_layer()
        if isinstance(base, nn.Linear | Conv1D) and not any(module.lora_bias.values()):
            module.__class__ = FoldedLinear
            folded += 1
    return folded
