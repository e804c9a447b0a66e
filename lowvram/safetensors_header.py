"""What a safetensors file says that it holds, read and verified without reading any weight.

The format: https://github.com/huggingface/safetensors#format. A file from a stranger may lie, so
every claim is held against the size of the file before anything is made from it. What does not
hold is a ValueError that says what was found; the reader above knows whose file it is.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

HEADER_BYTES = 16 << 20
"""A tensor takes about a hundred bytes, and GPT-2 XL has 580 of them."""
TENSOR_ELEMENTS = 1 << 40
_DIMENSIONS = 8

ELEMENT_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "C64": 8,
    "BOOL": 1,
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor: how it is stored, and where in the file its bytes are."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors by name, in the order of their bytes, which fill the file without a gap."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(
                f"{path.name}: its header would be {length:,} bytes, the file has {size:,}"
            )
        if length > HEADER_BYTES:
            raise ValueError(
                f"{path.name}: its header is {length:,} bytes, at most {HEADER_BYTES:,} are read"
            )
        header = _parse(file.read(length), path.name)
    body = 8 + length
    entries = {
        name: _entry(name, value, body, path.name)
        for name, value in header.items()
        if name != "__metadata__"
    }
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)))
    _check_cover(ordered, body, size, path.name)
    return ordered


def _parse(text: bytes, file: str) -> dict[str, Any]:
    try:
        header = json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: its header is not JSON of tensors: {error}") from error
    if not isinstance(header, dict):
        raise ValueError(f"{file}: its header is {type(header).__name__}, not an object")
    return header


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise ValueError(f"{twice[:80]!r} occurs twice")
    return found


def _entry(name: str, value: Any, body: int, file: str) -> TensorEntry:
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{file}: {name} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ELEMENT_BYTES:
        raise ValueError(f"{file}: {name} has the dtype {str(dtype)[:40]!r}, which is unknown")
    if not _whole(shape) or len(shape) > _DIMENSIONS or math.prod(shape) > TENSOR_ELEMENTS:
        raise ValueError(f"{file}: {name} has the shape {str(shape)[:80]}, which no tensor has")
    if not _whole(offsets) or len(offsets) != 2:
        raise ValueError(f"{file}: {name} has the offsets {str(offsets)[:80]}, not first and end")
    needed = math.prod(shape) * ELEMENT_BYTES[dtype]
    if offsets[1] - offsets[0] != needed:
        raise ValueError(
            f"{file}: {name} is {dtype} {shape}, {needed:,} bytes, but its offsets {offsets} "
            f"are {offsets[1] - offsets[0]:,} apart"
        )
    return TensorEntry(dtype, tuple(shape), body + offsets[0], body + offsets[1])


def _whole(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _check_cover(entries: dict[str, TensorEntry], body: int, size: int, file: str) -> None:
    """Bytes that two tensors share, or that no tensor has, hide something."""
    at, last = body, "its header"
    for name, entry in entries.items():
        if entry.start != at:
            kind = "overlaps" if entry.start < at else "leaves a gap after"
            raise ValueError(f"{file}: {name} {kind} {last}")
        at, last = entry.end, name
    if at != size:
        raise ValueError(f"{file}: its tensors end at byte {at:,}, but the file has {size:,} bytes")
