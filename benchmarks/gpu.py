"""Speed and memory on the card that is here: this package and its peers, predicted and measured.

    python benchmarks/gpu.py --make-venv          # every configuration, each in its own process
    python benchmarks/gpu.py --predict-only --gpu rtx-4070-ti   # what it would run, anywhere
    python benchmarks/gpu.py --device cpu --quick # the same code on a CPU, with a tiny model

Both sides train full rows, with an adapter or in full, in bf16: `Trainer` of transformers with
peft, `SFTTrainer` of TRL, and the recipes of this package. Every configuration is first simulated
for this card and then run on it. After the comparison follow configurations of this package alone,
which show how exact the prediction is. What the prediction says does not fit is left out; what runs
out of memory nevertheless is a line of the table, and the next one runs. Last comes survival.py: a
run whose memory is taken, and one that is stopped and gone on with to the bit.

Weights are random: neither speed nor memory depends on their values. Exit code 1 if a prediction
is off by more than 1 %, or if anything fails. After `--minutes` nothing new is begun.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from capacity import NAMES, trl_python
from peers import SIMULATED, Failed, Found, Peer, Setup
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.utils import logging as transformers_logging

from lowvram.build import choose_numerics
from lowvram.errors import LowVRAMError
from lowvram.measurement import Measurement, measure, measure_here
from lowvram.memory import Card
from lowvram.memory.measure import format_gib
from lowvram.model import known_config
from lowvram.prediction import Predict, predictor
from lowvram.recipe import Recipe, load_recipe
from lowvram.rehearsal import BatchShape, pinned, rehearse
from lowvram.target import card_here, named_card

ALLOWED = 0.01
TINY = "tiny"
Tool = Literal["trainer", "trl", "lowvram"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A configuration of a tool. The peers take model, rows and method from the recipe."""

    tool: Tool = "lowvram"
    recipe: str
    model: str
    rows: int
    tokens: int = 1024
    checkpointing: bool = False
    changes: tuple[tuple[str, Any], ...] = ()
    precision: str | None = None
    """In place of the recipe's."""

    def __str__(self) -> str:
        changes = "".join(f", {key}={value}" for key, value in self.changes)
        on = ", checkpointing" if self.checkpointing else ""
        return f"{self.recipe}, {self.model}, {self.rows} x {self.tokens}{on}{changes}"

    @property
    def shape(self) -> BatchShape:
        return BatchShape(
            micro_batch_size=self.rows,
            seq_len=self.tokens,
            gradient_checkpointing=self.checkpointing,
        )


def compared(*tools: Tool, **case: Any) -> tuple[Case, ...]:
    """The same configuration of several tools, all under bf16 autocast."""
    return tuple(Case(tool=tool, precision="bf16", **case) for tool in tools)


ALL: tuple[Tool, ...] = ("trainer", "trl", "lowvram")
# As many rows as the Trainer gets into 12 GB, with TRL and this package at the same and at more.
SPEED = (
    *compared(*ALL, recipe="gpt2-lora", model="gpt2", rows=7),
    *compared(*ALL, recipe="gpt2-lora", model="gpt2", rows=14, checkpointing=True),
    *compared("trl", "lowvram", recipe="gpt2-lora", model="gpt2", rows=14),
    *compared("lowvram", recipe="gpt2-lora", model="gpt2", rows=32),
    *compared("trl", "lowvram", recipe="gpt2-lora", model="gpt2", rows=64, checkpointing=True),
    *compared(*ALL, recipe="gpt2-lora", model="gpt2-medium", rows=2),
    *compared(*ALL, recipe="gpt2-lora", model="gpt2-medium", rows=8, checkpointing=True),
    *compared(*ALL, recipe="gpt2-lora", model="gpt2-large", rows=4, checkpointing=True),
    *compared(*ALL, recipe="gpt2-lora", model="gpt2-xl", rows=2, checkpointing=True),
    *compared("lowvram", recipe="gpt2-xl-lora", model="gpt2-xl", rows=8, checkpointing=True),
    *compared(*ALL, recipe="gpt2-full", model="gpt2", rows=4),
)
EXACTNESS = (
    *(
        Case(recipe=recipe, model="gpt2", rows=rows, tokens=tokens, checkpointing=checkpointing)
        for recipe in ("gpt2-lora", "gpt2-full")
        for rows, tokens in ((8, 256), (4, 1024), (16, 1024))
        for checkpointing in (False, True)
    ),
    *(
        Case(recipe="gpt2-lora", model="gpt2", rows=8, changes=(change,))
        for change in (
            ("train.precision", "fp32"),
            ("train.precision", "fp16"),
            ("train.chunked_loss", False),
            ("model.fused_gelu", False),
            ("model.attention", "eager"),
            ("model.dtype", "int8"),
            ("model.dtype", "nf4"),
            ("method.name", "dora"),
            ("method.dropout", 0.1),
            ("data.packing", False),
        )
    ),
    *(
        Case(recipe="gpt2-full", model="gpt2", rows=8, tokens=512, changes=(change,))
        for change in (
            ("train.optimizer", "adamw"),
            ("train.optimizer", "lion8bit"),
            ("train.optimizer", "adafactor"),
            ("train.optimizer", "sgd"),
            ("train.optimizer", "paged_adamw8bit"),
        )
    ),
    Case(recipe="gpt2-medium-lora", model="gpt2-medium", rows=8),
    Case(recipe="gpt2-xl-nf4-lora", model="gpt2-xl", rows=4, checkpointing=True),
)
QUICK = (
    *compared(*ALL, recipe="gpt2-lora", model=TINY, rows=2, tokens=64),
    *compared(*ALL, recipe="gpt2-lora", model=TINY, rows=4, tokens=64, checkpointing=True),
    *compared(*ALL, recipe="gpt2-full", model=TINY, rows=2, tokens=64),
)


