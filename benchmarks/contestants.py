"""One contestant of a side-by-side benchmark, in a process of its own.

    python benchmarks/contestants.py < job.json

reads a Job from standard input, trains, and writes a Report as the last line of standard output.
`throughput.py` and `learning.py` start it, each contestant with the Python that has its library;
so this file imports nothing but torch, numpy and what the contestant asked for needs. All train
the same adapter from the same weights with the same optimizer; what a library sets by itself and
cannot be made equal is said in `REMARKS`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RANK, ALPHA = 8, 16
TARGET = "c_attn"
LEARNING_RATE = 2e-4
ENDLESS = 100_000
"""Steps, for trainers that have to be told a number; the watch stops them."""

REMARKS = {
    "tutorial": "every line padded to the full length; no end-of-text token is learned",
    "trainer": "documents joined by end-of-text tokens and cut; attention crosses borders",
    "trl": "documents packed whole; attention keeps them apart; its own loss without all logits",
    "bengo": "not packed: as many lines a step as make about as many tokens, padded to the longest",
    "soup": "TRL below 1.0 underneath, packed; loss from all logits",
    "lowvram-same": "the very batches of Trainer-packed; attention crosses borders as there",
    "lowvram": "as it ships: documents packed, attention keeps them apart",
    "lowvram-compiled": "as the row above of the same batches, decoder through torch.compile",
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to run. Paths are directories or files that exist already, but for `record`."""

    contestant: str
    model: str
    """A directory with config, weights and tokenizer; its config has the dropout."""
    adapter: str
    """safetensors with the adapter that every contestant starts from."""
    text: str
    """A file with a document a line."""
    work: str
    """A directory for what trainers insist on writing."""
    rows: int = 4
    length: int = 512
    learning_rate: float = LEARNING_RATE
    warm_up: int = 1
    steps: int = 1
    """Steps after the warm-up, at least."""
    seconds: float = 0.0
    """Go on until the steps after the warm-up have taken this long."""
    record: str = ""
    """Write the batches that were trained on to this file."""
    replay: str = ""
    """Train on the batches of this file instead."""
    profile: bool = False
    """Count the bytes of live tensors in the last step."""
    save_every: float = 0.0
    """Seconds of training between adapters that are written to `work`; 0 writes none."""


@dataclass(kw_only=True)
class Report:
    """What came of a job; a step's seconds run from the end of the one before."""

    contestant: str
    warm_up: int
    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    """Of each step, without padding."""
    losses: list[float] = field(default_factory=list)
    """Means over the targets of a step, in nats."""
    resident_bytes: int = 0
    """The highest of the process, over its whole life."""
    live_bytes: int = 0
    """The highest of all tensors together in the profiled step; 0 if none was."""
    saved: list[tuple[float, str]] = field(default_factory=list)
    """Seconds of training and the adapter file that was written then."""
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def measured(self) -> list[tuple[int, float]]:
        """Tokens and seconds of the steps after the warm-up."""
        pairs = list(zip(self.tokens, self.seconds, strict=True))
        return pairs[self.warm_up :]


# --- watching -------------------------------------------------------------------------------------


