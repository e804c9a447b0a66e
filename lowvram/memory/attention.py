"""Which attention CUDA would run, and that attention in terms of the operators CUDA runs.

`torch.nn.functional.scaled_dot_product_attention` asks the device which kernel to use; a device
that is neither CPU nor CUDA gets the slow one made of matrix products. Here is the choice a CUDA
card would make and the way PyTorch goes from there, so that a simulated device allocates what the
card does. Nested tensors are not handled.

Sources, in pytorch: aten/src/ATen/native/transformers/cuda/sdp_utils.cpp (the choice),
transformers/sdp_utils_cpp.h (its conditions), transformers/attention.cpp (the operators).

Shapes: b batch, h heads of the queries, g heads of keys and values, l queries, s keys, d head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from lowvram.memory.kernels import Target

__all__ = ["Backend", "Enabled", "choose_attention", "scaled_dot_product_attention"]

Backend = Literal["flash", "efficient", "cudnn", "math"]

_HALF = (torch.float16, torch.bfloat16)
_NUMBERS: dict[int, Backend] = {0: "math", 1: "flash", 2: "efficient", 3: "cudnn"}
"""at::SDPBackend; 4 is `overrideable`, which CUDA never runs."""

_ORDER: tuple[Backend, ...] = ("flash", "efficient", "math", "cudnn")
_CUDNN_FIRST: tuple[Backend, ...] = ("cudnn", "flash", "efficient", "math")


@dataclass(frozen=True, kw_only=True)
class Enabled:
    """The switches of `torch.backends.cuda` and `torch.nn.attention.sdpa_kernel`."""

    flash: bool = True
    efficient: bool = True
    cudnn: bool = True
    math: bool = True
    half_math: bool = False
    """Whether the math path may stay in 16 bits (`fp16_bf16_reduction_math_sdp_allowed`)."""
    order: tuple[Backend, ...] = ()
    """The order asked for with `sdpa_kernel(..., set_priority=True)`; empty: the card's own."""

    @classmethod
    def current(cls) -> Enabled:
        """The switches as they stand in this process."""
        cuda = torch.backends.cuda
        numbers = torch._C._get_sdp_priority_order()
        order = tuple(_NUMBERS[number] for number in numbers if number in _NUMBERS)
        return cls(
            flash=cuda.flash_sdp_enabled(),
            efficient=cuda.mem_efficient_sdp_enabled(),
            cudnn=cuda.cudnn_sdp_enabled(),
            math=cuda.math_sdp_enabled(),
            half_math=cuda.fp16_bf16_reduction_math_sdp_allowed(),
            order=() if order == _ORDER else order,
        )


@dataclass(frozen=True)
class _Call:
    """One call of attention, as the conditions look at it."""

    query: Tensor  # (b, h, l, d)
    key: Tensor  # (b, g, s, d)
    value: Tensor  # (b, g, s, d)
    mask: Tensor | None
    dropout: float
    causal: bool
    gqa: bool
    needs_grad: bool
    target: Target

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value


def choose_attention(  # noqa: PLR0913 - the arguments of torch's function
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    enable_gqa: bool = False,
    *,
    target: Target,
    needs_grad: bool,
    enabled: Enabled | None = None,
) -> Backend:
    """The kernel a card takes: the first of its order that is enabled and takes the arguments."""
    enabled = Enabled() if enabled is None else enabled
    call = _Call(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa, needs_grad, target)
    for backend in enabled.order or (_CUDNN_FIRST if _prefers_cudnn(target) else _ORDER):
        if getattr(enabled, backend) and _TAKES[backend](call):
            return backend
    raise RuntimeError("No available kernel. Aborting execution.")


def _prefers_cudnn(target: Target) -> bool:
    """sdp_utils.cpp, check_prefer_cudnn_attention: server cards from Hopper on, cuDNN > 9.15.0."""
    major, minor = target.compute_capability
    served = major in (9, 10) and (target.cuda_version >= (13, 0) or minor in (0, 3))
    return target.cudnn_version > 91500 and served


