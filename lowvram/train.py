"""One optimizer step, and the loop over steps. No printing, no files, no recipes.

The loss of a step is the mean over all target tokens of its micro-batches: each micro-batch
contributes its sum divided by the tokens of the whole window, so that how the window is cut
changes nothing but rounding.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from lowvram.adapters import plain_model
from lowvram.data import Batch
from lowvram.errors import TrainingError
from lowvram.loss import token_loss
from lowvram.optimizers import set_learning_rate
from lowvram.random_state import RandomState
from lowvram.tensorwise import FusedBackward, take_step

Precision = Literal["fp32", "bf16", "fp16"]

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
_NOTHING_TO_TRAIN = "no parameter received a gradient: nothing would be trained"


@dataclass(kw_only=True)
class TrainState:
    """Everything that a step reads and changes."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    learning_rate: Callable[[int], float]
    """Of optimizer step i, counted from 0."""
    precision: Precision = "fp32"
    scaler: torch.amp.GradScaler | None = None
    """For fp16 only."""
    fused: FusedBackward | None = None
    """Takes the optimizer's steps inside the backward pass; for one micro-batch a step."""
    max_grad_norm: float | None = 1.0
    label_smoothing: float = 0.0
    chunked_loss: bool = True
    max_nonfinite_steps: int = 3
    step: int = 0
    """Windows seen, skipped ones included: the position in the data."""
    optimizer_steps: int = 0
    """Steps taken: the position in the learning-rate schedule."""
    tokens: int = 0
    nonfinite_in_a_row: int = 0
    stepping: bool = False
    """While weights and optimizer states are between two steps."""
    before_micro_batch: Callable[[], None] | None = None
    """May raise to end a long step early; the step then has left no trace."""

    @property
    def spoilt(self) -> bool:
        """Whether a step failed on the way, so that weights are neither old nor new."""
        return self.stepping or (self.fused is not None and self.fused.stepping)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def trainable(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """What one step was. `loss` is the mean in nats per target token, as it was computed."""

    step: int
    optimizer_steps: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    target_tokens: int
    seconds: float
    skipped: Literal["nonfinite", "overflow", "empty"] | None
    """Why no step was taken: a loss that is no number, an fp16 overflow, or no target at all."""
    loss_scale: float | None

    def to_json(self) -> dict[str, Any]:
        """As JSON has it: what is not finite is null."""
        values = dict(vars(self))
        values["tokens_per_second"] = self.tokens / self.seconds if self.seconds else None
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in values.items()
        }


def make_scaler(precision: Precision, device: torch.device) -> torch.amp.GradScaler | None:
    return torch.amp.GradScaler(device.type) if precision == "fp16" else None


def autocast(precision: Precision, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=_AUTOCAST[precision])


def train(state: TrainState, windows: Iterable[Sequence[Batch]]) -> Iterator[StepMetrics]:
    """Take a step for every window; the caller prints, saves and stops.

    Raises TrainingError when the loss stays non-finite for `max_nonfinite_steps` windows, or
    when the fp16 loss scale has fallen below 1, where no gradient is left to scale.
    """
    for window in windows:
        metrics = train_step(state, window)
        yield metrics
        if state.nonfinite_in_a_row >= state.max_nonfinite_steps:
            kept = "the weights are still those of the last good step"
            if state.fused is not None:
                kept = "tensors with a finite gradient have been updated, no other"
            raise TrainingError(
                f"step {metrics.step}: the loss was not finite {state.nonfinite_in_a_row} steps in "
                f"a row; {kept}. Lower "
                "train.learning_rate, or use train.precision: bf16 or fp32 instead of fp16"
            )
        if metrics.loss_scale is not None and metrics.loss_scale < 1.0:
            raise TrainingError(
                f"step {metrics.step}: fp16 gradients overflow at any loss scale; "
                "use train.precision: bf16 or fp32, or lower train.learning_rate"
            )


def train_step(state: TrainState, window: Sequence[Batch]) -> StepMetrics:
    """One optimizer step on the micro-batches of `window`, or none if that would do harm.

    All or nothing: if it raises before weights are updated, gradients are dropped and random
    numbers go on from where they were, so that the step can be taken again. If it raises later,
    `state.spoilt` says so, and the state is of no use any more.
    """
    random_state, step = RandomState.now(state.device), state.step
    try:
        return _take(state, window)
    except BaseException:
        if not state.spoilt and state.step == step:
            _undo(state, random_state)
        raise


