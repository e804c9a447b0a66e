"""What the levers on memory cost in time: a step with one, as a multiple of the step without it.

The times are those of `benchmarks/levers.py`, on a CPU; in full fine-tuning, the backward pass is
longer, and a second forward pass a smaller part. None stands for what a CPU cannot tell of a card,
such as how fast it reads weights of 4 bits.
"""

from __future__ import annotations

from dataclasses import dataclass

from lowvram.checkpointing import Checkpointing


@dataclass(frozen=True, kw_only=True)
class Price:
    words: str
    time: float | None = None
    """A multiple of the time without the lever."""

    def __str__(self) -> str:
        return self.words if self.time is None else f"{self.words}; {self.time:.2f} x the time"


ALL_BLOCKS = {"adapter": 1.37, "full": 1.17}
SELECTIVE = {"adapter": 1.12, "full": 1.05}
# Modelled, not measured: of 4 x 768 bytes for each token and block, there and back at 20 GB/s
# (PCIe 4.0 x16, pinned memory), and 72 x 768**2 operations at 40 TFLOPS, in turn.
_COPIES = 0.15


def time_of(kind: Checkpointing, blocks: int, method: str) -> float:
    """Of recomputing some of a model's blocks, or all in some way; `method` is a recipe's."""
    trained = "full" if method == "full" else "adapter"
    if kind == "selective":
        return SELECTIVE[trained]
    if kind == "offload":
        return ALL_BLOCKS[trained] + _COPIES
    share = float(kind) if isinstance(kind, bool) else kind / blocks
    return 1.0 + share * (ALL_BLOCKS[trained] - 1.0)


def of_recomputation(kind: Checkpointing, blocks: int, method: str) -> Price:
    words = {
        "selective": "computes all but products and attention again",
        "offload": "computes every block again, whose input waits in host memory",
    }
    again = words[kind] if isinstance(kind, str) else "a second forward pass of these blocks"
    return Price(words=again, time=time_of(kind, blocks, method))


PRICES = {
    "fit.micro_batch_size": Price(words="more forward passes a step; the same training"),
    "fit.max_seq_len": Price(words="longer documents become several rows"),
    "method.name=lora": Price(words="trains a small part of the weights"),
    "model.attention=sdpa": Price(words="nothing: the same function in one kernel"),
    "model.dtype=bf16": Price(words="fewer digits in the weights"),
    "model.dtype=int8": Price(words="rounds the frozen weights; slower"),
    "model.dtype=nf4": Price(words="rounds the frozen weights to 4 bits; slower"),
    "model.fused_gelu=true": Price(words="nothing: the same function in one kernel"),
    "train.chunked_loss=true": Price(words="nothing: the same loss, without all logits"),
    "train.fused_backward=true": Price(words="gradients cannot be clipped"),
    "train.optimizer=adamw8bit": Price(words="rounds the optimizer's states"),
    "train.optimizer=paged_adamw8bit": Price(words="states may wait in host memory"),
    "train.precision=bf16": Price(words="fewer digits in matrix products; much faster"),
    "train.precision=fp16": Price(
        words="fewer digits in matrix products; much faster, with a loss scale"
    ),
}
"""Of a change of a recipe; without a value, of every value."""
