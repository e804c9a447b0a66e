"""Train the base model that ships inside the wheel, from scratch, on text that every CPython has.

    python benchmarks/train_embedded_model.py --report report.json

The corpus is the docstrings of the standard library: one docstring is one document. Nothing is
downloaded. The result is a plain Hugging Face directory of a small GPT-2 with its own byte-level
BPE, so that a first fine-tuning run needs neither a network nor a large file. `pydoc_data` is
never read: its language reference is the text that recipes fine-tune on.

The figures depend on the Python version (its docstrings are the corpus), on the seed and, in
their last digits, on the processor. The held-out documents also choose the epoch that is kept, so
their perplexity is that of a validation set, a little flattering, not that of a test set.

Tensor shapes: n rows or windows, s positions of a row, t positions that have a target.
"""

import ast
import bisect
import hashlib
import inspect
import json
import math
import platform
import random
import re
import sysconfig
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

DEFAULT_OUTPUT = Path(__file__).resolve().parents[1] / "lowvram" / "assets" / "gpt2-docstrings"
END = "<|endoftext|>"
IGNORED = -100

EXCLUDED_PARTS = frozenset(
    # pydoc_data is the fine-tuning text. Installed packages are not the standard library. Tests
    # hold deliberately broken sources, and lib2to3 exists only in older Pythons.
    {"pydoc_data", "site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3"}
)
MIN_CHARACTERS = 40  # shorter docstrings are "Return self." and the like
HELD_OUT_PERCENT = 5
PROMPTS = ("Return a list of", "This module provides")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that a run may vary."""

    seed: int = 0
    """Seed of the split, the initial weights, the order of documents and the dropout."""
    epochs: int = 30
    """Passes over the training documents."""
    context: int = 256
    """Positions of the model, and tokens of one packed row."""
    vocab_size: int = 4096
    """Tokens of the vocabulary, the end-of-text token included."""
    n_embd: int = 128
    """Width of the residual stream."""
    n_layer: int = 6
    """Transformer blocks."""
    n_head: int = 4
    """Attention heads of a block."""
    dropout: float = 0.1
    """Dropout on embeddings and residual branches."""
    learning_rate: float = 2e-3
    """Peak learning rate of AdamW."""
    weight_decay: float = 0.1
    """AdamW weight decay of matrices; biases and LayerNorm gains have none."""
    warmup: float = 0.03
    """Share of the training during which the learning rate rises."""
    batch_rows: int = 32
    """Rows of an optimizer step; 32 x 256 = 8,192 tokens."""
    max_documents: int | None = None
    """Only this many training and held-out documents each, for a smoke run."""


# --- corpus ---------------------------------------------------------------------------------------


def find_sources(root: Path) -> list[Path]:
    """Return the Python files of a standard library, in an order that no file system changes."""
    relative = sorted(path.relative_to(root) for path in root.rglob("*.py"))
    return [root / path for path in relative if EXCLUDED_PARTS.isdisjoint(path.parts)]


def read_docstrings(path: Path) -> Iterator[str]:
    """Yield the cleaned docstrings of a file: of the module, its classes and its functions."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes of old sources are not our concern
        tree = ast.parse(path.read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            raw = ast.get_docstring(node, clean=False)
            if raw is not None:
                yield inspect.cleandoc(raw).strip()


def read_corpus(root: Path) -> list[str]:
    """Return the distinct docstrings below a folder that are long enough to learn from."""
    texts = (text for path in find_sources(root) for text in read_docstrings(path))
    return list(dict.fromkeys(text for text in texts if len(text) >= MIN_CHARACTERS))


def is_held_out(text: str, seed: int) -> bool:
    """Decide by a hash of the words.

    Copies that differ only in layout, punctuation or case land on the same side of the split, and
    a document stays on its side when others come or go.
    """
    words = " ".join(re.findall(r"\w+", text.casefold()))
    digest = hashlib.sha256(f"{seed}\n{words}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % 100 < HELD_OUT_PERCENT


# --- tokenizer ------------------------------------------------------------------------------------


def train_tokenizer(texts: Sequence[str], settings: Settings) -> GPT2Tokenizer:
    """Train a byte-level BPE that has every byte, and the end-of-text token as its last id."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size - 1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(texts, trainer)
    bpe = json.loads(trained.to_str())["model"]
    # GPT2Tokenizer takes the vocabulary itself: under transformers 5 the older vocab_file= and
    # merges_file= arguments are ignored and leave an empty tokenizer.
    return GPT2Tokenizer(
        vocab={**bpe["vocab"], END: len(bpe["vocab"])},
        merges=[tuple(merge) for merge in bpe["merges"]],
        model_max_length=settings.context,
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(tokenizer: GPT2Tokenizer, output: Path) -> None:
    """Write both forms: tokenizer.json for today's readers, vocab.json and merges.txt for older."""
    tokenizer.save_pretrained(output)
    tokenizer.backend_tokenizer.model.save(str(output))


def encode(tokenizer: GPT2Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Return token ids of each document; special tokens are added where they are needed."""
    # verbose=False: documents beyond model_max_length are expected here, they are cut later
    return [list(tokenizer(text, verbose=False)["input_ids"]) for text in texts]


# --- packing --------------------------------------------------------------------------------------


def cut_documents(
    documents: Sequence[Sequence[int]], end: int, context: int, rng: random.Random
) -> list[list[int]]:
    """Close each document with the end token and cut it into pieces of at most one row.

    Half of the documents also open with the end token, as a prompt for text out of nothing does;
    the other half teaches the model to read a window that starts anywhere. The place of the first
    cut is random so that each epoch gives the tokens of long documents other contexts.
    """
    pieces = []
    for document in documents:
        tokens = [end] * rng.randint(0, 1) + [*document, end]
        first = len(tokens) if len(tokens) <= context else rng.randint(context // 2, context)
        pieces.append(tokens[:first])
        pieces += [tokens[i : i + context] for i in range(first, len(tokens), context)]
    return [piece for piece in pieces if len(piece) > 1]  # one token alone has no target


def pack_pieces(pieces: Sequence[list[int]], context: int) -> list[list[list[int]]]:
    """Fill rows by best fit: longest piece first, into the fullest row that still has room."""
    rows: list[list[list[int]]] = []
    rooms: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for piece in sorted(pieces, key=len, reverse=True):
        at = bisect.bisect_left(rooms, (len(piece), -1))
        if at == len(rooms):
            rows.append([])
            free, row = context, len(rows) - 1
        else:
            free, row = rooms.pop(at)
        rows[row].append(piece)
        bisect.insort(rooms, (free - len(piece), row))
    return rows


@dataclass(frozen=True)
class Rows:
    """Packed rows, each tensor (n, s)."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    targets: torch.Tensor


def make_rows(packed: Sequence[Sequence[list[int]]], end: int, context: int) -> Rows:
    """Lay packed pieces out as tensors; positions restart and targets stop at each piece."""
    inputs = torch.full((len(packed), context), end)
    positions = torch.arange(context).repeat(len(packed), 1)
    targets = torch.full((len(packed), context), IGNORED)
    for row, pieces in enumerate(packed):
        start = 0
        for piece in pieces:
            stop = start + len(piece)
            inputs[row, start:stop] = torch.tensor(piece)
            targets[row, start : stop - 1] = torch.tensor(piece[1:])
            positions[row, start:] -= positions[row, start].clone()
            start = stop
        if start < context:
            positions[row, start:] -= positions[row, start].clone()  # filler sees no document
    return Rows(inputs, positions, targets)


def epoch_rows(
    documents: Sequence[Sequence[int]], end: int, context: int, rng: random.Random
) -> Rows:
    """Cut, pack and shuffle the documents of one epoch."""
    pieces = cut_documents(documents, end, context, rng)
    rng.shuffle(pieces)  # the packing sort is stable: equal lengths meet other neighbours
    packed = pack_pieces(pieces, context)
    rng.shuffle(packed)
    return make_rows(packed, end, context)


# --- model and training ---------------------------------------------------------------------------


def make_model(vocab_size: int, settings: Settings) -> GPT2LMHeadModel:
    """Return an untrained GPT-2 with the library's initialisation."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocab_size,
            n_positions=settings.context,
            n_embd=settings.n_embd,
            n_layer=settings.n_layer,
            n_head=settings.n_head,
            resid_pdrop=settings.dropout,
            embd_pdrop=settings.dropout,
            attn_pdrop=0.0,  # on a CPU, attention with dropout has no fused kernel
            activation_function="gelu_pytorch_tanh",  # gelu_new in one kernel; renamed on saving
            bos_token_id=vocab_size - 1,
            eos_token_id=vocab_size - 1,
        )
    )


def make_optimizer(model: GPT2LMHeadModel, settings: Settings) -> torch.optim.AdamW:
    """Return AdamW with weight decay on the matrices only."""
    parameters = list(model.parameters())
    return torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.dim() > 1]},
            {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
        ],
        lr=settings.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=settings.weight_decay,
        fused=True,
    )


def learning_rate_factor(progress: float, warmup: float) -> float:
    """Return linear warm-up, then a cosine down to 2 % of the peak; progress is in (0, 1]."""
    if progress < warmup:
        return progress / warmup
    cosine = 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))
    return 0.02 + 0.98 * cosine


def token_losses(model: GPT2LMHeadModel, rows: Rows) -> torch.Tensor:
    """Return the loss in nats of each position that has a target, (t,)."""
    # Without an attention mask and without a cache, transformers reads the restarting positions
    # as packed documents and builds a block-diagonal mask. With either one it silently does not.
    hidden = model.transformer(
        input_ids=rows.input_ids, position_ids=rows.position_ids, use_cache=False
    ).last_hidden_state  # (n, s, n_embd)
    chosen = rows.targets != IGNORED  # (n, s)
    return cross_entropy(model.lm_head(hidden[chosen]), rows.targets[chosen], reduction="none")


def batches(rows: Rows, size: int) -> Iterator[Rows]:
    """Yield consecutive batches of rows."""
    for start in range(0, len(rows.input_ids), size):
        part = slice(start, start + size)
        yield Rows(rows.input_ids[part], rows.position_ids[part], rows.targets[part])


def train_epoch(
    model: GPT2LMHeadModel, optimizer: torch.optim.Optimizer, rows: Rows, lrs: Sequence[float]
) -> float:
    """Take one optimizer step a batch, with one learning rate each; return the mean loss."""
    model.train()
    parts = batches(rows, math.ceil(len(rows.input_ids) / len(lrs)))
    total = 0.0
    count = 0
    for part, lr in zip(parts, lrs, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = lr
        losses = token_losses(model, part)
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        total += losses.detach().double().sum().item()
        count += losses.numel()
    return total / count


def train(
    model: GPT2LMHeadModel,
    documents: Sequence[Sequence[int]],
    held_out: Sequence[Sequence[int]],
    settings: Settings,
) -> int:
    """Train, leave the weights of the best epoch in the model, and return that epoch (from 1)."""
    end = model.config.eos_token_id
    rng = random.Random(settings.seed)
    optimizer = make_optimizer(model, settings)
    best_loss, best_epoch, best_weights = math.inf, 0, model.state_dict()
    for epoch in range(settings.epochs):
        began = time.perf_counter()
        rows = epoch_rows(documents, end, settings.context, rng)
        steps = math.ceil(len(rows.input_ids) / settings.batch_rows)
        progress = [(epoch + (step + 1) / steps) / settings.epochs for step in range(steps)]
        factors = [learning_rate_factor(done, settings.warmup) for done in progress]
        loss = train_epoch(model, optimizer, rows, [settings.learning_rate * f for f in factors])
        held_out_loss = score_documents(model, held_out).mean().item()
        click.echo(
            f"epoch {epoch + 1:3d}/{settings.epochs}: {steps} steps, training loss {loss:.4f}, "
            f"held-out loss {held_out_loss:.4f}, {time.perf_counter() - began:.0f} s"
        )
        if held_out_loss < best_loss:
            best_loss, best_epoch = held_out_loss, epoch + 1
            best_weights = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(best_weights)
    return best_epoch


# --- evaluation -----------------------------------------------------------------------------------


def make_windows(documents: Sequence[Sequence[int]], end: int, context: int) -> list[Rows]:
    """Return one-row windows that score each token of each document, and its end, exactly once.

    A document opens with the end token. Windows move by half a context, and a window scores only
    what the one before it did not reach, so that a token of a long document has at least half a
    context of its own document before it.
    """
    windows = []
    for document in documents:
        tokens = torch.tensor([end, *document, end])
        scored = 0
        for start in range(0, len(tokens) - 1, context // 2):
            window = tokens[start : start + context + 1]
            targets = window[1:].clone()
            targets[: scored - start] = IGNORED
            windows.append(
                Rows(window[None, :-1], torch.arange(len(targets))[None], targets[None])
            )
            scored = start + len(targets)
            if scored == len(tokens) - 1:
                break
    return windows


def pad_windows(windows: Sequence[Rows]) -> Rows:
    """Stack windows to the longest; causal attention keeps the padding out of every score."""
    width = max(window.input_ids.shape[1] for window in windows)
    rows = Rows(
        torch.zeros(len(windows), width, dtype=torch.long),
        torch.arange(width).repeat(len(windows), 1),
        torch.full((len(windows), width), IGNORED),
    )
    for row, window in enumerate(windows):
        length = window.input_ids.shape[1]
        rows.input_ids[row, :length] = window.input_ids
        rows.targets[row, :length] = window.targets
    return rows


@torch.no_grad()
def score_documents(
    model: GPT2LMHeadModel, documents: Sequence[Sequence[int]], batch_size: int = 32
) -> torch.Tensor:
    """Return the loss in nats of each token of the documents, ends included, (t,) in float64."""
    model.eval()
    end = model.config.eos_token_id
    windows = make_windows(documents, end, model.config.n_positions)
    windows.sort(key=lambda window: window.input_ids.shape[1])  # little padding in a batch
    starts = range(0, len(windows), batch_size)
    groups = (pad_windows(windows[start : start + batch_size]) for start in starts)
    return torch.cat([token_losses(model, group).double() for group in groups])


def score_unigram(
    documents: Sequence[Sequence[int]], held_out: Sequence[Sequence[int]], vocab_size: int
) -> torch.Tensor:
    """Return the loss in nats of each held-out token under add-one smoothed training counts."""
    end = vocab_size - 1
    seen = torch.tensor([token for document in documents for token in [*document, end]])
    asked = torch.tensor([token for document in held_out for token in [*document, end]])
    counts = torch.bincount(seen, minlength=vocab_size).double() + 1
    return -torch.log(counts / counts.sum())[asked]


def figures(losses: torch.Tensor, size_bytes: int) -> dict[str, float]:
    """Return token-weighted perplexity and bits per byte of the text."""
    return {
        "perplexity": math.exp(losses.mean().item()),
        "bits_per_byte": losses.sum().item() / math.log(2) / size_bytes,
    }


def continue_text(model: GPT2LMHeadModel, tokenizer: GPT2Tokenizer, text: str, **how: Any) -> str:
    """Return a prompt and its continuation."""
    encoded = tokenizer([text], return_tensors="pt")
    end = model.config.eos_token_id
    tokens = model.generate(**encoded, max_new_tokens=60, pad_token_id=end, **how)
    return str(tokenizer.decode(tokens[0], skip_special_tokens=True))


# --- the run --------------------------------------------------------------------------------------


def size_bytes(texts: Sequence[str]) -> int:
    """Return the length of all texts in UTF-8."""
    return sum(len(text.encode()) for text in texts)


def save_model(model: GPT2LMHeadModel, output: Path) -> None:
    """Write the weights with a configuration that names the activation as GPT-2 does."""
    model.config.activation_function = "gelu_new"
    model.save_pretrained(output)


def build(settings: Settings, output: Path) -> dict[str, Any]:
    """Train tokenizer and model, write both, and return the report."""
    began = time.perf_counter()
    corpus = read_corpus(Path(sysconfig.get_path("stdlib")))
    training = [text for text in corpus if not is_held_out(text, settings.seed)]
    asked = [text for text in corpus if is_held_out(text, settings.seed)]
    tokenizer = train_tokenizer(training, settings)
    training, asked = training[: settings.max_documents], asked[: settings.max_documents]
    documents, held_out = encode(tokenizer, training), encode(tokenizer, asked)

    torch.manual_seed(settings.seed)
    model = make_model(len(tokenizer), settings)
    best_epoch = train(model, documents, held_out, settings)
    save_tokenizer(tokenizer, output)
    save_model(model, output)

    losses = score_documents(model, held_out)
    unigram = score_unigram(documents, held_out, len(tokenizer))
    greedy, sampled = PROMPTS
    torch.manual_seed(settings.seed)
    return {
        "python": platform.python_version(),
        "settings": asdict(settings),
        "training": {
            "documents": len(training),
            "bytes": size_bytes(training),
            "tokens": sum(map(len, documents)),
        },
        "held_out": {
            "documents": len(asked),
            "bytes": size_bytes(asked),
            "tokens": sum(map(len, held_out)),
            "tokens_scored": len(losses),  # one end token a document more
        },
        "parameters": model.num_parameters(),
        "best_epoch": best_epoch,
        "model": figures(losses, size_bytes(asked)),
        "unigram": figures(unigram, size_bytes(asked)),
        "greedy": continue_text(model, tokenizer, greedy, do_sample=False),
        "sampled": continue_text(
            model, tokenizer, sampled, do_sample=True, temperature=0.8, top_k=40
        ),
        "seconds": round(time.perf_counter() - began, 1),
    }


@click.command(help=(__doc__ or "").partition("\n")[0])
@click.option("--output", type=click.Path(path_type=Path), help="Folder of the trained model.")
@click.option("--epochs", type=click.IntRange(min=1), default=Settings.epochs, show_default=True)
@click.option("--seed", type=int, default=Settings.seed, show_default=True)
@click.option("--report", type=click.Path(path_type=Path), help="Also write the figures as JSON.")
@click.option("--smoke", is_flag=True, help="One epoch of a few documents: does the script run?")
def main(output: Path | None, epochs: int, seed: int, report: Path | None, smoke: bool) -> None:
    """Parse the options, run, print."""
    if smoke and output is None:
        raise click.UsageError("--smoke needs --output: it must not replace the shipped model")
    settings = Settings(seed=seed, epochs=epochs)
    if smoke:
        settings = replace(settings, epochs=1, max_documents=64)
    text = json.dumps(build(settings, output or DEFAULT_OUTPUT), indent=2)
    click.echo(text)
    if report is not None:
        report.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
