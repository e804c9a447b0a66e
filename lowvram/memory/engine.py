"""autograd's threads, of which each device has one."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import torch

from lowvram.errors import DeviceError
from lowvram.memory.measure import SIMULATED


def start_backward_thread() -> None:
    """autograd starts a thread for each device at the first backward pass of a process.

    If that has been, before it could know of this device, its function to do so is called again.
    The pass sums up two gradients, for the device to learn from.
    """
    with torch.inference_mode(False), torch.enable_grad():
        one = torch.ones(1, device=SIMULATED, requires_grad=True)
        try:
            (one.exp() + one.tanh()).backward()
        except RuntimeError as error:
            if "device_ready_queues_" not in str(error):
                raise
            _start_thread_now()
            (one.exp() + one.tanh()).backward()


def _start_thread_now() -> None:
    """torch/csrc/autograd/engine.h, Engine::start_device_threads."""
    try:
        name = "libtorch_cpu" + (".dylib" if sys.platform == "darwin" else ".so")
        torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name))
        default_engine = torch_cpu._ZN5torch8autograd6Engine18get_default_engineEv
        start_threads = torch_cpu._ZN5torch8autograd6Engine20start_device_threadsEv
    except (OSError, AttributeError) as error:
        raise DeviceError(
            "a backward pass has run in this process before the first simulation, and torch cannot "
            "add a device after that; simulate first, or in a process of its own"
        ) from error
    default_engine.restype = ctypes.c_void_p
    start_threads.argtypes, start_threads.restype = [ctypes.c_void_p], None
    start_threads(default_engine())
