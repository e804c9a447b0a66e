"""Merging beside reading and writing the file: time, and what is resident at most.

    python benchmarks/merging.py                  # GPT-2 XL, 6.2 GB: needs 20 GB of disk
    python benchmarks/merging.py --size medium

The base has the shape of GPT-2 with random weights, in fp32; the adapter is LoRA on `c_attn`, or on
all layers. The contestants take turns, each in a process of its own that tells its time (imports
left out, the output on the disk) and its resident peak (VmHWM, which counts imports and mapped
files):

- copy: reads the file and writes it again, 16 MiB at a time;
- peft: loads the base, `merge_and_unload`, `save_pretrained`; nothing is proven;
- merge alone: lowvram's, which also reads again what it wrote, without the proof;
- lowvram: `lowvram merge`, all of it: the base is hashed first, and logits are computed before and
  after.

The base is dropped from the cache of files before each turn, or with --warm read into it. First of
all, the files of peft and lowvram have to be equal bit for bit. Exit code 1 if they are not, if
merging alone takes more than 1.2 times as long as the copy, or if lowvram, with its proof, needs
more memory than 1.2 times the bytes of the file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

LIMIT = 1.2
RANK, ALPHA = 16, 32
BLOCK = 1 << 24
SIZES = {"small": "gpt2", "medium": "gpt2-medium", "large": "gpt2-large", "xl": "gpt2-xl"}
TARGETS = {"attention": ["c_attn"], "all": ["c_attn", "c_proj", "c_fc"]}


# --- the base and the adapter ---------------------------------------------------------------------


def make_base(directory: Path, name: str) -> None:
    """A checkpoint of that shape; its tokenizer is the small one of the embedded model."""
    import torch

    from lowvram.model import empty_model, layout_of, load_tokenizer, save_plain

    torch.manual_seed(0)
    model = empty_model(name)
    layout = layout_of(model)
    tensors = ((key, random_like(key, tensor)) for key, tensor in layout.items())
    tokenizer = load_tokenizer("embedded:gpt2-docstrings")
    save_plain(model, tokenizer, directory, layout=layout, tensors=tensors)


def random_like(name: str, tensor: Any) -> Any:
    import torch

    if name.endswith("bias"):
        return torch.zeros(tensor.shape)
    if ".ln_" in name:
        return torch.ones(tensor.shape)
    return torch.empty(tensor.shape).uniform_(-0.03, 0.03)


def make_adapter(directory: Path, base: Path, targets: list[str]) -> None:
    """As a run leaves it: peft's two files, and the hash of the base."""
    import torch
    from peft import LoraConfig, get_peft_model

    from lowvram.adapters import Base, save_adapter
    from lowvram.model import load_model, weights_sha256

    torch.manual_seed(1)
    settings = {"r": RANK, "lora_alpha": ALPHA, "target_modules": targets}
    config = LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=True, **settings)
    model = get_peft_model(load_model(str(base)), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.02)  # B is not zero
    facts = Base(name=str(base), revision=None, sha256=weights_sha256(str(base)))
    save_adapter(model, directory, facts)


# --- contestants ----------------------------------------------------------------------------------


def copy(base: Path, adapter: Path, output: Path) -> Iterator[None]:
    output.mkdir()
    yield
    for path in base.glob("*.safetensors"):
        with path.open("rb") as source, (output / path.name).open("wb") as target:
            while block := source.read(BLOCK):
                target.write(block)


def peft(base: Path, adapter: Path, output: Path) -> Iterator[None]:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    yield
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    merged.save_pretrained(output, max_shard_size="5GB")


def merge_alone(base: Path, adapter: Path, output: Path) -> Iterator[None]:
    from lowvram.adapters import load_adapter, merged_tensors
    from lowvram.model import layout_of, load_model, load_tokenizer, save_plain

    tokenizer = load_tokenizer(str(base))
    yield
    model = load_model(str(base))
    layout = layout_of(model)
    tensors = merged_tensors(load_adapter(model, adapter), layout)
    save_plain(model, tokenizer, output, layout=layout, tensors=tensors)


def lowvram(base: Path, adapter: Path, output: Path) -> Iterator[None]:
    from lowvram.merge import merge

    yield
    merge(adapter, output)


CONTESTANTS = {"copy": copy, "peft": peft, "merge alone": merge_alone, "lowvram": lowvram}


def child(name: str, base: str, adapter: str, output: str) -> None:
    turn = CONTESTANTS[name](Path(base), Path(adapter), Path(output))
    next(turn)
    parts = timed_parts() if name == "lowvram" else {}
    started = time.perf_counter()
    next(turn, None)
    for path in Path(output).iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    print(json.dumps({"seconds": seconds, "peak_bytes": peak, "parts": parts}))


