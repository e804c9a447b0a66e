"""Merge an adapter into a plain checkpoint, and prove it before the checkpoint is there.

The base is read anew in fp32, whatever it was while training: a delta added in 16 bits loses
small updates, and one added to a quantised base would be rounded with it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowvram.adapters import is_adapter, load_adapter, merge_adapter, recorded_base
from lowvram.errors import CheckpointError, ModelError, ProofError
from lowvram.memory.measure import format_gib
from lowvram.model import (
    TORCH_DTYPES,
    cast_weights,
    context_length,
    load_model,
    load_tokenizer,
    locate,
    save_plain,
    weight_files,
    weights_sha256,
)

# fp32 logits of the two orders of computation, relative to the largest logit.
TOLERANCE = 1e-4

PROOF_TEXT = (
    "The shortest way to see whether two models are the same is to ask both of them what comes "
    "next, word after word, and to compare the answers down to the last digit."
)


@dataclass(frozen=True, kw_only=True)
class MergeProof:
    """How far the merged model's logits are from those of base and adapter, both in fp32."""

    max_logit_difference: float
    """Of the merged weights, in memory and, where the file has fp32, as read back from it."""
    read_back_difference: float
    """Of the file as read back; in 16 bits its rounding is in it."""
    tolerance: float
    tokens: int
    dtype: str


def merge(
    adapter: Path,
    output: Path,
    *,
    base: str | None = None,
    dtype: str = "fp32",
    proof_tokens: Sequence[Sequence[int]] | None = None,
) -> MergeProof:
    """Write base + `adapter` as a plain checkpoint at `output`.

    `base` overrides where the base is read from; its weights must be those the adapter was
    trained on. `proof_tokens` are rows of held-out tokens to compare on. Nothing is left at
    `output` when the proof fails.
    """
    if output.exists():
        raise CheckpointError(f"{output}: is there already; name a new directory")
    above = next(path for path in output.absolute().parents if path.exists())
    if not above.is_dir():
        raise CheckpointError(f"{output}: cannot be written: {above} is no directory")
    name, revision = check_base(adapter, base)
    tokenizer = load_tokenizer(name, revision)
    model = load_model(name, revision=revision, dtype="fp32")
    limit = context_length(model.config)
    text = tokenizer(PROOF_TEXT, verbose=False)["input_ids"]
    rows = [row[:limit] for row in proof_tokens or [text]]
    live = load_adapter(model, adapter)
    expected = logits_of(live, rows)
    merged = merge_adapter(live)
    return write_proven(merged, tokenizer, output, expected=expected, rows=rows, dtype=dtype)


def find_adapter(path: Path) -> Path:
    """An adapter directory, or the one in the directory of a run."""
    for directory in (path, path / "adapter"):
        if is_adapter(directory):
            return directory
    raise ModelError(f"{path}: is neither an adapter (adapter_config.json) nor a run with one")


def check_base(adapter: Path, base: str | None = None) -> tuple[str, str | None]:
    """Name and revision of the adapter's base, whose weights must be those it was trained on."""
    name, revision, sha256 = recorded_base(adapter)
    if base is not None:
        name, revision = base, None
    if name is None:
        raise ModelError(f"{adapter}: does not say what its base is; name it with --base")
    try:
        locate(name, revision)
    except ModelError as error:
        raise ModelError(
            f"{adapter}: cannot find its base; if it is elsewhere now, name it with --base. {error}"
        ) from error
    if sha256 is not None and (found := weights_sha256(name, revision)) != sha256:
        raise ModelError(
            f"{adapter}: was trained on a base with weights {sha256[:12]}..., those of {name!r} "
            f"are {found[:12]}...; on another base it is another model. Name the right one with "
            "--base"
        )
    return name, revision


@torch.no_grad()
def logits_of(model: torch.nn.Module, rows: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Logits (s, v) of each row of tokens, in fp32 on the CPU."""
    model.eval()
    device = next(model.parameters()).device
    return [
        model(input_ids=torch.tensor([list(row)], device=device), use_cache=False)
        .logits[0]
        .float()
        .cpu()
        for row in rows
    ]


def write_proven(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    *,
    expected: list[torch.Tensor],
    rows: Sequence[Sequence[int]],
    dtype: str,
) -> MergeProof:
    """Save a plain fp32 `model` in `dtype` at `output`, once its logits equal `expected`."""
    scale = max(1.0, max(logits.abs().max().item() for logits in expected))
    difference = _difference(expected, logits_of(model, rows))
    if not difference <= TOLERANCE * scale:
        raise ProofError(
            f"{output}: not written, since merged logits differ from base and adapter by "
            f"{difference:.3g}, allowed {TOLERANCE * scale:.3g}"
        )
    _check_space(model, output, dtype)
    partial = output.parent / f".partial-{output.name}-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        cast_weights(model, dtype)
        save_plain(model, tokenizer, partial)
        _check_file(model, partial)
        read_back = load_model(str(partial), dtype="fp32")
        final = _difference(expected, logits_of(read_back, rows))
        if dtype == "fp32" and not final <= TOLERANCE * scale:
            raise ProofError(
                f"{output}: not written, since what was read back differs by {final:.3g}, "
                f"allowed {TOLERANCE * scale:.3g}"
            )
        os.replace(partial, output)
    except OSError as error:
        raise CheckpointError(f"{output}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return MergeProof(
        max_logit_difference=max(difference, final) if dtype == "fp32" else difference,
        read_back_difference=final,
        tolerance=TOLERANCE * scale,
        tokens=sum(len(row) for row in rows),
        dtype=dtype,
    )


def _difference(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    """Largest absolute difference; NaN anywhere gives NaN, which passes no comparison."""
    # Not Python's max, which loses a NaN that does not come first.
    return torch.stack([(a - b).abs().max() for a, b in zip(one, other, strict=True)]).max().item()


def _check_file(model: PreTrainedModel, directory: Path) -> None:
    """The file holds the model's own tensors, bit for bit, and no other."""
    expected = dict(model.state_dict())
    for path in weight_files(str(directory)):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a dict
                tensor = expected.pop(key, None)
                if tensor is None or not torch.equal(tensor, file.get_tensor(key)):
                    raise ProofError(f"{path.name}: {key} is not a tensor of the merged model")
    tied = set(model.all_tied_weights_keys)
    missing = sorted(key for key in expected if key not in tied)
    if missing:
        raise ProofError(f"{directory.name}: lacks {', '.join(missing[:3])}")


def _check_space(model: PreTrainedModel, output: Path, dtype: str) -> None:
    size = TORCH_DTYPES[dtype].itemsize
    needed = sum(parameter.numel() * size for parameter in model.parameters())
    existing = next(path for path in output.absolute().parents if path.is_dir())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise CheckpointError(
            f"{output}: needs {format_gib(needed)} of disk, {existing} has {format_gib(free)} free"
        )
