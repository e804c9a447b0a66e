"""Models come from safetensors only, whole and in the dtype asked for, and go out plain."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from conftest import make_gpt2, make_llama, make_tokenizer, save
from huggingface_hub.utils import filter_repo_objects
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import models, pre_tokenizers
from transformers import AutoTokenizer, BloomConfig, GPT2Config, GPT2LMHeadModel, GPT2Model
from transformers.utils import logging as transformers_logging

from lowvram import model as module
from lowvram.errors import ModelError
from lowvram.model import (
    context_length,
    empty_model,
    fuse_gelu,
    load_config,
    load_model,
    load_tokenizer,
    locate,
    parameter_count,
    save_plain,
    weight_files,
    weights_sha256,
)

IDS = torch.arange(3, 60).unsqueeze(0)

GPT2_TENSORS = {
    f"transformer.h.{layer}.{name}.{kind}"
    for layer in range(2)
    for name in ("ln_1", "ln_2", "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    for kind in ("weight", "bias")
} | {f"transformer.{name}" for name in ("wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias")}


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


@pytest.fixture
def copy(gpt2_dir: Path, tmp_path: Path) -> Path:
    """The tiny GPT-2 in a directory that a test may damage."""
    return Path(shutil.copytree(gpt2_dir, tmp_path / "model"))


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


# Where models are


def test_a_directory_is_found_as_it_is(gpt2_dir: Path) -> None:
    assert locate(str(gpt2_dir)) == gpt2_dir


def test_a_directory_below_home_is_found(gpt2_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(gpt2_dir.parent))
    monkeypatch.setenv("USERPROFILE", str(gpt2_dir.parent))

    assert locate(f"~/{gpt2_dir.name}") == gpt2_dir


def test_embedded_models_are_those_of_the_package(
    gpt2_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_ASSETS", gpt2_dir.parent)

    assert locate("embedded:tiny-gpt2") == gpt2_dir


@pytest.mark.parametrize("name", ["embedded:", "embedded:nonsense", "embedded:../models"])
def test_other_embedded_names_are_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models" / "one").mkdir(parents=True)
    (tmp_path / "models" / "two").mkdir()
    monkeypatch.setattr(module, "_ASSETS", tmp_path / "models")

    with pytest.raises(ModelError) as error:
        locate(name)

    assert str(error.value) == (
        f"model.name: found {name!r}, embedded models are: embedded:one, embedded:two"
    )


@pytest.mark.parametrize("name", ["no/such/dir", "/nowhere", "a b", "~nobody/x", "-x", "", "ä"])
def test_what_is_neither_directory_nor_hub_id_is_refused(name: str) -> None:
    with pytest.raises(ModelError) as error:
        weight_files(name)

    if name == "":
        assert "model.name" in str(error.value)  # "" is the working directory, with no model in it
    else:
        assert str(error.value) == (
            f"model.name: {name!r} is no directory ({Path(name).absolute()} does not exist) "
            "and no model id of the hub (NAME or ORGANISATION/NAME)"
        )


def test_a_name_too_long_for_a_file_system_is_refused() -> None:
    with pytest.raises(ModelError, match="model.name"):
        locate("a" * 5000)


@pytest.mark.parametrize("load", [locate, load_config, load_tokenizer, load_model])
def test_a_hub_id_without_network_says_what_to_do(load: Callable[[str], Any]) -> None:
    with pytest.raises(ModelError) as error:
        load("some-organisation/some-model")

    message = str(error.value)
    assert message.startswith("model.name: 'some-organisation/some-model' is no directory here (")
    assert "and the hub could not be asked for it or does not have it" in message
    assert message.endswith(
        "). Give a directory with config.json and model.safetensors, or connect to the network once"
    )


@pytest.mark.parametrize(
    ("load", "weights"),
    [(load_config, False), (load_tokenizer, False), (empty_model, False), (load_model, True)],
)
def test_from_the_hub_comes_what_is_needed_and_nothing_that_runs(
    gpt2_dir: Path, monkeypatch: pytest.MonkeyPatch, load: Any, weights: bool
) -> None:
    """Weights only once they are used; never pickles, code or other libraries' files."""
    fetched: set[str] = set()
    # The files of the hub's gpt2, and two that other repositories have.
    files = (
        "64-8bits.tflite 64.tflite README.md config.json flax_model.msgpack generation_config.json "
        "merges.txt model.safetensors onnx/config.json onnx/decoder_model.onnx onnx/merges.txt "
        "pytorch_model.bin rust_model.ot tf_model.h5 tokenizer.json tokenizer_config.json "
        "vocab.json modeling_evil.py model.safetensors.index.json original/model.safetensors"
    ).split()

    def download(repository: str, revision: str, **patterns: Any) -> str:
        assert (repository, revision) == ("gpt2", "main")
        fetched.update(filter_repo_objects(files, **patterns))
        return str(gpt2_dir)

    monkeypatch.setattr(module, "snapshot_download", download)

    load("gpt2", revision="main")

    small = (
        "config.json generation_config.json merges.txt tokenizer.json tokenizer_config.json "
        "vocab.json model.safetensors.index.json"
    )
    assert fetched == {*small.split(), *(["model.safetensors"] if weights else [])}