def _takes_flash(call: _Call) -> bool:
    """sdp_utils.cpp, can_use_flash_attention."""
    return (
        _is_four_dimensional(call)
        and call.mask is None
        and _flash_head_size(call)
        and (8, 0) <= call.target.compute_capability <= (12, 1)
        and not (call.causal and call.query.size(-2) != call.key.size(-2))
        and _has_dtype(call, _HALF)
        and _heads_match(call, supports_gqa=True)
        and _has_tokens(call)
        and _last_stride_is_one(call, or_single=True)
    )


def _flash_head_size(call: _Call) -> bool:
    """One head size of at most 256; cards with little shared memory train only some of them."""
    sizes = {tensor.size(-1) for tensor in call.tensors}
    if len(sizes) > 1 or max(sizes) > 256:
        return False
    card, size = call.target.compute_capability, call.query.size(-1)
    small = (8, 6) <= card <= (8, 9) or (12, 0) <= card <= (12, 1)
    if call.needs_grad and small:
        return size <= 192 or (size > 224 and call.dropout == 0.0)
    return True


def _takes_efficient(call: _Call) -> bool:
    """sdp_utils.cpp, can_use_mem_efficient_attention."""
    card = call.target.compute_capability
    dtypes = (torch.float16, torch.float32)
    return (
        (5, 0) <= card <= (12, 1)
        and _is_four_dimensional(call)
        and _efficient_head_size(call)
        and _has_tokens(call)
        and _last_stride_is_one(call, or_single=False)
        and _heads_match(call, supports_gqa=False)
        and _has_dtype(call, (*dtypes, torch.bfloat16) if card >= (8, 0) else dtypes)
    )


def _efficient_head_size(call: _Call) -> bool:
    """Head sizes are multiples of the alignment of a tensor-core matrix product."""
    major = call.target.compute_capability[0]
    half = call.query.dtype in _HALF
    alignment = 4 if major >= 8 else 1
    if major >= 8 or (major >= 7 and half):
        alignment = max(alignment, 8 if half else 4)
    size, value_size = call.query.size(-1), call.value.size(-1)
    return (
        size == call.key.size(-1)
        and min(size, value_size) > 0
        and size % alignment == 0
        and value_size % alignment == 0
    )


def _takes_cudnn(call: _Call) -> bool:
    """sdp_utils.cpp, can_use_cudnn_attention, for cuDNN 9."""
    version = call.target.cudnn_version
    if version < 90000 or (call.dropout > 0.0 and 91100 < version < 91400):
        return False
    strict = torch.are_deterministic_algorithms_enabled()
    return (
        (8, 0) <= call.target.compute_capability <= (12, 1)
        and _is_four_dimensional(call)
        and not (strict and not torch.is_deterministic_algorithms_warn_only_enabled())
        and _has_dtype(call, _HALF)
        and _mask_broadcasts(call)
        and (call.dropout * 16.0).is_integer()
        and _has_tokens(call)
        and _last_stride_is_one(call, or_single=True)
        and _heads_match(call, supports_gqa=True, same_key_and_value=False)
        and _cudnn_shapes(call)
    )


def _cudnn_shapes(call: _Call) -> bool:
    """sdp_utils.cpp, check_cudnn_tensor_shapes."""
    size, value_size = call.query.size(3), call.value.size(3)
    major, minor = call.target.compute_capability
    server = (major == 9 and minor == 0) or major == 10
    limit = 128
    if server and call.target.cudnn_version >= 91100 and (size, value_size) == (192, 128):
        limit = 192
    return (
        max(call.query.size(0), call.query.size(1)) <= 65535
        and max(size, value_size) <= limit
        and size % 8 == 0
        and value_size % 8 == 0
        and call.key.size(2) != 1
        and not (call.dropout != 0.0 and call.query.size(2) == 1)
    )


