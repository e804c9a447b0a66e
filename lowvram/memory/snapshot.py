"""A trace as a file of `torch.cuda.memory._dump_snapshot`, for PyTorch's memory visualiser.

pytorch.org/memory_viz opens it, and so does `python -m torch.cuda._memory_viz trace_plot FILE -o
page.html`. In place of a stack trace, each block has two frames: the module with the operation,
and the step and phase with the category. All is there from the first allocation on, so the
segments at the end and the events lead back to an empty card.
"""

from __future__ import annotations

import os
import pickle
import re
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from lowvram.errors import RecipeError
from lowvram.memory.measure import format_gib
from lowvram.memory.segments import Segment
from lowvram.memory.trace import Block, MemoryTrace

Frames = list[dict[str, Any]]

_PROTOCOL = 4  # of pickle; the visualiser reads 2 to 4
_POOL = (0, 0)  # the one of all that is not in a CUDA graph
_UNKNOWN = "unknown"
"""A category that the visualiser has to find: where it is missing, it fails at adding it."""

_SETTINGS = {
    "PYTORCH_CUDA_ALLOC_CONF": "",
    "max_split_size": -1,
    "garbage_collection_threshold": 0.0,
    "expandable_segments": False,
    "roundup_power2_divisions": {str(2**power): 0 for power in range(16)},
}


def save_snapshot(trace: MemoryTrace, path: Path) -> None:
    """Numbers, texts, lists and dicts only; raises RecipeError if it cannot be written there."""
    write_whole(path, pickle.dumps(as_snapshot(trace), protocol=_PROTOCOL))


def as_snapshot(trace: MemoryTrace) -> dict[str, Any]:
    """What `torch.cuda.memory._snapshot()` gives, of device 0; sizes in bytes."""
    recording = _Recording(trace)
    return {
        "segments": [recording.segment(segment) for segment in trace.segments],
        "device_traces": [recording.entries],
        "allocator_settings": _SETTINGS,
    }


def step_at(trace: MemoryTrace, event: int) -> int:
    """Counted from 1; 0 while building."""
    return bisect_right(trace.steps, event, key=lambda step: step.first_event)


def failure_event(trace: MemoryTrace) -> int | None:
    """The first event after memory ran out, which all free what the code then lets go of."""
    if trace.out_of_memory is None:
        return None
    event = len(trace.events)
    begin = trace.steps[-1].first_event if trace.steps else 0
    while event > begin and trace.events[event - 1][0] == "F":
        event -= 1
    return event


