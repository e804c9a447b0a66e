"""Fused attention. Sources: native/transformers/cuda/.

Shapes: b batch, h heads of the queries, g heads of keys and values, l queries, s keys, d head size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lowvram.memory.kernels.tape import Call, Tape
from lowvram.memory.kernels.target import Target
from lowvram.memory.kernels.tensors import HALF, is_deterministic, parts
from lowvram.memory.sizes import up_to_multiple


def flash_forward(call: Call, tape: Tape) -> None:
    """flash_attn/flash_api.cpp, mha_fwd: accumulators when few queries are split over keys.

    With dropout the random state is made twice and the first one dropped.
    """
    tape.outputs()
    heads_first = call.get("max_q") is None
    query, key = call["query"], call["key"]
    if call.get("cum_seq_q") is None:
        layout = (0, 1, 2, 3) if heads_first else (0, 2, 1, 3)
        batch, heads, queries, size = (query.size(dim) for dim in layout)
        key_heads, keys = key.size(layout[1]), key.size(layout[2])
        _flash_splits(call, tape, (batch, heads, key_heads, queries, keys, size))
    if call["dropout_p"] > 0.0:
        tape.brief(16)


def _flash_splits(call: Call, tape: Tape, sizes: tuple[int, int, int, int, int, int]) -> None:
    """set_params_splitkv: partial outputs and their logarithms, one per split."""
    batch, heads, key_heads, queries, keys, size = sizes
    if call["dropout_p"] > 0.0:
        return
    if queries == 1 and heads > key_heads:
        queries, heads = heads // key_heads, key_heads
    rows = batch * heads * queries
    block = 256 if size <= 64 else 128 if size <= 128 else 64
    splits = _flash_split_count(
        batch * heads * parts(queries, 64),
        call.target.multiprocessors * 2,
        parts(keys, block),
    )
    if splits > 1:
        tape.allocate(splits * rows * 4)
        tape.allocate(splits * rows * _flash_head(size) * 4)


def _flash_split_count(blocks: int, multiprocessors: int, key_blocks: int) -> int:
    """num_splits_heuristic: the fewest splits that fill 85 % of the best share of the card."""
    if blocks >= 0.8 * multiprocessors:
        return 1
    best = 0.0
    shares: dict[int, float] = {}
    for splits in range(1, min(128, multiprocessors, key_blocks) + 1):
        if splits > 1 and parts(key_blocks, splits) == parts(key_blocks, splits - 1):
            continue
        waves = blocks * splits / multiprocessors
        shares[splits] = waves / math.ceil(waves)
        best = max(best, shares[splits])
    return next((splits for splits, share in shares.items() if share >= 0.85 * best), 1)


def _flash_head(size: int) -> int:
    return up_to_multiple(size, 32 if size <= 128 else 64)


def flash_backward(call: Call, tape: Tape) -> None:
    """flash_attn/flash_api.cpp, mha_bwd and mha_varlen_bwd.

    The sum of dO * O per query, an fp32 accumulator of dQ, and with grouped heads dK and dV for
    every head of the queries. Queries are rounded up to 128 and the head size to 32 or 64.
    """
    query, key = call["query"], call["key"]
    dense = call.get("cum_seq_q") is None
    heads_first = dense and "rng_state" not in call.arguments
    for tensor in (call["grad_out"], call["out"]):
        tape.copy(tensor.transpose(1, 2) if heads_first else tensor)
    tape.outputs()
    if heads_first:
        query, key = query.transpose(1, 2), key.transpose(1, 2)
    size, heads, key_heads = query.size(-1), query.size(-2), key.size(-2)
    if dense:
        batch, rows = query.size(0), query.size(0) * up_to_multiple(query.size(1), 128)
    else:
        batch = call["cum_seq_q"].numel() - 1
        rows = query.size(0) + 128 * batch
    tape.allocate(rows * heads * 4)
    splits = parts(call.target.multiprocessors, batch * heads) if is_deterministic() else 1
    tape.allocate(splits * rows * heads * _flash_head(size) * 4)
    if heads != key_heads:
        expanded = key.numel() // key_heads * heads * key.element_size()
        tape.allocate(expanded)
        tape.allocate(expanded)


def efficient_forward(call: Call, tape: Tape) -> None:
    """attention.cu, _efficient_attention_forward: fp32 output for 16-bit heads above 128."""
    tape.outputs()
    query, value = call["query"], call["value"]
    if query.dtype in HALF and max(query.size(-1), value.size(-1)) > 128:
        tape.allocate(query.numel() // query.size(-1) * value.size(-1) * 4)


@dataclass(frozen=True)
class _Blocks:
    """Tile of a memory-efficient backward kernel: queries, keys, largest head it is made for."""

    queries: int
    keys: int
    head: int


def _efficient_blocks(half: bool, head: int, dropout: bool, target: Target) -> _Blocks:
    """mem_eff_attention/kernels/cutlassB.h: the first kernel that fits into shared memory.

    Which ones fit is known for the 64 x 64 kernels; above heads of 64 it is an estimate.
    """
    card, room = target.compute_capability, target.shared_kib_per_block
    if head <= 64:
        return _Blocks(64, 64, 32 if head <= 32 else 64)
    wide = room >= 163 if card >= (8, 0) else half and card >= (7, 0)
    if head <= 96 and half and card in {(8, 6), (8, 9)} and not dropout:
        return _Blocks(128, 64, 96)
    if head <= 128:
        if half and card >= (8, 0):
            return _Blocks(128, 128, 128) if wide else _Blocks(64, 64, 128)
        return _Blocks(128 if wide else 64, 64, 128)
    wide = wide or (half and card >= (8, 0))
    return _Blocks(128 if wide else 64, 64, 65536)


def efficient_backward(call: Call, tape: Tape) -> None:
    """attention_backward.cu and mem_eff_attention/kernel_backward.h.

    Above compute capability 7 the gradient of the queries is added up in an fp32 workspace; the
    fp32 kernels leave the sums of dO * O per query to ordinary operators.
    """
    heads_first = "grad_input_mask" in call.arguments
    query, key, value, grad = (call[name] for name in ("query", "key", "value", "grad_out_"))
    out = call["out"]
    if heads_first:
        query, key, value, grad, out = (
            tensor.transpose(1, 2) for tensor in (query, key, value, grad, out)
        )
    tape.copy(grad)
    tape.outputs()
    half = query.dtype in HALF
    blocks = _efficient_blocks(
        half, max(query.size(-1), value.size(-1)), call["dropout_p"] > 0.0, call.target
    )
    rows = query.size(0) * query.size(1) * query.size(2)
    in_registers = half and blocks.head <= blocks.queries
    if half and (in_registers or call.target.compute_capability[0] != 7):
        tape.allocate(rows * 4)
    else:
        _row_products(tape, rows, grad, query)
    tape.allocate(_efficient_workspace(query, key, value, blocks, in_registers, call.target))


def _row_products(tape: Tape, rows: int, grad: Tensor, query: Tensor) -> None:
    """(grad.float() * out.float()).sum(-1).transpose(-2, -1).contiguous(), in fp32."""
    count = grad.numel()
    widened = [] if grad.dtype == torch.float32 else [tape.allocate(count * 4) for _ in range(2)]
    product = tape.allocate(count * 4)
    total = tape.allocate(rows * 4)
    if min(query.size(1), query.size(2)) > 1:
        tape.allocate(rows * 4)
        tape.free(total)
    tape.free(product, *reversed(widened))


def _efficient_workspace(  # noqa: PLR0913 - three tensors, the kernel and the card
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: _Blocks,
    in_registers: bool,
    target: Target,
) -> int:
    """Params::workspace_size: floats per batch and head, for dK, dV and dQ."""
    batch, queries, heads, size = query.shape
    half, splittable = query.dtype in HALF, target.compute_capability >= (7, 0)
    floats = 0
    if half and not in_registers:
        splits = _key_splits(key.size(1), batch * heads, blocks.keys) if splittable else 1
        for width in (size, value.size(-1)):
            floats += splits * blocks.keys * up_to_multiple(width, blocks.queries)
    if splittable or half:
        tiles = parts(queries, blocks.queries) * parts(size, blocks.keys)
        floats += tiles * (4 + blocks.queries * blocks.keys)
    return batch * heads * up_to_multiple(floats, 4) * 4


def _key_splits(keys: int, grid: int, block: int) -> int:
    """The heuristic of _efficient_attention_backward for kernels that also add up dK and dV."""
    splits = 1 if grid >= 256 and keys <= 2 * block else parts(keys, block)
    return 1 if is_deterministic() else max(1, min(splits, 200 // grid))


def cudnn_backward(call: Call, tape: Tape) -> None:
    """cudnn/MHA.cpp: cuDNN says how much it wants only at run time. An estimate: fp32 dQ."""
    tape.outputs()
    query = call["query"]
    tape.allocate(query.numel() // query.size(-1) * 4)
    tape.allocate(query.numel() * 4)
