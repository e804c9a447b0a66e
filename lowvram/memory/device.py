"""The simulated device: PyTorch's own device type for newcomers, with shapes but no memory.

A tensor on it is a plain `torch.Tensor` whose storage has a size, an address and no bytes, so
that autograd, modules and optimizers treat it as they treat one on a card. The operators that
PyTorch composes in C++ compose themselves here too; only what would be a kernel on the card ends
up in `_kernel`, which makes outputs of the right shape and computes nothing. Whoever has `listen`ed
hears of every storage and of every kernel.

The device type (`PrivateUse1`) can be claimed once in a process and has no end; what is
registered for it is inert without tensors on it. A tensor on the CPU keeps its values.
"""

from __future__ import annotations

import functools
import operator
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from lowvram.errors import DeviceError
from lowvram.memory import listener, values
from lowvram.memory.engine import start_backward_thread
from lowvram.memory.kernels import output_order
from lowvram.memory.kernels.tensors import is_dense
from lowvram.memory.listener import is_simulating
from lowvram.memory.measure import SIMULATED
from lowvram.memory.shapes import shapes_of, tensors_in
from lowvram.memory.storage import (
    METADATA_ONLY,
    alias_of,
    empty,
    empty_in_format,
    empty_strided,
    on_metadata,
    resize,
)

NAME = SIMULATED

_aten = torch.ops.aten
_C: Any = torch._C
_META, _CPU = torch.device("meta"), torch.device("cpu")


def simulated_device() -> torch.device:
    """The device; claims the device type at the first call.

    Raises DeviceError where another library has claimed it.
    """
    if _C._get_privateuse1_backend_name() != NAME:
        _claim()
    return torch.device(NAME, 0)


class _Module:
    """What PyTorch expects under `torch.<name of the device>`."""

    @staticmethod
    def is_available() -> bool:
        return is_simulating()

    @staticmethod
    def is_initialized() -> bool:
        return is_simulating()

    @staticmethod
    def device_count() -> int:
        return int(is_simulating())

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def set_device(device: Any) -> None:
        pass

    @staticmethod
    @contextmanager
    def device(device: Any) -> Iterator[None]:
        yield

    @staticmethod
    def synchronize(device: Any = None) -> None:
        pass

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def manual_seed(seed: int) -> None:
        pass

    manual_seed_all = manual_seed

    @staticmethod
    def get_rng_state(device: Any = None) -> Tensor:
        return torch.zeros(16, dtype=torch.uint8)  # a card's is as large, and on the host

    @staticmethod
    def set_rng_state(state: Tensor, device: Any = None) -> None:
        pass

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16, torch.float32]


_libraries: list[torch.library.Library] = []  # they end when they are forgotten


def _claim() -> None:
    import torch._meta_registrations  # noqa: F401 - shape functions written in Python
    from torch.utils.backend_registration import (
        _DummyPrivateUse1Hook,
        _setup_privateuseone_for_python_backend,
    )

    from lowvram.memory.autocast import register_casts
    from lowvram.memory.composites import register_composites
    from lowvram.memory.quantized import register_quantized

    class Hook(_DummyPrivateUse1Hook):
        def is_available(self) -> bool:
            return is_simulating()

    try:
        _setup_privateuseone_for_python_backend(NAME, backend_module=_Module(), hook=Hook())
    except RuntimeError as error:
        raise DeviceError(
            "the device type PrivateUse1 of this process belongs to "
            f"{_C._get_privateuse1_backend_name()!r}; simulate in a process of its own"
        ) from error
    library = torch.library.Library("aten", "IMPL")
    for name, kernel in _KERNELS.items():
        library.impl(name, kernel, "PrivateUse1")
    for op in METADATA_ONLY:
        library.impl(op.name().removeprefix("aten::"), on_metadata(op), "PrivateUse1")
    for op in _kernels_beside_composites():
        name = op.name().removeprefix("aten::")
        library.impl(name, functools.partial(_kernel, op), "PrivateUse1")
    others = torch.library.Library("_", "IMPL")
    others.fallback(_kernel, "PrivateUse1")
    others.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    register_casts(library)
    register_composites(library)
    bitsandbytes = torch.library.Library("bitsandbytes", "IMPL")
    register_quantized(bitsandbytes)
    _libraries.extend((library, others, bitsandbytes))
    start_backward_thread()


_OVER_COMPOSITES = """
    convolution_overrideable convolution_backward_overrideable
    native_layer_norm native_group_norm _fused_rms_norm _fused_rms_norm_backward silu_backward
    mish_backward convolution_backward addr _chunk_cat _grouped_mm linalg__powsum all.dims any.dims
""".split()


def _kernels_beside_composites() -> Iterator[OpOverload]:
    """Operators that CUDA has a kernel for although PyTorch can compose them.

    Elsewhere it composes them, in other steps and with other memory. From native_functions.yaml.
    """
    names = [
        name.removeprefix("aten::")
        for name in _C._dispatch_get_all_op_names()
        if name.startswith("aten::_foreach_") and not name.endswith(("out", "_out"))
    ]
    for name in names + _OVER_COMPOSITES:
        packet, _, overload = name.partition(".")
        op = getattr(getattr(_aten, packet, None), overload or "default", None)
        if op is not None:
            yield op


# What reads values, or copies them to the CPU. What is not known is zero.


