"""Memory that CUDA kernels take for themselves: temporaries that no operator returns.

A simulated device sees the outputs of every operator. What it cannot see is what the CUDA
implementation of an operator asks the caching allocator for and gives back before it returns:
sort buffers, fp32 accumulators, copies of operands whose layout a library cannot take. This package
computes those from shapes, strides and dtypes alone. Where a size depends on data, it is the
largest one possible.

Each function names the file of pytorch's `aten/src/ATen` it follows. Sizes were read at torch 2.13
or the nearest version found; `Target.torch_version` picks among versions that differ.
"""

from __future__ import annotations

from lowvram.memory.kernels.matmul import lt_workspace_bytes, workspace_bytes
from lowvram.memory.kernels.outputs import output_bytes, output_order
from lowvram.memory.kernels.table import KERNELS, scratch
from lowvram.memory.kernels.tape import NOTHING, Scratch, replay
from lowvram.memory.kernels.target import Target

__all__ = [
    "KERNELS",
    "NOTHING",
    "Scratch",
    "Target",
    "lt_workspace_bytes",
    "output_bytes",
    "output_order",
    "replay",
    "scratch",
    "workspace_bytes",
]
