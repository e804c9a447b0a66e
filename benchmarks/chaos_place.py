"""Where runs are tormented: a tiny model, a text, recipes, and what has to hold of a run."""

from __future__ import annotations

import hashlib
import json
import signal
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from chaos_command import Ended, Failure

STEPS = 6
TIMES = {"seconds", "tokens_per_second"}
OF_THE_PLACE = {
    "seconds",
    "tokens_per_second",
    "memory",
    "events",
    "output_dir",
    "notes",
    "recipe_sha256",
}

SCENARIOS: dict[str, dict[str, Any]] = {
    "lora, adamw8bit": {"train.optimizer": "adamw8bit", "method.rank": 128},
    "lora, adamw, no packing": {"train.optimizer": "adamw", "data.packing": False},
    "lora, fp16": {"train.precision": "fp16", "train.optimizer": "paged_adamw8bit"},
    "lora, bf16, best kept": {
        "train.precision": "bf16",
        "train.keep_best": True,
        "train.keep_last": 1,
    },
    "lora on nf4, lion8bit": {"model.dtype": "nf4", "train.optimizer": "lion8bit"},
    "dora, adafactor": {"method.name": "dora", "train.optimizer": "adafactor"},
    "full, adamw8bit": {"method.name": "full", "train.optimizer": "adamw8bit"},
    "full, fused, sgd": {
        "method.name": "full",
        "train.optimizer": "sgd",
        "train.fused_backward": True,
        "train.max_grad_norm": None,
        "fit.micro_batch_size": 4,
    },
}
COMMON = {
    "train.global_batch_size": 4,
    "fit.micro_batch_size": 2,
    "train.max_steps": STEPS,
    "train.learning_rate": 1e-2,
    "train.eval_every": 2,
    "train.save_every": 2,
    "generate.max_new_tokens": 4,
}


@dataclass(kw_only=True)
class Place:
    """A directory with a tiny model, a text, and a recipe for each scenario."""

    directory: Path
    references: dict[str, Reference] = field(default_factory=dict)

    def recipe(self, scenario: str) -> Path:
        return self.directory / f"{list(SCENARIOS).index(scenario)}.yaml"


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What a run gives that nothing happens to."""

    end: dict[str, str]
    calls: int
    seconds: float


def make_place(directory: Path) -> Place:
    import torch
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    from lowvram.data.reference import reference_documents, reference_topics
    from lowvram.model import locate
    from lowvram.recipe import dump_recipe, load_recipe

    tokenizer = AutoTokenizer.from_pretrained(locate("embedded:gpt2-docstrings"))
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        initializer_range=0.2,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    GPT2LMHeadModel(config).save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")
    documents = islice(reference_documents(reference_topics()), 40)
    lines = [" ".join(document.split())[:90] for document in documents]
    (directory / "text.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    place = Place(directory=directory)
    first = directory / "first.yaml"
    first.write_text("model: {name: x}\ndata: {source: x}\n", encoding="utf-8")
    for scenario, changes in SCENARIOS.items():
        names = {"model.name": str(directory / "model"), "data.source": str(directory / "text.txt")}
        dropout = {} if changes.get("method.name") == "full" else {"method.dropout": 0.1}
        recipe = load_recipe(first, {**COMMON, **dropout, **names, **changes})
        place.recipe(scenario).write_text(dump_recipe(recipe), encoding="utf-8")
    return place


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def end_of(run: Path) -> dict[str, str]:
    """Of a finished run, everything that must not depend on what happened on the way."""
    found = {}
    for part in (run / "adapter", run / "merged", *sorted((run / "checkpoints").iterdir())[-1:]):
        if part.is_dir():
            found |= {
                f"{part.name}/{p.name}": sha256(p)
                for p in part.iterdir()
                if p.name != "manifest.json"
            }
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    found["metrics"] = json.dumps(steps)
    found["result"] = json.dumps({k: v for k, v in result.items() if k not in OF_THE_PLACE})
    found["start"] = (run / "start.json").read_text(encoding="utf-8")
    return found


def check_visible(run: Path, reference: Reference) -> None:
    """Whatever there is under its own name is whole."""
    from lowvram.checkpoint import OPTIMIZER_FILE, STATE_FILE, WEIGHTS_FILE
    from lowvram.disk import check_manifest

    if (run / "checkpoints").is_dir():
        for path in (run / "checkpoints").glob("step-*"):
            try:
                check_manifest(path, (WEIGHTS_FILE, OPTIMIZER_FILE, STATE_FILE))
            except (OSError, ValueError) as error:
                raise Failure(f"{path.name} is visible and not whole: {error}") from error
    for part in ("adapter", "merged"):
        if (run / part).is_dir():
            found = {f"{part}/{path.name}": sha256(path) for path in (run / part).iterdir()}
            wanted = {
                key: value for key, value in reference.end.items() if key.startswith(f"{part}/")
            }
            if found != wanted:
                raise Failure(f"{part} is visible and not what it has to be")
    if (run / "result.json").exists():
        compare(end_of(run), reference.end)


def compare(found: dict[str, str], wanted: dict[str, str]) -> None:
    different = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
    if different:
        raise Failure(f"differs from a run that nothing happened to: {', '.join(different)}")


def check_said(ended: Ended) -> None:
    """A command that was not killed says in its own words what is wrong."""
    if "Traceback" in ended.said or ended.code not in (0, 3, 4, 5, 9, -signal.SIGKILL):
        raise Failure(f"exit code {ended.code}: {ended.said[-2000:]}")
    if ended.code > 0 and not ended.said.rpartition("note: ")[2].count("error: "):
        raise Failure(f"exit code {ended.code} without a reason: {ended.said[-2000:]}")


def flags_asked_for(ended: Ended) -> list[str]:
    """What a message about the directory says to add."""
    if ended.code == 5 and "holds an unfinished run" in ended.said:
        return ["--resume"]
    if ended.code == 5 and "allow it with --overwrite" in ended.said:
        return ["--overwrite"]
    return []
