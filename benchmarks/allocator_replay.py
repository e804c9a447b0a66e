"""Replay what a real card's allocator did, and compare with the simulated one.

Shows how well `lowvram.memory.allocator` does: it starts in the state in which the recording
starts, gets the recorded requests in their order, and its every address, every segment and the
reserved memory are compared with those of the card. Needs no card. Exits with 1 if anything
differs, or if a file cannot be read.

    python benchmarks/allocator_replay.py snapshot.pickle trace.json.gz

A file is a snapshot of PyTorch, made on a machine with a card by

    torch.cuda.memory._record_memory_history(max_entries=1_000_000)
    ...                                                      # train a few steps
    torch.cuda.memory._dump_snapshot("snapshot.pickle")

or a trace in JSON; both may be gzipped. Pickles are read as plain values: one that asks for any
class or function is refused. The JSON is an object of

    initial    the segments at the start: {base, size, stream, small, live: [[id, offset in the
               segment, requested bytes], ...]}
    events     in order: ["A", id, requested bytes, address, stream] a block handed out,
               ["F", id] its free, ["S+", address, size] a cudaMalloc, just before the block that
               needed it, ["S-", address, size] a cudaFree
    expected   optional: init_reserved, peak_reserved_actual, final_reserved_actual and
               final_alloc_actual, in bytes
    allocator_settings   optional, as in a snapshot of PyTorch

Where the card gave back segments, the replay empties its cache, as PyTorch does when memory
ends. What differs for other reasons than a wrong rule: max_split_size and garbage collection
give back less than all; an expandable segment may have grown in part before memory ended; and
of a recording that starts in the middle, the size of some blocks is not known for sure.
Recordings with private pools (CUDA graphs) are refused.
"""

from __future__ import annotations

import gzip
import io
import json
import pickle
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from lowvram.memory.allocator import Block, CachingAllocator, Segment
from lowvram.memory.sizes import (
    SMALL_LIMIT,
    SMALL_SEGMENT,
    SMALLEST_BLOCK,
    division_table,
    round_request,
)

PAGE = SMALL_SEGMENT  # what all expandable segments are multiples of
GROWTH = ("segment_alloc", "segment_map")
SHRINKAGE = ("segment_free", "segment_unmap")


class TraceError(Exception):
    """A file that cannot be replayed; says why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """`action` is "alloc", "free" or the name of what happens to a segment. Sizes in bytes."""

    action: str
    address: int
    size: int = 0
    stream: int = 0


@dataclass(kw_only=True)
class Region:
    """A segment at the start of a trace."""

    address: int
    size: int
    stream: int
    small: bool
    expandable: bool = False
    live: dict[int, tuple[int | None, int]] = field(default_factory=dict)
    """Address -> (bytes of the block or None, bytes that were asked for)."""

    def continues(self, address: int, stream: int, small: bool) -> bool:
        end = self.address + self.size
        return (end, self.stream, self.small) == (address, stream, small)


@dataclass(frozen=True, kw_only=True)
class Trace:
    """A recording of one device."""

    name: str
    regions: list[Region]
    events: list[Event]
    settings: dict[str, Any]
    """Keyword arguments of CachingAllocator."""
    expected: dict[str, int]
    """Bytes that the recording states, besides what follows from its events."""


@dataclass(kw_only=True)
class Result:
    name: str
    events: int = 0
    allocations: int = 0
    same_address: int = 0
    segments: int = 0
    """Recorded segments that came or went."""
    segments_right: int = 0
    """Of these, those predicted at the same moment with the same address and size."""
    segments_extra: int = 0
    """Predicted ones that did not happen."""
    reserved: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Bytes predicted and recorded, by what they are of."""
    seconds: float = 0.0

    @property
    def exact(self) -> bool:
        return (
            self.same_address == self.allocations
            and self.segments_right == self.segments
            and not self.segments_extra
            and all(predicted == recorded for predicted, recorded in self.reserved.values())
        )


# Reading ------------------------------------------------------------------------------------


def read_traces(path: Path) -> list[Trace]:
    """The traces of a file, one a device. Raises TraceError."""
    data = path.read_bytes()
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError) as error:
            raise TraceError(f"{path}: cannot be unzipped: {error}") from error
    try:
        if data.lstrip()[:1] == b"{":
            return [from_json(path.name, json.loads(data))]
        return from_snapshot(path.name, load_plain_pickle(data))
    except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
        raise TraceError(
            f"{path}: not in a format that is known here ({type(error).__name__}: {error})"
        ) from error
    except TraceError as error:
        raise TraceError(f"{path}: {error}") from error


