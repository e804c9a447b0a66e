"""Outputs that CUDA makes otherwise than the functions for shapes alone."""

from __future__ import annotations

from collections.abc import Mapping

import torch

_OUTPUT_BYTES: dict[str, dict[int, int]] = {
    # The random state is two 64-bit numbers on the card, one more is unused; flash_api.cpp.
    "aten::_scaled_dot_product_flash_attention": {6: 16, 7: 8, 8: 0},
    "aten::_flash_attention_forward": {2: 16, 3: 8, 4: 0},
    "aten::_scaled_dot_product_cudnn_attention": {6: 8, 7: 8},
}


_OUTPUT_ORDER: dict[str, tuple[int, ...]] = {
    "aten::native_dropout": (1, 0),  # cuda/Dropout.cu makes the mask first
}


def output_bytes(func: torch._ops.OpOverload) -> Mapping[int, int]:
    """Bytes of those outputs, by position, that CUDA keeps on the card in another size.

    The shape functions put them on the `meta` device, where nobody would count them.
    """
    return _OUTPUT_BYTES.get(func._schema.name, {})


def output_order(func: torch._ops.OpOverload) -> tuple[int, ...]:
    """Positions of the outputs in the order CUDA allocates them; empty if it is their own order."""
    return _OUTPUT_ORDER.get(func._schema.name, ())
