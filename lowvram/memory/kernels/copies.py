"""Copies: between devices, to another dtype, and of weights that are drawn from."""

from __future__ import annotations

from torch import Tensor

from lowvram.memory.kernels.tape import Call, Tape
from lowvram.memory.kernels.tensors import bytes_of, is_dense


def copy(call: Call, tape: Tape) -> None:
    """cuda/Copy.cu, copy_kernel_cuda: copies between devices go through contiguous memory."""
    tape.outputs()
    source, target = _ends(call)
    if source.device.type == target.device.type:
        return
    if source.dtype == target.dtype and _same_layout(source, target):
        return
    if source.device.type == "cpu":
        tape.copy(target)
    elif call["non_blocking"] and source.dtype != target.dtype:
        tape.allocate(source.numel() * target.element_size())
    else:
        tape.copy(source)


def _ends(call: Call) -> tuple[Tensor, Tensor]:
    if "src" in call.arguments:
        return call["src"], call["self"]
    return call["self"], call.outputs[0]


def _same_layout(one: Tensor, other: Tensor) -> bool:
    return one.stride() == other.stride() and is_dense(one)


def where(call: Call, tape: Tape) -> None:
    """TensorCompare.cpp, where_self_out: operands are converted to the dtype of the result."""
    tape.outputs()
    result = call.outputs[0].dtype
    for name in ("self", "other"):
        operand = call[name]
        if isinstance(operand, Tensor) and operand.dtype != result:
            tape.allocate(operand.numel() * result.itemsize)


def multinomial(call: Call, tape: Tape) -> None:
    """Distributions.cpp, multinomial_out: one exponential random number per weight."""
    if not call["replacement"] or call["num_samples"] == 1:
        tape.allocate(bytes_of(call["self"]))