class _PlainUnpickler(pickle.Unpickler):
    """Reads numbers, strings and containers, and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        raise TraceError(
            f"refused: the pickle asks for {module}.{name}; "
            "a snapshot holds numbers, texts and containers only"
        )


def load_plain_pickle(data: bytes) -> Any:
    try:
        return _PlainUnpickler(io.BytesIO(data)).load()
    except (pickle.UnpicklingError, EOFError) as error:
        raise TraceError(f"neither JSON nor a pickle that can be read: {error}") from error


def allocator_settings(recorded: dict[str, Any]) -> dict[str, Any]:
    """What a snapshot calls its allocator's settings, as arguments of CachingAllocator."""
    divisions = recorded.get("roundup_power2_divisions", {})
    max_split = recorded.get("max_split_size", -1)
    return {
        "expandable_segments": bool(recorded.get("expandable_segments", False)),
        "max_split_size": None if max_split < 0 else max_split,
        "roundup_power2_divisions": {int(size): number for size, number in divisions.items()},
    }


def from_json(name: str, data: dict[str, Any]) -> Trace:
    addresses: dict[Any, int] = {}  # by id
    regions = []
    for item in data["initial"]:
        region = Region(
            address=item["base"], size=item["size"], stream=item["stream"], small=item["small"]
        )
        for id_, offset, requested in item["live"]:
            addresses[id_] = region.address + offset
            region.live[addresses[id_]] = (None, requested)
        regions.append(region)
    events = []
    for kind, *values in data["events"]:
        if kind == "A":
            id_, requested, address, stream = values
            addresses[id_] = address
            events.append(Event(action="alloc", address=address, size=requested, stream=stream))
        elif kind == "F":
            events.append(Event(action="free", address=addresses.pop(values[0])))
        else:
            action = {"S+": "segment_alloc", "S-": "segment_free"}[kind]
            events.append(Event(action=action, address=values[0], size=values[1]))
    stated = data.get("expected", {})
    keys = {
        "init_reserved": "reserved at the start",
        "peak_reserved_actual": "peak reserved",
        "final_reserved_actual": "reserved at the end",
        "final_alloc_actual": "allocated at the end",
    }
    return Trace(
        name=name,
        regions=regions,
        events=events,
        settings=allocator_settings(data.get("allocator_settings", {})),
        expected={label: stated[key] for key, label in keys.items() if key in stated},
    )


def from_snapshot(name: str, data: dict[str, Any]) -> list[Trace]:
    """A trace of each device that has events; the state at their start is worked out backwards."""
    traces = []
    settings = allocator_settings(data.get("allocator_settings", {}))
    for device, recorded in enumerate(data["device_traces"]):
        segments = [segment for segment in data["segments"] if segment["device"] == device]
        if not recorded:
            continue
        if any(tuple(segment.get("segment_pool_id", (0, 0))) != (0, 0) for segment in segments):
            raise TraceError("it has private pools (CUDA graphs), which are not simulated")
        events = list(_snapshot_events(recorded))
        past = _Past(segments)
        for event in reversed(events):
            past.undo(event)
        blocks = [block for segment in segments for block in segment["blocks"]]
        allocated = sum(block["size"] for block in blocks if block["state"] != "inactive")
        traces.append(
            Trace(
                name=f"{name}:{device}",
                regions=past.regions(),
                events=events,
                settings=settings,
                expected={"allocated at the end": allocated},
            )
        )
    if not traces:
        raise TraceError("it has no events: record them with _record_memory_history()")
    return traces


def _snapshot_events(recorded: list[dict[str, Any]]) -> Iterator[Event]:
    """Up to the moment of which the segments are. A block is free once its free is completed."""
    snapshots = [i for i, entry in enumerate(recorded) if entry["action"] == "snapshot"]
    entries = recorded[: snapshots[-1] if snapshots else None]
    # A recording can be told to leave one of the two out.
    completed = any(entry["action"] == "free_completed" for entry in entries)
    freed = "free_completed" if completed else "free_requested"
    for entry in entries:
        action = "free" if entry["action"] == freed else entry["action"]
        if action in ("alloc", "free", *GROWTH, *SHRINKAGE):
            yield Event(
                action=action, address=entry["addr"], size=entry["size"], stream=entry["stream"]
            )


