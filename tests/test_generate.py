"""Generation: the same tokens alone, batched and streamed, and nothing left changed."""

from __future__ import annotations

import copy
import logging
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from lowvram import generate as module
from lowvram.errors import ModelError, RecipeError
from lowvram.generate import Continuation, GumbelNoise, Sampling, fit_prompt, generate, stream

END = 256  # the token after the 256 bytes
POSITIONS = 64
GREEDY = Sampling(temperature=0, max_new_tokens=12)
SAMPLED = Sampling(temperature=1.5, max_new_tokens=12, seed=3)
BEAMS = Sampling(temperature=0, num_beams=3, length_penalty=0.8, max_new_tokens=12)
PENALISED = Sampling(
    temperature=1, top_k=40, repetition_penalty=1.3, no_repeat_ngram_size=1, max_new_tokens=12
)
WAYS = {"greedy": GREEDY, "sampled": SAMPLED, "beams": BEAMS, "penalised": PENALISED}
PROMPTS = ["abc", "hello world", "", "\N{GRINNING FACE} ok", "abc"]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """On a busy machine, threads cost a tiny model far more than they save."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def silence(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """What transformers logs is a warning too."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    yield
    logger.removeHandler(caplog.handler)
    assert [record.getMessage() for record in caplog.get_records("call")] == []


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, a token per byte: each emoji is four tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


def gpt2(**changes: Any) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 257, "n_positions": POSITIONS, "n_embd": 32, "n_layer": 2, "n_head": 4}
    tokens = {"bos_token_id": END, "eos_token_id": END}
    return GPT2LMHeadModel(GPT2Config(**{**sizes, **tokens, "initializer_range": 0.3, **changes}))


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=257,
            max_position_embeddings=POSITIONS,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.3,
            bos_token_id=END,
            eos_token_id=END,
        )
    )


MODELS = {"gpt2": gpt2, "llama": llama}


def script(tokens: list[int]) -> GPT2LMHeadModel:
    """A model whose likeliest token after n tokens of text is tokens[n - 1]."""
    model = gpt2(n_embd=POSITIONS, tie_word_embeddings=False)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    nn.init.eye_(model.transformer.wpe.weight)
    nn.init.ones_(model.transformer.ln_f.weight)
    with torch.no_grad():
        for place, token in enumerate(tokens):
            model.lm_head.weight[token, place] += 1
    return model


def run_to_end(pieces: Any) -> tuple[list[str], Continuation]:
    seen = []
    while True:
        try:
            seen.append(next(pieces))
        except StopIteration as stop:
            return seen, stop.value


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_batched_equals_alone_equals_streamed(name: str, way: str, tokenizer: Any) -> None:
    model, sampling = MODELS[name](), WAYS[way]
    batched = generate(model, tokenizer, PROMPTS, sampling)
    assert [continuation.prompt for continuation in batched] == PROMPTS
    for continuation in batched[:-1]:  # the last prompt is the first one again
        [alone] = generate(model, tokenizer, [continuation.prompt], sampling)
        assert continuation == alone
        pieces, streamed = run_to_end(stream(model, tokenizer, alone.prompt, sampling))
        assert streamed == alone
        assert "".join(pieces) == alone.text


@pytest.mark.parametrize("way", ["greedy", "beams"])
@pytest.mark.parametrize("name", MODELS)
def test_equals_transformers_own(name: str, way: str, tokenizer: Any) -> None:
    model, sampling = MODELS[name]().eval(), WAYS[way]
    [ours] = generate(model, tokenizer, ["hello world"], sampling)
    ids = tokenizer("hello world", return_tensors="pt")
    settings = {"num_beams": sampling.num_beams, "length_penalty": sampling.length_penalty}
    if way == "greedy":
        settings = {}
    theirs = model.generate(
        **ids, max_new_tokens=12, do_sample=False, pad_token_id=END, **settings
    )[0, 11:].tolist()
    assert theirs[: len(ours.tokens)] == list(ours.tokens)
    assert set(theirs[len(ours.tokens) :]) <= {END}


