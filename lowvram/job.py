"""A run under way: its plan, its state and its directory, begun, saved and gone on with."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

import psutil
import torch
from torch import nn

from lowvram.adapters import Base
from lowvram.build import base_of, build
from lowvram.checkpoint import Loaded, load_newest, save_checkpoint
from lowvram.directory import RunDirectory
from lowvram.disk import write_json, write_text
from lowvram.display import Display
from lowvram.errors import CheckpointError, ModelError
from lowvram.generate import Sampling, generate
from lowvram.interrupts import Interrupts
from lowvram.memory.measure import format_gib, reset_peak
from lowvram.needs import Needs, needs_of
from lowvram.perplexity import PerplexityResult, score
from lowvram.plan import Plan
from lowvram.recipe import TrainSection, dump_recipe
from lowvram.train import TrainState

_PROMPT_TOKENS = 8


@dataclass(kw_only=True)
class Job:
    plan: Plan
    directory: RunDirectory
    state: TrainState
    base: Base
    interrupts: Interrupts
    start: dict[str, Any] = field(default_factory=dict)
    """What was found before the first step: perplexity and samples of the base."""
    pending: dict[str, Any] | None = None
    """The record of a step that was taken and is not written down yet: an evaluation is due."""
    best: dict[str, Any] | None = None
    """Step and perplexity of the best evaluation so far, with train.keep_best."""
    lowered: dict[str, Any] | None = None
    """From how many rows of a micro-batch to how many, on which device, memory has forced it."""
    doing: Literal["training", "evaluating", "saving"] = "training"
    """What fails, if something does."""
    saved_step: int | None = None
    saved_at: float = field(default_factory=time.monotonic)

    @property
    def device(self) -> torch.device:
        return self.plan.numerics.device

    @property
    def device_name(self) -> str:
        return self.plan.card.name if self.plan.card is not None else str(self.device)

    @property
    def settings(self) -> TrainSection:
        return self.plan.recipe.train

    @property
    def fingerprint(self) -> dict[str, Any]:
        return self.plan.fingerprint(self.base.sha256)

    def save(self) -> None:
        """A checkpoint of the state as it is, unless there is one."""
        if self.saved_step == self.state.step:
            return
        self.doing = "saving"
        self.directory.sync_metrics()
        best = self.best if self.settings.keep_best else None
        save_checkpoint(
            self.state,
            self.directory.checkpoints,
            fingerprint=self.fingerprint,
            keep_last=self.settings.keep_last,
            keep=None if best is None else best["step"],
            run={"pending": self.pending, "best": self.best, "lowered": self.lowered},
        )
        self.saved_step, self.saved_at = self.state.step, time.monotonic()
        self.doing = "training"

    def save_if_sound(self) -> None:
        """On the way out of a failure; a step that failed half-way leaves nothing to save."""
        if not self.state.spoilt:
            self.save()

    def complete(self, display: Display) -> None:
        """What is due after the last step, or still due of it after a failure or a resume."""
        last, owed = self.state.step >= self.plan.total_steps, self.doing == "saving"
        self.doing = "training"
        if self.pending is not None:
            record = dict(self.pending)
            if not last and is_due(record["step"], self.settings.eval_every):
                self.doing = "evaluating"
                owed = self._evaluate(record, display)
                self.doing = "training"
            self.directory.append_metrics(record)
            self.pending = None
        if last or owed or self._save_is_due():
            self.save()

    def _evaluate(self, record: dict[str, Any], display: Display) -> bool:
        """Whether it is the best so far; only asked for with train.keep_best."""
        found = self._perplexity_or_note(display)
        if found is None:
            return False
        record["validation_perplexity"] = found.to_json()["perplexity"]
        display.say(f"step {record['step']}: perplexity {found.perplexity:.3f}")
        if not self.settings.keep_best:
            return False
        best = self.best is None or found.perplexity < self.best["perplexity"]
        if best:
            self.best = {"step": record["step"], "perplexity": found.perplexity}
        return best

    def _perplexity_or_note(self, display: Display) -> PerplexityResult | None:
        """NaN is for the training loop to judge: it may skip a few steps and go on."""
        try:
            return self.perplexity(self.state.model, "evaluation", Display(quiet=True))
        except ModelError as error:
            display.warn(str(error))
            return None

    def _save_is_due(self) -> bool:
        minutes = self.settings.save_every_minutes
        late = minutes is not None and time.monotonic() - self.saved_at > 60 * minutes
        return late or is_due(self.state.step, self.settings.save_every)

    def perplexity(self, model: nn.Module, title: str, display: Display) -> PerplexityResult | None:
        """On the held-out documents; None if there are none."""
        planned = self.plan
        documents = planned.held_out()
        if not any(len(tokens) > 1 for tokens, _, _ in documents):
            return None
        total = sum(len(tokens) - 1 for tokens, _, _ in documents)
        with display.progress(title) as update:

            def progress(done: int) -> None:
                update(done, total, "tokens")
                self.stop_if_urgent()

            return score(
                model,
                documents,
                context_length=planned.context_length,
                stride=planned.stride,
                precision=planned.numerics.precision,
                progress=progress,
            )

    def stop_if_urgent(self) -> None:
        """Within what is long: after a while, a request to stop does not wait for its end."""
        self.interrupts.check()
        if self.interrupts.urgent:
            raise Stopped

    def samples(self, model: nn.Module) -> list[str]:
        settings = self.plan.recipe.generate
        sampling = Sampling(
            max_new_tokens=self.plan.max_new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            seed=self.settings.seed,
        )
        found = generate(model, self.plan.tokenizer, self.prompts(), sampling)
        return [continuation.text for continuation in found]

    def prompts(self) -> list[str]:
        """The recipe's, or how two of the held-out documents begin."""
        if self.plan.recipe.generate.prompts:
            return list(self.plan.recipe.generate.prompts)
        documents = islice(self.plan.held_out(), 2)
        tokenizer = self.plan.tokenizer
        return [str(tokenizer.decode(tokens[:_PROMPT_TOKENS])) for tokens, _, _ in documents]