class _Past:
    """The state of a snapshot, which `undo` takes back event by event."""

    def __init__(self, segments: Iterable[dict[str, Any]]) -> None:
        self.fixed: dict[int, Region] = {}  # by address
        self.pages: dict[int, tuple[int, bool]] = {}  # of expandable segments: (stream, small)
        self.live: dict[int, tuple[int | None, int]] = {}
        for segment in segments:
            self._add(segment)

    def _add(self, segment: dict[str, Any]) -> None:
        small = segment["segment_type"] == "small"
        address, size, stream = segment["address"], segment["total_size"], segment["stream"]
        if segment.get("is_expandable", False):
            self._map(address, size, stream, small)
        else:
            self.fixed[address] = Region(address=address, size=size, stream=stream, small=small)
        for block in segment["blocks"]:
            if block["state"] != "inactive":
                self.live[address] = (block["size"], block.get("requested_size", block["size"]))
            address += block["size"]

    def _map(self, address: int, size: int, stream: int, small: bool) -> None:
        for page in range(address, address + size, PAGE):
            self.pages[page] = (stream, small)

    def undo(self, event: Event) -> None:
        address, size = event.address, event.size
        try:
            if event.action == "alloc":
                del self.live[address]
            elif event.action == "free":
                self.live[address] = (None, size)
            elif event.action == "segment_alloc":
                del self.fixed[address]
            elif event.action == "segment_free":
                small = size == SMALL_SEGMENT
                self.fixed[address] = Region(
                    address=address, size=size, stream=event.stream, small=small
                )
            elif event.action == "segment_map":
                for page in range(address, address + size, PAGE):
                    del self.pages[page]
            else:
                self._map(address, size, event.stream, size % (10 * PAGE) != 0)
        except KeyError as error:
            raise TraceError(
                f"events and segments disagree: nothing at {address:#x} could come from a "
                f"{event.action} of {size} bytes"
            ) from error

    def regions(self) -> list[Region]:
        found = list(self.fixed.values())
        for page, (stream, small) in sorted(self.pages.items()):
            last = found[-1] if found else None
            if last and last.expandable and last.continues(page, stream, small):
                last.size += PAGE
            else:
                found.append(
                    Region(address=page, size=PAGE, stream=stream, small=small, expandable=True)
                )
        found.sort(key=lambda region: region.address)
        starts = [region.address for region in found]
        for address, block in self.live.items():
            found[bisect_right(starts, address) - 1].live[address] = block
        return found


# The state at the start ---------------------------------------------------------------------


def initial_segments(trace: Trace) -> list[Segment]:
    later = _first_starts_behind(trace)
    return [_segment(region, later, trace.settings) for region in trace.regions]


def _first_starts_behind(trace: Trace) -> dict[int, int]:
    """Address of a block live at the start -> where the block that is put behind it begins."""
    starts = sorted(address for region in trace.regions for address in region.live)
    waiting = set(starts)
    found: dict[int, int] = {}
    for event in trace.events:
        if event.action == "free":
            waiting.discard(event.address)
        elif event.action == "alloc" and starts:
            before = starts[bisect_right(starts, event.address) - 1]
            if before in waiting and before < event.address:
                found[before] = min(event.address, found.get(before, event.address))
    return found


def _segment(region: Region, later: dict[int, int], settings: dict[str, Any]) -> Segment:
    blocks, position, end = [], region.address, region.address + region.size
    live = sorted(region.live.items())
    for i, (address, (size, requested)) in enumerate(live):
        if address > position:
            blocks.append(_free_block(position, address))
        if size is None:
            following = live[i + 1][0] if i + 1 < len(live) else end
            room = min(following, later.get(address, end), end) - address
            size = _block_size(region, room, requested, settings)
        blocks.append(Block(address=address, size=size, requested=requested, allocated=True))
        position = address + size
    if end > position:
        blocks.append(_free_block(position, end))
    return Segment(
        address=region.address,
        size=region.size,
        stream=region.stream,
        pool="small" if region.small else "large",
        blocks=tuple(blocks),
        expandable=region.expandable,
    )


def _block_size(region: Region, room: int, requested: int, settings: dict[str, Any]) -> int:
    """The size of a block for a request, where `room` is up to the next block that is known.

    A large block keeps what is too little to be split off, and one of max_split_size keeps all.
    """
    divisions = division_table(settings["roundup_power2_divisions"]) or (0,) * 16
    size = max(SMALLEST_BLOCK, round_request(requested, divisions))
    if region.small or region.expandable:
        return size
    oversize = settings["max_split_size"] is not None and size >= settings["max_split_size"]
    return room if oversize or room - size <= SMALL_LIMIT else size


