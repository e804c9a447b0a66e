"""Segments as values: what an allocator holds at one moment, and can start from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from operator import attrgetter
from typing import Literal

from lowvram.memory.pool import Chunk

PoolName = Literal["small", "large"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """A piece of a segment, handed out or free. Sizes in bytes."""

    address: int
    size: int
    requested: int
    """What was asked for; 0 in a free block."""
    allocated: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """What one cudaMalloc gave, or a run of an expandable segment that has memory behind it."""

    address: int
    size: int
    stream: int
    pool: PoolName
    blocks: tuple[Block, ...]
    """In order of address, without gaps from the segment's begin to its end."""
    expandable: bool = False


def check_blocks(segment: Segment) -> None:
    """Raises ValueError if the blocks do not fill the segment."""
    end = segment.address
    for block in segment.blocks:
        if block.address != end or block.size <= 0:
            raise ValueError(
                f"segment {segment.address:#x}: block {block.address:#x} of {block.size} bytes "
                f"where one from {end:#x} on was due"
            )
        end += block.size
    if end != segment.address + segment.size:
        raise ValueError(
            f"segment {segment.address:#x}: its blocks end at {end:#x}, "
            f"its {segment.size} bytes at {segment.address + segment.size:#x}"
        )


def snapshot(chunks: Iterable[Chunk]) -> list[Segment]:
    """The segments that these chunks, all of an allocator, belong to, in order of address."""
    heads = [
        chunk
        for chunk in chunks
        if chunk.mapped and (chunk.previous is None or not chunk.previous.mapped)
    ]
    return [_segment(head) for head in sorted(heads, key=attrgetter("address"))]


def _segment(head: Chunk) -> Segment:
    blocks = []
    chunk: Chunk | None = head
    while chunk is not None and chunk.mapped:
        blocks.append(
            Block(
                address=chunk.address,
                size=chunk.size,
                requested=chunk.requested,
                allocated=not chunk.free,
            )
        )
        chunk = chunk.next
    return Segment(
        address=head.address,
        size=sum(block.size for block in blocks),
        stream=head.pool.stream,
        pool="small" if head.pool.small else "large",
        blocks=tuple(blocks),
        expandable=head.base is not None,
    )
