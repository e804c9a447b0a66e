"""The simulated CUDA caching allocator: every rule, with numbers worked out by hand.

The rules are those of c10/cuda/CUDACachingAllocator.cpp. Where a test says "torch 2.13 answers",
its numbers were asked of that version's own libc10.
"""

from __future__ import annotations

import pickle
import random
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from lowvram.memory.allocator import Block, CachingAllocator, OutOfMemory, Segment
from lowvram.memory.sizes import format_size

MIB, GIB = 2**20, 2**30

Events = list[tuple[str, int, int, int]]


def recorder(events: Events) -> Callable[[str, int, int, int], None]:
    return lambda *event: events.append(event)


def check(allocator: CachingAllocator) -> None:
    """Blocks fill their segments, free neighbours are merged, and the counts are right."""
    segments = allocator.segments
    for segment, following in pairwise(segments):
        assert segment.address + segment.size <= following.address
    for segment in segments:
        end = segment.address
        for block in segment.blocks:
            assert block.address == end
            assert (block.requested > 0) == block.allocated
            assert block.requested <= block.size
            end += block.size
        assert end == segment.address + segment.size
        for first, second in pairwise(segment.blocks):
            assert first.allocated or second.allocated
    blocks = [block for segment in segments for block in segment.blocks]
    assert allocator.reserved_bytes == sum(segment.size for segment in segments)
    assert allocator.allocated_bytes == sum(block.size for block in blocks if block.allocated)
    assert allocator.requested_bytes == sum(block.requested for block in blocks)
    assert allocator.peak_reserved_bytes >= allocator.reserved_bytes
    assert allocator.peak_allocated_bytes >= allocator.allocated_bytes
    assert allocator.peak_requested_bytes >= allocator.requested_bytes


# Sizes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("requested", "allocated", "reserved"),
    [
        (1, 512, 2 * MIB),
        (512, 512, 2 * MIB),
        (513, 1024, 2 * MIB),
        (MIB, MIB, 2 * MIB),  # the last of the small pool
        (MIB + 1, MIB + 512, 20 * MIB),
        (8_519_680, 8_519_680, 20 * MIB),  # the workspace of cuBLAS
        (10 * MIB - 512, 10 * MIB - 512, 20 * MIB),
        (10 * MIB - 511, 10 * MIB, 10 * MIB),  # rounds up to 10 MiB: a segment of its own
        (10 * MIB + 1, 10 * MIB + 512, 12 * MIB),
        (11 * MIB - 512, 11 * MIB - 512, 12 * MIB),  # 1 MiB + 512 are left: split off
        (11 * MIB, 12 * MIB, 12 * MIB),  # 1 MiB is left: too little
        (25 * MIB, 26 * MIB, 26 * MIB),
    ],
)
def test_sizes(requested: int, allocated: int, reserved: int) -> None:
    allocator = CachingAllocator()
    allocator.malloc(requested)
    assert allocator.requested_bytes == requested
    assert allocator.allocated_bytes == allocated
    assert allocator.reserved_bytes == reserved
    check(allocator)


def test_large_segment_size() -> None:
    allocator = CachingAllocator(large_segment_size=64 * MIB)
    allocator.malloc(2 * MIB)
    assert allocator.reserved_bytes == 64 * MIB
    allocator.malloc(65 * MIB)
    assert allocator.reserved_bytes == (64 + 66) * MIB