def _undo(state: TrainState, random_state: RandomState) -> None:
    state.optimizer.zero_grad(set_to_none=True)
    random_state.restore()
    if state.scaler is not None:  # which refuses to unscale twice before an update
        used, state.scaler = state.scaler, make_scaler(state.precision, state.device)
        assert state.scaler is not None
        state.scaler.load_state_dict(used.state_dict())


def _take(state: TrainState, window: Sequence[Batch]) -> StepMetrics:
    started = time.perf_counter()
    state.model.train()
    state.optimizer.zero_grad(set_to_none=True)
    learning_rate = state.learning_rate(state.optimizer_steps)
    set_learning_rate(state.optimizer, learning_rate)
    target_tokens = sum(batch.target_tokens for batch in window)
    if state.fused is not None:
        state.fused.begin()
    loss = accumulate_gradients(state, window, target_tokens)
    grad_norm, skipped = 0.0, None
    if target_tokens == 0:
        skipped = "empty"
    elif state.fused is not None:
        grad_norm, skipped = state.fused.end()
        if not math.isfinite(loss):
            grad_norm, skipped = math.nan, "nonfinite"  # there was no backward pass
    else:
        grad_norm = _unscale_and_clip(state)
        state.stepping = True
        skipped = _step_unless_nonfinite(state, loss, grad_norm)
    state.optimizer.zero_grad(set_to_none=True)
    _count(state, window, skipped)
    state.stepping = False
    return StepMetrics(
        step=state.step,
        optimizer_steps=state.optimizer_steps,
        loss=loss,
        learning_rate=learning_rate,
        grad_norm=grad_norm,
        tokens=sum(batch.tokens for batch in window),
        target_tokens=target_tokens,
        seconds=time.perf_counter() - started,
        skipped=skipped,  # type: ignore[arg-type]
        loss_scale=state.scaler.get_scale() if state.scaler else None,
    )


def accumulate_gradients(state: TrainState, window: Sequence[Batch], target_tokens: int) -> float:
    """Gradients of the window's mean loss; returns that loss."""
    if state.fused is not None and len(window) > 1:
        raise TrainingError(
            f"{len(window)} micro-batches in a step: with train.fused_backward there can be one"
        )
    model = plain_model(state.model)
    device = state.device
    total = torch.zeros((), dtype=torch.float32, device=device)
    for batch in window:
        if batch.target_tokens == 0:
            continue
        if state.before_micro_batch is not None:
            state.before_micro_batch()
        on_device = batch.to(device)
        with autocast(state.precision, device):
            loss = token_loss(
                model,
                on_device.input_ids,
                on_device.labels,
                on_device.position_ids,
                target_tokens=batch.target_tokens,
                label_smoothing=state.label_smoothing,
                chunked=state.chunked_loss,
            )
        if not loss.requires_grad:
            raise TrainingError(_NOTHING_TO_TRAIN)
        loss = loss / target_tokens
        total += loss.detach()
        if state.fused is not None and not math.isfinite(total.item()):
            break  # the backward pass would update the weights
        (state.scaler.scale(loss) if state.scaler else loss).backward()
        del loss  # its graph's inputs would otherwise live through the next forward pass
    return total.item()


def _unscale_and_clip(state: TrainState) -> float:
    """The norm of the true gradients; they are clipped to `max_grad_norm` after unscaling."""
    parameters = [p for p in state.trainable() if p.grad is not None]
    if not parameters:
        raise TrainingError(_NOTHING_TO_TRAIN)
    if state.scaler is not None:
        state.scaler.unscale_(state.optimizer)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    # Clipping by a norm that is not finite would turn every gradient into NaN.
    if state.max_grad_norm is not None and math.isfinite(norm.item()):
        nn.utils.clip_grads_with_norm_(parameters, state.max_grad_norm, norm)
    return norm.item()


def _step_unless_nonfinite(
    state: TrainState, loss: float, grad_norm: float
) -> Literal["nonfinite", "overflow"] | None:
    """Optimizers write a NaN gradient into the weights for good, so such a step is not taken."""
    finite = math.isfinite(loss) and math.isfinite(grad_norm)
    if state.scaler is None:
        if finite:
            take_step(state.optimizer)
    else:
        if finite:
            state.scaler.step(state.optimizer)
        state.scaler.update()
    if finite:
        return None
    overflow = state.scaler is not None and math.isfinite(loss)
    return "overflow" if overflow else "nonfinite"


def _count(state: TrainState, window: Sequence[Batch], skipped: str | None) -> None:
    state.step += 1
    if skipped is None:
        state.optimizer_steps += 1
        state.tokens += sum(batch.tokens for batch in window)
        state.nonfinite_in_a_row = 0
    elif skipped == "nonfinite":
        state.nonfinite_in_a_row += 1
