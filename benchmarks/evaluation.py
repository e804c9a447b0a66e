"""Evaluation beside the usual loop of Hugging Face: the same perplexity, and the time it takes.

    python benchmarks/evaluation.py                       # the text of the quickstart
    python benchmarks/evaluation.py --text wiki.test.tokens --tokenizer DIR

The peer is the loop of transformers' page on perplexity: windows of the context's length, a stride
of half of it, labels of -100 for tokens that are context only, and the model's own loss, weighted
by the tokens that it counts. Both score one document of the same tokens with a GPT-2 small of
random weights, in fp32. They take turns; each runs in a process of its own, which says what it
had resident at most. Exit code 1 if the sums differ by more than 1e-5 of them, if the peer takes
less than 1.3 times as long, or if twice the text takes more than 5 % more memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from arena import random_gpt2
from transformers import GPT2LMHeadModel

from lowvram.inference import load
from lowvram.model import load_tokenizer, locate
from lowvram.perplexity import score

CONTEXT, STRIDE = 1024, 512
WANTED = 1.3


def usual(model: Path, tokens: np.ndarray) -> tuple[float, float]:
    """Sum of -ln p, and seconds."""
    network = GPT2LMHeadModel.from_pretrained(model, dtype=torch.float32).eval()
    ids = torch.from_numpy(tokens.astype(np.int64))[None]
    started, total, previous_end = time.perf_counter(), 0.0, 0
    with torch.no_grad():
        for begin in range(0, ids.shape[1], STRIDE):
            end = min(begin + CONTEXT, ids.shape[1])
            window = ids[:, begin:end]
            labels = window.clone()
            labels[:, : -(end - previous_end)] = -100
            loss = network(window, labels=labels).loss
            total += loss.item() * int((labels[:, 1:] != -100).sum())
            previous_end = end
            if end == ids.shape[1]:
                break
    return total, time.perf_counter() - started


def ours(model: Path, tokens: np.ndarray) -> tuple[float, float]:
    import lowvram.metric  # noqa: F401 - imports do not count, for anyone

    network, _ = load(str(model))
    started = time.perf_counter()
    result = score(network, [(tokens, len(tokens), 1)], context_length=CONTEXT, stride=STRIDE)
    return result.nll_sum, time.perf_counter() - started


CONTESTANTS = {"usual loop": usual, "lowvram": ours}


def child(name: str, model: str, file: str, count: int) -> None:
    tokens = np.load(file)[:count]
    nll_sum, seconds = CONTESTANTS[name](Path(model), tokens)
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    print(json.dumps({"nll_sum": nll_sum, "seconds": seconds, "peak_bytes": peak}))


def run(name: str, model: Path, file: Path, count: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", name, str(model), str(file), str(count)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


def main() -> int:
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:5], int(sys.argv[5]))  # type: ignore[call-arg]
        return 0
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", type=Path, help="instead of the language reference of CPython")
    parser.add_argument("--tokenizer", type=Path, help="a directory with one, such as GPT-2's")
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--repetitions", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        return compare(arguments, Path(directory))


def compare(arguments: argparse.Namespace, directory: Path) -> int:
    source = arguments.tokenizer or locate("embedded:gpt2-docstrings")
    model = random_gpt2(directory / "gpt2", source)
    tokenizer = load_tokenizer(str(model))
    count = CONTEXT + STRIDE * (arguments.windows - 1)
    tokens = np.array(tokenizer(read(arguments.text)[: 12 * count])["input_ids"], dtype=np.uint16)
    tokens = np.resize(tokens, 2 * count)
    file = directory / "tokens.npy"
    np.save(file, tokens)

    found: dict[str, list[dict[str, Any]]] = {contestant: [] for contestant in CONTESTANTS}
    for _ in range(arguments.repetitions):
        for contestant, results in found.items():
            results.append(run(contestant, model, file, count))
    longer = run("lowvram", model, file, 2 * count)
    return report(found, longer, count)


def read(path: Path | None) -> str:
    if path is not None:
        return path.read_text(encoding="utf-8")
    from pydoc_data.topics import topics

    return "\n".join(topics.values())


def report(found: dict[str, list[dict[str, Any]]], longer: dict[str, Any], count: int) -> int:
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"{torch.get_num_threads()} threads, {count:,} tokens, context {CONTEXT}, stride {STRIDE}\n"
    )
    print("| | tokens/s (median) | slowest to fastest | sum of -ln p | resident peak |")
    print("|---|--:|--:|--:|--:|")
    for name, results in found.items():
        rates = sorted(count / result["seconds"] for result in results)
        peak = max(result["peak_bytes"] for result in results) / 2**30
        print(
            f"| {name} | {statistics.median(rates):.0f} | {rates[0]:.0f} to {rates[-1]:.0f} "
            f"| {results[0]['nll_sum']:.4f} | {peak:.2f} GiB |"
        )
    peer, mine = found.values()
    pairs = [one["seconds"] / other["seconds"] for one, other in zip(peer, mine, strict=True)]
    difference = abs(mine[0]["nll_sum"] / peer[0]["nll_sum"] - 1)
    growth = longer["peak_bytes"] / max(result["peak_bytes"] for result in mine) - 1
    ratio = statistics.median(pairs)
    print(
        f"\n{ratio:.2f} times the speed (wanted: {WANTED}); the sums differ by {difference:.1e} of "
        f"them; twice the text takes {growth:+.1%} of memory"
    )
    return int(ratio < WANTED or difference > 1e-5 or growth > 0.05)


if __name__ == "__main__":
    sys.exit(main())
