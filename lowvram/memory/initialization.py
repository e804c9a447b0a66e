"""Weights that nobody reads are not drawn."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_aten: Any = torch.ops.aten


class LazyInitialization(TorchDispatchMode):
    """Large weights on the CPU are not drawn: nobody reads them, and untouched pages are free."""

    LARGE = 1 << 18  # elements

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _DRAWS:
            weight = args[0]
            large = weight.is_floating_point() and weight.numel() >= self.LARGE
            if large and weight.device.type == "cpu":
                return weight
        elif func in _RANDOM_FACTORIES and torch.Size(args[0]).numel() >= self.LARGE:
            kwargs.pop("generator", None)
            return torch.empty(args[0], **kwargs)
        return func(*args, **kwargs)


_DRAWS = {
    _aten.normal_.default,
    _aten.uniform_.default,
    _aten.erfinv_.default,
    _aten.clamp_.default,
    _aten.mul_.Scalar,
    _aten.add_.Scalar,
}
_RANDOM_FACTORIES = {
    _aten.randn.default,
    _aten.randn.generator,
    _aten.rand.default,
    _aten.rand.generator,
}
