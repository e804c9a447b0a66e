"""Memory that CUDA kernels take for themselves: temporaries that no operator returns.

A simulated device sees the outputs of every operator. What it cannot see is what the CUDA
implementation of an operator asks the caching allocator for and gives back before it returns:
sort buffers, fp32 accumulators, copies of operands whose layout a library cannot take. This file
computes those from shapes, strides and dtypes alone. Where a size depends on data, it is the
largest one possible.

Each function names the file of pytorch's `aten/src/ATen` it follows. Sizes were read at torch 2.13
or the nearest version found; `Target.torch_version` picks among versions that differ.

Shapes: b batch, h heads of the queries, g heads of keys and values, l queries, s keys, d head size;
m, k, n the sizes of a matrix product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = [
    "NOTHING",
    "Scratch",
    "Target",
    "lt_workspace_bytes",
    "output_bytes",
    "output_order",
    "replay",
    "scratch",
    "workspace_bytes",
]

T = TypeVar("T")

_HALF = (torch.float16, torch.bfloat16)
_INT_MAX = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class Target:
    """The card and the software whose kernels are meant."""

    compute_capability: tuple[int, int]
    multiprocessors: int
    torch_version: tuple[int, int] = (2, 13)
    cuda_version: tuple[int, int] = (13, 0)
    cudnn_version: int = 92000
    """As `torch.backends.cudnn.version()` gives it; 9.20 comes with torch 2.13 for CUDA 13."""

    @property
    def threads_per_multiprocessor(self) -> int:
        """CUDA programming guide, technical specifications per compute capability."""
        if self.compute_capability == (7, 5):
            return 1024
        small = {(8, 6), (8, 7), (8, 9), (12, 0), (12, 1)}
        return 1536 if self.compute_capability in small else 2048

    @property
    def shared_kib_per_block(self) -> int:
        """Shared memory one block may opt in to, from the same table."""
        sizes = {(7, 0): 96, (7, 5): 64, (8, 0): 163, (8, 7): 163, (8, 6): 99, (8, 9): 99}
        major = self.compute_capability[0]
        default = {9: 227, 10: 227, 11: 227, 12: 99}.get(major, 48)
        return sizes.get(self.compute_capability, default)


@dataclass(frozen=True)
class Scratch:
    """Temporaries of one kernel, in order, before and after its outputs are allocated.

    An entry is either a size in bytes (0 allocates nothing, but counts), or `~i`, which is
    negative and frees the kernel's i-th temporary early; i counts the sizes of `before` and then
    those of `after`, from 0. What is left is freed, last first, when the kernel returns.
    """

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()

    @property
    def peak_bytes(self) -> int:
        """The most these temporaries take at one time, without the allocator's rounding."""
        sizes: list[int] = []
        now = peak = 0
        for entry in (*self.before, *self.after):
            if entry >= 0:
                sizes.append(entry)
                now += entry
            else:
                now -= sizes[~entry]
            peak = max(peak, now)
        return peak


NOTHING = Scratch()


def replay(
    entries: Sequence[int],
    live: list[T | None],
    allocate: Callable[[int], T],
    release: Callable[[T], None],
) -> None:
    """Carry out one half of a `Scratch`; `live` is an empty list, shared by the two halves.

    When the kernel returns, release what `live` still holds from its end to its start.
    """
    for entry in entries:
        if entry > 0:
            live.append(allocate(entry))
        elif entry == 0:
            live.append(None)
        else:
            block = live[~entry]
            live[~entry] = None
            if block is not None:
                release(block)


def scratch(
    func: torch._ops.OpOverload,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    outputs: Sequence[Tensor],
    target: Target,
) -> Scratch:
    """The temporaries that the CUDA kernel of `func` takes for these arguments."""
    kernel = _KERNELS.get(func._schema.name)
    if kernel is None:
        return NOTHING
    arguments = dict(_defaults(func))
    arguments.update(zip(arguments, args, strict=False))
    arguments.update(kwargs)
    tape = _Tape()
    kernel(_Call(arguments, outputs, target), tape)
    return tape.scratch()


@lru_cache(maxsize=1024)
def _defaults(func: torch._ops.OpOverload) -> tuple[tuple[str, Any], ...]:
    """Names of the arguments of an operator, in order, with their default values."""
    return tuple((argument.name, argument.default_value) for argument in func._schema.arguments)


class _Tape:
    """Writes a `Scratch`: `allocate` gives the number that `free` takes."""

    def __init__(self) -> None:
        self._before: list[int] = []
        self._after: list[int] = []
        self._entries = self._before
        self._count = 0

    def allocate(self, size_bytes: int) -> int:
        self._entries.append(size_bytes)
        self._count += 1
        return self._count - 1

    def free(self, *numbers: int) -> None:
        self._entries.extend(~number for number in numbers)

    def brief(self, *sizes: int) -> None:
        """Temporaries that live together for one step and are freed last first."""
        self.free(*reversed([self.allocate(size) for size in sizes]))

    def outputs(self) -> None:
        """From here on the outputs are allocated."""
        self._entries = self._after

    def copy(self, tensor: Tensor) -> None:
        """`tensor.contiguous()`, which takes memory only if the tensor is not contiguous."""
        if not tensor.is_contiguous():
            self.allocate(_bytes(tensor))

    def scratch(self) -> Scratch:
        if self._count == 0:
            return NOTHING
        return Scratch(tuple(self._before), tuple(self._after))


