"""Sums, maxima, norms and the like: cuda/Reduce.cuh."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lowvram.memory.kernels.loop import Loop, addressable, loop_of
from lowvram.memory.kernels.tape import Call, Kernel, Tape
from lowvram.memory.kernels.target import Target
from lowvram.memory.kernels.tensors import HALF, bytes_of, opmath_bytes, parts


@dataclass(frozen=True)
class Kind:
    """How a reduction adds up: bytes of its accumulator, elements one load takes."""

    accumulator: Callable[[torch.dtype], int]
    vector: Callable[[torch.dtype], int] = lambda dtype: 4
    casts: bool = True
    """Whether an input of another dtype than the output is converted beforehand."""


@dataclass(frozen=True)
class Elements:
    """What setReduceConfig needs to know about types: bytes, and elements per load."""

    item: int
    accumulator: int
    vector: int
    offset: int


def reduction(kind: Kind) -> Kernel:
    """The kernel of a reduction over `dim`, or over everything if there is none."""

    def kernel(call: Call, tape: Tape) -> None:
        tape.outputs()
        tensor = call["self"]
        if "other" in call.arguments or tensor.numel() == 0 or not call.outputs:
            return
        output = call.outputs[0].dtype
        item = tensor.dtype
        if kind.casts and item != output and not (item in HALF and output == torch.float32):
            tape.allocate(tensor.numel() * output.itemsize)
            item = output
        dims = call.get("dim")
        dims = [dims] if isinstance(dims, int) else list(dims or ())
        loop = loop_of(tensor, item.itemsize, dims, output.itemsize)
        elements = Elements(
            item.itemsize, kind.accumulator(item), kind.vector(item), tensor.storage_offset()
        )
        _reduce(tape, loop, elements, item in HALF and output == item, call.target)

    return kernel


def _reduce(tape: Tape, loop: Loop, elements: Elements, apart: bool, target: Target) -> None:
    """Reduce.cuh, gpu_reduce_kernel: in pieces if 32 bits cannot address it.

    Pieces of a 16-bit result are added up `apart`, in fp32.
    """
    if not loop.fits_32_bits() and apart:
        tape.allocate(loop.outputs * elements.accumulator)
    for part in addressable(loop):
        sizes = _staging_bytes(part, elements, target)
        if sizes[0]:
            tape.brief(*sizes)


def _staging_bytes(loop: Loop, elements: Elements, target: Target) -> tuple[int, int]:
    """Reduce.cuh, setReduceConfig: bytes of the staging buffer and of the semaphores.

    A reduction whose outputs do not fill the card is split over blocks. Each leaves its share in
    global memory. For sums over rows the buffer has one place per thread, not per output, so that
    the gradient of a bias takes tens of MiB.
    """
    outputs = loop.outputs
    inputs = math.prod(loop.shape) // outputs
    along = loop.reduced == len(loop.shape) or loop.input[0] < loop.input[loop.reduced]
    fastest = loop.input[0 if along else loop.reduced] if loop.shape else elements.item
    wide, high = (inputs, outputs) if along else (outputs, inputs)
    vector = 1
    if fastest == elements.item:
        if along and wide >= 128 and loop.reduced == 1:
            wide //= elements.vector
        elif not along:
            vector = _output_vector(loop, elements)
            wide //= vector
    width, height = _block(wide, high, 512 // vector)
    step_input, step_output = (width, 1) if along else (1, width)
    if parts(inputs, step_input) < min(height * 16, 256):
        return 0, 0  # no split across warps, hence none across blocks
    step_input *= height
    per_thread = parts(inputs, step_input)
    grid = parts(outputs // vector, step_output)
    wanted = target.multiprocessors * (target.threads_per_multiprocessor // (width * height))
    if per_thread < 256 or grid > wanted:
        return 0, 0
    blocks = max(min(parts(wanted, grid), parts(per_thread, 16)), parts(per_thread, 256))
    if blocks <= 1:
        return 0, 0
    places = 1 if along else width * vector
    return elements.accumulator * outputs * blocks * places, 4 * grid


def _block(wide: int, high: int, limit: int) -> tuple[int, int]:
    """ReduceConfig::set_block_dimension: threads along and across, a warp at most at first."""
    width_limit = _pow2(wide) if wide < limit else limit
    height_limit = _pow2(high) if high < limit else limit
    width = min(width_limit, 32)
    height = min(height_limit, limit // width)
    return min(width_limit, limit // height), height


def _output_vector(loop: Loop, elements: Elements) -> int:
    """Reduce.cuh, get_output_vec_size: 4, 2 or 1 outputs per thread, as alignment allows."""
    strides = [stride for dim, stride in enumerate(loop.input) if dim != loop.reduced]
    numbers = [
        elements.offset,
        loop.shape[loop.reduced],
        *(stride // elements.item for stride in strides),
    ]
    return math.gcd(4, *numbers)


def _pow2(number: int) -> int:
    return 1 << (max(1, number).bit_length() - 1)


SUM = Kind(opmath_bytes, lambda dtype: 8 if dtype.itemsize == 2 else 4)
MEAN = Kind(opmath_bytes)
EXTREME = Kind(lambda dtype: dtype.itemsize, casts=False)
INDEXED = Kind(lambda dtype: 16, casts=False)
LOGICAL = Kind(lambda dtype: 1, casts=False)
NORM = Kind(opmath_bytes, casts=False)
WELFORD = Kind(lambda dtype: 32 if dtype == torch.float64 else 16, lambda dtype: 2, casts=False)


def extreme(call: Call, tape: Tape) -> None:
    """cuda/ReduceMinValuesKernel.cu: with one dimension also where, which takes wider entries."""
    reduction(EXTREME if call.get("dim") is None else INDEXED)(call, tape)


def log_sum_exp(call: Call, tape: Tape) -> None:
    """ReduceOps.cpp, logsumexp_out_impl: maxima, then (self - maxima).exp_()."""
    tape.outputs()
    tensor, result = call["self"], call.outputs[0]
    size = result.numel() * tensor.element_size()
    tape.allocate(size)
    tape.brief(size, result.numel())
    tape.allocate(bytes_of(tensor))
