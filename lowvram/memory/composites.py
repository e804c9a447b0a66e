"""Operators that PyTorch composes in another way on CUDA than on a device it does not know.

Registered for the simulated device above autograd, so that their parts are differentiated as
usual. Sources, in pytorch: aten/src/ATen/native/SoftMax.cpp, transformers/attention.cpp.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowvram.memory.attention import scaled_dot_product_attention
from lowvram.memory.listener import target

_aten = torch.ops.aten


def register_composites(library: torch.library.Library) -> None:
    for name, kernel in _COMPOSITES.items():
        for key in ("AutogradPrivateUse1", "PrivateUse1"):
            library.impl(name, kernel, key)


def _attention(*args: Any, **kwargs: Any) -> Tensor:
    return scaled_dot_product_attention(*args, **kwargs, target=target())


def _softmax(self: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    return _softened(_aten._softmax.default, self, dim, dtype)


def _log_softmax(self: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    return _softened(_aten._log_softmax.default, self, dim, dtype)


def _softened(op: Any, self: Tensor, dim: int, dtype: torch.dtype | None) -> Tensor:
    """CUDA's kernel reads fp16 and writes fp32, without a copy of its input in between."""
    if self.dtype == torch.float16 and dtype == torch.float32:
        return op(self, dim, True)  # type: ignore[no-any-return]
    return op(self if dtype is None else self.to(dtype), dim, False)  # type: ignore[no-any-return]


_COMPOSITES = {
    "scaled_dot_product_attention": _attention,
    "softmax.int": _softmax,
    "log_softmax.int": _log_softmax,
}
