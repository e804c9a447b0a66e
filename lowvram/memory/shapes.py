"""The outputs of an operator, without running it: from PyTorch's own functions for shapes.

Shapes: b batch, i and o features in and out.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from lowvram.memory.kernels import output_bytes

_aten = torch.ops.aten
_C: Any = torch._C
_META, _CPU = torch.device("meta"), torch.device("cpu")
_shapes: dict[Any, Any] = {}
_MOST_SHAPES = 50_000


def shapes_of(op: OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The operator's outputs on the meta device; remembered."""
    key: Any = None
    found = None
    with contextlib.suppress(TypeError):  # an argument that does not hash
        key = (op, _key(args), _key(kwargs), torch.is_grad_enabled())
        found = _shapes.get(key)
    if found is None:
        found = _run_for_shapes(op, args, kwargs)
        if sizes := output_bytes(op):
            found = tuple(
                torch.empty(sizes[i], dtype=torch.uint8, device=_META) if i in sizes else value
                for i, value in enumerate(found)
            )
        if key is not None:
            if len(_shapes) > _MOST_SHAPES:
                _shapes.clear()
            _shapes[key] = found
    return found


def _run_for_shapes(op: OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """On the meta device; operators that are not made for it run on the CPU, with zeros."""
    with _C._DisableTorchDispatch():
        try:
            return _SHAPES.get(op, op)(*_placed(args, _META), **_placed(kwargs, _META))
        except NotImplementedError:
            on_cpu = op(*_placed(args, _CPU), **_placed(kwargs, _CPU))
            return _placed(on_cpu, _META)


def _key(value: Any) -> Any:
    if isinstance(value, Tensor):
        return (tuple(value.shape), value.stride(), value.dtype)
    if isinstance(value, list | tuple):
        return tuple(_key(item) for item in value)
    if isinstance(value, dict):
        return tuple((name, _key(item)) for name, item in value.items())
    return (type(value), value)


def _placed(value: Any, device: torch.device) -> Any:
    """The value with tensors of the same shapes on `device` in place of its own."""
    if isinstance(value, Tensor):
        like = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
        return like.zero_() if device.type == "cpu" else like
    if isinstance(value, list | tuple):
        return type(value)(_placed(item, device) for item in value)
    if isinstance(value, dict):
        return {name: _placed(item, device) for name, item in value.items()}
    if isinstance(value, torch.Generator):
        return None
    return device if isinstance(value, torch.device) else value


def tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in tensors_in(item)]
    if isinstance(value, dict):
        return tensors_in(list(value.values()))
    return []


# Outputs whose size depends on values take the largest there can be.


def _nonzero(self: Tensor) -> Tensor:
    return torch.empty((self.dim(), self.numel()), dtype=torch.int64, device=_META).t()


def _masked_select(self: Tensor, mask: Tensor) -> Tensor:
    shape = torch.broadcast_shapes(self.shape, mask.shape)
    return torch.empty(math.prod(shape), dtype=self.dtype, device=_META)


def _unique(self: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    n = self.numel()
    index = torch.empty(n, dtype=torch.int64, device=_META)
    return torch.empty(n, dtype=self.dtype, device=_META), index.view(self.shape), index


def _log_sigmoid(self: Tensor) -> tuple[Tensor, Tensor]:
    """native/cuda/Activation.cpp: without the buffer that the CPU keeps for its backward pass."""
    return torch.empty_like(self), self.new_empty(0)


def _grouped_product(
    a: Tensor,
    b: Tensor,
    offsets: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """GroupedMMUtils.h, create_grouped_gemm_output_tensor: rows begin at multiples of 16 bytes.

    torch's own shape function knows bf16 only.
    """
    dtype = out_dtype or a.dtype
    rows, columns = a.size(-2), b.size(-1)
    row_stride = -(-columns * dtype.itemsize // 16) * 16 // dtype.itemsize
    if a.dim() != b.dim():
        size, stride = [rows, columns], [row_stride, 1]
    else:
        groups = a.size(0) if a.dim() == 3 else _size(offsets)
        size, stride = [groups, rows, columns], [rows * row_stride, row_stride, 1]
    return torch.empty_strided(size, stride, dtype=dtype, device=_META)


def _size(vector: Tensor | None) -> int:
    return 0 if vector is None else vector.numel()


def _gru_cell(
    input_gates: Tensor, hidden_gates: Tensor, hidden: Tensor, *biases: Tensor | None
) -> tuple[Tensor, Tensor]:
    """native/cuda/RNN.cu, _thnn_fused_gru_cell_cuda: the new state, and what backward needs."""
    return torch.empty_like(hidden), hidden.new_empty(hidden.size(0), hidden.size(1) * 5)


def _gru_cell_backward(
    grad: Tensor, workspace: Tensor, has_bias: bool
) -> tuple[Tensor | None, ...]:
    gates = [workspace.new_empty(grad.size(0), grad.size(1) * 3) for _ in range(2)]
    biases = [gate.sum(0) if has_bias else None for gate in gates]
    return *gates, torch.empty_like(grad), *biases


def _convolution(*args: Any) -> Tensor:
    return _aten.convolution.default(*args)  # type: ignore[no-any-return]


def _convolution_backward(*args: Any) -> Any:
    """Without the sizes of the bias, which the operator for other devices leaves out."""
    grad_output, input_, weight, *rest = args
    return _aten.convolution_backward.default(grad_output, input_, weight, [weight.shape[0]], *rest)


_SHAPES: dict[OpOverload, Callable[..., Any]] = {
    _aten.nonzero.default: _nonzero,
    _aten.masked_select.default: _masked_select,
    _aten._unique2.default: _unique,
    _aten.log_sigmoid_forward.default: _log_sigmoid,
    _aten._grouped_mm.default: _grouped_product,
    _aten._thnn_fused_gru_cell.default: _gru_cell,
    _aten._thnn_fused_gru_cell_backward.default: _gru_cell_backward,
    _aten.convolution_overrideable.default: _convolution,
    _aten.convolution_backward_overrideable.default: _convolution_backward,
}
