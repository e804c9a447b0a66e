"""PyTorch's native CUDA caching allocator, in pure Python: which request lands where.

Fed with the same requests in the same order as on a card, it puts every block at the same place
and so reserves the same memory. The rules are those of c10/cuda/CUDACachingAllocator.cpp, the
same from torch 2.3 to 2.13, with the settings of PYTORCH_ALLOC_CONF. Not simulated: blocks that
another stream still uses (record_stream), private pools (CUDA graphs), more than one device.

    allocator = CachingAllocator(11 * 2**30)
    address = allocator.malloc(4 * 768)
    allocator.free(address)
    allocator.peak_reserved_bytes

All sizes are in bytes. This module must not need torch.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping

from lowvram.memory import expandable
from lowvram.memory.out_of_memory import OutOfMemory
from lowvram.memory.pool import KEY_SHIFT, Chunk, Driver, OnSegment, Pool
from lowvram.memory.segments import Block, Segment, check_blocks, snapshot
from lowvram.memory.sizes import (
    LARGE_SEGMENT,
    OWN_SEGMENT_FROM,
    SMALL_LIMIT,
    SMALL_SEGMENT,
    SMALLEST_BLOCK,
    division_table,
    round_request,
    segment_size,
    up_to_multiple,
)

__all__ = ["Block", "CachingAllocator", "OutOfMemory", "Segment"]

_UNKNOWN_CARD = 2**40  # for address ranges of expandable segments, where no capacity is given


class CachingAllocator:
    """The allocator of one device.

    `total_bytes` is what cudaMalloc can hand out in all; None has no end. `capacity_bytes` is
    what the card has in all, `total_bytes` if not given: it counts for `memory_fraction`, for the
    ranges of expandable segments, and in the text of an error. `memory_fraction` (of it) or
    `limit_bytes` do what torch.cuda.set_per_process_memory_fraction does; only with one of them
    is `garbage_collection_threshold` of effect, as in PyTorch.

    `roundup_power2_divisions` is one number, or numbers by size in MiB with ">" for the rest:
    {256: 1, 512: 2, ">": 4} is PyTorch's [256:1,512:2,>:4].

    It starts with `segments`, live blocks included. `next_address(size)` chooses where the next
    segment lies (or the address range of an expandable one), and `on_segment` hears of every
    segment that comes or goes. A ValueError names a setting that PyTorch would refuse.
    """

    def __init__(  # noqa: PLR0913 - PyTorch's settings, one parameter each
        self,
        total_bytes: int | None = None,
        *,
        capacity_bytes: int | None = None,
        memory_fraction: float | None = None,
        limit_bytes: int | None = None,
        max_split_size: int | None = None,
        large_segment_size: int = LARGE_SEGMENT,
        expandable_segments: bool = False,
        roundup_power2_divisions: int | Mapping[int | str, int] = 0,
        garbage_collection_threshold: float = 0.0,
        segments: Iterable[Segment] = (),
        next_address: Callable[[int], int] | None = None,
        on_segment: OnSegment | None = None,
    ) -> None:
        _check_settings(large_segment_size, max_split_size, garbage_collection_threshold)
        self._capacity = total_bytes if capacity_bytes is None else capacity_bytes
        self._limit = _limit(self._capacity, memory_fraction, limit_bytes)
        self._max_split = max_split_size
        self._large_segment = large_segment_size
        self._expandable = expandable_segments
        self._divisions = division_table(roundup_power2_divisions)
        self._gc_bytes: int | None = None  # reserved bytes from which it collects
        if garbage_collection_threshold and self._limit is not None:
            self._gc_bytes = int(garbage_collection_threshold * self._limit)
        self._plain_fit = not expandable_segments and max_split_size is None
        self._range_bytes = (self._capacity or _UNKNOWN_CARD) * 9 // 8
        self._searches = 0  # in large pools; the clock that ages are measured with
        self._driver = Driver(total_bytes, next_address, on_segment)
        self._small: dict[int, Pool] = {}  # by stream
        self._large: dict[int, Pool] = {}
        self._live: dict[int, Chunk] = {}  # by address
        self._allocated = self._peak_allocated = 0
        self._requested = self._peak_requested = 0
        self._restore(segments)
        self.reset_peaks()

    def malloc(self, size: int, stream: int = 0) -> int:
        """The address of a new block; 0 for no bytes. Raises OutOfMemory where none fits."""
        if size <= 0:
            if size == 0:
                return 0
            raise ValueError(f"cannot allocate {size} bytes")
        if self._divisions is None:
            rounded = (size + 511) // 512 * 512
        else:
            rounded = round_request(size, self._divisions)
        pools = self._small if rounded <= SMALL_LIMIT else self._large
        pool = pools.get(stream) or self._open_pool(pools, stream)
        chunk = self._best_fit(pool, rounded) or self._grow(pool, rounded, size)
        rest = chunk.size - rounded
        if rest and self._should_split(pool.small, rounded, rest):
            pool.add(chunk.split(rounded))
        self._take(chunk, size)
        return chunk.address

    def free(self, address: int) -> None:
        """Give a block back to its pool; address 0 is the null pointer, and nothing happens."""
        chunk = self._live.pop(address, None)
        if chunk is None:
            if address == 0:
                return
            raise ValueError(f"cannot free {address:#x}: no block begins there")
        self._requested -= chunk.requested
        self._allocated -= chunk.size
        chunk.requested = 0
        chunk.pool.put(chunk).born = self._searches

    def empty_cache(self) -> None:
        """Return to the driver every segment, or handle of an expandable one, that is all free."""
        for pool in self._pools():
            for chunk in pool.in_order():
                if chunk.whole:
                    self._release(chunk)
            expandable.release(pool, self._driver, self._handle_bytes(pool))

    @property
    def reserved_bytes(self) -> int:
        """Memory of all segments."""
        return self._driver.reserved_bytes

    @property
    def allocated_bytes(self) -> int:
        """Blocks handed out, in their full size."""
        return self._allocated

    @property
    def requested_bytes(self) -> int:
        """Blocks handed out, in the size that was asked for."""
        return self._requested

    @property
    def peak_reserved_bytes(self) -> int:
        return self._driver.peak_bytes

    @property
    def peak_allocated_bytes(self) -> int:
        return self._peak_allocated

    @property
    def peak_requested_bytes(self) -> int:
        return self._peak_requested

    def reset_peaks(self) -> None:
        self._driver.peak_bytes = self._driver.reserved_bytes
        self._peak_allocated = self._allocated
        self._peak_requested = self._requested

    @property
    def segments(self) -> list[Segment]:
        """All segments, from the lowest address to the highest."""
        return snapshot(self._chunks())

    def copy(self, *, on_segment: OnSegment | None = None) -> CachingAllocator:
        """An allocator in the same state that goes its own way from here.

        It reports to `on_segment` of its own, and asks the same `next_address`, if there is one.
        """
        other = object.__new__(CachingAllocator)
        other.__dict__.update(self.__dict__)
        other._driver = self._driver.copy(on_segment)
        other._small = {stream: Pool(True, stream) for stream in self._small}
        other._large = {stream: Pool(False, stream) for stream in self._large}
        twins: dict[int, Chunk] = {}
        for chunk in self._chunks():
            pools = other._small if chunk.pool.small else other._large
            twins[chunk.address] = chunk.twin(pools[chunk.pool.stream])
        for chunk in self._chunks():
            if chunk.next is not None:
                first, second = twins[chunk.address], twins[chunk.next.address]
                first.next, second.previous = second, first
        other._live = {address: twins[address] for address in self._live}
        for mine, theirs in zip(self._pools(), other._pools(), strict=True):
            theirs.keys = mine.keys.copy()
            theirs.free = {key: twins[chunk.address] for key, chunk in mine.free.items()}
            theirs.unmapped = [twins[chunk.address] for chunk in mine.unmapped]
        return other

    def _pools(self) -> list[Pool]:
        """In the order in which PyTorch empties them: large ones first, then by stream."""
        return [pools[stream] for pools in (self._large, self._small) for stream in sorted(pools)]

    def _chunks(self) -> Iterator[Chunk]:
        yield from self._live.values()
        for pool in self._pools():
            yield from pool.free.values()
            yield from pool.unmapped

    def _take(self, chunk: Chunk, requested: int) -> None:
        """Hand it out."""
        chunk.requested = requested
        self._live[chunk.address] = chunk
        self._requested += requested
        if self._requested > self._peak_requested:
            self._peak_requested = self._requested
        self._allocated += chunk.size
        if self._allocated > self._peak_allocated:
            self._peak_allocated = self._allocated

    def _open_pool(self, pools: dict[int, Pool], stream: int) -> Pool:
        return pools.setdefault(stream, Pool(pools is self._small, stream))

    def _handle_bytes(self, pool: Pool) -> int:
        """The unit in which memory is put behind an expandable segment."""
        return SMALL_SEGMENT if pool.small else self._large_segment

    def _best_fit(self, pool: Pool, rounded: int) -> Chunk | None:
        """The smallest free chunk that is large enough, taken from the pool."""
        if not pool.small:
            self._searches += 1
        keys = pool.keys
        index = bisect_left(keys, rounded << KEY_SHIFT)
        if index == len(keys):
            return None
        if not self._plain_fit:
            index = self._least_room(pool, index)
            if self._is_oversize(pool.free[keys[index]].size, rounded):
                return None
        chunk = pool.free.pop(keys.pop(index))
        chunk.free = False
        return chunk

    def _least_room(self, pool: Pool, index: int) -> int:
        """Expandable segments compete with the size that they can grow to."""
        keys, free = pool.keys, pool.free
        while index + 1 < len(keys) and free[keys[index]].base is not None:
            if expandable.room(free[keys[index + 1]]) >= expandable.room(free[keys[index]]):
                break
            index += 1
        return index

    def _is_oversize(self, size: int, rounded: int) -> bool:
        """Whether max_split_size keeps a free chunk of `size` for larger requests than this."""
        if self._max_split is None:
            return False
        if rounded < self._max_split:
            return size >= self._max_split
        # How much may be wasted is max_non_split_rounding_mb; its default is the large segment.
        return size >= rounded + self._large_segment

    def _should_split(self, small: bool, rounded: int, rest: int) -> bool:
        if small or self._expandable:
            return rest >= SMALLEST_BLOCK
        return rest > SMALL_LIMIT and (self._max_split is None or rounded < self._max_split)

    def _grow(self, pool: Pool, rounded: int, requested: int) -> Chunk:
        """New memory for a request that no free chunk serves; the cache is emptied if need be."""
        if self._gc_bytes is not None:
            self._collect_garbage(self._gc_bytes)
        segment_bytes = segment_size(rounded, self._large_segment)
        chunk = self._new_memory(pool, rounded, segment_bytes)
        if chunk is None and self._release_oversize(pool, rounded):
            chunk = self._new_memory(pool, rounded, segment_bytes)
        if chunk is None:
            self.empty_cache()
            chunk = self._new_memory(pool, rounded, segment_bytes)
        if chunk is None:
            raise self._out_of_memory(requested, rounded, segment_bytes)
        return chunk

    def _new_memory(self, pool: Pool, rounded: int, segment_bytes: int) -> Chunk | None:
        if self._limit is not None and self.reserved_bytes + segment_bytes > self._limit:
            return None
        if self._expandable:
            return expandable.allocate(
                pool,
                self._driver,
                rounded,
                handle_bytes=self._handle_bytes(pool),
                range_bytes=self._range_bytes,
            )
        address = self._driver.malloc(segment_bytes, pool.stream)
        return None if address is None else Chunk(address, segment_bytes, pool)

    def _release(self, chunk: Chunk) -> None:
        chunk.pool.remove(chunk)
        self._driver.free(chunk)

    def _release_oversize(self, pool: Pool, rounded: int) -> bool:
        """With max_split_size: free one segment that is large enough, else the largest ones."""
        if self._max_split is None:
            return False
        wanted = max(rounded, self._max_split)
        index = bisect_left(pool.keys, wanted << KEY_SHIFT)
        chunks = pool.in_order()
        if index < len(chunks) and chunks[index].whole:
            self._release(chunks[index])
            return True
        released = 0
        for chunk in reversed(chunks[:index]):
            if released >= wanted or chunk.size < self._max_split:
                break
            if chunk.whole:
                released += chunk.size
                self._release(chunk)
        return released >= wanted

    def _collect_garbage(self, allowed: int) -> None:
        """Free whole segments of the large pools, those of mean age and above first."""
        excess = self.reserved_bytes - allowed
        old = [
            chunk
            for pool in self._pools()
            if not pool.small
            for chunk in pool.in_order()
            if chunk.whole
        ]
        while excess > 0 and old:
            # Ages are counts of searches. The oldest is at or above the mean, so some go.
            mean = sum(self._searches - chunk.born for chunk in old) / len(old)
            young = []
            for chunk in old:
                if self._searches - chunk.born >= mean:
                    excess -= chunk.size
                    self._release(chunk)
                else:
                    young.append(chunk)
            old = young

    def _out_of_memory(self, requested: int, rounded: int, segment_bytes: int) -> OutOfMemory:
        reserved, total = self.reserved_bytes, self._driver.total_bytes
        capacity = self._capacity if self._capacity is not None else self._limit or 0
        return OutOfMemory(
            requested_bytes=requested,
            rounded_bytes=rounded,
            segment_bytes=segment_bytes,
            allocated_bytes=self._allocated,
            reserved_bytes=reserved,
            free_bytes=max(0, (capacity if total is None else total) - reserved),
            capacity_bytes=capacity,
            limit_bytes=self._limit,
        )

    def _restore(self, segments: Iterable[Segment]) -> None:
        """Take over segments with their blocks."""
        for segment in sorted(segments, key=lambda segment: segment.address):
            check_blocks(segment)
            pools = self._small if segment.pool == "small" else self._large
            pool = pools.get(segment.stream) or self._open_pool(pools, segment.stream)
            self._driver.adopt(segment.address, segment.size)
            chunk = self._segment_chunk(segment, pool)
            for block in segment.blocks:
                rest = chunk.split(block.size) if block.size < chunk.size else chunk
                if block.allocated:
                    self._take(chunk, block.requested)
                else:
                    pool.put(chunk)
                chunk = rest

    def _segment_chunk(self, segment: Segment, pool: Pool) -> Chunk:
        if not segment.expandable:
            return Chunk(segment.address, segment.size, pool)
        if not self._expandable:
            raise ValueError(
                f"segment {segment.address:#x} is expandable: set expandable_segments=True"
            )
        range_bytes = up_to_multiple(self._range_bytes, self._handle_bytes(pool))
        return expandable.adopt(pool, segment.address, segment.size, range_bytes)


def _check_settings(large_segment: int, max_split: int | None, gc_threshold: float) -> None:
    if large_segment <= OWN_SEGMENT_FROM:
        raise ValueError(f"large_segment_size is {large_segment}: use more than 10 MiB")
    if max_split is not None and max_split < large_segment:
        raise ValueError(
            f"max_split_size is {max_split}: use at least large_segment_size, {large_segment}"
        )
    if not 0 <= gc_threshold < 1:
        raise ValueError(
            f"garbage_collection_threshold is {gc_threshold}: use a number from 0 up to, "
            "not including, 1"
        )


def _limit(capacity: int | None, fraction: float | None, limit_bytes: int | None) -> int | None:
    """The bytes that may be reserved, by a fraction of the card or as they are given."""
    if fraction is None:
        return limit_bytes
    if limit_bytes is not None:
        raise ValueError("memory_fraction and limit_bytes are both given: choose one")
    if capacity is None:
        raise ValueError("memory_fraction needs capacity_bytes or total_bytes")
    if not 0 <= fraction <= 1:
        raise ValueError(f"memory_fraction is {fraction}: use a number from 0 to 1")
    return int(fraction * capacity)