# What is refused


class Evil:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_pickles_are_refused_unopened(copy: Path, tmp_path: Path) -> None:
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(tmp_path / "executed")))

    for use in (load_model, weight_files, weights_sha256):
        with pytest.raises(ModelError) as error:
            use(str(copy))
        assert str(error.value) == (
            f"model.name: {str(copy)!r} has its weights as a pickle (pytorch_model.bin), which can "
            "run code when it is opened; convert it to safetensors where you trust it, for example "
            "with transformers' save_pretrained, and name that directory"
        )
    assert not (tmp_path / "executed").exists()


def test_code_in_a_model_directory_is_not_run(copy: Path, tmp_path: Path) -> None:
    (copy / "evil.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n")
    names = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": "evil.T"}
    edit_config(copy, model_type="evil", auto_map=names)

    for use in (load_config, load_model, empty_model):
        with pytest.raises(ModelError, match="^model.name: cannot load "):
            use(str(copy))
    assert not (tmp_path / "executed").exists()


def test_no_weights_at_all_are_refused(copy: Path) -> None:
    (copy / "model.safetensors").unlink()

    with pytest.raises(ModelError) as error:
        load_model(str(copy))

    assert str(error.value) == f"model.name: found no model.safetensors in {str(copy)!r}"


def test_missing_tensors_are_refused(copy: Path) -> None:
    """transformers would fill them with random numbers and go on."""

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["transformer.h.1.attn.c_attn.weight"], tensors["transformer.ln_f.bias"]

    edit_weights(copy, drop)

    with pytest.raises(ModelError) as error:
        load_model(str(copy))

    assert str(error.value) == (
        f"model.name: the weights of {str(copy)!r} lack 2 tensors of the model "
        "(transformer.h.1.attn.c_attn.weight, transformer.ln_f.bias, ...); "
        "it is not a whole plain checkpoint"
    )


def test_a_checkpoint_with_unmerged_adapters_is_refused(copy: Path) -> None:
    """The names that peft gives to what is below an adapter."""

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        name = "transformer.h.0.attn.c_attn"
        tensors[f"{name}.base_layer.weight"] = tensors.pop(f"{name}.weight")

    edit_weights(copy, rename)

    with pytest.raises(ModelError, match=r"lack 1 tensors of the model \(transformer.h.0.attn"):
        load_model(str(copy))


def test_wrong_shapes_are_refused(copy: Path) -> None:
    def cut(tensors: dict[str, torch.Tensor]) -> None:
        name = "transformer.h.1.mlp.c_fc.weight"
        tensors[name] = tensors[name][:, :100].contiguous()

    edit_weights(copy, cut)

    with pytest.raises(ModelError) as error:
        load_model(str(copy))

    assert str(error.value) == (
        f"model.name: 1 tensors of {str(copy)!r} have other shapes than its config.json says: "
        "transformer.h.1.mlp.c_fc.weight is (32, 100), not (32, 128)"
    )


@pytest.mark.parametrize("content", [b"", b"garbage", b"\xff" * 8 + b"{}", b"PK\x03\x04" * 100])
def test_corrupt_weights_are_an_error_of_the_model(copy: Path, content: bytes) -> None:
    (copy / "model.safetensors").write_bytes(content)

    with pytest.raises(ModelError, match="^model.name: cannot load "):
        load_model(str(copy))


def test_cut_off_weights_are_an_error_of_the_model(copy: Path) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])

    with pytest.raises(ModelError, match="^model.name: cannot load "):
        load_model(str(copy))


