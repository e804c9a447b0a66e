"""The story of a run: plan, train, save, merge, prove, evaluate, generate, report."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
from rich.table import Table
from torch import nn

from lowvram.adapters import Base, plain_model, save_adapter
from lowvram.build import base_of, build
from lowvram.checkpoint import load_newest, save_checkpoint
from lowvram.directory import RunDirectory, write_json, write_text
from lowvram.display import Display, format_seconds, literal
from lowvram.errors import DoesNotFit, Interrupted, ModelError, TrainingError
from lowvram.generate import Sampling, generate
from lowvram.memory.measure import format_gib, is_out_of_memory, read_memory, reset_peak
from lowvram.merge import MergeProof, logits_of, merge, write_proven
from lowvram.model import load_model
from lowvram.perplexity import PerplexityResult, score
from lowvram.plan import Plan, plan
from lowvram.recipe import Recipe, TrainSection, dump_recipe, recipe_sha256
from lowvram.rehearsal import rehearsal_of
from lowvram.report import RunResult, result_table
from lowvram.train import StepMetrics, TrainState, train

_PROOF_ROWS = 4
_PROOF_TOKENS = 64
_PROMPT_TOKENS = 8
_FP32_ROOM = 5
"""Bytes a parameter: four, and some for the evaluation."""


def run(
    recipe: Recipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    display: Display | None = None,
) -> RunResult:
    """Fine-tune as `recipe` says; everything it makes is in `recipe.output_dir`.

    Ctrl-C (or SIGTERM) saves after the step under way and raises Interrupted; `resume` goes on
    from the newest checkpoint.
    """
    display = display or Display()
    started = time.monotonic()
    directory = RunDirectory(recipe.output_dir)
    inputs = (recipe.model.name, recipe.data.source, recipe.data.validation_source)
    directory.check(resume=resume, overwrite=overwrite, inputs=_names(*inputs))
    with display.progress("tokenising") as update:
        planned = plan(recipe, lambda done, total: update(done, total, "bytes"))
    announce(planned, display)
    job = _start(planned, directory, display, resume=resume)
    _train(job, display)
    result = _finish(job, display, started=started)
    write_json(directory.result, result.to_json())
    display.show(result_table(result))
    return result


def _names(*values: str | tuple[str, ...] | None) -> list[str]:
    """All names in them, one or several each."""
    return [
        name for value in values for name in ((value,) if isinstance(value, str) else value or ())
    ]


def announce(planned: Plan, display: Display) -> None:
    if not display.quiet:
        table = Table.grid(padding=(0, 2))
        table.add_column(justify="right", style="bold")
        for name, value in planned.describe():
            table.add_row(name, literal(value))
        display.show(table)
    for note in planned.notes:
        display.warn(note)


@dataclass(kw_only=True)
class Job:
    """A run under way."""

    plan: Plan
    directory: RunDirectory
    state: TrainState
    base: Base
    fingerprint: dict[str, str]
    start: dict[str, Any]
    """What was found before the first step: perplexity and samples of the base."""

    saved_step: int = 0

    @property
    def device(self) -> torch.device:
        return self.plan.numerics.device

    @property
    def settings(self) -> TrainSection:
        return self.plan.recipe.train

    def save(self) -> None:
        """A checkpoint of the state as it is, unless there is one."""
        if self.state.step == self.saved_step:
            return
        save_checkpoint(
            self.state,
            self.directory.checkpoints,
            fingerprint=self.fingerprint,
            keep_last=self.settings.keep_last,
        )
        self.saved_step = self.state.step


def _start(planned: Plan, directory: RunDirectory, display: Display, *, resume: bool) -> Job:
    """Build the state; begin with the base's own figures, or go on from a checkpoint."""
    recipe = planned.recipe
    base = base_of(recipe)
    state = build(recipe, total_steps=planned.total_steps, numerics=planned.numerics)
    if not resume:
        directory.make_empty()  # now: what cannot be planned or built leaves the old run alone
    if recipe.train.chunked_loss and not state.chunked_loss:
        display.warn("train.chunked_loss: this model changes its logits; using its own loss")
    job = Job(
        plan=planned,
        directory=directory,
        state=state,
        base=base,
        fingerprint=planned.fingerprint(base.sha256),
        start={},
    )
    if resume:
        job.start = _resume(job, display)
    else:
        _begin(job, display)
    reset_peak(job.device)
    return job