@pytest.mark.parametrize(
    ("setting", "requested", "allocated"),
    [
        (4, 1200, 1536),  # 512 * 4 bytes and less go to the next multiple of 512
        (4, 5000, 5120),  # 4096, 5120, 6144, 7168, 8192
        (4, 7169, 8192),
        (4, 8192, 8192),
        (8, 4 * MIB + 1, 4 * MIB + MIB // 2),
        (1, 5000, 5120),
        (0, 5000, 5120),
        # torch 2.13 answers 1 up to 512 MiB, 2 up to 1 GiB, 4 above.
        ({256: 1, 512: 2, ">": 4}, 300 * MIB, 300 * MIB),
        ({256: 1, 512: 2, ">": 4}, 600 * MIB, 768 * MIB),
        ({256: 1, 512: 2, ">": 4}, 1100 * MIB, 1280 * MIB),
        # torch 2.13 answers 2 below 256 MiB, 8 up to 512 MiB, 4 above: ">" is what follows the
        # last entry, which need not be the largest.
        ({512: 2, 256: 8, ">": 4}, 5 * MIB, 6 * MIB),
        ({512: 2, 256: 8, ">": 4}, 257 * MIB, 288 * MIB),
        ({512: 2, 256: 8, ">": 4}, 600 * MIB, 640 * MIB),
        # torch 2.13 answers 0 for [128, 256) MiB: an interval that is left out has none.
        ({64: 8, 256: 4}, 130 * MIB, 130 * MIB),
        ({64: 8, 256: 4}, 3 * MIB + 1, 3 * MIB + MIB // 4),
    ],
)
def test_roundup_power2_divisions(setting: Any, requested: int, allocated: int) -> None:
    allocator = CachingAllocator(roundup_power2_divisions=setting)
    allocator.malloc(requested)
    assert allocator.allocated_bytes == allocated


def test_no_bytes_are_no_block() -> None:
    events: Events = []
    allocator = CachingAllocator(0, on_segment=recorder(events))
    assert allocator.malloc(0) == 0
    allocator.free(0)
    assert allocator.peak_reserved_bytes == 0
    assert events == []


# Which block --------------------------------------------------------------------------------


def test_the_front_is_handed_out_and_the_rest_follows() -> None:
    allocator = CachingAllocator()
    first = allocator.malloc(600)
    assert allocator.malloc(100) == first + 1024
    assert allocator.malloc(512) == first + 1536
    assert allocator.reserved_bytes == 2 * MIB


def test_a_full_segment_is_not_split() -> None:
    allocator = CachingAllocator()
    first = allocator.malloc(MIB)
    second = allocator.malloc(MIB - 512)
    assert second == first + MIB
    assert allocator.malloc(512) == second + MIB - 512  # in the small pool, 512 bytes are enough
    assert [len(segment.blocks) for segment in allocator.segments] == [3]


def test_best_fit_and_the_lowest_address_among_equals() -> None:
    allocator = CachingAllocator()
    sizes = [4096, 512, 2048, 512, 1024, 512, 1024, 512]
    blocks = [allocator.malloc(size) for size in sizes]
    for i in (6, 0, 2, 4):  # the order of the frees does not matter
        allocator.free(blocks[i])
    assert allocator.malloc(600) == blocks[4]
    assert allocator.malloc(600) == blocks[6]
    assert allocator.malloc(600) == blocks[2]
    assert allocator.malloc(512) == blocks[2] + 1024  # the smallest is now what that one left
    assert allocator.malloc(512) == blocks[2] + 1536
    assert allocator.malloc(4096) == blocks[0]


def test_neighbours_are_merged() -> None:
    allocator = CachingAllocator()
    a, b, c, d = (allocator.malloc(3 * MIB) for _ in range(4))
    allocator.free(a)
    allocator.free(c)
    allocator.free(b)  # joins both
    assert [block.size for block in allocator.segments[0].blocks] == [9 * MIB, 3 * MIB, 8 * MIB]
    allocator.free(d)  # and the rest of the segment
    assert [block.size for block in allocator.segments[0].blocks] == [20 * MIB]
    assert allocator.malloc(20 * MIB) == a
    assert allocator.peak_reserved_bytes == 20 * MIB


def test_segments_are_not_merged() -> None:
    addresses = iter((GIB, GIB + 20 * MIB, 4 * GIB))
    allocator = CachingAllocator(next_address=lambda size: next(addresses))
    blocks = [allocator.malloc(20 * MIB) for _ in range(2)]
    assert blocks == [GIB, GIB + 20 * MIB]
    for block in blocks:
        allocator.free(block)
    assert allocator.malloc(40 * MIB) == 4 * GIB


def test_segments_have_a_distance_where_no_addresses_are_given() -> None:
    allocator = CachingAllocator()
    first, second = allocator.malloc(10 * MIB), allocator.malloc(10 * MIB)
    assert first % (2 * MIB) == second % (2 * MIB) == 0
    assert second > first + 10 * MIB


def test_pools_do_not_mix() -> None:
    allocator = CachingAllocator()
    allocator.free(allocator.malloc(2 * MIB))
    allocator.malloc(MIB)
    assert allocator.reserved_bytes == 22 * MIB
    assert [segment.pool for segment in allocator.segments] == ["large", "small"]


def test_streams_do_not_mix() -> None:
    allocator = CachingAllocator()
    allocator.free(allocator.malloc(2 * MIB, stream=1))
    allocator.malloc(2 * MIB, stream=2)
    assert allocator.reserved_bytes == 40 * MIB
    assert [segment.stream for segment in allocator.segments] == [1, 2]


# max_split_size -----------------------------------------------------------------------------


def test_oversize_blocks_are_kept_for_oversize_requests() -> None:
    allocator = CachingAllocator(max_split_size=40 * MIB)
    block = allocator.malloc(65 * MIB)  # 66 MiB, unsplit
    allocator.free(block)
    assert allocator.malloc(39 * MIB) != block
    other = allocator.malloc(46 * MIB)  # 66 is not less than 46 + 20
    assert other != block
    allocator.free(other)
    assert allocator.malloc(46 * MIB + 512) == block
    assert allocator.allocated_bytes == (40 + 66) * MIB  # 39 leave 1 MiB, which is not split off


def test_a_block_of_max_split_size_is_oversize() -> None:
    allocator = CachingAllocator(max_split_size=40 * MIB)
    block = allocator.malloc(40 * MIB)
    allocator.free(block)
    assert allocator.malloc(39 * MIB) != block
    assert allocator.malloc(40 * MIB) == block


def test_below_max_split_size_blocks_are_split() -> None:
    allocator = CachingAllocator(max_split_size=40 * MIB)
    first = allocator.malloc(5 * MIB)
    assert allocator.malloc(5 * MIB) == first + 5 * MIB


def test_one_oversize_segment_is_released_if_it_is_large_enough() -> None:
    events: Events = []
    allocator = CachingAllocator(200 * MIB, max_split_size=40 * MIB, on_segment=recorder(events))
    blocks = [allocator.malloc(size * MIB) for size in (50, 60, 70)]
    for block in blocks:
        allocator.free(block)
    events.clear()
    new = allocator.malloc(30 * MIB)  # 180 + 30 are too much; 50 MiB are the least above 40
    assert events == [
        ("segment_free", blocks[0], 50 * MIB, 0),
        ("segment_alloc", new, 30 * MIB, 0),
    ]


def test_else_the_largest_oversize_segments_are_released_until_it_is_enough() -> None:
    events: Events = []
    allocator = CachingAllocator(200 * MIB, max_split_size=40 * MIB, on_segment=recorder(events))
    blocks = [allocator.malloc(size * MIB) for size in (50, 60, 70)]
    for block in blocks:
        allocator.free(block)
    events.clear()
    allocator.malloc(100 * MIB)
    assert [event[:3] for event in events[:-1]] == [
        ("segment_free", blocks[2], 70 * MIB),
        ("segment_free", blocks[1], 60 * MIB),
    ]
    assert allocator.reserved_bytes == 150 * MIB


# Where memory ends --------------------------------------------------------------------------


def nearly_full(**settings: Any) -> tuple[CachingAllocator, Events]:
    """60 MiB; 42 reserved: a free small segment, a free one of stream 1, and 5 of 20 MiB in use."""
    events: Events = []
    allocator = CachingAllocator(60 * MIB, on_segment=recorder(events), **settings)
    small, other = allocator.malloc(1), allocator.malloc(20 * MIB, stream=1)
    allocator.malloc(5 * MIB)
    allocator.free(small)
    allocator.free(other)
    assert allocator.reserved_bytes == 42 * MIB
    events.clear()
    return allocator, events


def test_all_free_segments_are_released_before_memory_ends() -> None:
    allocator, events = nearly_full()
    allocator.malloc(30 * MIB)
    assert [(action, size, stream) for action, _, size, stream in events] == [
        ("segment_free", 20 * MIB, 1),  # the large pool comes first
        ("segment_free", 2 * MIB, 0),
        ("segment_alloc", 30 * MIB, 0),
    ]
    assert allocator.reserved_bytes == 50 * MIB


def test_what_fits_exactly_fits() -> None:
    allocator = CachingAllocator(30 * MIB)
    allocator.malloc(30 * MIB)
    with pytest.raises(OutOfMemory):
        allocator.malloc(1)


def test_out_of_memory() -> None:
    allocator, _ = nearly_full(capacity_bytes=2 * GIB)
    allocator.malloc(30 * MIB)
    with pytest.raises(OutOfMemory) as caught:
        allocator.malloc(15 * MIB + 1)
    error = caught.value
    assert str(error) == (
        "CUDA out of memory. Tried to allocate 16.00 MiB. GPU 0 has a total capacity of 2.00 GiB "
        "of which 10.00 MiB is free. Including non-PyTorch memory, this process has 1.99 GiB "
        "memory in use. Of the allocated memory 35.00 MiB is allocated by PyTorch, and 15.00 MiB "
        "is reserved by PyTorch but unallocated. If reserved but unallocated memory is large try "
        "setting PYTORCH_ALLOC_CONF=expandable_segments:True to avoid fragmentation.  See "
        "documentation for Memory Management  "
        "(https://pytorch.org/docs/stable/notes/cuda.html#environment-variables)"
    )
    assert error.requested_bytes == 15 * MIB + 1
    assert error.rounded_bytes == 15 * MIB + 512
    assert error.segment_bytes == 16 * MIB
    assert error.allocated_bytes == 35 * MIB
    assert error.reserved_bytes == 50 * MIB
    assert error.free_bytes == 10 * MIB
    assert error.capacity_bytes == 2 * GIB
    assert error.limit_bytes is None
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    check(allocator)
    allocator.malloc(10 * MIB)  # and it goes on


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (1024, "1024 bytes"),
        (1025, "1.00 KiB"),
        (MIB, "1024.00 KiB"),
        (20 * MIB, "20.00 MiB"),
        (GIB, "1024.00 MiB"),
        (GIB + 1, "1.00 GiB"),
        (12_562_530_304, "11.70 GiB"),
    ],
)
def test_sizes_are_written_as_torch_writes_them(size: int, text: str) -> None:
    """In format_size of c10/cuda/CUDACachingAllocator.cpp, a limit belongs to the unit below it."""
    assert format_size(size) == text


