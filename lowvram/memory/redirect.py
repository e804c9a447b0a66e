"""While a simulation runs, what names CUDA in PyTorch means the simulated device.

Code that trains on a card says `torch.autocast("cuda")`, `GradScaler()`, `model.cuda()` or
`torch.cuda.empty_cache()`. All of it is put back when the simulation ends, random states included.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import DefaultDeviceType

from lowvram.memory import autocast, values
from lowvram.memory.device import NAME, simulated_device
from lowvram.memory.storage import empty_storage


class Gauges(Protocol):
    """What `torch.cuda` can be asked about memory, in bytes."""

    total_bytes: int
    compute_capability: tuple[int, int]

    @property
    def allocated_bytes(self) -> int: ...
    @property
    def reserved_bytes(self) -> int: ...
    @property
    def peak_allocated_bytes(self) -> int: ...
    @property
    def peak_reserved_bytes(self) -> int: ...
    def empty_cache(self) -> None: ...
    def reset_peaks(self) -> None: ...


@contextmanager
def redirected(gauges: Gauges) -> Iterator[None]:
    # The first optimizer imports it. It remembers the functions that it finds in torch.
    import torch._dynamo  # noqa: F401

    with ExitStack() as stack:
        stack.enter_context(_random_states())
        stack.enter_context(_defaults())
        stack.enter_context(_paged_states())
        stack.enter_context(_quantization_map())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for owner, names in _replacements(gauges).items():
            for name, value in names.items():
                stack.enter_context(_replaced(owner, name, value))
        stack.callback(autocast.clear_copies)
        stack.enter_context(CudaDevices())
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    own = name in vars(owner)  # what is inherited comes back by itself
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


@contextmanager
def _random_states() -> Iterator[None]:
    numpy = sys.modules.get("numpy")
    states = random.getstate(), torch.get_rng_state(), numpy and numpy.random.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        torch.set_rng_state(states[1])
        if numpy:
            numpy.random.set_state(states[2])


@contextmanager
def _defaults() -> Iterator[None]:
    """Defaults that code sets for its process, or that torch remembers."""
    checkpoint_device = DefaultDeviceType._default_device_type
    # torch.get_default_device() does not tell whether one has been set.
    context = getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)
    dtype = torch.get_default_dtype()
    grad, cache = torch.is_grad_enabled(), torch.is_autocast_cache_enabled()
    deterministic = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    attention = [read() for read, _ in _ATTENTION]
    try:
        yield
    finally:
        DefaultDeviceType._default_device_type = checkpoint_device
        if getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None) is not context:
            torch.set_default_device(None if context is None else context.device)
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(grad)
        torch.set_autocast_cache_enabled(cache)
        torch.set_autocast_enabled(NAME, False)
        torch.use_deterministic_algorithms(deterministic[0], warn_only=deterministic[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
        if workspace is None:
            os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
        for (_, write), value in zip(_ATTENTION, attention, strict=True):
            write(value)


_ATTENTION = [
    (
        getattr(torch.backends.cuda, f"{name}_sdp_enabled"),
        getattr(torch.backends.cuda, f"enable_{name}_sdp"),
    )
    for name in ("flash", "mem_efficient", "cudnn", "math")
]


@contextmanager
def _paged_states() -> Iterator[None]:
    """Paged optimizers of bitsandbytes keep large states in the host's memory, not the card's.

    The library may come to be imported by `build`, so an optimizer's first step looks for it.
    """
    with ExitStack() as stack:
        seen: set[Any] = set()

        def replace(optimizer: Any, *_: Any) -> None:
            library = sys.modules.get("bitsandbytes.functional")
            if library is None or library in seen or not getattr(optimizer, "is_paged", False):
                return
            seen.add(library)
            pages = library.GlobalPageManager.get_instance().paged_tensors
            stack.callback(pages.__delitem__, slice(len(pages), None))
            for name, value in {
                "get_paged": _get_paged,
                "fill": lambda *_, **__: None,  # with zeros, which a new one has
                "prefetch_tensor": lambda *_, **__: None,
            }.items():
                stack.enter_context(_replaced(library, name, value))

        stack.callback(register_optimizer_step_pre_hook(replace).remove)
        yield


@contextmanager
def _quantization_map() -> Iterator[None]:
    """bitsandbytes makes it once in a process and keeps it, on the device that first needed it."""
    library = sys.modules.get("bitsandbytes.functional")
    before = dict(library.name2qmap) if library else {}
    if library:
        library.name2qmap.clear()
    try:
        yield
    finally:
        library = sys.modules.get("bitsandbytes.functional")
        if library:
            library.name2qmap.clear()
            library.name2qmap.update(before)


def _get_paged(*shape: int, dtype: torch.dtype = torch.float32, device: Any = None) -> Tensor:
    paged: Any = torch.zeros(*shape, dtype=dtype, device="cpu")
    paged.is_paged = True
    return paged  # type: ignore[no-any-return]


def _replacements(gauges: Gauges) -> dict[Any, dict[str, Any]]:
    device = simulated_device()
    cuda = _cuda(gauges)
    return {
        torch: {
            "clear_autocast_cache": _clears_copies_too(torch.clear_autocast_cache),
            "is_autocast_enabled": _on_device(torch.is_autocast_enabled),
            "get_autocast_dtype": _on_device(torch.get_autocast_dtype),
            "set_autocast_enabled": _on_device(torch.set_autocast_enabled),
            "set_autocast_dtype": _on_device(torch.set_autocast_dtype),
            "set_default_device": _default_device(torch.set_default_device),
            "Generator": _generator_class(),
            "_has_compatible_shallow_copy_type": lambda *_: True,
        },
        torch.autocast: {"__init__": _autocast(torch.autocast.__init__)},
        torch.amp.GradScaler: {"__init__": _scaler(torch.amp.GradScaler.__init__)},
        Tensor: {
            "data": property(_TENSOR_DATA.__get__, _set_data),
            "cuda": lambda self, *_, **__: self.to(device),
            "pin_memory": lambda self, *_: self,
            "is_pinned": lambda self, *_: False,
        },
        torch.UntypedStorage: {"clone": _clone_storage, "__new__": _new_storage},
        torch.amp.autocast_mode: {"_cast": _cast_for_function},
        # It runs as it is written, and would warn of the hooks that `simulate` sets.
        torch._dynamo.eval_frame.OptimizedModule: {"__call__": nn.Module.__call__},
        nn.Module: {"cuda": lambda self, *_: self.to(device)},
        torch.cuda: cuda,
        torch.cuda.memory: {name: cuda[name] for name in cuda if hasattr(torch.cuda.memory, name)},
        torch.cuda.nvtx: {"_nvtx": _Ranges()},
    }


def _cuda(gauges: Gauges) -> dict[str, Any]:
    """Of `torch.cuda`: what training code asks and marks."""

    def reading(name: str) -> Callable[..., Any]:
        return lambda *_, **__: getattr(gauges, name)

    def nothing(*_: Any, **__: Any) -> None:
        pass

    def memory_stats(*_: Any, **__: Any) -> dict[str, int]:
        return {
            "allocated_bytes.all.current": gauges.allocated_bytes,
            "allocated_bytes.all.peak": gauges.peak_allocated_bytes,
            "reserved_bytes.all.current": gauges.reserved_bytes,
            "reserved_bytes.all.peak": gauges.peak_reserved_bytes,
        }

    return {
        "memory_allocated": reading("allocated_bytes"),
        "memory_reserved": reading("reserved_bytes"),
        "max_memory_allocated": reading("peak_allocated_bytes"),
        "max_memory_reserved": reading("peak_reserved_bytes"),
        "memory_stats": memory_stats,
        "reset_peak_memory_stats": lambda *_, **__: gauges.reset_peaks(),
        "reset_max_memory_allocated": lambda *_, **__: gauges.reset_peaks(),
        "empty_cache": lambda: gauges.empty_cache(),
        "mem_get_info": lambda *_: (
            gauges.total_bytes - gauges.reserved_bytes,
            gauges.total_bytes,
        ),
        "_record_memory_history": nothing,
        "_dump_snapshot": nothing,
        "synchronize": nothing,
        "set_device": nothing,
        "current_device": lambda: 0,
        "get_device_capability": reading("compute_capability"),
        "is_bf16_supported": lambda *_, **__: gauges.compute_capability >= (8, 0),
        "Event": _Event,
    }


class _Event:
    """`torch.cuda.Event`: no time passes."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, *_: Any) -> None:
        pass

    wait = synchronize = record

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Any) -> float:
        return 0.0


