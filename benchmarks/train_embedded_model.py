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
from torch.nn.utils.rnn import pad_sequence
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
    epochs: int = 14
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
    batch_rows: int = 8
    """Rows of an optimizer step: 2,048 tokens.

    The corpus is small, so steps are what is scarce: after one pass of four, 32 rows reach a
    held-out loss of 6.33, 12 rows 5.65 and 6 rows 5.48.
    """
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
    merges: Any = [tuple(merge) for merge in bpe["merges"]]  # annotated as strings, used as pairs
    # GPT2Tokenizer takes the vocabulary itself: under transformers 5 the older vocab_file= and
    # merges_file= arguments are ignored and leave an empty tokenizer.
    return GPT2Tokenizer(
        vocab={**bpe["vocab"], END: len(bpe["vocab"])},
        merges=merges,
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


@dataclass(frozen=True, kw_only=True)
class Row:
    """What the model reads at once; the three lists are equally long."""

    tokens: list[int]
    positions: list[int]
    """Place of each token in its own document; a 0 begins another document."""
    targets: list[int]
    """The token that follows, or IGNORED."""


def stack(rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    """Return tensors (n, s), padded at the end, where causal attention keeps it out of sight."""
    fillers = {"tokens": 0, "positions": 0, "targets": IGNORED}
    return {
        name: pad_sequence([torch.tensor(getattr(row, name)) for row in rows], True, filler)
        for name, filler in fillers.items()
    }


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


def make_row(pieces: Sequence[list[int]]) -> Row:
    """Join the pieces of a row; positions restart and targets stop at each piece."""
    return Row(
        tokens=[token for piece in pieces for token in piece],
        positions=[position for piece in pieces for position in range(len(piece))],
        targets=[target for piece in pieces for target in [*piece[1:], IGNORED]],
    )


def epoch_rows(
    documents: Sequence[Sequence[int]], end: int, context: int, rng: random.Random
) -> list[Row]:
    """Cut, pack and shuffle the documents of one epoch."""
    pieces = cut_documents(documents, end, context, rng)
    rng.shuffle(pieces)  # the packing sort is stable: equal lengths meet other neighbours
    rows = [make_row(packed) for packed in pack_pieces(pieces, context)]
    rng.shuffle(rows)
    return rows


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
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.dim() > 1]},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups,
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


def token_losses(model: GPT2LMHeadModel, rows: Sequence[Row]) -> torch.Tensor:
    """Return the loss in nats of each position that has a target, (t,)."""
    batch = stack(rows)
    # Without an attention mask and without a cache, transformers reads the restarting positions
    # as packed documents and builds a block-diagonal mask. With either one it silently does not.
    hidden = model.transformer(
        input_ids=batch["tokens"], position_ids=batch["positions"], use_cache=False
    ).last_hidden_state  # (n, s, n_embd)
    chosen = batch["targets"] != IGNORED  # (n, s)
    return cross_entropy(model.lm_head(hidden[chosen]), batch["targets"][chosen], reduction="none")


def train_epoch(
    model: GPT2LMHeadModel, optimizer: torch.optim.Optimizer, rows: list[Row], lrs: Sequence[float]
) -> float:
    """Take an optimizer step with each of the learning rates; return the mean loss."""
    model.train()
    total = 0.0
    count = 0
    for step, lr in enumerate(lrs):
        for group in optimizer.param_groups:
            group["lr"] = lr
        losses = token_losses(model, rows[step :: len(lrs)])  # sizes differ by one row at most
        torch.autograd.backward(losses.mean())
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
    end = model.config.vocab_size - 1
    rng = random.Random(settings.seed)
    optimizer = make_optimizer(model, settings)
    best_loss, best_epoch, best_weights = math.inf, 0, model.state_dict()
    for epoch in range(settings.epochs):
        began = time.perf_counter()
        rows = epoch_rows(documents, end, settings.context, rng)
        steps = math.ceil(len(rows) / settings.batch_rows)
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


def make_windows(document: Sequence[int], end: int, context: int) -> Iterator[Row]:
    """Yield windows that together score each token of a document, and its end, exactly once.

    The document opens with the end token. Windows move by half a context, and a window scores
    only what the one before it did not reach, so that a token of a long document has at least
    half a context of its own document before it.
    """
    tokens = [end, *document, end]
    scored = 0
    for start in range(0, len(tokens), context // 2):
        targets = tokens[start + 1 : start + context + 1]
        again = scored - start
        if again < len(targets):
            yield Row(
                tokens=tokens[start : start + len(targets)],
                positions=list(range(len(targets))),
                targets=[IGNORED] * again + targets[again:],
            )
            scored = start + len(targets)


@torch.no_grad()
def score_documents(
    model: GPT2LMHeadModel, documents: Sequence[Sequence[int]], batch_size: int = 32
) -> torch.Tensor:
    """Return the loss in nats of each token of the documents, ends included, (t,) in float64."""
    model.train(False)
    end, context = model.config.vocab_size - 1, model.config.n_positions
    windows = [row for document in documents for row in make_windows(document, end, context)]
    windows.sort(key=lambda row: len(row.tokens))  # little padding in a batch
    batches = (windows[at : at + batch_size] for at in range(0, len(windows), batch_size))
    return torch.cat([token_losses(model, batch).double() for batch in batches])


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
    end = model.config.vocab_size - 1
    generator: Any = model  # the annotations of generate() do not match its own classes
    tokens = generator.generate(**encoded, max_new_tokens=60, pad_token_id=end, **how)
    return str(tokenizer.decode(tokens[0], skip_special_tokens=True))


# --- the run --------------------------------------------------------------------------------------


def size_bytes(texts: Sequence[str]) -> int:
    """Return the length of all texts in UTF-8."""
    return sum(len(text.encode()) for text in texts)


def save_model(model: GPT2LMHeadModel, output: Path) -> None:
    """Write the weights with a configuration that names the activation as GPT-2 does."""
    model.config.activation_function = "gelu_new"
    model.save_pretrained(output)
    # safetensors lets only the owner read it, and a wheel would keep that mode
    (output / "model.safetensors").chmod(0o644)


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
        settings = replace(settings, epochs=1, max_documents=16)
    text = json.dumps(build(settings, output or DEFAULT_OUTPUT), indent=2)
    click.echo(text)
    if report is not None:
        report.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