def test_a_failed_request_leaves_the_state_as_it_is_but_for_the_cache() -> None:
    allocator, _ = nearly_full()
    with pytest.raises(OutOfMemory):
        allocator.malloc(50 * MIB)
    assert allocator.reserved_bytes == 20 * MIB
    assert allocator.allocated_bytes == 5 * MIB
    check(allocator)


def test_a_limit_is_a_smaller_card() -> None:
    by_bytes, _ = nearly_full(limit_bytes=50 * MIB)
    by_fraction, _ = nearly_full(capacity_bytes=100 * MIB, memory_fraction=0.5)
    for allocator in (by_bytes, by_fraction):
        allocator.malloc(30 * MIB)
        with pytest.raises(OutOfMemory, match=r"this process has|is free\. 50\.00 MiB allowed; Of"):
            allocator.malloc(1)


def test_empty_cache_keeps_segments_in_use() -> None:
    allocator = CachingAllocator()
    kept = allocator.malloc(MIB)
    allocator.malloc(1)
    for size in (2 * MIB, 24 * MIB):
        allocator.free(allocator.malloc(size, stream=3))
    allocator.free(kept)
    allocator.empty_cache()
    assert allocator.reserved_bytes == 2 * MIB
    assert allocator.peak_reserved_bytes == 46 * MIB


