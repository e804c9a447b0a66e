"""A merged checkpoint is W + (alpha / r) B A in a plain directory, or there is none."""

from __future__ import annotations

import copy
import json
import math
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_gpt2, make_llama, make_tokenizer, save
from peft import IA3Config, LoHaConfig, LoraConfig, PromptTuningConfig, get_peft_model
from peft.tuners.lora.layer import Linear
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

from lowvram.adapters import (
    Adapter,
    Base,
    add_adapter,
    load_adapter,
    merged_tensors,
    merging_in_turn,
    plain_model,
    save_adapter,
)
from lowvram.build import build
from lowvram.errors import CheckpointError, ModelError, ProofError
from lowvram.merge import PROOF_TEXT, MergeProof, find_adapter, logits_of, merge, write_proven
from lowvram.model import load_model, load_tokenizer, weights_sha256
from lowvram.plan import plan
from lowvram.train import train

module = sys.modules["lowvram.merge"]

IDS = torch.arange(3, 60).unsqueeze(0)
START = "base_model.model."


def logits(model: torch.nn.Module) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


def make_adapter(
    base: Path, directory: Path, adapter: Adapter | None = None, dtype: Any = "fp32"
) -> Path:
    """An adapter of random numbers (B is not 0), on the base in `dtype`."""
    model = add_adapter(load_model(str(base), dtype=dtype), adapter or Adapter(rank=4, alpha=10))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    facts = Base(name=str(base), revision=None, sha256=weights_sha256(str(base)))
    save_adapter(model, directory, facts)
    return directory


@pytest.fixture
def adapter(gpt2_dir: Path, tmp_path: Path) -> Path:
    return make_adapter(gpt2_dir, tmp_path / "adapter")


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def left_over(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if "out" in path.name)


# The numbers


def updates(directory: Path, scale: float) -> dict[str, torch.Tensor]:
    """scale * B A (out, in) by the name of the weight, from the adapter's file."""
    tensors = load_file(directory / "adapter_model.safetensors")
    end = ".lora_A.weight"
    return {
        key[len(START) : -len(end)] + ".weight": scale
        * (tensors[key.replace("lora_A", "lora_B")].double() @ a.double())
        for key, a in tensors.items()
        if key.endswith(end)
    }


@pytest.mark.parametrize(
    ("settings", "scale"),
    [({"alpha": 10}, 10 / 4), ({"alpha": 2.5}, 2.5 / 4), ({"alpha": 6, "use_rslora": True}, 3)],
    ids=["lora", "fraction", "rslora"],
)
@pytest.mark.parametrize(
    ("targets", "layers"),
    [
        (["attn.c_proj"], 2),
        (["mlp.c_proj"], 2),
        (["c_proj"], 4),
        (["c_attn"], 2),
        ("all-linear", 8),
    ],
    ids=str,
)
def test_merged_is_base_plus_update(
    gpt2_dir: Path, tmp_path: Path, targets: Any, layers: int, settings: Any, scale: float
) -> None:
    """In float64 by hand, to 1e-6; attn.c_proj is square and hides a missing transpose."""
    adapter = Adapter(rank=4, target_modules=targets, **settings)
    directory = make_adapter(gpt2_dir, tmp_path / "adapter", adapter)

    merge(directory, tmp_path / "out")

    base, merged = tensors_of(gpt2_dir), tensors_of(tmp_path / "out")
    changes = updates(directory, scale)
    assert len(changes) == layers
    assert merged.keys() == base.keys()
    for name, weight in merged.items():
        if name in changes:
            expected = base[name].double() + changes[name].T
            assert (weight - expected).abs().max() < 1e-6
            assert (weight - base[name]).abs().max() > 1e-2
        else:
            assert torch.equal(weight, base[name])


