"""Layer, group and gradient norms."""

from __future__ import annotations

import math

from lowvram.memory.kernels.tape import Call, Tape
from lowvram.memory.kernels.tensors import accumulator_bytes, opmath_bytes, parts


def layer_norm(call: Call, tape: Tape) -> None:
    """cuda/layer_norm_kernel.cu, layer_norm_cuda."""
    for name in ("input", "weight", "bias"):
        tensor = call.get(name)
        if tensor is not None:
            tape.copy(tensor)


def layer_norm_backward(call: Call, tape: Tape) -> None:
    """cuda/layer_norm_kernel.cu, LaunchGammaBetaBackwardCUDAKernel.

    Above 65536 rows that few columns cannot fill the card with, the gradients of weight and bias
    are first made for every 32 rows, and their sums replace the tensors made before.
    """
    tensor, grad = call["input"], call["grad_out"]
    tape.copy(tensor)
    tape.outputs()
    tape.copy(grad)
    columns = math.prod(call["normalized_shape"])
    rows = tensor.numel() // max(1, columns)
    if rows <= 64 * 1024 or columns // 32 >= call.target.multiprocessors // 2:
        return
    blocks = min(32768 // parts(columns, 32), parts(rows, 32))
    wanted = sum(call["output_mask"][1:])
    size = columns * tensor.element_size()
    for _ in range(wanted):
        tape.allocate(blocks * size)


def group_norm(call: Call, tape: Tape) -> None:
    """cuda/group_norm_kernel.cu, GroupNormKernelImplInternal: factor and shift per channel."""
    tape.outputs()
    if call["HxW"] > 1 and (call["weight"] is not None or call["bias"] is not None):
        size = call["N"] * call["C"] * accumulator_bytes(call["input"].dtype)
        tape.allocate(size)
        tape.allocate(size)


def group_norm_backward(call: Call, tape: Tape) -> None:
    """cuda/group_norm_kernel.cu, GroupNormBackwardKernelImplInternal."""
    tape.outputs()
    item = accumulator_bytes(call["input"].dtype)
    per_channel, per_group = call["N"] * call["C"] * item, call["N"] * call["group"] * item
    for size in (per_channel, per_channel, per_channel, per_group, per_group):
        tape.allocate(size)


def foreach_norm(call: Call, tape: Tape) -> None:
    """cuda/ForeachReduceOp.cu, foreach_tensor_norm_cuda: a partial norm per 65536 elements.

    Every tensor gets as many places as the largest one needs.
    """
    tensors = call["self"]
    chunks = max(parts(tensor.numel(), 65536) for tensor in tensors)
    tape.allocate(len(tensors) * chunks * opmath_bytes(call["dtype"] or tensors[0].dtype))