# Garbage collection -------------------------------------------------------------------------


def aged(threshold: float) -> tuple[CachingAllocator, Events, int, int]:
    """60 MiB reserved of 100 that are allowed: 24 in use, 20 free for longer, 16 free for less.

    Ages count searches in the large pool: at the next one, 20 MiB are 2 old and 16 MiB 1.
    """
    events: Events = []
    allocator = CachingAllocator(
        limit_bytes=100 * MIB,
        garbage_collection_threshold=threshold,
        on_segment=recorder(events),
    )
    older, _, younger = (allocator.malloc(size * MIB) for size in (20, 24, 16))
    allocator.free(older)
    allocator.free(younger)
    allocator.free(allocator.malloc(16 * MIB))
    events.clear()
    return allocator, events, older, younger


def test_garbage_collection_takes_the_oldest_first() -> None:
    allocator, events, older, _ = aged(0.5)  # 10 MiB too many
    allocator.malloc(30 * MIB)
    assert [event[:3] for event in events[:-1]] == [("segment_free", older, 20 * MIB)]
    assert allocator.reserved_bytes == 70 * MIB


def test_garbage_collection_goes_on_until_it_is_enough() -> None:
    allocator, events, older, younger = aged(0.35)  # 25 MiB too many
    allocator.malloc(30 * MIB)
    assert [event[1] for event in events[:-1]] == [older, younger]
    assert allocator.reserved_bytes == 54 * MIB


