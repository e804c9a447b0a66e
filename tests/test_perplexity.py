"""Perplexity against a token-by-token reference, and what must not change it."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from lowvram import perplexity
from lowvram.errors import DataError, ModelError, RecipeError
from lowvram.metric import Perplexity
from lowvram.perplexity import PerplexityResult, score

VOCABULARY = 97


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """On a busy machine, threads cost a tiny model far more than they save."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def gpt2(seed: int = 0, **changes: Any) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCABULARY, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    tokens = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(
        GPT2Config(**{**sizes, **dropout, **tokens, "initializer_range": 0.3, **changes})
    ).eval()


def llama_sizes() -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 32,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.3,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": None,
    }


def llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**llama_sizes(), tie_word_embeddings=False)).eval()


def gemma2(seed: int = 0) -> Gemma2ForCausalLM:
    torch.manual_seed(seed)
    config = Gemma2Config(**llama_sizes(), head_dim=8, final_logit_softcapping=2.0)
    return Gemma2ForCausalLM(config).eval()


MODELS = {"gpt2": gpt2, "llama": llama, "gemma2": gemma2}


def document(tokens: int, seed: int = 0) -> tuple[Any, int, int]:
    ids = np.random.default_rng(seed).integers(0, VOCABULARY, tokens).astype(np.uint16)
    return ids, 5 * tokens, max(1, tokens // 2)


def ragged(count: int = 23) -> list[tuple[Any, int, int]]:
    lengths = np.random.default_rng(7).integers(1, 80, count)
    return [document(int(length), seed) for seed, length in enumerate(lengths)]


@torch.no_grad()
def reference(model: nn.Module, tokens: Any, context: int, stride: int) -> float:
    """Sum of -ln p, one forward pass a target, each with exactly its own window's context."""
    double = model.double()
    total = 0.0
    for target in range(1, len(tokens)):
        start = 0
        while start + context <= target:  # the first window that holds the target scores it
            start += stride
        ids = torch.tensor(tokens[start:target].astype(np.int64))[None]
        logits = double(input_ids=ids, use_cache=False).logits[0, -1]
        total -= logits.log_softmax(-1)[int(tokens[target])].item()
    model.float()
    return total


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("length", "context", "stride"),
    [
        (50, 16, 1),
        (50, 16, 8),
        (50, 16, 15),
        (50, 2, 1),
        (16, 16, 5),
        (17, 16, 5),
        (17, 16, 15),
        (64, 32, 20),
        (2, 32, 31),
    ],
)
def test_equals_token_by_token_reference(name: str, length: int, context: int, stride: int) -> None:
    model, text = MODELS[name](), document(length)
    result = score(model, [text], context_length=context, stride=stride, batch_size=3)
    assert result.nll_sum == pytest.approx(reference(model, text[0], context, stride), rel=1e-6)
    assert result.tokens_scored == length - 1


