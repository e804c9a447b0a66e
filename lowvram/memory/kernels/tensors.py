"""Small questions that several kernels ask."""

from __future__ import annotations

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


def bytes_of(tensor: Tensor) -> int:
    """What a contiguous copy of it takes."""
    return tensor.numel() * tensor.element_size()


def accumulator_bytes(dtype: torch.dtype) -> int:
    """Bytes of the type a kernel adds up in: at least fp32 for the 16-bit types."""
    return max(dtype.itemsize, 4) if dtype.is_floating_point else dtype.itemsize


def opmath_bytes(dtype: torch.dtype) -> int:
    """Bytes of at::opmath_type."""
    return 4 if dtype in HALF else dtype.itemsize


def is_dense(tensor: Tensor) -> bool:
    """TensorImpl.cpp, is_non_overlapping_and_dense: contiguous in some order of its dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True


def parts(number: int, size: int) -> int:
    """How many parts of at most `size` make up a number."""
    return -(-number // size)


def is_deterministic() -> bool:
    """Whether deterministic algorithms are demanded, not only wished for."""
    return (
        torch.are_deterministic_algorithms_enabled()
        and not torch.is_deterministic_algorithms_warn_only_enabled()
    )
