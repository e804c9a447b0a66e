"""Predicted beside measured, on the card that is here.

    python benchmarks/gpu.py                # every configuration, each in a process of its own
    python benchmarks/gpu.py --predict-only --gpu rtx-4070-ti   # what it would compare, anywhere

Random weights of the sizes of GPT-2 are written to a temporary directory, since memory does not
depend on their values. For each configuration real steps are simulated for this card and then run
on it; the table has what the allocator reserved and allocated at most, and the error of the
prediction. Exit code 1 if an error is above 1 %. Configurations that the prediction says do not
fit are left out.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

from lowvram.measurement import measure
from lowvram.memory import Card
from lowvram.memory.measure import format_gib
from lowvram.model import known_config
from lowvram.prediction import Predict, predictor
from lowvram.recipe import Recipe, load_recipe
from lowvram.rehearsal import BatchShape
from lowvram.target import card_here, named_card

ALLOWED = 0.01


@dataclass(frozen=True, kw_only=True)
class Case:
    recipe: str
    model: str
    rows: int
    tokens: int
    checkpointing: bool = False
    changes: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        changes = "".join(f", {key}={value}" for key, value in self.changes)
        on = ", checkpointing" if self.checkpointing else ""
        return f"{self.recipe}, {self.model}, {self.rows} x {self.tokens}{on}{changes}"

    @property
    def shape(self) -> BatchShape:
        return BatchShape(
            micro_batch_size=self.rows,
            seq_len=self.tokens,
            gradient_checkpointing=self.checkpointing,
        )


CASES = (
    *(
        Case(recipe=recipe, model="gpt2", rows=rows, tokens=tokens, checkpointing=checkpointing)
        for recipe in ("gpt2-lora", "gpt2-full")
        for rows, tokens in ((8, 256), (4, 1024), (16, 1024))
        for checkpointing in (False, True)
    ),
    *(
        Case(recipe="gpt2-lora", model="gpt2", rows=8, tokens=1024, changes=(change,))
        for change in (
            ("train.precision", "fp32"),
            ("train.precision", "fp16"),
            ("train.chunked_loss", False),
            ("model.fused_gelu", False),
            ("model.attention", "eager"),
            ("model.dtype", "int8"),
            ("model.dtype", "nf4"),
            ("method.name", "dora"),
            ("method.dropout", 0.1),
            ("data.packing", False),
        )
    ),
    *(
        Case(recipe="gpt2-full", model="gpt2", rows=8, tokens=512, changes=(change,))
        for change in (
            ("train.optimizer", "adamw"),
            ("train.optimizer", "lion8bit"),
            ("train.optimizer", "adafactor"),
            ("train.optimizer", "sgd"),
            ("train.optimizer", "paged_adamw8bit"),
        )
    ),
    Case(recipe="gpt2-medium-lora", model="gpt2-medium", rows=8, tokens=1024),
    Case(recipe="gpt2-xl-nf4-lora", model="gpt2-xl", rows=4, tokens=1024, checkpointing=True),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--predict-only", action="store_true")
    parser.add_argument("--gpu", help="with --predict-only: a card that is not here")
    arguments = parser.parse_args()
    card = named_card(arguments.gpu, None) if arguments.gpu else card_here()
    if card is None or (arguments.gpu and not arguments.predict_only):
        sys.exit("no card here: add --predict-only --gpu NAME")
    with tempfile.TemporaryDirectory() as directory, predictor(card) as predict:
        sys.exit(compare(card, predict, Path(directory), only=arguments.predict_only))


def compare(card: Card, predict: Predict, directory: Path, *, only: bool) -> int:
    print(f"{card.name}, {format_gib(card.budget())} for the allocator\n")
    print(
        "| configuration | predicted reserved | measured | error | allocated | measured | error |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|")
    worst = 0.0
    for case in CASES:
        recipe = recipe_of(case, directory, weights=not only)
        prediction = predict(recipe, case.shape)
        if not prediction.fits:
            continue
        reserved, allocated = prediction.reserved_bytes, prediction.allocated_bytes
        if only:
            print(f"| {case} | {format_gib(reserved)} | | | {format_gib(allocated)} | | |")
            continue
        found = measure(recipe, case.shape)
        errors = (
            reserved / max(1, found.reserved_bytes) - 1,
            allocated / max(1, found.allocated_bytes) - 1,
        )
        worst = max(worst, abs(errors[0]))
        print(
            f"| {case} | {format_gib(reserved)} | {format_gib(found.reserved_bytes)} | "
            f"{errors[0]:+.2%} | {format_gib(allocated)} | {format_gib(found.allocated_bytes)} | "
            f"{errors[1]:+.2%} |",
            flush=True,
        )
    if not only:
        print(f"\nlargest error of what is reserved: {worst:.2%}, allowed {ALLOWED:.0%}")
    return int(worst > ALLOWED)


def recipe_of(case: Case, directory: Path, *, weights: bool) -> Recipe:
    """With a directory of random weights in place of the model's name."""
    name = case.model
    if weights:
        path = directory / case.model
        if not path.exists():
            AutoModelForCausalLM.from_config(known_config(case.model)).save_pretrained(path)
        name = str(path)
    return load_recipe(case.recipe, {"model.name": name, **dict(case.changes)})


if __name__ == "__main__":
    main()