class Watch:
    """Times steps, counts tokens, keeps losses and batches, and says when it is enough."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.report = Report(contestant=job.contestant, warm_up=job.warm_up)
        self.batches: dict[str, Any] = {}
        self.per_target = 1.0
        self.model: Any = None
        self.profiler: Any = None
        self.live_before = 0
        self.trained = 0.0

    def start(self, model: Any) -> None:
        """Training begins now, from the common adapter."""
        self.model = model
        load_adapter(model, Path(self.job.adapter))
        self.begin()

    def begin(self) -> None:
        """A step begins: with the profiler if it is the last one."""
        steps = len(self.report.seconds)
        if self.job.profile and steps == self.job.warm_up + self.job.steps - 1:
            self.live_before = live_tensor_bytes()
            self.profiler = start_profiler()
        self.last = time.perf_counter()

    def batch(self, inputs: dict[str, Any]) -> None:
        """Count, and if asked for keep, what a Trainer's step is about to be trained on.

        For GPT-2, Trainer divides the loss by all labels, the first of each row included, although
        it is no target: there is nothing before it. `per_target` makes it a mean over targets.
        """
        ids, mask, labels = inputs["input_ids"], inputs.get("attention_mask"), inputs["labels"]
        self.per_target = float((labels != -100).sum() / (labels[:, 1:] != -100).sum())
        self.report.tokens.append(int(ids.numel() if mask is None else mask.sum()))
        if self.job.record:
            number = len(self.report.tokens) - 1
            for name in ("input_ids", "labels", "position_ids"):
                if inputs.get(name) is not None:
                    self.batches[f"{name}.{number}"] = inputs[name].clone().contiguous()

    def end(self, loss: float) -> bool:
        """A step has ended; whether the job is done."""
        seconds = time.perf_counter() - self.last
        if self.profiler is not None:
            self.report.live_bytes = self.live_before + stop_profiler(self.profiler)
            self.profiler = None
        self.report.seconds.append(seconds)
        self.report.losses.append(loss)
        self.trained += seconds
        print(
            f"{self.job.contestant}: step {len(self.report.seconds)}, {seconds:.2f} s, "
            f"{self.report.tokens[-1]} tokens, loss {loss:.4f}",
            file=sys.stderr,
            flush=True,
        )
        done = self.is_done()
        if self.job.save_every and (done or self.is_due()):
            self.save()
        if not done:
            self.begin()
        return done

    def is_done(self) -> bool:
        after = self.report.seconds[self.job.warm_up :]
        return len(after) >= self.job.steps and sum(after) >= self.job.seconds

    def is_due(self) -> bool:
        return self.trained >= self.job.save_every * (len(self.report.saved) + 1)

    def save(self) -> None:
        path = Path(self.job.work) / f"{self.job.contestant}-{len(self.report.saved)}.safetensors"
        save_adapter(self.model, path)
        self.report.saved.append((self.trained, str(path)))

    def finish(self) -> Report:
        if self.job.record:
            from safetensors.torch import save_file

            save_file(self.batches, self.job.record)
        self.report.resident_bytes = peak_resident_bytes()
        self.report.versions = versions()
        return self.report


def peak_resident_bytes() -> int:
    """The highest resident size of this process.

    On Linux not from getrusage: its figure survives exec, so it is never below the peak of the
    process that started this one.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError):
        pass
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024  # macOS counts bytes


def live_tensor_bytes() -> int:
    """Bytes of all tensors that Python can reach, shared storage once."""
    import torch

    sizes: dict[int, int] = {}
    for item in gc.get_objects():
        if issubclass(type(item), torch.Tensor):
            storage = item.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def start_profiler() -> Any:
    from torch.profiler import ProfilerActivity, profile

    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    profiler.__enter__()
    return profiler


def stop_profiler(profiler: Any) -> int:
    """The most bytes that were allocated at once beyond those at the start."""
    profiler.__exit__(None, None, None)
    events = profiler.profiler.kineto_results.events()
    memory = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    return peak_of([size for _, size in sorted(memory, key=lambda pair: pair[0])])


def peak_of(changes: list[int]) -> int:
    """The highest sum of a beginning of `changes`: allocations positive, frees negative."""
    total = highest = 0
    for change in changes:
        total += change
        highest = max(highest, total)
    return highest


def versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for name in ("torch", "transformers", "peft", "trl", "bengo", "soup-cli", "lowvram"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


# --- adapters -------------------------------------------------------------------------------------


def load_adapter(model: Any, path: Path) -> None:
    """Put the common start values into a peft model. An adapter of other names is an error."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    start = load_file(path)
    wanted = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    if wanted != set(start):
        raise SystemExit(f"{path}: is of another adapter: {sorted(wanted ^ set(start))[:2]}")
    set_peft_model_state_dict(model, start)


def save_adapter(model: Any, path: Path) -> None:
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    save_file({name: tensor.detach().clone().contiguous() for name, tensor in state.items()}, path)


def make_adapter(model: Path, path: Path, seed: int = 0) -> None:
    """Common start values; B is small but not zero, so that every part of the step matters."""
    import torch
    from peft import get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    with warnings.catch_warnings(action="ignore"):  # peft's, of names that transformers changed
        wrapped = get_peft_model(base, lora_config())
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=1e-3)
    save_adapter(wrapped, path)


def lora_config() -> Any:
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=[TARGET],
        fan_in_fan_out=True,
    )


# --- transformers' Trainer and what is built on it ------------------------------------------------


def watched_callback(watch: Watch, trainer_of: Callable[[], Any]) -> Any:
    """A callback that starts the watch when training does, and stops training when it says so."""
    from transformers import TrainerCallback

    class Callback(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            trainer = trainer_of()
            inner = trainer.training_step

            def training_step(model: Any, inputs: Any, *rest: Any, **options: Any) -> Any:
                watch.batch(inputs)
                self.loss = inner(model, inputs, *rest, **options)
                return self.loss

            trainer.training_step = training_step
            watch.start(trainer.accelerator.unwrap_model(trainer.model))

        def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            if watch.end(self.loss.item() * watch.per_target):
                control.should_training_stop = True

    return Callback()


def training_arguments(job: Job) -> dict[str, Any]:
    """What every Trainer gets; the rest is as it comes."""
    return {
        "output_dir": job.work,
        "per_device_train_batch_size": job.rows,
        "learning_rate": job.learning_rate,
        "lr_scheduler_type": "constant",
        "max_steps": ENDLESS,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 0,
    }


def load_base(job: Job) -> tuple[Any, Any]:
    """Model and tokenizer, as the tutorials load them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job.model)
    tokenizer.pad_token = tokenizer.eos_token
    return AutoModelForCausalLM.from_pretrained(job.model), tokenizer


