"""Tensors of the simulated device: a storage with a size and an address, and no bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from lowvram.memory import listener
from lowvram.memory.measure import SIMULATED

_aten = torch.ops.aten
_C: Any = torch._C
_CPU_KEYS = _C.DispatchKeySet(_C.DispatchKey.CPU)
_set_storage = _aten.set_.source_Storage_storage_offset


def empty(size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A new tensor with a storage of its own."""
    elements = 0 if 0 in size else 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    storage = empty_storage(elements * dtype.itemsize)
    tensor = _C._acc.create_empty_tensor((0,), dtype)
    _set_storage.redispatch(_CPU_KEYS, tensor, storage, 0, size, stride)
    return tensor  # type: ignore[no-any-return]


def empty_storage(size_bytes: int) -> torch.UntypedStorage:
    address = listener.current.allocate(size_bytes)
    storage: torch.UntypedStorage = _C._construct_storage_from_data_pointer(
        address, torch.device(SIMULATED, 0), size_bytes
    )
    if size_bytes:
        listener.current.watch(storage, address)
    return storage


def contiguous(size: Sequence[int]) -> list[int]:
    stride = [1] * len(size)
    for i in range(len(size) - 2, -1, -1):
        stride[i] = stride[i + 1] * max(1, size[i + 1])
    return stride


def empty_in_format(
    size: Sequence[int],
    *,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
    **_: Any,
) -> Tensor:
    if memory_format not in (None, torch.contiguous_format):
        like = torch.empty(size, device="meta", memory_format=memory_format)
        return empty(size, like.stride(), dtype or torch.get_default_dtype())
    return empty(size, contiguous(size), dtype or torch.get_default_dtype())


def empty_strided(
    size: Sequence[int], stride: Sequence[int], *, dtype: torch.dtype | None = None, **_: Any
) -> Tensor:
    return empty(size, stride, dtype or torch.get_default_dtype())


def resize(self: Tensor, size: Sequence[int], *, memory_format: Any = None) -> Tensor:
    """In place; a storage that is too small is replaced by a new one, as on a card."""
    stride = contiguous(size)
    needed = int(self.storage_offset() + math.prod(size)) * self.dtype.itemsize
    storage = self.untyped_storage()
    if needed > storage.nbytes():
        storage = empty_storage(needed)
    _set_storage.redispatch(_CPU_KEYS, self, storage, self.storage_offset(), size, stride)
    return self


def on_metadata(op: OpOverload) -> Callable[..., Any]:
    """The CPU's kernel, which looks at shapes only."""

    def kernel(*args: Any, **kwargs: Any) -> Any:
        return op.redispatch(_CPU_KEYS, *args, **kwargs)

    return kernel


METADATA_ONLY: list[OpOverload] = [
    _aten.as_strided.default,
    _aten.view.default,
    _aten.view.dtype,
    _aten._reshape_alias.default,
    _aten.unfold.default,
    _aten.view_as_real.default,
    _aten.view_as_complex.default,
    _aten.set_.default,
    _aten.set_.source_Storage,
    _aten.set_.source_Storage_storage_offset,
    _aten.set_.source_Tensor,
    _aten.is_set_to.default,
]


def alias_of(tensor: Tensor) -> Tensor:
    alias: Tensor = _C._acc.create_empty_tensor((0,), tensor.dtype)
    _set_storage.redispatch(
        _CPU_KEYS,
        alias,
        tensor.untyped_storage(),
        tensor.storage_offset(),
        tensor.shape,
        tensor.stride(),
    )
    return alias
