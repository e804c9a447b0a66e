"""Adapters count what they should, refuse what cannot be merged, and load with peft alone."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_gpt2, make_llama
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from lowvram.adapters import (
    Adapter,
    Base,
    add_adapter,
    is_adapter,
    load_adapter,
    plain_model,
    recorded_base,
    save_adapter,
    without_adapter,
)
from lowvram.build import choose_numerics, count_parameters
from lowvram.errors import DeviceError, ModelError, RecipeError
from lowvram.model import load_model
from lowvram.perplexity import score
from lowvram.recipe import load_recipe

# peft asks transformers by an attribute that has a newer name.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

IDS = torch.arange(3, 60).unsqueeze(0)
BASE = Base(name="somewhere", revision=None, sha256="0" * 64)
ALL = ["c_attn", "c_proj", "c_fc"]


def logits(model: torch.nn.Module) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int = 3) -> None:
    """What is trained becomes something that changes the model: B is no longer 0."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def trained(directory: Path, adapter: Adapter, dtype: Any = "fp32") -> PeftModel:
    model = add_adapter(load_model(str(directory), dtype=dtype), adapter)
    randomise(model)
    return model


@pytest.fixture
def saved(gpt2_dir: Path, tmp_path: Path) -> Path:
    """A good adapter of the tiny GPT-2, for tests to damage."""
    save_adapter(trained(gpt2_dir, Adapter()), tmp_path / "adapter", BASE)
    return tmp_path / "adapter"


# How many parameters


