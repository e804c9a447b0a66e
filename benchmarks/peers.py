"""The tools that are compared with: what a training step of theirs takes, simulated or measured.

    python benchmarks/peers.py            # answers questions on its standard input, a line each

`capacity.py` and `gpu.py` start it, with the Python that has the tool. So this file needs torch,
transformers, datasets and peft, trl for its trainer, and of lowvram only `lowvram.memory`.

Nothing of the tools is written anew: `Trainer.train` of transformers and `SFTTrainer.train` of TRL
run as they are, in the simulation too, over full rows without padding. TRL's loss is a Triton
kernel, for which there is no simulated card; it writes into tensors that TRL has made before, and
asks the allocator for nothing, so that in a simulation it is left out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

from lowvram.memory import Card

ROOT = Path(__file__).resolve().parents[1]
SIMULATED = "simulated"
"""The type of the simulated device; accelerate takes it from `ACCELERATE_TORCH_DEVICE`."""
STEPS = 3
"""The optimizer's states are made in the first; the second is the first that has them all along."""
TIMED_STEPS = 3
_UNLIMITED = 1 << 45
_CARD = [
    field.name for field in dataclasses.fields(Card) if field.name not in ("estimated", "sources")
]


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A training step of a tool; what is not here is the tool's default."""

    tool: Literal["trainer", "trl"]
    config: dict[str, Any]
    """Of the model, as in config.json."""
    rows: int
    tokens: int
    """Of a row."""
    checkpointing: bool
    base: Literal["fp32", "bf16"] = "fp32"
    """Of the frozen weights; the step is under bf16 autocast either way."""
    rank: int = 8
    alpha: float = 16
    targets: tuple[str, ...] = ("c_attn",)
    """Layers with an adapter; none: every weight is trained."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """Sizes in bytes, of the allocator."""

    fits: bool
    reserved_bytes: int = 0
    allocated_bytes: int = 0
    tokens_per_second: float = 0.0
    """Of the steps after the warm-up; 0 in a simulation."""
    error: str = ""
    """What the card said, if it does not fit."""


class Failed(Exception):
    """The process of a tool ended, or said why it has no answer."""


# --- the tools ------------------------------------------------------------------------------------


def make_trainer(setup: Setup, directory: str, steps: int, device: str) -> Any:
    """The tool's trainer, ready for `train`."""
    from datasets import Dataset

    row = {"input_ids": 0, "attention_mask": 1, "labels": 0}
    data = {name: [[value] * setup.tokens] * (setup.rows * steps) for name, value in row.items()}
    options = {
        "output_dir": directory,
        "per_device_train_batch_size": setup.rows,
        "max_steps": steps,
        "gradient_checkpointing": setup.checkpointing,
        "bf16": device != "cpu",
        "use_cpu": device == "cpu",
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    make = {"trainer": _transformers_trainer, "trl": _trl_trainer}[setup.tool]
    return make(setup, _model(setup, device), Dataset.from_dict(data), options)


def _model(setup: Setup, device: str) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[setup.base]
    with torch.device("cpu" if device == SIMULATED else device):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**setup.config), dtype=dtype)


def _adapter(setup: Setup) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=setup.rank,
        lora_alpha=setup.alpha,
        target_modules=list(setup.targets),
        fan_in_fan_out=setup.config["model_type"] == "gpt2",
    )


def _transformers_trainer(setup: Setup, model: Any, data: Any, options: dict[str, Any]) -> Any:
    from peft import get_peft_model
    from transformers import Trainer, TrainingArguments

    if setup.targets:
        model = get_peft_model(model, _adapter(setup))
    return Trainer(model=model, args=TrainingArguments(**options), train_dataset=data)


def _trl_trainer(setup: Setup, model: Any, data: Any, options: dict[str, Any]) -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    words = models.WordLevel({"a": 0, "</s>": 1}, unk_token="a")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words), eos_token="</s>", pad_token="</s>"
    )
    prepared = {"skip_prepare_dataset": True}  # rows are full, as `packing_strategy: wrapped` makes
    return SFTTrainer(
        model=model,
        args=SFTConfig(**options, max_length=setup.tokens, dataset_kwargs=prepared),
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=_adapter(setup) if setup.targets else None,
    )


def dropouts(model: Any) -> list[float]:
    """The probability of every dropout of a model."""
    import torch

    return [layer.p for layer in model.modules() if isinstance(layer, torch.nn.Dropout)]


# --- simulated ------------------------------------------------------------------------------------


