"""Whether weight files hold what a model needs: by their headers, then by their numbers.

Headers are compared before a weight is read, so that what cannot fit costs neither time nor memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from lowvram.errors import ModelError
from lowvram.safetensors_header import TensorEntry, read_header

CHUNK_BYTES = 1 << 22

FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}

Headers = Mapping[str, tuple[Path, TensorEntry]]
"""Of each tensor by its name in the files: in which file, and where."""


def check_weights(
    name: str,
    model: PreTrainedModel,
    shapes: Mapping[str, torch.Tensor],
    files: Sequence[Path],
) -> None:
    """ModelError or ValueError unless `files` hold the tensors `shapes` of `model`, and numbers.

    All of it without a weight in memory; `model` may be on the meta device.
    """
    headers = read_headers(files)
    if _are_converted(model, headers):  # what they become is known when they are loaded
        check_finite(headers, headers)
        return
    names = named_as(headers, shapes, model.base_model_prefix)
    refuse_misfits(
        name,
        [
            (key, headers[stored][1].shape, shapes[key].shape)
            for key, stored in names.items()
            if headers[stored][1].shape != shapes[key].shape
        ],
        shapes.keys() - names.keys() - _tied_elsewhere(model, headers),
    )
    for key, stored in names.items():
        if shapes[key].is_floating_point() and headers[stored][1].dtype not in FLOATS:
            raise ValueError(
                f"{stored} is stored as {headers[stored][1].dtype}; weights are {', '.join(FLOATS)}"
            )
    if extra := more_layers(headers, names, model._keys_to_ignore_on_load_unexpected or ()):
        raise ValueError(f"{extra} is of a layer that its config.json does not have")
    check_finite(headers, names.values())


def refuse_misfits(name: str, mismatched: Iterable[Any], missing: Iterable[Any]) -> None:
    """For tensors of (name, shape found, shape wanted), and for those that are not there."""
    if wrong := sorted(mismatched):
        key, found, wanted = wrong[0]
        raise ModelError(
            f"model.name: {len(wrong)} tensors of {name!r} have other shapes than its "
            f"config.json says: {key} is {tuple(found)}, not {tuple(wanted)}"
        )
    if lacking := sorted(map(str, missing)):
        raise ModelError(
            f"model.name: the weights of {name!r} lack {len(lacking)} tensors of the model "
            f"({', '.join(lacking[:3])}, ...); it is not a whole plain checkpoint"
        )


def _are_converted(model: PreTrainedModel, headers: Headers) -> bool:
    """Whether transformers makes other tensors of those in the files, as for fused experts."""
    patterns = [
        pattern for step in get_model_conversion_mapping(model) for pattern in step.source_patterns
    ]
    return any(re.search(pattern, name) for pattern in patterns for name in headers)


def _tied_elsewhere(model: PreTrainedModel, headers: Headers) -> set[str]:
    """Tensors that the files hold under the name of the one they are tied to."""
    return {target for tied, target in model.all_tied_weights_keys.items() if tied in headers}


def read_headers(files: Iterable[Path]) -> dict[str, tuple[Path, TensorEntry]]:
    """The tensors of several files as one; one that is in two of them is a ValueError."""
    found: dict[str, tuple[Path, TensorEntry]] = {}
    for path in files:
        for name, entry in read_header(path).items():
            if name in found:
                raise ValueError(f"{name} is in both {found[name][0].name} and {path.name}")
            found[name] = (path, entry)
    return found


def named_as(headers: Headers, shapes: Mapping[str, torch.Tensor], prefix: str) -> dict[str, str]:
    """The name in the files of each tensor of the model that they hold.

    Files may leave out the `prefix` of the inner model, as OpenAI's GPT-2 on the hub does.
    """
    found = {}
    for name in shapes:
        for candidate in (name, name.removeprefix(f"{prefix}.")):
            if candidate in headers:
                found[name] = candidate
                break
    return found


def more_layers(headers: Headers, names: Mapping[str, str], ignored: Iterable[str]) -> str | None:
    """A tensor of the files that is like one of the model's, but of a layer that it has not.

    Others that the model does not need, such as the causal masks of old checkpoints, are harmless.
    """
    used = set(names.values())
    patterns = {_NUMBER.sub(".#", name) for name in used if _NUMBER.search(name)}
    for name in headers:
        if name not in used and _NUMBER.sub(".#", name) in patterns:
            if not any(re.search(pattern, name) for pattern in ignored):
                return name
    return None


_NUMBER = re.compile(r"\.\d+(?=\.)|^\d+(?=\.)")


def check_finite(headers: Headers, names: Iterable[str]) -> None:
    """ValueError for the first of these tensors with a NaN or an infinity in it.

    Read in chunks rather than mapped: what has been looked at is not kept in memory.
    """
    buffer = np.empty(CHUNK_BYTES, dtype=np.uint8)
    whole = torch.from_numpy(buffer)
    for name in names:
        path, entry = headers[name]
        if entry.dtype not in FLOATS:
            continue
        with path.open("rb", buffering=0) as file:
            file.seek(entry.start)
            left = entry.end - entry.start
            while left:
                size = min(left, CHUNK_BYTES)
                if file.readinto(buffer[:size].data) != size:
                    raise ValueError(f"{path.name}: ends inside {name}")
                numbers = whole[:size].view(FLOATS[entry.dtype])
                if not torch.stack(numbers.aminmax()).isfinite().all():
                    raise ValueError(f"{path.name}: {name} holds NaN or infinity, not weights")
                left -= size