def test_garbage_collection_waits_for_its_threshold_and_for_new_memory() -> None:
    allocator, events, _, _ = aged(0.6)  # 60 MiB are not above it
    allocator.malloc(30 * MIB)
    assert [event[0] for event in events] == ["segment_alloc"]
    allocator, events, _, _ = aged(0.1)
    allocator.malloc(16 * MIB)  # from the cache
    assert events == []


def test_garbage_collection_needs_a_limit() -> None:
    allocator = CachingAllocator(100 * MIB, garbage_collection_threshold=0.1)
    allocator.free(allocator.malloc(40 * MIB))
    allocator.malloc(50 * MIB)
    assert allocator.reserved_bytes == 90 * MIB


# Expandable segments ------------------------------------------------------------------------


def growing(total_mib: int = 100, **settings: Any) -> tuple[CachingAllocator, Events]:
    events: Events = []
    allocator = CachingAllocator(
        total_mib * MIB, expandable_segments=True, on_segment=recorder(events), **settings
    )
    return allocator, events


def test_ranges_are_an_eighth_larger_than_the_card_in_whole_handles() -> None:
    sizes: list[int] = []

    def next_address(size: int) -> int:
        sizes.append(size)
        return GIB * len(sizes)

    allocator, _ = growing(next_address=next_address)
    allocator.malloc(2 * MIB)
    allocator.malloc(1)
    allocator.malloc(1, stream=1)
    assert sizes == [120 * MIB, 114 * MIB, 114 * MIB]  # 112.5 in units of 20 and 2 MiB


def test_only_what_is_missing_is_mapped() -> None:
    allocator, events = growing()
    first = allocator.malloc(5 * MIB)
    assert events == [("segment_map", first, 20 * MIB, 0)]
    assert allocator.malloc(18 * MIB) == first + 5 * MIB  # 15 MiB were free behind it
    assert events[1:] == [("segment_map", first + 20 * MIB, 20 * MIB, 0)]
    # 17 MiB are free: all of them are used, and nothing is too little to be split off.
    assert allocator.malloc(17 * MIB - 512) == first + 23 * MIB
    assert allocator.allocated_bytes == 40 * MIB - 512
    assert [len(segment.blocks) for segment in allocator.segments] == [4]
    small = allocator.malloc(1)
    assert events[2:] == [("segment_map", small, 2 * MIB, 0)]
    check(allocator)


def test_a_chunk_that_can_grow_counts_as_large() -> None:
    allocator, _ = growing()
    first = allocator.malloc(6 * MIB)
    allocator.malloc(9 * MIB)
    allocator.free(first)
    # 6 MiB in the front, 5 MiB at the end: the end would be the better fit if it could not grow.
    assert allocator.malloc(4 * MIB) == first


def test_among_equals_that_cannot_grow_the_lowest_address_is_used() -> None:
    allocator, _ = growing()
    blocks = [allocator.malloc(4 * MIB) for _ in range(5)]
    allocator.free(blocks[3])
    allocator.free(blocks[1])
    assert allocator.malloc(3 * MIB) == blocks[1]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_holes_side_by_side_are_one(order: tuple[int, int]) -> None:
    allocator, _ = growing()
    blocks = [allocator.malloc(20 * MIB) for _ in range(3)]
    for i in order:
        allocator.free(blocks[i])
        allocator.empty_cache()
    assert allocator.malloc(40 * MIB) == blocks[0]
    check(allocator)


