"""The shape of a step: what fits into the memory there is, without changing the training.

`global_batch_size` is the recipe's and stays; the micro-batch only decides into how many
forward passes a step is cut. Until shapes are predicted and measured, `auto` is a rule of
thumb, and says that it is one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lowvram.errors import RecipeError
from lowvram.memory.measure import GIB
from lowvram.recipe import Recipe

# Tokens in one forward pass. The card's figure is for GPT-2 small (124 M) in 12 GiB with some
# room; it scales with memory and shrinks with the size of the model.
_CARD_TOKENS = 8192
_CARD_BYTES = 12 * GIB
_CARD_PARAMETERS = 124_000_000
_CPU_TOKENS = 2048
# From here on (GPT-2 medium), a card trades time for memory unless the recipe says no.
_CHECKPOINTING_PARAMETERS = 200_000_000
_LONGEST_AUTO = 1024


@dataclass(frozen=True, kw_only=True)
class Fit:
    """`micro_batch_size` sequences of up to `max_seq_len` tokens in one forward pass."""

    micro_batch_size: int
    max_seq_len: int
    gradient_checkpointing: bool
    gradient_accumulation_steps: int
    reason: str


def fit(
    recipe: Recipe,
    *,
    context_length: int,
    longest_document: int,
    parameters: int,
    device: torch.device,
) -> Fit:
    """Choose what the recipe leaves to `auto`; raises RecipeError for what cannot be."""
    wanted = recipe.fit
    seq_len = _seq_len(wanted.max_seq_len, context_length, longest_document)
    checkpointing = wanted.gradient_checkpointing
    if checkpointing == "auto":
        checkpointing = device.type == "cuda" and parameters > _CHECKPOINTING_PARAMETERS
    global_size = recipe.train.global_batch_size
    if wanted.micro_batch_size != "auto":
        micro = wanted.micro_batch_size
    else:
        tokens = _pass_tokens(device, recipe.fit.vram_bytes, parameters)
        micro = max(n for n in _divisors(global_size) if n == 1 or n * seq_len <= tokens)
    chosen = [
        name
        for name in ("micro_batch_size", "max_seq_len", "gradient_checkpointing")
        if getattr(wanted, name) == "auto"
    ]
    reason = (
        f"{', '.join(chosen)} by rule of thumb, not measured" if chosen else "as the recipe says"
    )
    return Fit(
        micro_batch_size=micro,
        max_seq_len=seq_len,
        gradient_checkpointing=checkpointing,
        gradient_accumulation_steps=global_size // micro,
        reason=reason,
    )


def _seq_len(wanted: str | int, context_length: int, longest_document: int) -> int:
    if isinstance(wanted, int):
        if wanted > context_length:
            raise RecipeError(
                f"fit.max_seq_len: found {wanted}, the model has {context_length} positions; "
                f"allowed 2 to {context_length}"
            )
        return wanted
    # The next power of two that holds the longest document: shorter rows cut it, longer ones
    # cost memory and bring nothing.
    needed = 1 << max(4, (longest_document - 1).bit_length())
    return min(needed, context_length, _LONGEST_AUTO)


def _pass_tokens(device: torch.device, budget_bytes: int | None, parameters: int) -> int:
    if device.type != "cuda":
        return _CPU_TOKENS
    budget = budget_bytes or torch.cuda.get_device_properties(device).total_memory
    size = max(1.0, parameters / _CARD_PARAMETERS)
    return int(_CARD_TOKENS * budget / _CARD_BYTES / size)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
