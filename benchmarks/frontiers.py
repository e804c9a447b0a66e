"""The frontier of GPT-2 small to XL on one card, with LoRA and in full: the README's table.

    python benchmarks/frontiers.py --gpu rtx-4070-ti

Everything is simulated, from the sizes of the models alone; it needs no card and no weights. The
recipes are `gpt2-lora` and `gpt2-full` as they ship, in bf16, with another model's name. A cell is
the largest micro-batch that fits, without / with gradient checkpointing; a dash: not even one row.
"""

from __future__ import annotations

import argparse
import time

from lowvram.frontier import frontier
from lowvram.memory.measure import format_gib
from lowvram.prediction import Prediction, predictor
from lowvram.recipe import load_recipe
from lowvram.target import named_card

MODELS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
RECIPES = ("gpt2-lora", "gpt2-full")
LENGTHS = (256, 512, 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gpu", default="rtx-4070-ti")
    parser.add_argument("--models", nargs="+", default=MODELS)
    arguments = parser.parse_args()
    card = named_card(arguments.gpu, None)
    assert card is not None
    print(f"{card.name}, {format_gib(card.budget())} for the allocator, simulated\n")
    print("| recipe | model | " + " | ".join(f"{n} tokens" for n in LENGTHS) + " |")
    print("|---|---|" + "---:|" * len(LENGTHS))
    started = time.monotonic()
    with predictor(card) as predict:
        for name in RECIPES:
            for model in arguments.models:
                recipe = load_recipe(name, {"model.name": model, "train.precision": "bf16"})
                rows = frontier(recipe, predict, LENGTHS)
                print(f"| {name} | {model} | {' | '.join(cells(rows))} |", flush=True)
    print(f"\n{time.monotonic() - started:.0f} s")


def cells(rows: list[Prediction]) -> list[str]:
    """One a length: "37 / 172"."""
    found = {(row.shape.seq_len, row.shape.gradient_checkpointing): row for row in rows}
    return [
        " / ".join(
            str(row.shape.micro_batch_size) if row.fits else "-"
            for row in (found[length, False], found[length, True])
        )
        for length in LENGTHS
    ]


if __name__ == "__main__":
    main()
