"""What would make a step smaller, each simulated: by how much, and with which key of the recipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lowvram.checkpointing import Checkpointing, block_count
from lowvram.errors import LowVRAMError
from lowvram.model import known_config
from lowvram.prediction import Predict, Prediction
from lowvram.prices import PRICES, Price, of_recomputation
from lowvram.recipe import Recipe, with_overrides
from lowvram.rehearsal import BatchShape


@dataclass(frozen=True, kw_only=True)
class Lever:
    """One change of a recipe, and the step with it."""

    change: str
    """As on the command line: "train.chunked_loss=true"."""
    price: Price
    saved_bytes: int
    prediction: Prediction

    def to_json(self) -> dict[str, Any]:
        return {
            "change": self.change,
            "price": str(self.price),
            "time": self.price.time,
            "saved_bytes": self.saved_bytes,
            "predicted_reserved_bytes": self.prediction.reserved_bytes,
            "fits": self.prediction.fits,
        }


def levers(recipe: Recipe, predict: Predict, now: Prediction) -> list[Lever]:
    """Those that save something, the most first; some fifteen simulations at most."""
    blocks = block_count(known_config(recipe.model.name, recipe.model.revision))
    found = []
    for changes, shape in _changes(recipe, now.shape, blocks):
        try:
            # The shape goes beside the recipe, whose global batch it need not divide.
            others = {key: value for key, value in changes.items() if not key.startswith("fit.")}
            changed = with_overrides(recipe, others)
            prediction = predict(changed, shape)
        except LowVRAMError:
            continue  # not for this recipe: a card without bf16, a layer without int8
        saved = now.reserved_bytes - prediction.reserved_bytes
        if saved > 0:
            texts = [f"{key}={_yaml(value)}" for key, value in changes.items()]
            found.append(
                Lever(
                    change=", ".join(texts),
                    price=_price(texts[0], shape, blocks, recipe.method.name),
                    saved_bytes=saved,
                    prediction=prediction,
                )
            )
    return sorted(found, key=lambda lever: -lever.saved_bytes)


def _price(change: str, shape: BatchShape, blocks: int, method: str) -> Price:
    key, _, _ = change.partition("=")
    if key == _RECOMPUTED:
        return of_recomputation(shape.gradient_checkpointing, blocks, method)
    return PRICES[change] if change in PRICES else PRICES[key]


_RECOMPUTED = "fit.gradient_checkpointing"
_YAML = {True: "true", None: "null"}


def _yaml(value: Any) -> str:
    return _YAML[value] if value is True or value is None else str(value)


Change = tuple[dict[str, Any], BatchShape]


def _changes(recipe: Recipe, shape: BatchShape, blocks: int) -> Iterator[Change]:
    for kind in _less(shape.gradient_checkpointing, blocks):
        yield {_RECOMPUTED: kind}, dataclasses.replace(shape, gradient_checkpointing=kind)
    yield from _of_shape(shape, recipe.train.global_batch_size)
    for changes in _of_recipe(recipe):
        yield changes, shape
    if recipe.method.name == "full" and shape.micro_batch_size >= recipe.train.global_batch_size:
        yield {"train.fused_backward": True, "train.max_grad_norm": None}, shape


def _less(kind: Checkpointing, blocks: int) -> Iterator[Checkpointing]:
    """Ways to recompute that keep less than this one."""
    if kind is False:
        if blocks > 1:
            yield blocks // 2
        yield "selective"
    if kind is not True and kind != "offload":
        yield True
    if kind != "offload":
        yield "offload"


def _of_shape(shape: BatchShape, global_batch_size: int) -> Iterator[Change]:
    if shape.micro_batch_size > 1:
        half = shape.micro_batch_size // 2
        rows = next(rows for rows in range(half, 0, -1) if global_batch_size % rows == 0)
        yield {"fit.micro_batch_size": rows}, dataclasses.replace(shape, micro_batch_size=rows)
    if shape.seq_len > 64:
        length = shape.seq_len // 2
        yield {"fit.max_seq_len": length}, dataclasses.replace(shape, seq_len=length)


def _of_recipe(recipe: Recipe) -> Iterator[dict[str, Any]]:
    for key, on in (
        ("train.chunked_loss", recipe.train.chunked_loss),
        ("model.fused_gelu", recipe.model.fused_gelu),
    ):
        if not on:
            yield {key: True}
    if recipe.model.attention == "eager":
        yield {"model.attention": "sdpa"}
    if recipe.train.precision == "fp32":
        yield {"train.precision": "bf16"}
        yield {"train.precision": "fp16"}
    if recipe.method.name == "full":
        yield {"method.name": "lora"}
        if recipe.model.dtype != "bf16":
            yield {"model.dtype": "bf16"}
    else:
        for dtype in ("bf16", "int8", "nf4"):
            if recipe.model.dtype != dtype:
                yield {"model.dtype": dtype}
    smaller = {"adamw": ["adamw8bit", "paged_adamw8bit"], "adamw8bit": ["paged_adamw8bit"]}
    for optimizer in smaller.get(recipe.train.optimizer, []):
        yield {"train.optimizer": optimizer}
