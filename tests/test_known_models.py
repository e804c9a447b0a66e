"""What is known of models without the hub is what their config.json say, and such models train."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_llama, make_tokenizer, save
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, SmolLM3Config, SmolLM3ForCausalLM

import lowvram
from lowvram.fit import choose_seq_len
from lowvram.known_models import known_settings
from lowvram.memory import find_card
from lowvram.memory.measure import GIB
from lowvram.model import context_length, empty_model, known_config, parameter_count
from lowvram.prediction import predictor
from lowvram.recipe import list_recipes, load_recipe
from lowvram.rehearsal import BatchShape

# From the config.json of each on the hub, as published; what only names files or formats left out.
SMOLLM3 = {
    "architectures": ["SmolLM3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128012,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 65536,
    "max_window_layers": 28,
    "mlp_bias": False,
    "model_type": "smollm3",
    "no_rope_layer_interval": 4,
    "no_rope_layers": [1, 1, 1, 0] * 9,
    "num_attention_heads": 16,
    "num_hidden_layers": 36,
    "num_key_value_heads": 4,
    "pad_token_id": 128004,
    "pretraining_tp": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 5000000.0,
    "sliding_window": None,
    "torch_dtype": "bfloat16",
    "use_cache": False,
    "use_sliding_window": False,
    "vocab_size": 128256,
}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 24,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 128256,
}
GPT2_XL = {
    "architectures": ["GPT2LMHeadModel"],
    "activation_function": "gelu_new",
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "embd_pdrop": 0.1,
    "eos_token_id": 50256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 1600,
    "n_head": 25,
    "n_layer": 48,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    "vocab_size": 50257,
}
NO_MATTER = {  # ids of tokens, and what a file says of itself
    "_name_or_path",
    "architectures",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "max_window_layers",
    "n_ctx",
    "pad_token_id",
    "pretraining_tp",
    "transformers_version",
    "use_cache",
}


def facts(config: Any) -> dict[str, Any]:
    return {key: value for key, value in config.to_dict().items() if key not in NO_MATTER}


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("HuggingFaceTB/SmolLM3-3B", SMOLLM3),
        ("HuggingFaceTB/SmolLM3-3B-Base", SMOLLM3),
        ("meta-llama/Llama-3.2-3B", LLAMA),
        ("gpt2-xl", GPT2_XL),
        ("openai-community/gpt2-xl", GPT2_XL),
    ],
)
def test_what_is_known_is_what_was_published(
    name: str, published: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(published))

    assert facts(known_config(name)) == facts(AutoConfig.from_pretrained(tmp_path))


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("distilgpt2", 81_912_576),
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
        # its files on the hub are 6,150,235,008 bytes: two for each, and the headers
        ("HuggingFaceTB/SmolLM3-3B", 3_075_098_624),
        ("meta-llama/Llama-3.2-3B", 3_212_749_824),
    ],
)
def test_known_sizes_have_the_published_number_of_parameters(name: str, count: int) -> None:
    assert parameter_count(empty_model(name)) == count


@pytest.mark.parametrize("name", ["gpt3", "someone/gpt2", "SmolLM3-3B", "meta-llama/Llama-3.2-1B"])
def test_other_models_are_not_known(name: str) -> None:
    """Not those of others with the same name either."""
    assert known_settings(name) is None


def test_what_is_known_cannot_be_changed_from_outside() -> None:
    known_config("meta-llama/Llama-3.2-3B").rope_parameters["factor"] = 1.0
    settings = known_settings("meta-llama/Llama-3.2-3B")
    assert settings is not None
    settings["rope_scaling"]["factor"] = 2.0

    assert known_config("meta-llama/Llama-3.2-3B").rope_parameters["factor"] == 32.0


def test_a_directory_of_that_name_comes_first(
    llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gpt2").symlink_to(llama_dir)
    monkeypatch.chdir(tmp_path)

    assert known_config("gpt2").model_type == "llama"


# --- a small model of the kind ----------------------------------------------------------------


def make_smollm3() -> SmolLM3ForCausalLM:
    """Tied, grouped queries, the fourth of four blocks without positions."""
    size = len(make_tokenizer())
    torch.manual_seed(3)
    config = SmolLM3Config(
        vocab_size=size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        bos_token_id=size - 1,
        eos_token_id=size - 1,
        pad_token_id=size - 1,
    )
    return SmolLM3ForCausalLM(config).eval()


def test_the_fourth_block_has_no_positions() -> None:
    model = make_smollm3()

    assert [bool(block.self_attn.use_rope) for block in model.model.layers] == [1, 1, 1, 0]


@pytest.mark.parametrize("make", [make_smollm3, lambda: make_llama(tie_word_embeddings=True)])
def test_a_small_one_is_trained_in_4_bits_and_merged(
    make: Callable[[], Any], make_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    """The shipped recipe's settings; the merge is of the base as it is in its file."""
    base = save(make(), tmp_path / "base")
    shipped = load_recipe("llama-3b-nf4-lora")
    recipe = make_recipe(
        **{
            "model.name": str(base),
            "model.dtype": shipped.model.dtype,
            "method.target_modules": shipped.method.target_modules,
            "train.optimizer": shipped.train.optimizer,
            "train.max_steps": 12,
            "train.warmup_steps": 0,
            "train.schedule": "constant",
        }
    )

    result = lowvram.run(recipe)

    assert result.perplexity["adapter"] < 0.9 * result.perplexity["base"]
    assert 0 <= result.merge["max_logit_difference"] < result.merge["tolerance"]
    before = load_file(base / "model.safetensors")
    after = load_file(Path(result.output_dir) / "merged" / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys()  # still tied: no head of its own
    assert changed == {name for name in before if "q_proj" in name or "v_proj" in name}
    loaded, report = AutoModelForCausalLM.from_pretrained(
        Path(result.output_dir) / "merged", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_documents_do_not_see_each_other(attention: str) -> None:
    """With and without positions: logits of each are those of it alone, to 1e-4."""
    model = make_smollm3()
    model.set_attn_implementation(attention)
    ids = torch.randint(0, 200, (1, 16))
    places = torch.cat([torch.arange(7), torch.arange(9)])[None]
    with torch.no_grad():
        packed = model(input_ids=ids, position_ids=places, use_cache=False).logits
        for part in (slice(0, 7), slice(7, 16)):
            alone = model(input_ids=ids[:, part], use_cache=False).logits
            torch.testing.assert_close(packed[:, part], alone, rtol=0, atol=1e-4)


# --- what fits --------------------------------------------------------------------------------


def test_a_3b_model_in_4_bits_fits_12_gib_with_4_rows_of_1024() -> None:
    """Without network, and with half of the card left."""
    recipe = load_recipe("llama-3b-nf4-lora")
    positions = context_length(known_config(recipe.model.name))
    length = choose_seq_len(recipe.fit.max_seq_len, positions, positions)
    shape = BatchShape(micro_batch_size=4, seq_len=length, gradient_checkpointing=True)

    with predictor(find_card("rtx-4070-ti")) as predict:
        found = predict(recipe, shape)

    assert length == 1024
    assert round(found.budget_bytes / GIB, 2) == 11.44
    assert found.fits
    assert found.reserved_bytes < 6 * GIB


def test_gpt2_xl_with_lora_fits_12_gib_with_8_rows_of_1024() -> None:
    """Frozen weights in 16 bits: half of the card is left."""
    assert "gpt2-xl-lora" in dict(list_recipes())
    recipe = load_recipe("gpt2-xl-lora")
    assert recipe.fit.micro_batch_size == 8
    shape = BatchShape(micro_batch_size=8, seq_len=1024, gradient_checkpointing=True)

    with predictor(find_card("rtx-4070-ti")) as predict:
        found = predict(recipe, shape)

    weights = 2 * 1_557_611_200
    assert found.fits
    assert found.categories["base weights"] == weights
    assert round(found.budget_bytes / GIB, 2) == 11.44
    assert found.reserved_bytes < 6 * GIB
