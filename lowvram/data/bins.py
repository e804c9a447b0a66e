"""Best-fit-decreasing bin packing of many items of few sizes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]


class Bins:
    """Open bins by the room that is left in them."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.count = 0
        self.by_room: list[list[Int64]] = [[] for _ in range(capacity + 1)]
        self.open = np.zeros(capacity + 1, np.int64)  # how many bins by_room[room] holds

    def new(self, count: int) -> Int64:
        bins = np.arange(self.count, self.count + count)
        self.count += count
        return bins

    def put(self, bins: Int64, room: int) -> None:
        if len(bins):
            self.by_room[room].append(bins)
            self.open[room] += len(bins)

    def take(self, room: int, count: int) -> Int64:
        """At most `count` of the bins with this much room."""
        taken: list[Int64] = []
        while count and self.by_room[room]:
            bins = self.by_room[room].pop()
            if len(bins) > count:
                self.by_room[room].append(bins[count:])
                bins = bins[:count]
            taken.append(bins)
            count -= len(bins)
        found = np.concatenate(taken) if taken else np.empty(0, np.int64)
        self.open[room] -= len(found)
        return found

    def fill(self, bins: Int64, room: int, size: int, items: int) -> Int64:
        """Put `items` items of a size into bins with this much room, each bin as full as it gets;
        returns the bin of each item."""
        each = room // size
        full, rest = divmod(items, each)
        self.put(bins[:full], room - each * size)
        self.put(bins[full : full + 1], room - rest * size)
        return np.repeat(bins, each)[:items]


def best_fit(sizes: Int64, capacity: int) -> Int64:
    """The bin, from 0, of each item; sizes are from 1 to capacity.

    Best fit decreasing: the largest item first, each into the bin with the least room that is
    enough. Items of one size are all alike, and a bin that takes one of them stays the best for the
    next as long as that fits; so whole groups of bins are filled at once. Beyond the sorting this
    takes time for each size that occurs and each room that it meets, not for each item.
    """
    order = np.argsort(-sizes, kind="stable")
    bins = Bins(capacity)
    found = np.empty(len(sizes), np.int64)
    counts = np.bincount(sizes, minlength=capacity + 1)
    position = 0
    for size in np.flatnonzero(counts)[::-1].tolist():
        items = int(counts[size])
        for part in place(bins, size, items):
            found[order[position : position + len(part)]] = part
            position += len(part)
    return found


def place(bins: Bins, size: int, items: int) -> list[Int64]:
    """The bins of `items` items of one size."""
    placed = []
    for room in (np.flatnonzero(bins.open[size:]) + size).tolist():
        if not items:
            break
        chosen = bins.take(room, -(-items // (room // size)))
        used = min(items, len(chosen) * (room // size))
        placed.append(bins.fill(chosen, room, size, used))
        items -= used
    if items:
        chosen = bins.new(-(-items // (bins.capacity // size)))
        placed.append(bins.fill(chosen, bins.capacity, size, items))
    return placed
