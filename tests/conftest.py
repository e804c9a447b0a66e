"""Tiny models and recipes that every test can have; nothing is downloaded."""

from __future__ import annotations

import os

# The tests compare to the last digits of fp32. Set it to a card's number for `-m gpu`.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

TEXT = [
    "The quick brown fox jumps over the lazy dog, again and again.",
    "A recipe goes in and a plain checkpoint comes out.",
    "Words repeat, and words that repeat are learned first.",
    "Numbers such as 1, 2, 3 and 5, 8, 13 follow a rule.",
]


def lines(count: int) -> list[str]:
    """Distinct lines of English of different lengths."""
    return [f"{i}: {' '.join(TEXT[(i + k) % 4] for k in range(i % 3 + 1))}" for i in range(count)]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of about 300 tokens that behaves as GPT-2's; <|endoftext|> has the last id."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(TEXT, trainer)
    backend.add_special_tokens(["<|endoftext|>"])
    return GPT2Tokenizer(
        tokenizer_object=backend,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        model_max_length=64,
    )


def save(model: PreTrainedModel, directory: Path) -> Path:
    model.save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory


def make_gpt2(**changes: Any) -> GPT2LMHeadModel:
    """Two blocks, 64 positions, large random weights, no dropout: outputs are far from uniform."""
    size = len(make_tokenizer())
    torch.manual_seed(1)
    settings: dict[str, Any] = {
        "vocab_size": size,
        "n_positions": 64,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "initializer_range": 0.2,
        "bos_token_id": size - 1,
        "eos_token_id": size - 1,
    }
    return GPT2LMHeadModel(GPT2Config(**(settings | changes))).eval()


def make_llama(**changes: Any) -> LlamaForCausalLM:
    """Another architecture: rotary positions, gated MLP, an output head of its own."""
    size = len(make_tokenizer())
    torch.manual_seed(2)
    settings: dict[str, Any] = {
        "vocab_size": size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "initializer_range": 0.2,
        "bos_token_id": size - 1,
        "eos_token_id": size - 1,
    }
    return LlamaForCausalLM(LlamaConfig(**(settings | changes))).eval()


@pytest.fixture(scope="session")
def gpt2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(make_gpt2(), tmp_path_factory.mktemp("models") / "tiny-gpt2")


@pytest.fixture(scope="session")
def dropout_gpt2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = make_gpt2(resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1)
    return save(model, tmp_path_factory.mktemp("models") / "tiny-gpt2-dropout")


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(make_llama(), tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "lines.txt"
    path.write_text("\n".join(lines(40)) + "\n", encoding="utf-8")
    return path


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Tiny tensors gain nothing from threads, and lose much where tests share the cores."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Token stores go into the test's own directory, and the hub is never asked."""
    monkeypatch.setenv("LOWVRAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # for processes that a test starts
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def tiny_recipe(model: Path, text: Path, directory: Path, **changes: Any) -> Any:
    """A Recipe of a run of a second, which writes into `directory`/run."""
    from lowvram.recipe import load_recipe

    path = directory / "recipe.yaml"
    path.write_text("model: {name: x}\ndata: {source: x}\n", encoding="utf-8")
    settings = {
        "model.name": str(model),
        "data.source": str(text),
        "train.global_batch_size": 4,
        "train.max_steps": 3,
        "train.learning_rate": 1e-2,
        "generate.max_new_tokens": 4,
        "output_dir": str(directory / "run"),
    }
    return load_recipe(str(path), settings | changes)


@pytest.fixture
def make_recipe(gpt2_dir: Path, text_file: Path, tmp_path: Path) -> Callable[..., Any]:
    """make_recipe(**{"train.max_steps": 2, ...}) -> a Recipe of a run of a second."""
    return lambda **changes: tiny_recipe(gpt2_dir, text_file, tmp_path, **changes)
