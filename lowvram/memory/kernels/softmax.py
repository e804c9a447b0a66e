"""Softmax and its gradients."""

from __future__ import annotations

import torch

from lowvram.memory.kernels.tape import Call, Tape


def softmax(call: Call, tape: Tape) -> None:
    """cuda/SoftMax.cu, host_softmax."""
    tape.outputs()
    tape.copy(call["self"])


def softmax_backward(call: Call, tape: Tape) -> None:
    """cuda/SoftMax.cu, softmax_backward_cuda_out: `grad * output` is a tensor of its own."""
    tape.outputs()
    grad, output = call["grad_output"], call["output"]
    product = torch.promote_types(grad.dtype, output.dtype)
    tape.allocate(grad.numel() * product.itemsize)
    if not (grad.is_contiguous() and output.is_contiguous()):
        tape.copy(grad)
        tape.copy(output)


def log_softmax_backward(call: Call, tape: Tape) -> None:
    """cuda/SoftMax.cu, host_softmax_backward."""
    tape.outputs()
    tape.copy(call["grad_output"])
    tape.copy(call["output"])


def safe_softmax(call: Call, tape: Tape) -> None:
    """transformers/attention.cpp, _safe_softmax: which elements, and which rows, are all -inf."""
    tape.outputs()
    tensor = call["self"]
    tape.allocate(tensor.numel())
    tape.allocate(tensor.numel() // max(1, tensor.size(call["dim"])))
    tape.allocate(call.outputs[0].element_size())