def simulated(setup: Setup, card: dict[str, Any]) -> Found:
    """On a card that is not here, given by the fields of `lowvram.memory.Card`.

    What stays below the card's budget never meets it; what goes above may still fit, since the
    allocator gives back what it keeps for later before it fails.
    """
    from lowvram.memory import simulate

    given = Card(**card | {"compute_capability": tuple(card["compute_capability"])})
    budget = given.budget()
    held = given.total_bytes - given.context_bytes - _UNLIMITED
    _pretend_bf16()
    if setup.tool == "trl":
        _leave_out_triton()

    def trace(card: Card) -> Any:
        with tempfile.TemporaryDirectory() as directory:
            return simulate(
                lambda device: make_trainer(setup, directory, STEPS, device.type),
                lambda trainer: trainer.train(),
                steps=1,  # of the simulation; the trainer takes its own
                card=card,
            )

    found = trace(dataclasses.replace(given, held_bytes=held))
    fits = found.peak_reserved_bytes <= budget
    if not fits and found.peak_allocated_bytes <= budget:
        limited = trace(given)
        if limited.out_of_memory is None:
            found, fits = limited, True
    return Found(
        fits=fits,
        reserved_bytes=found.peak_reserved_bytes,
        allocated_bytes=found.peak_allocated_bytes,
    )


def _pretend_bf16() -> None:
    """transformers asks CUDA, Ascend and others in turn, and there is none of them."""
    import transformers.training_args

    transformers.training_args.is_torch_bf16_gpu_available = lambda: True


def _leave_out_triton() -> None:
    """Take TRL's way on CUDA, with kernels that do nothing."""
    import trl.kernels.chunked_logprob as kernels
    import trl.trainer.utils as utils

    kernels._use_triton = utils._use_triton = lambda device: True
    kernels._forward_kernel = kernels._backward_kernel = _Kernel()
    kernels.triton = SimpleNamespace(cdiv=lambda a, b: -(-a // b))
    kernels._addmm_fp32 = lambda acc, a, b: None  # on CUDA one product, added in place


class _Kernel:
    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *_, **__: None


# --- measured -------------------------------------------------------------------------------------


def measured(setup: Setup, device: str) -> Found:
    """Real steps, on "cuda" or "cpu"."""
    from lowvram.memory.measure import is_out_of_memory

    try:
        return _measured(setup, device)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        said = str(error) or "out of memory"
        return Found(fits=False, error=said.splitlines()[0].split(". ")[0])


def _measured(setup: Setup, device: str) -> Found:
    import torch
    from transformers import TrainerCallback

    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if device == "cuda":
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as directory:
        trainer = make_trainer(setup, directory, STEPS + TIMED_STEPS, device)
        trainer.add_callback(Clock())
        trainer.train()
    seconds = (ends[-1] - ends[-1 - TIMED_STEPS]) / TIMED_STEPS
    on_card = device == "cuda"
    return Found(
        fits=True,
        reserved_bytes=torch.cuda.max_memory_reserved() if on_card else 0,
        allocated_bytes=torch.cuda.max_memory_allocated() if on_card else 0,
        tokens_per_second=setup.rows * setup.tokens / seconds,
    )


# --- the process ----------------------------------------------------------------------------------


class Peer:
    """A process of this file, that answers one question after another."""

    def __init__(self, python: Path, device: str) -> None:
        """`device`: simulated, cuda or cpu; a card that is here is hidden from the first."""
        self.device = device
        environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        if device == SIMULATED:
            environment |= {"ACCELERATE_TORCH_DEVICE": SIMULATED, "CUDA_VISIBLE_DEVICES": ""}
        self._said = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [str(python), __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            env=environment,
            text=True,
        )

    def ask(self, setup: Setup, card: Card | None = None) -> Found:
        """`card` is for a simulation. Raises Failed where there is no answer, with the reason."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        question = {
            "setup": asdict(setup),
            "card": card and {name: getattr(card, name) for name in _CARD},
            "device": self.device,
        }
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except OSError:
            answer = ""
        if not answer:
            raise Failed(self._last_words())
        found = json.loads(answer)
        if "failed" in found:
            raise Failed(found["failed"])
        return Found(**found)

    def _last_words(self) -> str:
        code = self._process.wait()
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").split("\n")
        return next((line for line in reversed(lines) if line.strip()), f"exit code {code}")

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        for file in (self._process.stdin, self._process.stdout, self._said):
            if file is not None:
                with contextlib.suppress(OSError):  # a question that nobody has read
                    file.close()


def answer(question: dict[str, Any]) -> dict[str, Any]:
    setup = Setup(**question["setup"] | {"targets": tuple(question["setup"]["targets"])})
    try:
        if question["device"] == SIMULATED:
            return asdict(simulated(setup, question["card"]))
        return asdict(measured(setup, question["device"]))
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:200]}


def main() -> None:
    output = os.dup(1)
    os.dup2(2, 1)  # libraries that print must not mix with the answers
    with os.fdopen(output, "w") as answers:
        for line in sys.stdin:
            answers.write(json.dumps(answer(json.loads(line))) + "\n")
            answers.flush()


if __name__ == "__main__":
    main()