SIZES = {
    "gpt2": (768, 12, 12, 124_439_808),
    "gpt2-medium": (1024, 24, 16, 354_823_168),
    "gpt2-large": (1280, 36, 20, 774_030_080),
    "gpt2-xl": (1600, 48, 25, 1_557_611_200),
}


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories with the config.json of the four GPT-2s and nothing else."""
    found = {}
    for name, (d, layers, heads, _) in SIZES.items():
        found[name] = tmp_path_factory.mktemp("configs") / name
        GPT2Config(n_embd=d, n_layer=layers, n_head=heads).save_pretrained(found[name])
    return found


def count(directory: Path, **method: Any) -> tuple[int, int]:
    overrides = {"model.name": str(directory), "data.source": "-"}
    recipe = load_recipe("gpt2-lora", overrides | {f"method.{k}": v for k, v in method.items()})
    counted = count_parameters(recipe)
    return counted.trainable, counted.total


@pytest.mark.parametrize(
    ("name", "targets", "rank", "trainable"),
    [
        ("gpt2", ["c_attn"], 4, 147_456),
        ("gpt2", ["c_attn"], 8, 294_912),
        ("gpt2", ["c_attn"], 16, 589_824),
        ("gpt2", ALL, 16, 2_359_296),
        ("gpt2", "all-linear", 16, 2_359_296),
        ("gpt2", "auto", 8, 294_912),
        ("gpt2", ["attn.c_proj"], 8, 12 * 8 * (768 + 768)),
        ("gpt2", ["mlp.c_proj"], 8, 12 * 8 * (3072 + 768)),
        ("gpt2-medium", ["c_attn"], 4, 393_216),
        ("gpt2-medium", ALL, 16, 6_291_456),
        ("gpt2-large", ["c_attn"], 4, 737_280),
        ("gpt2-xl", ["c_attn"], 8, 2_457_600),
    ],
)
def test_trainable_parameters_of_gpt2(
    configs: dict[str, Path], name: str, targets: Any, rank: int, trainable: int
) -> None:
    found = count(configs[name], rank=rank, target_modules=targets)

    assert found == (trainable, SIZES[name][3])


def test_other_methods_train_more(configs: dict[str, Path]) -> None:
    biases = 12 * (2304 + 768 + 3072 + 768 + 2 * 768) + 768  # of layers and norms

    assert count(configs["gpt2"], name="dora")[0] == 294_912 + 12 * 2304
    assert count(configs["gpt2"], name="rslora")[0] == 294_912
    assert count(configs["gpt2"], bias="lora_only")[0] == 294_912 + 12 * 2304
    assert count(configs["gpt2"], bias="all")[0] == 294_912 + biases


def test_full_training_trains_everything(configs: dict[str, Path]) -> None:
    overrides = {"model.name": str(configs["gpt2"]), "data.source": "-"}

    counted = count_parameters(load_recipe("gpt2-full", overrides))

    assert (counted.trainable, counted.total) == (124_439_808, 124_439_808)


@pytest.mark.parametrize("method", ["lora", "dora", "full"])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_the_count_without_weights_is_that_of_the_model(
    architecture: str, method: str, make_recipe: Callable[..., Any], request: Any
) -> None:
    directory = str(request.getfixturevalue(f"{architecture}_dir"))
    settings = {"model.name": directory, "method.name": method}
    if method != "full":
        settings["method.target_modules"] = "all-linear"

    counted = count_parameters(make_recipe(**settings))

    model: torch.nn.Module = load_model(directory)
    assert counted.total == sum(p.numel() for p in model.parameters())
    if method != "full":
        model = add_adapter(model, Adapter(target_modules="all-linear", use_dora=method == "dora"))
    assert counted.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)


# Where adapters go


def layers_of(model: PeftModel) -> set[str]:
    """The last two names of the layers that have an adapter."""
    found = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    return {".".join(name.split(".")[-2:]) for name in found}


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("auto", {"attn.c_attn"}),
        ("all-linear", {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}),
        (["c_proj"], {"attn.c_proj", "mlp.c_proj"}),
        (["attn.c_proj"], {"attn.c_proj"}),
        (("mlp.c_proj", "c_fc"), {"mlp.c_proj", "mlp.c_fc"}),
    ],
)
def test_targets_in_gpt2(targets: Any, expected: set[str]) -> None:
    assert layers_of(add_adapter(make_gpt2(), Adapter(target_modules=targets))) == expected


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("auto", {"self_attn.q_proj", "self_attn.v_proj"}),
        (
            "all-linear",
            {f"self_attn.{x}_proj" for x in "qkvo"}
            | {f"mlp.{x}_proj" for x in ("gate", "up", "down")},
        ),
        (["down_proj"], {"mlp.down_proj"}),
    ],
)
def test_targets_in_llama(targets: Any, expected: set[str]) -> None:
    assert layers_of(add_adapter(make_llama(), Adapter(target_modules=targets))) == expected


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16", "int8", "nf4"])
def test_adapters_are_fp32_and_alone_in_being_trained(gpt2_dir: Path, dtype: Any) -> None:
    model = add_adapter(load_model(str(gpt2_dir), dtype=dtype), Adapter(target_modules=ALL))

    learning = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}

    assert set(learning.values()) == {torch.float32}
    assert all("lora_A" in name or "lora_B" in name for name in learning)
    assert len(learning) == 2 * 2 * 4


@pytest.mark.parametrize(
    "targets", [["q_proj"], ["c_attn", "q_proj"], ["ln_1"], ["attn"], ["c_att"]]
)
def test_targets_that_are_no_linear_layers_are_refused(targets: list[str]) -> None:
    """And the layers that there are, are named."""
    with pytest.raises(ModelError) as error:
        add_adapter(make_gpt2(), Adapter(target_modules=targets))

    assert str(error.value) == (
        f"method.target_modules: {targets[-1]!r} is no linear layer of gpt2; "
        "its layers are: c_attn, c_fc, c_proj"
    )


@pytest.mark.parametrize(
    ("make", "target", "choices"),
    [
        (make_gpt2, "wte", "c_attn, c_fc, c_proj"),
        (make_gpt2, "transformer.wpe", "c_attn, c_fc, c_proj"),
        (make_gpt2, "lm_head", "c_attn, c_fc, c_proj"),
        (
            make_llama,
            "embed_tokens",
            "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj",
        ),
        (make_llama, "lm_head", "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"),
    ],
)
def test_embeddings_and_heads_are_refused(
    make: Callable[[], Any], target: str, choices: str
) -> None:
    """Peft takes them, and merges them to another model without a word."""
    with pytest.raises(ModelError) as error:
        add_adapter(make(), Adapter(target_modules=[target]))

    assert str(error.value) == (
        f"method.target_modules: {target!r} is an embedding or the output head. Merged into a "
        "checkpoint that ties the two, its update would change both and give another model. "
        f"Choose from: {choices}"
    )


@pytest.mark.parametrize("target", ["wte", "wpe", "lm_head", "embed_tokens", "transformer.wte"])
def test_a_recipe_with_such_a_target_is_refused(target: str) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe("gpt2-lora", {"method.target_modules": ["c_attn", target]})

    assert "method.target_modules" in str(error.value)
    assert (
        f"{target!r} is an embedding, or the output head that shares its weight: a change to it "
        "cannot be merged into a plain checkpoint. Name linear layers such as c_attn, c_proj or "
        "c_fc"
    ) in str(error.value)


def test_biases_of_a_half_precision_base_are_not_trained(gpt2_dir: Path) -> None:
    model = load_model(str(gpt2_dir), dtype="bf16")

    with pytest.raises(ModelError, match=r"^method.bias: .*\.bias of the base would be trained in"):
        add_adapter(model, Adapter(bias="all"))


def test_dora_on_int8_is_refused_on_a_cpu(make_recipe: Callable[..., Any]) -> None:
    """peft's layer loses the scales of the base there, and fails in its first forward pass."""
    recipe = make_recipe(**{"method.name": "dora", "model.dtype": "int8"})

    with pytest.raises(DeviceError) as error:
        choose_numerics(recipe, torch.device("cpu"))

    assert str(error.value) == (
        "method.name: dora on a base in int8 needs a card, since on a CPU its layers lose their "
        "scales; set model.dtype: nf4 or fp32, or method.name: lora"
    )