def train_with(trainer: Any, watch: Watch) -> Report:
    trainer.add_callback(watched_callback(watch, lambda: trainer))
    trainer.train()
    return watch.finish()


def run_tutorial(job: Job, watch: Watch) -> Report:
    """Every line a row, padded to the full length: the usual GPT-2 tutorial."""
    from datasets import load_dataset
    from peft import get_peft_model
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

    model, tokenizer = load_base(job)
    lines = load_dataset("text", data_files=job.text, split="train")
    rows = lines.map(
        lambda batch: tokenizer(
            batch["text"], padding="max_length", truncation=True, max_length=job.length
        ),
        batched=True,
        remove_columns=["text"],
    )
    trainer = Trainer(
        model=get_peft_model(model, lora_config()),
        args=TrainingArguments(**training_arguments(job)),
        train_dataset=rows,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    return train_with(trainer, watch)


def run_trainer(job: Job, watch: Watch) -> Report:
    """Packed as transformers' run_clm.py does: joined, cut into blocks, labels are the ids."""
    from datasets import load_dataset
    from peft import get_peft_model
    from transformers import Trainer, TrainingArguments, default_data_collator

    model, tokenizer = load_base(job)
    lines = load_dataset("text", data_files=job.text, split="train")
    ids = lines.map(
        lambda batch: {
            "input_ids": [
                [*row, tokenizer.eos_token_id] for row in tokenizer(batch["text"])["input_ids"]
            ]
        },
        batched=True,
        remove_columns=["text"],
    )

    def group(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        joined = [token for row in batch["input_ids"] for token in row]
        starts = range(0, len(joined) // job.length * job.length, job.length)
        blocks = [joined[start : start + job.length] for start in starts]
        ones = [[1] * job.length for _ in blocks]
        return {"input_ids": blocks, "attention_mask": ones, "labels": [list(b) for b in blocks]}

    trainer = Trainer(
        model=get_peft_model(model, lora_config()),
        args=TrainingArguments(**training_arguments(job)),
        train_dataset=ids.map(group, batched=True),
        data_collator=default_data_collator,
    )
    return train_with(trainer, watch)


def run_trl(job: Job, watch: Watch) -> Report:
    """SFTTrainer with packing, its defaults but for what would be another computation.

    Those are bf16 and recomputation, which it switches on: on a CPU both make it slower.
    """
    from datasets import load_dataset
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = load_base(job)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            **training_arguments(job),
            packing=True,
            max_length=job.length,
            bf16=False,
            gradient_checkpointing=False,
        ),
        train_dataset=load_dataset("text", data_files=job.text, split="train"),
        processing_class=tokenizer,
        peft_config=lora_config(),
    )
    return train_with(trainer, watch)


def run_bengo(job: Job, watch: Watch) -> Report:
    """bengo's own trainer class, on the text as JSON lines."""
    from bengo.config import TrainConfig
    from bengo.trainer import FineTuner

    lines = Path(job.text).read_text(encoding="utf-8").splitlines()
    data = Path(job.work) / "bengo.jsonl"
    data.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines), encoding="utf-8")
    config = TrainConfig(
        model_name=job.model,
        dataset=str(data),
        output_dir=str(Path(job.work) / "bengo"),
        dataset_format="text",
        method="lora",
        max_length=job.length,
        batch_size=rows_without_packing(job, lines),
        gradient_accumulation_steps=1,
        max_steps=ENDLESS,
        learning_rate=job.learning_rate,
        weight_decay=0.0,
        lora_rank=RANK,
        lora_alpha=ALPHA,
        lora_dropout=0.0,
        target_modules=[TARGET],
        gradient_checkpointing=False,
        device="cpu",
        save_steps=ENDLESS,
    )
    tuner = FineTuner(config)
    tuner.callbacks = [watched_callback(watch, lambda: tuner.trainer)]
    tuner.train()
    return watch.finish()