def test_whole_handles_are_taken_back() -> None:
    allocator, events = growing()
    first = allocator.malloc(5 * MIB)
    second = allocator.malloc(48 * MIB)  # [5, 53) of 60 MiB
    third = allocator.malloc(2 * MIB)
    allocator.free(second)
    events.clear()
    allocator.empty_cache()
    assert events == [("segment_unmap", first + 20 * MIB, 20 * MIB, 0)]  # of [5, 53) free ones
    assert [(s.address, s.size) for s in allocator.segments] == [
        (first, 20 * MIB),
        (first + 40 * MIB, 20 * MIB),
    ]
    check(allocator)
    # The hole is filled again, with the free 15 MiB before it and the 13 behind it.
    assert allocator.malloc(48 * MIB) == second
    assert allocator.reserved_bytes == 60 * MIB
    for address in (first, second, third):
        allocator.free(address)
    allocator.empty_cache()
    assert allocator.reserved_bytes == 0
    assert allocator.segments == []


def test_the_lowest_room_is_used() -> None:
    allocator, _ = growing()
    blocks = [allocator.malloc(20 * MIB) for _ in range(3)]
    allocator.free(blocks[0])
    allocator.empty_cache()
    assert allocator.reserved_bytes == 40 * MIB
    assert allocator.malloc(30 * MIB) == blocks[2] + 20 * MIB  # too large for the hole
    assert allocator.reserved_bytes == 80 * MIB
    assert allocator.malloc(12 * MIB) == blocks[0]
    assert allocator.reserved_bytes == 100 * MIB
    check(allocator)


def test_handles_of_another_stream_make_room() -> None:
    allocator, _ = growing()
    allocator.free(allocator.malloc(60 * MIB, stream=1))
    allocator.malloc(60 * MIB)
    assert allocator.reserved_bytes == 60 * MIB
    with pytest.raises(OutOfMemory) as caught:
        allocator.malloc(50 * MIB)  # needs three handles
    assert caught.value.free_bytes == 40 * MIB
    allocator.malloc(40 * MIB)


def test_a_limit_counts_segments_even_where_less_would_be_mapped() -> None:
    """PyTorch compares the segment that it would otherwise allocate, here 20 MiB."""
    allocator, _ = growing(limit_bytes=30 * MIB)
    allocator.malloc(15 * MIB)
    with pytest.raises(OutOfMemory):
        allocator.malloc(9 * MIB)


def test_a_request_above_a_range_has_a_range_of_its_own() -> None:
    allocator = CachingAllocator(capacity_bytes=100 * MIB, expandable_segments=True)
    allocator.malloc(300 * MIB)
    assert allocator.reserved_bytes == 300 * MIB


# The whole ----------------------------------------------------------------------------------

SETTINGS: list[dict[str, Any]] = [
    {},
    {"total_bytes": 300 * MIB},
    {"total_bytes": 300 * MIB, "max_split_size": 24 * MIB},
    {"limit_bytes": 300 * MIB, "garbage_collection_threshold": 0.5},
    {"expandable_segments": True},
    {"total_bytes": 300 * MIB, "expandable_segments": True},
    {"roundup_power2_divisions": 4, "large_segment_size": 32 * MIB},
]


def size_at_random(rng: random.Random) -> int:
    top = rng.choice((600, 2**14, MIB, 3 * MIB, 12 * MIB, 40 * MIB))
    return rng.randrange(1, top)


