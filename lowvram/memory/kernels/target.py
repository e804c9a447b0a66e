"""The card and the software whose kernels are meant."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Target:
    """The card and the software whose kernels are meant."""

    compute_capability: tuple[int, int]
    multiprocessors: int
    torch_version: tuple[int, int] = (2, 13)
    cuda_version: tuple[int, int] = (13, 0)
    cudnn_version: int = 92000
    """As `torch.backends.cudnn.version()` gives it; 9.20 comes with torch 2.13 for CUDA 13."""

    @property
    def threads_per_multiprocessor(self) -> int:
        """CUDA programming guide, technical specifications per compute capability."""
        if self.compute_capability == (7, 5):
            return 1024
        small = {(8, 6), (8, 7), (8, 9), (12, 0), (12, 1)}
        return 1536 if self.compute_capability in small else 2048

    @property
    def shared_kib_per_block(self) -> int:
        """Shared memory one block may opt in to, from the same table."""
        sizes = {(7, 0): 96, (7, 5): 64, (8, 0): 163, (8, 7): 163, (8, 6): 99, (8, 9): 99}
        major = self.compute_capability[0]
        default = {9: 227, 10: 227, 11: 227, 12: 99}.get(major, 48)
        return sizes.get(self.compute_capability, default)
