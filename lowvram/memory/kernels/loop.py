"""A reduction as TensorIterator.cpp arranges it: fewest dimensions, the fastest first."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

_INT_MAX = 2**31 - 1


@dataclass(frozen=True)
class Loop:
    """A reduction as TensorIterator runs it, fastest dimension first; strides in bytes."""

    shape: tuple[int, ...]
    input: tuple[int, ...]
    output: tuple[int, ...]  # 0 where a dimension is reduced

    @property
    def reduced(self) -> int:
        """Number of reduced dimensions; they come first."""
        return self.output.count(0)

    @property
    def outputs(self) -> int:
        pairs = zip(self.shape, self.output, strict=True)
        return math.prod(size for size, stride in pairs if stride != 0)

    def fits_32_bits(self) -> bool:
        reaches = (
            sum((size - 1) * stride for size, stride in zip(self.shape, strides, strict=True))
            for strides in (self.input, self.output)
        )
        return math.prod(self.shape) <= _INT_MAX and all(reach < _INT_MAX for reach in reaches)

    def halves(self) -> tuple[Loop, Loop]:
        """TensorIterator.cpp, split: along the dimension that reaches furthest."""
        reach = [
            (size - 1) * max(strides)
            for size, *strides in zip(self.shape, self.input, self.output, strict=True)
        ]
        dim = max(reversed(range(len(reach))), key=reach.__getitem__)
        half = self.shape[dim] // 2
        return self._narrow(dim, half), self._narrow(dim, self.shape[dim] - half)

    def _narrow(self, dim: int, size: int) -> Loop:
        return Loop((*self.shape[:dim], size, *self.shape[dim + 1 :]), self.input, self.output)


def loop_of(tensor: Tensor, item_bytes: int, dims: Sequence[int], output_bytes: int) -> Loop:
    """TensorIterator.cpp: reorder_dimensions, then coalesce_dimensions."""
    reduced = {dim % tensor.dim() for dim in dims} if dims else set(range(tensor.dim()))
    output: list[int] = [0] * tensor.dim()
    step = output_bytes
    for dim in reversed(range(tensor.dim())):
        if dim not in reduced:
            output[dim] = step
            step *= tensor.size(dim)
    columns = [
        (size, stride * item_bytes, output[dim])
        for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True))
    ]
    order = _sorted_dimensions(columns[::-1])
    return _coalesced(order)


_Column = tuple[int, int, int]  # size, stride of the input, stride of the output


def _sorted_dimensions(columns: list[_Column]) -> list[_Column]:
    """Insertion sort, as dimensions that cannot be compared stay where they are."""
    columns = list(columns)
    for last in range(1, len(columns)):
        right = last
        for left in reversed(range(last)):
            order = _compare(columns[left], columns[right])
            if order > 0:
                columns[left], columns[right] = columns[right], columns[left]
                right = left
            elif order < 0:
                break
    return columns


def _compare(left: _Column, right: _Column) -> int:
    """Whether `left` has to come after `right` (1), before it (-1), or either way (0)."""
    if (left[2] == 0) != (right[2] == 0):
        return 1 if right[2] == 0 else -1
    for one, other in ((left[2], right[2]), (left[1], right[1])):
        if 0 in (one, other):
            continue
        if one != other:
            return 1 if one > other else -1
        if left[0] > right[0]:
            return 1
    return 0


def _coalesced(columns: list[_Column]) -> Loop:
    merged: list[_Column] = []
    for size, into, out in columns:
        if not merged:
            merged.append((size, into, out))
            continue
        size_before, into_before, out_before = merged[-1]
        if size_before == 1:
            merged[-1] = (size, into, out)
        elif size == 1 or (size_before * into_before, size_before * out_before) == (into, out):
            merged[-1] = (size_before * size, into_before, out_before)
        else:
            merged.append((size, into, out))
    shapes = tuple(zip(*merged, strict=True)) if merged else ((), (), ())
    return Loop(*shapes)


def addressable(loop: Loop) -> Iterator[Loop]:
    """The loop in as few pieces as 32 bits can address."""
    if loop.fits_32_bits():
        yield loop
    else:
        for half in loop.halves():
            yield from addressable(half)