def _begin(job: Job, display: Display) -> None:
    perplexity = _perplexity(job.plan, job.state.model, "base perplexity", display)
    if perplexity is not None:
        display.say(f"base: perplexity {perplexity.perplexity:.3f}")
    job.start = {
        "perplexity": None if perplexity is None else perplexity.to_json(),
        "samples": [
            {"prompt": prompt, "base": text}
            for prompt, text in zip(
                _prompts(job.plan), _samples(job.plan, job.state.model), strict=True
            )
        ],
    }
    write_text(job.directory.recipe, dump_recipe(job.plan.recipe))
    write_json(job.directory.start, job.start)


def _resume(job: Job, display: Display) -> dict[str, Any]:
    import json

    path, notes = load_newest(job.state, job.directory.checkpoints, fingerprint=job.fingerprint)
    for note in notes:
        display.warn(note)
    job.saved_step = job.state.step
    job.directory.keep_metrics(job.state.step)
    write_text(job.directory.recipe, dump_recipe(job.plan.recipe))
    display.say(f"going on from {path}, step {job.state.step}")
    start: dict[str, Any] = json.loads(job.directory.start.read_text(encoding="utf-8"))
    return start


def _train(job: Job, display: Display) -> None:
    total = job.plan.total_steps
    with display.progress("training", every_seconds=0.0) as update, _interrupts() as interrupted:
        try:
            if job.device.type == "cuda":
                rehearsal_of(job.state, job.plan.recipe, job.plan.numerics).warm_up()
            for metrics in train(job.state, job.plan.windows(job.state.step)):
                if metrics.step in (1, total) or _due(metrics.step, job.settings.log_every):
                    update(metrics.step, total, _step_line(metrics, job, total))
                if metrics.skipped:
                    display.warn(f"step {metrics.step} skipped: {metrics.skipped}")
                _keep(job, metrics, display)
                if interrupted():
                    raise Interrupted(
                        f"stopped after step {metrics.step} of {total}, state saved in "
                        f"{job.directory.checkpoints}; the same command with --resume goes on"
                    )
        except (Interrupted, TrainingError):
            job.save()  # the weights are those of the last good step
            raise
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            job.save()
            raise DoesNotFit(_too_large(job)) from error


def _too_large(job: Job) -> str:
    chosen, recipe = job.plan.fit, job.plan.recipe
    levers = [
        f"fit.micro_batch_size below {chosen.micro_batch_size}" * (chosen.micro_batch_size > 1),
        "fit.gradient_checkpointing: true" * (chosen.gradient_checkpointing is False),
        "fit.gradient_checkpointing: offload" * (chosen.gradient_checkpointing != "offload"),
        "train.chunked_loss: true" * (not recipe.train.chunked_loss),
        f"fit.max_seq_len below {chosen.max_seq_len}",
        "model.dtype: nf4" * (recipe.method.name != "full" and recipe.model.dtype != "nf4"),
    ]
    saved = (
        f"The state is saved in {job.directory.checkpoints}; --resume goes on from there, and a "
        "smaller micro-batch changes nothing else. "
    ) * (job.saved_step > 0)
    return (
        f"out of memory in step {job.state.step + 1}: {chosen.micro_batch_size} sequences of "
        f"{chosen.max_seq_len} tokens do not fit. {saved}What helps: "
        + ", ".join(lever for lever in levers if lever)
    )


def _keep(job: Job, metrics: StepMetrics, display: Display) -> None:
    """Record the step; evaluate and save when that is due."""
    record, last = metrics.to_json(), metrics.step == job.plan.total_steps
    if not last and _due(metrics.step, job.settings.eval_every):
        found = _perplexity_or_note(job, display)
        if found is not None:
            record["validation_perplexity"] = found.to_json()["perplexity"]
            display.say(f"step {metrics.step}: perplexity {found.perplexity:.3f}")
    job.directory.append_metrics(record)
    if last or _due(metrics.step, job.settings.save_every):
        job.save()


def _perplexity_or_note(job: Job, display: Display) -> PerplexityResult | None:
    """NaN is for the training loop to judge: it may skip a few steps and go on."""
    try:
        return _perplexity(job.plan, job.state.model, "evaluation", Display(quiet=True))
    except ModelError as error:
        display.warn(str(error))
        return None


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _step_line(metrics: StepMetrics, job: Job, total: int) -> str:
    memory = read_memory(job.device)
    left = (total - metrics.step) * metrics.seconds
    loss = "not finite" if not math.isfinite(metrics.loss) else f"{metrics.loss:.4f}"
    speed = metrics.tokens / max(metrics.seconds, 1e-9)
    return (
        f"loss {loss} {speed:,.0f} tok/s {format_seconds(left)} left "
        f"{format_gib(memory.now_bytes)}, peak {format_gib(memory.peak_bytes)}"
    )


