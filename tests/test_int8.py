"""Frozen int8 layers against bitsandbytes' own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import save_without_weights

from lowvram.build import build
from lowvram.int8 import FrozenInt8Linear, keep_no_inputs
from lowvram.memory import find_card
from lowvram.model import load_model
from lowvram.prediction import predict
from lowvram.rehearsal import BatchShape

IDS = torch.arange(40).view(2, 20)


def outputs_and_gradients(model: Any, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    embeddings = model.transformer.wte(IDS).detach().to(dtype).requires_grad_(True)
    logits = model(inputs_embeds=embeddings).logits
    logits.float().log_softmax(-1)[..., 0].sum().backward()
    assert embeddings.grad is not None
    return logits.detach(), embeddings.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_bitsandbytes(gpt2_dir: Path, dtype: torch.dtype) -> None:
    """To the bit."""
    found = []
    for ours in (False, True):
        model = load_model(str(gpt2_dir), dtype="int8", compute_dtype=dtype).requires_grad_(False)
        assert keep_no_inputs(model) == 8 if ours else True
        found.append(outputs_and_gradients(model, dtype))
    assert found[0][1].abs().max() > 0
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_biases_that_are_trained_get_their_gradient(gpt2_dir: Path) -> None:
    model: Any = load_model(str(gpt2_dir), dtype="int8").requires_grad_(False)
    keep_no_inputs(model)
    bias = model.transformer.h[0].mlp.c_fc.bias.requires_grad_(True)
    model(IDS).logits.sum().backward()
    assert bias.grad.abs().max() > 0


def test_int8_bases_are_built_so(make_recipe: Any) -> None:
    model = build(make_recipe(**{"model.dtype": "int8"}), total_steps=1).model
    assert sum(isinstance(module, FrozenInt8Linear) for module in model.modules()) == 8
    model = build(make_recipe(), total_steps=1).model
    assert not any(isinstance(module, FrozenInt8Linear) for module in model.modules())


def test_checkpointing_saves_with_an_int8_base(
    make_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Simulated, 8 blocks: what bitsandbytes' layers keep beside, 9 times d for each token."""
    size = {"n_embd": 256, "n_layer": 8, "n_positions": 512}
    directory = save_without_weights(tmp_path / "model", **size)
    recipe = make_recipe(**{"model.name": str(directory), "model.dtype": "int8"})
    shape = BatchShape(micro_batch_size=8, seq_len=512, gradient_checkpointing=True)
    card = find_card("rtx-4070-ti")
    lean = predict(card, recipe, shape).allocated_bytes
    monkeypatch.setattr("lowvram.int8.keep_no_inputs", lambda model: 0)
    kept = predict(card, recipe, shape).allocated_bytes
    layers, tokens, bf16 = 8, 8 * 512, 2
    assert kept - lean > 0.8 * layers * tokens * 256 * 6 * bf16