def test_seeds(tokenizer: Any) -> None:
    model = gpt2()
    settings = [Sampling(temperature=1.5, max_new_tokens=12, seed=seed) for seed in (0, 0, 1)]
    texts = [generate(model, tokenizer, ["abc", "abc"], sampling) for sampling in settings]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]
    assert texts[0][0].tokens != texts[0][1].tokens  # equal prompts differ within a batch


def test_batches_do_not_change_the_result(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = generate(gpt2(), tokenizer, PROMPTS, SAMPLED)
    monkeypatch.setattr(module, "_BATCH_TOKENS", 50)
    sizes = [len(batch) for batch in module._batches(_requests(tokenizer), SAMPLED)]
    assert sizes == [2, 2, 1]
    assert generate(gpt2(), tokenizer, PROMPTS, SAMPLED) == whole


def _requests(tokenizer: Any) -> Any:
    return module._requests(gpt2(), tokenizer, PROMPTS, SAMPLED, False)


def test_no_prompts(tokenizer: Any) -> None:
    assert generate(gpt2(), tokenizer, [], GREEDY) == []


@pytest.mark.parametrize("logits", [[0.0, 1.0, 2.0, -1.0, -math.inf, 0.5]])
def test_gumbel_noise_samples_the_softmax(logits: list[float]) -> None:
    draws, noise = 20_000, GumbelNoise(5)
    scores, ids = torch.tensor([logits]), torch.zeros(1, 1, dtype=torch.int64)
    counts = Counter(int(noise(ids, scores).argmax()) for _ in range(draws))
    expected = scores[0].softmax(-1) * draws
    seen = torch.tensor([float(counts[token]) for token in range(len(logits))])
    assert seen[4] == 0
    possible = expected > 0
    chi_square = ((seen - expected)[possible] ** 2 / expected[possible]).sum()
    assert chi_square < 18.5  # 4 degrees of freedom: passed by chance in 999 of 1,000


def test_minus_infinity_stays() -> None:
    noisy = GumbelNoise(0)(torch.zeros(1, 1), torch.tensor([[1.0, -math.inf]]))
    assert noisy[0, 0] != 1.0
    assert noisy[0, 1] == -math.inf


def test_top_p_and_top_k_bound_what_is_drawn(tokenizer: Any) -> None:
    model = gpt2()
    [greedy] = generate(model, tokenizer, ["abc"], GREEDY)
    for bound in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-6}):
        sampling = Sampling(**{"max_new_tokens": 12, "temperature": 2.0, **bound})
        assert generate(model, tokenizer, ["abc"], sampling)[0].tokens == greedy.tokens


def test_ends_at_the_end_of_text(tokenizer: Any) -> None:
    a, b = tokenizer("ab")["input_ids"]
    model = script([a, b, a, END, b, b])
    [one] = generate(model, tokenizer, ["x"], GREEDY)
    assert (one.text, one.tokens, one.finished) == ("aba", (a, b, a, END), True)
    two, _ = generate(model, tokenizer, ["x", "xyzxyz"], GREEDY)
    assert two == one
    assert run_to_end(stream(model, tokenizer, "x", GREEDY)) == (["a", "b", "a"], one)


def test_padding_is_no_text_that_may_not_come_again(tokenizer: Any) -> None:
    a, b = tokenizer("ab")["input_ids"]
    model, settings = script([a, b, END]), replace(GREEDY, no_repeat_ngram_size=1)
    [alone] = generate(model, tokenizer, ["x"], settings)
    assert alone.tokens == (a, b, END)
    padded, _ = generate(model, tokenizer, ["x", "xyz"], settings)
    assert padded == alone  # though the padding is the end-of-text token


def test_ends_where_the_generation_settings_say(tokenizer: Any) -> None:
    a, b = tokenizer("ab")["input_ids"]
    model = script([a, b, a, a])
    model.generation_config.eos_token_id = [END, b]
    [one] = generate(model, tokenizer, ["x"], GREEDY)
    assert (one.text, one.tokens, one.finished) == ("a", (a, b), True)
    assert run_to_end(stream(model, tokenizer, "x", GREEDY)) == (["a"], one)


