"""On the card that is here: a run that loses most of its memory, and one that is stopped, go on.

    python benchmarks/survival.py                 # GPT-2 small with random weights, minutes
    python benchmarks/survival.py --device cpu    # the same code on a CPU, where failures are faked

1. Nothing happens. 2. After three steps something else takes nearly all memory of the card that is
left: the run has to go on with smaller micro-batches to the same losses, up to rounding. 3. With
train.deterministic: one run straight through, one that is stopped and gone on with; adapter,
optimizer state and losses have to be the same to the bit. Exit code 1 if not. gpu.py runs it last.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import signal
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from lowvram.data.reference import reference_documents, reference_topics
from lowvram.display import Display
from lowvram.errors import Interrupted
from lowvram.memory.measure import format_gib
from lowvram.model import locate
from lowvram.recipe import Recipe, load_recipe
from lowvram.run import run

TRAIN = import_module("lowvram.train")
QUIET = Display(Console(quiet=True), quiet=True)
STEPS, AFTER = 8, 3
LEFT_BYTES = 600 * 2**20
"""Of the card, to go on with: less than what a micro-batch of all rows takes."""
ALLOWED = 2e-2
"""Of a loss under bf16 autocast, relative; in fp32 rounding is a thousand times less."""


def make_recipe(directory: Path, device: str) -> Callable[..., Recipe]:
    tokenizer = AutoTokenizer.from_pretrained(locate("embedded:gpt2-docstrings"))
    small = {"n_layer": 2, "n_embd": 64, "n_head": 2, "n_positions": 128} if device == "cpu" else {}
    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(**small, **quiet)).save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")
    text = "\n".join(" ".join(part.split()) for part in reference_documents(reference_topics()))
    (directory / "text.txt").write_text(text, encoding="utf-8")
    settings = {
        "model.name": str(directory / "model"),
        "data.source": str(directory / "text.txt"),
        "train.global_batch_size": 32 if device == "cuda" else 8,
        "fit.micro_batch_size": 32 if device == "cuda" else 8,
        "fit.max_seq_len": 512 if device == "cuda" else 64,
        "train.max_steps": STEPS,
        "train.eval_every": None,
        "evaluate.max_tokens": 2048,
    }
    return lambda name, **changes: load_recipe(
        "gpt2-lora", settings | {"output_dir": str(directory / name)} | changes
    )


class After:
    """Do `act` once, when so many steps have been taken."""

    def __init__(self, steps: int, act: Callable[[], Any]) -> None:
        self.steps, self.act, self.original = steps, act, TRAIN.train_step

    def __enter__(self) -> None:
        TRAIN.train_step = self.step

    def __exit__(self, *_: object) -> None:
        TRAIN.train_step = self.original

    def step(self, *arguments: Any) -> Any:
        metrics = self.original(*arguments)
        if metrics.step == self.steps:
            self.steps = -1
            self.act()
        return metrics


def take_memory(device: str, held: list[Any]) -> None:
    """All of the card but LEFT_BYTES; on a CPU, whose memory is not to be filled, a pretence."""
    if device == "cuda":
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        held.append(torch.empty(free - LEFT_BYTES, dtype=torch.uint8, device="cuda"))
        return
    original = TRAIN.token_loss

    def token_loss(model: Any, ids: torch.Tensor, *rest: Any, **options: Any) -> Any:
        if len(ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. (not really)")
        return original(model, ids, *rest, **options)

    TRAIN.token_loss = token_loss
    held.append(original)


def losses_of(recipe: Recipe) -> list[float]:
    lines = (Path(recipe.output_dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


def end_of(recipe: Recipe) -> dict[str, str]:
    directory = Path(recipe.output_dir)
    newest = sorted((directory / "checkpoints").iterdir())[-1]
    files = [newest / "trained.safetensors", newest / "optimizer.safetensors"]
    files.append(directory / "adapter" / "adapter_model.safetensors")
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def short_of_memory(make: Callable[..., Recipe], device: str) -> bool:
    undisturbed, recipe = make("undisturbed"), make("short")
    held: list[Any] = []
    run(undisturbed, display=QUIET)
    with After(AFTER, lambda: take_memory(device, held)):
        result = run(recipe, display=QUIET)
    if device == "cpu":
        TRAIN.token_loss = held[0]
    held.clear()
    failures = [event for event in result.events if event["event"] == "out of memory"]
    pairs = zip(losses_of(recipe), losses_of(undisturbed), strict=True)
    difference = max(abs(one / other - 1) for one, other in pairs)
    good = bool(failures) and difference <= ALLOWED
    print(
        f"memory taken after step {AFTER}: {len(failures)} failures, micro-batches of "
        f"{failures[0]['micro_batch_size'] if failures else '-'} to "
        f"{result.fit['micro_batch_size']}, largest difference of a loss {difference:.1e} "
        f"(allowed {ALLOWED:g}), {format_gib(LEFT_BYTES)} were left: {'good' if good else 'BAD'}"
    )
    return good


def stopped(make: Callable[..., Recipe]) -> bool:
    exact = {"train.deterministic": True, "method.dropout": 0.1}
    straight, recipe = make("straight", **exact), make("stopped", **exact)
    run(straight, display=QUIET)
    try:
        with After(AFTER, lambda: signal.raise_signal(signal.SIGINT)):
            run(recipe, display=QUIET)
    except Interrupted:
        run(recipe, resume=True, display=QUIET)
    good = end_of(recipe) == end_of(straight) and losses_of(recipe) == losses_of(straight)
    print(f"stopped after step {AFTER} and gone on with, to the bit: {'good' if good else 'BAD'}")
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    device = parser.parse_args().device
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("survival.py: there is no card here; --device cpu tries its code")
    with tempfile.TemporaryDirectory(prefix="lowvram-survival-") as place:
        make = make_recipe(Path(place), device)
        found = [short_of_memory(make, device), stopped(make)]
    sys.exit(not all(found))


if __name__ == "__main__":
    main()
