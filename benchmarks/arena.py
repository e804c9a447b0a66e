"""What the side-by-side benchmarks share: a place to run in, and the processes that run there.

A contestant is a process of `contestants.py`, started with the Python that has its library. Peers
that this project does not depend on have virtual environments of their own, made once and kept.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from contestants import Job, Report, make_adapter
from memory_accuracy import venv_python

ROOT = Path(__file__).resolve().parents[1]
CONTESTANTS = ROOT / "benchmarks" / "contestants.py"
CONSTRAINTS = ROOT / "constraints.txt"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Peer:
    """A tool that is compared with, and what pip installs for it."""

    name: str
    packages: tuple[str, ...]
    constrained: bool
    """Whether it goes with the versions that this project pins."""


PEERS = (
    Peer("trl", ("trl==1.16.0", "peft"), constrained=True),
    Peer("bengo", ("bengo==0.3.0",), constrained=False),
    Peer("soup", ("soup-cli[train]==0.77.0",), constrained=False),
)


class Failed(Exception):
    """A contestant's process ended without a report; the message is what it died of."""


# --- the place ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Arena:
    """A directory with the model once for each dropout, the common adapter, and the text."""

    directory: Path
    threads: int
    pythons: dict[str, Path]
    """Of peers; all others run in this one."""
    rows: int
    length: int

    @property
    def adapter(self) -> Path:
        return self.directory / "adapter.safetensors"

    @property
    def text(self) -> Path:
        return self.directory / "text.txt"

    def model(self, dropout: float) -> Path:
        return self.directory / f"model-{dropout:g}"

    def job(self, contestant: str, dropout: float, **options: object) -> Job:
        """A job with the arena's paths and shape; `options` are further fields of Job."""
        return Job(
            contestant=contestant,
            model=str(self.model(dropout)),
            adapter=str(self.adapter),
            text=str(self.text),
            work=tempfile.mkdtemp(dir=self.directory),
            rows=self.rows,
            length=self.length,
            **options,  # type: ignore[arg-type]
        )

    def run(self, job: Job) -> Report:
        """The report of a contestant's process. Raises Failed with the last line of its error."""
        python = self.pythons.get(job.contestant, Path(sys.executable))
        process = subprocess.run(
            [str(python), str(CONTESTANTS)],
            input=json.dumps(dataclasses.asdict(job)),
            env=self.environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        lines = process.stdout.strip().splitlines()
        if process.returncode < 0:
            raise Failed(f"killed by signal {-process.returncode}; 9 may stand for want of memory")
        if process.returncode != 0 or not lines:
            raise Failed(last_error(process.stderr) or f"exit code {process.returncode}")
        return Report(**json.loads(lines[-1]))

    def environment(self) -> dict[str, str]:
        """Caches that begin empty, all cores, no hub."""
        return os.environ | {
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": str(self.threads),
            "HF_HOME": str(self.directory / "cache"),
            "XDG_CACHE_HOME": str(self.directory / "cache"),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "true",
        }


def say(text: str) -> None:
    """Progress, beside the result."""
    print(text, file=sys.stderr, flush=True)


def last_error(text: str) -> str:
    """The last line that names an exception, or the last line of all."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Exit)\b", line)]
    return next(reversed(errors or lines), "")


def prepare(arena: Arena, model: Path, dropouts: Sequence[float], lines: Sequence[str]) -> None:
    """Fill the arena's directory. `model` has config, weights and tokenizer."""
    arena.directory.mkdir(parents=True, exist_ok=True)
    for dropout in dropouts:
        with_dropout(model, arena.model(dropout), dropout)
    make_adapter(model, arena.adapter)
    arena.text.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def with_dropout(model: Path, directory: Path, dropout: float) -> None:
    """The same model with another dropout in its config; weights are linked, not copied."""
    directory.mkdir(exist_ok=True)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config |= dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), dropout)
    (directory / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    for name in TOKENIZER_FILES:
        if (model / name).is_file():
            shutil.copyfile(model / name, directory / name)
    target = directory / WEIGHTS
    target.unlink(missing_ok=True)
    try:
        os.link(model / WEIGHTS, target)
    except OSError:
        shutil.copyfile(model / WEIGHTS, target)


def random_gpt2(directory: Path, tokenizer: Path) -> Path:
    """GPT-2 small with random weights and the tokenizer of that directory."""
    from transformers import GPT2Config, GPT2LMHeadModel, set_seed

    found = [tokenizer / name for name in TOKENIZER_FILES if (tokenizer / name).is_file()]
    if not found:
        raise SystemExit(
            f"--tokenizer {tokenizer}: has none of {', '.join(TOKENIZER_FILES)}; "
            "name the directory of GPT-2's tokenizer"
        )
    set_seed(0)
    GPT2LMHeadModel(GPT2Config()).save_pretrained(directory)
    for path in found:
        shutil.copyfile(path, directory / path.name)
    return directory


def read_lines(path: Path, most: int | None = None) -> list[str]:
    """The documents of a text file, a line each, blank ones left out."""
    lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    return lines[:most]


# --- peers' Pythons -------------------------------------------------------------------------------


def peer_directory(peer: Peer) -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "lowvram" / peer.packages[0].replace("==", "-")


def make_venv(peer: Peer, directory: Path) -> None:
    """Make the environment, or finish one whose installation was interrupted."""
    say(f"installing {' '.join(peer.packages)} into {directory}")
    subprocess.run([sys.executable, "-m", "venv", str(directory)], check=True)
    pip = [str(venv_python(directory)), "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "--constraint", str(CONSTRAINTS), "torch"], check=True)
    constraint = ["--constraint", str(CONSTRAINTS)] if peer.constrained else []
    subprocess.run([*pip, *constraint, *peer.packages], check=True)


def find_pythons(given: dict[str, Path | None], make: bool) -> dict[str, Path]:
    """The Python of each peer that has one: given, made before, or made now if asked for."""
    found: dict[str, Path] = {}
    for peer in PEERS:
        python = given.get(peer.name)
        if python is None:
            directory = peer_directory(peer)
            if make:
                make_venv(peer, directory)
            python = venv_python(directory)
        if python.exists():
            found[peer.name] = python
        else:
            say(
                f"{peer.name} is left out, for want of a Python with {peer.packages[0]}: give one "
                f"with --{peer.name}-python, or --make-venvs once"
            )
    return found
