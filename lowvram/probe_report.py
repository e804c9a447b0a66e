"""What `lowvram probe` prints, draws and writes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lowvram.checkpointing import in_words
from lowvram.disk import replace_text
from lowvram.display import Display, format_seconds, literal
from lowvram.errors import DeviceError, RecipeError
from lowvram.fit import with_shape
from lowvram.measurement import Measure, Measurement, measure
from lowvram.memory import Card
from lowvram.memory.cards import System
from lowvram.memory.measure import format_gib
from lowvram.prediction import plot as plot_shape
from lowvram.probe import Answer, Frontier, ask, epoch_seconds, probe
from lowvram.recipe import Recipe, dump_recipe
from lowvram.target import card_here, named_card

Target = tuple[Card, Measure | None]


def choose_target(gpu: str | None, vram: str | None, system: System) -> Target:
    """The card, and how to measure on it if it is here."""
    card = named_card(gpu, vram, system)
    if card is not None:
        return card, None
    card = card_here()
    if card is None:
        raise DeviceError(
            "probe: there is no card in this machine; name one with --gpu rtx-4070-ti, or give its "
            "memory with --vram 12GiB"
        )
    return card, measure


def show_frontier(
    recipe: Recipe, target: Target, *, as_json: bool, plot: Path | None, save: Path | None
) -> None:
    card, measuring = target
    display = Display(Console(stderr=True), quiet=as_json or not sys.stderr.isatty())
    with display.progress("simulating") as update:
        found = probe(recipe, card, measure=measuring, progress=update)
    if plot is not None:
        from lowvram.memory.plot import plot_frontier

        values = found.to_json()
        plot_frontier(
            values["frontier"],
            plot,
            budget_bytes=values["budget_bytes"],
            chosen=values["chosen"],
            card=found.card.name,
        )
    if save is not None:
        _save(recipe, found, save)
    if as_json:
        print(json.dumps(found.to_json()))
        return
    display = Display()
    display.show(frontier_table(found))
    display.say(frontier_text(found))
    measured = found.chosen.measurement if found.chosen else None
    seconds = epoch_seconds(recipe, measured) if measured else None
    if seconds is not None:
        display.say(f"an epoch of its data takes about {format_seconds(seconds)}")
    for written in (plot, save):
        if written is not None:
            display.say(f"wrote {written}")


def _save(recipe: Recipe, found: Frontier, path: Path) -> None:
    if found.chosen is None:
        raise RecipeError(f"--save-recipe: nothing to save: {found.reason}")
    try:
        replace_text(path, dump_recipe(with_shape(recipe, found.chosen)))
    except OSError as error:
        raise RecipeError(
            f"--save-recipe {path}: cannot be written: {error.strerror}; name a file in a "
            "directory that exists"
        ) from error


def show_shape(
    recipe: Recipe,
    target: Target,
    *,
    seq_len: int | None,
    micro_batch_size: int | None,
    as_json: bool,
    plot: Path | None,
) -> None:
    card, measuring = target
    answer = ask(
        recipe, card, seq_len=seq_len, micro_batch_size=micro_batch_size, measure=measuring
    )
    if plot is not None:
        plot_shape(answer.card, recipe, answer.prediction.shape, plot)
    if as_json:
        print(json.dumps(answer.to_json()))
        return
    display = Display()
    display.say(answer_text(answer))
    for table in answer_tables(answer):
        display.show(table)
    if plot is not None:
        display.say(f"wrote {plot}")


def frontier_table(found: Frontier) -> Table:
    budget = format_gib(found.card.budget())
    title = literal(f"{found.card.name}: {budget} for the allocator, simulated")
    table = Table(title=title, title_justify="left")
    for name in ("tokens", "checkpointing", "micro-batch", "reserved peak", "head-room"):
        table.add_column(name, justify="right")
    for row in found.rows:
        shape = row.shape
        table.add_row(
            str(shape.seq_len),
            "on" if shape.gradient_checkpointing else "off",
            str(shape.micro_batch_size) if row.fits else "does not fit",
            format_gib(row.reserved_bytes),
            format_gib(row.headroom_bytes),
        )
    return table


def frontier_text(found: Frontier) -> str:
    """The recommendation, in a line or two."""
    longer = ""
    if found.context_length > max(row.shape.seq_len for row in found.rows):
        longer = f"\nlonger rows, of up to {found.context_length:,} tokens: ask with --seq-len"
    chosen = found.chosen
    if chosen is None:
        return f"no shape for this recipe: {found.reason}{longer}"
    text = (
        f"recommended: {chosen.gradient_accumulation_steps} x {chosen.micro_batch_size} rows of "
        f"{chosen.max_seq_len} tokens, "
        f"{in_words(chosen.gradient_checkpointing, chosen.blocks)} ({chosen.reason}): "
        f"{found.reason}"
    )
    if chosen.measurement is not None:
        text += "\n" + _measured_text(chosen.measurement)
    return text + longer


def answer_text(answer: Answer) -> str:
    shape, prediction = answer.prediction.shape, answer.prediction
    verdict = "fits" if answer.fits else "does not fit"
    spare = prediction.headroom_bytes
    room = f"{format_gib(spare)} to spare" if spare >= 0 else f"{format_gib(-spare)} too much"
    text = (
        f"{shape.micro_batch_size} x {shape.seq_len} tokens, "
        f"{in_words(shape.gradient_checkpointing, answer.blocks)}, on {answer.card.name}: "
        f"{verdict}. "
        f"Predicted peak {format_gib(prediction.reserved_bytes)} of "
        f"{format_gib(prediction.budget_bytes)}, {room}"
    )
    if answer.measurement is not None:
        text += "\n" + _measured_text(answer.measurement)
    return text if answer.refused is None else f"{text}\nrefused on the card: {answer.refused}"


def _measured_text(measured: Measurement) -> str:
    return (
        f"measured: {format_gib(measured.reserved_bytes)} reserved, "
        f"{format_gib(measured.allocated_bytes)} allocated, {format_gib(measured.driver_bytes)} "
        f"by the driver's account; {measured.tokens_per_second:,.0f} tokens/s"
    )


def answer_tables(answer: Answer) -> list[Table]:
    """What is on the card at the peak, and the levers."""
    peak = Table(title="live at the peak", title_justify="left")
    peak.add_column("what")
    peak.add_column("size", justify="right")
    for name, size in sorted(answer.prediction.categories.items(), key=lambda item: -item[1]):
        if size:
            peak.add_row(literal(name), format_gib(size))
    if not answer.levers:
        return [peak]
    saving = Table(title="what would save memory, each simulated", title_justify="left")
    for name, justify in (("saves", "right"), ("change", "left"), ("price", "left")):
        saving.add_column(name, justify=justify)  # type: ignore[arg-type]
    for lever in answer.levers:
        change, price = literal(lever.change), literal(str(lever.price))
        saving.add_row(format_gib(lever.saved_bytes), change, price)
    return [peak, saving]
