"""Chunks of device memory, the free ones of a pool in best-fit order, and the driver below them.

What the allocator keeps its books with. The rules (what is rounded, split, released) are in
`allocator`, and those of segments that grow in `expandable`.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable
from typing import Literal

from lowvram.memory.sizes import SEGMENT_STEP, up_to_multiple

SegmentAction = Literal["segment_alloc", "segment_free", "segment_map", "segment_unmap"]
OnSegment = Callable[[SegmentAction, int, int, int], None]
"""(what happened, address, size in bytes, stream): what PyTorch's traces call these events."""

# A size above an address: as integers, such keys sort by size and then by address, and compare
# faster than tuples.
KEY_SHIFT = 64


class Chunk:
    """A piece of a segment: handed out, free, or an address range with no memory behind it.

    The chunks of a segment are linked in order of address and leave no gaps. `base` is where the
    address range of an expandable segment begins, and None in others.
    """

    __slots__ = (
        "address",
        "base",
        "born",
        "free",
        "mapped",
        "next",
        "pool",
        "previous",
        "requested",
        "size",
    )

    def __init__(self, address: int, size: int, pool: Pool, base: int | None = None) -> None:
        self.address = address
        self.size = size
        self.requested = 0
        self.free = False  # in the pool's list of free chunks
        self.mapped = True
        self.base = base
        self.previous: Chunk | None = None
        self.next: Chunk | None = None
        self.pool = pool
        self.born = 0  # how many searches there had been when it was freed; whole segments only

    def twin(self, pool: Pool) -> Chunk:
        """The same chunk of another pool, without neighbours."""
        twin = Chunk(self.address, self.size, pool, self.base)
        twin.requested, twin.free, twin.mapped = self.requested, self.free, self.mapped
        twin.born = self.born
        return twin

    @property
    def whole(self) -> bool:
        """Whether it is all of a segment, and not of an expandable one."""
        return self.previous is None and self.next is None and self.base is None

    def split(self, size: int) -> Chunk:
        """Keep the first `size` bytes; returns the chunk of the others, which comes next."""
        tail = Chunk(self.address + size, self.size - size, self.pool, self.base)
        tail.mapped = self.mapped
        self.size = size
        tail.previous = self
        tail.next = following = self.next
        self.next = tail
        if following is not None:
            following.previous = tail
        return tail

    def absorb_next(self) -> None:
        """Take over the bytes of the next chunk, which is then no more."""
        gone = self.next
        assert gone is not None
        self.size += gone.size
        self.next = following = gone.next
        if following is not None:
            following.previous = self


class Pool:
    """The free chunks of one size class on one stream, smallest first, then lowest address."""

    __slots__ = ("small", "stream", "keys", "free", "unmapped")

    def __init__(self, small: bool, stream: int) -> None:
        self.small = small
        self.stream = stream
        self.keys: list[int] = []
        self.free: dict[int, Chunk] = {}  # by key
        self.unmapped: list[Chunk] = []  # by address; expandable segments only

    def add(self, chunk: Chunk) -> None:
        key = chunk.size << KEY_SHIFT | chunk.address
        insort(self.keys, key)
        self.free[key] = chunk
        chunk.free = True

    def remove(self, chunk: Chunk) -> None:
        key = chunk.size << KEY_SHIFT | chunk.address
        keys = self.keys
        del keys[bisect_left(keys, key)]
        del self.free[key]
        chunk.free = False

    def put(self, chunk: Chunk) -> Chunk:
        """Add a chunk, merged with free neighbours; returns what is then in the list."""
        previous, following = chunk.previous, chunk.next
        if following is not None and following.free:
            self.remove(following)
            chunk.absorb_next()
        if previous is not None and previous.free:
            self.remove(previous)
            previous.absorb_next()
            chunk = previous
        self.add(chunk)
        return chunk

    def in_order(self) -> list[Chunk]:
        return [self.free[key] for key in self.keys]


class Driver:
    """What cudaMalloc, cudaFree and their like for address ranges would do: addresses and counts.

    `next_address(size)` answers with the address of a new segment. Without it they grow from
    2**40 on in steps of 2 MiB, with a gap behind each segment.
    """

    __slots__ = ("total_bytes", "next_address", "on_segment", "reserved_bytes", "peak_bytes", "top")

    def __init__(
        self,
        total_bytes: int | None,
        next_address: Callable[[int], int] | None,
        on_segment: OnSegment | None,
    ) -> None:
        self.total_bytes = total_bytes
        self.next_address = next_address
        self.on_segment = on_segment
        self.reserved_bytes = 0
        self.peak_bytes = 0
        self.top = 2**40

    def range(self, size: int) -> int:
        """The address of a new address range of `size` bytes."""
        if self.next_address is not None:
            return self.next_address(size)
        address = self.top
        self._keep_clear(address + size)
        return address

    def adopt(self, address: int, size: int) -> None:
        """Count a segment that was there before."""
        self.reserved_bytes += size
        self._keep_clear(address + size)

    def malloc(self, size: int, stream: int) -> int | None:
        """The address of a new segment, or None where memory ends."""
        if not self._has(size):
            return None
        address = self.range(size)
        self._count("segment_alloc", address, size, stream)
        return address

    def free(self, chunk: Chunk) -> None:
        self._count("segment_free", chunk.address, -chunk.size, chunk.pool.stream)

    def map(self, address: int, size: int, stream: int) -> bool:
        """Put memory behind a range; False, and nothing is done, where memory ends."""
        if not self._has(size):
            return False
        self._count("segment_map", address, size, stream)
        return True

    def unmap(self, address: int, size: int, stream: int) -> None:
        self._count("segment_unmap", address, -size, stream)

    def _keep_clear(self, end: int) -> None:
        self.top = max(self.top, up_to_multiple(end, SEGMENT_STEP) + SEGMENT_STEP)

    def _has(self, size: int) -> bool:
        return self.total_bytes is None or self.reserved_bytes + size <= self.total_bytes

    def _count(self, action: SegmentAction, address: int, change: int, stream: int) -> None:
        self.reserved_bytes += change
        self.peak_bytes = max(self.peak_bytes, self.reserved_bytes)
        if self.on_segment is not None:
            self.on_segment(action, address, abs(change), stream)

    def copy(self, on_segment: OnSegment | None) -> Driver:
        other = Driver(self.total_bytes, self.next_address, on_segment)
        other.reserved_bytes = self.reserved_bytes
        other.peak_bytes = self.peak_bytes
        other.top = self.top
        return other
