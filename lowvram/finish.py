"""After the last step: the models are written and proven, then measured as others load them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from itertools import islice
from typing import TypeVar

import torch

from lowvram.adapters import plain_model, save_adapter
from lowvram.checkpoint import checkpoint_path, load_weights
from lowvram.directory import RunDirectory
from lowvram.disk import new_directory, remove, writing
from lowvram.display import Display
from lowvram.errors import CheckpointError
from lowvram.job import Job
from lowvram.memory.measure import is_out_of_memory, read_memory, release_memory
from lowvram.merge import MergeProof, logits_of, merge, write_proven
from lowvram.model import load_model
from lowvram.perplexity import PerplexityResult
from lowvram.recipe import recipe_sha256
from lowvram.report import RunResult

_PROOF_ROWS = 4
_PROOF_TOKENS = 64
_FP32_ROOM = 5
"""Bytes a parameter: four, and some for the evaluation."""
Found = TypeVar("Found")


def finish(job: Job, display: Display, *, started: float) -> RunResult:
    """The training state is given up on the way."""
    recipe, planned, state = job.plan.recipe, job.plan, job.state
    measured = read_memory(job.device).peak_bytes
    adapted = _best_perplexity(job, display)
    proof = _write_models(job, display)
    steps, optimizer_steps, tokens = state.step, state.optimizer_steps, state.tokens
    trainable = sum(parameter.numel() for parameter in state.trainable())
    del job.state, state  # the card needs the room for the merged model
    release_memory(job.device)

    def examine(device: str) -> tuple[PerplexityResult | None, list[str]]:
        model = load_model(
            str(job.directory.merged),
            dtype="fp32",
            attention=recipe.model.attention,
            device=device,
        )
        return job.perplexity(model, "merged perplexity", display), job.samples(model)

    merged, tuned = _where_it_fits(examine, job, display)
    base = job.start["perplexity"]
    return RunResult(
        output_dir=str(job.directory.path),
        perplexity={
            "base": None if base is None else base["perplexity"],
            "adapter": None if adapted is None else adapted.to_json()["perplexity"],
            "merged": None if merged is None else merged.to_json()["perplexity"],
        },
        evaluation={}
        if merged is None
        else {
            **merged.to_json(),
            "documents": merged.documents,
            "precision": planned.numerics.precision,
        },
        merge=asdict(proof),
        tokens_per_second=_tokens_per_second(job.directory),
        memory={
            "predicted_peak_bytes": planned.fit.predicted_reserved_bytes,
            "measured_peak_bytes": measured,
        },
        data=planned.counts(),
        steps=steps,
        optimizer_steps=optimizer_steps,
        tokens=tokens,
        trainable_parameters=trainable,
        fit=asdict(planned.fit),
        numerics={
            "device": str(planned.numerics.device),
            "precision": planned.numerics.precision,
            "base_dtype": planned.numerics.base_dtype,
        },
        samples=[
            {**sample, "tuned": text}
            for sample, text in zip(job.start["samples"], tuned, strict=True)
        ],
        recipe_sha256=recipe_sha256(recipe),
        seconds=time.monotonic() - started,
        events=job.directory.read_events(),
        notes=list(planned.notes),
    )


def _best_perplexity(job: Job, display: Display) -> PerplexityResult | None:
    """Of what was trained; with train.keep_best, of the best there was, which then is put out."""
    found = job.perplexity(job.state.model, "adapter perplexity", display)
    best = job.best if job.settings.keep_best else None
    if found is None or best is None or best["perplexity"] >= found.perplexity:
        return found
    path = checkpoint_path(job.directory.checkpoints, best["step"])
    try:
        load_weights(job.state, path)
    except CheckpointError as error:
        display.warn(f"train.keep_best: the weights of the last step are put out, since {error}")
        return found
    display.say(f"putting out the weights of step {best['step']}, which had the best perplexity")
    return job.perplexity(job.state.model, "best perplexity", display)


def _where_it_fits(examine: Callable[[str], Found], job: Job, display: Display) -> Found:
    """On the card if it has the room, else on the CPU.

    The merged model in fp32 may be larger than the base in training was.
    """
    if job.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(job.device)
        if _FP32_ROOM * job.plan.parameters.total <= free:
            try:
                return examine(str(job.device))
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            release_memory(job.device)
        display.warn("the merged model in fp32 is too large for the card: it is on the CPU")
        return examine("cpu")
    return examine(str(job.device))


def _write_models(job: Job, display: Display) -> MergeProof:
    """adapter/ and merged/, the latter only if it equals what was trained."""
    recipe, state, directory = job.plan.recipe, job.state, job.directory
    limit = min(_PROOF_TOKENS, job.plan.context_length)
    rows = [
        tokens[:limit].tolist() for tokens, _, _ in islice(job.plan.held_out(), _PROOF_ROWS)
    ] or [next(job.plan.windows())[0].input_ids[0, :limit].tolist()]
    with writing(directory.merged):
        remove(directory.merged)
    if recipe.method.name == "full":
        model = plain_model(state.model)
        if model.dtype != torch.float32:
            # The proof is in fp32, where weights of 16 bits are the same numbers; a card that
            # trained them has no room for that.
            torch.nn.Module.to(model, "cpu", torch.float32)
        proof = write_proven(
            model,
            job.plan.tokenizer,
            directory.merged,
            expected=logits_of(model, rows),
            rows=rows,
            dtype=recipe.output_dtype,
        )
    else:
        with new_directory(directory.adapter, replace=True) as partial:
            save_adapter(state.model, partial, job.base)
        proof = merge(
            directory.adapter, directory.merged, dtype=recipe.output_dtype, proof_tokens=rows
        )
    display.say(f"merged: largest logit difference {proof.max_logit_difference:.2g}")
    return proof


def _tokens_per_second(directory: RunDirectory) -> float | None:
    """Over all steps, those before a resume included."""
    metrics = directory.read_metrics()
    seconds = sum(step["seconds"] for step in metrics)
    return sum(step["tokens"] for step in metrics) / seconds if seconds else None
