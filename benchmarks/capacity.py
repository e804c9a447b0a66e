"""How many rows of 1,024 tokens a card takes at a time: this package and what else there is.

    python benchmarks/capacity.py --make-venv --plot capacity.png

Everything is simulated with the same simulator, so no card is needed: `Trainer.train` of
transformers with peft's adapter, `SFTTrainer.train` of TRL, and what `lowvram run` would do. Same
model, same adapter, same dropout, bf16 autocast; a cell is the largest number of rows that fits,
without / with recomputation of all blocks, and one row more does not. Exit code 1 if this package
takes fewer rows of GPT-2 small than it is asked to.

A second table has the largest models that train on the card at all, each a recipe that ships.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from arena import PEERS, make_venv, peer_directory
from memory_accuracy import venv_python
from peers import SIMULATED, Failed, Peer, Setup

from lowvram.errors import DoesNotFit
from lowvram.fit import fit
from lowvram.frontier import largest
from lowvram.memory import Card
from lowvram.memory.measure import format_gib
from lowvram.model import context_length, known_config
from lowvram.prediction import Predict, Prediction, predictor
from lowvram.recipe import Recipe, list_recipes, load_recipe
from lowvram.rehearsal import BatchShape
from lowvram.target import named_card

MODELS = {
    "gpt2": "GPT-2 small (124M)",
    "gpt2-medium": "GPT-2 medium (355M)",
    "gpt2-large": "GPT-2 large (774M)",
    "gpt2-xl": "GPT-2 XL (1.5B)",
}
TOKENS = 1024
RECIPES = ("gpt2-xl-lora", "gpt2-large-full", "gpt2-xl-full", "llama-3b-nf4-lora")
ASKED = {"rtx-4070-ti": {"gpt2": (36, 160)}}
"""Rows of this package, by card and model, without and with recomputation."""

Base = Literal["fp32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class Contestant:
    tool: Literal["trainer", "trl", "lowvram"]
    base: Base
    """Of the frozen weights; all compute in bf16."""

    @property
    def label(self) -> str:
        return f"{NAMES[self.tool]}, base in {self.base}"


NAMES = {
    "trainer": "transformers Trainer + peft",
    "trl": "TRL SFTTrainer",
    "lowvram": "lowvram",
}
CONTESTANTS = (
    Contestant(tool="trainer", base="fp32"),
    Contestant(tool="trainer", base="bf16"),
    Contestant(tool="trl", base="fp32"),
    Contestant(tool="trl", base="bf16"),
    Contestant(tool="lowvram", base="fp32"),
    Contestant(tool="lowvram", base="bf16"),
)

REMARKS = """\
Not equal: the base is in fp32, as both peers load it by default, or in bf16, as the recipe of this
package has it. Each has its own optimizer: AdamW there, with states in 8 bits here, at most 2.25
MiB for GPT-2 small. This package's rows hold two documents each that do not see each other, and its
peak is that of a whole run, with an evaluation before and after; the peers' rows are one document
each, and only training counts. TRL's step also computes the entropy and the accuracy of its
metrics.

Where it goes: at its peak, in the backward pass of the model's own loss, the Trainer has three fp32
tensors of all logits. Both peers keep what GPT-2's GELU, written out, computes in fp32: for each
block more than three tensors of four times the width."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """The largest number of rows, and what it takes; 0 rows: not even one fits."""

    model: str
    contestant: Contestant
    checkpointing: bool
    rows: int
    reserved_bytes: int
    """For 0 rows: what one would take."""


# --- searching ------------------------------------------------------------------------------------


def our_recipe(model: str, base: Base) -> Recipe:
    changes = {"model.name": model, "model.dtype": base, "train.precision": "bf16"}
    return load_recipe("gpt2-lora", changes)


def peer_predict(peer: Peer, setup: Callable[[BatchShape], Setup], card: Card) -> Predict:
    """A tool's step in place of a recipe's, for the same search."""

    def predict(_: Recipe, shape: BatchShape) -> Prediction:
        found = peer.ask(setup(shape), card)
        return Prediction(
            shape=shape,
            fits=found.fits,
            reserved_bytes=found.reserved_bytes,
            allocated_bytes=found.allocated_bytes,
            budget_bytes=card.budget(),
            categories={},
        )

    return predict


def setup_of(contestant: Contestant, model: str, recipe: Recipe) -> Callable[[BatchShape], Setup]:
    """The adapter of the recipe, and the model's configuration with its dropout."""
    config = known_config(model)
    targets = recipe.method.target_modules
    assert contestant.tool != "lowvram"
    assert not isinstance(targets, str)
    tool = contestant.tool
    return lambda shape: Setup(
        tool=tool,
        config={"model_type": config.model_type, **config.to_diff_dict()},
        rows=shape.micro_batch_size,
        tokens=shape.seq_len,
        checkpointing=bool(shape.gradient_checkpointing),
        base=contestant.base,
        rank=recipe.method.rank,
        alpha=recipe.method.alpha,
        targets=targets,
    )