# --- one configuration ----------------------------------------------------------------------------


def config_of(model: str) -> PreTrainedConfig:
    if model == TINY:
        size = {"n_layer": 2, "n_head": 2, "n_embd": 64, "vocab_size": 512}
        return AutoConfig.for_model("gpt2", **size, bos_token_id=511, eos_token_id=511)
    return known_config(model)


def recipe_of(case: Case, directory: Path) -> Recipe:
    """With a directory that has the model's configuration in place of its name."""
    path = directory / case.model
    if not path.exists():
        config_of(case.model).save_pretrained(path)
    changes = {"model.name": str(path), **dict(case.changes)}
    if case.precision:
        changes["train.precision"] = case.precision
    return load_recipe(case.recipe, changes)


def write_weights(case: Case, directory: Path) -> None:
    path = directory / case.model
    if not (path / "model.safetensors").exists():
        AutoModelForCausalLM.from_config(config_of(case.model)).save_pretrained(
            path, max_shard_size="50GB"
        )


def setup_of(case: Case, recipe: Recipe) -> Setup:
    config, targets = config_of(case.model), recipe.method.target_modules
    assert case.tool != "lowvram"
    assert not isinstance(targets, str) or recipe.method.name == "full"
    return Setup(
        tool=case.tool,
        config={"model_type": config.model_type, **config.to_diff_dict()},
        rows=case.rows,
        tokens=case.tokens,
        checkpointing=case.checkpointing,
        rank=recipe.method.rank,
        alpha=recipe.method.alpha,
        targets=() if isinstance(targets, str) else targets,
    )


class HostMemory:
    """Stands for `torch.cuda` on a CPU, which has no such figures."""

    def mem_get_info(self) -> tuple[int, int]:
        return 0, 0

    def reset_peak_memory_stats(self) -> None:
        pass

    synchronize = reset_peak_memory_stats

    def max_memory_reserved(self) -> int:
        return 0

    max_memory_allocated = max_memory_reserved


def measure_ours(recipe: Recipe, shape: BatchShape, device: str) -> Measurement:
    if device == "cuda":
        return measure(recipe, shape)
    fixed = pinned(recipe, shape)
    return measure_here(lambda: rehearse(fixed, choose_numerics(fixed)), HostMemory())


@dataclass(frozen=True, kw_only=True)
class Line:
    """What came of a configuration. Sizes in bytes; 0: not known."""

    case: Case
    predicted: Found | None = None
    measured: Found | None = None
    flops_per_second: float = 0.0
    """That the training needs, whatever else the tool computes."""
    problem: str = ""

    @property
    def error(self) -> float | None:
        """Of what is reserved: predicted / measured - 1."""
        if self.predicted is None or self.measured is None or not self.measured.reserved_bytes:
            return None
        return self.predicted.reserved_bytes / self.measured.reserved_bytes - 1

    @property
    def is_right(self) -> bool:
        return not self.problem and (self.error is None or abs(self.error) <= ALLOWED)


