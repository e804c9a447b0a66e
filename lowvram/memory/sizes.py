"""Sizes in the allocator: how requests are rounded, how large segments are, how torch writes them.

The numbers are those of c10/core/AllocatorConfig.h.
"""

from __future__ import annotations

from collections.abc import Mapping

MIB = 2**20
SMALLEST_BLOCK = 512
SMALL_LIMIT = MIB  # a larger request, rounded, goes to the large pool
SMALL_SEGMENT = 2 * MIB
LARGE_SEGMENT = 20 * MIB
OWN_SEGMENT_FROM = 10 * MIB  # smaller requests share a large segment
SEGMENT_STEP = 2 * MIB

_INTERVALS = 16  # [1, 2) MiB, [2, 4) MiB, ... [32, 64) GiB; smaller and larger sizes at the ends


def up_to_multiple(size: int, step: int) -> int:
    return (size + step - 1) // step * step


def segment_size(rounded: int, large_segment: int) -> int:
    """What the driver is asked for to serve a request that no free chunk can serve."""
    if rounded <= SMALL_LIMIT:
        return SMALL_SEGMENT
    if rounded < OWN_SEGMENT_FROM:
        return large_segment
    return up_to_multiple(rounded, SEGMENT_STEP)


def division_table(setting: int | Mapping[int | str, int]) -> tuple[int, ...] | None:
    """The divisions of each of the 16 intervals, or None if there are none to speak of.

    `setting` is one number for all, or a mapping of sizes in MiB, ">" being the intervals above
    the last one named. The first entry also holds below its size. An interval that is skipped
    has none: torch reads its setting in this way, whatever its documentation says.
    """
    numbers = setting.values() if isinstance(setting, Mapping) else [setting]
    for number in numbers:
        if number < 0 or number.bit_count() > 1:
            raise ValueError(f"roundup_power2_divisions has {number}: use 0 or a power of two")
    table = [0] * _INTERVALS if isinstance(setting, Mapping) else [setting] * _INTERVALS
    if isinstance(setting, Mapping):
        _fill(table, setting)
    return tuple(table) if max(table) > 1 else None


def _fill(table: list[int], setting: Mapping[int | str, int]) -> None:
    last, first = 0, True
    for size_mib, number in setting.items():
        if size_mib == ">":
            table[last + 1 :] = [number] * (_INTERVALS - last - 1)
            continue
        if not isinstance(size_mib, int) or size_mib.bit_count() != 1:
            raise ValueError(
                f"roundup_power2_divisions has size {size_mib!r}: "
                'use a power of two, in MiB, or ">"'
            )
        last = min(size_mib.bit_length() - 1, _INTERVALS - 1)
        if first:
            table[:last] = [number] * last
            first = False
        table[last] = number


def round_request(size: int, divisions: tuple[int, ...]) -> int:
    """The block for a request: the next of d equal steps from a power of two to the next one.

    d is the number of the size's interval. Requests of up to 512 * d bytes, and all where d is
    0 or 1, are rounded to a multiple of 512.
    """
    power = size.bit_length() - 1
    d = divisions[min(max(power - 20, 0), _INTERVALS - 1)]
    if d > 1 and size > SMALLEST_BLOCK * d:
        return up_to_multiple(size, 2**power // d)
    return up_to_multiple(size, SMALLEST_BLOCK)


def format_size(size: int) -> str:
    """Bytes as torch's error messages write them; exactly 1 GiB is "1024.00 MiB" there."""
    if size <= 2**10:
        return f"{size} bytes"
    for unit, power in (("KiB", 10), ("MiB", 20)):
        if size <= 2 ** (power + 10):
            return f"{size / 2**power:.2f} {unit}"
    return f"{size / 2**30:.2f} GiB"