@pytest.mark.parametrize(
    "changes",
    [{"n_embd": "many"}, {"n_head": 0}, {"n_embd": 33}, {"model_type": "nonsense"}],
    ids=str,
)
def test_impossible_configurations_are_an_error_of_the_model(
    copy: Path, changes: dict[str, Any]
) -> None:
    edit_config(copy, **changes)

    with pytest.raises(ModelError, match="^model.name: cannot load "):
        empty_model(str(copy))


@pytest.mark.parametrize("content", ["", "{bad", "[]", "3"])
def test_a_broken_configuration_is_an_error_of_the_model(copy: Path, content: str) -> None:
    (copy / "config.json").write_text(content)

    with pytest.raises(ModelError, match="^model.name: cannot load "):
        load_config(str(copy))


@pytest.mark.parametrize("content", ["", "{bad", "[]", "{}", '{"model": {"type": "BPE"}}'])
def test_a_broken_tokenizer_is_an_error_of_the_model(copy: Path, content: str) -> None:
    (copy / "tokenizer.json").write_text(content)

    with pytest.raises(ModelError, match="^model.name: cannot load "):
        load_tokenizer(str(copy))


@pytest.mark.parametrize("gone", [["tokenizer.json"], ["tokenizer.json", "tokenizer_config.json"]])
def test_a_missing_tokenizer_is_an_error_of_the_model(copy: Path, gone: list[str]) -> None:
    """transformers would make one whose vocabulary is <|endoftext|> alone."""
    for name in gone:
        (copy / name).unlink()

    with pytest.raises(ModelError) as error:
        load_tokenizer(str(copy))

    assert str(error.value) == (
        f"model.name: {str(copy)!r} has no usable tokenizer.json; "
        "put the files of the base model's tokenizer beside its weights"
    )


def test_a_tokenizer_without_end_of_text_is_refused(llama_dir: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(llama_dir, tmp_path / "model"))
    path = copy / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        settings.pop(name, None)
    path.write_text(json.dumps(settings))

    with pytest.raises(ModelError) as error:
        load_tokenizer(str(copy))

    assert str(error.value) == (
        f"model.name: the tokenizer of {str(copy)!r} has no end-of-text token (eos_token); "
        "a model cannot learn where a document ends without one"
    )


# Dtypes


def test_a_half_precision_checkpoint_loads_as_asked(tmp_path: Path) -> None:
    """Transformers would keep the dtype of the file."""
    original = make_gpt2().half()
    directory = str(save(original, tmp_path / "half"))
    expected = {name: tensor.float() for name, tensor in original.state_dict().items()}

    single = load_model(directory, dtype="fp32")

    assert {p.dtype for p in single.parameters()} == {torch.float32}
    assert all(torch.equal(expected[name], t) for name, t in single.state_dict().items())
    assert {p.dtype for p in load_model(directory).parameters()} == {torch.float32}
    assert {p.dtype for p in load_model(directory, dtype="fp16").parameters()} == {torch.float16}
    assert {p.dtype for p in load_model(directory, dtype="bf16").parameters()} == {torch.bfloat16}
    assert not single.training


# Relative error of the logits (2-norm) that is allowed, and less than which would mean that
# nothing was quantised. Random weights this large make much of small changes; of two models that
# have nothing to do with each other it would be 1.4. On CPUs with AVX-512, bitsandbytes 0.50 mixes
# up the scales of rows shorter than a block of 64, as here: 0.65 where others give 0.4.
@pytest.mark.parametrize(("dtype", "least", "most"), [("int8", 1e-4, 0.05), ("nf4", 1e-2, 0.9)])
@pytest.mark.parametrize(("architecture", "layers"), [("gpt2", 4), ("llama", 7)])
def test_quantised_bases_are_close(
    architecture: str, layers: int, dtype: Any, least: float, most: float, request: Any
) -> None:
    directory = str(request.getfixturevalue(f"{architecture}_dir"))
    kind = {"int8": bitsandbytes.nn.Linear8bitLt, "nf4": bitsandbytes.nn.Linear4bit}[dtype]
    expected = logits(load_model(directory))

    quantised = load_model(directory, dtype=dtype)

    found = [name for name, layer in quantised.named_modules() if isinstance(layer, kind)]
    assert len(found) == 2 * layers  # all of both blocks, not the output head
    difference = (logits(quantised) - expected).norm() / expected.norm()
    assert least < difference < most
    assert not quantised.training


