"""Training steps whose memory others measured on a card and published, written anew.

    python benchmarks/accuracy_rows.py gpt2-fp32-a100

simulates one of them and prints the result as JSON. `memory_accuracy.py` runs every row so, each in
a process of its own, because some need a Python with an older transformers. This file needs
nothing but torch, `lowvram.memory` and, for those rows, transformers.

Tensor shapes: b sequences of a batch, s positions, h heads, d head size, c width, v vocabulary.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

State = dict[str, Any]
Build = Callable[[torch.device], State]
Step = Callable[[State], None]

MIB = 2**20
IGNORED = -100
OLD_TRANSFORMERS = "4.52"
SLOPE = math.sqrt(2 / math.pi)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A published measurement and the code that it was a measurement of."""

    name: str
    configuration: str
    card: str
    """As `lowvram.memory.find_card` knows it."""
    measured_bytes: int
    source: str
    """Where the figure was published."""
    build: Build
    step: Step
    steps: int = 3
    torch_version: tuple[int, int] = (2, 6)
    """Whose CUDA kernels ran; the Python code is that of the torch installed."""
    transformers: str | None = None
    """Version whose model code was measured; None: no transformers needed."""


# --- GPT-2 by hand --------------------------------------------------------------------------------
# A name keeps its tensor until the function returns. Which intermediate results have a name, and
# the order in which they come about, are those of the measured code: they decide the peak.


@dataclass(frozen=True, kw_only=True)
class Size:
    """Of a GPT-2; the defaults are the smallest released one's."""

    vocabulary: int = 50_257
    context: int = 1024
    width: int = 768
    heads: int = 12
    blocks: int = 12
    dropout: float = 0.1
    by_hand: bool = True
    """Layer norm and GELU in single operations, and the causal mask as a buffer."""


class HandLayerNorm(nn.Module):
    """`nn.LayerNorm` in single operations, each of which leaves a tensor for the backward pass."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:  # (b, s, c)
        mean = x.mean(-1, keepdim=True)
        variance = x.var(-1, keepdim=True, unbiased=False)
        normal = (x - mean) / torch.sqrt(variance + 1e-5)
        return self.gain * normal + self.bias


class HandGELU(nn.Module):
    """`nn.GELU("tanh")` in single operations."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh(SLOPE * (x + 0.044715 * torch.pow(x, 3))))


class HandAttention(nn.Module):
    """Causal attention that writes all scores, (b, h, s, s), three projections and no biases."""

    mask: Tensor

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads = size.heads
        self.query, self.key, self.value = (
            nn.Linear(size.width, size.width, bias=False) for _ in range(3)
        )
        self.output = nn.Linear(size.width, size.width)
        self.dropout = nn.Dropout(size.dropout)
        self.has_buffer = size.by_hand
        if self.has_buffer:
            self.register_buffer("mask", torch.ones(size.context, size.context).triu(1))

    def split(self, x: Tensor) -> Tensor:  # (b, s, c) -> (b, h, s, d)
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)

    def future(self, length: int, device: torch.device) -> Tensor:  # (s, s), True: out of sight
        if self.has_buffer:
            return self.mask.bool()[:length, :length]
        return torch.ones(length, length, dtype=torch.bool, device=device).triu(1)

    def forward(self, x: Tensor) -> Tensor:  # (b, s, c)
        key, query, value = self.key(x), self.query(x), self.value(x)
        key, value, query = self.split(key), self.split(value), self.split(query)
        scores = query @ key.transpose(2, 3)  # (b, h, s, s)
        scores.masked_fill_(self.future(x.shape[1], x.device), -torch.inf)
        weights = self.dropout(torch.softmax(scores / key.shape[-1] ** 0.5, dim=-1))
        mixed = (weights @ value).transpose(1, 2)  # (b, s, h, d)
        mixed = mixed.reshape(x.shape)
        return self.output(mixed)