def _copy(self: Tensor, src: Tensor, non_blocking: bool = False) -> Tensor:
    """Between devices too."""
    if self.numel() == 0:  # also of parameters that have no shape yet
        return self
    op, args = _aten.copy_.default, (self, src, non_blocking)
    listener.current.before(op, args, {}, (self,))
    if self.device.type == "cpu":
        found = values.known(src)
        self.zero_() if found is None else self.copy_(found)
    else:
        values.follow_write(op, args, {}, (self,), is_out=False)
    listener.current.after(op, (self,))
    return self


def _item(self: Tensor) -> Any:
    found = values.known(self)
    return (torch.zeros((), dtype=self.dtype) if found is None else found).item()


def _equal(self: Tensor, other: Tensor) -> bool:
    """As native/cuda/Equal.cpp does it."""
    if self.shape != other.shape:
        return False
    if self is other or self.numel() == 0:
        return True
    return bool((self == other).all().item())


def _add(self: Tensor, other: Tensor, *, alpha: Any = 1) -> Tensor:
    """A gradient that has been summed up by autograd is added to in place.

    torch/csrc/autograd/input_buffer.cpp, accumulate: the older of the two takes the sum if nobody
    else holds it. Here every tensor has a Python object, which counts as a holder, so that autograd
    asks for a new tensor; a card would not be asked.
    """
    if _is_accumulating() and self.shape == other.shape and self.dtype == other.dtype:
        held = _holders(self)
        if not _held_by_nobody:
            _held_by_nobody.extend(held)
        if is_dense(self) and all(map(operator.le, held, _held_by_nobody)):
            values.forget(self)
            return alias_of(self)
    return _kernel(_aten.add.Tensor, self, other, alpha=alpha)  # type: ignore[no-any-return]


def _is_accumulating() -> bool:
    """Whether the caller's caller is autograd's engine, in C++."""
    if torch.is_grad_enabled() or _C._current_graph_task_id() == -1:
        return False
    frame = sys._getframe(1).f_back
    return frame is None or frame.f_code.co_name == "_engine_run_backward"


_held_by_nobody: list[int] = []
"""The counts of a gradient that autograd, the call of `_add` and Python hold, and no other.

They are those of the first one in the process, which `start_backward_thread` makes.
"""


def _holders(tensor: Tensor) -> tuple[int, int, int]:
    """References to the Python object, to the tensor behind it and to its storage."""
    storage = tensor.untyped_storage()
    return (
        sys.getrefcount(tensor),
        tensor._use_count(),  # type: ignore[attr-defined]
        _C._storage_Use_Count(storage._cdata),
    )


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass


_KERNELS: dict[str, Callable[..., Any]] = {
    "empty.memory_format": empty_in_format,
    "empty_strided": empty_strided,
    "resize_": resize,
    "copy_": _copy,
    "add.Tensor": _add,
    "_local_scalar_dense": _item,
    "equal": _equal,
    "record_stream": _nothing,
}

# Everything else


class Signature:
    """Of an operator: which arguments it writes to, and what its outputs depend on."""

    def __init__(self, op: OpOverload) -> None:
        arguments = op._schema.arguments
        self.written = [
            (position, argument.name, argument.is_out)
            for position, argument in enumerate(arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        self.returns = len(op._schema.returns)
        self.has_dynamic_shape = torch.Tag.dynamic_output_shape in op.tags

    def targets(self, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
        return [
            kwargs[name] if name in kwargs else args[position]
            for position, name, _ in self.written
            if name in kwargs or position < len(args)
        ]


_signatures: dict[OpOverload, Signature] = {}


def _kernel(op: OpOverload, *args: Any, **kwargs: Any) -> Any:
    """An operator that the card has a kernel for: outputs of its shapes, no values."""
    signature = _signatures.get(op) or _signatures.setdefault(op, Signature(op))
    if signature.written:
        return _write(op, signature, args, kwargs)
    shapes = values.computed(op, args, kwargs) if signature.has_dynamic_shape else None
    if shapes is None:
        shapes = shapes_of(op, args, kwargs)
    listener.current.before(op, args, kwargs, tensors_in(shapes))
    result = _made(shapes, output_order(op))
    outputs = tensors_in(result)
    values.follow(op, args, kwargs, outputs)
    listener.current.after(op, outputs)
    return result


def _write(
    op: OpOverload, signature: Signature, args: Sequence[Any], kwargs: dict[str, Any]
) -> Any:
    """Into given tensors, which an empty `out` is first resized for."""
    targets = signature.targets(args, kwargs)
    outputs = tensors_in(targets)
    if signature.written[0][2] and any(out.numel() == 0 for out in outputs):
        for out, shape in zip(outputs, tensors_in(shapes_of(op, args, kwargs)), strict=False):
            if out.shape != shape.shape:
                resize(out, shape.shape)
    writes_all = signature.returns in (0, len(targets))
    listener.current.before(op, args, kwargs, outputs)
    values.follow_write(op, args, kwargs, outputs, is_out=signature.written[0][2])
    # Some write to one tensor and return another.
    result = None if writes_all else _made(shapes_of(op, args, kwargs))
    listener.current.after(op, outputs)
    if not writes_all:
        return result
    if signature.returns < 2:
        return targets[0] if signature.returns else None
    return tuple(targets)


def _made(shapes: Any, order: Sequence[int] = ()) -> Any:
    """New tensors like those on the meta device, in their order or the given one."""
    if isinstance(shapes, Tensor):
        return empty(shapes.shape, shapes.stride(), shapes.dtype)
    if isinstance(shapes, list | tuple):
        made = list(shapes)
        for position in order or range(len(made)):
            made[position] = _made(made[position])
        return made if isinstance(shapes, list) else tuple(made)
    return shapes
