"""The steps of a run, through interrupts and memory that is short for a while.

Another program may take memory of the card in mid-run, or a batch may be longer than any before.
Then the frames that failed are left, what they held is freed, the step is taken again with half
as many rows in a micro-batch and twice as many micro-batches: the same step, up to rounding (and
with other dropout masks, which are drawn by micro-batch).
"""

from __future__ import annotations

import math

from lowvram.disk import write_text
from lowvram.display import Display, Update, format_seconds
from lowvram.errors import DeviceError, DoesNotFit, Interrupted, TrainingError
from lowvram.job import Job, Stopped, is_due, restore
from lowvram.memory.measure import (
    format_gib,
    is_device_failure,
    is_out_of_memory,
    read_memory,
    release_memory,
)
from lowvram.recipe import dump_recipe
from lowvram.rehearsal import rehearsal_of
from lowvram.train import StepMetrics, train

MOST_FAILURES = 5
"""In a row, without a step between them."""


def take_steps(job: Job, display: Display) -> None:
    """To the last one. Raises Interrupted, TrainingError, DoesNotFit or DeviceError, after saving
    what can be saved."""
    failures, step = 0, job.state.step
    with display.progress("training", every_seconds=0.0) as update, job.interrupts.patient():
        try:
            while (failed := _attempt(job, update, display)) is not None:
                failures = failures + 1 if job.state.step == step else 1
                step = job.state.step
                _recover(job, failed, failures, display)
        except (Interrupted, TrainingError, OSError) as error:
            job.save_if_sound()  # the weights are those of the last good step
            job.directory.append_event("stopped", step=job.state.step, reason=str(error))
            raise


def _attempt(job: Job, update: Update, display: Display) -> str | None:
    """Steps to the last one: None, or the message of memory that was too small for one.

    It returns that rather than raise, so that the frames that failed, and the tensors they hold,
    are gone then.
    """
    total = job.plan.total_steps
    try:
        job.complete(display)
        if job.device.type == "cuda":
            rehearsal_of(job.state, job.plan.recipe, job.plan.numerics).warm_up()
        for metrics in train(job.state, job.plan.windows(job.state.step)):
            job.pending = metrics.to_json()  # first of all: from here on the step is not lost
            if metrics.step in (1, total) or is_due(metrics.step, job.settings.log_every):
                update(metrics.step, total, _step_line(metrics, job, total))
            if metrics.skipped:
                display.warn(f"step {metrics.step} skipped: {metrics.skipped}")
            job.complete(display)
            if job.interrupts.asked:
                raise Stopped
    except Stopped:
        raise Interrupted(
            f"stopped after step {job.state.step} of {total}, state saved in "
            f"{job.directory.checkpoints}; the same command with --resume goes on"
        ) from None
    except (RuntimeError, MemoryError) as error:
        if is_device_failure(error):
            raise DeviceError(_card_failed(job, str(error))) from error
        if not is_out_of_memory(error):
            raise
        return (str(error) or "out of memory").splitlines()[0]
    return None


def _recover(job: Job, failed: str, failures: int, display: Display) -> None:
    """Ready for another attempt; DoesNotFit if there have been enough of them."""
    release_memory(job.device)
    rows, doing = job.plan.fit.micro_batch_size, job.doing
    step = job.state.step + (doing == "training" and job.pending is None)
    job.directory.append_event(
        "out of memory", step=step, doing=doing, micro_batch_size=rows, message=failed
    )
    if failures >= MOST_FAILURES:
        job.save_if_sound()
        raise DoesNotFit(_too_large(job, step, doing))
    if job.state.spoilt and restore(job, display) is None:
        raise DoesNotFit(_too_large(job, step, doing))
    smaller = _smaller(job) if doing == "training" else rows
    if smaller < rows:
        _lower(job, smaller)
        cut = f"{smaller}, {job.plan.fit.gradient_accumulation_steps} a step"
        display.warn(
            f"out of memory in step {step}: going on with micro-batches of {cut}; the step itself "
            "stays the same"
        )
    else:
        display.warn(f"out of memory while {doing}, step {step}: trying again")


def _smaller(job: Job) -> int:
    """Half as many rows, or the next fewer that divide the global batch; as many if none do."""
    size, rows = job.settings.global_batch_size, job.plan.fit.micro_batch_size
    if rows == 1 or job.settings.fused_backward:
        return rows
    return max(n for n in range(1, rows // 2 + 1) if size % n == 0)


def _lower(job: Job, rows: int) -> None:
    was = job.lowered["from"] if job.lowered else job.plan.fit.micro_batch_size
    job.lowered = {"from": was, "to": rows, "device": job.device_name}
    job.plan = job.plan.with_micro_batch_size(rows)
    write_text(job.directory.recipe, dump_recipe(job.plan.recipe))


def _too_large(job: Job, step: int, doing: str) -> str:
    chosen, recipe = job.plan.fit, job.plan.recipe
    levers = [
        f"fit.micro_batch_size below {chosen.micro_batch_size}" * (chosen.micro_batch_size > 1),
        "train.fused_backward: false" * recipe.train.fused_backward,
        "fit.gradient_checkpointing: true" * (chosen.gradient_checkpointing is False),
        "fit.gradient_checkpointing: offload" * (chosen.gradient_checkpointing != "offload"),
        "train.chunked_loss: true" * (not recipe.train.chunked_loss),
        f"fit.max_seq_len below {chosen.max_seq_len}",
        "model.dtype: nf4" * (recipe.method.name != "full" and recipe.model.dtype != "nf4"),
    ]
    what = f"{chosen.micro_batch_size} sequences of {chosen.max_seq_len} tokens do not fit"
    if doing != "training":
        what = f"there is no room for {doing}, tried {MOST_FAILURES} times"
    helps = ", ".join(lever for lever in levers if lever)
    return f"out of memory in step {step}: {what}. {_where_saved(job)}What helps: {helps}"


def _where_saved(job: Job) -> str:
    return (
        f"The state of step {job.saved_step} is saved in {job.directory.checkpoints}; --resume "
        "goes on from there, and a smaller micro-batch changes nothing else. "
    ) * (job.saved_step is not None)


def _card_failed(job: Job, message: str) -> str:
    """After that nothing can be fetched from the card."""
    job.directory.append_event("card failed", step=job.state.step + 1, message=message)
    return (
        f"the card failed in step {job.state.step + 1}: {message.splitlines()[0]}. This process "
        f"cannot use it any more. {_where_saved(job)}"
        "If it fails in the same step again, the data or the software is at fault, not the card"
    )


def _step_line(metrics: StepMetrics, job: Job, total: int) -> str:
    memory = read_memory(job.device)
    left = (total - metrics.step) * metrics.seconds
    loss = "not finite" if not math.isfinite(metrics.loss) else f"{metrics.loss:.4f}"
    speed = metrics.tokens / max(metrics.seconds, 1e-9)
    return (
        f"loss {loss} {speed:,.0f} tok/s {format_seconds(left)} left "
        f"{format_gib(memory.now_bytes)}, peak {format_gib(memory.peak_bytes)}"
    )
