"""The state of a run on disk: everything that is needed to go on as if it had not stopped.

A checkpoint is a directory with two safetensors files (trained weights, optimizer state), a JSON
file (the rest) and a manifest of their sizes and hashes. It is written beside its place and
renamed, so that it is there whole or not at all. Nothing in it is a pickle.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from lowvram.disk import check_manifest, disk_error, new_directory, remove, remove_partials
from lowvram.errors import CheckpointError
from lowvram.memory.measure import is_device_failure, is_out_of_memory
from lowvram.random_state import RandomState
from lowvram.tensorwise import load_state
from lowvram.train import TrainState
from lowvram.weights import write_file

FORMAT = 2
WEIGHTS_FILE = "trained.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
_NAME = re.compile(r"step-\d{8}")
_COUNTERS = ("step", "optimizer_steps", "tokens", "nonfinite_in_a_row")

_DAMAGED = (
    *(FileNotFoundError, NotADirectoryError, IsADirectoryError, SafetensorError),
    *(ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RuntimeError),
)
"""What reading raises where files lack, or hold something else than was written."""

Fingerprint = Mapping[str, Any]
"""What a run depends on, such as its data and the keys of its recipe; JSON values."""


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A checkpoint that was gone on from."""

    path: Path
    run: dict[str, Any]
    """What `save_checkpoint` was given."""
    skipped: list[str] = field(default_factory=list)
    """Newer checkpoints that are damaged, and how."""
    differences: list[str] = field(default_factory=list)
    """Between what it depends on and what there is now."""


def checkpoint_path(directory: Path, step: int) -> Path:
    return directory / f"step-{step:08d}"


def save_checkpoint(
    state: TrainState,
    directory: Path,
    *,
    fingerprint: Fingerprint,
    keep_last: int,
    keep: int | None = None,
    run: Mapping[str, Any] | None = None,
) -> Path:
    """Write `directory`/step-N; remove all but step `keep` and the newest `keep_last` up to N.

    What is there of later steps is damaged, or it would have been gone on from, and what a
    crash has left half-written is of no use: both go too.
    `fingerprint` is compared when it is loaded; `run` are JSON values that come back then.
    """
    final = checkpoint_path(directory, state.step)
    with new_directory(final, replace=True, manifest=True) as partial:
        partial.mkdir()
        _write(state, partial, {"fingerprint": dict(fingerprint), "run": dict(run or {})})
    remove_partials(directory, _NAME.pattern)
    kept = [path for path in list_checkpoints(directory) if path <= final][-keep_last:]
    if keep is not None:
        kept.append(checkpoint_path(directory, keep))
    for path in list_checkpoints(directory):
        if path not in kept:
            with suppress(OSError):
                remove(path)
    return final


def _write(state: TrainState, directory: Path, facts: dict[str, Any]) -> None:
    """Tensors leave the device one at a time: host memory holds one."""
    trained = dict(_trainable(state))
    write_file(directory / WEIGHTS_FILE, trained, trained.items())
    tensors: dict[str, torch.Tensor] = {}
    structure = _pack(state.optimizer.state_dict(), tensors)
    write_file(directory / OPTIMIZER_FILE, tensors, tensors.items())
    facts = facts | {
        "format": FORMAT,
        **{counter: getattr(state, counter) for counter in _COUNTERS},
        "scaler": state.scaler.state_dict() if state.scaler else None,
        "random": RandomState.now(state.device).to_json(),
        "optimizer": structure,
    }
    (directory / STATE_FILE).write_text(json.dumps(facts), encoding="utf-8")


def list_checkpoints(directory: Path) -> list[Path]:
    """Oldest first."""
    if not directory.is_dir():
        return []
    return sorted(path for path in directory.iterdir() if _NAME.fullmatch(path.name))


def newest_facts(directory: Path) -> dict[str, Any] | None:
    """What the newest checkpoint says; None if there is none. Its tensors are not looked at."""
    for path in reversed(list_checkpoints(directory)):
        with suppress(OSError, ValueError, RecursionError):
            return _read_facts(path, (STATE_FILE,))
    return None


