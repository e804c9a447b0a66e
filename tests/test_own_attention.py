"""Attention against the textbook formula in 64 bits, and inside whole models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from conftest import make_gpt2, make_llama
from torch import nn
from transformers import PreTrainedModel

from lowvram import attention as module
from lowvram.attention import NAME, causal_attention, document_starts, use_own_attention
from lowvram.dropout import keep_mask, keep_probability
from lowvram.loss import token_loss
from lowvram.memory import find_card, simulate
from lowvram.model import blank_model

Tensors = tuple[torch.Tensor, ...]
SCALE = 0.3
# Rows of documents: whole rows, many short ones, tokens alone, longer than a block of queries.
ROWS = {
    "rows of one document": [[200], [200]],
    "short documents": [[7, 1, 1, 30, 5], [20, 20, 4], [1, 43]],
    "like lengths": [[21, 22, 23, 24, 20], [22, 22, 22, 22, 22]],
    "long and short": [[150, 3, 64, 65, 1, 7], [1, 63, 66, 130, 30]],
}


def positions(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    return torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])


def make_inputs(rows: Sequence[Sequence[int]], heads: int = 3, kv_heads: int = 3) -> Tensors:
    torch.manual_seed(0)
    shape = (len(rows), sum(rows[0]), heads, 8)
    query = torch.randn(shape, requires_grad=True)
    key, value = (torch.randn(*shape[:2], kv_heads, 8, requires_grad=True) for _ in range(2))
    return query, key, value


def ours(inputs: Tensors, position_ids: torch.Tensor | None, dropout: float = 0.0) -> torch.Tensor:
    query, key, value = (x.transpose(1, 2) for x in inputs)
    output, _ = causal_attention(
        nn.Module(), query, key, value, None, dropout, SCALE, position_ids=position_ids
    )
    return output


def textbook(
    inputs: Tensors, documents: torch.Tensor, kept: torch.Tensor | float = 1.0
) -> torch.Tensor:
    """softmax(q k^T) v in fp64 over the keys of the same document that are not later."""
    query, key, value = (x.double().transpose(1, 2) for x in inputs)
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    length = query.shape[2]
    seen = documents[:, None, :, None] == documents[:, None, None, :]
    seen = seen & torch.ones(length, length, dtype=torch.bool).tril()
    scores = (query @ key.transpose(2, 3) * SCALE).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) * kept @ value).transpose(1, 2)


def document_numbers(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    return torch.stack(
        [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in rows]
    )


def with_gradients(output: torch.Tensor, inputs: Tensors) -> Tensors:
    torch.manual_seed(1)
    weights = torch.randn(output.shape, dtype=torch.float64)
    return output, *torch.autograd.grad((output.double() * weights).sum(), inputs)


def assert_close(found: Tensors, expected: Tensors) -> None:
    """Values of about 1, in fp32."""
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kv_heads", [3, 1])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_outputs_and_gradients_are_the_textbooks(rows: list[list[int]], kv_heads: int) -> None:
    width = max(sum(row) for row in rows)
    rows = [[*row, width - sum(row)] if sum(row) < width else row for row in rows]
    inputs = make_inputs(rows, kv_heads=kv_heads)
    found = with_gradients(ours(inputs, positions(rows)), inputs)
    assert_close(found, with_gradients(textbook(inputs, document_numbers(rows)), inputs))


def test_without_positions_a_row_is_one_document() -> None:
    inputs = make_inputs([[70], [70]])
    assert torch.equal(ours(inputs, None), ours(inputs, positions([[70], [70]])))
    assert document_starts(None, 2, 70) == [0, 70]
    one_row_for_all = torch.tensor([[0, 1, 2, 0, 1]])
    assert document_starts(one_row_for_all, 2, 5) == [0, 3, 5, 8]


@pytest.mark.parametrize("length", [10, 64, 150])
def test_dropout_drops_from_the_probabilities(monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    """The masks that were drawn, put together, and the formula with them."""
    drawn: list[torch.Tensor] = []

    def draw(shape: Sequence[int], p: float) -> torch.Tensor:
        drawn.append(keep_mask(shape, p))
        return drawn[-1]

    monkeypatch.setattr(module, "keep_mask", draw)
    inputs = make_inputs([[length]])
    found = with_gradients(ours(inputs, None, dropout=0.25), inputs)
    mask = torch.zeros(1, 3, length, length)
    for i, part in enumerate(drawn):  # blocks of 64 queries, each with the keys up to its end
        mask[0, :, 64 * i : 64 * i + part.shape[1], : part.shape[2]] = part
    kept = mask.double() / keep_probability(0.25)
    assert 0.2 < 1 - torch.cat([part.flatten() for part in drawn]).float().mean() < 0.3
    expected = textbook(inputs, torch.zeros(1, length), kept)
    assert_close(found, with_gradients(expected, inputs))


def test_dropout_changes_nothing_on_average() -> None:
    """Mean of 2,000 draws; its standard error is below 0.01, so 0.05 is five of them."""
    rows = [[5, 9, 2]]
    inputs = tuple(x.detach() for x in make_inputs(rows))
    torch.manual_seed(0)
    mean = sum(ours(inputs, positions(rows), dropout=0.1) for _ in range(2000)) / 2000
    torch.testing.assert_close(mean, ours(inputs, positions(rows)), rtol=0, atol=0.05)


def test_padding_inside_a_group_gets_no_gradient_from_elsewhere() -> None:
    """Documents of 5 and 6 tokens share a group; the last token of all stands in for its padding,
    and nothing of that may reach it.
    """
    rows = [[6, 5, 6]]
    inputs = make_inputs(rows)
    output = ours(inputs, positions(rows), dropout=0.5)
    gradients = torch.autograd.grad(output[:, 6:11].sum(), inputs)
    for gradient in gradients:
        assert gradient[:, :6].abs().max() == 0
        assert gradient[:, 11:].abs().max() == 0


@pytest.mark.parametrize("make", [make_gpt2, make_llama])
@pytest.mark.parametrize("packed", [False, True])
def test_models_compute_what_they_did(make: Any, packed: bool) -> None:
    """Loss to 1e-6 and gradients to 1e-5, relative, of transformers' sdpa with its own masks."""
    rows = [[20, 9, 3], [1, 31]]
    ids = torch.randint(0, 250, (2, 32), generator=torch.Generator().manual_seed(0))
    found = []
    for attention in ("sdpa", NAME):
        model = make()
        if attention == NAME:
            assert use_own_attention(model)
        places = positions(rows) if packed else None
        loss = token_loss(model, ids, ids, places, target_tokens=62)
        loss.backward()
        found.append((loss.detach(), [p.grad for p in model.parameters()]))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-6, atol=0)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        scale = one.abs().max().item()
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5 * scale)


