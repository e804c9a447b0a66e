"""Use what is there: find and load a model, adapter or run; score files, continue prompts."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from transformers import PreTrainedTokenizerBase

from lowvram.adapters import is_adapter, load_adapter, plain_model
from lowvram.data import Source, tokenize
from lowvram.disk import temporary_directory
from lowvram.display import Display
from lowvram.errors import RecipeError
from lowvram.frozen_block import make_blocks_lean
from lowvram.generate import Continuation, Sampling, generate, stream
from lowvram.heap import keep_freed_memory
from lowvram.merge import check_base
from lowvram.model import context_length, fuse_gelu, load_model, load_tokenizer
from lowvram.perplexity import PerplexityResult, score

_LONGEST_CONTEXT = 1024  # by default; longer ones are asked for
_NEW_TOKENS = 64


def load(name: str, *, base: str | None = None) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """A model in fp32 on the device there is, and its tokenizer.

    `name` is a checkpoint directory, a hub id, an adapter directory (its base is the recorded
    one or `base`), or the directory of a run, which stands for its merged checkpoint.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        keep_freed_memory()
    path = Path(name).expanduser()
    if (path / "merged" / "config.json").is_file():
        path = path / "merged"
    elif is_adapter(path / "adapter"):
        path = path / "adapter"
    if is_adapter(path):
        base_name, revision = check_base(path, base)
        tokenizer = load_tokenizer(base_name, revision)
        model = load_model(base_name, revision=revision, attention="auto", device=device)
        _make_lean(model, device)
        return load_adapter(model, path).eval(), tokenizer
    if base is not None:
        raise RecipeError(f"--base: {name!r} is no adapter, so it has no base")
    found = str(path) if path.is_dir() else name
    model = load_model(found, attention="auto", device=device)
    _make_lean(model, device)
    return model, load_tokenizer(found)


def _make_lean(model: nn.Module, device: str) -> None:
    fuse_gelu(model)
    if device == "cpu":
        make_blocks_lean(model)


def evaluate_files(
    model: str,
    source: Source,
    *,
    stride: int | None = None,
    context: int | None = None,
    base: str | None = None,
    show_progress: bool = False,
) -> PerplexityResult:
    """Perplexity of `model` (as `load` takes it) on the documents of `source`."""
    loaded, tokenizer = load(model, base=base)
    positions = context_length(plain_model(loaded).config)
    length = context if context is not None else min(positions, _LONGEST_CONTEXT)
    # Tokens go to a file, so that memory stays flat in the length of the text.
    with temporary_directory() as directory:
        store = tokenize(source, tokenizer, cache_dir=directory, append_eos=False)
        documents = (
            (store.document(i), int(store.byte_counts[i]), int(store.word_counts[i]))
            for i in range(len(store))
        )
        with _progress(show_progress) as progress:
            return score(
                loaded,
                documents,
                context_length=length,
                stride=stride if stride is not None else max(1, length // 2),
                progress=progress,
            )


@contextmanager
def _progress(show: bool) -> Iterator[Callable[[int], None] | None]:
    """On standard error, so that standard output is the result alone."""
    if not show:
        yield None
        return
    display = Display(Console(stderr=True))
    with display.progress("scoring") as update:
        yield lambda done: update(done, None, "tokens")


class Writer:
    """Continues prompts with one loaded model."""

    def __init__(self, model: str, *, base: str | None, sampling: dict[str, Any]) -> None:
        self.model, self.tokenizer = load(model, base=base)
        if sampling.get("max_new_tokens") is None:
            # Half of a small model's positions, so that a prompt has room.
            positions = context_length(plain_model(self.model).config)
            sampling = {**sampling, "max_new_tokens": min(_NEW_TOKENS, positions // 2)}
        self.sampling = Sampling(**sampling)

    def records(self, prompts: Sequence[str]) -> Iterator[dict[str, Any]]:
        """One dict a prompt: prompt, text (the continuation), tokens, finished, notes."""
        for continuation in generate(self.model, self.tokenizer, prompts, self.sampling):
            yield {
                "prompt": continuation.prompt,
                "text": continuation.text,
                "tokens": len(continuation.tokens),
                "finished": continuation.finished,
                "notes": list(continuation.notes),
            }

    def stream(self, prompt: str) -> Generator[str, None, Continuation]:
        """The continuation, in whole characters as they come; returns it whole."""
        return stream(self.model, self.tokenizer, prompt, self.sampling)