def test_merged_dora_has_the_learned_norms(gpt2_dir: Path, tmp_path: Path) -> None:
    """W' = m (W + s B A) / |W + s B A|, a norm for each output; to 1e-6."""
    adapter = Adapter(rank=4, alpha=10, use_dora=True, target_modules=["mlp.c_proj"])
    directory = make_adapter(gpt2_dir, tmp_path / "adapter", adapter)

    merge(directory, tmp_path / "out")

    base, merged = tensors_of(gpt2_dir), tensors_of(tmp_path / "out")
    learned = load_file(directory / "adapter_model.safetensors")
    for name, update in updates(directory, 10 / 4).items():
        key = START + name.removesuffix(".weight") + ".lora_magnitude_vector"
        magnitude = learned[key].double()  # (out,)
        whole = base[name].double().T + update  # (out, in)
        expected = magnitude[:, None] * whole / whole.norm(dim=1, keepdim=True)
        assert (merged[name] - expected.T).abs().max() < 1e-6


def test_trained_biases_are_merged_too(gpt2_dir: Path, tmp_path: Path) -> None:
    adapter = Adapter(rank=4, alpha=10, bias="all", target_modules=["c_attn"])
    directory = make_adapter(gpt2_dir, tmp_path / "adapter", adapter)

    merge(directory, tmp_path / "out")

    base, merged = tensors_of(gpt2_dir), tensors_of(tmp_path / "out")
    learned = load_file(directory / "adapter_model.safetensors")
    for name, tensor in merged.items():
        if name.endswith("bias"):
            saved = learned[START + name.replace("c_attn.", "c_attn.base_layer.")]
            assert torch.equal(tensor, saved)
            assert not torch.equal(tensor, base[name])


PEFT_KINDS = {
    "lora": LoraConfig(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True),
    "rslora": LoraConfig(target_modules=["c_fc"], use_rslora=True, fan_in_fan_out=True),
    "dora": LoraConfig(target_modules=["c_attn"], use_dora=True, fan_in_fan_out=True),
    "biases": LoraConfig(target_modules=["c_attn"], bias="lora_only", fan_in_fan_out=True),
    "copies": LoraConfig(
        target_modules=["c_attn"], modules_to_save=["ln_f", "mlp"], fan_in_fan_out=True
    ),
    "loha": LoHaConfig(target_modules=["q_proj", "down_proj"]),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("kind", PEFT_KINDS)
def test_tensors_are_bit_for_bit_those_of_peft(kind: str) -> None:
    """And merging leaves the model as it was: layers are merged one at a time."""
    make = make_llama if kind in ("loha", "ia3") else make_gpt2
    model = get_peft_model(make(), copy.deepcopy(PEFT_KINDS[kind]))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    live = logits(model)
    names = list(make().state_dict())

    found = {name: tensor.clone() for name, tensor in merged_tensors(model, names)}
    with merging_in_turn(model):
        in_turn = logits(model)

    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(logits(model), live)
    merged = model.merge_and_unload(safe_merge=True)
    expected = merged.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    assert torch.equal(in_turn, logits(merged))
    assert (in_turn - live).abs().max() < 1e-4
    assert (live - logits(make())).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "int8", "nf4"])
def test_the_base_of_a_merge_is_the_file_whatever_it_was_in_training(
    gpt2_dir: Path, tmp_path: Path, dtype: Any
) -> None:
    """A merge into the 16-bit or quantised base would round everything."""
    directory = make_adapter(gpt2_dir, tmp_path / "adapter", dtype=dtype)

    merge(directory, tmp_path / "out")

    base, merged = tensors_of(gpt2_dir), tensors_of(tmp_path / "out")
    changes = updates(directory, 10 / 4)
    assert {tensor.dtype for tensor in merged.values()} == {torch.float32}
    for name, weight in merged.items():
        if name in changes:
            assert (weight - (base[name].double() + changes[name].T)).abs().max() < 1e-6
        else:
            assert torch.equal(weight, base[name])


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_a_half_precision_base_file_keeps_its_values(tmp_path: Path, half: torch.dtype) -> None:
    base = save(make_gpt2().to(half), tmp_path / "base")
    directory = make_adapter(base, tmp_path / "adapter")

    merge(directory, tmp_path / "out")

    original, merged = tensors_of(base), tensors_of(tmp_path / "out")
    assert {tensor.dtype for tensor in original.values()} == {half}
    changes = updates(directory, 10 / 4)
    for name, weight in merged.items():
        assert weight.dtype == torch.float32
        if name in changes:
            assert (weight - (original[name].double() + changes[name].T)).abs().max() < 1e-6
        else:
            assert torch.equal(weight, original[name].float())


