"""Sorting and running sums: cuda/cub.cuh and the device algorithms of CUB."""

from __future__ import annotations

from lowvram.memory.kernels.tape import Call, Tape
from lowvram.memory.kernels.tensors import bytes_of, parts
from lowvram.memory.sizes import up_to_multiple


def radix_sort_bytes(count: int, key_bytes: int, value_bytes: int, bits: int) -> int:
    """cub/device/dispatch/dispatch_radix_sort.cuh, InvokeOnesweep.

    Counts of 256 digits per pass, a look-back table per tile and, as inputs must survive, a
    second copy of keys and values. The tile is that of 8-byte items from compute capability 8 on.
    """
    wide = max(key_bytes, value_bytes, 4)
    passes = parts(bits, 8)
    if count <= 256 * max(1, 19 * 4 // wide):
        return 1
    tile = 384 * max(1, 21 * 4 // wide)
    again = count if passes > 1 else 0
    return 255 + sum(
        up_to_multiple(size, 256)
        for size in (
            passes * 256 * 8,
            parts(count, tile) * 256 * 4,
            again * key_bytes,
            again * value_bytes,
            passes * 4,
        )
    )


def scan_bytes(count: int, item_bytes: int) -> int:
    """cub/device/dispatch/dispatch_scan.cuh: the state of every tile and of 32 more."""
    tile = 128 * max(1, 15 * 4 // max(item_bytes, 4))
    return 255 + up_to_multiple((parts(count, tile) + 32) * 2 * item_bytes, 256)


def sort(call: Call, tape: Tape) -> None:
    """cuda/Sort.cpp and cuda/SortStable.cu: slices of up to 4096 are sorted in place."""
    tape.outputs()
    tensor = call["self"]
    if tensor.dim() == 0 or tensor.size(call["dim"]) <= 4096:
        return
    if not tensor.is_contiguous() or call["dim"] % tensor.dim() != tensor.dim() - 1:
        tape.allocate(bytes_of(tensor))
    size = tensor.size(call["dim"])
    tape.allocate(size * 8)
    tape.brief(radix_sort_bytes(size, tensor.element_size(), 8, 8 * tensor.element_size()))


def cumulative(call: Call, tape: Tape) -> None:
    """cuda/ScanKernels.cpp and cuda/ScanUtils.cuh, scan_dim."""
    tape.outputs()
    tensor, result = call["self"], call.outputs[0]
    if tensor.dtype != result.dtype:
        tape.allocate(bytes_of(result))
    elif not tensor.is_contiguous():
        tape.allocate(bytes_of(tensor))
    if tensor.dim() > 0 and tensor.numel() == tensor.size(call["dim"]):
        tape.brief(scan_bytes(tensor.numel(), result.element_size()))