# What they compute


KINDS = {
    "lora": Adapter(rank=4, alpha=10),
    "rslora": Adapter(rank=4, alpha=10, use_rslora=True),
    "dora": Adapter(rank=4, alpha=10, use_dora=True),
    "bias all": Adapter(rank=4, alpha=10, bias="all"),
    "bias lora_only": Adapter(rank=4, alpha=10, bias="lora_only"),
    "dropout": Adapter(rank=4, alpha=10, dropout=0.5),
    "half an alpha": Adapter(rank=4, alpha=2.5),
}
TARGETS = [["c_attn"], ["attn.c_proj"], ["mlp.c_proj"], "all-linear"]


@pytest.mark.parametrize("targets", TARGETS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_peft_alone_gives_the_same_logits(
    gpt2_dir: Path, tmp_path: Path, kind: str, targets: Any
) -> None:
    """Within 1e-5 of logits of about 5, on the plain base: folded, sums have another order."""
    adapter = Adapter(**(vars(KINDS[kind]) | {"target_modules": targets}))
    live = trained(gpt2_dir, adapter)
    expected = logits(live)

    save_adapter(live, tmp_path / "adapter", BASE)
    base = GPT2LMHeadModel.from_pretrained(gpt2_dir)
    assert (logits(base) - expected).abs().max() > 0.1
    found = PeftModel.from_pretrained(base, tmp_path / "adapter")

    assert (logits(found) - expected).abs().max() < 1e-5
    ours = load_adapter(load_model(str(gpt2_dir)), tmp_path / "adapter")
    assert (logits(ours) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_peft_alone_gives_the_same_logits_on_llama(
    llama_dir: Path, tmp_path: Path, kind: str
) -> None:
    live = trained(llama_dir, KINDS[kind])

    save_adapter(live, tmp_path / "adapter", BASE)
    base = AutoModelForCausalLM.from_pretrained(llama_dir)
    found = PeftModel.from_pretrained(base, tmp_path / "adapter")

    assert (logits(found) - logits(live)).abs().max() < 1e-5
    assert (logits(load_model(str(llama_dir))) - logits(live)).abs().max() > 0.1


@pytest.mark.parametrize("dtype", ["int8", "nf4", "bf16"])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_trained_on_a_small_base_it_loads_on_the_plain_one(
    architecture: str, dtype: Any, request: Any, tmp_path: Path
) -> None:
    """Against W + (alpha / r) B A by hand; GPT-2 stores W transposed, its int8 layers do not."""
    directory = request.getfixturevalue(f"{architecture}_dir")
    adapter = Adapter(rank=4, alpha=10, target_modules="all-linear")
    save_adapter(trained(directory, adapter, dtype), tmp_path / "adapter", BASE)
    by_hand = AutoModelForCausalLM.from_pretrained(directory)
    weights = dict(by_hand.named_parameters())
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    start, end = "base_model.model.", ".lora_A.weight"
    names = [key[len(start) : -len(end)] for key in tensors if key.endswith(end)]
    assert len(names) == (8 if architecture == "gpt2" else 14)
    with torch.no_grad():
        for name in names:
            a, b = (tensors[f"{start}{name}.lora_{x}.weight"] for x in "AB")
            update = 10 / 4 * (b @ a)  # (out, in)
            weights[f"{name}.weight"] += update.T if architecture == "gpt2" else update

    base = AutoModelForCausalLM.from_pretrained(directory)
    found = PeftModel.from_pretrained(base, tmp_path / "adapter")

    assert (logits(found) - logits(by_hand)).abs().max() < 1e-5 * logits(by_hand).abs().max()
    ours = load_adapter(load_model(str(directory)), tmp_path / "adapter")
    assert (logits(ours) - logits(found)).abs().max() < 1e-6


@pytest.mark.parametrize("kind", ["lora", "rslora"])
@pytest.mark.parametrize("dtype", ["fp32", "int8", "nf4"])
def test_at_step_0_the_perplexity_is_that_of_the_base(
    gpt2_dir: Path, dtype: Any, kind: str
) -> None:
    """Exactly: B is 0."""
    documents = [(np.arange(start, start + 50), 50, 10) for start in range(0, 200, 7)]

    def perplexity(model: torch.nn.Module) -> float:
        return score(model, documents, context_length=64, stride=32).perplexity

    model = load_model(str(gpt2_dir), dtype=dtype)
    expected = perplexity(model)
    adapted = add_adapter(model, KINDS[kind])

    assert perplexity(adapted) == expected
    randomise(adapted)
    assert perplexity(adapted) != pytest.approx(expected, rel=1e-3)


def test_without_its_adapter_the_model_is_the_base(gpt2_dir: Path) -> None:
    model = trained(gpt2_dir, Adapter())
    expected = logits(load_model(str(gpt2_dir)))
    adapted = logits(model)

    with without_adapter(model):
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), adapted)
    with without_adapter(plain := make_gpt2()):
        assert torch.equal(logits(plain), expected)