def test_fused_gelu_is_the_same_function(gpt2_dir: Path) -> None:
    model = load_model(str(gpt2_dir))
    expected = logits(model)

    assert fuse_gelu(model) == 2
    assert fuse_gelu(model) == 0
    assert (logits(model) - expected).abs().max() < 1e-5


def test_loading_leaves_transformers_messages_as_they_were(gpt2_dir: Path) -> None:
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_info()
    try:
        load_model(str(gpt2_dir))
        assert transformers_logging.get_verbosity() == transformers_logging.INFO
        assert transformers_logging.is_progress_bar_enabled()
    finally:
        transformers_logging.set_verbosity(before)


# Facts about models


def gpt2_parameters(d: int, layers: int, vocabulary: int, positions: int) -> int:
    """Embeddings; 12 d^2 + 13 d a block; the last norm. The output head is the embedding."""
    return (vocabulary + positions) * d + layers * (12 * d * d + 13 * d) + 2 * d


@pytest.mark.parametrize("dtype", ["fp32", "int8", "nf4"])
def test_parameters_are_counted_once_whatever_they_are_stored_in(
    gpt2_dir: Path, dtype: Any
) -> None:
    model = load_model(str(gpt2_dir), dtype=dtype)

    assert parameter_count(model) == gpt2_parameters(32, 2, len(make_tokenizer()), 64)


def test_an_untied_head_counts_too(llama_dir: Path) -> None:
    d, kv, up, v = 32, 16, 64, len(make_tokenizer())
    block = 2 * d * d + 2 * d * kv + 3 * d * up + 2 * d

    assert parameter_count(load_model(str(llama_dir))) == 2 * v * d + 2 * block + d


def test_trainable_parameters_are_those_with_a_gradient() -> None:
    model = make_gpt2().requires_grad_(False)
    model.transformer.h[0].attn.c_attn.weight.requires_grad_(True)

    assert parameter_count(model, trainable=True) == 32 * 96


def test_an_empty_model_has_shapes_and_no_weights(gpt2_dir: Path) -> None:
    model = empty_model(str(gpt2_dir))

    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert parameter_count(model) == gpt2_parameters(32, 2, len(make_tokenizer()), 64)


def test_the_context_is_the_positions_of_the_model(gpt2_dir: Path, llama_dir: Path) -> None:
    assert context_length(load_config(str(gpt2_dir))) == 64
    assert context_length(load_config(str(llama_dir))) == 64
    assert context_length(GPT2Config()) == 1024
    with pytest.raises(ModelError) as error:
        context_length(BloomConfig())
    assert str(error.value) == ("config.json: max_position_embeddings (or n_positions) is missing")


# Hashes


