"""The files of a model or adapter directory that may come from a stranger, before any is opened.

Only small files are parsed and only safetensors are read as weights; all of them are regular files
of the directory itself. That keeps a directory from running code, from reaching files elsewhere and
from filling the memory. No torch, no transformers.
"""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lowvram.errors import ModelError
from lowvram.safetensors_header import INDEX_FILE, SINGLE_FILE

CONFIG_BYTES = 1 << 20
"""Of config.json and adapter_config.json; those of the hub have a few kilobytes."""
VOCABULARY_BYTES = 64 << 20
"""Of a tokenizer's files; the largest of the hub have about half of it."""
MOST_LAYERS = 1024
MOST = (1 << 31) - 1

_READ = (
    *("config.json", "generation_config.json", "adapter_config.json", "base.json"),
    *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "chat_template.json"),
    *("vocab.*", "merges.txt", "*.model", "*.jinja", "*.safetensors", INDEX_FILE),
)
"""What we and the libraries look for; text that lies beside a model is nobody's concern."""
_CONFIGS = ("config.json", "adapter_config.json", "base.json", "generation_config.json")
_ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar")
_FORMATS = {
    ".bin": "as a pickle",
    ".pt": "as a pickle",
    ".pth": "as a pickle",
    ".ckpt": "as a pickle",
    ".gguf": "in GGUF",
    ".h5": "in the format of TensorFlow",
    ".msgpack": "in the format of Flax",
}
_COUNTS = re.compile(r"(layers?|blocks|depth|experts|attention_types)$")
"""Names of what a model is built from, one after the other."""
_LAYERS = ("n_layer", "num_layers", "num_hidden_layers")


def check_directory(directory: Path, where: str = "model.name: ") -> None:
    """What may be read of it is of a usual size, a regular file, and lies in the directory."""
    home = directory.resolve()
    # The cache of the hub keeps each file once, in `blobs`, and links to it.
    homes = (home, home.parent.parent / "blobs") if home.parent.name == "snapshots" else (home,)
    for path in _readable(directory):
        try:
            real = path.resolve(strict=True)
            status = real.stat()
        except (OSError, RuntimeError) as error:  # a link to nowhere, or to itself
            raise ModelError(
                f"{where}{path} is a link that leads nowhere; put the file itself there"
            ) from error
        if not any(real.is_relative_to(place) for place in homes):
            raise ModelError(
                f"{where}{path} is a link to {real}, outside of its directory; give the "
                "directory that the files are in, or put the file itself there"
            )
        if not stat.S_ISREG(status.st_mode):
            raise ModelError(f"{where}{path} is not a regular file; put the file itself there")
        limit = _limit(path.name)
        if limit is not None and status.st_size > limit:
            raise ModelError(
                f"{where}{path} has {status.st_size:,} bytes, at most {limit:,} are read; "
                "it is not what its name says, get the directory anew from where it came"
            )


def _readable(directory: Path) -> Iterator[Path]:
    for place in (directory, directory / "additional_chat_templates"):
        for pattern in _READ:
            yield from place.glob(pattern)


def _limit(name: str) -> int | None:
    if name.endswith(".safetensors"):
        return None  # its header has one of its own
    return CONFIG_BYTES if name in _CONFIGS else VOCABULARY_BYTES


def refuse_file(path: Path) -> None:
    """A directory is asked for; says what to do with the file that was named."""
    suffix = path.suffix.lower()
    if suffix in _ARCHIVES:
        cure = "unpack it and name the directory with config.json and model.safetensors"
    elif suffix in _FORMATS:
        raise _other_format(str(path), path.name)
    elif suffix in (".safetensors", ".json"):
        cure = f"name the directory that it is in: {path.parent}"
    else:
        cure = "name a directory with config.json, model.safetensors and a tokenizer"
    raise ModelError(f"model.name: {str(path)!r} is a file, not a directory; {cure}")


def refuse_other_formats(name: str, directory: Path) -> None:
    """Weights in a format that is not opened: how to convert them."""
    for suffix in _FORMATS:
        for pattern in (f"*{suffix}", f"*{suffix}.index.json"):
            if found := sorted(path.name for path in directory.glob(pattern)):
                raise _other_format(name, found[0])


def _other_format(name: str, file: str) -> ModelError:
    suffix = next(part for part in (f".{part}" for part in file.split(".")) if part in _FORMATS)
    stored = _FORMATS[suffix]
    danger = ", which can run code when it is opened" if stored == "as a pickle" else ""
    where = "where you trust it, for example" if danger else "for example"
    return ModelError(
        f"model.name: {name!r} has its weights {stored} ({file}){danger}; convert it to "
        f"safetensors {where} with transformers' save_pretrained, and name that directory"
    )


def read_object(path: Path, limit: int = CONFIG_BYTES) -> dict[str, Any]:
    """The JSON object in a file of at most `limit` bytes; anything else is a ValueError."""
    size = path.stat().st_size
    if size > limit:
        raise ValueError(f"{path.name} has {size:,} bytes, at most {limit:,} are read")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} holds {type(found).__name__}, not an object")
    return found


def check_config(directory: Path) -> None:
    """A configuration that a model can be built from in little time and memory, and without code.

    Not whether it makes sense: that is known when the shapes are there.
    """
    config = read_object(directory / "config.json")
    for key in ("quantization_config", "compression_config"):
        if config.get(key) is not None:
            raise ValueError(
                f"config.json has a {key}: its weights are quantised already; take the model "
                "that it was made from, and set model.dtype to int8 or nf4"
            )
    if config.get("transformers_weights") is not None:
        raise ValueError(
            f"config.json names its weights (transformers_weights); they have to be {SINGLE_FILE}"
        )
    for key in ("attn_implementation", "_attn_implementation", "experts_implementation"):
        if "/" in str(config.get(key, "")):
            raise ValueError(f"config.json names code of the hub ({key}), which is not fetched")
    _check_values("config.json", config)


def _check_values(key: str, value: Any) -> None:
    """Every number below `value`; the key says what it counts."""
    if isinstance(value, dict):
        for name, inner in value.items():
            _check_values(str(name), inner)
    elif isinstance(value, list):
        for inner in value:
            _check_values(key, inner)
    elif isinstance(value, int) and not isinstance(value, bool):
        least, most = (0, MOST_LAYERS) if _COUNTS.search(key) else (-MOST, MOST)
        least = 1 if key in _LAYERS else least
        if not least <= value <= most:
            raise ValueError(f"config.json: {key} is {value}, allowed are {least:,} to {most:,}")
    elif value != value:
        raise ValueError(f"config.json: {key} is NaN, which is no setting")


def weight_files_of(directory: Path) -> list[Path]:
    """The safetensors files, sorted; those of an index may be absent. A bad index: ValueError."""
    if (directory / SINGLE_FILE).is_file():
        return [directory / SINGLE_FILE]
    if not (directory / INDEX_FILE).is_file():
        return []
    shards = read_object(directory / INDEX_FILE, VOCABULARY_BYTES).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ValueError(f"{INDEX_FILE} has no weight_map of tensors")
    for shard in set(map(str, shards.values())):
        if re.fullmatch(r"[\w-][\w.-]*\.safetensors", shard) is None:
            raise ValueError(f"{INDEX_FILE} names {shard[:80]!r}, no safetensors file beside it")
    return [directory / file for file in sorted(set(shards.values()))]