@pytest.mark.parametrize("batch_size", [None, 1, 4, 100])
def test_uniform_model_has_perplexity_of_its_vocabulary(batch_size: int | None) -> None:
    model = gpt2()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    result = score(model, ragged(), context_length=16, stride=9, batch_size=batch_size)
    assert result.perplexity == pytest.approx(VOCABULARY, abs=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_batch_size_does_not_change_the_result(name: str) -> None:
    model = MODELS[name]()
    one, *others = (
        score(model, ragged(), context_length=32, stride=20, batch_size=size)
        for size in (1, 7, 64, None)
    )
    for other in others:
        assert other.tokens_scored == one.tokens_scored
        assert other.perplexity == pytest.approx(one.perplexity, rel=1e-6)


def test_corpus_perplexity_weighs_tokens() -> None:
    model, texts = gpt2(), [document(3, 1), document(30, 2)]
    both = score(model, texts, context_length=32, stride=16)
    parts = [score(model, [text], context_length=32, stride=16) for text in texts]
    nll_sum = sum(part.nll_sum for part in parts)
    assert both.perplexity == pytest.approx(math.exp(nll_sum / (2 + 29)), rel=1e-6)
    assert both.perplexity != pytest.approx(sum(p.perplexity for p in parts) / 2, rel=1e-2)


@pytest.mark.parametrize("stride", range(1, 12))
def test_each_token_but_the_first_is_scored_once(stride: int) -> None:
    for length in (2, 11, 12, 13, 40):
        result = score(gpt2(), [document(length)], context_length=12, stride=stride)
        assert result.tokens_scored == length - 1


def test_stride_is_of_no_matter_within_one_context() -> None:
    results = {
        score(gpt2(), [document(32)], context_length=32, stride=stride).nll_sum
        for stride in (1, 16, 31)
    }
    assert len(results) == 1


def test_more_context_is_used_by_a_smaller_stride() -> None:
    windows = list(perplexity._windows(*document(25), context_length=10, stride=4))
    assert [(len(w.tokens), w.first) for w in windows] == [
        (10, 1),
        (10, 6),
        (10, 6),
        (10, 6),
        (9, 6),
    ]
    assert [(w.documents, w.bytes, w.words) for w in windows] == [(1, 125, 12), *[(0, 0, 0)] * 4]


def test_documents_without_a_target_count_nowhere() -> None:
    texts = [document(20), document(1), document(0)]
    alone, result = (
        score(gpt2(), some, context_length=16, stride=8) for some in (texts[:1], texts)
    )
    assert result == alone
    assert (result.documents, result.bytes, result.words) == (1, 100, 10)


@pytest.mark.parametrize("texts", [[], [document(1)], [document(0)]])
def test_nothing_to_score(texts: list[Any]) -> None:
    with pytest.raises(DataError, match="nothing to score, no document has two tokens or more"):
        score(gpt2(), texts, context_length=16, stride=8)


def test_result_and_its_json() -> None:
    result = score(gpt2(), [document(40), document(9)], context_length=16, stride=8)
    assert result.bits_per_byte == result.nll_sum / (math.log(2) * 5 * 49)
    assert result.word_perplexity == math.exp(result.nll_sum / 24)
    assert json.loads(json.dumps(result.to_json())) == {
        "perplexity": result.perplexity,
        "nll_sum": result.nll_sum,
        "tokens_scored": 47,
        "context_length": 16,
        "stride": 8,
        "bits_per_byte": result.bits_per_byte,
        "word_perplexity": result.word_perplexity,
    }


def test_unknown_bytes_and_words_give_no_figure() -> None:
    ids, _, _ = document(20)
    result = score(gpt2(), [(ids, 0, 0)], context_length=16, stride=8)
    assert result.bits_per_byte is None
    assert result.word_perplexity is None


def test_infinity_is_null_in_json() -> None:
    metric = Perplexity()
    metric.add_batch(nll_sum=[1e6], tokens=[2], documents=[1], bytes=[0], words=[1])
    values = metric.compute()
    assert values["perplexity"] == values["word_perplexity"] == math.inf
    written = PerplexityResult(**values, context_length=4, stride=2).to_json()
    assert written["perplexity"] is None
    assert "Infinity" not in json.dumps(written)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stride": 0}, "evaluate.stride: found 0, allowed 1 to 15"),
        ({"stride": 16}, "evaluate.stride: found 16, allowed 1 to 15"),
        ({"context_length": 33}, "evaluate.context_length: found 33, allowed 2 to 32"),
        ({"context_length": 1}, "evaluate.context_length: found 1, allowed 2 to 32"),
        ({"batch_size": 0}, "evaluate.batch_size: found 0, allowed 1 or more"),
        ({"precision": "fp8"}, "evaluate.precision: found fp8, allowed fp32, bf16 or fp16"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        score(gpt2(), [document(9)], **{"context_length": 16, "stride": 8, **settings})


def test_tokens_of_another_vocabulary() -> None:
    ids = np.array([1, 2, VOCABULARY, 3])
    with pytest.raises(DataError, match="found token 97, allowed 0 to 96"):
        score(gpt2(), [(ids, 4, 1)], context_length=16, stride=8)


def test_nan_is_an_error() -> None:
    model = gpt2()
    nn.init.constant_(model.transformer.ln_f.weight, math.nan)
    with pytest.raises(ModelError, match="the model gives NaN; try precision fp32 or bf16"):
        score(model, [document(9)], context_length=16, stride=8)


def test_model_and_random_state_are_left_as_they_were() -> None:
    model = gpt2(resid_pdrop=0.5).train()
    frozen = model.transformer.h[0].eval()
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    first, second = (
        score(model, ragged(), context_length=16, stride=8, batch_size=3) for _ in range(2)
    )
    assert first == second  # so dropout was off
    assert model.training
    assert model.transformer.h[1].training
    assert not frozen.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (np.random.get_state()[1].tolist(), random.getstate())


def test_training_mode_comes_back_after_an_error() -> None:
    model = gpt2().train()
    with pytest.raises(DataError):
        score(model, [(np.array([1, 99]), 2, 1)], context_length=16, stride=8)
    assert model.training


def test_autocast_is_near_full_precision() -> None:
    full, half = (
        score(gpt2(), ragged(), context_length=32, stride=16, precision=precision)
        for precision in ("fp32", "bf16")
    )
    assert half.perplexity != full.perplexity
    assert half.perplexity == pytest.approx(full.perplexity, rel=0.05)


# peft asks transformers by an attribute that has a newer name
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_adapter_is_scored_like_its_merge() -> None:
    texts, settings = ragged(), {"context_length": 16, "stride": 8}
    base = score(gpt2(), texts, **settings)
    adapted = get_peft_model(
        gpt2(),
        LoraConfig(
            target_modules=["c_attn"],
            fan_in_fan_out=True,
            init_lora_weights=False,
            lora_dropout=0.5,
        ),
    ).train()
    live = score(adapted, texts, **settings)
    merged = score(adapted.merge_and_unload(), texts, **settings)
    assert live.perplexity == pytest.approx(merged.perplexity, rel=1e-5)
    assert live.perplexity != pytest.approx(base.perplexity, rel=1e-2)


def test_progress_counts_scored_tokens() -> None:
    seen: list[int] = []
    settings = {"context_length": 16, "stride": 8, "batch_size": 2}
    result = score(gpt2(), ragged(), **settings, progress=seen.append)
    assert seen == sorted(set(seen))
    assert len(seen) > 10
    assert seen[-1] == result.tokens_scored


class LargestLogits(TorchDispatchMode):
    """The most elements of any tensor whose last dimension is the vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.shape[-1:] == (VOCABULARY,):
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("name", MODELS)
def test_logits_exist_in_chunks_only(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perplexity, "chunk_rows", lambda vocabulary, rows: 40)
    model = MODELS[name]()  # 32 wide: its output layer, transposed, is smaller than a chunk
    with LargestLogits() as largest:
        score(model, [document(3000)], context_length=32, stride=16, batch_size=8)
    assert 0 < largest.elements <= 40 * VOCABULARY


def test_memory_mapped_tokens_are_read_a_window_at_a_time(tmp_path: Path) -> None:
    file = tmp_path / "tokens.bin"
    document(500)[0].tofile(file)
    mapped = np.memmap(file, dtype=np.uint16, mode="r")
    seen = []

    class Watched(np.ndarray):  # a window is a view; only building a batch copies
        def __getitem__(self, key: Any) -> Any:
            if isinstance(key, slice):
                seen.append(key.stop - key.start)
            return super().__getitem__(key)

    settings = {"context_length": 32, "stride": 16}
    result = score(gpt2(), [(mapped.view(Watched), 1, 1)], **settings)
    assert max(seen) == 32
    assert result.nll_sum == score(gpt2(), [(mapped, 1, 1)], **settings).nll_sum


def test_metrics_at_work_together_do_not_mix() -> None:
    one, two = Perplexity(), Perplexity()
    rest = {"documents": [1], "bytes": [8], "words": [2]}
    one.add_batch(nll_sum=[math.log(4)], tokens=[1], **rest)
    two.add_batch(nll_sum=[math.log(8)], tokens=[1], **rest)
    one.add_batch(nll_sum=[math.log(4)], tokens=[1], **rest)
    first, second = one.compute(), two.compute()
    assert first["perplexity"] == pytest.approx(4)
    assert first["tokens_scored"] == 2
    assert second["perplexity"] == pytest.approx(8)
    one.add_batch(nll_sum=[math.log(3)], tokens=[1], **rest)  # and it starts afresh
    assert one.compute()["perplexity"] == pytest.approx(3)


def test_metric_without_rows_says_so() -> None:
    with pytest.raises(DataError, match="nothing to score"):
        Perplexity().compute()


def test_works_offline_and_leaves_nothing_behind(tmp_path: Path) -> None:
    code = """
import socket, sys
def refuse(*args, **kwargs): raise OSError("network")
socket.socket.connect = socket.getaddrinfo = refuse
import numpy
from transformers.models.gpt2 import GPT2Config, GPT2LMHeadModel
from lowvram.perplexity import score
config = GPT2Config(vocab_size=9, n_positions=16, n_embd=8, n_layer=1, n_head=2)
documents = [(numpy.arange(50) % 9, 1, 1)]
print(score(GPT2LMHeadModel(config), documents, context_length=16, stride=8).tokens_scored)
print([name for name in sys.modules if "perplexity" in name and name != "lowvram.perplexity"])
"""
    places = {"HOME": tmp_path, "HF_HOME": tmp_path / "hf", "TMPDIR": tmp_path}
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent.parent,
        env={**os.environ, **{name: str(path) for name, path in places.items()}},
    )
    assert result.stdout.split() == ["49", "[]"]
    assert list(tmp_path.rglob("*")) == []