def search(
    contestant: Contestant, model: str, card: Card, ours: Predict, peers: dict[str, Peer]
) -> list[Cell]:
    """Without and with recomputation."""
    recipe = our_recipe(model, contestant.base)
    predict = ours
    if contestant.tool != "lowvram":
        setup = setup_of(contestant, model, recipe)
        predict = peer_predict(peers[contestant.tool], setup, card)
    cells = []
    for checkpointing in (False, True):
        found = largest(recipe, predict, TOKENS, checkpointing)
        cells.append(
            Cell(
                model=model,
                contestant=contestant,
                checkpointing=checkpointing,
                rows=found.shape.micro_batch_size if found.fits else 0,
                reserved_bytes=found.reserved_bytes,
            )
        )
    return cells


# --- what ships -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Shipped:
    """A recipe that ships, and the shape that a run would take on the card."""

    recipe: str
    model: str
    rows: int
    tokens: int
    checkpointing: Any
    reserved_bytes: int
    problem: str = ""


def shipped(name: str, predict: Predict) -> Shipped:
    recipe = load_recipe(name)
    positions = context_length(known_config(recipe.model.name))
    try:
        chosen = fit(recipe, context_length=positions, longest_document=positions, predict=predict)
    except DoesNotFit as error:
        return Shipped(
            recipe=name,
            model=recipe.model.name,
            rows=0,
            tokens=0,
            checkpointing=None,
            reserved_bytes=0,
            problem=str(error),
        )
    return Shipped(
        recipe=name,
        model=recipe.model.name,
        rows=chosen.micro_batch_size,
        tokens=chosen.max_seq_len,
        checkpointing=chosen.gradient_checkpointing,
        reserved_bytes=chosen.predicted_reserved_bytes or 0,
    )


# --- printing -------------------------------------------------------------------------------------


def table(cells: Sequence[Cell]) -> str:
    """Markdown: a line a contestant, a column a model, "37 / 176"."""
    models = list(dict.fromkeys(cell.model for cell in cells))
    contestants = list(dict.fromkeys(cell.contestant for cell in cells))
    rows = {(cell.contestant, cell.model, cell.checkpointing): cell.rows for cell in cells}
    lines = [
        "| rows of 1,024 tokens, without / with recomputation | "
        + " | ".join(MODELS.get(model, model) for model in models)
        + " |",
        "|---|" + "--:|" * len(models),
    ]
    for contestant in contestants:
        texts = [
            f"{rows[contestant, model, False]} / {rows[contestant, model, True]}"
            if (contestant, model, False) in rows
            else ""
            for model in models
        ]
        lines.append(f"| {contestant.label} | {' | '.join(texts)} |")
    return "\n".join(lines)


def shipped_table(found: Sequence[Shipped]) -> str:
    lines = ["| recipe | model | rows | tokens | recomputed | peak |", "|---|---|--:|--:|---|--:|"]
    for one in found:
        known = f"| `{one.recipe}` | {one.model} |"
        if one.problem:
            lines.append(f"{known} | | | does not fit |")
            continue
        words = {False: "nothing", True: "every block"}
        recomputed = words.get(one.checkpointing, str(one.checkpointing))
        if isinstance(one.checkpointing, int) and not isinstance(one.checkpointing, bool):
            recomputed = f"{one.checkpointing} blocks"
        lines.append(
            f"{known} {one.rows} | {one.tokens:,} | {recomputed} | "
            f"{format_gib(one.reserved_bytes)} |"
        )
    return "\n".join(lines)


def verdict(card: Card, cells: Sequence[Cell]) -> list[str]:
    """What this package, as it ships, does not reach of what is asked of it."""
    missed = []
    for cell in cells:
        asked = ASKED.get(card.slug, {}).get(cell.model)
        if asked is None or cell.contestant != Contestant(tool="lowvram", base="bf16"):
            continue
        wanted = asked[cell.checkpointing]
        if cell.rows < wanted:
            on = "with" if cell.checkpointing else "without"
            missed.append(f"{cell.model} {on} recomputation: {cell.rows} rows, asked {wanted}")
    return missed


