"""Writing to indexed places of a tensor."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowvram.memory.kernels.sorting import radix_sort_bytes
from lowvram.memory.kernels.tape import Call, Tape


def index_put(call: Call, tape: Tape) -> None:
    """cuda/Indexing.cu, index_put_with_sort_kernel: only when values accumulate.

    Positions are computed in int64, one index tensor after the other, and then sorted.
    """
    tape.outputs()
    if not (call["accumulate"] or torch.are_deterministic_algorithms_enabled()):
        return
    source, values = call["self"], call["values"]
    indices = [index for index in call["indices"] if index is not None]
    if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
        return  # their positions are not known without data
    shape = torch.broadcast_shapes(*(index.shape for index in indices))
    count = math.prod(shape)
    _linear_positions(tape, indices)
    slice_size = source.numel() // max(1, math.prod(_indexed_sizes(call)))
    if values.numel() != count * slice_size or not values.is_contiguous():
        tape.allocate(count * slice_size * values.element_size())
    if count == 0 or slice_size == 0:
        return
    for _ in range(3):  # sorted, where they came from, 0 ... count - 1
        tape.allocate(count * 8)
    bits = max(1, (source.numel() // slice_size - 1).bit_length())
    tape.brief(radix_sort_bytes(count, 8, 8, bits))


def _indexed_sizes(call: Call) -> list[int]:
    sizes = call["self"].shape
    return [sizes[dim] for dim, index in enumerate(call["indices"]) if index is not None]


def _linear_positions(tape: Tape, indices: list[Tensor]) -> None:
    """computeLinearIndex: index modulo size, times stride; sums go into the first product."""
    for place, index in enumerate(indices):
        if index.dtype != torch.int64:
            tape.allocate(index.numel() * 8)
        wrapped = tape.allocate(index.numel() * 8)
        product = tape.allocate(index.numel() * 8)
        tape.free(wrapped)
        if place > 0:
            tape.free(product)
