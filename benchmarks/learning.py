"""Validation loss over minutes of training on the CPU, beside transformers' Trainer.

    python benchmarks/learning.py --tokenizer DIR --text FILE --minutes 3 --plot plot.png
    python benchmarks/learning.py --model embedded:gpt2-docstrings --text FILE

lowvram, Trainer + peft with packed blocks, and Trainer + peft as the common tutorial uses it (every
line padded) train the same LoRA adapter from the same weights on the same text for the same
minutes, one after the other, with all cores. The minutes are those of the training loop; loading,
tokenising and writing adapters are not counted, for anyone. One scorer then takes the adapters that
each wrote on its way: transformers' forward pass over held-out documents, each on its own, token by
token the same for all. The end-of-text token is not scored, since the tutorial never learns it.

Exit code 1 if lowvram does not have the lowest loss at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from arena import Arena, prepare, random_gpt2, read_lines, say
from contestants import REMARKS, Report, load_adapter, lora_config
from throughput import LABELS, cpu_name

from lowvram.model import locate

CONTESTANTS = ("tutorial", "trainer", "lowvram")
ROWS_AT_A_TIME = 8


@dataclass(frozen=True, kw_only=True)
class Curve:
    """How one contestant learned."""

    contestant: str
    steps: int
    tokens: int
    """Useful ones that were trained on, not padding."""
    points: list[tuple[float, float]]
    """Minutes of training and validation loss in nats per token; the first is at the start."""

    @property
    def last(self) -> float:
        return self.points[-1][1]

    def minutes_to(self, loss: float) -> float | None:
        """When the curve, straight between its points, first is at `loss`; None if never."""
        before = self.points[0]
        if before[1] <= loss:
            return before[0]
        for point in self.points[1:]:
            if point[1] <= loss:
                share = (before[1] - loss) / (before[1] - point[1])
                return before[0] + share * (point[0] - before[0])
            before = point
        return None


# --- data and scoring -----------------------------------------------------------------------------


def hold_out(lines: Sequence[str], count: int, seed: int = 0) -> tuple[list[str], list[str]]:
    """Lines to train on and `count` distinct ones to score; no line is on both sides."""
    distinct = sorted(set(lines))
    held_out = random.Random(seed).sample(distinct, min(count, len(distinct) // 2))
    scored = set(held_out)
    return [line for line in lines if line not in scored], held_out


class Scorer:
    """The mean loss of adapters on documents: token-weighted, each document on its own."""

    def __init__(self, model: Path, documents: Sequence[str], length: int, threads: int) -> None:
        import torch
        from peft import get_peft_model
        from transformers import AutoModelForCausalLM, AutoTokenizer

        torch.set_num_threads(threads)
        tokenizer = AutoTokenizer.from_pretrained(model)
        tokens = [tokenizer(document)["input_ids"][:length] for document in documents]
        self.documents = sorted((ids for ids in tokens if len(ids) > 1), key=len)
        with warnings.catch_warnings(action="ignore"):
            base = AutoModelForCausalLM.from_pretrained(model)
            self.model = get_peft_model(base, lora_config()).eval()

    @property
    def targets(self) -> int:
        return sum(len(ids) - 1 for ids in self.documents)

    def loss(self, adapter: Path) -> float:
        """Nats per target token."""
        import torch
        from torch.nn import functional

        load_adapter(self.model, adapter)
        total = 0.0
        for start in range(0, len(self.documents), ROWS_AT_A_TIME):
            rows = self.documents[start : start + ROWS_AT_A_TIME]
            width = max(map(len, rows))
            ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
            mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
            with torch.inference_mode():
                logits = self.model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
            losses = functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
            total += float((losses * mask[:, 1:]).double().sum())
        return total / self.targets


def curve_of(report: Report, scorer: Scorer, start_loss: float) -> Curve:
    points = [(0.0, start_loss)]
    for seconds, path in report.saved:
        points.append((seconds / 60, scorer.loss(Path(path))))
        say(f"{report.contestant}: {points[-1][0]:.2f} min, loss {points[-1][1]:.4f}")
    return Curve(
        contestant=report.contestant,
        steps=len(report.seconds),
        tokens=sum(report.tokens),
        points=points,
    )


# --- printing -------------------------------------------------------------------------------------


def table(curves: Sequence[Curve]) -> str:
    """Markdown; and how long the last curve, ours, took to where each other one ended."""
    ours = curves[-1]
    lines = [
        "| | steps | useful tokens | loss at the start | at the end | lowvram is there after |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for curve in curves:
        reached = ours.minutes_to(curve.last)
        shown = "" if curve is ours else "never" if reached is None else f"{reached:.2f} min"
        lines.append(
            f"| {LABELS[curve.contestant]} | {curve.steps} | {curve.tokens:,} | "
            f"{curve.points[0][1]:.3f} | {curve.last:.3f} | {shown} |"
        )
    return "\n".join(lines)


def draw(curves: Sequence[Curve], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4.2))
    for curve, marker in zip(curves, "so^", strict=True):
        minutes, losses = zip(*curve.points, strict=True)
        axis.plot(minutes, losses, marker=marker, label=LABELS[curve.contestant])
    axis.set_xlabel("minutes of training")
    axis.set_ylabel("validation loss, nats per token")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


# --- the command ----------------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="a document a line")
    parser.add_argument("--validation", type=Path, help="held-out text; else drawn from --text")
    parser.add_argument("--tokenizer", type=Path, help="a directory with GPT-2's tokenizer")
    parser.add_argument(
        "--model", help="a GPT-2 directory or embedded:NAME, instead of random weights"
    )
    parser.add_argument("--minutes", type=float, default=3)
    parser.add_argument("--points", type=int, default=6, help="of each curve, beside the start")
    parser.add_argument("--documents", type=int, default=100, help="held-out documents to score")
    parser.add_argument("--dropout", type=float, default=0.1, help="GPT-2's own is 0.1")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--length", type=int, default=512, help="tokens a row")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--plot", type=Path, help="write the curves to this file")
    parser.add_argument("--json", type=Path, help="write everything to this file")
    arguments = parser.parse_args()
    if (arguments.tokenizer is None) == (arguments.model is None):
        parser.error("give either --tokenizer or --model")
    return arguments


def learn(arguments: argparse.Namespace, directory: Path) -> tuple[list[Curve], list[str]]:
    """The curves, ours last, and what has to be said about them."""
    if arguments.model:
        model = locate(arguments.model)
    else:
        model = random_gpt2(directory / "gpt2", arguments.tokenizer)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    arena = Arena(
        directory=directory,
        threads=arguments.threads,
        pythons={},
        rows=4,
        length=min(arguments.length, config["n_positions"]),
    )
    train, held_out = hold_out(read_lines(arguments.text), arguments.documents)
    if arguments.validation:
        train, held_out = read_lines(arguments.text), read_lines(arguments.validation)
        held_out = random.Random(0).sample(held_out, min(arguments.documents, len(held_out)))
    prepare(arena, model, [arguments.dropout], train)
    reports = [train_one(arena, name, arguments) for name in CONTESTANTS]
    scorer = Scorer(arena.model(arguments.dropout), held_out, arena.length, arena.threads)
    start = scorer.loss(arena.adapter)
    notes = [
        f"{arguments.model or 'GPT-2 small, random weights'}; {arena.rows} x {arena.length} tokens "
        f"a step, LoRA rank 8, alpha 16 on c_attn, fp32, AdamW, learning rate "
        f"{arguments.learning_rate:g}, dropout {arguments.dropout:g}",
        f"{len(train):,} documents to train on; scored: {scorer.targets:,} tokens of "
        f"{len(scorer.documents)} held-out documents, without end-of-text tokens",
        f"{arguments.threads} threads, {cpu_name()}; "
        + ", ".join(f"{name} {version}" for name, version in reports[0].versions.items()),
        *(f"{LABELS[name]}: {REMARKS[name]}" for name in CONTESTANTS),
    ]
    return [curve_of(report, scorer, start) for report in reports], notes


def train_one(arena: Arena, name: str, arguments: argparse.Namespace) -> Report:
    """A contestant for all its minutes."""
    seconds = 60 * arguments.minutes
    report = arena.run(
        arena.job(
            name,
            arguments.dropout,
            warm_up=0,
            seconds=seconds,
            save_every=seconds / arguments.points,
            learning_rate=arguments.learning_rate,
        )
    )
    say(f"{LABELS[name]}: {len(report.seconds)} steps, {sum(report.tokens):,} tokens")
    return report


def to_json(curves: Sequence[Curve], notes: Sequence[str]) -> dict[str, Any]:
    return {"notes": list(notes), "curves": [asdict(curve) for curve in curves]}


def main() -> None:
    arguments = parse()
    with tempfile.TemporaryDirectory() as directory:
        curves, notes = learn(arguments, Path(directory))
    print(table(curves))
    print()
    print("\n".join(f"- {note}" for note in notes))
    best = all(curves[-1].last < curve.last for curve in curves[:-1])
    print(f"\n{'met' if best else 'NOT MET'}: the lowest loss after {arguments.minutes:g} minutes")
    if arguments.plot:
        draw(curves, arguments.plot)
    if arguments.json:
        arguments.json.write_text(json.dumps(to_json(curves, notes), indent=1), encoding="utf-8")
    sys.exit(0 if best else 1)


if __name__ == "__main__":
    main()
