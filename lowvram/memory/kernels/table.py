"""The temporaries of an operator: which function knows about which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lowvram.memory.kernels.attention import (
    cudnn_backward,
    efficient_backward,
    efficient_forward,
    flash_backward,
    flash_forward,
)
from lowvram.memory.kernels.copies import copy, multinomial, where
from lowvram.memory.kernels.embedding import embedding_backward, embedding_bag_backward
from lowvram.memory.kernels.indexing import index_put
from lowvram.memory.kernels.matmul import batched_product, matrix_product, scaled_product
from lowvram.memory.kernels.norms import (
    foreach_norm,
    group_norm,
    group_norm_backward,
    layer_norm,
    layer_norm_backward,
)
from lowvram.memory.kernels.reduction import (
    EXTREME,
    INDEXED,
    LOGICAL,
    MEAN,
    NORM,
    SUM,
    WELFORD,
    extreme,
    log_sum_exp,
    reduction,
)
from lowvram.memory.kernels.softmax import (
    log_softmax_backward,
    safe_softmax,
    softmax,
    softmax_backward,
)
from lowvram.memory.kernels.sorting import cumulative, sort
from lowvram.memory.kernels.tape import NOTHING, Call, Kernel, Scratch, Tape
from lowvram.memory.kernels.target import Target

KERNELS: dict[str, Kernel] = {
    f"aten::{name}": kernel
    for names, kernel in (
        ("_scaled_dot_product_flash_attention _flash_attention_forward", flash_forward),
        ("_scaled_dot_product_flash_attention_backward _flash_attention_backward", flash_backward),
        (
            "_scaled_dot_product_efficient_attention _efficient_attention_forward",
            efficient_forward,
        ),
        (
            "_scaled_dot_product_efficient_attention_backward _efficient_attention_backward",
            efficient_backward,
        ),
        ("_scaled_dot_product_cudnn_attention_backward _cudnn_attention_backward", cudnn_backward),
        ("embedding_dense_backward", embedding_backward),
        ("_embedding_bag_dense_backward", embedding_bag_backward),
        ("index_put_ index_put _index_put_impl_ _unsafe_index_put", index_put),
        ("mm addmm addmm_ _addmm_activation", matrix_product),
        ("bmm baddbmm baddbmm_", batched_product),
        ("_scaled_mm", scaled_product),
        ("sum", reduction(SUM)),
        ("mean prod", reduction(MEAN)),
        ("amax amin", reduction(EXTREME)),
        ("max min", extreme),
        ("argmax argmin", reduction(INDEXED)),
        ("any all", reduction(LOGICAL)),
        ("linalg_vector_norm norm", reduction(NORM)),
        ("var std var_mean std_mean", reduction(WELFORD)),
        ("logsumexp", log_sum_exp),
        ("_softmax _log_softmax", softmax),
        ("_softmax_backward_data", softmax_backward),
        ("_log_softmax_backward_data", log_softmax_backward),
        ("_safe_softmax", safe_softmax),
        ("native_layer_norm _fused_rms_norm", layer_norm),
        ("native_layer_norm_backward _fused_rms_norm_backward", layer_norm_backward),
        ("native_group_norm", group_norm),
        ("native_group_norm_backward", group_norm_backward),
        ("_foreach_norm", foreach_norm),
        ("cumsum cumprod", cumulative),
        ("sort", sort),
        ("multinomial", multinomial),
        ("where", where),
        ("copy_ _to_copy", copy),
    )
    for name in names.split()
}


def scratch(
    func: torch._ops.OpOverload,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    outputs: Sequence[Tensor],
    target: Target,
) -> Scratch:
    """The temporaries that the CUDA kernel of `func` takes for these arguments."""
    kernel = KERNELS.get(func._schema.name)
    if kernel is None:
        return NOTHING
    arguments = dict(_defaults(func))
    arguments.update(zip(arguments, args, strict=False))
    arguments.update(kwargs)
    tape = Tape()
    kernel(Call(arguments, outputs, target), tape)
    return tape.scratch()


@lru_cache(maxsize=1024)
def _defaults(func: torch._ops.OpOverload) -> tuple[tuple[str, Any], ...]:
    """Names of the arguments of an operator, in order, with their default values."""
    return tuple((argument.name, argument.default_value) for argument in func._schema.arguments)
