"""Segments that grow: an address range larger than the card, with memory behind a part of it.

PyTorch's setting `expandable_segments:True`. A range is 9/8 of the card. Memory is put behind it
in handles of 2 MiB (small pool) or 20 MiB (large pool), from the lowest address at which a
request fits; only what is missing behind a free chunk is added. Handles that are wholly free
are taken back when memory ends or the cache is emptied.
"""

from __future__ import annotations

from bisect import insort
from operator import attrgetter

from lowvram.memory.pool import Chunk, Driver, Pool
from lowvram.memory.sizes import up_to_multiple

_ADDRESS = attrgetter("address")


def allocate(
    pool: Pool, driver: Driver, size: int, *, handle_bytes: int, range_bytes: int
) -> Chunk | None:
    """A chunk of at least `size` bytes outside the pool's free list; None where memory ends.

    What was mapped before it ended stays mapped, and free.
    """
    chunk = _find_room(pool, size)
    if chunk is None:
        range_bytes = up_to_multiple(max(range_bytes, size), handle_bytes)
        chunk = _open_range(pool, driver.range(range_bytes), range_bytes)
    if not chunk.mapped:
        mapped = _map(chunk, min(chunk.size, size), driver, handle_bytes)
        if mapped is None:
            return None
        chunk = mapped
    while chunk.size < size:
        following = chunk.next
        assert following is not None
        missing = min(size - chunk.size, following.size)
        mapped = _map(following, missing, driver, handle_bytes)
        if mapped is None:
            return None
        chunk = mapped
    pool.remove(chunk)
    return chunk


def adopt(pool: Pool, address: int, size: int, range_bytes: int) -> Chunk:
    """A chunk of the pool's range for memory that was there before.

    Where a range begins is not known afterwards: it is taken to begin with the memory that lies
    lowest in it.
    """
    end = address + size
    for chunk in pool.unmapped:
        if chunk.address <= address and end <= chunk.address + chunk.size:
            break
    else:
        chunk = _open_range(pool, address, max(size, range_bytes))
    pool.unmapped.remove(chunk)
    if chunk.address < address:
        before = chunk
        chunk = before.split(address - before.address)
        _add_unmapped(before)
    if size < chunk.size:
        _add_unmapped(chunk.split(size))
    chunk.mapped = True
    return chunk


def room(chunk: Chunk) -> int:
    """The bytes that a free chunk has or can have: its own, and those not mapped behind it."""
    following = chunk.next
    return chunk.size + (0 if following is None or following.mapped else following.size)


def release(pool: Pool, driver: Driver, handle_bytes: int) -> None:
    """Take the memory back from all handles that lie in free chunks, and give up empty ranges."""
    for chunk in pool.in_order():
        if chunk.base is not None:
            _unmap(chunk, driver, handle_bytes)


def _find_room(pool: Pool, size: int) -> Chunk | None:
    """The lowest chunk that is not mapped, or the free one before it, from which `size` fits."""
    for chunk in pool.unmapped:
        start, previous = chunk, chunk.previous
        if previous is not None and previous.free:
            start = previous
        if _fits(start, size):
            return start
    return None


def _fits(chunk: Chunk | None, size: int) -> bool:
    while size > 0 and chunk is not None and (chunk.free or not chunk.mapped):
        size -= chunk.size
        chunk = chunk.next
    return size <= 0


def _open_range(pool: Pool, address: int, size: int) -> Chunk:
    chunk = Chunk(address, size, pool, base=address)
    _add_unmapped(chunk)
    return chunk


def _add_unmapped(chunk: Chunk) -> None:
    chunk.mapped = False
    insort(chunk.pool.unmapped, chunk, key=_ADDRESS)


def _map(chunk: Chunk, size: int, driver: Driver, handle_bytes: int) -> Chunk | None:
    """Map the first `size` bytes, in whole handles; returns the free chunk that they are in."""
    size = up_to_multiple(size, handle_bytes)
    if not driver.map(chunk.address, size, chunk.pool.stream):
        return None
    chunk.pool.unmapped.remove(chunk)
    if size < chunk.size:
        _add_unmapped(chunk.split(size))
    chunk.mapped = True
    return chunk.pool.put(chunk)


def _unmap(chunk: Chunk, driver: Driver, handle_bytes: int) -> None:
    assert chunk.base is not None
    offset = chunk.address - chunk.base
    begin = up_to_multiple(offset, handle_bytes) - offset
    end = (offset + chunk.size) // handle_bytes * handle_bytes - offset
    if begin >= end:
        return
    pool = chunk.pool
    pool.remove(chunk)
    if end < chunk.size:
        pool.add(chunk.split(end))
    if begin > 0:
        tail = chunk.split(begin)
        pool.add(chunk)
        chunk = tail
    driver.unmap(chunk.address, chunk.size, pool.stream)
    _put_unmapped(chunk)


def _put_unmapped(chunk: Chunk) -> None:
    """File it with the neighbours that are not mapped either; a range of nothing else goes."""
    unmapped = chunk.pool.unmapped
    following, previous = chunk.next, chunk.previous
    if following is not None and not following.mapped:
        unmapped.remove(following)
        chunk.absorb_next()
    if previous is not None and not previous.mapped:
        unmapped.remove(previous)
        previous.absorb_next()
        chunk = previous
    if chunk.previous is not None or chunk.next is not None:
        _add_unmapped(chunk)
