"""`simulate` with the models of transformers, peft's adapters and bitsandbytes' layers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from lowvram.memory import MemoryTrace, simulate

# Both spellings are in use; peft still has the older one.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

VOCABULARY, LENGTH, BATCH = 120, 16, 2
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = SMALL | {"num_key_value_heads": 2}
GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OPT = SMALL | {"ffn_dim": 64, "word_embed_proj_dim": 32}
NEO = {k: v for k, v in SMALL.items() if k not in ("num_hidden_layers", "num_attention_heads")} | {
    "num_layers": 2,
    "num_heads": 4,
    "attention_types": [[["global", "local"], 1]],
}
CAUSAL: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", GPT2),
    "llama": ("LlamaConfig", GROUPED),
    "opt": ("OPTConfig", OPT),
    "gpt-neo": ("GPTNeoConfig", NEO),
    "gpt-neox": ("GPTNeoXConfig", SMALL),
    "qwen2": ("Qwen2Config", GROUPED),
    "gemma": ("GemmaConfig", GROUPED | {"head_dim": 8}),
    "mixtral": ("MixtralConfig", GROUPED | {"num_local_experts": 4}),
}

State = dict[str, Any]


def causal(name: str, *, attention: str | None = None, **changes: Any) -> PreTrainedModel:
    kind, settings = CAUSAL[name]
    config = getattr(transformers, kind)(**(settings | changes))
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention)


def batch(*, padded: bool = True) -> dict[str, Tensor]:
    ids = torch.randint(3, VOCABULARY, (BATCH, LENGTH))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, 10:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def train(
    make: Callable[[torch.device], nn.Module],
    *,
    inputs: Callable[[], dict[str, Tensor]] = batch,
    optimizer: Callable[[Iterable[Tensor]], Any] = torch.optim.AdamW,
    autocast: torch.dtype | None = None,
) -> MemoryTrace:
    def build(device: torch.device) -> State:
        model = make(device).train()
        trained = [p for p in model.parameters() if p.requires_grad]
        return {"model": model, "optimizer": optimizer(trained), "device": device}

    def step(state: State) -> None:
        tensors = {name: value.to(state["device"]) for name, value in inputs().items()}
        with torch.autocast("cuda", autocast or torch.bfloat16, enabled=autocast is not None):
            loss = state["model"](**tensors).loss
        loss.backward()
        weights = [p for group in state["optimizer"].param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(weights, 1.0)
        state["optimizer"].step()
        state["optimizer"].zero_grad()
        assert loss.item() == 0.0  # nothing is computed

    return simulate(build, step)


def end(trace: MemoryTrace) -> dict[Any, int]:
    return trace.by_category(trace.steps[-1].last_event)


def most(trace: MemoryTrace, category: Any) -> int:
    """The most that a category took at once."""
    live = peak = 0
    for event in trace.events:
        if event[0] in "AF" and trace.category(trace.blocks[event[1]]) == category:
            size = trace.blocks[event[1]].size
            live += size if event[0] == "A" else -size
            peak = max(peak, live)
    return peak


def nbytes(tensors: Iterable[Tensor]) -> int:
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def ops(trace: MemoryTrace) -> set[str]:
    return {block.op for block in trace.blocks}


# --- transformers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CAUSAL)
def test_causal_models_train(name: str) -> None:
    trace = train(lambda device: causal(name).to(device))

    real = causal(name)
    parameters = list(real.parameters())
    found = end(trace)
    assert found["base weights"] == nbytes([*parameters, *real.buffers()])
    assert found["optimizer states"] == 2 * nbytes(parameters)
    assert most(trace, "gradients") == nbytes(parameters)
    assert found["gradients"] == found["adapters"] == 0
    assert "logits and loss" in {trace.category(b) for b in trace.blocks}


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt", "gpt-neox"])
def test_causal_models_in_other_ways(name: str) -> None:
    """Eager attention, mixed precision, checkpointing, generation."""
    plain = train(lambda device: causal(name).to(device))
    eager = train(lambda device: causal(name, attention="eager").to(device))
    assert any("attention" in op for op in ops(plain))
    assert not any("attention" in op for op in ops(eager))

    def checkpointed(device: torch.device) -> nn.Module:
        model = causal(name).to(device)
        model.gradient_checkpointing_enable()
        return model

    recomputed = train(checkpointed, autocast=torch.bfloat16)
    assert any(block.phase == "recompute" for block in recomputed.blocks)

    half = train(lambda device: causal(name).to(device, torch.bfloat16))
    weights = end(plain)["optimizer states"] // 2
    assert end(half)["optimizer states"] == weights


@pytest.mark.parametrize("padded", [False, True])
def test_the_values_of_a_mask_choose_the_kernel(padded: bool) -> None:
    """transformers leaves out a mask that masks nothing, and flash attention takes no mask."""
    trace = train(
        lambda device: causal("llama", num_key_value_heads=4).to(device, torch.bfloat16),
        inputs=lambda: batch(padded=padded),
    )

    kernel = "efficient" if padded else "flash"
    assert {op for op in ops(trace) if op.endswith("_attention")} == {
        f"aten::_scaled_dot_product_{kernel}_attention"
    }


def test_other_tasks_train() -> None:
    ids = torch.randint(3, VOCABULARY, (BATCH, LENGTH))
    mask = torch.ones_like(ids)
    mask[0, 9:] = 0
    t5 = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
    )
    bert = transformers.BertConfig(**SMALL, num_labels=3)
    both = {"input_ids": ids, "attention_mask": mask}
    for kind, config, inputs in (
        (transformers.T5ForConditionalGeneration, t5, {**both, "labels": ids}),
        (transformers.BertForMaskedLM, bert, {**both, "labels": ids}),
        (
            transformers.BertForSequenceClassification,
            bert,
            {**both, "labels": torch.tensor([0, 1])},
        ),
    ):
        trace = train(lambda device: kind(config).to(device), inputs=lambda: inputs)  # noqa: B023
        assert end(trace)["optimizer states"] == 2 * nbytes(kind(config).parameters())


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt-neox"])
def test_generation_fills_its_cache(name: str) -> None:
    """No token is the last one, so that the length ends it: 3 + 8 positions in fp32."""
    shapes: list[torch.Size] = []

    def build(device: torch.device) -> State:
        return {"model": causal(name).to(device).eval(), "device": device}

    def step(state: State) -> None:
        ids = torch.randint(3, VOCABULARY, (BATCH, 3), device=state["device"])
        out = state["model"].generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=8,
            do_sample=True,
            top_k=5,
            return_dict_in_generate=True,
        )
        shapes.append(out.sequences.shape)
        state["cache"] = out.past_key_values

    trace = simulate(build, step, steps=1)

    assert shapes == [(BATCH, 11)]
    heads = 2 if name == "llama" else 4
    cache = 4 * BATCH * heads * 10 * 8  # the last token's keys and values are never needed
    live = [block.size for block in trace.live(len(trace.events) - 1)]
    assert live.count(cache) == 2 * 2  # keys and values of two layers


def test_a_checkpoint_is_loaded_onto_the_device(tmp_path: Path) -> None:
    causal("llama").save_pretrained(tmp_path)
    for arguments in ({}, {"dtype": torch.bfloat16}):

        def make(device: torch.device) -> nn.Module:
            return AutoModelForCausalLM.from_pretrained(tmp_path, **arguments).to(device)  # noqa: B023

        trace = train(make)
        itemsize = 2 if arguments else 4
        parameters = sum(p.numel() for p in causal("llama").parameters())
        assert end(trace)["optimizer states"] == 2 * itemsize * parameters


# --- peft -----------------------------------------------------------------------------------------

ADAPTERS: dict[str, peft.PeftConfig] = {
    "lora": peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    "lora, dropout": peft.LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1),
    "dora": peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], use_dora=True),
    "rslora": peft.LoraConfig(r=4, target_modules=["q_proj"], use_rslora=True),
    "with the head": peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "ia3": peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
}


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_train(name: str, half: bool) -> None:
    """Adapters, their gradients and states in fp32, also beside 16-bit weights."""

    def make(device: torch.device) -> Any:
        model = causal("llama").to(torch.bfloat16 if half else torch.float32)
        return peft.get_peft_model(model.to(device), ADAPTERS[name])

    trace = train(make, autocast=torch.bfloat16 if half else None)

    real = make(torch.device("cpu"))
    trained = [p for p in real.parameters() if p.requires_grad]
    frozen = [p for p in real.parameters() if not p.requires_grad]
    found = end(trace)
    assert {p.dtype for p in trained} == {torch.float32} or name == "with the head"
    assert found["adapters"] == most(trace, "gradients") == nbytes(trained)
    assert found["optimizer states"] == 2 * nbytes(trained)
    assert found["base weights"] == nbytes([*frozen, *real.buffers()])


def test_a_checkpointed_adapter_trains() -> None:
    def make(device: torch.device) -> Any:
        model = causal("llama").to(device)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        model.enable_input_require_grads()
        return peft.get_peft_model(model, ADAPTERS["lora"])

    trace = train(make, autocast=torch.float16)

    assert any(block.phase == "recompute" for block in trace.blocks)
    assert most(trace, "gradients") == end(trace)["adapters"] > 0


# --- bitsandbytes ---------------------------------------------------------------------------------


def quantised(model: PreTrainedModel, kind: str) -> PreTrainedModel:
    """Its linear layers but the head, replaced by hand."""
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if not isinstance(layer, nn.Linear) or name == "lm_head":
                continue
            size = (layer.in_features, layer.out_features)
            if kind == "int8":
                new: Any = bnb.nn.Linear8bitLt(*size, bias=False, has_fp16_weights=False)
                weight = layer.weight.data.half()
                new.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
            else:
                new = bnb.nn.Linear4bit(
                    *size, bias=False, compute_dtype=torch.bfloat16, quant_type=kind
                )
            setattr(parent, name, new)
    return model.requires_grad_(False)


@pytest.mark.parametrize("method", ["to", "cuda"])
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_quantised_layers_train_adapters(kind: str, method: str) -> None:
    def make(device: torch.device) -> Any:
        model = quantised(causal("llama").half(), kind)
        model = model.cuda() if method == "cuda" else model.to(device)
        layer: Any = model.model.layers[0].self_attn.q_proj
        assert layer.weight.dtype == (torch.int8 if kind == "int8" else torch.uint8)
        assert layer.weight.device == device
        return peft.get_peft_model(model, ADAPTERS["lora"])

    trace = train(make, optimizer=lambda p: bnb.optim.AdamW8bit(p, lr=1e-3))

    linear = [
        layer.weight.numel()
        for name, layer in causal("llama").named_modules()
        if isinstance(layer, nn.Linear) and name != "lm_head"
    ]
    one = torch.int8 if kind == "int8" else torch.uint8
    sizes = [b.size for b in trace.live(len(trace.events) - 1) if b.phase == "build"]
    for count in set(linear):
        assert sizes.count(count * one.itemsize // (1 if kind == "int8" else 2)) >= 2
    assert end(trace)["adapters"] == end(trace)["optimizer states"] // 2 > 0  # too small for 8 bits


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_on_loading(bits: int, tmp_path: Path) -> None:
    """As transformers does it, and then prepared for training as peft does."""
    causal("llama").save_pretrained(tmp_path)

    def make(device: torch.device) -> Any:
        config = transformers.BitsAndBytesConfig(
            load_in_4bit=bits == 4,
            load_in_8bit=bits == 8,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=config, device_map={"": device}
        )
        model = peft.prepare_model_for_kbit_training(
            model, gradient_checkpointing_kwargs={"use_reentrant": False}
        )
        return peft.get_peft_model(model, copy.deepcopy(ADAPTERS["lora"]))

    trace = train(make, autocast=torch.bfloat16)

    assert any(block.phase == "recompute" for block in trace.blocks)
    assert end(trace)["optimizer states"] == 2 * end(trace)["adapters"] > 0
    assert any(op.startswith("aten::_scaled_dot_product") for op in ops(trace))
