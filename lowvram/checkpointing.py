"""Which blocks of a model are computed again in the backward pass, and how.

A block that is recomputed keeps its input until the backward pass, and nothing else. Which blocks
those are and what they keep does not change what is computed: random numbers are drawn again from
the states that they were drawn from.

"Products and attention", which `selective` keeps, are torch's. Our own kernels for the CPU, which
write into memory that is there, it computes again like all the rest.

Shapes: b rows of s tokens, hidden size d.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from transformers import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from lowvram.errors import ModelError, RecipeError, TrainingError
from lowvram.memory.measure import SIMULATED

Checkpointing = bool | int | Literal["selective", "offload"]
"""None of the blocks, all, the first N; all, keeping what is expensive; all, inputs on the host."""

_NARROW = 128
"""A product over so few numbers costs less than to keep what it gives: LoRA, scores of a head."""
_PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"}
_KERNELS = {
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "bitsandbytes::gemm_4bit",
    "bitsandbytes::int8_scaled_mm",
    "bitsandbytes::int8_mixed_scaled_mm",
}


def block_count(config: PreTrainedConfig) -> int:
    """How many of a model's blocks can be recomputed."""
    count = getattr(config.get_text_config(), "num_hidden_layers", None)
    if not isinstance(count, int):
        raise ModelError("config.json: num_hidden_layers (or n_layer) is missing")
    return count


def check_blocks(wanted: Checkpointing | Literal["auto"], blocks: int) -> None:
    """Raises RecipeError for more blocks than a model has."""
    if isinstance(wanted, int) and wanted > blocks:
        raise RecipeError(
            f"fit.gradient_checkpointing: found {wanted}, the model has {blocks} blocks; allowed "
            f"1 to {blocks}, true (all of them), false, selective, offload or auto"
        )


def in_words(kind: Checkpointing, blocks: int) -> str:
    """For people: "12 of 48 blocks recomputed"."""
    match kind:
        case False:
            return "nothing recomputed"
        case True:
            return f"all {blocks} blocks recomputed"
        case "selective":
            return f"all {blocks} blocks recomputed but for products and attention"
        case "offload":
            return f"all {blocks} blocks recomputed, their inputs in host memory"
    return f"{kind} of {blocks} blocks recomputed"


def recompute(model: nn.Module, kind: Checkpointing) -> None:
    """Let a model of transformers recompute blocks while it trains.

    With a number it is the first blocks: what the others keep is gone by the time that the
    backward pass gets to these. Raises RecipeError for more blocks than there are.
    """
    if kind is False:
        return
    transformer: Any = model
    layers: list[Any] = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not transformer.supports_gradient_checkpointing or not layers:
        raise RecipeError(
            f"fit.gradient_checkpointing: found {kind}, but transformers cannot recompute blocks "
            f"of {type(model).__name__}; use false"
        )
    check_blocks(kind, len(layers))
    transformer.activation_checkpointing_enable({"use_reentrant": False})
    # Only the reentrant kind needs inputs that require a gradient.
    transformer.disable_input_require_grads()
    recomputed = len(layers) if kind is True or isinstance(kind, str) else kind
    for number, layer in enumerate(layers):
        layer.gradient_checkpointing = number < recomputed
        if isinstance(kind, str):
            layer._gradient_checkpointing_func = _FUNCTIONS[kind]


def _keep_products(function: Callable[..., Any], *args: Any) -> Any:
    """`checkpoint`, with what `_Policy` keeps."""
    return checkpoint(
        function,
        *args,
        use_reentrant=False,
        context_fn=lambda: create_selective_checkpoint_contexts(
            # Its own check refuses every change of what is kept; the policy knows which are sound.
            _Policy(),
            allow_cache_entry_mutation=True,
        ),
    )


class _Policy:
    """Keeps the outputs of attention and of wide matrix products, in one pass through a block.

    What is added to such a product in place, as folded LoRA and sums of the residual do, is kept
    with it: computing again then finds the sum where the product was. That is sound as long as
    nothing has read the product alone.
    """

    def __init__(self) -> None:
        self._kept: set[int] = set()
        self._read: set[int] = set()

    def __call__(self, context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        changed = _storages(_written(op, args, kwargs))
        if changed & self._kept:
            if changed & self._read:
                raise TrainingError(
                    f"fit.gradient_checkpointing: selective: this model changes a product in place "
                    f"({op.name()}) after it has used it; use true, or a number of blocks"
                )
            return CheckpointPolicy.MUST_SAVE
        outputs = _storages(context.op_output)
        # A view has the storage of what it is made of.
        self._read |= _storages((args, kwargs)) - outputs
        if not _is_expensive(op.name(), args) or _draws(op, args, kwargs):
            return CheckpointPolicy.PREFER_RECOMPUTE
        self._kept |= outputs
        self._read -= outputs  # of what was there before
        return CheckpointPolicy.MUST_SAVE


def _written(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Arguments that an operator changes."""
    if not op._schema.is_mutable:
        return []
    given = _given(op, args, kwargs)
    return [
        given.get(argument.name)
        for argument in op._schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
    ]


def _storages(values: Any) -> set[int]:
    leaves = tree_leaves(values)
    return {x.untyped_storage()._cdata for x in leaves if isinstance(x, torch.Tensor)}


def _is_expensive(name: str, args: tuple[Any, ...]) -> bool:
    if name in _PRODUCTS:
        return bool(args[-2].shape[-1] > _NARROW)
    return name in _KERNELS


def _draws(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a kernel of attention draws random numbers, for its dropout.

    Were its output kept, it would not draw them again, and every dropout after it would get others.
    """
    return bool(_given(op, args, kwargs).get("dropout_p", 0.0))


def _given(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name."""
    arguments = op._schema.arguments
    given = {argument.name: value for argument, value in zip(arguments, args, strict=False)}
    return given | kwargs


def _keep_inputs_on_host(function: Callable[..., Any], *args: Any) -> Any:
    """`checkpoint`, with the hidden states, (b, s, d), in host memory until the backward pass.

    They are the first argument. Masks and positions, which the blocks share, stay where they are.
    """
    others = args[1:]  # not all of them, which would hold on to the hidden states

    def block(*hidden: torch.Tensor) -> Any:
        return function(*hidden, *others)

    with saved_tensors_hooks(_to_host, _from_host):
        return checkpoint(block, *args[:1], use_reentrant=False)


def _to_host(tensor: torch.Tensor) -> tuple[torch.device, torch.Tensor]:
    """A copy in pinned memory, which need not be waited for: one stream does all in order.

    On the simulated device it is a tensor without bytes; on a CPU, the tensor itself.
    """
    if tensor.device.type == "cpu":
        return tensor.device, tensor
    if tensor.device.type == SIMULATED:
        return tensor.device, torch.empty_like(tensor, device="meta")
    host = torch.empty_like(tensor, device="cpu", pin_memory=True)
    return tensor.device, host.copy_(tensor, non_blocking=True)


def _from_host(packed: tuple[torch.device, torch.Tensor]) -> torch.Tensor:
    device, host = packed
    if host.device.type == "meta":
        return torch.empty_like(host, device=device)
    return host.to(device, non_blocking=True)


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "selective": _keep_products,
    "offload": _keep_inputs_on_host,
}