def flops_per_token(config: PreTrainedConfig, method: str) -> int:
    """Of matrix products with weights: 2 N forward, 2 N for the gradients of the activations, and
    in full fine-tuning 2 N for those of the weights. Attention and recomputation are left out.

    N counts the embedding once: as the output head it is multiplied with, as the input it is not.
    """
    import torch

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return (6 if method == "full" else 4) * parameters


@dataclass(kw_only=True)
class Bench:
    """Where and with what configurations are run."""

    card: Card
    device: str
    """cuda or cpu; empty: predict only."""
    directory: Path
    """For models of random weights."""
    predict: Predict
    simulated: dict[str, Peer]
    pythons: dict[str, Path]

    def run(self, case: Case) -> Line | None:
        """None for what does not fit."""
        recipe = recipe_of(case, self.directory)
        try:
            predicted = self._predicted(case, recipe)
            if not predicted.fits:
                return None
            if not self.device:
                return Line(case=case, predicted=predicted)
            measured = self._measured(case, recipe)
        except (Failed, LowVRAMError) as error:
            return Line(case=case, problem=str(error).splitlines()[0])
        flops = flops_per_token(config_of(case.model), recipe.method.name)
        return Line(
            case=case,
            predicted=predicted,
            measured=measured,
            flops_per_second=measured.tokens_per_second * flops,
            problem="" if measured.fits else f"out of memory: {measured.error}",
        )

    def _predicted(self, case: Case, recipe: Recipe) -> Found:
        if case.tool != "lowvram":
            return self.simulated[case.tool].ask(setup_of(case, recipe), self.card)
        found = self.predict(recipe, case.shape)
        return Found(
            fits=found.fits,
            reserved_bytes=found.reserved_bytes,
            allocated_bytes=found.allocated_bytes,
        )

    def _measured(self, case: Case, recipe: Recipe) -> Found:
        if case.tool != "lowvram":
            with Peer(self.pythons[case.tool], self.device) as peer:
                return peer.ask(setup_of(case, recipe))
        write_weights(case, self.directory)
        found = measure_ours(recipe, case.shape, self.device)
        return Found(
            fits=found.fits,
            reserved_bytes=found.reserved_bytes,
            allocated_bytes=found.allocated_bytes,
            tokens_per_second=found.tokens_per_second,
            error=found.error or "",
        )


# --- the card's own rate --------------------------------------------------------------------------


def product_rate(device: str) -> float:
    """Floating-point operations per second of a large matrix product, the best of ten.

    On a card 8,192 x 8,192 in bf16, on a CPU 2,048 x 768 x 3,072 in fp32.
    """
    import torch

    rows, inner, columns = (8192, 8192, 8192) if device == "cuda" else (2048, 768, 3072)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    a = torch.randn(rows, inner, device=device, dtype=dtype)
    b = torch.randn(inner, columns, device=device, dtype=dtype)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    best = float("inf")
    for _ in range(13):  # the first are slower
        wait()
        started = time.perf_counter()
        a @ b
        wait()
        best = min(best, time.perf_counter() - started)
    return 2 * rows * inner * columns / best


def product_rate_elsewhere(device: str) -> float:
    """In a process of its own, which gives its memory back."""
    command = [sys.executable, __file__, "--rate", device]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


# --- printing -------------------------------------------------------------------------------------

HEADINGS = (
    "configuration",
    "tool",
    "tokens/s",
    "utilisation",
    "reserved: predicted",
    "measured",
    "error",
    "allocated: predicted",
    "measured",
)


def heading() -> str:
    return f"| {' | '.join(HEADINGS)} |\n|---|---|{'--:|' * (len(HEADINGS) - 2)}"


def row(line: Line, rate: float) -> str:
    """A row of the table; `rate` is the card's, in operations per second."""
    known = f"| {line.case} | {NAMES[line.case.tool]} |"
    if line.problem:
        return f"{known} {line.problem} |{' |' * (len(HEADINGS) - 3)}"
    assert line.predicted is not None
    found = line.measured or Found(fits=True)
    speed = f"{found.tokens_per_second:,.0f}" if found.tokens_per_second else ""
    used = f"{line.flops_per_second / rate:.0%}" if rate and line.flops_per_second else ""
    cells = (
        speed,
        used,
        size(line.predicted.reserved_bytes),
        size(found.reserved_bytes),
        "" if line.error is None else f"{line.error:+.2%}",
        size(line.predicted.allocated_bytes),
        size(found.allocated_bytes),
    )
    return f"{known} {' | '.join(cells)} |"


