"""The values of small tensors on the simulated device, where they can be known.

Training code reads a few values and decides by them: whether a mask has padding, how many labels
count, whether all sequences have ended. A tensor that was copied from the CPU or made of numbers
has its values in a second storage, on the CPU, and what is computed from such tensors alone is
computed there as well. What a weight had a part in is not known, and neither is what is large.
Comparisons of the unknown are answered all the same: no two values are equal, none is larger or
smaller than another, none is infinite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

LARGEST_FLOATS = 1 << 10
"""Elements of the largest floating tensor whose values are kept: time is what they cost."""
LARGEST_INTEGERS = 1 << 17
"""Of integers and truth values: token ids and masks of a batch."""

_ATTRIBUTE = "_lowvram_values"
_OVERWRITES = {
    f"aten::{name}_"
    for name in "zero fill copy random normal uniform bernoulli exponential".split()
}
_C: Any = torch._C


@dataclass(slots=True)
class _Values:
    """Of one storage."""

    storage: torch.UntypedStorage
    certain: bool
    """Not derived from a comparison of something unknown."""


class _Unknown(Exception):
    pass


def known(tensor: Tensor) -> Tensor | None:
    """The values, in a tensor on the CPU."""
    values = _values_of(tensor)
    return None if values is None else _view(tensor, values)


def is_small(tensor: Tensor) -> bool:
    limit = LARGEST_FLOATS if tensor.is_floating_point() else LARGEST_INTEGERS
    return tensor.numel() <= limit


def keep(tensor: Tensor, values: Tensor, *, certain: bool = True) -> None:
    """From now on `tensor`, the only one on its storage, has these values."""
    size_bytes = tensor.untyped_storage().nbytes()
    if values.stride() != tensor.stride() or values.untyped_storage().nbytes() != size_bytes:
        values = torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu"
        ).copy_(values)
    setattr(tensor.untyped_storage(), _ATTRIBUTE, _Values(values.untyped_storage(), certain))


def forget(tensor: Tensor) -> None:
    """Something unknown was written to it."""
    vars(tensor.untyped_storage()).pop(_ATTRIBUTE, None)


def copy_storage(source: torch.UntypedStorage, target: torch.UntypedStorage) -> None:
    values = getattr(source, _ATTRIBUTE, None)
    if values is not None:
        setattr(target, _ATTRIBUTE, _Values(values.storage.clone(), values.certain))


def computed(op: OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The operator's outputs on the CPU if its inputs are known for certain; None otherwise.

    For operators whose values decide how large their outputs are.
    """
    try:
        inputs = _Inputs()
        result = _run(op, inputs.on_cpu(args), inputs.on_cpu(kwargs))
    except _Unknown:
        return None
    return result if inputs.certain else None


def follow(
    op: OpOverload, args: Sequence[Any], kwargs: dict[str, Any], outputs: Sequence[Tensor]
) -> None:
    """The operator has made these tensors."""
    if not all(is_small(output) for output in outputs):
        return
    try:
        inputs = _Inputs()
        results = _run(op, inputs.on_cpu(args), inputs.on_cpu(kwargs))
    except _Unknown:
        _assume(op, args, outputs)
        return
    made = _flat(results)
    # A shape may be another one where the values that decide it were not certain.
    if [result.shape for result in made] == [output.shape for output in outputs]:
        for output, result in zip(outputs, made, strict=True):
            keep(output, result, certain=inputs.certain)


def follow_write(
    op: OpOverload,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    outputs: Sequence[Tensor],
    *,
    is_out: bool,
) -> None:
    """The operator has written to these tensors; `is_out`: they were given for its results."""
    outputs = [output for output in outputs if is_small(output)]  # what is large has none anyway
    if not outputs:
        return
    if is_out or op._schema.name in _OVERWRITES:
        storages = [tensor.untyped_storage() for tensor in _flat([args, *kwargs.values()])]
        for output in outputs:
            storage = output.untyped_storage()
            # What is given a second time is also read: x.add_(y) arrives as add(x, y, out=x).
            if _fills_its_storage(output) and storages.count(storage) == 1:
                blank = torch.UntypedStorage(storage.nbytes(), device="cpu")
                setattr(storage, _ATTRIBUTE, _Values(blank, certain=True))
    try:
        inputs = _Inputs()
        _run(op, inputs.on_cpu(args), inputs.on_cpu(kwargs))
    except _Unknown:
        for output in outputs:
            forget(output)
        if is_out:
            _assume(op, args, [output for output in outputs if _fills_its_storage(output)])
        return
    for output in outputs:
        values = _values_of(output)
        if values is not None:
            values.certain = inputs.certain


class _Inputs:
    """Puts CPU tensors in place of an operator's arguments."""

    def __init__(self) -> None:
        self.certain = True

    def on_cpu(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, list | tuple):
            return type(value)(self.on_cpu(item) for item in value)
        if isinstance(value, dict):
            return {name: self.on_cpu(item) for name, item in value.items()}
        return torch.device("cpu") if isinstance(value, torch.device) else value

    def _tensor(self, tensor: Tensor) -> Tensor:
        if tensor.requires_grad or not is_small(tensor):
            raise _Unknown
        if tensor.device.type == "cpu":
            return tensor
        values = _values_of(tensor)
        if values is None:
            raise _Unknown
        self.certain = self.certain and values.certain
        return _view(tensor, values)


def _values_of(tensor: Tensor) -> _Values | None:
    return getattr(tensor.untyped_storage(), _ATTRIBUTE, None)


def _view(tensor: Tensor, values: _Values) -> Tensor:
    view = torch.empty(0, dtype=tensor.dtype, device="cpu")
    return view.set_(values.storage, tensor.storage_offset(), tensor.shape, tensor.stride())


def _run(op: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    try:
        with _C._DisableTorchDispatch():
            return op(*args, **kwargs)
    except Exception as error:
        # An operator of cards alone, or an index that no card would complain about in time.
        raise _Unknown from error


def _assume(op: OpOverload, args: Sequence[Any], outputs: Sequence[Tensor]) -> None:
    """The answers to a comparison, or to another question, about unknown values."""
    name = op._schema.name
    answer = name in ("aten::ne", "aten::ge", "aten::le")
    if name in ("aten::eq", "aten::ne") and args[0] is args[1]:
        answer = not answer  # how torch asks whether a value is a number
    for output in outputs:
        if output.dtype == torch.bool and output.numel():
            answers = torch.full(output.shape, answer, dtype=torch.bool, device="cpu")
            keep(output, answers, certain=False)


def _fills_its_storage(tensor: Tensor) -> bool:
    return math.prod(tensor.shape) * tensor.itemsize == tensor.untyped_storage().nbytes()


def _flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in _flat(item)]
    return []