def test_the_plain_model_is_the_causal_model(gpt2_dir: Path) -> None:
    plain = make_gpt2()

    assert plain_model(plain) is plain
    assert plain_model(add_adapter(plain, Adapter())) is plain


# What is saved


def test_an_adapter_directory_is_a_standard_one(gpt2_dir: Path, tmp_path: Path) -> None:
    base = Base(name="gpt2", revision="main", sha256="ab" * 32)

    save_adapter(trained(gpt2_dir, Adapter(rank=4, alpha=2.5)), tmp_path / "adapter", base)

    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "base.json",
    ]
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    expected = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 4,
        "lora_alpha": 2.5,
        "target_modules": ["c_attn"],
        "fan_in_fan_out": True,
        "base_model_name_or_path": "gpt2",
        "revision": "main",
        "modules_to_save": None,
    }
    assert {key: config[key] for key in expected} == expected
    assert recorded_base(tmp_path / "adapter") == ("gpt2", "main", "ab" * 32)
    assert is_adapter(tmp_path / "adapter")
    assert not is_adapter(tmp_path)
    shapes = {
        key: tuple(tensor.shape)
        for key, tensor in load_file(tmp_path / "adapter" / "adapter_model.safetensors").items()
    }
    layers = [f"base_model.model.transformer.h.{i}.attn.c_attn" for i in range(2)]
    assert shapes == {f"{name}.lora_A.weight": (4, 32) for name in layers} | {
        f"{name}.lora_B.weight": (96, 4) for name in layers
    }


