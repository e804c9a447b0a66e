"""Pictures of a trace and of a frontier: right sums, whole files, and errors that help."""

from __future__ import annotations

import ast
import importlib
import re
import struct
import sys
from array import array
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import nn

from lowvram.errors import DeviceError, RecipeError
from lowvram.memory import MemoryTrace, canvas, card_of_size, simulate
from lowvram.memory.plot import COLORS, plot_frontier, plot_trace
from lowvram.memory.timeline import sections, timeline
from lowvram.memory.trace import Block, Category, Step

MIB = 2**20


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(256, 2048)
        self.down = nn.Linear(2048, 256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


def run(rows: int = 512, card_bytes: int | None = None, passes: int = 1) -> MemoryTrace:
    def build(device: torch.device) -> Any:
        model = Mlp().to(device)
        return model, torch.optim.AdamW(model.parameters()), device

    def step(state: Any) -> None:
        model, optimizer, device = state
        for _ in range(passes):
            model(torch.zeros(rows, 256, device=device)).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    card = None if card_bytes is None else card_of_size(card_bytes)
    return simulate(build, step, steps=3, card=card)


@pytest.fixture(scope="module")
def trace() -> MemoryTrace:
    return run(card_bytes=90 * MIB)


@pytest.fixture(scope="module")
def cut_off() -> MemoryTrace:
    found = run(rows=4096, card_bytes=60 * MIB)
    assert found.out_of_memory is not None
    return found


def long_trace(count: int) -> MemoryTrace:
    """Blocks that come and go, one at a time, and one instant with many more."""
    blocks, events = [], []
    allocated, reserved = array("q"), array("q")
    high = count // 2 | 1
    for event in range(count):
        number, freed = divmod(event, 2)
        if not freed:
            blocks.append(Block(512, 512, begin=event, phase="forward", module="m", op="op"))
        events.append(("F", number) if freed else ("A", number, 512, 512))
        blocks[number].end = event if freed else None
        blocks[number].end_phase = "forward"
        allocated.append(0 if freed else 2**30 if event == high - 1 else 512)
        reserved.append(2**31 if event == high + 1 else 2**30)
    return MemoryTrace(
        blocks=blocks,
        events=events,
        allocated_bytes=allocated,
        reserved_bytes=reserved,
        steps=[
            Step(
                first_event=0,
                last_event=count - 1,
                peak_reserved_bytes=2**31,
                peak_allocated_bytes=2**30,
            )
        ],
        out_of_memory=None,
        card=None,
        budget_bytes=None,
        peak_reserved_bytes=2**31,
        peak_allocated_bytes=2**30,
    )


@dataclass(frozen=True)
class Row:
    seq_len: int
    gradient_checkpointing: bool
    micro_batch_size: int
    predicted_reserved_bytes: int
    headroom_bytes: int


ROWS = [
    Row(256, False, 22, 11_100 * MIB, 500 * MIB),
    Row(256, True, 60, 11_300 * MIB, 300 * MIB),
    Row(512, False, 10, 10_900 * MIB, 700 * MIB),
    Row(512, True, 29, 11_200 * MIB, 400 * MIB),
    Row(1024, False, 0, 12_300 * MIB, -700 * MIB),
    Row(1024, True, 13, 10_900 * MIB, 700 * MIB),
]


def text_of(page: Path) -> str:
    """What plotly was given, of a page: all after its own source."""
    return page.read_text(encoding="utf-8").rpartition("Plotly.newPlot(")[2]


def png_size(path: Path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert content[-8:-4] == b"IEND"
    width, height = struct.unpack(">II", content[16:24])
    return width, height


# The series


def test_every_category_has_a_color_of_its_own() -> None:
    assert set(COLORS) == set(get_args(Category))
    assert len(set(COLORS.values())) == len(COLORS)


@pytest.mark.parametrize("name", ["trace", "cut_off"])
def test_categories_add_up_to_what_is_allocated(name: str, request: pytest.FixtureRequest) -> None:
    trace = request.getfixturevalue(name)
    line = timeline(trace)
    sums = [sum(sizes) for sizes in zip(*line.by_category.values(), strict=True)]
    assert sums == [trace.allocated_bytes[event] for event in line.events]
    assert max(sums) == trace.peak_allocated_bytes == trace.allocated_bytes[trace.peak_event]
    assert max(line.reserved) == trace.peak_reserved_bytes


def test_the_peak_is_that_of_the_trace_but_for_rounding(trace: MemoryTrace) -> None:
    """`by_category` counts what was asked for; a block has up to 511 bytes more, or 1 MiB."""
    line = timeline(trace)
    at_peak = line.events.index(trace.peak_event)
    counts = {category: 0 for category in COLORS}
    for block in trace.live():
        counts[trace.category(block)] += 1
    for category, asked_for in trace.by_category().items():
        rounding = line.by_category[category][at_peak] - asked_for
        assert 0 <= rounding <= counts[category] * MIB


def test_all_events_are_there_where_they_are_few(trace: MemoryTrace) -> None:
    assert timeline(trace).events == list(range(len(trace.events)))


@pytest.mark.parametrize("points", [40, 400])
def test_fewer_points_keep_the_peaks(points: int) -> None:
    trace = long_trace(20_000)
    line = timeline(trace, points)
    assert points / 2 < len(line.events) <= points + 2
    assert line.events == sorted(set(line.events))
    assert {0, trace.peak_event, 19_999} <= set(line.events)
    assert max(sum(sizes) for sizes in zip(*line.by_category.values(), strict=True)) == 2**30
    assert max(line.reserved) == 2**31


def test_nothing_is_shown_of_what_an_error_freed(cut_off: MemoryTrace) -> None:
    last = timeline(cut_off).events[-1]
    assert last < len(cut_off.events) - 1
    assert {kind for kind, *_ in cut_off.events[last + 1 :]} == {"F"}


# The phases


def test_sections_are_the_phases_of_each_step(trace: MemoryTrace) -> None:
    found = [(section.step, section.phase) for section in sections(trace)]
    phases = ("forward", "backward", "optimizer")
    assert found == [(0, "build"), *((step, phase) for step in (1, 2, 3) for phase in phases)]


def test_sections_leave_no_gaps(trace: MemoryTrace) -> None:
    found = sections(trace)
    assert found[0].first == 0
    assert found[-1].end == len(trace.events)
    assert [section.end for section in found[:-1]] == [section.first for section in found[1:]]
    starts = [step.first_event for step in trace.steps]
    assert set(starts) <= {section.first for section in found}


def test_each_micro_batch_has_its_passes() -> None:
    found = [section.phase for section in sections(run(passes=2)) if section.step == 2]
    assert found == ["forward", "backward", "forward", "backward", "optimizer"]


def test_the_last_section_is_where_memory_ran_out(cut_off: MemoryTrace) -> None:
    assert cut_off.out_of_memory is not None
    last = sections(cut_off)[-1]
    assert (last.step, last.phase) == (cut_off.out_of_memory.step, cut_off.out_of_memory.phase)


# Files


@pytest.mark.parametrize("name", ["trace", "cut_off"])
def test_a_png(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    trace = request.getfixturevalue(name)
    trace.plot(tmp_path / "memory.PNG")
    assert png_size(tmp_path / "memory.PNG") == (1650, 930)
    assert [path.name for path in tmp_path.iterdir()] == ["memory.PNG"]


def test_drawing_looks_for_no_display(trace: MemoryTrace, tmp_path: Path) -> None:
    """That is what pyplot does, which also keeps figures."""
    before = "matplotlib.pyplot" in sys.modules
    trace.plot(tmp_path / "memory.png")
    assert ("matplotlib.pyplot" in sys.modules) == before


def test_a_page_fetches_nothing(trace: MemoryTrace, tmp_path: Path) -> None:
    trace.plot(tmp_path / "memory.html")
    page = (tmp_path / "memory.html").read_text(encoding="utf-8")
    # Plotly's source is in it and holds tags as texts, so only what is outside of scripts counts.
    outside = re.sub(r"<script[^>]*>.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"<script[^>]*\ssrc=", page)
    assert not re.search(r"<(link|img|iframe)|https?:|@import", outside)
    assert not re.search(r"https?:", text_of(tmp_path / "memory.html"))
    assert '"showSendToCloud": false' in page


def test_a_page_shows_what_a_trace_has(trace: MemoryTrace, tmp_path: Path) -> None:
    trace.plot(tmp_path / "memory.html")
    text = text_of(tmp_path / "memory.html")
    for shown in ("step 1", "step 3", "build", "forward", "backward", "budget, 90.0 MiB"):
        assert f'"{shown}"' in text
    for category in ("base weights", "activations", "optimizer states"):
        assert f'"name":"{category}, ' in text
    assert "adapters" not in text
    assert f"peak: {trace.peak_allocated_bytes / MIB:.1f} MiB allocated" in text
    assert "%{y:.3f} MiB" in text
    assert "step 2, forward: +4.0 MiB activations, Mlp (aten::" in text
    assert f"{trace.peak_reserved_bytes / MIB:.1f} MiB reserved at the peak" in text
    assert "predicted for 0.08789 GiB with a budget of 90.0 MiB" in text


def test_a_budget_far_above_is_told_in_words(trace: MemoryTrace, tmp_path: Path) -> None:
    plot_trace(replace(trace, budget_bytes=2**33), tmp_path / "memory.html")
    text = text_of(tmp_path / "memory.html")
    assert "with a budget of 8.00 GiB (above the picture)" in text
    assert "budget, 8.00 GiB" not in text


def test_a_page_tells_where_memory_ran_out(cut_off: MemoryTrace, tmp_path: Path) -> None:
    assert cut_off.out_of_memory is not None
    cut_off.plot(tmp_path / "memory.html")
    text = text_of(tmp_path / "memory.html")
    assert f"it runs out in step 1, {cut_off.out_of_memory.phase}" in text
    assert "out of memory at " in text


def test_a_long_trace_is_drawn_with_few_points(tmp_path: Path) -> None:
    trace = long_trace(100_000)
    trace.plot(tmp_path / "memory.png")
    trace.plot(tmp_path / "memory.html")
    assert text_of(tmp_path / "memory.html").count("step 1, forward: ") < 4100


# The frontier


@pytest.mark.parametrize("as_row", [lambda row: row, asdict])
def test_a_frontier(as_row: Any, tmp_path: Path) -> None:
    rows = [as_row(row) for row in ROWS]
    for name in ("frontier.png", "frontier.html"):
        plot_frontier(rows, tmp_path / name, chosen=rows[3], card="RTX 4070 Ti")
    assert png_size(tmp_path / "frontier.png") == (1650, 930)
    text = text_of(tmp_path / "frontier.html")
    # The budget is what a row takes and what it leaves.
    assert "predicted for RTX 4070 Ti with a budget of 11.33 GiB" in text
    assert "chosen: 29 \\u00d7 512 tokens" in text
    assert "11,100" not in text
    assert "22 \\u00d7 256 tokens\\u003cbr\\u003ewithout gradient checkpointing" in text
    assert text.count("none fits") == 1


def test_a_chosen_shape_may_be_none_of_the_rows(tmp_path: Path) -> None:
    chosen = {"seq_len": 768, "gradient_checkpointing": True, "micro_batch_size": 8}
    for name in ("frontier.png", "frontier.html"):
        plot_frontier(ROWS[:4], tmp_path / name, chosen=chosen, budget_bytes=2**34)
    text = text_of(tmp_path / "frontier.html")
    assert '["256","512","768"]' in text
    assert "with a budget of 16.00 GiB" in text


def test_a_frontier_where_nothing_fits(tmp_path: Path) -> None:
    for name in ("frontier.png", "frontier.html"):
        plot_frontier([ROWS[4]], tmp_path / name)
    assert png_size(tmp_path / "frontier.png") == (1650, 930)


# Errors


@pytest.mark.parametrize("name", ["memory.svg", "memory"])
def test_other_suffixes(trace: MemoryTrace, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    found = path.suffix or "no suffix"
    for draw in (trace.plot, lambda path: plot_frontier(ROWS, path)):
        with pytest.raises(RecipeError) as caught:
            draw(path)
        assert str(caught.value) == (
            f"{path}: found {found}, allowed .png and .html. Give a name that ends so"
        )


@pytest.mark.parametrize(("suffix", "library"), [("png", "matplotlib"), ("html", "plotly")])
def test_a_library_that_is_not_there(
    suffix: str,
    library: str,
    trace: MemoryTrace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = importlib.import_module

    def without(name: str) -> Any:
        if name.startswith(library):
            raise ModuleNotFoundError(f"No module named {library!r}", name=library)
        return real(name)

    monkeypatch.setattr("lowvram.memory.canvas.import_module", without)
    with pytest.raises(DeviceError) as caught:
        trace.plot(tmp_path / f"memory.{suffix}")
    assert str(caught.value) == (
        f"{library} is not installed, and draws this picture. "
        "Install it: pip install 'lowvram[plot]'"
    )


def test_a_directory_that_is_not_there(trace: MemoryTrace, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="there is no directory"):
        trace.plot(tmp_path / "none" / "memory.png")


def test_nothing_to_draw(trace: MemoryTrace, tmp_path: Path) -> None:
    empty = replace(trace, blocks=[], events=[])
    with pytest.raises(ValueError, match="nothing was allocated"):
        empty.plot(tmp_path / "memory.png")
    with pytest.raises(ValueError, match="no rows"):
        plot_frontier([], tmp_path / "frontier.png")


def test_neither_library_is_imported_with_the_module() -> None:
    tree = ast.parse(Path(canvas.__file__).read_text(encoding="utf-8"))
    lines = [ast.unparse(node) for node in tree.body if not isinstance(node, ast.FunctionDef)]
    assert not [line for line in lines if re.match(r"(import|from) (matplotlib|plotly)", line)]
