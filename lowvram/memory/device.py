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

import contextlib
import ctypes
import functools
import itertools
import math
import operator
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._ops import OpOverload

from lowvram.errors import DeviceError
from lowvram.memory import values
from lowvram.memory.kernels import Target, output_bytes, output_order
from lowvram.memory.measure import SIMULATED

NAME = SIMULATED

_aten = torch.ops.aten
_C: Any = torch._C
_META, _CPU = torch.device("meta"), torch.device("cpu")


class Listener(Protocol):
    """Hears what a card's memory would see."""

    target: Target
    """The card whose kernels are chosen."""

    def allocate(self, size_bytes: int) -> int:
        """A new storage; returns its address. Raises torch.OutOfMemoryError where it is full."""

    def watch(self, storage: torch.UntypedStorage, address: int) -> None:
        """The storage at `address`, so that its end is noticed."""

    def before(
        self, op: OpOverload, args: Sequence[Any], kwargs: dict[str, Any], outputs: Sequence[Tensor]
    ) -> None:
        """A kernel is about to run; `outputs` are given, or tell shapes only.

        What is allocated until `after` are its outputs.
        """

    def after(self, op: OpOverload, outputs: Sequence[Tensor]) -> None:
        """The kernel has run, and its outputs exist."""


class _Silent:
    """Tensors outlive the simulation that made them; nobody counts what they do then."""

    target = Target(compute_capability=(8, 9), multiprocessors=60)
    _addresses = itertools.count(1 << 44, 1 << 32)

    def allocate(self, size_bytes: int) -> int:
        return next(self._addresses) if size_bytes else 0

    def watch(self, storage: torch.UntypedStorage, address: int) -> None:
        pass

    def before(
        self, op: OpOverload, args: Sequence[Any], kwargs: dict[str, Any], outputs: Sequence[Tensor]
    ) -> None:
        pass

    def after(self, op: OpOverload, outputs: Sequence[Tensor]) -> None:
        pass


_listener: Listener = _Silent()


@contextmanager
def listen(listener: Listener) -> Iterator[None]:
    """`listener` hears everything until the block ends; simulations do not nest."""
    global _listener
    if is_simulating():
        raise DeviceError("a simulation is running in this process; it has to end first")
    _listener = listener
    try:
        yield
    finally:
        _listener = _Silent()


def target() -> Target:
    return _listener.target


def is_simulating() -> bool:
    return not isinstance(_listener, _Silent)


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
    for op in _METADATA_ONLY:
        library.impl(op.name().removeprefix("aten::"), _on_metadata(op), "PrivateUse1")
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
    _start_backward_thread()


def _start_backward_thread() -> None:
    """autograd starts a thread for each device at the first backward pass of a process.

    If that has been, before it could know of this device, its function to do so is called again.
    The pass sums up two gradients, for `_add` to learn from.
    """
    with torch.inference_mode(False), torch.enable_grad():
        one = torch.ones(1, device=NAME, requires_grad=True)
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


# Storages and tensors

_CPU_KEYS = _C.DispatchKeySet(_C.DispatchKey.CPU)
_set_storage = _aten.set_.source_Storage_storage_offset