def test_max_new_tokens_is_obeyed(tokenizer: Any) -> None:
    [a] = tokenizer("a")["input_ids"]
    [one] = generate(script([a] * 30), tokenizer, ["x"], Sampling(max_new_tokens=7, temperature=0))
    assert (one.text, len(one.tokens), one.finished) == ("a" * 7, 7, False)


def test_characters_are_streamed_whole(tokenizer: Any) -> None:
    text = "\N{GRINNING FACE}\u00e9a\N{THUMBS UP SIGN}"
    tokens = tokenizer(text)["input_ids"]
    assert len(tokens) == 4 + 2 + 1 + 4
    settings = Sampling(temperature=0, max_new_tokens=len(tokens))
    pieces, whole = run_to_end(stream(script(tokens), tokenizer, "x", settings))
    assert pieces == list(text)
    assert whole.text == text
    cut = Sampling(temperature=0, max_new_tokens=len(tokens) - 1)
    pieces, part = run_to_end(stream(script(tokens), tokenizer, "x", cut))
    assert pieces == list(text[:-1])
    assert generate(script(tokens), tokenizer, ["x"], cut) == [part]
    assert part.text == text[:-1]


def test_bytes_that_are_no_character_are_not_held_forever(tokenizer: Any) -> None:
    emoji, rest = tokenizer("\N{GRINNING FACE}")["input_ids"], tokenizer("ab")["input_ids"]
    tokens = [emoji[0], *rest]
    settings = Sampling(temperature=0, max_new_tokens=3)
    pieces, whole = run_to_end(stream(script(tokens), tokenizer, "x", settings))
    assert pieces == ["\ufffda", "b"]
    assert whole.text == tokenizer.decode(tokens)