@pytest.mark.parametrize(
    ("dtype", "kind"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_the_dtype_of_the_file_is_chosen(
    adapter: Path, gpt2_dir: Path, tmp_path: Path, dtype: str, kind: torch.dtype
) -> None:
    """Merged in fp32, then rounded once."""
    proof = merge(adapter, tmp_path / "out", dtype=dtype)

    base, merged, changes = (
        tensors_of(gpt2_dir),
        tensors_of(tmp_path / "out"),
        updates(adapter, 2.5),
    )
    assert {tensor.dtype for tensor in merged.values()} == {kind}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == str(kind).removeprefix("torch.")
    for name, weight in merged.items():
        if name not in changes:
            assert torch.equal(weight, base[name].to(kind))
        else:
            exact = base[name].double() + changes[name].T
            assert (weight - exact).abs().max() < (1e-6 if dtype == "fp32" else 1e-2)
            if dtype != "fp32":  # where a last digit of fp32 may tip the rounding
                assert (weight != exact.float().to(kind)).float().mean() < 0.01
    assert proof.dtype == dtype
    assert proof.max_logit_difference < 1e-4
    assert (proof.read_back_difference > 1e-4) == (dtype != "fp32")


def test_the_proof_is_of_live_merged_and_read_back(
    adapter: Path, gpt2_dir: Path, tmp_path: Path
) -> None:
    rows = [[5, 6, 7, 8], [9, 10, 11]]
    live = logits_of(load_adapter(load_model(str(gpt2_dir)), adapter), rows)

    proof = merge(adapter, tmp_path / "out", proof_tokens=rows)

    plain = GPT2LMHeadModel.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        found = [plain(torch.tensor([row])).logits[0] for row in rows]
    difference = max((a - b).abs().max().item() for a, b in zip(live, found, strict=True))
    assert proof == MergeProof(
        max_logit_difference=proof.max_logit_difference,
        read_back_difference=pytest.approx(difference, abs=1e-6),
        tolerance=pytest.approx(1e-4 * max(t.abs().max().item() for t in live)),
        tokens=7,
        dtype="fp32",
    )
    assert proof.max_logit_difference < 1e-5


# The directory

# Runs where neither peft nor lowvram can be imported.
PLAIN_USER = """
import importlib.util, json, sys, warnings
import builtins

hidden = ("peft", "lowvram")
find_spec, real_import = importlib.util.find_spec, builtins.__import__

def no_spec(name, *rest):
    return None if name.split(".")[0] in hidden else find_spec(name, *rest)

class Hide:
    def find_spec(self, name, *rest):
        if name.split(".")[0] in hidden:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

importlib.util.find_spec = no_spec
sys.meta_path.insert(0, Hide())
for name in hidden:
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{name} is there")

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel, pipeline

torch.set_num_threads(1)
found = {}
for name, directory in zip(("gpt2", "llama"), sys.argv[2:]):
    cls = GPT2LMHeadModel if name == "gpt2" else AutoModelForCausalLM
    model, report = cls.from_pretrained(directory, output_loading_info=True)
    model.eval()
    with torch.no_grad():
        found_logits = model(input_ids=torch.arange(3, 60).unsqueeze(0)).logits
    save_file({"logits": found_logits}, f"{sys.argv[1]}/{name}.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    writer = pipeline("text-generation", model=directory)
    text = writer("The quick", max_new_tokens=5, do_sample=False)[0]["generated_text"]
    found[name] = {
        "report": {key: sorted(map(str, report[key])) for key in
                   ("missing_keys", "unexpected_keys", "mismatched_keys")},
        "use_cache": model.config.use_cache,
        "vocabulary": [model.config.vocab_size, len(tokenizer)],
        "tied": model.lm_head.weight is model.get_input_embeddings().weight,
        "class": type(model).__name__,
        "text": text,
        "round trip": tokenizer.decode(tokenizer("again and again\\n 5")["input_ids"]),
        "loaded": sorted({"peft", "lowvram"} & set(sys.modules)),
    }
print(json.dumps(found))
"""


def test_others_load_it_without_peft_or_lowvram(
    gpt2_dir: Path, llama_dir: Path, tmp_path: Path
) -> None:
    """Nothing missing, unexpected or mismatched, and logits within 1e-4 of the live ones."""
    outputs, live = [], {}
    for name, base in (("gpt2", gpt2_dir), ("llama", llama_dir)):
        everything = Adapter(rank=4, alpha=10, target_modules="all-linear")
        directory = make_adapter(base, tmp_path / f"{name}-adapter", everything)
        live[name] = logits(load_adapter(load_model(str(base)), directory))
        merge(directory, tmp_path / name)
        outputs.append(str(tmp_path / name))

    done = subprocess.run(
        [sys.executable, "-c", PLAIN_USER, str(tmp_path), *outputs],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )

    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    size = len(make_tokenizer())
    for name, kind in (("gpt2", "GPT2LMHeadModel"), ("llama", "LlamaForCausalLM")):
        text = found[name].pop("text")
        assert found[name] == {
            "report": {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []},
            "use_cache": True,
            "vocabulary": [size, size],
            "tied": name == "gpt2",
            "class": kind,
            "round trip": "again and again\n 5",
            "loaded": [],
        }
        assert text.startswith("The quick")
        assert len(text) > len("The quick")
        plain = load_file(tmp_path / f"{name}.safetensors")["logits"]
        assert (plain - live[name]).abs().max() < 1e-4
        base = gpt2_dir if name == "gpt2" else llama_dir
        assert (plain - logits(load_model(str(base)))).abs().max() > 0.1


def test_a_merged_gpt2_has_the_files_and_tensors_of_one(
    adapter: Path, gpt2_dir: Path, tmp_path: Path
) -> None:
    merge(adapter, tmp_path / "out")

    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "generation_config.json",
        "merges.txt",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
    ]
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
        assert file.metadata() == {"format": "pt"}
    assert len(names) == 12 * 2 + 4
    assert not [n for n in names if any(w in n for w in ("lora", "base_layer", "_orig", "lm_head"))]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    original = json.loads((gpt2_dir / "config.json").read_text())
    assert config == original
    assert config["use_cache"] is True
    assert "peft" not in json.dumps(config)


def test_an_untied_head_stays(llama_dir: Path, tmp_path: Path) -> None:
    everything = Adapter(rank=4, alpha=10, target_modules="all-linear")
    directory = make_adapter(llama_dir, tmp_path / "adapter", everything)

    merge(directory, tmp_path / "out")

    base, merged, changes = (
        tensors_of(llama_dir),
        tensors_of(tmp_path / "out"),
        updates(directory, 2.5),
    )
    assert merged.keys() == base.keys()
    assert len(merged) == 9 * 2 + 3
    assert len(changes) == 14
    assert torch.equal(merged["lm_head.weight"], base["lm_head.weight"])
    for name, update in changes.items():  # Llama's layers are stored (out, in)
        assert (merged[name] - (base[name].double() + update)).abs().max() < 1e-6


def test_a_tokenizer_with_a_pad_token_adds_no_row(tmp_path: Path) -> None:
    """The vocabulary stays as it is."""
    base = save(make_gpt2(), tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(base)

    merge(make_adapter(base, tmp_path / "adapter"), tmp_path / "out")

    size = len(make_tokenizer())
    assert tensors_of(tmp_path / "out")["transformer.wte.weight"].shape == (size, 32)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == size


def test_a_model_with_few_positions_is_proven_on_short_rows(tmp_path: Path) -> None:
    base = save(make_gpt2(n_positions=16), tmp_path / "base")
    directory = make_adapter(base, tmp_path / "adapter")
    assert len(make_tokenizer()(PROOF_TEXT)["input_ids"]) > 16

    assert merge(directory, tmp_path / "out").tokens == 16
    rows = [list(range(40)), list(range(5))]
    assert merge(directory, tmp_path / "out-2", proof_tokens=rows).tokens == 21


def test_all_of_a_fully_trained_model_is_what_was_trained(
    make_recipe: Callable[..., Any], gpt2_dir: Path, tmp_path: Path
) -> None:
    recipe = make_recipe(**{"method.name": "full", "train.learning_rate": 1e-3})
    planned = plan(recipe)
    state = build(recipe, total_steps=planned.total_steps)
    assert len(list(train(state, planned.windows()))) == 3
    model = plain_model(state.model)
    trained = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    proof = write_proven(
        model,
        planned.tokenizer,
        tmp_path / "out",
        expected=logits_of(model, [[1, 2, 3]]),
        rows=[[1, 2, 3]],
        dtype="fp32",
    )

    base, merged = tensors_of(gpt2_dir), tensors_of(tmp_path / "out")
    assert merged.keys() == base.keys()
    for name, tensor in merged.items():
        assert torch.equal(tensor, trained[name])
        assert not torch.equal(tensor, base[name])
    # the tied head, and the GELU that training fuses
    assert proof.read_back_difference < 1e-4
    read_back = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (logits(read_back) - logits(model)).abs().max() < 1e-4


# What is refused


def test_a_wrong_base_is_refused(adapter: Path, gpt2_dir: Path, tmp_path: Path) -> None:
    other = save(make_gpt2(n_inner=128, initializer_range=0.1), tmp_path / "other")
    right, wrong = weights_sha256(str(gpt2_dir)), weights_sha256(str(other))

    with pytest.raises(ModelError) as error:
        merge(adapter, tmp_path / "out", base=str(other))

    assert str(error.value) == (
        f"{adapter}: was trained on a base with weights {right[:12]}..., those of {str(other)!r} "
        f"are {wrong[:12]}...; on another base it is another model. Name the right one with --base"
    )
    assert left_over(tmp_path) == []


def test_a_base_that_changed_in_its_place_is_refused(gpt2_dir: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(gpt2_dir, tmp_path / "base"))
    directory = make_adapter(base, tmp_path / "adapter")
    tensors = tensors_of(base)
    tensors["transformer.ln_f.bias"][0] += 1e-3
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(ModelError, match="was trained on a base with weights"):
        merge(directory, tmp_path / "out")


def test_a_base_that_moved_is_named(gpt2_dir: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(gpt2_dir, tmp_path / "base"))
    directory = make_adapter(base, tmp_path / "adapter")
    base.rename(tmp_path / "elsewhere")

    with pytest.raises(ModelError) as error:
        merge(directory, tmp_path / "out")
    assert str(error.value).startswith(
        f"{directory}: cannot find its base; if it is elsewhere now, name it with --base. "
        f"model.name: {str(base)!r} is no directory"
    )

    merge(directory, tmp_path / "out", base=str(tmp_path / "elsewhere"))
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_merging_twice_is_refused(adapter: Path, tmp_path: Path) -> None:
    merge(adapter, tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()

    with pytest.raises(CheckpointError) as error:
        merge(adapter, tmp_path / "out")

    assert str(error.value) == f"{tmp_path / 'out'}: is there already; name a new directory"
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    with pytest.raises(ModelError) as unfit:
        find_adapter(tmp_path / "out")
    assert str(unfit.value) == (
        f"{tmp_path / 'out'}: is neither an adapter (adapter_config.json) nor a run with one"
    )


def test_a_merged_checkpoint_is_another_base(adapter: Path, tmp_path: Path) -> None:
    """The adapter is not added once more to what it was merged into."""
    merge(adapter, tmp_path / "out")

    with pytest.raises(ModelError, match="was trained on a base with weights"):
        merge(adapter, tmp_path / "out-2", base=str(tmp_path / "out"))


def test_an_adapter_is_found_alone_or_in_a_run(adapter: Path, tmp_path: Path) -> None:
    assert find_adapter(adapter) == adapter
    assert find_adapter(tmp_path) == adapter


def damage(wrong: str, change: Callable[[torch.Tensor], None]) -> Callable[..., Any]:
    """A merge that gets one weight wrong."""
    real = module.merged_tensors

    def merge_wrong(model: Any, names: Any) -> Any:
        for name, tensor in real(model, names):
            if name == wrong:
                with torch.no_grad():
                    change(tensor)
            yield name, tensor

    return merge_wrong


@pytest.mark.parametrize(
    "change",
    [
        lambda weight: weight[5, 3].add_(0.2),
        lambda weight: weight.mul_(1.01),
    ],
    ids=["one number", "1 %"],
)
def test_a_wrong_merge_leaves_nothing(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any
) -> None:
    name = "transformer.h.1.attn.c_attn.weight"
    monkeypatch.setattr(module, "merged_tensors", damage(name, change))

    with pytest.raises(ProofError) as error:
        merge(adapter, tmp_path / "out")

    assert str(error.value).startswith(
        f"{tmp_path / 'out'}: not written, since logits of what was read back differ from base and "
        "adapter by "
    )
    assert ", allowed 0.000" in str(error.value)
    assert left_over(tmp_path) == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_merge_that_is_not_finite_leaves_nothing(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    name = "transformer.h.1.attn.c_attn.weight"
    monkeypatch.setattr(
        module, "merged_tensors", damage(name, lambda weight: weight[0, 0].fill_(value))
    )

    with pytest.raises(ProofError, match=f"not written, since {name} is not finite in float32"):
        merge(adapter, tmp_path / "out")

    assert left_over(tmp_path) == []


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_wrong_update_leaves_nothing(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """In a file of 16 bits, rounding would hide it."""
    real = Linear.get_delta_weight
    monkeypatch.setattr(Linear, "get_delta_weight", lambda *given: 1.001 * real(*given))

    with pytest.raises(ProofError, match="out: not written, since .* differ from base and adapter"):
        merge(adapter, tmp_path / "out", dtype=dtype)

    assert left_over(tmp_path) == []


def test_a_file_that_is_not_what_was_merged_leaves_nothing(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = module.save_plain

    def save_wrong(model: Any, tokenizer: Any, directory: Path, **options: Any) -> None:
        real(model, tokenizer, directory, **options)
        tensors = load_file(directory / "model.safetensors")
        tensors["transformer.h.0.ln_1.bias"][3] += 1e-2
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(module, "save_plain", save_wrong)

    with pytest.raises(ProofError, match="logits of what was read back differ"):
        merge(adapter, tmp_path / "out")

    assert left_over(tmp_path) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("transformer.ln_f.bias"), "lacks transformer.ln_f.bias"),
        (lambda t: t.update({"extra": torch.ones(1)}), "extra is not a tensor of the merged model"),
        (
            lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"] + 1}),
            "lm_head.weight is not a tensor of the merged model",
        ),
        (
            lambda t: t.update({"transformer.ln_f.bias": t["transformer.ln_f.bias"].double()}),
            "transformer.ln_f.bias is not a tensor of the merged model",
        ),
    ],
    ids=["less", "more", "head", "dtype"],
)
def test_a_file_with_other_tensors_leaves_nothing(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, message: str
) -> None:
    real = module.save_plain

    def save_wrong(model: Any, tokenizer: Any, directory: Path, **options: Any) -> None:
        real(model, tokenizer, directory, **options)
        tensors = load_file(directory / "model.safetensors")
        change(tensors)
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(module, "save_plain", save_wrong)

    with pytest.raises(ProofError, match=message):
        merge(adapter, tmp_path / "out")
    assert left_over(tmp_path) == []


def test_a_nan_in_any_row_is_a_difference() -> None:
    good = [torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(1, 3)]
    bad = [good[0], good[1].clone(), good[2]]
    bad[1][2, 1] = math.nan

    assert module._difference(good, good) == 0
    assert math.isnan(module._difference(good, bad))
    assert math.isnan(module._difference(bad, good))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_adapter_that_is_not_finite_leaves_nothing(
    adapter: Path, tmp_path: Path, value: float
) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[START + "transformer.h.1.attn.c_attn.lora_B.weight"][0, 0] = value
    save_file(tensors, path)

    with pytest.raises((ModelError, ProofError)):
        merge(adapter, tmp_path / "out")

    assert left_over(tmp_path) == []


def foreign(base: Path, directory: Path, **settings: Any) -> Path:
    """An adapter that peft made by itself, with what we would have refused."""
    settings = {"r": 4, "task_type": "CAUSAL_LM", "init_lora_weights": False} | settings
    torch.manual_seed(0)
    model = get_peft_model(GPT2LMHeadModel.from_pretrained(base), LoraConfig(**settings))
    model.save_pretrained(directory, save_embedding_layers=False)
    return directory


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_an_adapter_of_peft_itself_merges(gpt2_dir: Path, tmp_path: Path) -> None:
    settings = {"target_modules": ["c_fc"], "lora_alpha": 8, "fan_in_fan_out": True}
    directory = foreign(gpt2_dir, tmp_path / "adapter", **settings)

    merge(directory, tmp_path / "out")

    base, merged, changes = (
        tensors_of(gpt2_dir),
        tensors_of(tmp_path / "out"),
        updates(directory, 2),
    )
    assert len(changes) == 2
    for name, update in changes.items():
        assert (merged[name] - (base[name].double() + update.T)).abs().max() < 1e-6


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("target", ["wte", "lm_head"])
def test_an_adapter_on_a_tied_weight_is_refused(
    gpt2_dir: Path, tmp_path: Path, target: str
) -> None:
    """What cannot be merged right is not merged."""
    directory = foreign(gpt2_dir, tmp_path / "adapter", target_modules=[target])

    with pytest.raises(ModelError, match="changes an embedding or the output head"):
        merge(directory, tmp_path / "out")

    assert left_over(tmp_path) == []


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("module", ["wte", "lm_head"])
def test_a_saved_copy_of_a_tied_weight_is_refused(
    gpt2_dir: Path, tmp_path: Path, module: str
) -> None:
    """It would untie the checkpoint, and nothing would say so."""
    settings = {"target_modules": ["c_fc"], "modules_to_save": [module], "fan_in_fan_out": True}
    directory = foreign(gpt2_dir, tmp_path / "adapter", **settings)

    with pytest.raises(ModelError, match="changes an embedding or the output head"):
        merge(directory, tmp_path / "out")

    assert left_over(tmp_path) == []


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_a_learned_prompt_is_refused(gpt2_dir: Path, tmp_path: Path) -> None:
    """It is no layer: scored without it, the base would pass for the adapter."""
    base = GPT2LMHeadModel.from_pretrained(gpt2_dir)
    prompt = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    prompt.save_pretrained(tmp_path / "adapter")

    with pytest.raises(ModelError, match="is a learned prompt, not layers"):
        merge(tmp_path / "adapter", tmp_path / "out", base=str(gpt2_dir))

    assert left_over(tmp_path) == []


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_an_adapter_without_a_base_needs_one_named(gpt2_dir: Path, tmp_path: Path) -> None:
    settings = {"target_modules": ["c_fc"], "fan_in_fan_out": True}
    directory = foreign(gpt2_dir, tmp_path / "adapter", **settings)
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": None}))

    with pytest.raises(ModelError) as error:
        merge(directory, tmp_path / "out")
    assert str(error.value) == f"{directory}: does not say what its base is; name it with --base"

    merge(directory, tmp_path / "out", base=str(gpt2_dir))


Usage = namedtuple("Usage", "total used free")


def test_a_full_disk_is_said_before_anything_is_written(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9, 1000))

    with pytest.raises(CheckpointError) as error:
        merge(adapter, tmp_path / "below" / "out")

    assert str(error.value) == (
        f"{tmp_path / 'below' / 'out'}: needs 0.1 MiB of disk, {tmp_path} has 0.0 MiB free"
    )
    assert not (tmp_path / "below").exists()


def test_a_disk_that_fills_up_leaves_nothing(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(model: Any, tokenizer: Any, directory: Path, **options: Any) -> None:
        directory.mkdir()
        (directory / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_plain", fail)

    with pytest.raises(CheckpointError, match="out: cannot be written: .*No space left on device"):
        merge(adapter, tmp_path / "out")
    assert left_over(tmp_path) == []


def test_an_output_below_a_file_cannot_be_written(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(CheckpointError, match="out: cannot be written: "):
        merge(adapter, tmp_path / "file" / "out")


def test_missing_directories_above_are_made(adapter: Path, tmp_path: Path) -> None:
    merge(adapter, tmp_path / "a" / "b")

    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_weights_that_are_no_numbers_are_not_written(
    gpt2_dir: Path, tmp_path: Path, dtype: str
) -> None:
    model: Any = load_model(str(gpt2_dir))
    expected = logits_of(model, [[1, 2, 3]])
    with torch.no_grad():
        model.transformer.ln_f.weight[0] = torch.nan
    tokenizer = load_tokenizer(str(gpt2_dir))
    with pytest.raises(ProofError, match="not written"):
        write_proven(
            model, tokenizer, tmp_path / "out", expected=expected, rows=[[1, 2, 3]], dtype=dtype
        )
    assert list(tmp_path.iterdir()) == []