def timed_parts() -> dict[str, float]:
    """Filled with the seconds of what `merge` calls, by name."""
    module = sys.modules["lowvram.merge"]
    parts: dict[str, float] = {}

    def timed(name: str, function: Any, *given: Any, **named: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*given, **named)
        finally:
            parts[name] = parts.get(name, 0.0) + time.perf_counter() - started

    for name in ("check_base", "load_model", "load_adapter", "logits_of", "save_plain"):
        setattr(module, name, partial(timed, name, getattr(module, name)))
    return parts


def run(name: str, place: Path, warm: bool) -> dict[str, Any]:
    """One turn; the output is left at place / name."""
    output = place / name
    shutil.rmtree(output, ignore_errors=True)
    os.sync()
    for path in (place / "base").glob("*.safetensors"):
        in_cache(path, warm)
    command = [sys.executable, __file__, "--child", name]
    command += [str(place / "base"), str(place / "adapter"), str(output)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def in_cache(path: Path, wanted: bool) -> None:
    with path.open("rb") as file:
        if not wanted:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while wanted and file.read(BLOCK):
            pass


def tensors_sha256(directory: Path) -> dict[str, str]:
    """The bytes of each tensor."""
    from safetensors import safe_open

    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                found[name] = hashlib.sha256(file.get_tensor(name).data).hexdigest()
    return found


# --- report ---------------------------------------------------------------------------------------


def main() -> int:
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:6])
        return 0
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="xl")
    parser.add_argument("--targets", choices=TARGETS, default="attention")
    parser.add_argument("--warm", action="store_true", help="the base is in memory already")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--directory", type=Path, help="where there is room; default: temporary")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.directory, prefix="merging-") as directory:
        place = Path(directory)
        make_base(place / "base", SIZES[arguments.size])
        make_adapter(place / "adapter", place / "base", TARGETS[arguments.targets])
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTESTANTS}
        for _ in range(arguments.repetitions):
            for name, results in found.items():
                results.append(run(name, place, arguments.warm))
                print(f"{name}: {results[-1]}", file=sys.stderr, flush=True)
                if name == "copy":
                    shutil.rmtree(place / name)
        theirs = tensors_sha256(place / "peft")
        equal = all(tensors_sha256(place / name) == theirs for name in ("merge alone", "lowvram"))
        size = sum(path.stat().st_size for path in (place / "base").glob("*.safetensors"))
        return report(found, size, equal, arguments)


def report(
    found: dict[str, list[dict[str, Any]]], size: int, equal: bool, arguments: argparse.Namespace
) -> int:
    import peft
    import torch
    import transformers

    print(
        f"{SIZES[arguments.size]} in fp32, {size / 1e9:.2f} GB, LoRA of rank {RANK} on "
        f"{', '.join(TARGETS[arguments.targets])}; the base {'in' if arguments.warm else 'not in'} "
        f"the cache; torch {torch.__version__}, transformers {transformers.__version__}, "
        f"peft {peft.__version__}, {torch.get_num_threads()} threads\n"
    )
    print("| | seconds (median) | fastest to slowest | resident peak | of the file |")
    print("|---|--:|--:|--:|--:|")
    for name, results in found.items():
        seconds = sorted(result["seconds"] for result in results)
        peak = max(result["peak_bytes"] for result in results)
        print(
            f"| {name} | {statistics.median(seconds):.1f} | {seconds[0]:.1f} to {seconds[-1]:.1f} "
            f"| {peak / 2**30:.2f} GiB | {peak / size:.2f} |"
        )
    alone, whole = (times(found[name], found["copy"]) for name in ("merge alone", "lowvram"))
    ours = found["lowvram"]
    share = max(result["peak_bytes"] for result in ours) / size
    parts = {
        name: statistics.median(result["parts"][name] for result in ours)
        for name in ours[0]["parts"]
    }
    print(
        f"\nMerging alone takes {alone:.2f} times the time of the copy, with its proof {whole:.2f} "
        f"times and {share:.2f} times the bytes of the file (wanted of the first and the last: "
        f"{LIMIT} at most); the files of peft and lowvram are "
        f"{'equal bit for bit' if equal else 'NOT equal'}. Of the time with the proof, in seconds: "
        + ", ".join(f"{name} {seconds:.1f}" for name, seconds in parts.items())
    )
    return int(not equal or alone > LIMIT or share > LIMIT)


def times(results: list[dict[str, Any]], others: list[dict[str, Any]]) -> float:
    """How many times as long as the other of the same round; the median of the rounds."""
    pairs = zip(results, others, strict=True)
    return statistics.median(one["seconds"] / other["seconds"] for one, other in pairs)


if __name__ == "__main__":
    sys.exit(main())