def step(allocator: CachingAllocator, live: list[int], rng: random.Random) -> None:
    if live and rng.random() < len(live) / 40:
        allocator.free(live.pop(rng.randrange(len(live))))
        return
    try:
        live.append(allocator.malloc(size_at_random(rng), stream=rng.choice((0, 0, 7))))
    except OutOfMemory:
        allocator.free(live.pop())


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_books_are_right_whatever_happens(settings: dict[str, Any]) -> None:
    rng = random.Random(3)
    allocator, live = CachingAllocator(**settings), []
    for i in range(600):
        step(allocator, live, rng)
        check(allocator)
        if i % 200 == 150:
            allocator.empty_cache()
            check(allocator)
    starts = {block.address for s in allocator.segments for block in s.blocks if block.allocated}
    assert starts == set(live)
    for address in live:
        allocator.free(address)
    check(allocator)
    assert (allocator.allocated_bytes, allocator.requested_bytes) == (0, 0)
    allocator.empty_cache()
    assert (allocator.reserved_bytes, allocator.segments) == (0, [])


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_copy_goes_its_own_way(settings: dict[str, Any]) -> None:
    rng = random.Random(4)
    events: Events = []
    allocator, live = CachingAllocator(on_segment=recorder(events), **settings), []
    for _ in range(300):
        step(allocator, live, rng)
    before, seen = allocator.segments, len(events)
    twin, twin_live = allocator.copy(), live.copy()
    assert twin.segments == before
    other_rng = random.Random(5)
    for _ in range(300):
        step(twin, twin_live, other_rng)
    check(twin)
    assert (allocator.segments, len(events)) == (before, seen)
    other_rng = random.Random(5)
    for _ in range(300):
        step(allocator, live, other_rng)
    assert live == twin_live
    assert allocator.segments == twin.segments
    assert allocator.peak_reserved_bytes == twin.peak_reserved_bytes
    assert allocator.peak_allocated_bytes == twin.peak_allocated_bytes


def shape(allocator: CachingAllocator) -> list[Any]:
    """The segments in their order, but for where they lie."""
    return [
        (s.size, s.stream, s.pool, s.expandable, [(b.size, b.requested) for b in s.blocks])
        for s in allocator.segments
    ]


@pytest.mark.parametrize("settings", [s for s in SETTINGS if "limit_bytes" not in s], ids=str)
def test_it_can_start_from_segments(settings: dict[str, Any]) -> None:
    """It goes on as the other one does. (Ages, which garbage collection needs, start anew.)"""
    rng = random.Random(6)
    allocator, live = CachingAllocator(**settings), []
    for _ in range(300):
        step(allocator, live, rng)
    other, other_live = CachingAllocator(segments=allocator.segments, **settings), live.copy()
    assert other.segments == allocator.segments
    assert other.peak_allocated_bytes == allocator.allocated_bytes
    rngs = random.Random(7), random.Random(7)
    for _ in range(300):
        step(allocator, live, rngs[0])
        step(other, other_live, rngs[1])
        assert shape(other) == shape(allocator)


def test_new_segments_lie_behind_those_it_started_with() -> None:
    block = Block(address=2**45, size=2 * MIB, requested=MIB, allocated=True)
    segment = Segment(address=2**45, size=2 * MIB, stream=0, pool="small", blocks=(block,))
    allocator = CachingAllocator(segments=[segment])
    assert allocator.malloc(MIB) >= 2**45 + 2 * MIB
    assert allocator.requested_bytes == 2 * MIB


