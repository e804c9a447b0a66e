"""What a run needs of its host at most, in memory and on disk: by sizes, before anything is loaded.

Upper bounds, not predictions: what a card needs is predicted to the byte elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

from lowvram.memory.measure import is_card
from lowvram.model import known_config
from lowvram.plan import Plan

_PROCESS_BYTES = {"cpu": 900 * 2**20, "card": 2 * 2**30}
"""Python and the libraries; with a card, CUDA's as well, and what its driver maps."""
_TOKENISING_BYTES = 600 * 2**20
_CHUNK_BYTES = 2 * 128 * 2**20
"""Logits are made a chunk at a time, in training and in evaluation; a gradient comes with them."""
_ACTIVATIONS = 40
"""Numbers that a block of a transformer keeps for each token and hidden dimension, gradients of
the moment included; GPT-2's own sum is about 25."""
_STATE_BYTES = {
    "adamw": 8.0,
    "adamw8bit": 2.1,
    "paged_adamw8bit": 2.1,
    "lion8bit": 1.1,
    "adafactor": 4.0,
    "sgd": 0.0,
}
"""Of an optimizer, for each number that is trained, in tensors that are large."""
_SMALL_STATE_BYTES = 8.0
_WIDTHS = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1, "nf4": 1}
_SMALL_FILES_BYTES = 2**24


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Sizes in bytes."""

    memory_bytes: int
    pinned_bytes: int
    """Of these, what the system cannot swap out: rows on their way to a card, offloaded inputs."""
    disk_bytes: int
    disk_words: str
    """What the disk is needed for."""


def needs_of(plan: Plan) -> Needs:
    trained, checkpoint = _trained_bytes(plan), _checkpoint_bytes(plan)
    settings = plan.recipe.train
    kept = settings.keep_last + 1 + settings.keep_best
    merged = plan.parameters.total * _WIDTHS[plan.recipe.output_dtype]
    adapter = 0 if plan.recipe.method.name == "full" else trained
    pinned = _pinned_bytes(plan)
    return Needs(
        memory_bytes=_process_bytes(plan) + max(_TOKENISING_BYTES, _model_bytes(plan)) + pinned,
        pinned_bytes=pinned,
        disk_bytes=kept * checkpoint + adapter + merged + _SMALL_FILES_BYTES,
        disk_words=f"{kept} checkpoints and the merged model",
    )


def _trained_bytes(plan: Plan) -> int:
    full = plan.recipe.method.name == "full"
    width = _WIDTHS[plan.numerics.base_dtype] if full else 4
    return plan.parameters.trainable * width


def _checkpoint_bytes(plan: Plan) -> int:
    small = plan.recipe.method.name != "full"
    each = _SMALL_STATE_BYTES if small else _STATE_BYTES[plan.recipe.train.optimizer]
    return _trained_bytes(plan) + int(plan.parameters.trainable * each)


def _process_bytes(plan: Plan) -> int:
    return _PROCESS_BYTES["card" if is_card(plan.numerics.device) else "cpu"]


def _model_bytes(plan: Plan) -> int:
    """Of the largest phase: training on a CPU, going on from a checkpoint, or merging.

    A merged model is written a layer at a time and read back whole in fp32; after full fine-tuning
    what was trained is there in fp32 as well.
    """
    total = plan.parameters.total
    full = plan.recipe.method.name == "full"
    merging = 4 * total * (2 if full else 1) + _CHUNK_BYTES
    if is_card(plan.numerics.device):
        return max(merging, _checkpoint_bytes(plan))
    base = total * _WIDTHS[plan.numerics.base_dtype]
    gradients = 4 * plan.parameters.trainable
    training = base + gradients + _checkpoint_bytes(plan) + _activation_bytes(plan) + _CHUNK_BYTES
    # What training has freed is kept for the next step, and so is there while merging.
    return training + merging


def _activation_bytes(plan: Plan) -> int:
    tokens = plan.fit.micro_batch_size * plan.fit.max_seq_len
    return 4 * _ACTIVATIONS * tokens * plan.fit.blocks * _hidden_size(plan)


def _hidden_size(plan: Plan) -> int:
    model = plan.recipe.model
    config = known_config(model.name, model.revision).get_text_config()
    return int(getattr(config, "hidden_size", 0))  # a bound the less where it has another name


def _pinned_bytes(plan: Plan) -> int:
    """torch keeps pinned blocks, of powers of two, and uses them again."""
    if not is_card(plan.numerics.device):
        return 0
    tokens = plan.fit.micro_batch_size * plan.fit.max_seq_len
    rows = 3 * 2 * _power_of_two(8 * tokens)  # ids, labels and positions, of two micro-batches
    if plan.fit.gradient_checkpointing != "offload":
        return rows
    width = _WIDTHS[plan.numerics.precision]
    return rows + plan.fit.blocks * _power_of_two(width * tokens * _hidden_size(plan))


def _power_of_two(size: int) -> int:
    return 1 << max(0, size - 1).bit_length()