def sha256(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def test_the_hash_of_one_file(gpt2_dir: Path) -> None:
    content = (gpt2_dir / "model.safetensors").read_bytes()

    assert weights_sha256(str(gpt2_dir)) == sha256(sha256(content)).hex()


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    directory = tmp_path / "sharded"
    model = make_gpt2()
    model.save_pretrained(directory, max_shard_size="40KB")
    make_tokenizer().save_pretrained(directory)
    assert not (directory / "model.safetensors").exists()
    return directory


def test_the_hash_of_shards_is_of_all_of_them_in_order(sharded: Path) -> None:
    shards = sorted(sharded.glob("model-*.safetensors"))
    assert len(shards) > 2
    (sharded / "another.safetensors").write_bytes(b"not in the index, not part of the model")

    before = weights_sha256(str(sharded))

    assert weight_files(str(sharded)) == shards
    assert before == sha256(b"".join(sha256(shard.read_bytes()) for shard in shards)).hex()
    content = bytearray(shards[1].read_bytes())
    content[-1] ^= 1
    shards[1].write_bytes(content)
    assert weights_sha256(str(sharded)) != before


def test_shards_load_as_one_model(sharded: Path) -> None:
    assert torch.equal(logits(load_model(str(sharded))), logits(make_gpt2()))


def test_a_missing_shard_is_an_error_of_the_model(sharded: Path) -> None:
    gone = sorted(sharded.glob("model-*.safetensors"))[1]
    gone.unlink()

    for use in (load_model, weights_sha256):
        with pytest.raises(ModelError) as error:
            use(str(sharded))
        assert str(error.value) == (
            f"model.name: {str(sharded)!r} lacks {gone.name}, "
            "which model.safetensors.index.json names"
        )


@pytest.mark.parametrize("content", ["{bad", "{}", "[]", '{"weight_map": 3}'])
def test_a_broken_index_is_an_error_of_the_model(sharded: Path, content: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(content)

    with pytest.raises(ModelError, match="^model.name: cannot load "):
        weights_sha256(str(sharded))


def test_an_index_cannot_name_files_elsewhere(sharded: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.safetensors").write_bytes(b"of somebody else")
    index = {"weight_map": {"transformer.wte.weight": "../secret.safetensors"}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))

    with pytest.raises(ModelError, match=r"names .\.\./secret.safetensors., no safetensors file"):
        weight_files(str(sharded))


# Plain checkpoints


@pytest.fixture
def plain(gpt2_dir: Path, tmp_path: Path) -> Path:
    """Saved after training, during which the cache was off."""
    model = load_model(str(gpt2_dir))
    model.config.use_cache = False
    save_plain(model, load_tokenizer(str(gpt2_dir)), tmp_path / "plain")
    return tmp_path / "plain"


def test_a_plain_checkpoint_has_the_files_of_one(plain: Path) -> None:
    assert sorted(path.name for path in plain.iterdir()) == [
        "config.json",
        "generation_config.json",
        "merges.txt",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
    ]
    config = json.loads((plain / "config.json").read_text())
    assert config["use_cache"] is True
    assert config["architectures"] == ["GPT2LMHeadModel"]
    assert config["dtype"] == "float32"
    assert config.get("tie_word_embeddings", True) is True


def test_a_plain_checkpoint_has_the_tensors_of_one(plain: Path, gpt2_dir: Path) -> None:
    base = load_file(gpt2_dir / "model.safetensors")
    with safe_open(plain / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == GPT2_TENSORS
        assert len(GPT2_TENSORS) == 12 * 2 + 4
        assert all(torch.equal(file.get_tensor(name), base[name]) for name in GPT2_TENSORS)


def test_the_tokenizer_is_saved_in_both_forms(plain: Path) -> None:
    text = "The quick brown fox, again: ünïcödé \N{GRINNING FACE}\n\n  2 spaces"
    expected = make_tokenizer()(text)["input_ids"]

    new = AutoTokenizer.from_pretrained(plain)
    old = models.BPE.from_file(str(plain / "vocab.json"), str(plain / "merges.txt"))
    words = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)

    assert new(text)["input_ids"] == expected
    assert new.decode(expected) == text
    assert len(expected) < len(text.encode())  # merges are used
    assert [token.id for word, _ in words for token in old.tokenize(word)] == expected
    assert new.model_max_length == 64
    assert new.eos_token == "<|endoftext|>"


def test_weights_named_as_on_the_hub_become_a_plain_checkpoint(tmp_path: Path) -> None:
    """OpenAI's GPT-2 on the hub: no prefix, and the causal masks among the weights."""
    original = make_gpt2()
    hub = tmp_path / "hub"
    original.save_pretrained(hub)
    make_tokenizer().save_pretrained(hub)
    bare = GPT2Model.from_pretrained(hub).state_dict()
    mask = torch.ones(64, 64).tril().view(1, 1, 64, 64)
    tensors = {name: tensor.contiguous() for name, tensor in bare.items()}
    tensors |= {f"h.{layer}.attn.bias": mask.clone() for layer in range(2)}
    save_file(tensors, hub / "model.safetensors", metadata={"format": "pt"})

    model = load_model(str(hub))
    save_plain(model, load_tokenizer(str(hub)), tmp_path / "plain")

    assert torch.equal(logits(model), logits(original))
    assert load_file(tmp_path / "plain" / "model.safetensors").keys() == GPT2_TENSORS
    read_back = GPT2LMHeadModel.from_pretrained(tmp_path / "plain")
    assert torch.equal(logits(read_back), logits(original))


def test_an_untied_head_is_saved(llama_dir: Path, tmp_path: Path) -> None:
    original = make_llama()

    save_plain(load_model(str(llama_dir)), load_tokenizer(str(llama_dir)), tmp_path / "plain")

    saved = load_file(tmp_path / "plain" / "model.safetensors")
    assert len(saved) == 9 * 2 + 3
    assert torch.equal(saved["lm_head.weight"], original.lm_head.weight)
