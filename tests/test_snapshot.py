"""A saved trace: PyTorch's own readers open it, and its events lead to its segments."""

from __future__ import annotations

import importlib.util
import pickle
import pickletools
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.cuda import _memory_viz

from lowvram.errors import RecipeError
from lowvram.memory import MemoryTrace, card_of_size, simulate
from lowvram.memory.snapshot import as_snapshot

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "allocator_replay.py"
MIB = 2**20

# What MemoryViz.js reads of pickle, as far as Python writes it.
VISUALISER_READS = """
    PROTO FRAME STOP MARK MEMOIZE BINGET LONG_BINGET EMPTY_DICT EMPTY_LIST EMPTY_TUPLE APPEND
    APPENDS SETITEM SETITEMS TUPLE1 TUPLE2 TUPLE3 NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1
    BINFLOAT SHORT_BINUNICODE BINUNICODE
""".split()


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(256, 2048)
        self.down = nn.Linear(2048, 256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


def run(rows: int = 512, card_bytes: int | None = 2**30, between: Any = None) -> MemoryTrace:
    """Two steps of AdamW; `between` is called after the first backward pass."""

    def build(device: torch.device) -> Any:
        model = Mlp().to(device)
        return model, torch.optim.AdamW(model.parameters()), device

    def step(state: Any) -> None:
        model, optimizer, device = state
        model(torch.zeros(rows, 256, device=device)).square().mean().backward()
        if between is not None:
            between()
        optimizer.step()
        optimizer.zero_grad()

    card = None if card_bytes is None else card_of_size(card_bytes)
    return simulate(build, step, steps=2, card=card)


@pytest.fixture(scope="module")
def trace() -> MemoryTrace:
    return run()


@pytest.fixture(scope="module")
def cut_off() -> MemoryTrace:
    """Memory ends in the first step, after the cache was emptied in vain."""
    found = run(rows=4096, card_bytes=60 * MIB)
    assert found.out_of_memory is not None
    return found


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("replay_of_snapshots", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def saved(trace: MemoryTrace, directory: Path) -> Any:
    trace.save(directory / "snapshot.pickle")
    return pickle.loads((directory / "snapshot.pickle").read_bytes())


def entries(data: Any, *actions: str) -> list[Any]:
    return [entry for entry in data["device_traces"][0] if entry["action"] in actions]


# What is in it


def test_it_is_of_plain_values_in_the_keys_of_torch(trace: MemoryTrace, tmp_path: Path) -> None:
    data = saved(trace, tmp_path)
    assert set(data) == {"segments", "device_traces", "allocator_settings"}
    for segment in data["segments"]:
        assert set(segment) == {
            *("device", "address", "total_size", "allocated_size", "active_size"),
            *("requested_size", "stream", "segment_type", "segment_pool_id", "is_expandable"),
            *("frames", "blocks"),
        }
        for block in segment["blocks"]:
            assert set(block) == {"address", "size", "requested_size", "state", "frames"}
    for entry in data["device_traces"][0]:
        assert set(entry) >= {"action", "addr", "size", "stream", "time_us", "frames"}


@pytest.mark.parametrize("name", ["trace", "cut_off"])
def test_the_visualiser_knows_every_opcode(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    request.getfixturevalue(name).save(tmp_path / "s.pickle")
    content = (tmp_path / "s.pickle").read_bytes()
    assert content[:2] == b"\x80\x04"
    found = {opcode.name for opcode, _, _ in pickletools.genops(content)}
    assert found <= set(VISUALISER_READS)


def test_events_are_those_of_the_trace(trace: MemoryTrace) -> None:
    data = as_snapshot(trace)
    kinds = [kind for kind, *_ in trace.events]
    assert len(entries(data, "alloc")) == kinds.count("A") == len(trace.blocks)
    assert len(entries(data, "free_requested")) == kinds.count("F")
    assert len(entries(data, "free_completed")) == kinds.count("F")
    assert len(entries(data, "segment_alloc")) == kinds.count("S+") > 1
    assert [entry["time_us"] for entry in data["device_traces"][0]] == list(
        range(len(data["device_traces"][0]))
    )
    assert [entry["action"] for entry in data["device_traces"][0]][-1] == "snapshot"


def test_frames_say_what_made_a_block(trace: MemoryTrace) -> None:
    data = as_snapshot(trace)
    for entry, block in zip(entries(data, "alloc"), trace.blocks, strict=True):
        module, place = entry["frames"]
        assert module["name"] == (block.op or "allocation")
        assert place["name"] == entry["category"] == trace.category(block)
        assert module["line"] == place["line"] == 0
    files = {frame["filename"] for entry in entries(data, "alloc") for frame in entry["frames"]}
    assert {"build", "up", "down", "training step"} < files
    assert {"step 1, forward", "step 1, backward", "step 2, optimizer"} < files


def test_a_segment_has_the_frames_of_what_it_came_for(trace: MemoryTrace) -> None:
    recorded = as_snapshot(trace)["device_traces"][0]
    for entry, following in zip(recorded, recorded[1:], strict=False):
        if entry["action"] == "segment_alloc":
            assert entry["frames"] == following["frames"]


def test_a_category_that_the_visualiser_asks_for_is_there(trace: MemoryTrace) -> None:
    """MemoryViz.js wants to add "unknown" to the categories and fails, unless it is there."""
    found = {entry.get("category") for entry in as_snapshot(trace)["device_traces"][0]}
    assert "unknown" in found


# The events and the segments agree


def replay(recorded: list[Any]) -> tuple[dict[int, int], dict[int, int]]:
    """(segments, live blocks), each as sizes by address, after all events."""
    segments: dict[int, int] = {}
    live: dict[int, int] = {}
    for entry in recorded:
        action, address, size = entry["action"], entry.get("addr", 0), entry["size"]
        if action == "segment_alloc":
            assert address not in segments
            segments[address] = size
        elif action == "segment_free":
            assert segments.pop(address) == size
        elif action == "alloc":
            assert any(start <= address < start + segments[start] for start in segments)
            assert address not in live
            live[address] = size
        elif action == "free_completed":
            assert live.pop(address) == size
    return segments, live


def giving_back() -> None:
    torch.cuda.empty_cache()


@pytest.mark.parametrize("between", [None, giving_back])
def test_events_lead_to_the_segments(between: Any, tmp_path: Path) -> None:
    trace = run(between=between)
    data = saved(trace, tmp_path)
    segments, live = replay(data["device_traces"][0])
    assert segments == {one["address"]: one["total_size"] for one in data["segments"]}
    assert live == {
        block["address"]: block["requested_size"]
        for segment in data["segments"]
        for block in segment["blocks"]
        if block["state"] == "active_allocated"
    }
    assert sum(segments.values()) == trace.reserved_bytes[-1]
    allocated = sum(segment["allocated_size"] for segment in data["segments"])
    assert allocated == trace.allocated_bytes[-1]
    assert bool(entries(data, "segment_free")) == (between is giving_back)


def test_blocks_fill_their_segments(trace: MemoryTrace) -> None:
    for segment in as_snapshot(trace)["segments"]:
        end = segment["address"]
        for block in segment["blocks"]:
            assert block["address"] == end
            assert block["requested_size"] <= block["size"]
            assert bool(block["frames"]) == (block["state"] == "active_allocated")
            end += block["size"]
        assert end == segment["address"] + segment["total_size"]
        assert _memory_viz.calc_active(segment) == segment["allocated_size"]


def test_running_out_of_memory_is_an_event(cut_off: MemoryTrace, tmp_path: Path) -> None:
    data = saved(cut_off, tmp_path)
    (failure,) = entries(data, "oom")
    recorded = data["device_traces"][0]
    assert {entry["action"] for entry in recorded[recorded.index(failure) + 1 :]} <= {
        *("free_requested", "free_completed", "snapshot")
    }
    shortage = cut_off.out_of_memory
    assert shortage is not None
    assert f"Tried to allocate {failure['size'] / MIB:.2f} MiB" in shortage.message
    assert 0 <= failure["device_free"] < failure["size"]
    assert failure["frames"][0]["filename"] == (shortage.module or "training step")
    assert "raise OutOfMemoryError" in _memory_viz.trace(data)
    replay(recorded)


# Others read it


@pytest.mark.parametrize("name", ["trace", "cut_off"])
def test_torch_reads_it(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    trace = request.getfixturevalue(name)
    data = saved(trace, tmp_path)
    summary = _memory_viz.segsum(data)  # it checks sums of its own
    assert f"segments: {len(data['segments'])}" in summary
    assert f"total_reserved: {_memory_viz.Bytes(trace.reserved_bytes[-1])}" in summary
    listing = _memory_viz.trace(data)
    assert f"{len(data['device_traces'][0])} entries" in listing
    assert listing.count("cudaMalloc") == len(entries(data, "segment_alloc"))
    for page in (_memory_viz.trace_plot(data), _memory_viz.segment_plot(data)):
        assert "add_local_files" in page
    # Torch's filter changes the data that it is given.
    assert "Active Memory Timeline" in _memory_viz.trace_plot(data, filter_freed=True)
    assert {entry["action"] for entry in data["device_traces"][0]} <= {
        *("alloc", "segment_alloc", "segment_free", "oom", "snapshot")
    }


def test_flame_graphs_name_phase_category_and_module(trace: MemoryTrace, tmp_path: Path) -> None:
    data = saved(trace, tmp_path)
    for drawn in (_memory_viz.memory, _memory_viz.segments):
        lines = drawn(data, format_flamegraph=lambda text: text).splitlines()
        assert any("step 1, optimizer:0:optimizer states;training step:0" in one for one in lines)
        assert any("active_allocated;build:0:base weights" in one for one in lines)


def test_the_command_of_torch_reads_it(trace: MemoryTrace, tmp_path: Path) -> None:
    trace.save(tmp_path / "s.pickle")
    path = _memory_viz.__file__  # as a file: importing torch takes seconds
    command = [sys.executable, path, "trace_plot", "s.pickle", "-o", "page.html"]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert "Active Memory Timeline" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("name", ["trace", "cut_off"])
def test_the_replay_finds_every_address(
    name: str, request: pytest.FixtureRequest, script: ModuleType, tmp_path: Path
) -> None:
    trace = request.getfixturevalue(name)
    trace.save(tmp_path / "s.pickle")
    (recorded,) = script.read_traces(tmp_path / "s.pickle")
    result = script.replay(recorded)
    assert result.exact
    assert result.same_address == result.allocations == len(trace.blocks)
    assert result.reserved["peak reserved"] == (trace.peak_reserved_bytes,) * 2


# Writing


def test_nothing_else_is_left_and_the_old_file_is_replaced(
    trace: MemoryTrace, tmp_path: Path
) -> None:
    (tmp_path / "snapshot.pickle").write_text("old")
    saved(trace, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["snapshot.pickle"]


def test_a_failure_keeps_the_old_file(
    trace: MemoryTrace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    path = tmp_path / "s.pickle"
    path.write_text("old")
    with pytest.raises(RecipeError) as caught:
        trace.save(path)
    assert str(caught.value).startswith(
        f"{path}: cannot be written: No space left on device. "
        "Choose a directory that you may write to, with room for 0."
    )
    assert path.read_text() == "old"
    assert [one.name for one in tmp_path.iterdir()] == ["s.pickle"]


def test_a_directory_that_is_not_there(trace: MemoryTrace, tmp_path: Path) -> None:
    path = tmp_path / "none" / "s.pickle"
    with pytest.raises(RecipeError) as caught:
        trace.save(path)
    assert str(caught.value) == (
        f"{path}: there is no directory {path.parent}. Make it first, or choose another"
    )


def test_a_name_that_is_a_directory(trace: MemoryTrace, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        trace.save(tmp_path)
    assert str(caught.value) == f"{tmp_path}: is a directory. Give the name of a file in it"


def test_a_file_in_place_of_a_directory(trace: MemoryTrace, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RecipeError, match="cannot be written: Not a directory"):
        trace.save(tmp_path / "file" / "s.pickle")
