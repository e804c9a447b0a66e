"""The frozen block against transformers' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import make_gpt2

from lowvram import frozen_block
from lowvram.adapters import Adapter, add_adapter
from lowvram.build import build
from lowvram.dropout import speed_up_dropout
from lowvram.frozen_block import FrozenBlock, make_blocks_lean
from lowvram.model import fuse_gelu

IDS = torch.randint(0, 250, (3, 21), generator=torch.Generator().manual_seed(0))


def make(lean: bool, targets: Any = ("c_attn",), dropout: float = 0.0) -> Any:
    model = make_gpt2(resid_pdrop=dropout)
    fuse_gelu(model)
    speed_up_dropout(model)
    if lean:
        assert make_blocks_lean(model) == 2
    adapted = add_adapter(model, Adapter(rank=4, target_modules=targets))
    torch.manual_seed(7)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return adapted.train()


def run(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    logits = model(IDS).logits
    logits.log_softmax(-1)[..., 0].sum().backward()
    return logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_close(found: Any, expected: Any) -> None:
    """1e-5, relative to the largest value of each tensor."""
    assert found[1].keys() == expected[1].keys()
    pairs = [(found[0], expected[0]), *((found[1][n], expected[1][n]) for n in found[1])]
    for one, other in pairs:
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()


@pytest.mark.parametrize("rows", [1, 10, 512])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_values_and_gradients_are_transformers(
    monkeypatch: pytest.MonkeyPatch, rows: int, dropout: float
) -> None:
    """Chunks that do not divide the rows, too; dropout draws the same numbers in the same order."""
    monkeypatch.setattr(frozen_block, "_ROWS", rows)
    assert_close(run(make(True, dropout=dropout)), run(make(False, dropout=dropout)))


@pytest.mark.parametrize("targets", [("c_fc",), ("c_attn", "c_proj")])
def test_blocks_with_an_adapter_in_the_mlp_are_transformers(targets: Any) -> None:
    assert_close(run(make(True, targets)), run(make(False, targets)))


def test_trained_weights_get_their_gradients() -> None:
    found, expected = (make(lean).requires_grad_(True) for lean in (True, False))
    assert_close(run(found), run(expected))


def test_what_a_block_keeps() -> None:
    """Beside weights and adapter: its input, the norm of it, queries to values, what attention
    gives, the sum before the MLP, the input of the GELU, and three numbers a token and norm.
    """
    model = make(True)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(saved: torch.Tensor) -> torch.Tensor:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return saved

    block = model.get_base_model().transformer.h[0]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        output = block(torch.randn(2, 30, 32, requires_grad=True), use_cache=False)
    assert sum(kept.values()) < 4 * 2 * 30 * 32 * (1 + 1 + 3 + 2 + 1 + 4) * 1.1
    output.sum().backward()


@torch.no_grad()
def test_evaluation_and_generation_are_transformers() -> None:
    found, expected = make(True).eval(), make(False).eval()
    assert torch.equal(found(IDS).logits, expected(IDS).logits)
    ids = IDS[:1, :5]
    one, other = (
        m.generate(input_ids=ids, max_new_tokens=9, do_sample=False) for m in (found, expected)
    )
    assert torch.equal(one, other)


@pytest.mark.parametrize("fused", [True, False])
def test_the_recipe_decides(make_recipe: Any, fused: bool) -> None:
    model = build(make_recipe(**{"model.fused_gelu": fused}), total_steps=1).model
    assert any(isinstance(module, FrozenBlock) for module in model.modules()) is fused


@pytest.mark.parametrize("rows", [1, 10, 512])
def test_without_gradients_the_logits_are_transformers(
    monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    monkeypatch.setattr(frozen_block, "_ROWS", rows)
    used = []
    real = frozen_block._add_mlp
    monkeypatch.setattr(
        frozen_block, "_add_mlp", lambda *arguments: used.append(1) or real(*arguments)
    )
    lean, plain = make(True, dropout=0.3).eval(), make(False, dropout=0.3).eval()

    with torch.no_grad():
        found, expected = lean(IDS, use_cache=False), plain(IDS, use_cache=False)
        hidden = lean(IDS, use_cache=False, output_hidden_states=True).hidden_states
        others = plain(IDS, use_cache=False, output_hidden_states=True).hidden_states

    assert len(used) == 2 * 2
    for one, other in zip((found.logits, *hidden), (expected.logits, *others), strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()


def test_with_a_cache_it_is_transformers_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen_block, "_add_mlp", None)
    lean, plain = make(True).eval(), make(False).eval()

    with torch.no_grad():
        assert torch.equal(lean(IDS).logits, plain(IDS).logits)


def test_without_fast_dropout_the_mask_is_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def made(lean: bool) -> Any:
        model = make_gpt2(resid_pdrop=0.3)
        fuse_gelu(model)
        if lean:
            make_blocks_lean(model)
        return add_adapter(model, Adapter(rank=4, target_modules=("c_attn",))).train()

    monkeypatch.setattr(frozen_block, "keep_mask", None)
    torch.manual_seed(0)
    found = made(True)(IDS).logits
    torch.manual_seed(0)
    assert torch.equal(found, made(False)(IDS).logits)
