"""Pictures: memory over a run by what it is for, and what fits at which length.

As PNG or HTML, whichever the file's name asks for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowvram.memory.canvas import INK, Html, Look, Png, open_canvas
from lowvram.memory.measure import GIB, format_gib
from lowvram.memory.snapshot import step_at, write_whole
from lowvram.memory.timeline import Axis, sections, timeline
from lowvram.memory.trace import Category, MemoryTrace

# The palette of Okabe and Ito, which most colour-blind people can tell apart; from the bottom of
# a picture up, what stays longest first.
COLORS: dict[Category, str] = {
    "base weights": "#0072B2",
    "adapters": "#CC79A7",
    "workspaces": "#999999",
    "optimizer states": "#009E73",
    "gradients": "#D55E00",
    "activations": "#56B4E9",
    "logits and loss": "#E69F00",
    "temporaries": "#F0E442",
}

_BUDGET = "#B00020"
_PHASES = {"build": "#EDEFF2", "forward": "#DCE2E9", "backward": "#C3CCD7", "optimizer": "#A9B5C3"}
_PHASE_NAMES = {
    "build": (),  # is named below, where the steps are
    "forward": ("forward", "fwd"),
    "backward": ("backward", "bwd"),
    "optimizer": ("optimizer", "opt"),
}
_WITHOUT, _WITH = "#0072B2", "#D55E00"  # gradient checkpointing

_TINY = 2**16  # bytes; less is 0.0 MiB


def plot_trace(trace: MemoryTrace, path: Path) -> None:
    """What was live after each event, stacked by category, and what was reserved.

    Raises RecipeError for a name that ends in neither .png nor .html, or where nothing can be
    written, and DeviceError where the library that draws is missing.
    """
    canvas = open_canvas(path, [1.0])
    if not trace.events:
        raise ValueError("nothing was allocated: there is nothing to plot")
    _draw_trace(canvas, trace)
    write_whole(path, canvas.content())


def plot_frontier(
    frontier: Iterable[Any],
    path: Path,
    *,
    budget_bytes: int | None = None,
    chosen: Any = None,
    card: str | None = None,
) -> None:
    """The largest micro-batch by length of the sequences, and the memory that it takes.

    A row of `frontier` is a mapping, or has attributes: seq_len, gradient_checkpointing,
    micro_batch_size (0 where not even one fits), predicted_reserved_bytes and headroom_bytes.
    The first three make a shape; `chosen` is one, and may have the fourth. Without
    `budget_bytes`, the budget is the sum of the last two. Raises as `plot_trace` does.
    """
    canvas = open_canvas(path, [0.65, 0.35])
    rows = [_Row.of(row) for row in frontier]
    if not rows:
        raise ValueError("no rows: there is nothing to plot")
    shape = None if chosen is None else _Row.of(chosen)
    _draw_frontier(canvas, _Frontier(rows, shape, budget_bytes, card))
    write_whole(path, canvas.content())


# The picture of a trace


def _draw_trace(canvas: Png | Html, trace: MemoryTrace) -> None:
    line = timeline(trace)
    axis = Axis(sections(trace))
    x = [*axis.places(line.events), 1.0]
    unit, unit_name = _scale(trace.peak_reserved_bytes)
    peak = line.events.index(trace.peak_event)

    def values(sizes: Sequence[int]) -> list[float]:
        return [size / unit for size in (*sizes, sizes[-1])]  # the last holds to the end

    hover = [
        f"{format_gib(size)} reserved\n{_happened(trace, event)}"
        for size, event in zip(line.reserved, line.events, strict=True)
    ]
    for name, color in COLORS.items():
        sizes = line.by_category[name]
        if any(sizes):
            label = f"{name}, {format_gib(sizes[peak])}" if sizes[peak] >= _TINY else name
            canvas.area(x, values(sizes), label, color, unit_name)
    label = f"reserved, up to {format_gib(trace.peak_reserved_bytes)}"
    look = Look(label=label, color=INK, stepped=True)
    canvas.line(0, x, values(line.reserved), look, hover=[*hover, hover[-1]])
    budget = _visible_budget(trace)
    if budget:
        look = Look(label=f"budget, {format_gib(budget)}", color=_BUDGET, dashed=True)
        canvas.line(0, [0.0, 1.0], [budget / unit] * 2, look)
    _mark_phases(canvas, axis)
    highest = max(trace.peak_reserved_bytes, budget or 0) / unit
    y = trace.peak_allocated_bytes / unit
    above = line.reserved[peak] / unit - y > highest / 8  # there is room below the line
    canvas.note(x[peak], y, _peak_text(trace), to_right=x[peak] < 0.6, above=above)
    canvas.axis_y(0, unit_name, (0.0, 1.08 * highest))
    canvas.finish(_trace_title(trace), _trace_subtitle(trace), "live at the peak")


def _visible_budget(trace: MemoryTrace) -> int | None:
    """None also where it is so far up that it would press all else to the ground."""
    budget = trace.budget_bytes
    return budget if budget and budget <= 2 * trace.peak_reserved_bytes else None


def _mark_phases(canvas: Png | Html, axis: Axis) -> None:
    """Phases in a ribbon below, and steps below these."""
    for left, right, phase in axis.phases():
        text = _fitting(_PHASE_NAMES[phase], right - left)
        canvas.ribbon(left, right, text, _PHASES[phase])
    for left, right, step in axis.steps():
        if left:
            canvas.boundary(left)
        names = (f"step {step}", str(step)) if step else ("build",)
        canvas.below((left + right) / 2, _fitting(names, max(right - left, 0.06)))
    canvas.hide_ticks("allocations and frees, in their order")


def _fitting(texts: Iterable[str], width: float) -> str:
    """The first that fits into this share of the axis; empty if none does."""
    return next((text for text in texts if len(text) < width * 115), "")


def _peak_text(trace: MemoryTrace) -> str:
    text = f"peak: {format_gib(trace.peak_allocated_bytes)} allocated"
    if trace.out_of_memory is not None:
        shortage = trace.out_of_memory
        text = f"out of memory at {shortage.module or 'the training step'} ({shortage.op})\n{text}"
    return f"{text}\n{_where(trace, trace.peak_event)}"


def _where(trace: MemoryTrace, event: int) -> str:
    """As in: step 2, backward."""
    kind, number, *_ = trace.events[event]
    step = step_at(trace, event)
    if step == 0:
        return "build"
    if kind in ("S+", "S-"):
        return f"step {step}"
    block = trace.blocks[number]
    return f"step {step}, {block.phase if kind == 'A' else block.end_phase}"


def _happened(trace: MemoryTrace, event: int) -> str:
    """As in: step 2, backward: +12.0 MiB activations, h.0.mlp (aten::gelu)."""
    kind, number, *rest = trace.events[event]
    place = _where(trace, event)
    if kind in ("S+", "S-"):
        verb = "reserves" if kind == "S+" else "gives back"
        return f"{place}: {verb} {format_gib(rest[0])}"
    block = trace.blocks[number]
    sign = "+" if kind == "A" else "−"
    source = f"{block.module or 'outside of modules'} ({block.op or 'allocation'})"
    size = format_gib(block.size) if block.size >= _TINY else f"{block.size:,} bytes"
    return f"{place}: {sign}{size} {trace.category(block)}, {source}"


def _trace_title(trace: MemoryTrace) -> str:
    if trace.out_of_memory is not None:
        shortage = trace.out_of_memory
        place = f"step {shortage.step}, {shortage.phase}" if shortage.step else "the build"
        return f"Memory of training: it runs out in {place}"
    return f"Memory of training: {format_gib(trace.peak_reserved_bytes)} reserved at the peak"


def _trace_subtitle(trace: MemoryTrace) -> str:
    parts = ["predicted"]
    if trace.card is not None:
        parts.append(f"for {trace.card}")
    if trace.budget_bytes is not None:
        beyond = "" if _visible_budget(trace) else " (above the picture)"
        parts.append(f"with a budget of {format_gib(trace.budget_bytes)}{beyond}")
    return " ".join(parts)


def _scale(size_bytes: int) -> tuple[int, str]:
    """The unit of an axis up to this: (bytes, name)."""
    return (GIB, "GiB") if size_bytes >= GIB / 10 else (2**20, "MiB")


# The picture of a frontier


@dataclass(frozen=True, kw_only=True)
class _Row:
    seq_len: int
    checkpointing: bool | int | str
    micro_batch_size: int
    reserved_bytes: int | None
    headroom_bytes: int | None

    @classmethod
    def of(cls, row: Any) -> _Row:
        def value(name: str) -> Any:
            return row.get(name) if isinstance(row, Mapping) else getattr(row, name, None)

        return cls(
            seq_len=value("seq_len"),
            checkpointing=value("gradient_checkpointing"),
            micro_batch_size=value("micro_batch_size") or 0,
            reserved_bytes=value("predicted_reserved_bytes"),
            headroom_bytes=value("headroom_bytes"),
        )

    def describe(self) -> str:
        """Lines of what is known; for the eyes."""
        lines = [f"{self.micro_batch_size} × {self.seq_len:,} tokens"]
        if not self.micro_batch_size:
            lines = [f"not even 1 × {self.seq_len:,} tokens"]
        if isinstance(self.checkpointing, bool):
            lines.append(f"{'with' if self.checkpointing else 'without'} gradient checkpointing")
        else:
            lines.append(f"gradient checkpointing: {self.checkpointing}")
        if self.reserved_bytes is not None:
            lines.append(f"{format_gib(self.reserved_bytes)} reserved")
        if self.headroom_bytes is not None:
            lines.append(f"{format_gib(self.headroom_bytes)} to spare")
        return "\n".join(lines)


class _Frontier:
    """Rows with their places on the axis: lengths are put side by side at equal distances."""

    def __init__(
        self, rows: Sequence[_Row], chosen: _Row | None, budget: int | None, card: str | None
    ) -> None:
        self.rows = rows
        self.chosen = chosen
        self.card = card
        self.budget = budget
        for row in rows:
            if self.budget is None and None not in (row.reserved_bytes, row.headroom_bytes):
                self.budget = (row.reserved_bytes or 0) + (row.headroom_bytes or 0)
        self.all = [*rows, *([chosen] if chosen else [])]
        self.lengths = sorted({row.seq_len for row in self.all})
        largest = max(row.reserved_bytes or 0 for row in rows)
        self.unit, self.unit_name = _scale(max(largest, self.budget or 0))

    def series(self) -> Iterator[tuple[str, str, list[_Row]]]:
        """(name, colour, rows by length), of those that there are."""
        names = {False: ("without", _WITHOUT), True: ("with", _WITH)}
        for checkpointing, (name, color) in names.items():
            rows = [row for row in self.rows if bool(row.checkpointing) == checkpointing]
            if rows:
                yield name, color, sorted(rows, key=lambda row: row.seq_len)

    def places(self, rows: Iterable[_Row]) -> list[float]:
        return [float(self.lengths.index(row.seq_len)) for row in rows]

    def subtitle(self) -> str:
        parts = ["predicted"]
        if self.card is not None:
            parts.append(f"for {self.card}")
        if self.budget is not None:
            parts.append(f"with a budget of {format_gib(self.budget)}")
        return " ".join(parts)


def _draw_frontier(canvas: Png | Html, frontier: _Frontier) -> None:
    """Above the largest micro-batches, below the memory that they take."""
    last = len(frontier.lengths) - 1
    margin = 0.6 if last else 1.4
    ends = -margin, last + margin
    _frontier_axes(canvas, frontier, ends)
    series = list(frontier.series())
    for i, (name, color, rows) in enumerate(series):
        _draw_sizes(canvas, frontier, rows, Look(label=name, color=color, dotted=True))
        shift = (i - (len(series) - 1) / 2) * 0.36
        _draw_memory(canvas, frontier, rows, color, shift)
    if frontier.budget:
        look = Look(label=f"budget, {format_gib(frontier.budget)}", color=_BUDGET, dashed=True)
        canvas.line(1, ends, [frontier.budget / frontier.unit] * 2, look)
    if frontier.chosen is not None:
        place = frontier.places([frontier.chosen])[0]
        label = f"chosen: {frontier.chosen.describe()}"
        canvas.ring(place, frontier.chosen.micro_batch_size, label)
    canvas.finish(
        "Largest micro-batch that fits, by sequence length",
        frontier.subtitle(),
        "gradient checkpointing",
    )


def _draw_sizes(canvas: Png | Html, frontier: _Frontier, rows: list[_Row], look: Look) -> None:
    fitting = [row for row in rows if row.micro_batch_size]
    y = [row.micro_batch_size for row in fitting]
    hover = [row.describe() for row in fitting]
    canvas.line(0, frontier.places(fitting), y, look, hover)
    sizes = [f"{row.micro_batch_size:,}" for row in fitting]
    above = bool(rows[0].checkpointing)
    canvas.labels(frontier.places(fitting), y, sizes, look.color, above=above)
    others = frontier.places([row for row in rows if not row.micro_batch_size])
    at_bottom = [0.72 if above else 0.54] * len(others)
    canvas.labels(others, at_bottom, ["none fits"] * len(others), look.color, above=True)


def _draw_memory(
    canvas: Png | Html, frontier: _Frontier, rows: list[_Row], color: str, shift: float
) -> None:
    known = [row for row in rows if row.reserved_bytes is not None and row.micro_batch_size]
    sizes = [(row.reserved_bytes or 0) / frontier.unit for row in known]
    x = [place + shift for place in frontier.places(known)]
    canvas.bars(x, sizes, color, [row.describe() for row in known])


def _frontier_axes(canvas: Png | Html, frontier: _Frontier, ends: tuple[float, float]) -> None:
    largest = max(1, *(row.micro_batch_size for row in frontier.all))
    powers = [2**power for power in range(largest.bit_length() + 1)]
    top = 1.1 * largest * (2 * largest) ** 0.12  # with room for the figures
    canvas.axis_y(0, "micro-batch, sequences", (0.5, top), powers=powers)
    sizes = [row.reserved_bytes or 0 for row in frontier.rows if row.micro_batch_size]
    highest = max([*sizes, frontier.budget or 0, 1]) / frontier.unit
    canvas.axis_y(1, f"reserved, {frontier.unit_name}", (0.0, 1.25 * highest))
    lengths = [f"{length:,}" for length in frontier.lengths]
    canvas.axis_x(ends, lengths, "tokens per sequence")