def plot(cells: Sequence[Cell], card: Card, path: Path) -> None:
    """Bars, a panel a model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = list(dict.fromkeys(cell.model for cell in cells))
    contestants = list(dict.fromkeys(cell.contestant for cell in cells))[::-1]
    figure, axes = pyplot.subplots(
        1, len(models), figsize=(max(7.5, 2.5 + 3 * len(models)), 3.6), squeeze=False, sharey=True
    )
    rows = {(cell.contestant, cell.model, cell.checkpointing): cell.rows for cell in cells}
    for axis, model in zip(axes[0], models, strict=True):
        for checkpointing, color in ((True, "tab:blue"), (False, "tab:orange")):
            shift = -0.2 if checkpointing else 0.2
            values = [rows.get((one, model, checkpointing), 0) for one in contestants]
            places = [place + shift for place in range(len(contestants))]
            name = f"{'with' if checkpointing else 'without'} recomputation"
            bars = axis.barh(places, values, height=0.38, color=color, label=name)
            axis.bar_label(bars, padding=2, fontsize=8)
        axis.set_title(MODELS.get(model, model), fontsize=10)
        axis.margins(x=0.18)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_yticks(range(len(contestants)), [one.label for one in contestants], fontsize=8)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="lower center", ncols=2, frameon=False)
    figure.suptitle(
        f"Most rows of 1,024 tokens on an {card.name}, LoRA, bf16 (simulated)", fontsize=11
    )
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


# --- running --------------------------------------------------------------------------------------


def trl_python(given: Path | None, make: bool) -> Path | None:
    """A Python with TRL: given, made before, or made now if asked for."""
    if given is not None:
        return given
    peer = next(peer for peer in PEERS if peer.name == "trl")
    directory = peer_directory(peer)
    if make:
        make_venv(peer, directory)
    python = venv_python(directory)
    return python if python.exists() else None


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def search_all(
    contestants: Sequence[Contestant], models: Sequence[str], card: Card, peers: dict[str, Peer]
) -> list[Cell]:
    cells: list[Cell] = []
    with predictor(card) as ours:
        for model in models:
            for contestant in contestants:
                try:
                    found = search(contestant, model, card, ours, peers)
                except Failed as error:
                    say(f"{model}, {contestant.label}: failed: {error}")
                    continue
                cells += found
                say(f"{model}, {contestant.label}: " + " / ".join(str(c.rows) for c in found))
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gpu", default="rtx-4070-ti")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--recipes", nargs="*", default=RECIPES, help="of the second table")
    parser.add_argument("--trl-python", type=Path, help="a Python with TRL and peft")
    parser.add_argument("--make-venv", action="store_true", help="make one, once")
    parser.add_argument("--plot", type=Path, help="write a bar chart to this file")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    arguments = parser.parse_args()
    card = named_card(arguments.gpu, None)
    assert card is not None
    python = trl_python(arguments.trl_python, arguments.make_venv)
    if python is None:
        say("TRL is left out: give a Python that has it with --trl-python, or --make-venv once")
    contestants = [one for one in CONTESTANTS if one.tool != "trl" or python is not None]
    with ExitStack() as stack:
        peers = {"trainer": stack.enter_context(Peer(Path(sys.executable), SIMULATED))}
        if python is not None:
            peers["trl"] = stack.enter_context(Peer(python, SIMULATED))
        cells = search_all(contestants, arguments.models, card, peers)
    ships = {name for name, _ in list_recipes()}
    for name in set(arguments.recipes) - ships:
        say(f"{name} is left out: there is no such recipe")
    with predictor(card) as predict:
        largest_models = [shipped(name, predict) for name in arguments.recipes if name in ships]
    report(arguments, card, cells, largest_models)
    missed = verdict(card, cells)
    for line in missed:
        say(f"not met: {line}")
    sys.exit(1 if missed else 0)


def report(
    arguments: argparse.Namespace, card: Card, cells: list[Cell], largest_models: list[Shipped]
) -> None:
    names = ("torch", "transformers", "peft", "bitsandbytes")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    print(f"{card.name}, {format_gib(card.budget())} for the allocator, simulated; {versions}\n")
    print(table(cells))
    print(f"\n{REMARKS}\n")
    print(shipped_table(largest_models))
    if arguments.json:
        found = {
            "card": card.slug,
            "budget_bytes": card.budget(),
            "versions": {name: version(name) for name in names},
            "cells": [asdict(cell) for cell in cells],
            "recipes": [asdict(one) for one in largest_models],
        }
        arguments.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if arguments.plot:
        plot(cells, card, arguments.plot)


if __name__ == "__main__":
    main()
