"""How much memory a run really takes of its host, beside what the plan says it takes at most.

    python benchmarks/host_memory.py    # a table; minutes on a CPU

Each run is the `lowvram` command in a process of its own, on a model of GPT-2's size with random
weights; the system tells the peak of its resident memory. Exit code 1 if a run took more than its
plan said.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from lowvram.data.reference import reference_documents, reference_topics
from lowvram.model import locate

CASES: dict[str, dict[str, Any]] = {
    "gpt2-lora": {},
    "gpt2-lora, one row of 256 at a time": {"fit.max_seq_len": 256, "fit.micro_batch_size": 1},
    "gpt2-full": {},
    "gpt2-full, adamw": {"train.optimizer": "adamw"},
}
COMMON = {
    "data.format": "document",
    "data.validation_fraction": 0,
    "train.global_batch_size": 2,
    "train.max_steps": 2,
    "evaluate.max_tokens": 2048,
    "fit.micro_batch_size": "auto",
}


def make_model(directory: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(locate("embedded:gpt2-docstrings"))
    GPT2LMHeadModel(GPT2Config()).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def peak_of(command: list[str], said: Path) -> int:
    """Bytes; the command has to end well."""
    with said.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(said.read_text(encoding="utf-8")[-2000:])
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def stated(text: str) -> int:
    match = re.search(r"up to ([\d.]+) (MiB|GiB) of memory", text)
    assert match is not None, text
    return int(float(match[1]) * {"MiB": 2**20, "GiB": 2**30}[match[2]])


def main() -> None:
    print("| run on a CPU | stated, at most | measured | share |\n|---|---|---|---|")
    broken = False
    with tempfile.TemporaryDirectory(prefix="lowvram-host-") as place:
        directory = Path(place)
        make_model(directory / "model")
        text = "\n".join(reference_documents(reference_topics()))
        (directory / "text.txt").write_text(text, encoding="utf-8")
        for number, (case, changes) in enumerate(CASES.items()):
            settings = COMMON | changes | {
                "model.name": directory / "model",
                "data.source": directory / "text.txt",
                "output_dir": directory / str(number),
            }  # fmt: skip
            command = [sys.executable, "-m", "lowvram", "run", case.split(",")[0]]
            for key, value in settings.items():
                command += ["--set", f"{key}={value}"]
            said = directory / f"{number}.txt"
            measured = peak_of(command, said)
            limit = stated(said.read_text(encoding="utf-8"))
            broken |= measured > limit
            sizes = f"{limit / 2**20:,.0f} MiB | {measured / 2**20:,.0f} MiB"
            print(f"| {case} | {sizes} | {measured / limit:.2f} |", flush=True)
    sys.exit(broken)


if __name__ == "__main__":
    main()