def size(size_bytes: int) -> str:
    return format_gib(size_bytes) if size_bytes else ""


def summary(lines: Sequence[Line]) -> list[str]:
    """How exact the predictions were, and what went wrong."""
    found = []
    errors = [(abs(line.error), line) for line in lines if line.error is not None]
    if errors:
        worst, line = max(errors, key=lambda pair: pair[0])
        found.append(
            f"largest error of what is reserved: {worst:.2%} ({NAMES[line.case.tool]}, "
            f"{line.case}), allowed {ALLOWED:.0%}"
        )
    return found + [f"{line.case}: {line.problem}" for line in lines if line.problem]


# --- running --------------------------------------------------------------------------------------


def run_all(bench: Bench, cases: Sequence[Case], minutes: float, rate: float) -> list[Line]:
    """In order, until the time is over."""
    print(heading(), flush=True)
    deadline = time.monotonic() + 60 * minutes
    lines: list[Line] = []
    too_large: list[str] = []
    for number, case in enumerate(cases):
        if time.monotonic() > deadline:
            left = len(cases) - number
            print(f"\n{left} configurations are left out: {minutes:g} minutes are over")
            break
        line = bench.run(case)
        if line is None:
            too_large.append(f"{NAMES[case.tool]}, {case}")
            continue
        lines.append(line)
        print(row(line, rate), flush=True)
    if too_large:
        print("\ndo not fit, by prediction: " + "; ".join(too_large))
    return lines


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--predict-only", action="store_true")
    parser.add_argument("--gpu", help="predict for a card that is not here")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="a tiny model")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--trl-python", type=Path, help="a Python with TRL and peft")
    parser.add_argument("--make-venv", action="store_true", help="make one, once")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--rate", help=argparse.SUPPRESS)
    return parser.parse_args()


def card_of(arguments: argparse.Namespace) -> Card:
    """The card to predict for: the one that is here, unless nothing is run on it."""
    elsewhere = arguments.predict_only or arguments.device == "cpu"
    if arguments.gpu and not elsewhere:
        sys.exit("--gpu: what is measured is the card that is here; add --predict-only")
    if elsewhere:
        card = named_card(arguments.gpu or "rtx-4070-ti", None)
    else:
        card = card_here()
    if card is None:
        sys.exit("no card here: add --predict-only --gpu NAME, or --device cpu --quick")
    return card


def cases_of(arguments: argparse.Namespace, pythons: dict[str, Path]) -> list[Case]:
    cases = QUICK if arguments.quick else (*SPEED, *EXACTNESS)
    return [case for case in cases if case.tool == "lowvram" or case.tool in pythons]


def survives(device: str) -> bool:
    """In a process of its own, which has the card for itself."""
    script = Path(__file__).with_name("survival.py")
    command = [sys.executable, str(script), "--device", device]
    return subprocess.run(command, check=False).returncode == 0


def main() -> None:
    arguments = parse()
    if arguments.rate:
        print(product_rate(arguments.rate))
        return
    transformers_logging.disable_progress_bar()
    card = card_of(arguments)
    device = "" if arguments.predict_only else arguments.device
    pythons = {"trainer": Path(sys.executable)}
    if python := trl_python(arguments.trl_python, arguments.make_venv):
        pythons["trl"] = python
    else:
        print("TRL is left out: give its Python with --trl-python, or --make-venv", file=sys.stderr)
    rate = product_rate_elsewhere(device) if device else 0.0
    print(f"{card.name}, {format_gib(card.budget())} for the allocator")
    if rate:
        print(f"a large matrix product: {rate / 1e12:.3g} TFLOP/s, the 100 % of the utilisation")
    print()
    with ExitStack() as stack:
        bench = Bench(
            card=card,
            device=device,
            directory=Path(stack.enter_context(tempfile.TemporaryDirectory())),
            predict=stack.enter_context(predictor(card)),
            simulated={
                tool: stack.enter_context(Peer(path, SIMULATED)) for tool, path in pythons.items()
            },
            pythons=pythons,
        )
        lines = run_all(bench, cases_of(arguments, pythons), arguments.minutes, rate)
    print("\n".join(["", *summary(lines)]))
    if arguments.json:
        found = {"card": card.slug, "rate": rate, "lines": [asdict(line) for line in lines]}
        arguments.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    survived = not device or survives(device)
    sys.exit(0 if survived and all(line.is_right for line in lines) else 1)


if __name__ == "__main__":
    main()