@contextmanager
def _interrupts() -> Iterator[Any]:
    """Ctrl-C and SIGTERM ask for a stop after the step; a second one stops at once."""
    asked = False

    def ask(number: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    previous = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            previous[number] = signal.signal(number, ask)
        except ValueError:  # not in the main thread: whoever called us handles signals
            break
    try:
        yield lambda: asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _finish(job: Job, display: Display, *, started: float) -> RunResult:
    """Everything after the last step; the training state is given up on the way."""
    recipe, planned, state = job.plan.recipe, job.plan, job.state
    measured = read_memory(job.device).peak_bytes
    adapted = _perplexity(planned, state.model, "adapter perplexity", display)
    proof = _write_models(job, display)
    steps, optimizer_steps, tokens = state.step, state.optimizer_steps, state.tokens
    trainable = sum(parameter.numel() for parameter in state.trainable())
    del job.state, state  # the card needs the room for the merged model
    if job.device.type == "cuda":
        torch.cuda.empty_cache()
    merged_model = load_model(
        str(job.directory.merged),
        dtype="fp32",
        attention=recipe.model.attention,
        device=_roomy_device(job, display),
    )
    merged = _perplexity(planned, merged_model, "merged perplexity", display)
    tuned = _samples(planned, merged_model)
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
        notes=list(planned.notes),
    )


def _roomy_device(job: Job, display: Display) -> str:
    """Where the merged model goes, which in fp32 may be larger than the base in training was."""
    if job.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(job.device)
        if _FP32_ROOM * job.plan.parameters.total > free:
            display.warn("the merged model in fp32 is too large for the card: it is on the CPU")
            return "cpu"
    return str(job.device)


def _write_models(job: Job, display: Display) -> MergeProof:
    """adapter/ and merged/, the latter only if it equals what was trained."""
    import shutil

    recipe, state, directory = job.plan.recipe, job.state, job.directory
    limit = min(_PROOF_TOKENS, job.plan.context_length)
    rows = [
        tokens[:limit].tolist() for tokens, _, _ in islice(job.plan.held_out(), _PROOF_ROWS)
    ] or [next(job.plan.windows())[0].input_ids[0, :limit].tolist()]
    shutil.rmtree(directory.merged, ignore_errors=True)
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
        save_adapter(state.model, directory.adapter, job.base)
        proof = merge(
            directory.adapter, directory.merged, dtype=recipe.output_dtype, proof_tokens=rows
        )
    display.say(f"merged: largest logit difference {proof.max_logit_difference:.2g}")
    return proof


def _perplexity(
    planned: Plan, model: nn.Module, title: str, display: Display
) -> PerplexityResult | None:
    """On the held-out documents; None if there are none."""
    documents = planned.held_out()
    if not any(len(tokens) > 1 for tokens, _, _ in documents):
        return None
    total = sum(len(tokens) - 1 for tokens, _, _ in documents)
    with display.progress(title) as update:
        return score(
            model,
            documents,
            context_length=planned.context_length,
            stride=planned.stride,
            precision=planned.numerics.precision,
            progress=lambda done: update(done, total, "tokens"),
        )


def _prompts(planned: Plan) -> list[str]:
    """The recipe's, or how two of the held-out documents begin."""
    if planned.recipe.generate.prompts:
        return list(planned.recipe.generate.prompts)
    documents = islice(planned.held_out(), 2)
    return [str(planned.tokenizer.decode(tokens[:_PROMPT_TOKENS])) for tokens, _, _ in documents]


def _samples(planned: Plan, model: nn.Module) -> list[str]:
    settings = planned.recipe.generate
    sampling = Sampling(
        max_new_tokens=planned.max_new_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        seed=planned.recipe.train.seed,
    )
    found = generate(model, planned.tokenizer, _prompts(planned), sampling)
    return [continuation.text for continuation in found]


def _tokens_per_second(directory: RunDirectory) -> float | None:
    """Over all steps, those before a resume included."""
    metrics = directory.read_metrics()
    seconds = sum(step["seconds"] for step in metrics)
    return sum(step["tokens"] for step in metrics) / seconds if seconds else None
