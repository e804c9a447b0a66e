"""Attention as transformers calls it, for the models that we train.

On a card it is torch's fused kernel. Only the mask that keeps packed documents apart is made
otherwise: once for all blocks, as the numbers that the kernel adds. From transformers' mask of
booleans torch makes those in every block anew, and keeps each for the backward pass.

On a CPU it is our own, a block of queries at a time. torch's kernel for CPUs computes all pairs,
the half above the diagonal included, knows packed documents only by a mask, and cannot drop
anything: with dropout torch falls back to keeping several matrices of s x s for each head. Here
scores are computed for the pairs that count, in a buffer that stays in the cache, and computed
again in the backward pass.

Shapes: b rows of s tokens, h heads of size d; t = b * s tokens in all. A group is n documents of
up to l tokens, padded at the end, where a causal mask hides the padding from all others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lowvram.dropout import keep_mask, keep_probability
from lowvram.scratch import scratch

NAME = "lowvram"
"""As transformers knows it."""
FAMILIES = ("gpt2", "llama")
"""Model types whose attention is plain: causal, without windows, caps or biases."""

_QUERIES = 64
# Scores of a group, so that they stay in the cache of a core.
_SCORES = 2**19


@dataclass(frozen=True, kw_only=True)
class Group:
    """Documents of like length. One alone is a slice of the tokens, which needs no copy."""

    length: int
    index: torch.Tensor | None = None  # (n, l) tokens, t where there is none
    start: int = 0

    @property
    def documents(self) -> int:
        return 1 if self.index is None else self.index.shape[0]

    def take(self, tokens: torch.Tensor) -> torch.Tensor:
        """(n * h, l, d) of the tokens (t, h, d); what stands in the padding is arbitrary."""
        if self.index is None:
            return tokens[self.start : self.start + self.length].transpose(0, 1)
        taken = tokens[self.index.clamp(max=tokens.shape[0] - 1)]  # (n, l, h, d)
        return taken.transpose(1, 2).reshape(-1, self.length, tokens.shape[2])

    def put(self, tokens: torch.Tensor, values: torch.Tensor) -> None:
        """(n * h, l, d) to their places in (t + 1, h, d), whose last row gets the padding."""
        if self.index is None:
            tokens[self.start : self.start + self.length] = values.transpose(0, 1)
        else:
            heads = values.unflatten(0, (self.documents, -1))  # (n, h, l, d)
            tokens[self.index] = heads.transpose(1, 2)

    def without_padding(self, values: torch.Tensor, tokens: int) -> torch.Tensor:
        """(n * h, l, d), zero in the padding; in place."""
        if self.index is not None:
            padding = (self.index == tokens)[:, None, :, None]  # (n, 1, l, 1)
            values.unflatten(0, (self.documents, -1)).masked_fill_(padding, 0.0)
        return values


def group_documents(starts: Sequence[int], tokens: int, heads: int) -> list[Group]:
    """Documents that begin at `starts` (sorted, the first at 0), in groups of like length."""
    ends = [*starts[1:], tokens]
    spans = sorted((end - start, start) for start, end in zip(starts, ends, strict=True))
    groups = []
    while spans:
        longest = spans[-1][0]
        scores = heads * min(longest, _QUERIES) * longest
        room = max(1, _SCORES // scores)
        chosen = [spans.pop()]
        # Padding costs as much as tokens do: no more of it than a quarter.
        while spans and len(chosen) < room and spans[-1][0] * 4 >= longest * 3:
            chosen.append(spans.pop())
        groups.append(_group(chosen, longest, tokens))
    return groups


def _group(spans: Sequence[tuple[int, int]], longest: int, tokens: int) -> Group:
    if len(spans) == 1:
        return Group(length=longest, start=spans[0][1])
    lengths, starts = torch.tensor(spans).unbind(1)
    place = torch.arange(longest)
    index = torch.where(place < lengths[:, None], starts[:, None] + place, tokens)
    return Group(length=longest, index=index)


def document_starts(position_ids: torch.Tensor | None, rows: int, row_length: int) -> list[int]:
    """First tokens of the documents in `rows` rows, put one after the other.

    A document begins with each row, and where positions do not go on.
    """
    begins = torch.zeros(rows, row_length, dtype=torch.bool)
    begins[:, 0] = True
    if position_ids is not None:
        begins[:, 1:] = position_ids.diff(dim=-1) != 1
    return begins.flatten().nonzero().flatten().tolist()


def causal_attention(  # noqa: PLR0913 - as transformers calls it
    module: nn.Module,
    query: torch.Tensor,  # (b, h, s, d)
    key: torch.Tensor,  # (b, h or fewer, s, d)
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    position_ids: torch.Tensor | None = None,  # (b, s) or (1, s)
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """As transformers calls its attention functions; (b, s, h, d).

    Our own is for training and scoring on a CPU in fp32: what has a cache or a mask of padding goes
    to torch's kernel there, too.
    """
    rows, heads, row_length, size = query.shape
    on_cpu = query.device.type == "cpu"
    plain = on_cpu and attention_mask is None and key.shape[2] == row_length > 1
    if not plain or query.dtype != torch.float32 or keep_probability(dropout) == 0.0:
        if plain:
            attention_mask = _seen(document_starts(position_ids, rows, row_length), query)
        sdpa = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )
        return sdpa
    repeats = heads // key.shape[1]
    if repeats > 1:
        key, value = repeat_kv(key, repeats), repeat_kv(value, repeats)
    tokens = rows * row_length
    groups = group_documents(document_starts(position_ids, rows, row_length), tokens, heads)
    outputs = _Attention.apply(  # type: ignore[no-untyped-call]
        *(x.transpose(1, 2).reshape(tokens, heads, size) for x in (query, key, value)),
        size**-0.5 if scaling is None else scaling,
        dropout,
        groups,
    )
    return outputs.view(rows, row_length, heads, size), None


def _seen(starts: list[int], query: torch.Tensor) -> torch.Tensor:
    """True where a token sees another: (b, 1, s, s)."""
    rows, _, row_length, _ = query.shape
    begins = torch.zeros(rows * row_length, dtype=torch.int64)
    begins[starts] = 1
    document = begins.cumsum(0).view(rows, 1, row_length)
    same = document[..., :, None] == document[..., None, :]
    return same & torch.ones(row_length, row_length, dtype=torch.bool).tril()


def make_mask(attention_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor | None:
    """As transformers calls its mask functions; (b, 1, s, s), or None for a causal one.

    On a CPU, `causal_attention` tells documents apart by their positions.
    """
    on_cpu = kwargs["device"].type == "cpu"
    if on_cpu and attention_mask is None and kwargs["q_length"] == kwargs["kv_length"]:
        return None
    mask: torch.Tensor | None = sdpa_mask(attention_mask=attention_mask, **kwargs)
    if mask is None or on_cpu:
        return mask
    if torch.is_autocast_enabled(mask.device.type):
        return to_numbers(mask, torch.get_autocast_dtype(mask.device.type))
    return to_numbers(mask, kwargs["dtype"])


def to_numbers(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What torch's kernels add to the scores for a mask that is true where a token is seen.

    Its rows are a multiple of 16 apart: else torch makes a copy for each block in which they are.
    """
    width = -(-mask.shape[-1] // 16) * 16
    numbers = torch.zeros(*mask.shape[:-1], width, dtype=dtype, device=mask.device)
    return numbers[..., : mask.shape[-1]].masked_fill_(mask.logical_not(), -torch.inf)


def use_own_attention(model: PreTrainedModel) -> bool:
    """Let a model use `causal_attention` if its family can; whether it can."""
    config = model.config
    if config.model_type not in FAMILIES or getattr(config, "add_cross_attention", False):
        return False
    AttentionInterface.register(NAME, causal_attention)
    AttentionMaskInterface.register(NAME, make_mask)
    model.set_attn_implementation(NAME)
    return True


class _Attention(torch.autograd.Function):
    """softmax(q k^T * scale) v over the tokens of each document up to the query's own.

    With o the output, g its gradient, p the probabilities and m the mask of dropout over its keep
    probability: the gradient of the scores is p * (m * (g v^T) - sum(g * o)), from which those of
    q and k follow, and that of v is (m * p)^T g.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,  # (t, h, d)
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        dropout: float,
        groups: Sequence[Group],
    ) -> torch.Tensor:
        tokens, heads, size = query.shape
        outputs = query.new_empty(tokens + 1, heads, size)
        scores, probabilities = _buffers(2, groups, heads)
        keep = keep_probability(dropout)
        masks = []
        for group in groups:
            q, k, v = (group.take(x) for x in (query, key, value))
            part = q.new_empty(q.shape)
            for block in _blocks(group.length):
                p = _softmax(q, k, scale, block, scores, probabilities)
                if keep < 1.0:
                    masks.append(keep_mask(p.shape, dropout))
                    p.mul_(masks[-1])
                torch.bmm(p, v[:, : block.stop], out=part[:, block])
            group.put(outputs, part.div_(keep) if keep < 1.0 else part)
        outputs = outputs[:-1]
        ctx.save_for_backward(query, key, value, outputs, *masks)
        ctx.settings = scale, keep, groups
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, outputs, *masks = ctx.saved_tensors
        scale, keep, groups = ctx.settings
        tokens, heads, size = query.shape
        grads = [query.new_empty(tokens + 1, heads, size) for _ in range(3)]
        scores, probabilities, buffer = _buffers(3, groups, heads)
        masks.reverse()
        for group in groups:
            q, k, v, o, g = (group.take(x) for x in (query, key, value, outputs, gradient))
            g = group.without_padding(g.mul(1.0 / keep), tokens)
            inner = (g * o).sum(-1, keepdim=True).mul_(keep)  # (n * h, l, 1)
            grad_q, grad_k, grad_v = (torch.zeros_like(q) for _ in range(3))
            for block in _blocks(group.length):
                seen = slice(0, block.stop)
                p = _softmax(q, k, scale, block, scores, probabilities)
                dp = _part(buffer, p.shape)
                torch.bmm(g[:, block], v[:, seen].transpose(1, 2), out=dp)
                kept = p
                if keep < 1.0:
                    mask = masks.pop()
                    dp.mul_(mask)
                    kept = torch.mul(p, mask, out=_part(scores, p.shape))
                # torch.baddbmm_ takes the matrices of a strided batch one by one.
                grad_v[:, seen] += torch.bmm(kept.transpose(1, 2), g[:, block])
                dp.sub_(inner[:, block]).mul_(p)
                grad_q[:, block] = torch.bmm(dp, k[:, seen]).mul_(scale)
                grad_k[:, seen] += torch.bmm(dp.transpose(1, 2), q[:, block] * scale)
            for whole, part in zip(grads, (grad_q, grad_k, grad_v), strict=True):
                group.put(whole, part)
        return *(grad[:-1] for grad in grads), None, None, None


def _blocks(length: int) -> Iterator[slice]:
    for start in range(0, length, _QUERIES):
        yield slice(start, min(start + _QUERIES, length))


def _buffers(count: int, groups: Sequence[Group], heads: int) -> list[torch.Tensor]:
    """Each holds the scores of one block of any group."""
    size = max(g.documents * heads * min(g.length, _QUERIES) * g.length for g in groups)
    return scratch(*[(size,)] * count)


def _part(buffer: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    return buffer[: torch.Size(shape).numel()].view(shape)


def _softmax(
    q: torch.Tensor,  # (n * h, l, d)
    k: torch.Tensor,
    scale: float,
    block: slice,
    scores: torch.Tensor,
    probabilities: torch.Tensor,
) -> torch.Tensor:
    """Probabilities of the queries of a block: (n * h, queries, keys up to the last query)."""
    queries = block.stop - block.start
    shape = (q.shape[0], queries, block.stop)
    part = _part(scores, shape)
    torch.bmm(q[:, block] * scale, k[:, : block.stop].transpose(1, 2), out=part)
    later = torch.full((queries, queries), -torch.inf).triu_(1)
    part[:, :, block] += later
    return torch.softmax(part, -1, out=_part(probabilities, shape))
