"""Weight files, written one tensor at a time: in memory is the tensor that is being written.

The format is that of https://github.com/huggingface/safetensors#format: the size of a header as
eight bytes, the header in JSON, the bytes of the tensors without gaps. Its own writer wants all
tensors of a file at once, and copies them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from io import FileIO
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from huggingface_hub import split_torch_state_dict_into_shards

from lowvram.errors import ProofError
from lowvram.safetensors_header import INDEX_FILE

_SHARD = "5GB"
_METADATA = {"format": "pt"}
_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_COMPARED_BYTES = 1 << 24

Layout = Mapping[str, torch.Tensor]
"""Shape and dtype of each tensor of a checkpoint; the tensors may be on the meta device."""

Places = dict[str, tuple[FileIO, int]]
"""Where each tensor goes: a file, and an offset in it."""


def size_bytes(layout: Layout) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in layout.values())


def write_weights(
    directory: Path, layout: Layout, tensors: Iterable[tuple[str, torch.Tensor]]
) -> None:
    """`tensors`, each once and in any order, in the dtypes of `layout`; files of at most 5 GB.

    What was written is read again: a ProofError if it is not bit for bit what was given, if that
    was not all and only what `layout` says, or for numbers that fp16 has no room for.
    """
    split = split_torch_state_dict_into_shards(
        dict(layout), filename_pattern="model{suffix}.safetensors", max_shard_size=_SHARD
    )
    with ExitStack() as files:
        places: Places = {}
        for file_name, names in split.filename_to_tensors.items():
            file = files.enter_context((directory / file_name).open("w+b", buffering=0))
            places |= _begin(file, {name: layout[name] for name in names})
        _fill(places, layout, _finite(tensors, layout), directory.name)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (directory / INDEX_FILE).write_text(text, encoding="utf-8")


def write_file(path: Path, layout: Layout, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """As `write_weights`, but all into one file."""
    with path.open("w+b", buffering=0) as file:
        _fill(_begin(file, layout), layout, tensors, path.name)


def _finite(
    tensors: Iterable[tuple[str, torch.Tensor]], layout: Layout
) -> Iterator[tuple[str, torch.Tensor]]:
    """In the dtypes of `layout`, in which a number may be too large."""
    for name, tensor in tensors:
        stored = tensor.to("cpu", layout[name].dtype) if name in layout else tensor
        if not _is_finite(stored):
            kind = str(stored.dtype).removeprefix("torch.")
            raise ProofError(f"not written, since {name} is not finite in {kind}")
        yield name, stored


def _fill(
    places: Places, layout: Layout, tensors: Iterable[tuple[str, torch.Tensor]], title: str
) -> None:
    for name, tensor in tensors:
        place = places.pop(name, None)
        if place is None or tensor.shape != layout[name].shape:
            raise ProofError(f"{title}: {name} is not a tensor of the model")
        _write(*place, _bytes_of(tensor.to("cpu", layout[name].dtype)), name)
    if places:
        raise ProofError(f"{title}: lacks {', '.join(sorted(places)[:3])}")


def _begin(file: FileIO, layout: Layout) -> Places:
    """Write the header; where in the file each tensor goes."""
    header: dict[str, object] = {"__metadata__": _METADATA}
    offsets, end = {}, 0
    # Larger elements first: each tensor is then aligned to its own.
    for name, tensor in sorted(layout.items(), key=lambda item: -item[1].itemsize):
        offsets[name], start = end, end
        end += tensor.numel() * tensor.itemsize
        header[name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    _put(file, np.frombuffer(len(text).to_bytes(8, "little") + text, dtype=np.uint8))
    file.truncate(8 + len(text) + end)
    return {name: (file, 8 + len(text) + offset) for name, offset in offsets.items()}


def _is_finite(tensor: torch.Tensor) -> bool:
    if tensor.numel() == 0 or not tensor.is_floating_point():
        return True
    return bool(torch.stack(tensor.aminmax()).isfinite().all())


def _bytes_of(tensor: torch.Tensor) -> npt.NDArray[np.uint8]:
    """(n,) the bytes of a tensor on the CPU, without a copy where it is contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()


def _put(file: FileIO, data: npt.NDArray[np.uint8]) -> None:
    left = data.data
    while left:  # a single write takes 2 GiB at most
        left = left[file.write(left) :]


def _write(file: FileIO, offset: int, data: npt.NDArray[np.uint8], name: str) -> None:
    file.seek(offset)
    _put(file, data)
    file.seek(offset)
    found = np.empty(min(len(data), _COMPARED_BYTES), dtype=np.uint8)
    for start in range(0, len(data), _COMPARED_BYTES):
        wanted = data[start : start + _COMPARED_BYTES]
        size = file.readinto(found[: len(wanted)].data)
        if size != len(wanted) or not np.array_equal(found[: len(wanted)], wanted):
            raise ProofError(f"{Path(str(file.name)).name}: {name} is not what was written")