def padded(model: PreTrainedModel) -> torch.Tensor:
    ids = torch.arange(20).view(2, 10)
    mask = torch.ones(2, 10, dtype=torch.int64)
    mask[0, :4] = 0
    logits: torch.Tensor = model(ids, attention_mask=mask).logits
    return logits[:, 4:]


def generated(model: Any) -> torch.Tensor:
    ids = torch.arange(3, 9)[None]
    result: torch.Tensor = model.generate(ids, max_new_tokens=20, do_sample=False)
    return result


def in_bf16(model: PreTrainedModel) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        logits: torch.Tensor = model(
            torch.arange(12)[None], position_ids=positions([[5, 7]]), use_cache=False
        ).logits
    return logits


@pytest.mark.parametrize("use", [padded, generated, in_bf16])
@torch.no_grad()
def test_other_uses_go_to_torchs_kernel(use: Any) -> None:
    """Padding on the left, a cache, 16 bits: to the bit what they are without ours."""
    expected = use(make_gpt2().eval())
    model = make_gpt2().eval()
    use_own_attention(model)
    assert torch.equal(use(model), expected)


def test_unknown_families_keep_their_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_gpt2()
    monkeypatch.setattr(module, "FAMILIES", ("llama",))
    assert not use_own_attention(model)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mask_of_numbers_is_the_mask_of_booleans(dtype: torch.dtype) -> None:
    """To the bit, in torch's own attention."""
    rows = [[20, 9, 3], [1, 31]]
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 4, 32, 8, dtype=dtype)
    seen = module._seen(document_starts(positions(rows), 2, 32), query)
    with_booleans, with_numbers = (
        torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        for mask in (seen, module.to_numbers(seen, dtype))
    )
    assert torch.equal(with_booleans, with_numbers)


@pytest.mark.parametrize("attention", ["sdpa", "auto"])
def test_on_a_card_blocks_share_the_mask_of_packed_documents(attention: str) -> None:
    """Simulated, bf16, rows of 50 tokens: what torch keeps of a mask, once a block or a model."""
    kept: dict[int, torch.Size] = {}

    def keep(saved: torch.Tensor) -> torch.Tensor:
        if saved.shape[-2:] == (50, 50) and saved.dtype == torch.bfloat16:
            kept[saved.untyped_storage().data_ptr()] = saved.shape
        return saved

    def make(device: torch.device) -> PreTrainedModel:
        config = make_gpt2(n_layer=3).config
        return blank_model(config, dtype="bf16", attention=attention, device=str(device))

    def step(model: PreTrainedModel) -> None:
        device = next(model.parameters()).device
        ids = torch.zeros(2, 50, dtype=torch.int64, device=device)
        places = positions([[30, 20], [50]]).to(device)
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved),
            torch.autocast("cuda", torch.bfloat16),
        ):
            output = model(ids, position_ids=places, use_cache=False)
        output.logits.float().sum().backward()

    simulate(make, step, card=find_card("rtx-4070-ti"), steps=1)
    assert len(kept) == (3 if attention == "sdpa" else 1)