def test_leading_space_of_a_word_is_kept() -> None:
    words = {"<s>": 0, "</s>": 1, "▁hello": 2, "▁world": 3, "▁": 4}
    backend = Tokenizer(models.WordLevel(words, unk_token="<s>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    model = script([3, 2, 1])
    model.generation_config.eos_token_id = 1
    [one] = generate(model, tokenizer, ["hello"], GREEDY)
    assert one.text == " world hello"
    assert run_to_end(stream(model, tokenizer, "hello", GREEDY)) == ([" world", " hello"], one)


def test_empty_prompt_starts_from_the_end_of_text(tokenizer: Any) -> None:
    model = gpt2()
    [empty] = generate(model, tokenizer, [""], GREEDY)
    [spelled] = generate(model, tokenizer, ["<|endoftext|>"], GREEDY, allow_special_tokens=True)
    assert empty.tokens == spelled.tokens
    bare = copy.deepcopy(tokenizer)
    bare.eos_token = None
    with pytest.raises(ModelError, match="an empty prompt needs a tokenizer with a token that"):
        generate(model, bare, [""], GREEDY)


def test_special_tokens_in_a_prompt_are_text(tokenizer: Any) -> None:
    prompt = "a<|endoftext|>b"
    backend = tokenizer.backend_tokenizer
    for setting in (False, True):
        backend.encode_special_tokens = setting
        assert len(module._encode(tokenizer, prompt, False)) == len(prompt)
        assert backend.encode_special_tokens is setting
        assert len(module._encode(tokenizer, prompt, True)) == 3
        assert backend.encode_special_tokens is setting
    backend.encode_special_tokens = False


def test_prompt_that_is_too_long_loses_its_beginning(tokenizer: Any) -> None:
    model, prompt = gpt2(n_positions=32), "0123456789" * 3
    settings = Sampling(temperature=0, max_new_tokens=10)
    [long] = generate(model, tokenizer, [prompt], settings)
    assert long.notes == (
        "the prompt's first 8 of 30 tokens were left out: with 10 new tokens, "
        "the model's 32 positions have room for 22",
    )
    [short] = generate(model, tokenizer, [prompt[8:]], settings)
    assert short.notes == ()
    assert short.tokens == long.tokens
    assert run_to_end(stream(model, tokenizer, prompt, settings))[1] == long
    assert fit_prompt([1, 2, 3], None, 10**6) == ([1, 2, 3], None)
    assert fit_prompt([1, 2, 3], 8, 5) == ([1, 2, 3], None)


@pytest.mark.parametrize("new", [32, 100])
def test_no_room_for_a_prompt(new: int, tokenizer: Any) -> None:
    with pytest.raises(
        RecipeError,
        match=f"generate.max_new_tokens: found {new}, allowed 1 to 31: the model has 32 positions",
    ):
        generate(gpt2(n_positions=32), tokenizer, ["a"], Sampling(max_new_tokens=new))


def test_prompt_that_ends_in_a_space_gets_a_note(tokenizer: Any) -> None:
    spaced, plain = generate(gpt2(), tokenizer, ["Hello ", "Hello"], GREEDY)
    assert [note.split(",")[0] for note in spaced.notes] == ["the prompt ends in a space"]
    assert plain.notes == ()
    assert spaced.prompt == "Hello "
    assert spaced.tokens != plain.tokens


def test_tokenizer_of_another_model(tokenizer: Any) -> None:
    model = gpt2(vocab_size=60, bos_token_id=0, eos_token_id=0)
    with pytest.raises(ModelError, match="tokenizer does not belong to the model: .* 0 to 59"):
        generate(model, tokenizer, ["hello"], GREEDY)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "generate.max_new_tokens: found 0, allowed 1 or more"),
        ({"temperature": -1}, "generate.temperature: found -1, allowed 0 or more"),
        ({"temperature": math.nan}, "generate.temperature: found nan, allowed 0 or more"),
        ({"top_p": 0}, "generate.top_p: found 0, allowed above 0, to 1"),
        ({"top_k": 0}, "generate.top_k: found 0, allowed 1 or more"),
        ({"num_beams": 0}, "generate.num_beams: found 0, allowed 1 or more"),
        ({"repetition_penalty": 0}, "generate.repetition_penalty: found 0, allowed above 0"),
        ({"no_repeat_ngram_size": -1}, "generate.no_repeat_ngram_size: found -1, allowed 0 or"),
        ({"num_beams": 2}, "generate.num_beams: found 2 with temperature 0.8; beam search does"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Sampling(**settings)


@pytest.mark.parametrize("way", WAYS)
def test_all_is_left_as_it_was(way: str, tokenizer: Any) -> None:
    model = gpt2(resid_pdrop=0.5, use_cache=False).train()
    model.transformer.h[0].eval()
    model.generation_config.do_sample = True
    model.generation_config.temperature = 0.3
    model.generation_config.suppress_tokens = [1, 2]
    settings, before = model.generation_config, model.generation_config.to_dict()
    config, random_state = model.config.to_dict(), torch.get_rng_state()
    state = tokenizer.backend_tokenizer.to_str(), tokenizer.padding_side, tokenizer.pad_token
    once, again = (generate(model, tokenizer, PROMPTS, WAYS[way]) for _ in range(2))
    assert once == again  # so dropout was off
    assert model.training
    assert not model.transformer.h[0].training
    assert model.generation_config is settings
    assert settings.to_dict() == before
    assert model.config.to_dict() == config
    assert torch.equal(torch.get_rng_state(), random_state)
    assert state == (
        tokenizer.backend_tokenizer.to_str(),
        tokenizer.padding_side,
        tokenizer.pad_token,
    )
    fresh = generate(gpt2(), tokenizer, PROMPTS, WAYS[way])
    assert once == fresh  # the model's own settings played no part


def test_a_stream_may_be_left_at_any_time(tokenizer: Any) -> None:
    model = gpt2().train()
    pieces = stream(model, tokenizer, "abc", GREEDY)
    next(pieces)
    assert model.training  # between two pieces, the model is the caller's
    assert torch.is_grad_enabled()
    pieces.close()
    with pytest.raises(StopIteration):
        next(pieces)


# peft asks transformers by an attribute that has a newer name
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_adapter_generates_like_its_merge(tokenizer: Any) -> None:
    lora = LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    adapted = get_peft_model(gpt2(), lora).eval()
    live = generate(adapted, tokenizer, PROMPTS, SAMPLED)
    assert run_to_end(stream(adapted, tokenizer, PROMPTS[0], SAMPLED))[1] == live[0]
    assert generate(adapted.merge_and_unload(), tokenizer, PROMPTS, SAMPLED) == live
    assert generate(gpt2(), tokenizer, PROMPTS, SAMPLED) != live