def empty(size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A new tensor with a storage of its own."""
    elements = 0 if 0 in size else 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    storage = empty_storage(elements * dtype.itemsize)
    tensor = _C._acc.create_empty_tensor((0,), dtype)
    _set_storage.redispatch(_CPU_KEYS, tensor, storage, 0, size, stride)
    return tensor  # type: ignore[no-any-return]


def empty_storage(size_bytes: int) -> torch.UntypedStorage:
    address = _listener.allocate(size_bytes)
    storage: torch.UntypedStorage = _C._construct_storage_from_data_pointer(
        address, torch.device(NAME, 0), size_bytes
    )
    if size_bytes:
        _listener.watch(storage, address)
    return storage


def _contiguous(size: Sequence[int]) -> list[int]:
    stride = [1] * len(size)
    for i in range(len(size) - 2, -1, -1):
        stride[i] = stride[i + 1] * max(1, size[i + 1])
    return stride


def _empty(
    size: Sequence[int],
    *,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
    **_: Any,
) -> Tensor:
    if memory_format not in (None, torch.contiguous_format):
        like = torch.empty(size, device=_META, memory_format=memory_format)
        return empty(size, like.stride(), dtype or torch.get_default_dtype())
    return empty(size, _contiguous(size), dtype or torch.get_default_dtype())


def _empty_strided(
    size: Sequence[int], stride: Sequence[int], *, dtype: torch.dtype | None = None, **_: Any
) -> Tensor:
    return empty(size, stride, dtype or torch.get_default_dtype())


def _resize(self: Tensor, size: Sequence[int], *, memory_format: Any = None) -> Tensor:
    """In place; a storage that is too small is replaced by a new one, as on a card."""
    stride = _contiguous(size)
    needed = int(self.storage_offset() + math.prod(size)) * self.dtype.itemsize
    storage = self.untyped_storage()
    if needed > storage.nbytes():
        storage = empty_storage(needed)
    _set_storage.redispatch(_CPU_KEYS, self, storage, self.storage_offset(), size, stride)
    return self


def _on_metadata(op: OpOverload) -> Callable[..., Any]:
    """The CPU's kernel, which looks at shapes only."""

    def kernel(*args: Any, **kwargs: Any) -> Any:
        return op.redispatch(_CPU_KEYS, *args, **kwargs)

    return kernel


_METADATA_ONLY: list[OpOverload] = [
    _aten.as_strided.default,
    _aten.view.default,
    _aten.view.dtype,
    _aten._reshape_alias.default,
    _aten.unfold.default,
    _aten.view_as_real.default,
    _aten.view_as_complex.default,
    _aten.set_.default,
    _aten.set_.source_Storage,
    _aten.set_.source_Storage_storage_offset,
    _aten.set_.source_Tensor,
    _aten.is_set_to.default,
]

# What reads values, or copies them to the CPU. What is not known is zero.


def _copy(self: Tensor, src: Tensor, non_blocking: bool = False) -> Tensor:
    """Between devices too."""
    if self.numel() == 0:  # also of parameters that have no shape yet
        return self
    op, args = _aten.copy_.default, (self, src, non_blocking)
    _listener.before(op, args, {}, (self,))
    if self.device.type == "cpu":
        found = values.known(src)
        self.zero_() if found is None else self.copy_(found)
    else:
        values.follow_write(op, args, {}, (self,), is_out=False)
    _listener.after(op, (self,))
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
        if _is_dense(self) and all(map(operator.le, held, _held_by_nobody)):
            values.forget(self)
            return _alias(self)
    return _kernel(_aten.add.Tensor, self, other, alpha=alpha)  # type: ignore[no-any-return]


def _is_accumulating() -> bool:
    """Whether the caller's caller is autograd's engine, in C++."""
    if torch.is_grad_enabled() or _C._current_graph_task_id() == -1:
        return False
    frame = sys._getframe(1).f_back
    return frame is None or frame.f_code.co_name == "_engine_run_backward"


_held_by_nobody: list[int] = []
"""The counts of a gradient that autograd, the call of `_add` and Python hold, and no other.

They are those of the first one in the process, which `_start_backward_thread` makes.
"""


def _holders(tensor: Tensor) -> tuple[int, int, int]:
    """References to the Python object, to the tensor behind it and to its storage."""
    storage = tensor.untyped_storage()
    return (
        sys.getrefcount(tensor),
        tensor._use_count(),  # type: ignore[attr-defined]
        _C._storage_Use_Count(storage._cdata),
    )


def _is_dense(tensor: Tensor) -> bool:
    """Each element has a place of its own, and there are no gaps between them."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _alias(tensor: Tensor) -> Tensor:
    alias: Tensor = _C._acc.create_empty_tensor((0,), tensor.dtype)
    _set_storage.redispatch(
        _CPU_KEYS,
        alias,
        tensor.untyped_storage(),
        tensor.storage_offset(),
        tensor.shape,
        tensor.stride(),
    )
    return alias


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass


_KERNELS: dict[str, Callable[..., Any]] = {
    "empty.memory_format": _empty,
    "empty_strided": _empty_strided,
    "resize_": _resize,
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
_shapes: dict[Any, Any] = {}
_MOST_SHAPES = 50_000


def _kernel(op: OpOverload, *args: Any, **kwargs: Any) -> Any:
    """An operator that the card has a kernel for: outputs of its shapes, no values."""
    signature = _signatures.get(op) or _signatures.setdefault(op, Signature(op))
    if signature.written:
        return _write(op, signature, args, kwargs)
    shapes = values.computed(op, args, kwargs) if signature.has_dynamic_shape else None
    if shapes is None:
        shapes = _shapes_of(op, args, kwargs)
    _listener.before(op, args, kwargs, tensors_in(shapes))
    result = _made(shapes, output_order(op))
    outputs = tensors_in(result)
    values.follow(op, args, kwargs, outputs)
    _listener.after(op, outputs)
    return result


def _write(
    op: OpOverload, signature: Signature, args: Sequence[Any], kwargs: dict[str, Any]
) -> Any:
    """Into given tensors, which an empty `out` is first resized for."""
    targets = signature.targets(args, kwargs)
    outputs = tensors_in(targets)
    if signature.written[0][2] and any(out.numel() == 0 for out in outputs):
        for out, shape in zip(outputs, tensors_in(_shapes_of(op, args, kwargs)), strict=False):
            if out.shape != shape.shape:
                _resize(out, shape.shape)
    writes_all = signature.returns in (0, len(targets))
    _listener.before(op, args, kwargs, outputs)
    values.follow_write(op, args, kwargs, outputs, is_out=signature.written[0][2])
    # Some write to one tensor and return another.
    result = None if writes_all else _made(_shapes_of(op, args, kwargs))
    _listener.after(op, outputs)
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


def _shapes_of(op: OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The operator's outputs on the meta device; remembered."""
    key: Any = None
    found = None
    with contextlib.suppress(TypeError):  # an argument that does not hash
        key = (op, _key(args), _key(kwargs), torch.is_grad_enabled())
        found = _shapes.get(key)
    if found is None:
        found = _run_for_shapes(op, args, kwargs)
        if sizes := output_bytes(op):
            found = tuple(
                torch.empty(sizes[i], dtype=torch.uint8, device=_META) if i in sizes else value
                for i, value in enumerate(found)
            )
        if key is not None:
            if len(_shapes) > _MOST_SHAPES:
                _shapes.clear()
            _shapes[key] = found
    return found


def _run_for_shapes(op: OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """On the meta device; operators that are not made for it run on the CPU, with zeros."""
    with _C._DisableTorchDispatch():
        try:
            return _SHAPES.get(op, op)(*_placed(args, _META), **_placed(kwargs, _META))
        except NotImplementedError:
            on_cpu = op(*_placed(args, _CPU), **_placed(kwargs, _CPU))
            return _placed(on_cpu, _META)


def _key(value: Any) -> Any:
    if isinstance(value, Tensor):
        return (tuple(value.shape), value.stride(), value.dtype)
    if isinstance(value, list | tuple):
        return tuple(_key(item) for item in value)
    if isinstance(value, dict):
        return tuple((name, _key(item)) for name, item in value.items())
    return (type(value), value)


def _placed(value: Any, device: torch.device) -> Any:
    """The value with tensors of the same shapes on `device` in place of its own."""
    if isinstance(value, Tensor):
        like = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
        return like.zero_() if device.type == "cpu" else like
    if isinstance(value, list | tuple):
        return type(value)(_placed(item, device) for item in value)
    if isinstance(value, dict):
        return {name: _placed(item, device) for name, item in value.items()}
    if isinstance(value, torch.Generator):
        return None
    return device if isinstance(value, torch.device) else value


def tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in tensors_in(item)]
    if isinstance(value, dict):
        return tensors_in(list(value.values()))
    return []


# Outputs whose size depends on values take the largest there can be.


def _nonzero(self: Tensor) -> Tensor:
    return torch.empty((self.dim(), self.numel()), dtype=torch.int64, device=_META).t()


def _masked_select(self: Tensor, mask: Tensor) -> Tensor:
    shape = torch.broadcast_shapes(self.shape, mask.shape)
    return torch.empty(math.prod(shape), dtype=self.dtype, device=_META)


def _unique(self: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    n = self.numel()
    index = torch.empty(n, dtype=torch.int64, device=_META)
    return torch.empty(n, dtype=self.dtype, device=_META), index.view(self.shape), index


def _log_sigmoid(self: Tensor) -> tuple[Tensor, Tensor]:
    """native/cuda/Activation.cpp: without the buffer that the CPU keeps for its backward pass."""
    return torch.empty_like(self), self.new_empty(0)


def _grouped_product(
    a: Tensor,
    b: Tensor,
    offsets: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """GroupedMMUtils.h, create_grouped_gemm_output_tensor: rows begin at multiples of 16 bytes.

    torch's own shape function knows bf16 only.
    """
    dtype = out_dtype or a.dtype
    rows, columns = a.size(-2), b.size(-1)
    row_stride = -(-columns * dtype.itemsize // 16) * 16 // dtype.itemsize
    if a.dim() != b.dim():
        size, stride = [rows, columns], [row_stride, 1]
    else:
        groups = a.size(0) if a.dim() == 3 else _size(offsets)
        size, stride = [groups, rows, columns], [rows * row_stride, row_stride, 1]
    return torch.empty_strided(size, stride, dtype=dtype, device=_META)


def _size(vector: Tensor | None) -> int:
    return 0 if vector is None else vector.numel()


def _gru_cell(
    input_gates: Tensor, hidden_gates: Tensor, hidden: Tensor, *biases: Tensor | None
) -> tuple[Tensor, Tensor]:
    """native/cuda/RNN.cu, _thnn_fused_gru_cell_cuda: the new state, and what backward needs."""
    return torch.empty_like(hidden), hidden.new_empty(hidden.size(0), hidden.size(1) * 5)


def _gru_cell_backward(
    grad: Tensor, workspace: Tensor, has_bias: bool
) -> tuple[Tensor | None, ...]:
    gates = [workspace.new_empty(grad.size(0), grad.size(1) * 3) for _ in range(2)]
    biases = [gate.sum(0) if has_bias else None for gate in gates]
    return *gates, torch.empty_like(grad), *biases


def _convolution(*args: Any) -> Tensor:
    return _aten.convolution.default(*args)  # type: ignore[no-any-return]


def _convolution_backward(*args: Any) -> Any:
    """Without the sizes of the bias, which the operator for other devices leaves out."""
    grad_output, input_, weight, *rest = args
    return _aten.convolution_backward.default(grad_output, input_, weight, [weight.shape[0]], *rest)


_SHAPES: dict[OpOverload, Callable[..., Any]] = {
    _aten.nonzero.default: _nonzero,
    _aten.masked_select.default: _masked_select,
    _aten._unique2.default: _unique,
    _aten.log_sigmoid_forward.default: _log_sigmoid,
    _aten._grouped_mm.default: _grouped_product,
    _aten._thnn_fused_gru_cell.default: _gru_cell,
    _aten._thnn_fused_gru_cell_backward.default: _gru_cell_backward,
    _aten.convolution_overrideable.default: _convolution,
    _aten.convolution_backward_overrideable.default: _convolution_backward,
}