class _Ranges:
    """`torch.cuda.nvtx`: marks for a profiler that is not there."""

    def __getattr__(self, name: str) -> Callable[..., int]:
        return lambda *_: 0


def _set_data(self: Tensor, value: Tensor) -> None:
    """`tensor.data = value`, which torch does not do between a CPU and a device unknown to it.

    It is how modules move, with everything that refers to a parameter still referring to it.
    """
    if (self.device.type == NAME) == (value.device.type == NAME):
        _TENSOR_DATA.__set__(self, value)
        return
    moved = value.detach().requires_grad_(self.requires_grad)
    torch._C._swap_tensor_impl(self, moved)


_TENSOR_DATA: Any = Tensor.data


def _clone_storage(self: torch.UntypedStorage) -> torch.UntypedStorage:
    """What a deep copy of a tensor does."""
    if self.device.type == NAME:
        copy = empty_storage(self.nbytes())
        values.copy_storage(self, copy)
        return copy
    return type(self)(self.nbytes(), device=self.device).copy_(self, False)


def _new_storage(cls: type, *args: Any, device: Any = None, **kwargs: Any) -> Any:
    """Code that loads a checkpoint makes storages; torch has no allocator for the device."""
    if device is not None and torch.device(device).type == NAME:
        return empty_storage(int(args[0]) if args else 0)
    return _NEW_STORAGE(cls, *args, device=device, **kwargs)


