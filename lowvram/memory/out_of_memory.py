"""The error of the simulated allocator where memory ends."""

from __future__ import annotations

from dataclasses import dataclass

from lowvram.memory.sizes import format_size


@dataclass(eq=False)
class OutOfMemory(Exception):
    """A request that does not fit after all cached memory was given back. It reads as torch's."""

    requested_bytes: int
    """What was asked for."""
    rounded_bytes: int
    """The block that this takes."""
    segment_bytes: int
    """What the driver was asked for; torch calls this what it tried to allocate."""
    allocated_bytes: int
    """Blocks handed out."""
    reserved_bytes: int
    """All segments."""
    free_bytes: int
    """What cudaMalloc could still hand out, in pieces or whole."""
    capacity_bytes: int
    """What the card has in all; what is neither reserved nor free is in use outside of PyTorch."""
    limit_bytes: int | None
    """What the process may reserve, if that is limited."""

    def __post_init__(self) -> None:
        self.args = tuple(vars(self).values())  # which pickle makes the copy from

    def __str__(self) -> str:
        process = allowed = ""
        in_use = self.capacity_bytes - self.free_bytes
        if in_use > self.reserved_bytes:
            process = (
                "Including non-PyTorch memory, this process has "
                f"{format_size(in_use)} memory in use. "
            )
        if self.limit_bytes is not None:
            allowed = f"{format_size(self.limit_bytes)} allowed; "
        unused = self.reserved_bytes - self.allocated_bytes
        return (
            f"CUDA out of memory. Tried to allocate {format_size(self.segment_bytes)}. "
            f"GPU 0 has a total capacity of {format_size(self.capacity_bytes)} of which "
            f"{format_size(self.free_bytes)} is free. {process}{allowed}Of the allocated memory "
            f"{format_size(self.allocated_bytes)} is allocated by PyTorch, and "
            f"{format_size(unused)} is reserved by PyTorch but unallocated. "
            "If reserved but unallocated memory is large try setting "
            "PYTORCH_ALLOC_CONF=expandable_segments:True to avoid fragmentation.  "
            "See documentation for Memory Management  "
            "(https://pytorch.org/docs/stable/notes/cuda.html#environment-variables)"
        )