_TAKES: dict[Backend, Callable[[_Call], bool]] = {
    "flash": _takes_flash,
    "efficient": _takes_efficient,
    "cudnn": _takes_cudnn,
    "math": lambda call: True,
}


def _is_four_dimensional(call: _Call) -> bool:
    return all(tensor.dim() == 4 for tensor in call.tensors)


def _has_dtype(call: _Call, allowed: tuple[torch.dtype, ...]) -> bool:
    return {tensor.dtype for tensor in call.tensors} <= {call.query.dtype} & set(allowed)


def _has_tokens(call: _Call) -> bool:
    return call.query.size(-2) > 0 and call.key.size(-2) > 0


def _last_stride_is_one(call: _Call, *, or_single: bool) -> bool:
    if call.mask is not None and call.mask.stride(-1) != 1:
        return False
    if or_single and call.query.size(-1) == 1:
        return True
    return all(tensor.stride(-1) == 1 for tensor in call.tensors)


def _heads_match(call: _Call, *, supports_gqa: bool, same_key_and_value: bool = True) -> bool:
    """sdp_utils_cpp.h, check_batch_size_and_num_heads_dense."""
    if len({tensor.size(0) for tensor in call.tensors}) > 1:
        return False
    heads, key_heads, value_heads = (tensor.size(-3) for tensor in call.tensors)
    if not (call.gqa and supports_gqa):
        return heads == key_heads == value_heads
    if same_key_and_value and key_heads != value_heads:
        return False
    return heads % key_heads == 0 and heads % value_heads == 0


def _mask_broadcasts(call: _Call) -> bool:
    """sdp_utils_cpp.h, check_attn_mask_shape: (l, s) or (b, h, l, s), each size possibly 1."""
    mask = call.mask
    if mask is None:
        return True
    if mask.requires_grad or mask.dim() not in (2, 4):
        return False
    batch, heads, queries, _ = call.query.shape
    full = (batch, heads, queries, call.key.size(2))[-mask.dim() :]
    return all(size in (1, other) for size, other in zip(mask.shape, full, strict=True))


def scaled_dot_product_attention(  # noqa: PLR0913 - the arguments of torch's function
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    target: Target,
    enabled: Enabled | None = None,
) -> Tensor:
    """Attention as CUDA's composite function runs it, in operators that autograd knows.

    `target` and `enabled` are ours (bind them with `functools.partial`); without `enabled` the
    switches of this process hold.
    """
    enabled = Enabled.current() if enabled is None else enabled
    if 0 in (query.numel(), key.numel(), value.numel()):
        return _nothing(query, key, value)
    inputs = (query, key, value)
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    backend = choose_attention(
        query,
        key,
        value,
        attn_mask,
        dropout_p,
        is_causal,
        enable_gqa,
        target=target,
        needs_grad=needs_grad,
        enabled=enabled,
    )
    if backend == "flash":
        return _flash(inputs, dropout_p, is_causal, scale)
    lowest = -65504.0 if backend == "cudnn" else -math.inf
    bias = _additive(attn_mask, query.dtype, lowest)
    if backend == "math":
        options = _Math(dropout_p, is_causal, scale, enable_gqa, enabled.half_math)
        return _attend_by_products(inputs, bias, options)
    if backend == "efficient":
        bias = None if bias is None else _aligned(bias, query, key)
        operator = torch.ops.aten._scaled_dot_product_efficient_attention
    else:
        operator = torch.ops.aten._scaled_dot_product_cudnn_attention
    output = operator(*inputs, bias, needs_grad, dropout_p, is_causal, scale=scale)[0]
    return cast(Tensor, output)