def rows_without_packing(job: Job, lines: list[str]) -> int:
    """Lines that make about as many tokens as the full rows of a step; at four bytes a token."""
    mean = sum(len(line.encode()) for line in lines) / max(1, len(lines)) / 4
    return max(1, round(job.rows * job.length / max(1.0, mean)))


def run_soup(job: Job, watch: Watch) -> Report:
    """Soup's continued pre-training, its trainer for plain text, with packing."""
    from soup_cli.config.schema import SoupConfig
    from soup_cli.trainer.pretrain import PretrainTrainerWrapper

    config = SoupConfig(
        base=job.model,
        task="pretrain",
        data={"train": job.text, "format": "plaintext", "max_length": job.length},
        training={
            "epochs": 1000,
            "lr": job.learning_rate,
            "batch_size": job.rows,
            "gradient_accumulation_steps": 1,
            "warmup_ratio": 0.0,
            "weight_decay": 0.0,
            "scheduler": "constant",
            "packing": True,
            "quantization": "none",
            "gradient_checkpointing": False,
            "save_steps": ENDLESS,
            "lora": {"r": RANK, "alpha": ALPHA, "dropout": 0.0, "target_modules": [TARGET]},
        },
        output=str(Path(job.work) / "soup"),
    )
    lines = Path(job.text).read_text(encoding="utf-8").splitlines()
    wrapper = PretrainTrainerWrapper(config, device="cpu")
    wrapper.setup({"train": [{"text": line} for line in lines]})
    return train_with(wrapper.trainer, watch)


# --- lowvram --------------------------------------------------------------------------------------


def run_lowvram(job: Job, watch: Watch) -> Report:
    """The library as its README uses it; or, with `replay`, on batches that another trained on."""
    import lowvram

    recipe = lowvram.load_recipe(
        "gpt2-lora",
        overrides={
            "model.name": job.model,
            "data.source": job.text,
            "data.validation_fraction": 0,
            "method.rank": RANK,
            "method.alpha": ALPHA,
            "method.target_modules": [TARGET],
            "train.global_batch_size": job.rows,
            "train.epochs": 1000,
            "train.optimizer": "adamw",
            "train.precision": "fp32",
            "train.schedule": "constant",
            "train.warmup_steps": 0,
            "train.weight_decay": 0,
            "train.learning_rate": job.learning_rate,
            "fit.micro_batch_size": job.rows,
            "fit.max_seq_len": job.length,
            "fit.gradient_checkpointing": False,
        },
    )
    plan = lowvram.plan(recipe)
    state = lowvram.build(plan.recipe, total_steps=plan.total_steps)
    if job.contestant == "lowvram-compiled":
        from lowvram.adapters import plain_model
        from lowvram.loss import decoder

        decoder(plain_model(state.model)).compile()
    windows = replayed(job) if job.replay else plan.windows()
    watch.start(state.model)
    for metrics in lowvram.train(state, windows):
        watch.report.tokens.append(metrics.tokens)
        if watch.end(metrics.loss):
            break
    return watch.finish()


def replayed(job: Job) -> Iterator[list[Any]]:
    """The recorded batches, again and again, as the library takes them.

    A label in the first place of a row is no target, as for transformers, which shifts labels.
    """
    from safetensors.torch import load_file

    from lowvram.data import IGNORED, Batch

    recorded = load_file(job.replay)
    count = sum(name.startswith("input_ids.") for name in recorded)
    number = 0
    while True:
        ids, labels = recorded[f"input_ids.{number}"], recorded[f"labels.{number}"].clone()
        labels[:, 0] = IGNORED
        yield [
            Batch(
                input_ids=ids,
                labels=labels,
                position_ids=recorded.get(f"position_ids.{number}"),
                target_tokens=int((labels != IGNORED).sum()),
                tokens=ids.numel(),
            )
        ]
        number = (number + 1) % count


RUNNERS: dict[str, Callable[[Job, Watch], Report]] = {
    "tutorial": run_tutorial,
    "trainer": run_trainer,
    "trl": run_trl,
    "bengo": run_bengo,
    "soup": run_soup,
    "lowvram": run_lowvram,
    "lowvram-same": run_lowvram,
    "lowvram-compiled": run_lowvram,
}


def main() -> None:
    job = Job(**json.loads(sys.stdin.read()))
    output = os.dup(1)
    os.dup2(2, 1)  # libraries that print must not mix with the answer
    report = RUNNERS[job.contestant](job, Watch(job))
    os.write(output, (json.dumps(dataclasses.asdict(report)) + "\n").encode())


if __name__ == "__main__":
    main()