class Naive:
    """The default rules as plainly as they can be put: every search looks at every block."""

    def __init__(self) -> None:
        self.segments: list[tuple[bool, list[list[int]]]] = []  # (small, [[start, size, free]])
        self.top = 2**40

    def malloc(self, size: int) -> int:
        size = -(-size // 512) * 512
        small = size <= MIB
        fitting = [
            (block[1], block[0], i, k)
            for i, (kind, blocks) in enumerate(self.segments)
            for k, block in enumerate(blocks)
            if kind == small and block[2] and block[1] >= size
        ]
        if not fitting:
            step_up = -(-size // (2 * MIB)) * 2 * MIB
            length = 2 * MIB if small else 20 * MIB if size < 10 * MIB else step_up
            self.segments.append((small, [[self.top, length, 1]]))
            self.top += length + 2 * MIB
            return self.malloc(size)
        _, start, i, k = min(fitting)
        block = self.segments[i][1][k]
        rest = block[1] - size
        block[2] = 0
        if rest >= 512 if small else rest > MIB:
            block[1] = size
            self.segments[i][1].insert(k + 1, [start + size, rest, 1])
        return start

    def free(self, start: int) -> None:
        for _, blocks in self.segments:
            for block in blocks:
                if block[0] == start:
                    block[2] = 1
            for k in range(len(blocks) - 1, 0, -1):
                if blocks[k][2] and blocks[k - 1][2]:
                    blocks[k - 1][1] += blocks.pop(k)[1]


@pytest.mark.parametrize("seed", range(4))
def test_it_does_what_the_plain_rules_do(seed: int) -> None:
    rng = random.Random(seed)
    allocator, naive, live = CachingAllocator(), Naive(), []
    for _ in range(1500):
        if live and rng.random() < len(live) / 100:
            address = live.pop(rng.randrange(len(live)))
            allocator.free(address)
            naive.free(address)
        else:
            size = size_at_random(rng)
            live.append(allocator.malloc(size))
            assert naive.malloc(size) == live[-1]


def test_peaks_start_anew() -> None:
    allocator = CachingAllocator()
    kept = allocator.malloc(3000)
    allocator.free(allocator.malloc(30 * MIB))
    assert allocator.peak_requested_bytes == 30 * MIB + 3000
    assert allocator.peak_allocated_bytes == 30 * MIB + 3072
    allocator.empty_cache()
    assert allocator.peak_reserved_bytes == 32 * MIB
    allocator.reset_peaks()
    assert allocator.peak_reserved_bytes == 2 * MIB
    assert allocator.peak_allocated_bytes == 3072
    assert allocator.peak_requested_bytes == 3000
    allocator.free(kept)


# What is refused ----------------------------------------------------------------------------


def test_only_blocks_are_freed_and_only_once() -> None:
    allocator = CachingAllocator()
    address = allocator.malloc(1)
    allocator.free(address)
    for wrong in (address, address + 512):
        with pytest.raises(ValueError, match="no block begins there") as caught:
            allocator.free(wrong)
        assert str(caught.value) == f"cannot free {wrong:#x}: no block begins there"
    with pytest.raises(ValueError, match="cannot allocate -1 bytes"):
        allocator.malloc(-1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"max_split_size": 19 * MIB},
            "max_split_size is 19922944: use at least large_segment_size, 20971520",
        ),
        (
            {"large_segment_size": 10 * MIB},
            "large_segment_size is 10485760: use more than 10 MiB",
        ),
        (
            {"garbage_collection_threshold": 1.0},
            "garbage_collection_threshold is 1.0: use a number from 0 up to, not including, 1",
        ),
        (
            {"roundup_power2_divisions": 3},
            "roundup_power2_divisions has 3: use 0 or a power of two",
        ),
        (
            {"roundup_power2_divisions": {"<": 2}},
            "roundup_power2_divisions has size '<': use a power of two, in MiB, or \">\"",
        ),
        ({"memory_fraction": 0.5}, "memory_fraction needs capacity_bytes or total_bytes"),
        (
            {"memory_fraction": 1.5, "total_bytes": 1},
            "memory_fraction is 1.5: use a number from 0 to 1",
        ),
        (
            {"memory_fraction": 0.5, "total_bytes": 1, "limit_bytes": 1},
            "memory_fraction and limit_bytes are both given: choose one",
        ),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is compared below
        CachingAllocator(**settings)
    assert str(caught.value) == message


def test_segments_that_are_refused() -> None:
    def segment(*sizes: int, start: int = 0, expandable: bool = False) -> Segment:
        blocks = [
            Block(address=start + i * 512, size=size, requested=0, allocated=False)
            for i, size in enumerate(sizes)
        ]
        return Segment(
            address=0,
            size=2 * MIB,
            stream=0,
            pool="small",
            blocks=tuple(blocks),
            expandable=expandable,
        )

    refused = {
        "segment 0x0: block 0x200 of 2097152 bytes where one from 0x0 on was due": segment(
            2 * MIB, start=512
        ),
        "segment 0x0: its blocks end at 0x400, its 2097152 bytes at 0x200000": segment(512, 512),
        "segment 0x0 is expandable: set expandable_segments=True": segment(
            2 * MIB, expandable=True
        ),
    }
    for message, wrong in refused.items():
        with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is compared below
            CachingAllocator(segments=[wrong])
        assert str(caught.value) == message


def test_it_does_without_torch() -> None:
    code = "import sys, lowvram.memory.allocator; print('torch' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"