@dataclass(frozen=True)
class _Call:
    """One call of an operator: its arguments by name, its outputs and the card."""

    arguments: Mapping[str, Any]
    outputs: Sequence[Tensor]
    target: Target

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def get(self, name: str) -> Any:
        return self.arguments.get(name)


_Kernel = Callable[[_Call, _Tape], None]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _accumulator(dtype: torch.dtype) -> int:
    """Bytes of the type a kernel adds up in: at least fp32 for the 16-bit types."""
    return max(dtype.itemsize, 4) if dtype.is_floating_point else dtype.itemsize


def _ceil(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _parts(number: int, size: int) -> int:
    return -(-number // size)


def _is_dense(tensor: Tensor) -> bool:
    """TensorImpl.cpp, is_non_overlapping_and_dense: contiguous in some order of its dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _strict() -> bool:
    """Whether deterministic algorithms are demanded, not only wished for."""
    return (
        torch.are_deterministic_algorithms_enabled()
        and not torch.is_deterministic_algorithms_warn_only_enabled()
    )


# Attention: native/transformers/cuda/


def _flash_forward(call: _Call, tape: _Tape) -> None:
    """flash_attn/flash_api.cpp, mha_fwd: accumulators when few queries are split over keys.

    With dropout the random state is made twice and the first one dropped.
    """
    tape.outputs()
    heads_first = call.get("max_q") is None
    query, key = call["query"], call["key"]
    if call.get("cum_seq_q") is None:
        layout = (0, 1, 2, 3) if heads_first else (0, 2, 1, 3)
        batch, heads, queries, size = (query.size(dim) for dim in layout)
        key_heads, keys = key.size(layout[1]), key.size(layout[2])
        _flash_splits(call, tape, (batch, heads, key_heads, queries, keys, size))
    if call["dropout_p"] > 0.0:
        tape.brief(16)


def _flash_splits(call: _Call, tape: _Tape, sizes: tuple[int, int, int, int, int, int]) -> None:
    """set_params_splitkv: partial outputs and their logarithms, one per split."""
    batch, heads, key_heads, queries, keys, size = sizes
    if call["dropout_p"] > 0.0:
        return
    if queries == 1 and heads > key_heads:
        queries, heads = heads // key_heads, key_heads
    rows = batch * heads * queries
    block = 256 if size <= 64 else 128 if size <= 128 else 64
    splits = _flash_split_count(
        batch * heads * _parts(queries, 64),
        call.target.multiprocessors * 2,
        _parts(keys, block),
    )
    if splits > 1:
        tape.allocate(splits * rows * 4)
        tape.allocate(splits * rows * _flash_head(size) * 4)


def _flash_split_count(blocks: int, multiprocessors: int, key_blocks: int) -> int:
    """num_splits_heuristic: the fewest splits that fill 85 % of the best share of the card."""
    if blocks >= 0.8 * multiprocessors:
        return 1
    best = 0.0
    shares: dict[int, float] = {}
    for splits in range(1, min(128, multiprocessors, key_blocks) + 1):
        if splits > 1 and _parts(key_blocks, splits) == _parts(key_blocks, splits - 1):
            continue
        waves = blocks * splits / multiprocessors
        shares[splits] = waves / math.ceil(waves)
        best = max(best, shares[splits])
    return next((splits for splits, share in shares.items() if share >= 0.85 * best), 1)


def _flash_head(size: int) -> int:
    return _ceil(size, 32 if size <= 128 else 64)


def _flash_backward(call: _Call, tape: _Tape) -> None:
    """flash_attn/flash_api.cpp, mha_bwd and mha_varlen_bwd.

    The sum of dO * O per query, an fp32 accumulator of dQ, and with grouped heads dK and dV for
    every head of the queries. Queries are rounded up to 128 and the head size to 32 or 64.
    """
    query, key = call["query"], call["key"]
    dense = call.get("cum_seq_q") is None
    heads_first = dense and "rng_state" not in call.arguments
    for tensor in (call["grad_out"], call["out"]):
        tape.copy(tensor.transpose(1, 2) if heads_first else tensor)
    tape.outputs()
    if heads_first:
        query, key = query.transpose(1, 2), key.transpose(1, 2)
    size, heads, key_heads = query.size(-1), query.size(-2), key.size(-2)
    if dense:
        batch, rows = query.size(0), query.size(0) * _ceil(query.size(1), 128)
    else:
        batch = call["cum_seq_q"].numel() - 1
        rows = query.size(0) + 128 * batch
    tape.allocate(rows * heads * 4)
    splits = _parts(call.target.multiprocessors, batch * heads) if _strict() else 1
    tape.allocate(splits * rows * heads * _flash_head(size) * 4)
    if heads != key_heads:
        expanded = key.numel() // key_heads * heads * key.element_size()
        tape.allocate(expanded)
        tape.allocate(expanded)


def _efficient_forward(call: _Call, tape: _Tape) -> None:
    """attention.cu, _efficient_attention_forward: fp32 output for 16-bit heads above 128."""
    tape.outputs()
    query, value = call["query"], call["value"]
    if query.dtype in _HALF and max(query.size(-1), value.size(-1)) > 128:
        tape.allocate(query.numel() // query.size(-1) * value.size(-1) * 4)


@dataclass(frozen=True)
class _Blocks:
    """Tile of a memory-efficient backward kernel: queries, keys, largest head it is made for."""

    queries: int
    keys: int
    head: int


def _efficient_blocks(half: bool, head: int, dropout: bool, target: Target) -> _Blocks:
    """mem_eff_attention/kernels/cutlassB.h: the first kernel that fits into shared memory.

    Which ones fit is known for the 64 x 64 kernels; above heads of 64 it is an estimate.
    """
    card, room = target.compute_capability, target.shared_kib_per_block
    if head <= 64:
        return _Blocks(64, 64, 32 if head <= 32 else 64)
    wide = room >= 163 if card >= (8, 0) else half and card >= (7, 0)
    if head <= 96 and half and card in {(8, 6), (8, 9)} and not dropout:
        return _Blocks(128, 64, 96)
    if head <= 128:
        if half and card >= (8, 0):
            return _Blocks(128, 128, 128) if wide else _Blocks(64, 64, 128)
        return _Blocks(128 if wide else 64, 64, 128)
    wide = wide or (half and card >= (8, 0))
    return _Blocks(128 if wide else 64, 64, 65536)


def _efficient_backward(call: _Call, tape: _Tape) -> None:
    """attention_backward.cu and mem_eff_attention/kernel_backward.h.

    Above compute capability 7 the gradient of the queries is added up in an fp32 workspace; the
    fp32 kernels leave the sums of dO * O per query to ordinary operators.
    """
    heads_first = "grad_input_mask" in call.arguments
    query, key, value, grad = (call[name] for name in ("query", "key", "value", "grad_out_"))
    out = call["out"]
    if heads_first:
        query, key, value, grad, out = (
            tensor.transpose(1, 2) for tensor in (query, key, value, grad, out)
        )
    tape.copy(grad)
    tape.outputs()
    half = query.dtype in _HALF
    blocks = _efficient_blocks(
        half, max(query.size(-1), value.size(-1)), call["dropout_p"] > 0.0, call.target
    )
    rows = query.size(0) * query.size(1) * query.size(2)
    in_registers = half and blocks.head <= blocks.queries
    if half and (in_registers or call.target.compute_capability[0] != 7):
        tape.allocate(rows * 4)
    else:
        _row_products(tape, rows, grad, query)
    tape.allocate(_efficient_workspace(query, key, value, blocks, in_registers, call.target))


def _row_products(tape: _Tape, rows: int, grad: Tensor, query: Tensor) -> None:
    """(grad.float() * out.float()).sum(-1).transpose(-2, -1).contiguous(), in fp32."""
    count = grad.numel()
    widened = [] if grad.dtype == torch.float32 else [tape.allocate(count * 4) for _ in range(2)]
    product = tape.allocate(count * 4)
    total = tape.allocate(rows * 4)
    if min(query.size(1), query.size(2)) > 1:
        tape.allocate(rows * 4)
        tape.free(total)
    tape.free(product, *reversed(widened))


def _efficient_workspace(  # noqa: PLR0913 - three tensors, the kernel and the card
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: _Blocks,
    in_registers: bool,
    target: Target,
) -> int:
    """Params::workspace_size: floats per batch and head, for dK, dV and dQ."""
    batch, queries, heads, size = query.shape
    half, splittable = query.dtype in _HALF, target.compute_capability >= (7, 0)
    floats = 0
    if half and not in_registers:
        splits = _key_splits(key.size(1), batch * heads, blocks.keys) if splittable else 1
        for width in (size, value.size(-1)):
            floats += splits * blocks.keys * _ceil(width, blocks.queries)
    if splittable or half:
        tiles = _parts(queries, blocks.queries) * _parts(size, blocks.keys)
        floats += tiles * (4 + blocks.queries * blocks.keys)
    return batch * heads * _ceil(floats, 4) * 4


def _key_splits(keys: int, grid: int, block: int) -> int:
    """The heuristic of _efficient_attention_backward for kernels that also add up dK and dV."""
    splits = 1 if grid >= 256 and keys <= 2 * block else _parts(keys, block)
    return 1 if _strict() else max(1, min(splits, 200 // grid))


def _cudnn_backward(call: _Call, tape: _Tape) -> None:
    """cudnn/MHA.cpp: cuDNN says how much it wants only at run time. An estimate: fp32 dQ."""
    tape.outputs()
    query = call["query"]
    tape.allocate(query.numel() // query.size(-1) * 4)
    tape.allocate(query.numel() * 4)


# Sorting: cuda/cub.cuh and the device algorithms of CUB


def _radix_sort(count: int, key_bytes: int, value_bytes: int, bits: int) -> int:
    """cub/device/dispatch/dispatch_radix_sort.cuh, InvokeOnesweep.

    Counts of 256 digits per pass, a look-back table per tile and, as inputs must survive, a
    second copy of keys and values. The tile is that of 8-byte items from compute capability 8 on.
    """
    wide = max(key_bytes, value_bytes, 4)
    passes = _parts(bits, 8)
    if count <= 256 * max(1, 19 * 4 // wide):
        return 1
    tile = 384 * max(1, 21 * 4 // wide)
    again = count if passes > 1 else 0
    return 255 + sum(
        _ceil(size, 256)
        for size in (
            passes * 256 * 8,
            _parts(count, tile) * 256 * 4,
            again * key_bytes,
            again * value_bytes,
            passes * 4,
        )
    )


def _scan(count: int, item_bytes: int) -> int:
    """cub/device/dispatch/dispatch_scan.cuh: the state of every tile and of 32 more."""
    tile = 128 * max(1, 15 * 4 // max(item_bytes, 4))
    return 255 + _ceil((_parts(count, tile) + 32) * 2 * item_bytes, 256)


def _embedding_backward(call: _Call, tape: _Tape) -> None:
    """cuda/Embedding.cu, embedding_dense_backward_cuda: above 3072 indices they are sorted."""
    indices, grad = call["indices"], call["grad_output"]
    tape.copy(indices)
    tape.copy(grad)
    count, item = indices.numel(), indices.element_size()
    if count <= 3072 and not call["scale_grad_by_freq"]:
        return
    tape.allocate(count * item)  # sorted
    tape.allocate(count * item)  # where they came from
    tape.brief(count * item, _radix_sort(count, item, item, 8 * item))
    if call["scale_grad_by_freq"]:
        tape.allocate(count * item)
        tape.brief(_scan(count, item))
        tape.brief(_scan(count, item))
    tape.outputs()
    _sum_segments(tape, count, item, grad)


def _sum_segments(tape: _Tape, count: int, item: int, grad: Tensor) -> None:
    """cuda/EmbeddingBackwardKernel.cu: rows of equal index are summed in parts of 10, in fp32.

    The kernel reserves a part for every index, as it does not wait for the true number.
    """
    tape.allocate(count * item)  # offsets of segments
    tape.allocate(8)
    tape.brief(count * item, _scan(count, 8))  # unique_by_key
    tape.allocate(count * item)  # parts per segment
    tape.allocate(count * item)  # offsets of parts
    tape.brief(_scan(count, item))
    tape.allocate(8)
    tape.allocate(count * item)  # offsets within parts
    tape.allocate(count * grad.size(-1) * _accumulator(grad.dtype))


def _embedding_bag_backward(call: _Call, tape: _Tape) -> None:
    """cuda/EmbeddingBag.cu, embedding_bag_backward_cuda_sum_avg; `max` takes nothing."""
    indices, grad = call["indices"], call["grad"]
    count, item = indices.numel(), indices.element_size()
    if call["mode"] == 2 or count == 0:
        return
    tape.copy(grad)
    tape.allocate(count * item)
    tape.allocate(count * item)
    tape.brief(count * item, _radix_sort(count, item, item, 8 * item))
    tape.outputs()
    _sum_segments(tape, count, item, grad)


def _index_put(call: _Call, tape: _Tape) -> None:
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
    tape.brief(_radix_sort(count, 8, 8, bits))


def _indexed_sizes(call: _Call) -> list[int]:
    sizes = call["self"].shape
    return [sizes[dim] for dim, index in enumerate(call["indices"]) if index is not None]


def _linear_positions(tape: _Tape, indices: list[Tensor]) -> None:
    """computeLinearIndex: index modulo size, times stride; sums go into the first product."""
    for place, index in enumerate(indices):
        if index.dtype != torch.int64:
            tape.allocate(index.numel() * 8)
        wrapped = tape.allocate(index.numel() * 8)
        product = tape.allocate(index.numel() * 8)
        tape.free(wrapped)
        if place > 0:
            tape.free(product)


# Matrix products: cuda/Blas.cpp and cuda/cuBlasCommonArgs.h


def workspace_bytes(target: Target) -> int:
    """What cuBLAS gets on first use, once per thread that multiplies, and keeps.

    cuda/CublasHandlePool.cpp, without `CUBLAS_WORKSPACE_CONFIG`. Blackwell has had as much as
    Hopper since torch 2.12.
    """
    large = (9, 10, 12) if target.torch_version >= (2, 12) else (9,)
    if target.compute_capability[0] in large:
        return 4096 * 8 * 1024
    return 4096 * 1024 * 2 + 16 * 1024 * 8


_LT_WORKSPACE = 2**20


def lt_workspace_bytes(target: Target) -> int:
    """What cuBLASLt gets on first use, once per thread, and keeps, besides `workspace_bytes`.

    Up to torch 2.8 it got its workspace for every call, from 2.9 to 2.11 it kept one of its own,
    since then it shares that of cuBLAS.
    """
    return _LT_WORKSPACE if (2, 9) <= target.torch_version < (2, 12) else 0


def _clone_for_blas(tape: _Tape, matrix: Tensor) -> None:
    """prepare_matrix_for_cublas: a copy unless rows or columns are contiguous and apart."""
    if _is_dense(matrix):
        return
    (rows, columns), (row_stride, column_stride) = matrix.shape, matrix.stride()
    by_column = row_stride == 1 and column_stride >= max(1, rows)
    by_row = column_stride == 1 and row_stride >= max(1, columns)
    if not (by_column or by_row):
        tape.allocate(_bytes(matrix))


def _matrix_product(call: _Call, tape: _Tape) -> None:
    """addmm_out_cuda_impl; `mm` is `addmm` without a bias.

    A bias vector goes to cuBLASLt, which adds it on the way; any other bias is first copied into
    the result. Neither takes memory, except that up to torch 2.8 every call of cuBLASLt got a
    workspace of its own.
    """
    tape.outputs()
    left, right = _operands(call, "mat1", "mat2")
    result = call.outputs[0]
    if result.numel() == 0:
        return
    for matrix in (right, left):  # the result is row-major, so that operands change places
        _clone_for_blas(tape, matrix)
    if call.target.torch_version < (2, 9) and _goes_to_lt(call, right):
        tape.allocate(_LT_WORKSPACE)


def _operands(call: _Call, left: str, right: str) -> tuple[Tensor, Tensor]:
    """`mm(self, mat2)` and `addmm(self, mat1, mat2)` name their operands differently."""
    return (call[left] if left in call.arguments else call["self"]), call[right]


def _goes_to_lt(call: _Call, right: Tensor) -> bool:
    bias = call.get("self") if "mat1" in call.arguments else None
    return (
        bias is not None
        and bias.dim() == 1
        and call["beta"] == 1
        and bias.size(0) == right.size(1)
        and bias.is_contiguous()
        and min(right.shape) > 1
        and bias.dtype in (torch.float64, torch.float32, *_HALF)
    )


def _batched_product(call: _Call, tape: _Tape) -> None:
    """baddbmm_out_cuda_impl."""
    tape.outputs()
    if "batch1" in call.arguments:
        first, second = call["batch1"], call["batch2"]
    else:
        first, second = call["self"], call["mat2"]
    result = call.outputs[0]
    if result.numel() == 0 or first.size(2) == 0:
        return
    transposed = _by_row(tape, result)
    leading = 1 if transposed else 2
    rows, columns = result.size(3 - leading), result.size(leading)
    left, right = (second, first) if transposed else (first, second)
    inner = left.size(leading)
    _clone_batch_for_blas(tape, left, leading, rows, inner)
    _clone_batch_for_blas(tape, right, leading, inner, columns)


def _by_row(tape: _Tape, result: Tensor) -> bool:
    """Whether the result is row-major to cuBLAS; if it is neither way, it is computed elsewhere."""
    _, row, column = result.stride()
    _, rows, columns = result.shape
    if row == 1 and (columns == 1 or column >= max(1, rows)):
        return False
    if column == 1 and (rows == 1 or row >= max(1, columns)):
        return True
    tape.allocate(_bytes(result))
    return False


def _clone_batch_for_blas(tape: _Tape, batch: Tensor, leading: int, m: int, n: int) -> None:
    """prepare_batch_matrix_for_cublas."""
    slow, fast = batch.stride(leading), batch.stride(3 - leading)
    if (fast == 1 and slow >= max(1, m)) or (slow == 1 and fast >= max(1, n)):
        return
    if not (batch.is_contiguous() and 0 not in batch.stride()[1:]):
        tape.allocate(_bytes(batch))


def _scaled_product(call: _Call, tape: _Tape) -> None:
    """cuda/CUDABlas.cpp, scaled_gemm: cuBLASLt's own workspace up to torch 2.8."""
    tape.outputs()
    if call.target.torch_version < (2, 9):
        tape.allocate(_LT_WORKSPACE)


# Reductions: cuda/Reduce.cuh and TensorIterator.cpp


@dataclass(frozen=True)
class _Loop:
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

    def halves(self) -> tuple[_Loop, _Loop]:
        """TensorIterator.cpp, split: along the dimension that reaches furthest."""
        reach = [
            (size - 1) * max(strides)
            for size, *strides in zip(self.shape, self.input, self.output, strict=True)
        ]
        dim = max(reversed(range(len(reach))), key=reach.__getitem__)
        half = self.shape[dim] // 2
        return self._narrow(dim, half), self._narrow(dim, self.shape[dim] - half)

    def _narrow(self, dim: int, size: int) -> _Loop:
        return _Loop((*self.shape[:dim], size, *self.shape[dim + 1 :]), self.input, self.output)


def _loop(tensor: Tensor, item_bytes: int, dims: Sequence[int], output_bytes: int) -> _Loop:
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


def _coalesced(columns: list[_Column]) -> _Loop:
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
    return _Loop(*shapes)


@dataclass(frozen=True)
class _Kind:
    """How a reduction adds up: bytes of its accumulator, elements one load takes."""

    accumulator: Callable[[torch.dtype], int]
    vector: Callable[[torch.dtype], int] = lambda dtype: 4
    casts: bool = True
    """Whether an input of another dtype than the output is converted beforehand."""
    full: bool = False
    """Whether it goes over all elements when no dimension is named, also with other arguments."""


def _pow2(number: int) -> int:
    return 1 << (max(1, number).bit_length() - 1)


@dataclass(frozen=True)
class _Shape:
    """What setReduceConfig needs to know about types: bytes, and elements per load."""

    item: int
    accumulator: int
    vector: int
    offset: int


def _staging(loop: _Loop, kind: _Shape, target: Target) -> tuple[int, int]:
    """Reduce.cuh, setReduceConfig: bytes of the staging buffer and of the semaphores.

    A reduction whose outputs do not fill the card is split over blocks. Each leaves its share in
    global memory. For sums over rows the buffer has one place per thread, not per output, so that
    the gradient of a bias takes tens of MiB.
    """
    outputs = loop.outputs
    inputs = math.prod(loop.shape) // outputs
    along = loop.reduced == len(loop.shape) or loop.input[0] < loop.input[loop.reduced]
    fastest = loop.input[0 if along else loop.reduced] if loop.shape else kind.item
    wide, high = (inputs, outputs) if along else (outputs, inputs)
    vector = 1
    if fastest == kind.item:
        if along and wide >= 128 and loop.reduced == 1:
            wide //= kind.vector
        elif not along:
            vector = _output_vector(loop, kind)
            wide //= vector
    width, height = _block(wide, high, 512 // vector)
    step_input, step_output = (width, 1) if along else (1, width)
    if _parts(inputs, step_input) < min(height * 16, 256):
        return 0, 0  # no split across warps, hence none across blocks
    step_input *= height
    per_thread = _parts(inputs, step_input)
    grid = _parts(outputs // vector, step_output)
    wanted = target.multiprocessors * (target.threads_per_multiprocessor // (width * height))
    if per_thread < 256 or grid > wanted:
        return 0, 0
    blocks = max(min(_parts(wanted, grid), _parts(per_thread, 16)), _parts(per_thread, 256))
    if blocks <= 1:
        return 0, 0
    places = 1 if along else width * vector
    return kind.accumulator * outputs * blocks * places, 4 * grid


def _block(wide: int, high: int, limit: int) -> tuple[int, int]:
    """ReduceConfig::set_block_dimension: threads along and across, a warp at most at first."""
    width_limit = _pow2(wide) if wide < limit else limit
    height_limit = _pow2(high) if high < limit else limit
    width = min(width_limit, 32)
    height = min(height_limit, limit // width)
    return min(width_limit, limit // height), height


def _output_vector(loop: _Loop, kind: _Shape) -> int:
    """Reduce.cuh, get_output_vec_size: 4, 2 or 1 outputs per thread, as alignment allows."""
    strides = [stride for dim, stride in enumerate(loop.input) if dim != loop.reduced]
    numbers = [kind.offset, loop.shape[loop.reduced], *(stride // kind.item for stride in strides)]
    return math.gcd(4, *numbers)


def _reduction(kind: _Kind) -> _Kernel:
    """The kernel of a reduction over `dim`, or over everything if there is none."""

    def kernel(call: _Call, tape: _Tape) -> None:
        tape.outputs()
        tensor = call["self"]
        if "other" in call.arguments or tensor.numel() == 0 or not call.outputs:
            return
        output = call.outputs[0].dtype
        item = tensor.dtype
        if kind.casts and item != output and not (item in _HALF and output == torch.float32):
            tape.allocate(tensor.numel() * output.itemsize)
            item = output
        dims = call.get("dim")
        dims = [dims] if isinstance(dims, int) else list(dims or ())
        loop = _loop(tensor, item.itemsize, dims, output.itemsize)
        shape = _Shape(
            item.itemsize, kind.accumulator(item), kind.vector(item), tensor.storage_offset()
        )
        _reduce(tape, loop, shape, item in _HALF and output == item, call.target)

    return kernel


def _reduce(tape: _Tape, loop: _Loop, kind: _Shape, apart: bool, target: Target) -> None:
    """Reduce.cuh, gpu_reduce_kernel: in pieces if 32 bits cannot address it.

    Pieces of a 16-bit result are added up `apart`, in fp32.
    """
    if not loop.fits_32_bits() and apart:
        tape.allocate(loop.outputs * kind.accumulator)
    for part in _addressable(loop):
        sizes = _staging(part, kind, target)
        if sizes[0]:
            tape.brief(*sizes)


def _addressable(loop: _Loop) -> Iterator[_Loop]:
    if loop.fits_32_bits():
        yield loop
    else:
        for half in loop.halves():
            yield from _addressable(half)


def _widened(dtype: torch.dtype) -> int:
    """Bytes of at::opmath_type."""
    return 4 if dtype in _HALF else dtype.itemsize


_SUM = _Kind(_widened, lambda dtype: 8 if dtype.itemsize == 2 else 4)
_MEAN = _Kind(_widened)
_EXTREME = _Kind(lambda dtype: dtype.itemsize, casts=False)
_INDEXED = _Kind(lambda dtype: 16, casts=False)
_LOGICAL = _Kind(lambda dtype: 1, casts=False)
_NORM = _Kind(_widened, casts=False)
_WELFORD = _Kind(lambda dtype: 32 if dtype == torch.float64 else 16, lambda dtype: 2, casts=False)


def _extreme(call: _Call, tape: _Tape) -> None:
    """cuda/ReduceMinValuesKernel.cu: with one dimension also where, which takes wider entries."""
    _reduction(_EXTREME if call.get("dim") is None else _INDEXED)(call, tape)


def _log_sum_exp(call: _Call, tape: _Tape) -> None:
    """ReduceOps.cpp, logsumexp_out_impl: maxima, then (self - maxima).exp_()."""
    tape.outputs()
    tensor, result = call["self"], call.outputs[0]
    size = result.numel() * tensor.element_size()
    tape.allocate(size)
    tape.brief(size, result.numel())
    tape.allocate(_bytes(tensor))


# Softmax, norms and the rest


def _softmax(call: _Call, tape: _Tape) -> None:
    """cuda/SoftMax.cu, host_softmax."""
    tape.outputs()
    tape.copy(call["self"])


def _softmax_backward(call: _Call, tape: _Tape) -> None:
    """cuda/SoftMax.cu, softmax_backward_cuda_out: `grad * output` is a tensor of its own."""
    tape.outputs()
    grad, output = call["grad_output"], call["output"]
    product = torch.promote_types(grad.dtype, output.dtype)
    tape.allocate(grad.numel() * product.itemsize)
    if not (grad.is_contiguous() and output.is_contiguous()):
        tape.copy(grad)
        tape.copy(output)


def _log_softmax_backward(call: _Call, tape: _Tape) -> None:
    """cuda/SoftMax.cu, host_softmax_backward."""
    tape.outputs()
    tape.copy(call["grad_output"])
    tape.copy(call["output"])


def _safe_softmax(call: _Call, tape: _Tape) -> None:
    """transformers/attention.cpp, _safe_softmax: which elements, and which rows, are all -inf."""
    tape.outputs()
    tensor = call["self"]
    tape.allocate(tensor.numel())
    tape.allocate(tensor.numel() // max(1, tensor.size(call["dim"])))
    tape.allocate(call.outputs[0].element_size())


def _norm_forward(call: _Call, tape: _Tape) -> None:
    """cuda/layer_norm_kernel.cu, layer_norm_cuda."""
    for name in ("input", "weight", "bias"):
        tensor = call.get(name)
        if tensor is not None:
            tape.copy(tensor)


def _norm_backward(call: _Call, tape: _Tape) -> None:
    """cuda/layer_norm_kernel.cu, LaunchGammaBetaBackwardCUDAKernel.

    Above 65536 rows that few columns cannot fill the card with, the gradients of weight and bias
    are first made for every 32 rows, and their sums replace the tensors made before.
    """
    tensor, grad = call["input"], call["grad_out"]
    tape.copy(tensor)
    tape.outputs()
    tape.copy(grad)
    columns = math.prod(call["normalized_shape"])
    rows = tensor.numel() // max(1, columns)
    if rows <= 64 * 1024 or columns // 32 >= call.target.multiprocessors // 2:
        return
    blocks = min(32768 // _parts(columns, 32), _parts(rows, 32))
    wanted = sum(call["output_mask"][1:])
    size = columns * tensor.element_size()
    for _ in range(wanted):
        tape.allocate(blocks * size)


def _group_norm(call: _Call, tape: _Tape) -> None:
    """cuda/group_norm_kernel.cu, GroupNormKernelImplInternal: factor and shift per channel."""
    tape.outputs()
    if call["HxW"] > 1 and (call["weight"] is not None or call["bias"] is not None):
        size = call["N"] * call["C"] * _accumulator(call["input"].dtype)
        tape.allocate(size)
        tape.allocate(size)


def _group_norm_backward(call: _Call, tape: _Tape) -> None:
    """cuda/group_norm_kernel.cu, GroupNormBackwardKernelImplInternal."""
    tape.outputs()
    item = _accumulator(call["input"].dtype)
    per_channel, per_group = call["N"] * call["C"] * item, call["N"] * call["group"] * item
    for size in (per_channel, per_channel, per_channel, per_group, per_group):
        tape.allocate(size)


def _foreach_norm(call: _Call, tape: _Tape) -> None:
    """cuda/ForeachReduceOp.cu, foreach_tensor_norm_cuda: a partial norm per 65536 elements.

    Every tensor gets as many places as the largest one needs.
    """
    tensors = call["self"]
    chunks = max(_parts(tensor.numel(), 65536) for tensor in tensors)
    tape.allocate(len(tensors) * chunks * _widened(call["dtype"] or tensors[0].dtype))


def _cumulative(call: _Call, tape: _Tape) -> None:
    """cuda/ScanKernels.cpp and cuda/ScanUtils.cuh, scan_dim."""
    tape.outputs()
    tensor, result = call["self"], call.outputs[0]
    if tensor.dtype != result.dtype:
        tape.allocate(_bytes(result))
    elif not tensor.is_contiguous():
        tape.allocate(_bytes(tensor))
    if tensor.dim() > 0 and tensor.numel() == tensor.size(call["dim"]):
        tape.brief(_scan(tensor.numel(), result.element_size()))


def _sort(call: _Call, tape: _Tape) -> None:
    """cuda/Sort.cpp and cuda/SortStable.cu: slices of up to 4096 are sorted in place."""
    tape.outputs()
    tensor = call["self"]
    if tensor.dim() == 0 or tensor.size(call["dim"]) <= 4096:
        return
    if not tensor.is_contiguous() or call["dim"] % tensor.dim() != tensor.dim() - 1:
        tape.allocate(_bytes(tensor))
    size = tensor.size(call["dim"])
    tape.allocate(size * 8)
    tape.brief(_radix_sort(size, tensor.element_size(), 8, 8 * tensor.element_size()))


def _multinomial(call: _Call, tape: _Tape) -> None:
    """Distributions.cpp, multinomial_out: one exponential random number per weight."""
    if not call["replacement"] or call["num_samples"] == 1:
        tape.allocate(_bytes(call["self"]))


def _where(call: _Call, tape: _Tape) -> None:
    """TensorCompare.cpp, where_self_out: operands are converted to the dtype of the result."""
    tape.outputs()
    result = call.outputs[0].dtype
    for name in ("self", "other"):
        operand = call[name]
        if isinstance(operand, Tensor) and operand.dtype != result:
            tape.allocate(operand.numel() * result.itemsize)


def _copy(call: _Call, tape: _Tape) -> None:
    """cuda/Copy.cu, copy_kernel_cuda: copies between devices go through contiguous memory."""
    tape.outputs()
    source, target = _ends(call)
    if source.device.type == target.device.type:
        return
    if source.dtype == target.dtype and _same_layout(source, target):
        return
    if source.device.type == "cpu":
        tape.copy(target)
    elif call["non_blocking"] and source.dtype != target.dtype:
        tape.allocate(source.numel() * target.element_size())
    else:
        tape.copy(source)


def _ends(call: _Call) -> tuple[Tensor, Tensor]:
    if "src" in call.arguments:
        return call["src"], call["self"]
    return call["self"], call.outputs[0]


def _same_layout(one: Tensor, other: Tensor) -> bool:
    return one.stride() == other.stride() and _is_dense(one)


_KERNELS: dict[str, _Kernel] = {
    f"aten::{name}": kernel
    for names, kernel in (
        ("_scaled_dot_product_flash_attention _flash_attention_forward", _flash_forward),
        ("_scaled_dot_product_flash_attention_backward _flash_attention_backward", _flash_backward),
        (
            "_scaled_dot_product_efficient_attention _efficient_attention_forward",
            _efficient_forward,
        ),
        (
            "_scaled_dot_product_efficient_attention_backward _efficient_attention_backward",
            _efficient_backward,
        ),
        ("_scaled_dot_product_cudnn_attention_backward _cudnn_attention_backward", _cudnn_backward),
        ("embedding_dense_backward", _embedding_backward),
        ("_embedding_bag_dense_backward", _embedding_bag_backward),
        ("index_put_ index_put _index_put_impl_ _unsafe_index_put", _index_put),
        ("mm addmm addmm_ _addmm_activation", _matrix_product),
        ("bmm baddbmm baddbmm_", _batched_product),
        ("_scaled_mm", _scaled_product),
        ("sum", _reduction(_SUM)),
        ("mean prod", _reduction(_MEAN)),
        ("amax amin", _reduction(_EXTREME)),
        ("max min", _extreme),
        ("argmax argmin", _reduction(_INDEXED)),
        ("any all", _reduction(_LOGICAL)),
        ("linalg_vector_norm norm", _reduction(_NORM)),
        ("var std var_mean std_mean", _reduction(_WELFORD)),
        ("logsumexp", _log_sum_exp),
        ("_softmax _log_softmax", _softmax),
        ("_softmax_backward_data", _softmax_backward),
        ("_log_softmax_backward_data", _log_softmax_backward),
        ("_safe_softmax", _safe_softmax),
        ("native_layer_norm _fused_rms_norm", _norm_forward),
        ("native_layer_norm_backward _fused_rms_norm_backward", _norm_backward),
        ("native_group_norm", _group_norm),
        ("native_group_norm_backward", _group_norm_backward),
        ("_foreach_norm", _foreach_norm),
        ("cumsum cumprod", _cumulative),
        ("sort", _sort),
        ("multinomial", _multinomial),
        ("where", _where),
        ("copy_ _to_copy", _copy),
    )
    for name in names.split()
}


# Outputs that CUDA makes otherwise than the functions for shapes alone


_OUTPUT_BYTES: dict[str, dict[int, int]] = {
    # The random state is two 64-bit numbers on the card, one more is unused; flash_api.cpp.
    "aten::_scaled_dot_product_flash_attention": {6: 16, 7: 8, 8: 0},
    "aten::_flash_attention_forward": {2: 16, 3: 8, 4: 0},
    "aten::_scaled_dot_product_cudnn_attention": {6: 8, 7: 8},
}

_OUTPUT_ORDER: dict[str, tuple[int, ...]] = {
    "aten::native_dropout": (1, 0),  # cuda/Dropout.cu makes the mask first
}


def output_bytes(func: torch._ops.OpOverload) -> Mapping[int, int]:
    """Bytes of those outputs, by position, that CUDA keeps on the card in another size.

    The shape functions put them on the `meta` device, where nobody would count them.
    """
    return _OUTPUT_BYTES.get(func._schema.name, {})


def output_order(func: torch._ops.OpOverload) -> tuple[int, ...]:
    """Positions of the outputs in the order CUDA allocates them; empty if it is their own order."""
    return _OUTPUT_ORDER.get(func._schema.name, ())
