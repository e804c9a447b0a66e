"""What each lever on memory saves and costs: bytes simulated for a card, time measured here.

    python benchmarks/levers.py --plot levers.png

Bytes: GPT-2 small, LoRA and full, 8 rows of 1,024 tokens, bf16: the peak that the caching
allocator reserves on a simulated RTX 4070 Ti. Time: steps with a lever alternate with steps
without it, in one process; medians are compared, and the spread is that of all steps with the
lever over the median without it. On a card that is GPT-2 small in bf16, 8 x 1,024 tokens.
On a CPU it is a model of the same width with a third of the blocks and of the vocabulary, in fp32,
with torch's attention and transformers' blocks as on a card; what counts are the seconds of the
processor, which other programs disturb less than those of the clock. A dash: a CPU does nothing
else with that lever, or nothing that can be compared. Where the kernels of a card are others (a
quantised base, layer norms, an optimizer in 8 bits), a CPU's time is no more than that.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, set_seed
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

from lowvram.build import choose_numerics
from lowvram.frozen_block import FrozenBlock
from lowvram.memory.measure import format_gib
from lowvram.prediction import Predict, predictor
from lowvram.recipe import Recipe, load_recipe, with_overrides
from lowvram.rehearsal import BatchShape, Rehearsal, pinned, rehearse
from lowvram.target import named_card
from lowvram.train import train_step

ROWS, TOKENS, BLOCKS = 8, 1024, 12
CPU_ROWS, CPU_TOKENS, CPU_BLOCKS = 2, 256, 4
PLAIN = {
    "train.global_batch_size": ROWS,
    "train.precision": "bf16",
    "fit.gradient_checkpointing": False,
    "fit.micro_batch_size": "auto",
    "fit.max_seq_len": "auto",
}
CHECKPOINTING = "fit.gradient_checkpointing"
METHODS = {"LoRA": "gpt2-lora", "full": "gpt2-full"}


@dataclass(frozen=True, kw_only=True)
class Lever:
    """A change of a recipe. A number of blocks is given as a share of them."""

    changes: dict[str, Any]
    methods: tuple[str, ...] = ("LoRA", "full")
    on_cpu: bool = True
    """Whether a CPU does something else with it than without, in the same precision."""

    def overrides(self, blocks: int) -> dict[str, Any]:
        return {
            key: max(1, round(value * blocks)) if isinstance(value, float) else value
            for key, value in self.changes.items()
        }

    def name(self, blocks: int) -> str:
        shown = {True: "true", False: "false", None: "null"}
        return ", ".join(
            f"{key}={shown[value] if isinstance(value, bool) or value is None else value}"
            for key, value in self.overrides(blocks).items()
        )


LEVERS = (
    Lever(changes={CHECKPOINTING: 0.25}),
    Lever(changes={CHECKPOINTING: 0.5}),
    Lever(changes={CHECKPOINTING: True}),
    Lever(changes={CHECKPOINTING: "selective"}),
    Lever(changes={CHECKPOINTING: "offload"}, on_cpu=False),
    Lever(changes={"train.chunked_loss": False}),
    Lever(changes={"model.fused_gelu": False}),
    Lever(changes={"model.attention": "eager"}),
    Lever(changes={"model.attention": "sdpa"}, on_cpu=False),
    Lever(changes={"model.lean_norms": False}, on_cpu=False),
    Lever(changes={"model.dtype": "fp32"}, methods=("LoRA",), on_cpu=False),
    Lever(changes={"model.dtype": "int8"}, methods=("LoRA",)),
    Lever(changes={"model.dtype": "nf4"}, methods=("LoRA",)),
    Lever(changes={"model.dtype": "bf16"}, methods=("full",), on_cpu=False),
    Lever(changes={"method.folded": False}, methods=("LoRA",)),
    *(
        Lever(changes={"train.optimizer": name}, methods=("full",))
        for name in ("adamw", "adafactor", "sgd")
    ),
    Lever(changes={"train.optimizer": "paged_adamw8bit"}, methods=("full",), on_cpu=False),
    Lever(changes={"train.fused_backward": True, "train.max_grad_norm": None}, methods=("full",)),
)


@dataclass(frozen=True, kw_only=True)
class Figures:
    method: str
    lever: str
    reserved_bytes: int
    saved_bytes: int
    time: float | None = None
    """A multiple of that of the plain step."""
    spread: tuple[float, float] = (0.0, 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gpu", default="rtx-4070-ti", help="card to simulate")
    parser.add_argument("--repetitions", type=int, default=5, help="0 measures no time")
    parser.add_argument("--only", help="levers whose name has this in it")
    parser.add_argument("--plot", type=Path, help="picture to write; needs lowvram[plot]")
    arguments = parser.parse_args()
    card = named_card(arguments.gpu, None)
    assert card is not None
    on_card = torch.cuda.is_available()
    where = torch.cuda.get_device_name() if on_card else f"{platform.processor() or 'a CPU'}"
    print(f"Bytes: {card.name}, simulated. Time: {where}, torch {torch.__version__}.\n")
    found = []
    with predictor(card) as predict, tempfile.TemporaryDirectory() as directory:
        for method in METHODS:
            print(
                "| method | lever | reserved | saves | time | spread |\n|---|---|--:|--:|--:|--:|"
            )
            timer = Timer(method, Path(directory) / method, arguments.repetitions)
            for figures in rows_of(method, predict, timer, arguments.only or ""):
                found.append(figures)
                print(line(figures), flush=True)
            print()
    if arguments.plot is not None:
        draw(found, arguments.plot, card.name, where)
        print(f"wrote {arguments.plot}")


def rows_of(method: str, predict: Predict, timer: Timer, only: str) -> Iterator[Figures]:
    recipe = load_recipe(METHODS[method], {"model.name": "gpt2", **PLAIN})
    plain = reserved(recipe, predict)
    yield Figures(method=method, lever="none", reserved_bytes=plain, saved_bytes=0, time=1.0)
    for lever in LEVERS:
        if method not in lever.methods or only not in lever.name(BLOCKS):
            continue
        size = reserved(with_overrides(recipe, lever.overrides(BLOCKS)), predict)
        measured = timer(lever)
        yield Figures(
            method=method,
            lever=lever.name(BLOCKS),
            reserved_bytes=size,
            saved_bytes=plain - size,
            time=measured[0] if measured else None,
            spread=measured[1:] if measured else (0.0, 0.0),
        )


def reserved(recipe: Recipe, predict: Predict) -> int:
    """At the peak, in bytes; with no more than the card has, or as if it had enough."""
    kind = recipe.fit.gradient_checkpointing
    assert kind != "auto"
    shape = BatchShape(micro_batch_size=ROWS, seq_len=TOKENS, gradient_checkpointing=kind)
    return predict(recipe, shape).reserved_bytes


class Timer:
    """Compares steps with a lever to steps without it."""

    def __init__(self, method: str, directory: Path, repetitions: int) -> None:
        self.repetitions = repetitions
        self.on_card = torch.cuda.is_available()
        self.rows, self.tokens, self.blocks = (
            (ROWS, TOKENS, BLOCKS) if self.on_card else (CPU_ROWS, CPU_TOKENS, CPU_BLOCKS)
        )
        set_seed(0)
        vocabulary = GPT2Config().vocab_size * self.blocks // BLOCKS
        config = GPT2Config(
            n_layer=self.blocks, vocab_size=vocabulary, bos_token_id=0, eos_token_id=0
        )
        GPT2LMHeadModel(config).save_pretrained(directory)
        changes = {
            **PLAIN,
            "model.name": str(directory),
            "train.global_batch_size": self.rows,
            "train.precision": "bf16" if self.on_card else "fp32",
        }
        if not self.on_card:
            changes["model.attention"] = "sdpa"
        self.recipe = load_recipe(METHODS[method], changes)

    def __call__(self, lever: Lever) -> tuple[float, float, float] | None:
        """The median, the fastest and the slowest step with the lever, over the median without."""
        if not self.repetitions or not (self.on_card or lever.on_cpu):
            return None
        changed = with_overrides(self.recipe, lever.overrides(self.blocks))
        plain, other = self.rehearsal(self.recipe), self.rehearsal(changed)
        times: tuple[list[float], list[float]] = ([], [])
        for repetition in range(self.repetitions + 1):
            for rehearsed, seconds in zip((plain, other), times, strict=True):
                taken = self.seconds(lambda rehearsed=rehearsed: self.step(rehearsed))
                if repetition:  # the first makes the optimizer's states
                    seconds.append(taken)
        plain_time = statistics.median(times[0])
        found = (statistics.median(times[1]), min(times[1]), max(times[1]))
        return found[0] / plain_time, found[1] / plain_time, found[2] / plain_time

    def rehearsal(self, recipe: Recipe) -> Rehearsal:
        kind = recipe.fit.gradient_checkpointing
        assert kind != "auto"
        shape = BatchShape(
            micro_batch_size=self.rows, seq_len=self.tokens, gradient_checkpointing=kind
        )
        recipe = pinned(recipe, shape)
        rehearsed = rehearse(recipe, choose_numerics(recipe))
        for module in rehearsed.state.model.modules():
            if type(module) is FrozenBlock:
                module.__class__ = GPT2Block  # which a card computes with
        return rehearsed

    def step(self, rehearsed: Rehearsal) -> None:
        train_step(rehearsed.state, rehearsed.window)
        if self.on_card:
            torch.cuda.synchronize()

    def seconds(self, step: Callable[[], None]) -> float:
        clock = time.perf_counter if self.on_card else time.process_time
        started = clock()
        step()
        return clock() - started


def line(figures: Figures) -> str:
    low, high = figures.spread
    cells = [
        figures.method,
        f"`{figures.lever}`",
        format_gib(figures.reserved_bytes),
        f"{figures.saved_bytes / 2**20:,.0f} MiB",
        "-" if figures.time is None else f"{figures.time:.2f}",
        f"{low:.2f} to {high:.2f}" if high else "-",
    ]
    return f"| {' | '.join(cells)} |"


def draw(found: Sequence[Figures], path: Path, card: str, where: str) -> None:
    """For each method a row of two charts: what a lever saves, and what it costs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        len(METHODS), 2, figsize=(11, 9), layout="constrained", sharex="col", sharey="row"
    )
    for method, (saved, cost) in zip(METHODS, axes, strict=True):
        rows = [one for one in reversed(found) if one.method == method and one.saved_bytes]
        names = [one.lever for one in rows]
        saved.barh(names, [one.saved_bytes / 2**30 for one in rows], color="tab:blue")
        timed = [one for one in rows if one.time is not None]
        lows, highs = ([one.spread[end] for one in timed] for end in (0, 1))
        cost.hlines([one.lever for one in timed], lows, highs, color="tab:gray")
        cost.plot(
            [one.time for one in timed], [one.lever for one in timed], "o", color="tab:orange"
        )
        for axis in (saved, cost):
            axis.spines[["top", "right"]].set_visible(False)
        saved.axvline(0.0, color="black", linewidth=0.8)
        cost.axvline(1.0, color="black", linewidth=0.8)
        saved.set_title(method, loc="left")
    axes[-1][0].set_xlabel(f"GiB saved at the peak ({card}, simulated)")
    axes[-1][1].set_xlabel(f"time of a step, as a multiple ({where}); median and spread")
    figure.suptitle(f"Levers on memory, GPT-2 small, {ROWS} x {TOKENS:,} tokens")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
