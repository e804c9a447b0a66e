"""What would make a step smaller, each simulated: by how much, and with which key of the recipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lowvram.errors import LowVRAMError
from lowvram.prediction import Predict, Prediction
from lowvram.recipe import Recipe, with_overrides
from lowvram.rehearsal import BatchShape


@dataclass(frozen=True, kw_only=True)
class Lever:
    """One change of a recipe, and the step with it."""

    change: str
    """As on the command line: "train.chunked_loss=true"."""
    price: str
    """What it costs."""
    saved_bytes: int
    prediction: Prediction

    def to_json(self) -> dict[str, Any]:
        return {
            "change": self.change,
            "price": self.price,
            "saved_bytes": self.saved_bytes,
            "predicted_reserved_bytes": self.prediction.reserved_bytes,
            "fits": self.prediction.fits,
        }


def levers(recipe: Recipe, predict: Predict, now: Prediction) -> list[Lever]:
    """Those that save something, the most first."""
    found = []
    for changes, shape, price in _changes(recipe, now.shape):
        try:
            # The shape goes beside the recipe, whose global batch it need not divide.
            others = {key: value for key, value in changes.items() if not key.startswith("fit.")}
            changed = with_overrides(recipe, others)
            prediction = predict(changed, shape)
        except LowVRAMError:
            continue  # not for this recipe: a card without bf16, a layer without int8
        saved = now.reserved_bytes - prediction.reserved_bytes
        if saved > 0:
            text = ", ".join(f"{key}={_yaml(value)}" for key, value in changes.items())
            found.append(Lever(change=text, price=price, saved_bytes=saved, prediction=prediction))
    return sorted(found, key=lambda lever: -lever.saved_bytes)


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


Change = tuple[dict[str, Any], BatchShape, str]


def _changes(recipe: Recipe, shape: BatchShape) -> Iterator[Change]:
    yield from _of_shape(shape, recipe.train.global_batch_size)
    if not recipe.train.chunked_loss:
        yield {"train.chunked_loss": True}, shape, "nothing: the same loss, without all logits"
    if not recipe.model.fused_gelu:
        yield {"model.fused_gelu": True}, shape, "nothing: the same function in one kernel"
    if recipe.model.attention != "sdpa":
        yield {"model.attention": "sdpa"}, shape, "nothing: the same function in one kernel"
    if recipe.train.precision == "fp32":
        price = "fewer digits in matrix products; much faster"
        yield {"train.precision": "bf16"}, shape, price
        yield {"train.precision": "fp16"}, shape, price + ", with a loss scale"
    if recipe.method.name == "full":
        yield {"method.name": "lora"}, shape, "trains a small part of the weights"
    else:
        for dtype, price in (
            ("bf16", "fewer digits in the frozen weights"),
            ("int8", "rounds the frozen weights; slower"),
            ("nf4", "rounds the frozen weights to 4 bits; slower"),
        ):
            if recipe.model.dtype != dtype:
                yield {"model.dtype": dtype}, shape, price
    if recipe.train.optimizer == "adamw":
        yield {"train.optimizer": "adamw8bit"}, shape, "rounds the optimizer's states"
    if recipe.train.optimizer in ("adamw", "adamw8bit"):
        yield {"train.optimizer": "paged_adamw8bit"}, shape, "states may wait in host memory"


def _of_shape(shape: BatchShape, global_batch_size: int) -> Iterator[Change]:
    if not shape.gradient_checkpointing:
        smaller = dataclasses.replace(shape, gradient_checkpointing=True)
        yield (
            {"fit.gradient_checkpointing": True},
            smaller,
            "a second forward pass: about a third more time",
        )
    if shape.micro_batch_size > 1:
        half = shape.micro_batch_size // 2
        rows = next(rows for rows in range(half, 0, -1) if global_batch_size % rows == 0)
        yield (
            {"fit.micro_batch_size": rows},
            dataclasses.replace(shape, micro_batch_size=rows),
            "more forward passes a step; the same training",
        )
    if shape.seq_len > 64:
        length = shape.seq_len // 2
        yield (
            {"fit.max_seq_len": length},
            dataclasses.replace(shape, seq_len=length),
            "longer documents become several rows",
        )
