"""Does full fine-tuning in 16 bits learn as in fp32? Validation losses, side by side.

    python benchmarks/full_16bit.py
    python benchmarks/full_16bit.py --markdown

The model that ships is fine-tuned on the text that ships, every weight of it, three times from each
seed, on the same batches: weights in fp32 with AdamW; weights in bf16 whose updates are rounded by
chance, with AdamW in 8 bits inside the backward pass; and, as a control, the second with the same
updates rounded to the nearest. One scorer then takes all models in fp32, over the same held-out
documents.

Exit code 1 if a seed's loss in 16 bits is more than 1 % above that in fp32, or if the control is
not worse than rounding by chance: then the learning rate is so large that this shows nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal
from unittest import mock

import torch
from torch import nn

from lowvram import train
from lowvram.build import build
from lowvram.perplexity import score
from lowvram.plan import Plan, plan
from lowvram.recipe import Recipe

ALLOWED = 0.01
LENGTH = 256

Way = Literal["fp32", "chance", "nearest"]

LABELS: dict[Way, str] = {
    "fp32": "fp32 weights, AdamW",
    "chance": "bf16 weights rounded by chance, 8-bit AdamW, fused backward",
    "nearest": "the same, rounded to the nearest (control)",
}
IN_16_BITS: dict[str, Any] = {
    "model.dtype": "bf16",
    "train.precision": "bf16",
    "train.optimizer": "adamw8bit",
    "train.fused_backward": True,
}
IN_32_BITS: dict[str, Any] = {
    "model.dtype": "fp32",
    "train.precision": "fp32",
    "train.optimizer": "adamw",
}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Losses of one seed are means over the held-out tokens, in nats a token."""

    seed: int
    base: float
    losses: dict[Way, float]
    seconds: dict[Way, float]

    def excess(self, way: Way) -> float:
        """How far the loss is above that in fp32, as a share of it."""
        return self.losses[way] / self.losses["fp32"] - 1.0

    def learned(self, way: Way) -> float:
        """The share of what fp32 took off the base's loss."""
        return (self.base - self.losses[way]) / (self.base - self.losses["fp32"])


# --- training -------------------------------------------------------------------------------------


def recipe_for(way: Way, seed: int, arguments: argparse.Namespace) -> Recipe:
    settings = {
        "model.name": arguments.model,
        "data.source": arguments.text,
        "method.name": "full",
        "train.global_batch_size": arguments.rows,
        "train.epochs": 1000,
        "train.max_steps": arguments.steps,
        "train.learning_rate": arguments.learning_rate,
        "train.max_grad_norm": None,
        "train.seed": seed,
        "fit.micro_batch_size": arguments.rows,
        "fit.max_seq_len": LENGTH,
        "fit.gradient_checkpointing": False,
        **(IN_32_BITS if way == "fp32" else IN_16_BITS),
    }
    sections: dict[str, Any] = {}
    for key, value in settings.items():
        section, name = key.split(".")
        sections.setdefault(section, {})[name] = value
    return Recipe.model_validate(sections)


def outcome(seed: int, arguments: argparse.Namespace) -> Outcome:
    losses: dict[Way, float] = {}
    seconds: dict[Way, float] = {}
    base = math.nan
    for way in LABELS:
        planned = plan(recipe_for(way, seed, arguments))
        numerics = planned.numerics
        # A CPU without bf16 arithmetic would train in fp32, which leaves nothing to compare.
        if way != "fp32":
            numerics = replace(numerics, precision="bf16", base_dtype="bf16")
        state = build(planned.recipe, total_steps=planned.total_steps, numerics=numerics)
        if way == "fp32":
            base = validation_loss(state.model, planned)
        started = time.perf_counter()
        with to_nearest() if way == "nearest" else contextlib.nullcontext():
            for metrics in train(state, planned.windows()):
                progress(f"seed {seed}, {way}: step {metrics.step}, loss {metrics.loss:.3f}")
        seconds[way] = time.perf_counter() - started
        losses[way] = validation_loss(state.model, planned)
    progress("")
    found = ", ".join(f"{way} {loss:.4f}" for way, loss in losses.items())
    print(f"seed {seed}: before {base:.4f}, {found}", file=sys.stderr, flush=True)
    return Outcome(seed=seed, base=base, losses=losses, seconds=seconds)


def to_nearest() -> contextlib.AbstractContextManager[Any]:
    """Updates as they are, rounded as a plain copy into bf16 rounds."""
    return mock.patch(
        "lowvram.tensorwise.stochastic_round_", lambda target, source: target.copy_(source)
    )


def validation_loss(model: nn.Module, planned: Plan) -> float:
    """Of the weights as they are now, computed in fp32."""
    result = score(
        model.float(),
        planned.held_out(),
        context_length=planned.context_length,
        stride=planned.stride,
        precision="fp32",
    )
    return math.log(result.perplexity)


# --- printing -------------------------------------------------------------------------------------


def table(outcomes: Sequence[Outcome]) -> str:
    """Markdown: a row for each way to train, a column for each seed."""
    lines = [
        "| | " + " | ".join(f"seed {o.seed}" for o in outcomes) + " | above fp32 | learned |",
        "|---|" + "--:|" * (len(outcomes) + 2),
        f"| before | {cells(o.base for o in outcomes)} | | |",
    ]
    for way, label in LABELS.items():
        losses = cells(o.losses[way] for o in outcomes)
        excess = 100 * statistics.mean(o.excess(way) for o in outcomes)
        learned = 100 * statistics.mean(o.learned(way) for o in outcomes)
        lines.append(f"| {label} | {losses} | {excess:+.2f} % | {learned:.1f} % |")
    return "\n".join(lines)


def cells(values: Iterable[float]) -> str:
    return " | ".join(f"{value:.4f}" for value in values)


def failures(outcomes: Sequence[Outcome]) -> list[str]:
    found = [
        f"seed {o.seed}: the loss in 16 bits is {o.excess('chance'):.2%} above that in fp32"
        for o in outcomes
        if o.excess("chance") > ALLOWED
    ]
    found += [
        f"seed {o.seed}: rounding to the nearest is as good as by chance; lower --learning-rate"
        for o in outcomes
        if o.losses["nearest"] <= o.losses["chance"]
    ]
    return found


def progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


# --- the command ----------------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="embedded:gpt2-docstrings")
    parser.add_argument("--text", default="embedded:python-reference")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rows", type=int, default=16, help=f"of {LENGTH} tokens, in a step")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--markdown", action="store_true", help="print the table and nothing else")
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    outcomes = [outcome(seed, arguments) for seed in arguments.seeds]
    if not arguments.markdown:
        print(
            f"{arguments.model} on {arguments.text}: {arguments.steps} steps of {arguments.rows} x "
            f"{LENGTH} tokens, learning rate {arguments.learning_rate:g}; validation loss in nats "
            "a token\n"
        )
    print(table(outcomes))
    problems = failures(outcomes)
    if not arguments.markdown:
        taken = sum(sum(o.seconds.values()) for o in outcomes)
        print(f"\n{taken:.0f} s of training, {torch.get_num_threads()} threads")
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
