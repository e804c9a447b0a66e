"""GPT-2's block on a CPU where its MLP needs no gradient, with as few tensors as it can do with.

Sums are added to what is there. Between the products of the MLP only the input of the GELU is kept;
its output, and the gradients of both, are made for a few rows at a time, which stay in a core's
cache. What is kept is made before what is given up: glibc cannot use the place of a large tensor
again for one of the same size, so each that is freed between two that stay is a hole.

Shapes: n tokens, d hidden size, m inner size (4 d).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.models.gpt2.modeling_gpt2 import GPT2Block
from transformers.pytorch_utils import Conv1D

from lowvram.dropout import FastDropout, keep_mask, keep_probability
from lowvram.scratch import scratch

_ROWS = 512


class FrozenBlock(GPT2Block):
    """transformers' block, which goes its own way if there is more to it: an adapter in the MLP, a
    cache, weights of the MLP that are trained.
    """

    def forward(  # type: ignore[override]
        self,
        hidden_states: Any,
        cache: Any = None,  # before transformers 5.24 `past_key_values`
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        more = (cache, encoder_hidden_states, kwargs.get("past_key_values"))
        others = any(value is not None for value in more)
        scores = self._only_scores()
        if others or not (self._is_plain(hidden_states) and (scores or self._is_frozen())):
            output: torch.Tensor = super().forward(
                hidden_states, cache, attention_mask, encoder_hidden_states, **kwargs
            )
            return output
        attended, _ = self.attn(self.ln_1(hidden_states), attention_mask=attention_mask, **kwargs)
        mlp, norm = self.mlp, (self.ln_2.weight, self.ln_2.bias, self.ln_2.eps)
        layers = (mlp.c_fc.weight, mlp.c_fc.bias, mlp.c_proj.weight, mlp.c_proj.bias)
        if scores:
            return _add_mlp(attended.add_(hidden_states), norm, layers)
        middle = _AddInto.apply(attended, hidden_states)  # type: ignore[no-untyped-call]
        output = _AddMLP.apply(middle, norm, layers, mlp.dropout.p)  # type: ignore[no-untyped-call]
        return output

    def _only_scores(self) -> bool:
        """Neither gradients nor dropout."""
        return not (self.training or torch.is_grad_enabled())

    def _is_plain(self, hidden_states: torch.Tensor) -> bool:
        layers = (self.mlp.c_fc, self.mlp.c_proj)
        return (
            hidden_states.device.type == "cpu"
            and all(type(layer) is Conv1D for layer in layers)
            and hidden_states.dtype == layers[0].weight.dtype == torch.float32
            and not torch.is_autocast_enabled("cpu")
        )

    def _is_frozen(self) -> bool:
        """In training, of which the MLP has no part."""
        modules = (self.ln_2, self.mlp.c_fc, self.mlp.c_proj)
        return (
            self.training
            and torch.is_grad_enabled()
            and not any(p.requires_grad for module in modules for p in module.parameters())
            and self._has_fast_dropout()
        )

    def _has_fast_dropout(self) -> bool:
        dropout = self.mlp.dropout
        fast = isinstance(dropout, FastDropout) and keep_probability(dropout.p) > 0.0
        return fast or dropout.p == 0.0


def _add_mlp(
    x: torch.Tensor,  # (..., d)
    norm: tuple[torch.Tensor, torch.Tensor, float],  # (d,), (d,), epsilon
    layers: tuple[torch.Tensor, ...],  # (d, m), (m,), (m, d), (d,)
) -> torch.Tensor:
    """x + MLP(layer norm(x)), in the memory of x."""
    weight_in, bias_in, weight_out, bias_out = layers
    rows = x.view(-1, x.shape[-1])  # (n, d)
    for some in _parts(rows):
        part = rows[some]
        normed = torch.layer_norm(part, part.shape[1:], *norm)
        inner, activated = scratch(*[(part.shape[0], weight_in.shape[1])] * 2)
        torch.addmm(bias_in, normed, weight_in, out=inner)
        torch.ops.aten.gelu.out(inner, approximate="tanh", out=activated)
        part.add_(bias_out).addmm_(activated, weight_out)
    return x


class _AddInto(torch.autograd.Function):
    """one + other, in the memory of `one`, which nothing may have kept."""

    @staticmethod
    def forward(ctx: Any, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return one.add_(other)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return gradient, gradient


class _AddMLP(torch.autograd.Function):
    """x + dropout(MLP(layer norm(x)))."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,  # (..., d)
        norm: tuple[torch.Tensor, torch.Tensor, float],  # (d,), (d,), epsilon
        mlp: tuple[torch.Tensor, ...],  # (d, m), (m,), (m, d), (d,)
        dropout: float,
    ) -> torch.Tensor:
        weight_in, bias_in, weight_out, bias_out = mlp
        rows = x.reshape(-1, x.shape[-1])  # (n, d)
        inner = rows.new_empty(rows.shape[0], weight_in.shape[1])  # (n, m)
        output = torch.empty_like(rows)
        moments = rows.new_empty(2, rows.shape[0], 1)  # mean, and 1 over the deviation
        mask, keep = None, keep_probability(dropout)
        if keep < 1.0:
            mask = keep_mask(output.shape, dropout)
        for some in _parts(rows):
            normed, *of_part = torch.native_layer_norm(rows[some], rows.shape[1:], *norm)
            moments[:, some] = torch.stack(of_part)
            part = torch.addmm(bias_in, normed, weight_in, out=inner[some])
            (activated,) = scratch(part.shape)
            torch.ops.aten.gelu.out(part, approximate="tanh", out=activated)
            if mask is None:
                torch.add(rows[some], bias_out, out=output[some]).addmm_(activated, weight_out)
                continue
            torch.addmm(bias_out, activated, weight_out, out=output[some])
            output[some].mul_(mask[some]).mul_(1.0 / keep).add_(rows[some])
        ctx.save_for_backward(rows, moments, inner, mask, *norm[:2], weight_in, weight_out)
        ctx.keep = keep
        return output.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, moments, inner, mask, scale, shift, weight_in, weight_out = ctx.saved_tensors
        grad_rows = gradient.reshape(rows.shape)
        grad_output = grad_rows if mask is None else grad_rows.mul(mask).mul_(1.0 / ctx.keep)
        grad_x = torch.empty_like(rows)
        for some in _parts(rows):
            part = inner[some]
            grad_activated, grad_inner = scratch(part.shape, part.shape)
            torch.mm(grad_output[some], weight_out.T, out=grad_activated)
            torch.ops.aten.gelu_backward.grad_input(
                grad_activated, part, approximate="tanh", grad_input=grad_inner
            )
            torch.mm(grad_inner, weight_in.T, out=grad_x[some])
        grad_x, _, _ = torch.ops.aten.native_layer_norm_backward(
            grad_x, rows, rows.shape[1:], *moments, scale, shift, [True, False, False]
        )
        return grad_x.add_(grad_rows).view(gradient.shape), None, None, None


def _parts(rows: torch.Tensor) -> Iterator[slice]:
    for start in range(0, rows.shape[0], _ROWS):
        yield slice(start, min(start + _ROWS, rows.shape[0]))


def make_blocks_lean(model: nn.Module) -> int:
    """Replace the blocks of a GPT-2 on the CPU whose GELU is fused; how many."""
    replaced = 0
    for module in model.modules():
        if type(module) is GPT2Block and type(module.mlp.act) is nn.GELU:
            module.__class__ = FrozenBlock
            replaced += 1
    return replaced