def _free_block(start: int, end: int) -> Block:
    return Block(address=start, size=end - start, requested=0, allocated=False)


# Replaying ----------------------------------------------------------------------------------


class _Card:
    """Stands in for the driver: gives the recorded addresses, and compares what is asked for."""

    def __init__(self) -> None:
        self.recorded: list[Event] = []  # what happened to segments since the last block
        self.predicted: list[tuple[str, int, int]] = []
        self.elsewhere = 2**60

    def next_address(self, size: int) -> int:
        taken = {address for _, address, _ in self.predicted}
        for event in self.recorded:
            fits = event.action == "segment_alloc" and event.size == size
            if event.address not in taken and (fits or event.action == "segment_map"):
                return event.address
        self.elsewhere += size + PAGE
        return self.elsewhere - size

    def on_segment(self, action: str, address: int, size: int, stream: int) -> None:
        self.predicted.append((action, address, size))

    def compare(self, result: Result) -> None:
        recorded = Counter((event.action, event.address, event.size) for event in self.recorded)
        right = (recorded & Counter(self.predicted)).total()
        result.segments += len(self.recorded)
        result.segments_right += right
        result.segments_extra += len(self.predicted) - right
        self.recorded.clear()
        self.predicted.clear()


def replay(trace: Trace) -> Result:
    began = time.perf_counter()
    card, result = _Card(), Result(name=trace.name, events=len(trace.events))
    allocator = CachingAllocator(
        segments=initial_segments(trace),
        next_address=card.next_address,
        on_segment=card.on_segment,
        **trace.settings,
    )
    start = allocator.reserved_bytes
    addresses = {address: address for region in trace.regions for address in region.live}
    shrinking = False
    for event in trace.events:
        if event.action == "alloc":
            address = allocator.malloc(event.size, event.stream)
            addresses[event.address] = address
            result.allocations += 1
            result.same_address += address == event.address
            card.compare(result)
        elif event.action == "free":
            allocator.free(addresses.pop(event.address))
        else:
            card.recorded.append(event)
            if event.action in SHRINKAGE and not shrinking:
                allocator.empty_cache()
        shrinking = event.action in SHRINKAGE
    card.compare(result)
    recorded = recorded_bytes(trace)
    predicted = {
        "reserved at the start": start,
        "peak reserved": allocator.peak_reserved_bytes,
        "reserved at the end": allocator.reserved_bytes,
        "allocated at the end": allocator.allocated_bytes,
    }
    result.reserved = {key: (predicted[key], recorded[key]) for key in predicted if key in recorded}
    result.seconds = time.perf_counter() - began
    return result


def recorded_bytes(trace: Trace) -> dict[str, int]:
    """What was reserved on the card, by its events; what the file states goes before that."""
    start = now = peak = sum(region.size for region in trace.regions)
    for event in trace.events:
        if event.action in GROWTH:
            now += event.size
            peak = max(peak, now)
        elif event.action in SHRINKAGE:
            now -= event.size
    counted = {
        "reserved at the start": start,
        "peak reserved": peak,
        "reserved at the end": now,
    }
    return counted | trace.expected


def table(results: list[Result]) -> str:
    lines = []
    for result in results:
        share = result.same_address / max(1, result.allocations)
        lines += [
            f"{result.name}: {'exact' if result.exact else 'DIFFERS'}"
            f" ({result.events} events in {result.seconds:.2f} s)",
            f"  {'allocations':24}{result.allocations:>16}",
            f"  {'at the same address':24}{result.same_address:>16}  {share:.2%}",
            f"  {'segments right':24}{result.segments_right:>16}  of {result.segments}"
            + (f", and {result.segments_extra} that did not happen" * bool(result.segments_extra)),
        ]
        for key, (predicted, recorded) in result.reserved.items():
            note = "" if predicted == recorded else f", recorded {recorded:,}"
            lines.append(f"  {key:24}{predicted:>16,}{note}")
    return "\n".join(lines)


@click.command(help=(__doc__ or "").partition("\n")[0])
@click.argument(
    "files",
    nargs=-1,
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
)
def main(files: tuple[Path, ...]) -> None:
    """Replay, print, and say by the exit code whether all is the same."""
    try:
        traces = [trace for path in files for trace in read_traces(path)]
        results = [replay(trace) for trace in traces]
    except TraceError as error:
        raise click.ClickException(str(error)) from error
    click.echo(table(results))
    if not all(result.exact for result in results):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
