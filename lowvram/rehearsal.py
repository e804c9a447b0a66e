"""A run in small, with the worst batch that its data can give: for the simulator and for a card.

The same `build` and `train_step` as in a run. What is rehearsed: the evaluation of the base, three
optimizer steps, an evaluation in passing and taking the adapter off the card.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch

from lowvram.build import Numerics, build
from lowvram.checkpointing import Checkpointing
from lowvram.data import IGNORED, Batch
from lowvram.perplexity import pass_tokens_on, score
from lowvram.recipe import Recipe, with_overrides
from lowvram.train import TrainState, accumulate_gradients, train_step

STEPS = 3
"""The optimizer's states are made in the first; the second is the first that has them all along."""


@dataclass(frozen=True, kw_only=True, eq=False)
class BatchShape:
    """`micro_batch_size` rows of `seq_len` tokens in each forward pass."""

    micro_batch_size: int
    seq_len: int
    gradient_checkpointing: Checkpointing

    def __eq__(self, other: object) -> bool:
        """True, all blocks, is not 1, the first of them, as it is to Python."""
        return isinstance(other, BatchShape) and repr(self) == repr(other)

    def __hash__(self) -> int:
        return hash(repr(self))


def pinned(recipe: Recipe, shape: BatchShape) -> Recipe:
    """The recipe with this shape, for a global batch that it divides."""
    size = recipe.train.global_batch_size
    if recipe.train.fused_backward:
        size = shape.micro_batch_size  # such a step has one micro-batch
    elif size % shape.micro_batch_size:
        passes = 1 if shape.micro_batch_size > size else 2
        size = passes * shape.micro_batch_size
    return with_overrides(
        recipe,
        {
            "train.global_batch_size": size,
            "fit.micro_batch_size": shape.micro_batch_size,
            "fit.max_seq_len": shape.seq_len,
            "fit.gradient_checkpointing": shape.gradient_checkpointing,
        },
    )


@dataclass(kw_only=True)
class Rehearsal:
    """A training state, and the window of micro-batches that it is given again and again."""

    state: TrainState
    window: Sequence[Batch]
    seq_len: int
    numerics: Numerics
    steps: int = 0

    def step(self) -> None:
        if self.steps == 0:
            self.evaluate()  # of the base, before anything is learned
        train_step(self.state, self.window)
        self.steps += 1
        if self.steps == STEPS:
            self.evaluate()
            self.save()

    def evaluate(self) -> None:
        """As many full windows as one forward pass of an evaluation takes."""
        tokens = np.zeros(self.seq_len, dtype=np.int64)
        windows = max(1, pass_tokens_on(self.state.device) // self.seq_len)
        score(
            self.state.model,
            [(tokens, self.seq_len, self.seq_len)] * windows,
            context_length=self.seq_len,
            stride=max(1, self.seq_len // 2),
            precision=self.numerics.precision,
        )

    def warm_up(self) -> None:
        """Meet the worst batch first, as a simulation does, and leave no trace in the training.

        The allocator then has blocks of the largest sizes, which smaller batches are cut from. If
        batches grew over a run, it would keep blocks of all their sizes.
        """
        device = self.state.device
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            self.evaluate()
            self.state.model.train()
            targets = sum(batch.target_tokens for batch in self.window)
            fused = self.state.fused
            with fused.without_updates() if fused else nullcontext():
                accumulate_gradients(self.state, self.window, targets)
            self.state.optimizer.zero_grad(set_to_none=True)

    def save(self) -> None:
        for parameter in self.state.trainable():
            parameter.detach().cpu()


def rehearse(recipe: Recipe, numerics: Numerics) -> Rehearsal:
    """`recipe` with its shape pinned, ready for the first step."""
    state = build(recipe, total_steps=STEPS, numerics=numerics)
    return rehearsal_of(state, recipe, numerics)


def rehearsal_of(state: TrainState, recipe: Recipe, numerics: Numerics) -> Rehearsal:
    shape = recipe.fit
    assert isinstance(shape.micro_batch_size, int)
    assert isinstance(shape.max_seq_len, int)
    passes = recipe.train.global_batch_size // shape.micro_batch_size
    batch = worst_batch(shape.micro_batch_size, shape.max_seq_len, packed=recipe.data.packing)
    return Rehearsal(
        state=state,
        # From the second pass on nothing new comes into being.
        window=[batch] * min(passes, 2),
        seq_len=shape.max_seq_len,
        numerics=numerics,
    )


def worst_batch(rows: int, seq_len: int, *, packed: bool) -> Batch:
    """Full rows without padding, of two documents each if rows are packed.

    One target is missing in each row, as where a document begins: then the loss has to pick the
    rows of the hidden states that have one.
    """
    half = seq_len // 2
    labels = torch.zeros((rows, seq_len), dtype=torch.int64)
    labels[:, half] = IGNORED
    places = torch.arange(seq_len).repeat(rows, 1)
    places[:, half:] -= half
    return Batch(
        input_ids=torch.zeros((rows, seq_len), dtype=torch.int64),
        labels=labels,
        position_ids=places if packed else None,
        target_tokens=rows * (seq_len - 2),
        tokens=rows * seq_len,
    )
