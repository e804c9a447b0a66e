"""Merge an adapter into a plain checkpoint, and prove it before the checkpoint is there.

The base is read anew in fp32, whatever it was while training: a delta added in 16 bits loses
small updates, and one added to a quantised base would be rounded with it.

Memory holds one set of weights at most. A file in fp32 is mapped, not loaded, and each layer is
merged when its turn comes to be written; the base is given up before the result is read back.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowvram.adapters import (
    is_adapter,
    load_adapter,
    merged_tensors,
    merging_in_turn,
    recorded_base,
)
from lowvram.disk import existing, new_directory, remove_partials_of, room_for
from lowvram.errors import CheckpointError, ModelError, ProofError
from lowvram.memory.measure import format_gib
from lowvram.model import (
    context_length,
    layout_of,
    load_model,
    load_tokenizer,
    locate,
    save_plain,
    weight_files,
    weights_sha256,
)
from lowvram.weights import Layout, size_bytes

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
    """Of the merged weights in fp32: those of the file, or those that were rounded for it."""
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
    remove_partials_of(output)
    name, revision = check_base(adapter, base)
    tokenizer = load_tokenizer(name, revision)
    model = load_model(name, revision=revision, dtype="fp32")
    limit = context_length(model.config)
    text = tokenizer(PROOF_TEXT, verbose=False)["input_ids"]
    rows = [row[:limit] for row in proof_tokens or [text]]
    layout = layout_of(model, dtype)
    live = load_adapter(model, adapter)
    exam = _Exam(output=output, rows=rows, expected=logits_of(live, rows))
    difference = 0.0
    if dtype != "fp32":  # the file adds its rounding, so what merging adds is told apart
        with merging_in_turn(live):
            difference = exam.difference(live)
        exam.check(difference, "merged logits differ from base and adapter")
    _require_room(output, layout)
    with new_directory(output) as directory:
        tensors = merged_tensors(live, layout)
        save_plain(model, tokenizer, directory, layout=layout, tensors=tensors)
        del model, live, tensors
        gc.collect()  # the base and its adapter refer to each other
        return _prove(exam, directory, layout, dtype, difference)


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
    """Save a plain `model` in `dtype` at `output`, if what is read back gives logits `expected`."""
    layout = layout_of(model, dtype)
    exam = _Exam(output=output, rows=rows, expected=expected)
    difference = exam.difference(model)
    exam.check(difference, "logits of the weights differ from what was expected")
    _require_room(output, layout)
    with new_directory(output) as directory:
        save_plain(model, tokenizer, directory, layout=layout)
        return _prove(exam, directory, layout, dtype, difference)


@dataclass(frozen=True, kw_only=True)
class _Exam:
    """Rows of tokens, and what a model has to answer: logits (s, v) of each."""

    output: Path
    rows: Sequence[Sequence[int]]
    expected: list[torch.Tensor]

    @property
    def tolerance(self) -> float:
        return TOLERANCE * max(1.0, max(logits.abs().max().item() for logits in self.expected))

    def difference(self, model: torch.nn.Module) -> float:
        return _difference(self.expected, logits_of(model, self.rows))

    def check(self, difference: float, what: str) -> None:
        if not difference <= self.tolerance:
            raise ProofError(
                f"{self.output}: not written, since {what} by {difference:.3g}, "
                f"allowed {self.tolerance:.3g}"
            )


def _prove(
    exam: _Exam, directory: Path, layout: Layout, dtype: str, difference: float
) -> MergeProof:
    """Of what is read back; `difference` is that of the weights before the file."""
    _check_files(directory, layout)
    final = exam.difference(load_model(str(directory), dtype="fp32"))
    if dtype == "fp32":
        difference = max(difference, final)
        exam.check(final, "logits of what was read back differ from base and adapter")
    return MergeProof(
        max_logit_difference=difference,
        read_back_difference=final,
        tolerance=exam.tolerance,
        tokens=sum(len(row) for row in exam.rows),
        dtype=dtype,
    )


def _difference(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    """Largest absolute difference; NaN anywhere gives NaN, which passes no comparison."""
    # Not Python's max, which loses a NaN that does not come first.
    return torch.stack([(a - b).abs().max() for a, b in zip(one, other, strict=True)]).max().item()


def _check_files(directory: Path, layout: Layout) -> None:
    """By the reader that others use, the files hold the tensors of `layout` and no other."""
    missing = dict(layout)
    for path in weight_files(str(directory)):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a dict
                wanted = missing.pop(key, None)
                found = file.get_tensor(key)  # mapped, not read
                if wanted is None or (found.shape, found.dtype) != (wanted.shape, wanted.dtype):
                    raise ProofError(f"{path.name}: {key} is not a tensor of the merged model")
    if missing:
        raise ProofError(f"{directory.name}: lacks {', '.join(sorted(missing)[:3])}")


def _require_room(output: Path, layout: Layout) -> None:
    needed = size_bytes(layout)
    enough, free = room_for(output.parent, needed)
    if not enough:
        raise CheckpointError(
            f"{output}: needs {format_gib(needed)} of disk, {existing(output.parent)} has "
            f"{format_gib(free)} free"
        )
