"""bitsandbytes' operators, as its CUDA kernels allocate. The library itself is not imported.

Without these, the simulated device would get its kernels for unknown devices, which are written in
PyTorch. Source: bitsandbytes 0.50.2, backends/cuda/ops.py and backends/default/ops.py; the names
of the arguments are those of its operators.

Shapes: n numbers in blocks of `blocksize`, each with its largest absolute value.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lowvram.memory import values

_FUSED_ROWS = 4
"""Up to here a 4-bit product reads the weight as it is; above, bitsandbytes chooses by card, and
this module takes what it does from 1,536 rows on: a 16-bit copy of the weight, then a product."""


def register_quantized(library: torch.library.Library) -> None:
    """`library` is one for the namespace bitsandbytes, which need not be there yet."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # operators that are not defined yet
        for name, kernel in _KERNELS.items():
            library.impl(name, kernel, "PrivateUse1")


def _blocks(tensor: Tensor, blocksize: int) -> int:
    return -(-tensor.numel() // blocksize)


def _quantize_blockwise(A: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    A = A.contiguous()
    absmax = A.new_empty(_blocks(A, blocksize), dtype=torch.float32)
    return torch.empty_like(A, dtype=torch.uint8), absmax


def _dequantize_blockwise(
    A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype
) -> Tensor:
    out = torch.empty_like(A, dtype=dtype)
    A.contiguous()
    return out


def _quantize_4bit(
    A: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype
) -> tuple[Tensor, Tensor]:
    A = A.contiguous()
    absmax = A.new_empty(_blocks(A, blocksize), dtype=torch.float32)
    packed = (A.numel() + 1) // (quant_storage.itemsize * 2)
    return A.new_empty((packed, 1), dtype=quant_storage), absmax


def _dequantize_4bit(  # noqa: PLR0913 - the operator's arguments
    A: Tensor,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    return A.new_empty(shape, dtype=dtype)


def _gemv_4bit(  # noqa: PLR0913 - the operator's arguments
    A: Tensor, B: Tensor, shapeB: Sequence[int], absmax: Tensor, code: Tensor, blocksize: int
) -> Tensor:
    return A.new_empty((*A.shape[:-1], shapeB[0]))


def _gemm_4bit(  # noqa: PLR0913 - the operator's arguments
    A: Tensor,  # (..., in)
    B: Tensor,  # packed (out, in)
    shapeB: Sequence[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None = None,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    if A.numel() // A.shape[-1] <= _FUSED_ROWS:
        return A.contiguous().new_empty((*A.shape[:-1], shapeB[0]))
    if absmax_8bit is not None and absmax_offset is not None:
        absmax = torch.empty_like(absmax_8bit, dtype=torch.float32)
        absmax = absmax + absmax_offset
    weight = A.new_empty(shapeB)
    return F.linear(A, weight, bias)


def _int8_linear_matmul(A: Tensor, B: Tensor) -> Tensor:
    out = A.new_empty((*A.shape[:-1], B.shape[0]), dtype=torch.int32)
    if B.shape[-1] % 4:  # cuBLASLt has no such product
        out.copy_(torch.matmul(A.float(), B.float().t()).to(torch.int32))
    return out


def _int8_mm_dequant(
    A: Tensor,
    row_stats: Tensor,
    col_stats: Tensor,
    dtype: torch.dtype | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    out = torch.empty_like(A, dtype=torch.float16)
    if bias is not None and bias.dtype != torch.float16:
        out.add_(bias)
    return out.to(dtype or torch.float16)


def _int8_vectorwise_quant(A: Tensor, threshold: float = 0.0) -> tuple[Any, ...]:
    stats = A.new_empty(A.numel() // A.shape[-1], dtype=torch.float32)
    out = torch.empty_like(A, dtype=torch.int8, memory_format=torch.contiguous_format)
    outliers = _outlier_columns(A, threshold) if threshold > 0.0 else None
    if stats.numel() > 1 and outliers is not None:
        out[:, outliers] = 0
    return out, stats, outliers


def _outlier_columns(A: Tensor, threshold: float) -> Tensor:
    """None are found, since no value here is large."""
    outliers = A.abs() >= threshold
    outliers.any().item()
    return A.new_empty(0, dtype=torch.int64)


def _int8_double_quant(A: Tensor, threshold: float = 0.0) -> tuple[Any, ...]:
    rows, row_stats, outliers = _int8_vectorwise_quant(A, threshold)
    magnitude = A.abs().view(-1, A.shape[-1])
    mask = magnitude >= threshold if threshold > 0.0 else None
    if mask is not None:
        magnitude.masked_fill_(mask, 0.0)
    column_stats = magnitude.amax(dim=0).float()
    if mask is not None:
        A = A.masked_fill(mask, 0.0)
    columns = torch.round(A.mul(127.0) / column_stats.unsqueeze(0)).to(torch.int8)
    return rows, columns, row_stats, column_stats.flatten().float(), outliers


def _in_place(*args: Any, **kwargs: Any) -> None:
    """Writes to what it is given, and takes nothing."""
    for tensor in (*args, *kwargs.values()):
        if isinstance(tensor, Tensor):
            values.forget(tensor)


_KERNELS: dict[str, Callable[..., Any]] = {
    "quantize_blockwise": _quantize_blockwise,
    "dequantize_blockwise": _dequantize_blockwise,
    "dequantize_blockwise.out": _in_place,
    "quantize_4bit": _quantize_4bit,
    "dequantize_4bit": _dequantize_4bit,
    "dequantize_4bit.out": _in_place,
    "gemv_4bit": _gemv_4bit,
    "gemv_4bit.out": _in_place,
    "gemm_4bit": _gemm_4bit,
    "int8_linear_matmul": _int8_linear_matmul,
    "int8_linear_matmul.out": _in_place,
    "int8_mm_dequant": _int8_mm_dequant,
    "int8_vectorwise_quant": _int8_vectorwise_quant,
    "int8_double_quant": _int8_double_quant,
    "optimizer_update_32bit": _in_place,
    "optimizer_update_8bit_blockwise": _in_place,
}
