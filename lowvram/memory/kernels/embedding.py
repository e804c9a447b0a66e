"""Gradients of embedding tables, which sum rows of equal index."""

from __future__ import annotations

from torch import Tensor

from lowvram.memory.kernels.sorting import radix_sort_bytes, scan_bytes
from lowvram.memory.kernels.tape import Call, Tape
from lowvram.memory.kernels.tensors import accumulator_bytes


def embedding_backward(call: Call, tape: Tape) -> None:
    """cuda/Embedding.cu, embedding_dense_backward_cuda: above 3072 indices they are sorted."""
    indices, grad = call["indices"], call["grad_output"]
    tape.copy(indices)
    tape.copy(grad)
    count, item = indices.numel(), indices.element_size()
    if count <= 3072 and not call["scale_grad_by_freq"]:
        return
    tape.allocate(count * item)  # sorted
    tape.allocate(count * item)  # where they came from
    tape.brief(count * item, radix_sort_bytes(count, item, item, 8 * item))
    if call["scale_grad_by_freq"]:
        tape.allocate(count * item)
        tape.brief(scan_bytes(count, item))
        tape.brief(scan_bytes(count, item))
    tape.outputs()
    _sum_segments(tape, count, item, grad)


def _sum_segments(tape: Tape, count: int, item: int, grad: Tensor) -> None:
    """cuda/EmbeddingBackwardKernel.cu: rows of equal index are summed in parts of 10, in fp32.

    The kernel reserves a part for every index, as it does not wait for the true number.
    """
    tape.allocate(count * item)  # offsets of segments
    tape.allocate(8)
    tape.brief(count * item, scan_bytes(count, 8))  # unique_by_key
    tape.allocate(count * item)  # parts per segment
    tape.allocate(count * item)  # offsets of parts
    tape.brief(scan_bytes(count, item))
    tape.allocate(8)
    tape.allocate(count * item)  # offsets within parts
    tape.allocate(count * grad.size(-1) * accumulator_bytes(grad.dtype))


def embedding_bag_backward(call: Call, tape: Tape) -> None:
    """cuda/EmbeddingBag.cu, embedding_bag_backward_cuda_sum_avg; `max` takes nothing."""
    indices, grad = call["indices"], call["grad"]
    count, item = indices.numel(), indices.element_size()
    if call["mode"] == 2 or count == 0:
        return
    tape.copy(grad)
    tape.allocate(count * item)
    tape.allocate(count * item)
    tape.brief(count * item, radix_sort_bytes(count, item, item, 8 * item))
    tape.outputs()
    _sum_segments(tape, count, item, grad)
