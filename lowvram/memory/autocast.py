"""The casts of CUDA's autocast, for the simulated device.

Which operator casts to what: ATen/autocast_mode.h of torch 2.13 (AT_FORALL_LOWER_PRECISION_FP,
AT_FORALL_FP32, AT_FORALL_FP32_SET_OPT_DTYPE, AT_FORALL_DIFFERENT_REDISPATCH_SIGNATURE,
AT_FORALL_PROMOTE); how: ATen/autocast_mode.cpp (cached_cast).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_NAME = "simulated"
_C: Any = torch._C
_KEYS = _C.DispatchKeySet(_C.DispatchKey.AutocastPrivateUse1)

_LOWER = """
    _convolution.deprecated _convolution conv1d conv2d conv3d conv_tbc conv_transpose1d
    conv_transpose2d.input conv_transpose3d.input convolution prelu addmm addmv addr matmul einsum
    mm mv linalg_vecdot linear addbmm baddbmm bmm chain_matmul linalg_multi_dot
    _thnn_fused_lstm_cell _thnn_fused_gru_cell lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell
    _scaled_dot_product_flash_attention scaled_dot_product_attention
""".split()
_FP32 = """
    acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan
    pow.Tensor_Scalar pow.Tensor_Tensor pow.Scalar softplus layer_norm native_layer_norm rms_norm
    group_norm frobenius_norm.dim nuclear_norm nuclear_norm.dim cosine_similarity poisson_nll_loss
    cosine_embedding_loss nll_loss nll_loss2d hinge_embedding_loss kl_div l1_loss smooth_l1_loss
    huber_loss mse_loss margin_ranking_loss multilabel_margin_loss soft_margin_loss
    triplet_margin_loss multi_margin_loss binary_cross_entropy_with_logits dist pdist cdist renorm
    logsumexp upsample_nearest1d _upsample_nearest_exact1d upsample_nearest2d
    _upsample_nearest_exact2d upsample_nearest3d _upsample_nearest_exact3d upsample_linear1d
    upsample_bilinear2d _upsample_bilinear2d_aa upsample_trilinear3d upsample_bicubic2d
    _upsample_bicubic2d_aa
""".split()
_FP32_UNLESS_ASKED = """
    prod prod.dim_int softmax.int log_softmax.int cumprod cumsum linalg_vector_norm
    linalg_matrix_norm linalg_matrix_norm.str_ord sum sum.dim_IntList
    norm.Scalar norm.ScalarOpt_dim
""".split()
_WIDEST = """
    addcdiv addcmul atan2 bilinear cross dot vdot grid_sampler index_put tensordot scatter_add
""".split()
_WITH_DTYPE = {"norm.Scalar": "ScalarOpt_dtype", "norm.ScalarOpt_dim": "ScalarOpt_dim_dtype"}
"""Operators whose form with a dtype is another overload."""


def register_casts(library: torch.library.Library) -> None:
    for names, kernel in (
        (_LOWER, _lower),
        (_FP32, _fp32),
        (_FP32_UNLESS_ASKED, _fp32_unless_asked),
        (_WIDEST, _widest),
    ):
        for name in names:
            library.impl(name, kernel(name), "AutocastPrivateUse1")
    library.impl("binary_cross_entropy", _refuse, "AutocastPrivateUse1")


Kernel = Callable[..., Any]


def _operator(name: str) -> Kernel:
    packet, _, overload = name.partition(".")
    operator: Kernel = getattr(getattr(torch.ops.aten, packet), overload or "default")
    return operator


def _call(operator: Kernel, dtype: torch.dtype, args: Any, kwargs: Any) -> Any:
    with _C._ExcludeDispatchKeyGuard(_KEYS):
        return operator(
            *[_cast(arg, dtype) for arg in args],
            **{name: _cast(arg, dtype) for name, arg in kwargs.items()},
        )


def _lower(name: str) -> Kernel:
    operator = _operator(name)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        return _call(operator, torch.get_autocast_dtype(_NAME), args, kwargs)

    return kernel


def _fp32(name: str) -> Kernel:
    operator = _operator(name)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        return _call(operator, torch.float32, args, kwargs)

    return kernel


def _fp32_unless_asked(name: str) -> Kernel:
    operator = _operator(name)
    packet = name.partition(".")[0]
    with_dtype = _operator(f"{packet}.{_WITH_DTYPE[name]}") if name in _WITH_DTYPE else operator

    def kernel(*args: Any, **kwargs: Any) -> Any:
        with _C._ExcludeDispatchKeyGuard(_KEYS):
            # The kernel casts as it reads, so there is no copy in fp32.
            if not _is_eligible(args[0]) or _has_dtype(operator, args, kwargs):
                return operator(*args, **kwargs)
            return with_dtype(*args, **{**kwargs, "dtype": torch.float32})

    return kernel


def _has_dtype(operator: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    if kwargs.get("dtype") is not None:
        return True
    names = [argument.name for argument in operator._schema.arguments if not argument.kwarg_only]
    return any(
        name == "dtype" and value is not None for name, value in zip(names, args, strict=False)
    )


def _widest(name: str) -> Kernel:
    operator = _operator(name)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        dtype = torch.get_autocast_dtype(_NAME)
        for tensor in _tensors((args, tuple(kwargs.values()))):
            if _is_eligible(tensor) and tensor.dtype == torch.float32:
                dtype = torch.float32
        return _call(operator, dtype, args, kwargs)

    return kernel


def _refuse(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError(
        "torch.nn.functional.binary_cross_entropy and torch.nn.BCELoss are unsafe to autocast, "
        "and CUDA refuses them; use binary_cross_entropy_with_logits"
    )


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in _tensors(item)]
    return []


def _is_eligible(value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and value.device.type == _NAME
        and value.is_floating_point()
        and value.dtype != torch.float64
    )


# 16-bit copies of fp32 weights are made once and kept until the outermost autocast region ends.
_copies: dict[int, tuple[weakref.ref[Tensor], Tensor]] = {}


def clear_copies() -> None:
    _copies.clear()


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_cast(item, dtype) for item in value)
    if not _is_eligible(value) or value.dtype == dtype:
        return value
    if not _is_weight(value, dtype):
        return value.to(dtype)
    found = _copies.get(id(value))
    if found is not None and found[0]() is value:
        return found[1]
    copy = value.to(dtype)
    _copies[id(value)] = (weakref.ref(value), copy)
    return copy


def _is_weight(tensor: Tensor, dtype: torch.dtype) -> bool:
    return (
        dtype == torch.get_autocast_dtype(_NAME)
        and tensor.dtype == torch.float32
        and tensor.requires_grad
        and tensor.is_leaf
        and not tensor._is_view()
        and torch.is_autocast_cache_enabled()
    )
