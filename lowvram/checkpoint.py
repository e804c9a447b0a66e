"""The state of a run on disk: everything that is needed to go on as if it had not stopped.

A checkpoint is a directory with two safetensors files (trained weights, optimizer state), a
JSON file (the rest) and another one with the hashes of those three. It is written beside its
place and renamed, so that it is there whole or not at all. Nothing in it is a pickle.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lowvram.errors import CheckpointError
from lowvram.tensorwise import load_state
from lowvram.train import TrainState

FORMAT = 1
WEIGHTS_FILE = "trained.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
HASHES_FILE = "sha256.json"
_HASHED = (WEIGHTS_FILE, OPTIMIZER_FILE, STATE_FILE)
_PREFIX = "step-"
_PARTIAL = ".partial-"


def save_checkpoint(
    state: TrainState, directory: Path, *, fingerprint: dict[str, str], keep_last: int
) -> Path:
    """Write `directory`/step-N, and remove all but the newest `keep_last` up to it.

    What is there of later steps is damaged, or it would have been gone on from, and what a
    crash has left half-written is of no use: both go too.
    `fingerprint` says what the run depends on, such as its data; loading compares it.
    """
    final = directory / f"{_PREFIX}{state.step:08d}"
    partial = directory / f"{_PARTIAL}{final.name}-{os.getpid()}"
    try:
        partial.mkdir(parents=True, exist_ok=True)
        _write(state, partial, fingerprint)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        _sync(directory)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"{final}: cannot be written: {error}") from error
    kept = [path for path in list_checkpoints(directory) if path <= final][-keep_last:]
    for path in (*list_checkpoints(directory), *directory.glob(f"{_PARTIAL}*")):
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)
    return final


def _write(state: TrainState, directory: Path, fingerprint: dict[str, str]) -> None:
    tensors: dict[str, torch.Tensor] = {}
    structure = _pack(state.optimizer.state_dict(), tensors)
    save_file(_trained(state), directory / WEIGHTS_FILE)
    save_file(tensors, directory / OPTIMIZER_FILE)
    facts = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "step": state.step,
        "optimizer_steps": state.optimizer_steps,
        "tokens": state.tokens,
        "nonfinite_in_a_row": state.nonfinite_in_a_row,
        "scaler": state.scaler.state_dict() if state.scaler else None,
        "random": _random_state(),
        "optimizer": structure,
    }
    (directory / STATE_FILE).write_text(json.dumps(facts), encoding="utf-8")
    hashes = {name: _sha256(directory / name) for name in _HASHED}
    (directory / HASHES_FILE).write_text(json.dumps(hashes), encoding="utf-8")
    for path in directory.iterdir():
        _sync(path)


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open a directory
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def list_checkpoints(directory: Path) -> list[Path]:
    """Oldest first."""
    if not directory.is_dir():
        return []
    return sorted(path for path in directory.iterdir() if path.name.startswith(_PREFIX))


def load_newest(
    state: TrainState, directory: Path, *, fingerprint: dict[str, str]
) -> tuple[Path, list[str]]:
    """Restore the newest checkpoint that is whole; also what was skipped on the way, and why."""
    notes: list[str] = []
    for path in reversed(list_checkpoints(directory)):
        try:
            facts = _read_facts(path)
        except (OSError, ValueError) as error:
            notes.append(f"skipped {path.name}, which is damaged: {error}")
            continue
        _check_fingerprint(path, facts["fingerprint"], fingerprint)
        _restore(state, path, facts)
        return path, notes
    reason = f" ({'; '.join(notes)})" if notes else ""
    raise CheckpointError(
        f"{directory}: has no checkpoint to go on from{reason}; start anew with --overwrite"
    )


def _read_facts(path: Path) -> dict[str, Any]:
    hashes = json.loads((path / HASHES_FILE).read_text(encoding="utf-8"))
    for name in _HASHED:
        if not isinstance(hashes, dict) or hashes.get(name) != _sha256(path / name):
            raise ValueError(f"{name} is not what was written")
    facts: dict[str, Any] = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
    if facts["format"] != FORMAT:
        raise ValueError(f"format {facts['format']}, this version reads {FORMAT}")
    return facts


def _check_fingerprint(path: Path, found: dict[str, str], wanted: dict[str, str]) -> None:
    changed = sorted(key for key in wanted if found.get(key) != wanted[key])
    if changed:
        differences = "; ".join(f"{key}: was {found.get(key)}, is {wanted[key]}" for key in changed)
        raise CheckpointError(
            f"{path}: belongs to another run ({differences}). Go on with the recipe and data of "
            "that run, or start anew with --overwrite or another output_dir"
        )


def _restore(state: TrainState, path: Path, facts: dict[str, Any]) -> None:
    own = dict(_trainable(state))
    saved = load_file(path / WEIGHTS_FILE)
    if set(own) != set(saved):
        raise CheckpointError(f"{path}: trains other parameters than this recipe")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(saved[name])
    tensors = load_file(path / OPTIMIZER_FILE)
    load_state(state.optimizer, _unpack(facts["optimizer"], tensors))
    state.step = facts["step"]
    state.optimizer_steps = facts["optimizer_steps"]
    state.tokens = facts["tokens"]
    state.nonfinite_in_a_row = facts["nonfinite_in_a_row"]
    if state.scaler is not None and facts["scaler"] is not None:
        state.scaler.load_state_dict(facts["scaler"])
    _set_random_state(facts["random"])


def _trainable(state: TrainState) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, p) for name, p in state.model.named_parameters() if p.requires_grad]


def _trained(state: TrainState) -> dict[str, torch.Tensor]:
    return {name: p.detach().cpu().contiguous() for name, p in _trainable(state)}


def _pack(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """JSON for a nest of dicts, lists and scalars; tensors go into `tensors` by number.

    Dicts become lists of pairs, since the optimizers' have integer keys.
    """
    if isinstance(value, torch.Tensor):
        key = str(len(tensors))
        tensors[key] = value.detach().cpu().clone().contiguous()
        return {"tensor": key}
    if isinstance(value, dict):
        return {"dict": [[_pack(k, tensors), _pack(v, tensors)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_pack(item, tensors) for item in value]}
    return {"value": value}


def _unpack(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {_unpack(k, tensors): _unpack(v, tensors) for k, v in content}
    if kind in ("list", "tuple"):
        items = [_unpack(item, tensors) for item in content]
        return items if kind == "list" else tuple(items)
    return content


def _random_state() -> dict[str, Any]:
    version, internal, gauss = random.getstate()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "python": [version, list(internal), gauss],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "cuda": [state.numpy().tobytes().hex() for state in cuda],
    }


def _set_random_state(saved: dict[str, Any]) -> None:
    version, internal, gauss = saved["python"]
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(_bytes_tensor(saved["torch"]))
    if torch.cuda.is_available() and len(saved["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([_bytes_tensor(state) for state in saved["cuda"]])


def _bytes_tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