class HandBlock(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        norm, gelu = (
            (HandLayerNorm, HandGELU()) if size.by_hand else (nn.LayerNorm, nn.GELU("tanh"))
        )
        self.attention = HandAttention(size)
        self.mlp = nn.Sequential(
            nn.Linear(size.width, 4 * size.width), gelu, nn.Linear(4 * size.width, size.width)
        )
        self.norm1 = norm(size.width)
        self.norm2 = norm(size.width)
        self.dropout = nn.Dropout(size.dropout)

    def forward(self, x: Tensor) -> Tensor:  # (b, s, c)
        x = self.dropout(self.attention(self.norm1(x))) + x
        return self.dropout(self.mlp(self.norm2(x))) + x


class HandGPT2(nn.Module):
    """GPT-2 as a textbook writes it; the output head has a matrix of its own."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.tokens = nn.Embedding(size.vocabulary, size.width)
        self.positions = nn.Embedding(size.context, size.width)
        self.dropout = nn.Dropout(size.dropout)
        self.blocks = nn.Sequential(*(HandBlock(size) for _ in range(size.blocks)))
        self.norm = (HandLayerNorm if size.by_hand else nn.LayerNorm)(size.width)
        self.head = nn.Linear(size.width, size.vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:  # (b, s) -> (b, s, v)
        tokens = self.tokens(ids)
        places = self.positions(torch.arange(ids.shape[1], device=ids.device))
        x = self.dropout(tokens + places)
        return self.head(self.norm(self.blocks(x)))


def build_by_hand(
    size: Size, *, dtype: torch.dtype = torch.float32, fused: bool | None = None
) -> Build:
    """Return the build of a hand-written GPT-2 and AdamW; `fused` None leaves torch its default."""

    def build(device: torch.device) -> State:
        model = HandGPT2(size)
        model.to(device).to(dtype)
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.1, fused=fused)
        return {"model": model, "optimizer": optimizer, "device": device}

    return build


def step_by_hand(batch: int, length: int) -> Step:
    """Return the step: gradients go first, inputs and logits live inside the loss function."""

    def loss_of(state: State) -> Tensor:
        ids, targets = (torch.zeros(batch, length, dtype=torch.long) for _ in range(2))
        ids, targets = ids.to(state["device"]), targets.to(state["device"])
        logits = state["model"](ids)  # (b, s, v)
        return cross_entropy(logits.flatten(0, 1), targets.flatten())

    def step(state: State) -> None:
        state["optimizer"].zero_grad()
        state["loss"] = loss_of(state)
        state["loss"].backward()
        state["optimizer"].step()

    return step


# --- GPT-2 of Hugging Face ------------------------------------------------------------------------


def build_hugging_face(**changes: Any) -> Build:
    """Return the build of an untrained GPT2LMHeadModel in training mode, with AdamW."""

    def build(device: torch.device) -> State:
        from transformers import GPT2Config, GPT2LMHeadModel

        model: Any = GPT2LMHeadModel(GPT2Config(**changes)).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        model.to(device)
        return {"model": model, "optimizer": optimizer, "device": device}

    return build


def padded_batch(batch: int, length: int) -> dict[str, Tensor]:
    """Token rows of different lengths, filled up at the end, as a data collator makes them."""
    lengths = torch.linspace(1, length, batch).long()
    mask = (torch.arange(length) < lengths[:, None]).long()  # (b, s)
    ids = torch.zeros_like(mask)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, IGNORED)}


def step_hugging_face(batch: int, length: int) -> Step:
    """Return the step: gradients go first; the outputs live until the next ones exist.

    The outputs hold the logits and the key-value cache, which `use_cache` fills in training too.
    """

    def step(state: State) -> None:
        state.pop("batch", None)
        state["optimizer"].zero_grad()
        rows = padded_batch(batch, length)
        state["batch"] = {name: value.to(state["device"]) for name, value in rows.items()}
        state["outputs"] = state["model"](**state["batch"])
        state["loss"] = state["outputs"].loss
        state["loss"].backward()
        state["optimizer"].step()

    return step


# --- the rows -------------------------------------------------------------------------------------

# "Reserved memory" of its README: torch.cuda.memory_reserved after training. A100, torch 2.6, CUDA
# 12.4. The first figure is that of 00_orig.py, the second one that of step 6, where the mask is
# made in each call, the weights are bf16, AdamW is fused, LayerNorm and GELU are torch's.
TEXTBOOK = "github.com/rasbt/LLMs-from-scratch, ch05/10_llm-training-speed"

# `ground` of an evaluation_result.json below plot/data/002-Monte Carlo/Transformer/001: the most
# that NVML showed during four steps less what it showed before them. torch 2.6. The rows of
# WikiText are cut at 128 tokens and padded to the longest of the batch, which is 128.
XMEM = "github.com/Stone-ResearchLife/xMem"


def _textbook(name: str, configuration: str, measured: float, build: Build) -> Row:
    return Row(
        name=name,
        configuration=configuration,
        card="a100",
        measured_bytes=round(measured * 2**30 / (2 * MIB)) * 2 * MIB,  # published in four digits
        source=TEXTBOOK,
        build=build,
        step=step_by_hand(8, 1024),
    )


def _xmem(name: str, card: str, batch: int, measured_mib: int, **changes: Any) -> Row:
    return Row(
        name=f"{name}-{batch}-{card}",
        configuration=f"{name} of transformers {OLD_TRANSFORMERS}, fp32, AdamW, {batch} x 128",
        card=card,
        measured_bytes=measured_mib * MIB,
        source=XMEM,
        build=build_hugging_face(**changes),
        step=step_hugging_face(batch, 128),
        steps=4,
        transformers=OLD_TRANSFORMERS,
    )


ROWS = (
    _textbook(
        "gpt2-fp32-a100",
        "GPT-2 by hand, fp32, AdamW, 8 x 1024",
        26.2617,
        build_by_hand(Size()),
    ),
    _textbook(
        "gpt2-bf16-a100",
        "GPT-2 by hand with LayerNorm and GELU of torch, bf16, fused AdamW, 8 x 1024",
        11.5645,
        build_by_hand(Size(by_hand=False), dtype=torch.bfloat16, fused=True),
    ),
    _xmem("gpt2", "rtx-3060", 27, 9368),
    _xmem("distilgpt2", "rtx-4060", 22, 5288, n_layer=6),
    _xmem("distilgpt2", "rtx-3060", 28, 6600, n_layer=6),
)


def find_row(name: str) -> Row:
    for row in ROWS:
        if row.name == name:
            return row
    raise ValueError(f"no row {name!r}; there are {', '.join(row.name for row in ROWS)}")


def check_transformers(row: Row) -> None:
    """Refuse a version whose model code is not the measured one: it takes another amount."""
    if row.transformers is None:
        return
    import transformers

    found = transformers.__version__
    if not found.startswith(row.transformers + "."):
        raise ValueError(f"{row.name} needs transformers {row.transformers}; this is {found}")


def predict(row: Row) -> dict[str, float]:
    """Simulate a row; return the peak in bytes and the seconds that it took."""
    from lowvram.memory import find_card, simulate

    check_transformers(row)
    began = time.perf_counter()
    trace = simulate(
        row.build,
        row.step,
        steps=row.steps,
        card=find_card(row.card),
        torch_version=row.torch_version,
    )
    if trace.out_of_memory is not None:
        raise RuntimeError(f"{row.name} ran out of memory on a {row.card}: {trace.out_of_memory}")
    return {
        "predicted_bytes": trace.peak_reserved_bytes,
        "seconds": time.perf_counter() - began,
    }


if __name__ == "__main__":
    print(json.dumps(predict(find_row(sys.argv[1]))))