class Stopped(Exception):
    """A request to stop has been waiting for too long; what was under way is given up."""


def is_due(step: int, every: int | None) -> bool:
    return every is not None and step > 0 and step % every == 0


def start(  # noqa: PLR0913 - what the command was told
    planned: Plan,
    directory: RunDirectory,
    display: Display,
    interrupts: Interrupts,
    *,
    resume: bool,
    anyway: bool,
) -> Job:
    """Build the state; begin with the base's own figures, or go on from a checkpoint."""
    recipe = planned.recipe
    base = base_of(recipe)
    needs = needs_of(planned)
    directory.require_room(needs.disk_bytes, needs.disk_words)
    _warn_of_little_memory(needs, display)
    state = build(recipe, total_steps=planned.total_steps, numerics=planned.numerics)
    job = Job(plan=planned, directory=directory, state=state, base=base, interrupts=interrupts)
    if recipe.train.chunked_loss and not state.chunked_loss:
        display.warn("train.chunked_loss: this model changes its logits; using its own loss")
    if resume:
        _go_on(job, display, anyway=anyway)
    else:
        directory.make_empty()  # now: what cannot be planned or built leaves the old run alone
        _begin(job, display)
    state.before_micro_batch = job.stop_if_urgent
    reset_peak(job.device)
    return job


def _warn_of_little_memory(needs: Needs, display: Display) -> None:
    available = psutil.virtual_memory().available
    if needs.memory_bytes > available:
        display.warn(
            f"this run may need up to {format_gib(needs.memory_bytes)} of the host's memory, of "
            f"which {format_gib(available)} are free: it may be slow, or be ended by the system"
        )


def _begin(job: Job, display: Display) -> None:
    perplexity = job.perplexity(job.state.model, "base perplexity", display)
    if perplexity is not None:
        display.say(f"base: perplexity {perplexity.perplexity:.3f}")
    texts = job.samples(job.state.model)
    job.start = {
        "perplexity": None if perplexity is None else perplexity.to_json(),
        "samples": [
            {"prompt": prompt, "base": text}
            for prompt, text in zip(job.prompts(), texts, strict=True)
        ],
    }
    write_json(job.directory.start, job.start)
    write_text(job.directory.recipe, dump_recipe(job.plan.recipe))
    job.save()


def _go_on(job: Job, display: Display, *, anyway: bool) -> None:
    loaded = restore(job, display, anyway=anyway)
    if loaded is None:
        # Killed before its first checkpoint: the state is as it was then, and nothing says of what.
        display.say("no step was saved: beginning with the first")
        _begin(job, display)
        return
    job.start = job.directory.read_start()
    job.directory.mend_events()
    display.say(f"going on from {loaded.path}, step {job.state.step}")
    _lower_again(job, loaded.run.get("lowered"))
    differences = {"differences": loaded.differences} if loaded.differences else {}
    job.directory.append_event("resumed", step=job.state.step, **differences)
    for difference in loaded.differences:
        display.warn(f"going on all the same, though {difference}")
    write_text(job.directory.recipe, dump_recipe(job.plan.recipe))
    job.save()


def restore(job: Job, display: Display, *, anyway: bool = False) -> Loaded | None:
    """The state and the records of the newest whole checkpoint, if there is any."""
    fingerprint = job.fingerprint
    loaded = load_newest(
        job.state, job.directory.checkpoints, fingerprint=fingerprint, anyway=anyway
    )
    if loaded is None:
        if job.directory.read_metrics():
            raise CheckpointError(
                f"{job.directory.checkpoints}: has lost its checkpoints, though steps were taken; "
                "put them back, or start anew with --overwrite"
            )
        return None
    _say_skipped(loaded.skipped, job, display)
    job.pending, job.best = loaded.run.get("pending"), loaded.run.get("best")
    job.saved_step, job.saved_at = job.state.step, time.monotonic()
    recorded = job.state.step - (job.pending is not None)
    if job.directory.keep_metrics(recorded) < recorded:
        display.warn(f"{job.directory.metrics} has lost lines of the {recorded} steps so far")
    if loaded.differences:
        job.saved_step = None  # it is a checkpoint of this recipe now
    return loaded


def _say_skipped(skipped: Sequence[str], job: Job, display: Display) -> None:
    for note in skipped:
        display.warn(note)
        job.directory.append_event("checkpoint skipped", reason=note)


def _lower_again(job: Job, lowered: dict[str, Any] | None) -> None:
    """On the same card the plan is the same, and would fail again where it has failed before."""
    planned = job.plan.fit.micro_batch_size
    if lowered and (lowered["from"], lowered["device"]) == (planned, job.device_name):
        job.lowered = lowered
        job.plan = job.plan.with_micro_batch_size(lowered["to"])