class _Recording:
    """Torch's events from ours. Equal frames are one object, which a pickle holds once."""

    def __init__(self, trace: MemoryTrace) -> None:
        self.entries: list[dict[str, Any]] = []
        self._trace = trace
        self._known: dict[tuple[str, ...], Frames] = {}
        self._segment_frames: dict[int, Frames] = {}  # by address
        self._live = {block.address: block for block in trace.blocks if block.end is None}
        failure = failure_event(trace)
        for event, (kind, *values) in enumerate(trace.events):
            if event == failure:
                self._fail(event)
            self._record(event, kind, values)
        if failure == len(trace.events):
            self._fail(failure)
        self._end()

    def segment(self, segment: Segment) -> dict[str, Any]:
        used = [block for block in segment.blocks if block.allocated]
        allocated = sum(block.size for block in used)
        return {
            "device": 0,
            "address": segment.address,
            "total_size": segment.size,
            "allocated_size": allocated,
            "active_size": allocated,
            "requested_size": sum(block.requested for block in used),
            "stream": segment.stream,
            "segment_type": segment.pool,
            "segment_pool_id": _POOL,
            "is_expandable": segment.expandable,
            "frames": self._segment_frames.get(segment.address, []),
            "blocks": list(self._blocks(segment)),
        }

    def _blocks(self, segment: Segment) -> Iterator[dict[str, Any]]:
        for block in segment.blocks:
            yield {
                "address": block.address,
                "size": block.size,
                "requested_size": block.requested,
                "state": "active_allocated" if block.allocated else "inactive",
                "frames": self._frames(self._live[block.address]) if block.allocated else [],
            }

    def _record(self, event: int, kind: str, values: list[int]) -> None:
        if kind == "A":
            block = self._trace.blocks[values[0]]
            self._add("alloc", block.address, block.size, self._frames(block), self._name(block))
        elif kind == "F":
            block = self._trace.blocks[values[0]]
            for action in ("free_requested", "free_completed"):
                self._add(action, block.address, block.size, self._frames(block), self._name(block))
        elif kind == "S+":
            frames = self._segment_frames[values[0]] = self._frames_of_next(event)
            self._add("segment_alloc", values[0], values[1], frames)
        else:
            place = _place(step_at(self._trace, event), "")
            frames = self._framed((place, "cached memory given back"))
            self._add("segment_free", values[0], values[1], frames)

    def _add(
        self, action: str, address: int, size: int, frames: Frames, category: str | None = None
    ) -> None:
        entry = {
            "action": action,
            "addr": address,
            "size": size,
            "stream": 0,
            "time_us": len(self.entries),  # no clock runs in a simulation
            "pool_id": _POOL,
            "frames": frames,
        }
        if category is not None:
            entry["category"] = category
        self.entries.append(entry)

    def _fail(self, event: int) -> None:
        """Where memory ran out: torch's event has what was free in place of an address."""
        shortage, reserved = self._trace.out_of_memory, self._trace.reserved_bytes
        assert shortage is not None
        module = shortage.module or "training step"
        place = _place(shortage.step, shortage.phase)
        frames = self._framed((module, shortage.op), (place, "out of memory"))
        self._add("oom", 0, _tried_bytes(shortage.message), frames)
        in_use = reserved[event - 1] if event else 0
        del self.entries[-1]["addr"]
        self.entries[-1]["device_free"] = max(0, (self._trace.budget_bytes or 0) - in_use)

    def _end(self) -> None:
        card = f" for {self._trace.card}" if self._trace.card else ""
        frames = self._framed((f"predicted by lowvram{card}", "not recorded on a card"))
        allocated = self._trace.allocated_bytes[-1] if self._trace.allocated_bytes else 0
        self._add("snapshot", 0, allocated, frames, _UNKNOWN)

    def _name(self, block: Block) -> str:
        return self._trace.category(block)

    def _frames_of_next(self, event: int) -> Frames:
        """Of the block that a new segment is for."""
        for kind, number, *_ in self._trace.events[event + 1 : event + 2]:
            if kind == "A":
                return self._frames(self._trace.blocks[number])
        return []

    def _frames(self, block: Block) -> Frames:
        step = step_at(self._trace, block.begin)
        outside = "build" if block.phase == "build" else "training step"
        return self._framed(
            (block.module or outside, block.op or "allocation"),
            (_place(step, block.phase), self._name(block)),
        )

    def _framed(self, *lines: tuple[str, str]) -> Frames:
        """Innermost first, as torch has them."""
        key = tuple(text for line in lines for text in line)
        if key not in self._known:
            self._known[key] = [{"filename": file, "line": 0, "name": name} for file, name in lines]
        return self._known[key]


def _place(step: int, phase: str) -> str:
    if step == 0:
        return "build"
    return f"step {step}, {phase}" if phase else f"step {step}"


def _tried_bytes(message: str) -> int:
    """The size in torch's text of an error, as exact as the text."""
    found = re.search(r"Tried to allocate ([\d.]+) (GiB|MiB|KiB)?", message)
    if found is None:
        return 0
    units = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10, None: 1}
    return round(float(found[1]) * units[found[2]])


def write_whole(path: Path, content: bytes) -> None:
    """Beside its place first, then renamed: never half a file."""
    if path.is_dir():
        raise RecipeError(f"{path}: is a directory. Give the name of a file in it")
    partial = path.with_name(f".partial-{path.name}-{os.getpid()}")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise _unwritable(path, len(content), error) from error
    finally:
        with suppress(OSError):
            partial.unlink()


def _unwritable(path: Path, size: int, error: OSError) -> RecipeError:
    if isinstance(error, FileNotFoundError):
        return RecipeError(
            f"{path}: there is no directory {path.parent}. Make it first, or choose another"
        )
    return RecipeError(
        f"{path}: cannot be written: {error.strerror or error}. Choose a directory that you may "
        f"write to, with room for {format_gib(size)}"
    )