_NEW_STORAGE: Any = torch.UntypedStorage.__new__


def _cast_for_function(value: Any, device_type: str, dtype: torch.dtype) -> Any:
    """What `custom_fwd(device_type="cuda", cast_inputs=...)` does."""
    return _CAST_FOR_FUNCTION(value, _own_name(device_type), dtype)


_CAST_FOR_FUNCTION: Any = torch.amp.autocast_mode._cast


def _own_name(device_type: Any) -> Any:
    if isinstance(device_type, torch.device):
        device_type = device_type.type
    return NAME if device_type == "cuda" else device_type


def _clears_copies_too(function: Callable[[], None]) -> Callable[[], None]:
    def clear_autocast_cache() -> None:
        function()
        autocast.clear_copies()

    return clear_autocast_cache


def _on_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Of autocast's switches; those without a device type are CUDA's."""

    def switch(*args: Any) -> Any:
        if not args or isinstance(args[0], bool | torch.dtype):
            return function(NAME, *args)
        return function(_own_name(args[0]), *args[1:])

    return switch


def _autocast(init: Callable[..., None]) -> Callable[..., None]:
    def __init__(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        init(self, _own_name(device_type), *args, **kwargs)

    return __init__


def _scaler(init: Callable[..., None]) -> Callable[..., None]:
    def __init__(self: Any, device: str = "cuda", *args: Any, **kwargs: Any) -> None:
        init(self, _own_name(device), *args, **kwargs)

    return __init__


def _generator_class() -> type:
    """Generators of the simulated device draw nothing, so the CPU's do."""
    original = torch.Generator

    class Meta(type):
        def __instancecheck__(cls, instance: Any) -> bool:
            return isinstance(instance, original)

        def __call__(cls, device: Any = "cpu") -> torch.Generator:
            on_device = torch.device(device).type in ("cuda", NAME)
            return original(device="cpu" if on_device else device)

    return Meta("Generator", (), {})


def _default_device(function: Callable[[Any], None]) -> Callable[[Any], None]:
    def set_default_device(device: Any) -> None:
        function(simulated_device() if _is_cuda(device) else device)

    return set_default_device


class CudaDevices(TorchFunctionMode):
    """A device that is named "cuda" in a call is the simulated one."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if kwargs and _is_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": simulated_device()}
        if func is Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], simulated_device(), *args[2:])
        return func(*args, **(kwargs or {}))


def _is_cuda(device: Any) -> bool:
    if isinstance(device, str):
        return device.partition(":")[0] == "cuda"
    return isinstance(device, torch.device) and device.type == "cuda"
