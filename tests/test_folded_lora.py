"""Folded LoRA layers against peft's own, values and gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import make_gpt2, make_llama
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from lowvram.adapters import _quiet_peft
from lowvram.build import build
from lowvram.folded_lora import FoldedLinear, fold

GPT2 = ["c_attn", "c_proj", "c_fc"]
LLAMA = ["q_proj", "o_proj", "down_proj"]
IDS = torch.randint(0, 250, (2, 24), generator=torch.Generator().manual_seed(0))


def make(architecture: str = "gpt2", **settings: Any) -> PeftModel:
    """peft's own layers, with a B that is not zero."""
    model, targets = (make_gpt2(), GPT2) if architecture == "gpt2" else (make_llama(), LLAMA)
    config = LoraConfig(
        target_modules=settings.pop("targets", targets),
        fan_in_fan_out=architecture == "gpt2",
        r=3,
        lora_alpha=7,
        **settings,
    )
    with _quiet_peft():
        wrapped = get_peft_model(model, config)
    torch.manual_seed(5)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    return wrapped.train()


def run(model: PeftModel, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, Any]:
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        logits = model(IDS).logits.float()
    logits.log_softmax(-1)[..., 0].sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), gradients


def assert_close(found: Any, expected: Any, tolerance: float) -> None:
    """Relative to the largest value of each tensor."""
    assert found[1].keys() == expected[1].keys()
    pairs = [(found[0], expected[0]), *((found[1][n], expected[1][n]) for n in found[1])]
    for one, other in pairs:
        assert one.dtype == other.dtype
        assert (one - other).abs().max() <= tolerance * other.abs().max()


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_values_and_gradients_are_pefts(architecture: str, dropout: float) -> None:
    """fp32, within 1e-5; dropout draws the same numbers in the same order."""
    expected = run(make(architecture, lora_dropout=dropout))
    model = make(architecture, lora_dropout=dropout)
    assert fold(model) == (8 if architecture == "gpt2" else 6)
    assert_close(run(model), expected, 1e-5)


def test_in_bf16_it_is_no_further_from_the_truth_than_peft() -> None:
    """Gradients of both in bf16 autocast against those in fp32; a tenth more is let pass."""
    truth = run(make())[1]
    peft = run(make(), torch.bfloat16)[1]
    model = make()
    fold(model)
    folded = run(model, torch.bfloat16)[1]

    def error(found: Any) -> float:
        return sum(float((found[n] - truth[n]).norm() / truth[n].norm()) for n in truth)

    assert all(gradient.dtype == torch.float32 for gradient in folded.values())
    assert error(folded) < 1.1 * error(peft)


def test_fewer_bytes_are_kept() -> None:
    """For a layer of c_attn's shape: the input, the small product and the weights, no more."""
    kept: dict[int, int] = {}

    def keep(saved: torch.Tensor) -> torch.Tensor:
        kept[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
        return saved

    layer = make(targets=["c_attn"]).base_model.model.transformer.h[0].attn.c_attn
    weights = sum(p.nbytes for p in layer.parameters()) - layer.base_layer.bias.nbytes
    x = torch.randn(2, 24, 32, requires_grad=True)
    layer.__class__ = FoldedLinear
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        layer(x)
    assert sum(kept.values()) == x.nbytes + 2 * 24 * 3 * 4 + weights


def test_other_layers_are_left_to_peft() -> None:
    assert fold(make(use_dora=True)) == 0
    assert fold(make(lora_bias=True)) == 0
    assert fold(make(targets=["wte"])) == 0
    model = make()
    assert fold(model) == 8
    assert fold(model) == 0


def test_trained_biases_get_their_gradients() -> None:
    expected = run(make(bias="lora_only"))
    model = make(bias="lora_only")
    fold(model)
    assert any(name.endswith("bias") for name in expected[1])
    assert_close(run(model), expected, 1e-6)


@torch.no_grad()
def test_disabled_merged_and_copied_as_pefts() -> None:
    model = make().eval()
    fold(model)
    with model.disable_adapter():
        base = model(IDS).logits
    assert torch.equal(base, make_gpt2().eval()(IDS).logits)
    live = model(IDS).logits
    twin = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.zero_()
    torch.testing.assert_close(twin(IDS).logits, live, rtol=0, atol=0)
    merged = twin.merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, live, rtol=1e-5, atol=1e-5)


def test_no_gradient_is_made_for_an_input_that_wants_none() -> None:
    layer = make(targets=["c_attn"]).base_model.model.transformer.h[0].attn.c_attn
    layer.__class__ = FoldedLinear
    output = layer(torch.randn(4, 32))
    assert output.grad_fn.next_functions[0] == (None, 0)
    output.sum().backward()
    assert layer.lora_A["default"].weight.grad is not None


@pytest.mark.parametrize("folded", [True, False])
def test_the_recipe_decides(make_recipe: Any, folded: bool) -> None:
    model = build(make_recipe(**{"method.folded": folded}), total_steps=1).model
    assert any(isinstance(module, FoldedLinear) for module in model.modules()) is folded
