"""Memory over a run, in as many points as a picture has room for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from lowvram.memory.snapshot import failure_event
from lowvram.memory.trace import CATEGORIES, Category, MemoryTrace

_POINTS = 4000


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """Bytes after each of `events`; those of the categories add up to what is allocated."""

    events: list[int]
    by_category: dict[Category, list[int]]
    """In full blocks, as the allocator hands them out."""
    reserved: list[int]


def timeline(trace: MemoryTrace, points: int = _POINTS) -> Timeline:
    """At about `points` events, or at all where there are fewer, the peaks among them."""
    events = _kept(trace, points)
    series: dict[Category, list[int]] = {category: [] for category in CATEGORIES}
    live = dict.fromkeys(CATEGORIES, 0)
    categories = [trace.category(block) for block in trace.blocks]
    before = start = 0
    for kept in events:
        for event in range(start, kept + 1):
            after = trace.allocated_bytes[event]
            if after != before:  # a block came or went
                live[categories[trace.events[event][1]]] += after - before
            before = after
        start = kept + 1
        for category, size in live.items():
            series[category].append(size)
    reserved = [trace.reserved_bytes[event] for event in events]
    return Timeline(events=events, by_category=series, reserved=reserved)


def _count(trace: MemoryTrace) -> int:
    """Of events that tell something: not those after memory ran out."""
    return failure_event(trace) or len(trace.events)


def _kept(trace: MemoryTrace, points: int) -> list[int]:
    count = _count(trace)
    if count <= points:
        return list(range(count))
    allocated, reserved = trace.allocated_bytes.__getitem__, trace.reserved_bytes.__getitem__
    kept = {count - 1, *(step.first_event for step in trace.steps if step.first_event < count)}
    buckets = max(1, points // 4)
    for bucket in range(buckets):
        events = range(count * bucket // buckets, count * (bucket + 1) // buckets)
        kept |= {events[0], max(events, key=allocated), min(events, key=allocated)}
        kept.add(max(events, key=reserved))
    return sorted(kept)


@dataclass(frozen=True, kw_only=True)
class Section:
    """Events from `first` up to, not including, `end`, of one phase of a step."""

    first: int
    end: int
    step: int
    """Counted from 1; 0 while building."""
    phase: str


def sections(trace: MemoryTrace) -> list[Section]:
    """One after the other, without gaps; what is recomputed is part of the backward pass."""
    starts = [0, *(step.first_event for step in trace.steps)]
    ends = [*starts[1:], _count(trace)]
    found: list[Section] = []
    for step, (first, end) in enumerate(zip(starts, ends, strict=True)):
        if first < end:
            found += _sections_of_step(trace, step, first, end)
    return found


def _sections_of_step(trace: MemoryTrace, step: int, first: int, end: int) -> Iterator[Section]:
    begin, last = first, ""
    for event in range(first, end):
        kind, number, *_ = trace.events[event]
        if kind != "A":
            continue
        block = trace.blocks[number]
        phase = "backward" if block.phase == "recompute" else block.phase
        if last and phase == "forward" and not block.module:
            continue  # a clipping of gradients or the like: it belongs to what came before
        if last and phase != last:
            yield Section(first=begin, end=event, step=step, phase=last)
            begin = event
        last = phase
    yield Section(first=begin, end=end, step=step, phase=last or "forward")


class Axis:
    """Places from 0 to 1 in order of events, on which each section is wide enough to be seen."""

    def __init__(self, parts: Sequence[Section]) -> None:
        self.parts = parts
        least = min(0.05, 0.5 / len(parts))
        self.edges = [0.0]
        for part in parts:
            share = (part.end - part.first) / parts[-1].end
            self.edges.append(self.edges[-1] + least + (1 - least * len(parts)) * share)

    def places(self, events: Iterable[int]) -> Iterator[float]:
        """Of events in ascending order."""
        i = 0
        for event in events:
            while event >= self.parts[i].end:
                i += 1
            part, left, right = self.parts[i], self.edges[i], self.edges[i + 1]
            yield left + (right - left) * (event - part.first) / (part.end - part.first)

    def phases(self) -> Iterator[tuple[float, float, str]]:
        """(left, right, phase)"""
        for part, left, right in zip(self.parts, self.edges, self.edges[1:], strict=False):
            yield left, right, part.phase

    def steps(self) -> Iterator[tuple[float, float, int]]:
        """(left, right, step)"""
        for step in sorted({part.step for part in self.parts}):
            own = [i for i, part in enumerate(self.parts) if part.step == step]
            yield self.edges[own[0]], self.edges[own[-1] + 1], step