def _nothing(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention over no elements: zeros that still depend on all inputs."""
    zeros = query.new_zeros((*query.shape[:-1], value.size(-1)))
    return zeros + (query.sum() + key.sum() + value.sum()) * 0


def _scale(query: Tensor, scale: float | None) -> float:
    return 1.0 / math.sqrt(query.size(-1)) if scale is None else scale


def _flash(
    inputs: tuple[Tensor, Tensor, Tensor], dropout_p: float, is_causal: bool, scale: float | None
) -> Tensor:
    """Flash attention on heads padded with zeros to a multiple of 8; the result is cut back."""
    size = inputs[0].size(-1)
    padded = [_padded(tensor, -size % 8) if size % 8 else tensor for tensor in inputs]
    output = torch.ops.aten._scaled_dot_product_flash_attention(
        *padded, dropout_p, is_causal, False, scale=_scale(inputs[0], scale)
    )[0]
    return cast(Tensor, output[..., :size] if size % 8 else output)


def _padded(tensor: Tensor, count: int) -> Tensor:
    return torch.nn.functional.pad(tensor, (0, count))


def _additive(mask: Tensor | None, dtype: torch.dtype, lowest: float) -> Tensor | None:
    """attention.cpp, convert_boolean_attn_mask: 0 where a key counts, `lowest` where not."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.where(mask, 0.0, torch.scalar_tensor(lowest, dtype=dtype, device=mask.device))


def _aligned(bias: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """attention.cpp, preprocess_mask: rows start at multiples of 8, then expand to (b, h, l, s).

    A mask whose last size is already a multiple of 8 but whose other strides are not is padded by
    a whole 8, as PyTorch does.
    """
    aligned = bias.stride(-1) == 1 and all(stride % 8 == 0 for stride in bias.stride()[:-1])
    if not aligned:
        size = bias.size(-1)
        bias = _padded(bias, 8 - size % 8)[..., :size]
    return bias.expand(query.size(0), query.size(1), query.size(2), key.size(2))


@dataclass(frozen=True)
class _Math:
    dropout_p: float
    is_causal: bool
    scale: float | None
    gqa: bool
    stay_half: bool


def _attend_by_products(
    inputs: tuple[Tensor, Tensor, Tensor], bias: Tensor | None, options: _Math
) -> Tensor:
    """attention.cpp, _scaled_dot_product_attention_math: in fp32 unless told otherwise.

    The attention weights are a second result there, so that a 16-bit copy of them is made even
    though nobody reads it.
    """
    dtype = inputs[0].dtype
    query, key, value = (_widened(tensor, stay=options.stay_half) for tensor in inputs)
    scale = _scale(query, options.scale)
    factor = math.sqrt(abs(scale))
    query = query * math.copysign(factor, scale)
    if options.is_causal:
        if bias is not None:
            raise RuntimeError("Explicit attn_mask should not be set when is_causal=True")
        bias = _additive(_triangle(query, key), query.dtype, -math.inf)
    if options.gqa:
        key, value = (_repeated(tensor, query.size(-3)) for tensor in (key, value))
    weights = torch.matmul(query, key.transpose(-2, -1) * factor)
    if bias is not None:
        weights.add_(bias)
    weights = torch.ops.aten._safe_softmax(weights, -1)
    if options.dropout_p > 0.0:
        weights = torch.dropout(weights, options.dropout_p, True)
    unread = weights.to(dtype)
    output = torch.matmul(weights, value).to(dtype)
    del unread
    return output


def _widened(tensor: Tensor, *, stay: bool) -> Tensor:
    return tensor if stay or tensor.dtype not in _HALF else tensor.to(torch.float32)


def _triangle(query: Tensor, key: Tensor) -> Tensor:
    shape = (query.size(-2), key.size(-2))
    return torch.ones(shape, dtype=torch.bool, device=query.device).tril()


def _repeated(tensor: Tensor, heads: int) -> Tensor:
    """(b, g, s, d) to (b, heads, s, d), each head of the group a copy."""
    if tensor.size(-3) == heads:
        return tensor
    return tensor.repeat_interleave(heads // tensor.size(-3), -3)
