"""Memory of a real device: what is in use, what the peak was, and how to write it."""

from __future__ import annotations

import gc
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

GIB = 2**30

SIMULATED = "simulated"
"""The type of the device that `lowvram.memory.simulate` makes tensors on."""


def is_card(device: torch.device) -> bool:
    """A card, or the device that stands for one."""
    return device.type in ("cuda", SIMULATED)


def format_gib(size_bytes: float) -> str:
    """Bytes as text, in GiB (2**30 bytes) or, when small, in MiB."""
    if abs(size_bytes) < GIB / 10:
        return f"{size_bytes / 2**20:.1f} MiB"
    return f"{size_bytes / GIB:.2f} GiB"


@dataclass(frozen=True, kw_only=True)
class MemoryReading:
    """Bytes now and at the peak: reserved by the allocator on a card, resident on a CPU."""

    now_bytes: int
    peak_bytes: int


def read_memory(device: torch.device) -> MemoryReading:
    if device.type == "cuda":
        return MemoryReading(
            now_bytes=torch.cuda.memory_reserved(device),
            peak_bytes=torch.cuda.max_memory_reserved(device),
        )
    import psutil

    info = psutil.Process().memory_info()
    # The kernel brings its peak up to date a little late.
    return MemoryReading(now_bytes=info.rss, peak_bytes=max(info.rss, _peak_resident(info)))


def _peak_resident(info: object) -> int:
    """Highest resident size of this process; Windows reports it as `peak_wset`."""
    peak = getattr(info, "peak_wset", None)
    if peak is not None:
        return int(peak)
    status = Path("/proc/self/status")
    if status.exists():
        # Linux: the figure of getrusage outlives exec, so it may be that of a larger parent.
        found = re.search(r"^VmHWM:\s*(\d+) kB$", status.read_text(), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    import resource

    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024  # macOS counts bytes, others KiB


def reset_peak(device: torch.device) -> None:
    """Start the peak anew. A CPU process cannot: its peak is that of its whole life."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def limit_memory(device: torch.device, budget_bytes: int) -> None:
    """Make the allocator fail at `budget_bytes`, so that a driver cannot spill to host memory."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, budget_bytes / total), device)


_OUT_OF_MEMORY = (
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_EXECUTION_FAILED",
    "CUDNN_STATUS_NOT_SUPPORTED",
    "Triton Error [CUDA]: out of memory",
    "out of memory at line",  # bitsandbytes
    "DefaultCPUAllocator: can't allocate memory",
    "Cannot allocate memory",  # of a file that is mapped
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says, in one of the ways of torch and its libraries, that memory is full."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)


def is_device_failure(error: BaseException) -> bool:
    """Whether the card has failed: after, say, a device-side assert every call to it does."""
    if is_out_of_memory(error) or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, torch.AcceleratorError) or "CUDA error:" in str(error)


def release_memory(device: torch.device) -> None:
    """Give back what is not in use; call it where the frames that failed are gone."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def compute_capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def has_fast_16_bit(dtype: str) -> bool:
    """Whether this CPU multiplies matrices in `dtype` (bf16 or fp16) with instructions of its own.

    Where it has none, torch converts as it goes: on an AVX2 machine, a product of 512 x 768 with
    768 x 8000 took 0.6 s in bf16, and 7.7 s with the second matrix transposed; in fp32 0.11 s.
    """
    supported = {
        "bf16": torch.ops.mkldnn._is_mkldnn_bf16_supported,
        "fp16": torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return bool(supported[dtype]())