def load_newest(
    state: TrainState, directory: Path, *, fingerprint: Fingerprint, anyway: bool = False
) -> Loaded | None:
    """Restore the newest checkpoint that is whole; None if there has never been one.

    Damaged ones are skipped. Raises CheckpointError if all are, and, but for `anyway`, if what
    the run depends on has changed.
    """
    skipped: list[str] = []
    found = list_checkpoints(directory)
    for path in reversed(found):
        try:
            facts = _read_facts(path)
            differences = _differences(facts["fingerprint"], fingerprint)
            if differences and not anyway:
                raise _another_run(path, differences)
            _restore(state, path, facts)
        except _DAMAGED as error:
            if is_out_of_memory(error) or is_device_failure(error):
                raise  # that is no fault of the checkpoint
            reason = f"{type(error).__name__} {error}" if isinstance(error, KeyError) else error
            skipped.append(f"skipped {path.name}, which is damaged: {reason}")
            continue
        except OSError as error:
            raise disk_error(str(path), error, failed="read") from error
        return Loaded(path=path, run=facts["run"], skipped=skipped, differences=differences)
    if not found:
        return None
    raise CheckpointError(
        f"{directory}: has no checkpoint to go on from ({'; '.join(skipped)}); start anew with "
        "--overwrite"
    )


def load_weights(state: TrainState, path: Path) -> None:
    """The trained weights of one checkpoint, and nothing else of it."""
    try:
        _read_facts(path)
        _restore_weights(state, path)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error


def _read_facts(
    path: Path, names: Sequence[str] = (STATE_FILE, WEIGHTS_FILE, OPTIMIZER_FILE)
) -> dict[str, Any]:
    check_manifest(path, names)
    facts = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        found = facts.get("format") if isinstance(facts, dict) else None
        raise ValueError(f"format {found}, this version reads {FORMAT}")
    if not all(type(facts.get(key)) is int and facts[key] >= 0 for key in _COUNTERS):
        raise ValueError(f"{STATE_FILE} counts no steps")
    if checkpoint_path(path.parent, facts["step"]) != path:
        raise ValueError(f"{STATE_FILE} is of step {facts['step']}")
    if not isinstance(facts.get("fingerprint"), dict) or not isinstance(facts.get("run"), dict):
        raise ValueError(f"{STATE_FILE} does not say which run it is of")
    return facts


def _differences(found: Fingerprint, wanted: Fingerprint) -> list[str]:
    return [
        f"{key}: was {_shown(found.get(key))}, is {_shown(wanted.get(key))}"
        for key in sorted({*found, *wanted})
        if found.get(key) != wanted.get(key)
    ]


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def _another_run(path: Path, differences: list[str]) -> CheckpointError:
    return CheckpointError(
        f"{path}: belongs to another run ({'; '.join(differences)}). Go on with the recipe and "
        "data of that run, or go on all the same with --resume-anyway, or start anew with "
        "--overwrite or another output_dir"
    )


def _restore(state: TrainState, path: Path, facts: dict[str, Any]) -> None:
    _restore_weights(state, path)
    tensors = load_file(path / OPTIMIZER_FILE)
    load_state(state.optimizer, _unpack(facts["optimizer"], tensors))
    for counter in _COUNTERS:
        setattr(state, counter, facts[counter])
    state.stepping = False
    if state.fused is not None:
        state.fused.begin()
    if state.scaler is not None and facts["scaler"] is not None:
        state.scaler.load_state_dict(facts["scaler"])
    RandomState.from_json(facts["random"]).restore()


def _restore_weights(state: TrainState, path: Path) -> None:
    own = dict(_trainable(state))
    saved = load_file(path / WEIGHTS_FILE)
    shapes = {name: tensor.shape for name, tensor in saved.items()}
    if {name: parameter.shape for name, parameter in own.items()} != shapes:
        raise CheckpointError(f"{path}: trains other parameters than this recipe")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(saved[name])


def _trainable(state: TrainState) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, p) for name, p in state.model.named_parameters() if p.requires_grad]


def _pack(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """JSON for a nest of dicts, lists and scalars; tensors go into `tensors` by number.

    Dicts become lists of pairs, since the optimizers' have integer keys.
    """
    if isinstance(value, torch.Tensor):
        key = str(len(tensors))
        tensors[key] = value
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
