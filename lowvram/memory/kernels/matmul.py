"""Matrix products: cuda/Blas.cpp and cuda/cuBlasCommonArgs.h.

m, k, n are the sizes of a product.
"""

from __future__ import annotations

import os
import re

import torch
from torch import Tensor

from lowvram.memory.kernels.tape import Call, Tape
from lowvram.memory.kernels.target import Target
from lowvram.memory.kernels.tensors import HALF, bytes_of, is_dense

_LT_WORKSPACE = 2**20


def workspace_bytes(target: Target) -> int:
    """What cuBLAS gets on first use, once per thread that multiplies, and keeps.

    cuda/CublasHandlePool.cpp. `CUBLAS_WORKSPACE_CONFIG` is of the form :KIB:COUNT:KIB:COUNT.
    Blackwell has had as much as Hopper since torch 2.12.
    """
    configured = re.findall(r":(\d+):(\d+)", os.environ.get("CUBLAS_WORKSPACE_CONFIG", ""))
    if configured:
        return sum(int(kib) * int(count) * 1024 for kib, count in configured)
    large = (9, 10, 12) if target.torch_version >= (2, 12) else (9,)
    if target.compute_capability[0] in large:
        return 4096 * 8 * 1024
    return 4096 * 1024 * 2 + 16 * 1024 * 8


def lt_workspace_bytes(target: Target) -> int:
    """What cuBLASLt gets on first use, once per thread, and keeps, besides `workspace_bytes`.

    Up to torch 2.8 it got its workspace for every call, from 2.9 to 2.11 it kept one of its own,
    since then it shares that of cuBLAS.
    """
    return _LT_WORKSPACE if (2, 9) <= target.torch_version < (2, 12) else 0


def _clone_for_blas(tape: Tape, matrix: Tensor) -> None:
    """prepare_matrix_for_cublas: a copy unless rows or columns are contiguous and apart."""
    if is_dense(matrix):
        return
    (rows, columns), (row_stride, column_stride) = matrix.shape, matrix.stride()
    by_column = row_stride == 1 and column_stride >= max(1, rows)
    by_row = column_stride == 1 and row_stride >= max(1, columns)
    if not (by_column or by_row):
        tape.allocate(bytes_of(matrix))


def matrix_product(call: Call, tape: Tape) -> None:
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


def _operands(call: Call, left: str, right: str) -> tuple[Tensor, Tensor]:
    """`mm(self, mat2)` and `addmm(self, mat1, mat2)` name their operands differently."""
    return (call[left] if left in call.arguments else call["self"]), call[right]


def _goes_to_lt(call: Call, right: Tensor) -> bool:
    bias = call.get("self") if "mat1" in call.arguments else None
    return (
        bias is not None
        and bias.dim() == 1
        and call["beta"] == 1
        and bias.size(0) == right.size(1)
        and bias.is_contiguous()
        and min(right.shape) > 1
        and bias.dtype in (torch.float64, torch.float32, *HALF)
    )


def batched_product(call: Call, tape: Tape) -> None:
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


def _by_row(tape: Tape, result: Tensor) -> bool:
    """Whether the result is row-major to cuBLAS; if it is neither way, it is computed elsewhere."""
    _, row, column = result.stride()
    _, rows, columns = result.shape
    if row == 1 and (columns == 1 or column >= max(1, rows)):
        return False
    if column == 1 and (rows == 1 or row >= max(1, columns)):
        return True
    tape.allocate(bytes_of(result))
    return False


def _clone_batch_for_blas(tape: Tape, batch: Tensor, leading: int, m: int, n: int) -> None:
    """prepare_batch_matrix_for_cublas."""
    slow, fast = batch.stride(leading), batch.stride(3 - leading)
    if (fast == 1 and slow >= max(1, m)) or (slow == 1 and fast >= max(1, n)):
        return
    if not (batch.is_contiguous() and 0 not in batch.stride()[1:]):
        tape.allocate(bytes_of(batch))


def scaled_product(call: Call, tape: Tape) -> None:
    """cuda/CUDABlas.cpp, scaled_gemm: cuBLASLt's own workspace up to torch 2.8."""
    tape.outputs()
    if call.target.torch_version < (2, 9):
        tape.allocate(_LT_WORKSPACE)
