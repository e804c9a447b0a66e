"""Layer norms in 16 bits are what autocast makes of them, and keep half of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import make_gpt2
from torch import nn

from lowvram.build import build
from lowvram.norms import LeanLayerNorm, make_norms_lean


def make(dtype: torch.dtype, lean: bool) -> nn.LayerNorm:
    torch.manual_seed(0)
    norm = nn.LayerNorm(64)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    if lean:
        make_norms_lean(nn.Sequential(norm))
    return norm.to(dtype).requires_grad_(False)


def product_and_gradient(norm: nn.LayerNorm, dtype: torch.dtype) -> tuple[torch.Tensor, Any]:
    """Of what follows every norm of a GPT-2 in autocast: a matrix product in 16 bits."""
    x = (5 * torch.randn(32, 64, generator=torch.Generator().manual_seed(1))).to(dtype)
    x.requires_grad_(True)
    weight = torch.randn(64, 8, generator=torch.Generator().manual_seed(2)).to(dtype)
    # Raised here, as autocast does on a card; on a CPU it leaves layer norms alone.
    inputs = x if norm.weight.dtype == dtype else x.float()
    with torch.autocast("cpu", dtype):
        product = norm(inputs) @ weight
    product.float().square().sum().backward()
    return product.detach(), x.grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_are_those_of_norms_in_fp32(dtype: torch.dtype) -> None:
    """Outputs to the bit. Gradients pass one more rounding to 16 bits, half a unit of 2**-8."""
    product, gradient = product_and_gradient(make(dtype, lean=True), dtype)
    in_fp32 = make(dtype, lean=False).float()
    expected, expected_gradient = product_and_gradient(in_fp32, dtype)
    assert torch.equal(product, expected)
    error = (gradient - expected_gradient).float().abs().max()
    assert error <= 2**-7 * expected_gradient.float().abs().max()


def test_weights_in_fp32_are_left_to_autocast() -> None:
    norm = make(torch.float32, lean=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = norm(torch.ones(2, 64))
    assert found.dtype == torch.float32


def test_all_of_a_model_is_replaced_once() -> None:
    model = make_gpt2()
    assert make_norms_lean(model) == 2 * 2 + 1
    assert make_norms_lean(model) == 0


@pytest.mark.parametrize("lean", [True, False])
def test_the_recipe_decides(make_recipe: Any, lean: bool) -> None:
    model = build(make_recipe(**{"model.lean_norms": lean}), total_steps=1).model
    assert any(isinstance(module, LeanLayerNorm) for module in model.modules()) is lean