def test_the_hub_is_never_asked(
    gpt2_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Peft's way to decide whether to save embeddings is to look at the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    asked: list[Any] = []

    def refuse(*where: Any, **options: Any) -> Any:
        asked.append(where)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    model = load_model(str(gpt2_dir))
    model.config._name_or_path = model.name_or_path = "gpt2"
    live = add_adapter(model, Adapter())
    assert live.peft_config["default"].base_model_name_or_path == "gpt2"

    save_adapter(live, tmp_path / "adapter", Base(name="gpt2", revision=None, sha256="0" * 64))
    load_adapter(load_model(str(gpt2_dir)), tmp_path / "adapter")

    assert asked == []


def test_an_adapter_of_peft_itself_has_no_recorded_hash(gpt2_dir: Path, tmp_path: Path) -> None:
    config = LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    model = get_peft_model(GPT2LMHeadModel.from_pretrained(gpt2_dir), config)
    model.save_pretrained(tmp_path / "adapter")

    assert recorded_base(tmp_path / "adapter") == (str(gpt2_dir), None, None)


# What is refused


def refusal(directory: Path, base: torch.nn.Module | None = None) -> str:
    with pytest.raises(ModelError) as error:
        load_adapter(base if base is not None else make_gpt2(), directory)
    return str(error.value)


def test_an_adapter_stored_as_a_pickle_is_refused(saved: Path) -> None:
    tensors = load_file(saved / "adapter_model.safetensors")
    (saved / "adapter_model.safetensors").unlink()
    torch.save(tensors, saved / "adapter_model.bin")

    assert refusal(saved) == (
        f"{saved}: has no adapter_model.safetensors; adapters stored as a pickle "
        "(adapter_model.bin) are not opened, save them as safetensors"
    )


@pytest.mark.parametrize(
    "changes", [{"n_embd": 64}, {"n_layer": 1}, {"n_layer": 3}], ids=["wider", "fewer", "more"]
)
def test_an_adapter_of_another_shape_is_refused(saved: Path, changes: dict[str, int]) -> None:
    """Of a base with more or fewer layers, peft would load what there is."""
    message = refusal(saved, make_gpt2(**changes))

    assert message.startswith(f"{saved}: the adapter does not fit its base: ")
    layer = "base_model.model.transformer.h.{}.attn.c_attn.lora_A.weight is not in the {}"
    if changes == {"n_layer": 1}:
        assert message.endswith(layer.format(1, "base"))
    if changes == {"n_layer": 3}:
        assert message.endswith(layer.format(2, "file"))


def test_an_adapter_of_another_architecture_is_refused(saved: Path) -> None:
    assert refusal(saved, make_llama()).startswith(f"{saved}: the adapter does not fit its base: ")


def test_an_adapter_that_lacks_a_tensor_is_refused(saved: Path) -> None:
    """peft only warns, and B stays 0 there."""
    path = saved / "adapter_model.safetensors"
    tensors = load_file(path)
    gone = "base_model.model.transformer.h.1.attn.c_attn.lora_B.weight"
    del tensors[gone]
    save_file(tensors, path)

    assert refusal(saved) == (
        f"{saved}: the adapter does not fit its base: {gone} is not in the file"
    )


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x08" + b"\0" * 7 + b"{}      "])
def test_a_corrupt_adapter_file_is_refused(saved: Path, content: bytes) -> None:
    (saved / "adapter_model.safetensors").write_bytes(content)

    assert refusal(saved).startswith(f"{saved}: the adapter does not fit its base: ")


@pytest.mark.parametrize("content", ["", "{bad", "[]", "3", '{"peft_type": "NONSENSE"}'])
def test_a_broken_adapter_configuration_is_refused(saved: Path, content: str) -> None:
    (saved / "adapter_config.json").write_text(content)

    assert refusal(saved).startswith(f"{saved}: the adapter does not fit its base: ")


@pytest.mark.parametrize("content", ["", "{bad", "[]", "3", "{}"])
def test_a_broken_record_of_the_base_is_refused(saved: Path, content: str) -> None:
    (saved / "base.json").write_text(content)

    with pytest.raises(ModelError, match="is no readable adapter"):
        recorded_base(saved)


@pytest.mark.parametrize("content", ["", "{bad", "[]", "3"])
def test_a_configuration_of_peft_that_cannot_be_read_is_refused(saved: Path, content: str) -> None:
    (saved / "base.json").unlink()
    (saved / "adapter_config.json").write_text(content)

    with pytest.raises(ModelError, match="is no readable adapter"):
        recorded_base(saved)
