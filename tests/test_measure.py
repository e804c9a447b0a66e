"""Reading memory, and knowing when it is full."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from lowvram.memory.measure import format_gib, is_out_of_memory, read_memory

FULL = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors ...", 2),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("Error 2: out of memory at line 380 in file /src/csrc/pythonInterface.cpp"),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
]
OTHER = [
    IndexError("index out of range in self"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    RuntimeError("CUDA error: device-side assert triggered"),
    KeyboardInterrupt(),
    ValueError("CUDA out of memory"),
]


@pytest.mark.parametrize("error", FULL, ids=repr)
def test_these_say_that_memory_is_full(error: BaseException) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", OTHER, ids=repr)
def test_these_do_not(error: BaseException) -> None:
    assert not is_out_of_memory(error)


def test_sizes_are_in_powers_of_two() -> None:
    assert format_gib(12 * 2**30) == "12.00 GiB"
    assert format_gib(3 * 2**20) == "3.0 MiB"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it does not outlive exec")
def test_the_peak_is_not_that_of_the_program_before() -> None:
    reads = (
        "import torch; from lowvram.memory.measure import read_memory; "
        "print(read_memory(torch.device('cpu')).peak_bytes)"
    )
    starts = (
        "import os, sys; large = b'x' * 2**30; "
        f"os.execv(sys.executable, [sys.executable, '-c', {reads!r}])"
    )
    command = [sys.executable, "-c", starts]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 2**26 < int(ended.stdout) < 2**30


def test_a_cpu_process_has_a_resident_size() -> None:
    reading = read_memory(torch.device("cpu"))
    assert 2**25 < reading.now_bytes <= reading.peak_bytes
