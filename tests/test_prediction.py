"""What a run would take, from a simulation of its own steps on a model like the real one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_gpt2, make_llama
from fakes import MIB, save_without_weights
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    PreTrainedConfig,
)

from lowvram import prediction
from lowvram.errors import DeviceError, ModelError
from lowvram.loss import head_is_plain
from lowvram.memory import card_of_size, find_card, simulate
from lowvram.model import TORCH_DTYPES, blank_model, load_config, load_model
from lowvram.optimizers import MIN_8BIT_SIZE
from lowvram.prediction import Prediction, predict, predictor, trace, with_budget
from lowvram.recipe import Recipe
from lowvram.rehearsal import BatchShape

MakeRecipe = Callable[..., Recipe]
CARD = card_of_size(2**30)


def shape_of(rows: int = 4, seq_len: int = 64, checkpointing: bool = False) -> BatchShape:
    return BatchShape(micro_batch_size=rows, seq_len=seq_len, gradient_checkpointing=checkpointing)


def test_deterministic_kernels_are_predicted_and_not_left_on(make_recipe: MakeRecipe) -> None:
    """cuBLAS gets 8 buffers of 4 MiB then, in each of the two threads that multiply."""
    card = find_card("rtx-4070-ti")
    plain = predict(card, make_recipe(), shape_of()).categories
    exact = predict(card, make_recipe(**{"train.deterministic": True}), shape_of()).categories
    assert plain["workspaces"] == 2 * 8_519_680
    assert exact["workspaces"] == 2 * 8 * 4096 * 1024
    assert not torch.are_deterministic_algorithms_enabled()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert predict(card, make_recipe(), shape_of()).categories == plain


# --- predictions ----------------------------------------------------------------------------------


def test_a_prediction_is_what_the_trace_says(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()

    found = predict(CARD, recipe, shape_of())

    traced = trace(recipe, CARD, shape_of())
    assert found == Prediction(
        shape=shape_of(),
        fits=True,
        reserved_bytes=traced.peak_reserved_bytes,
        allocated_bytes=traced.peak_allocated_bytes,
        budget_bytes=2**30,
        categories=dict(traced.by_category()),
    )
    assert len(traced.steps) == 3
    assert found.headroom_bytes == 2**30 - found.reserved_bytes
    assert found.to_json() == {
        "seq_len": 64,
        "gradient_checkpointing": False,
        "micro_batch_size": 4,
        "predicted_reserved_bytes": found.reserved_bytes,
        "predicted_allocated_bytes": found.allocated_bytes,
        "headroom_bytes": found.headroom_bytes,
    }


@pytest.mark.parametrize("missing", [0, 2, 16])
def test_the_budget_decides_what_fits(make_recipe: MakeRecipe, missing: int) -> None:
    """What does not fit is told what it would take if there were enough."""
    recipe = make_recipe()
    whole = predict(CARD, recipe, shape_of(200))

    found = predict(
        card_of_size(whole.allocated_bytes - missing * MIB if missing else whole.reserved_bytes),
        recipe,
        shape_of(200),
    )

    assert found.fits == (missing == 0)
    assert found.reserved_bytes == whole.reserved_bytes
    assert (found.headroom_bytes < 0) == (missing > 0)


def test_what_the_allocator_can_give_back_counts_as_free(make_recipe: MakeRecipe) -> None:
    """Unlimited, 200 rows reserve more than 2 MiB above what is needed; with less, they do fit."""
    recipe = make_recipe()
    whole = predict(CARD, recipe, shape_of(200))
    budget = whole.reserved_bytes - 2 * MIB
    assert whole.allocated_bytes < budget

    found = predict(card_of_size(budget), recipe, shape_of(200))

    assert found.fits
    assert found.reserved_bytes <= budget < whole.reserved_bytes


def test_more_rows_take_more_and_checkpointing_takes_less(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    sizes = [predict(CARD, recipe, shape_of(rows)).allocated_bytes for rows in (100, 200, 300)]

    assert sizes == sorted(set(sizes))
    assert predict(CARD, recipe, shape_of(300, checkpointing=True)).allocated_bytes < 0.9 * sizes[2]


def test_the_global_batch_need_not_be_a_multiple(make_recipe: MakeRecipe) -> None:
    """A probe may ask for any number of rows; the recipe is left as it is."""
    recipe = make_recipe(**{"train.global_batch_size": 4})

    for rows in (1, 3, 5, 7):
        assert predict(CARD, recipe, shape_of(rows)).fits
    assert recipe.train.global_batch_size == 4


def test_a_question_is_simulated_once(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    answer = predict(CARD, make_recipe(), shape_of())

    def counting(*question: Any) -> Prediction:
        asked.append(question)
        return answer

    monkeypatch.setattr(prediction, "predict", counting)
    with predictor(CARD) as remembering:
        for rank in (4, 8):
            for rows in (1, 2):
                for _ in range(3):
                    recipe = make_recipe(**{"method.rank": rank})
                    assert remembering(recipe, shape_of(rows)) == answer

    assert [(card, recipe.method.rank, shape) for card, recipe, shape in asked] == [
        (CARD, rank, shape_of(rows)) for rank in (4, 8) for rows in (1, 2)
    ]


def test_a_card_with_another_budget_is_the_same_card() -> None:
    card = find_card("rtx-4070-ti")

    for budget in (0, 8 * 2**30, card.budget(), 1 << 45):
        other = with_budget(card, budget)
        assert other.budget("headless") == other.budget("windows") == budget
        assert (other.name, other.total_bytes) == (card.name, card.total_bytes)
        assert other.compute_capability == card.compute_capability


def test_errors_are_those_of_a_run(make_recipe: MakeRecipe) -> None:
    turing = find_card("rtx-2060")
    with pytest.raises(DeviceError, match="train.precision: found bf16, but this card"):
        predict(turing, make_recipe(**{"train.precision": "bf16"}), shape_of())
    assert predict(turing, make_recipe(), shape_of()).fits
    with pytest.raises(ModelError, match="is no directory"):
        predict(CARD, make_recipe(**{"model.name": "no/such/model"}), shape_of())


def test_no_weights_are_needed(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    model = save_without_weights(tmp_path / "model")

    assert predict(CARD, make_recipe(**{"model.name": str(model)}), shape_of(1, 256)).fits


# --- with a card in the machine: in a process of its own ------------------------------------------


def test_with_a_card_the_simulation_has_a_process_from_which_it_is_hidden(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole way: questions, answers and errors go through it, and what it prints does not."""
    recipe, absent = make_recipe(), make_recipe(**{"model.name": "no/such/model"})
    expected = [predict(CARD, recipe, shape_of(rows)) for rows in (1, 2)]
    started: list[Any] = []
    popen = subprocess.Popen

    def starting(command: list[str], **options: Any) -> Any:
        started.append((command, options["env"]))
        loud = command[-1].replace("from lowvram", "print('a library says hello')\nfrom lowvram")
        return popen([*command[:-1], loud], **options)

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(prediction.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(prediction.subprocess, "Popen", starting)
    with predictor(CARD) as remembering:
        found = [remembering(recipe, shape_of(rows)) for rows in (1, 2)]
        with pytest.raises(ModelError, match="is no directory"):
            remembering(absent, shape_of())
        found.append(remembering(recipe, shape_of(1)))

    assert found == [*expected, expected[0]]
    [(command, environment)] = started
    assert command[0] == sys.executable
    assert environment == dict(os.environ) | {"CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import os; os._exit(3)", "exit code 3"),
        ("raise MemoryError('killed')", "MemoryError: killed"),
        ("import sys; sys.stdin.close()", "exit code 0"),
    ],
)
def test_a_process_that_dies_is_told(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, code: str, reason: str
) -> None:
    popen = subprocess.Popen
    monkeypatch.setattr(prediction.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        prediction.subprocess,
        "Popen",
        lambda command, **options: popen([command[0], "-c", code], **options),
    )

    with pytest.raises(DeviceError) as error, predictor(CARD) as remembering:
        remembering(make_recipe(), shape_of())

    assert str(error.value) == f"the process that simulates has ended: {reason}"


# --- bytes that are known by hand -----------------------------------------------------------------


def states(recipe: Recipe) -> int:
    """Of the optimizer, where 300 rows of activations make the peak, after the first step."""
    return predict(CARD, recipe, shape_of(300)).categories["optimizer states"]


def trainable(rank: int) -> list[int]:
    """Elements of A (rank x 32) and B (96 x rank) of c_attn, in two blocks."""
    return [rank * 32, 96 * rank] * 2


@pytest.mark.parametrize("rank", [4, 64, 128])
def test_adamw_keeps_two_moments_and_a_step_for_each_tensor(
    make_recipe: MakeRecipe, rank: int
) -> None:
    recipe = make_recipe(**{"train.optimizer": "adamw", "method.rank": rank})

    assert states(recipe) == sum(2 * 4 * elements + 4 for elements in trainable(rank))


@pytest.mark.parametrize("rank", [4, 64, 128])
def test_adamw8bit_keeps_two_bytes_and_the_scales_of_blocks(
    make_recipe: MakeRecipe, rank: int
) -> None:
    """Tensors below 4,096 elements keep 32 bits. Two maps of 256 codes are shared by the others."""
    large = [elements for elements in trainable(rank) if elements >= MIN_8BIT_SIZE]
    small = [elements for elements in trainable(rank) if elements < MIN_8BIT_SIZE]
    assert bool(large) == (rank > 4)
    assert bool(small) == (rank < 128)
    recipe = make_recipe(**{"train.optimizer": "adamw8bit", "method.rank": rank})

    assert states(recipe) == (
        sum(2 * 4 * elements for elements in small)
        + sum(2 * (elements + 4 * -(-elements // 256)) for elements in large)
        + 2 * 256 * 4 * bool(large)
    )


def test_weights_adapters_and_states_of_a_full_run(make_recipe: MakeRecipe) -> None:
    """fp32 weights, a tied head counted once; the moments are twice as much."""
    weights = 4 * sum(parameter.numel() for parameter in make_gpt2().parameters())
    tensors = len(list(make_gpt2().parameters()))
    recipe = make_recipe(**{"method.name": "full", "train.optimizer": "adamw"})

    found = predict(CARD, recipe, shape_of(300)).categories

    assert found["base weights"] == weights
    assert found["adapters"] == 0
    assert found["optimizer states"] == 2 * weights + 4 * tensors


# --- the simulated model is the real one ----------------------------------------------------------


def facts(model: nn.Module) -> dict[str, Any]:
    """Of each parameter and buffer, and of what bitsandbytes hangs on them: kind, dtype, shape."""
    return {
        name: (type(tensor).__name__, tensor.dtype, tuple(tensor.shape), *attached(tensor))
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
    }


def attached(tensor: Any) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    """Scales of int8 rows; of nf4, the blocks' absolute maxima, quantised themselves, and codes."""
    found = {"SCB": getattr(tensor, "SCB", None)}
    state, level = getattr(tensor, "quant_state", None), 1
    while state is not None:
        found |= {f"absmax {level}": state.absmax, f"code {level}": state.code}
        found[f"offset {level}"] = state.offset
        state, level = state.state2, level + 1
    return [
        (name, value.dtype, tuple(value.shape))
        for name, value in found.items()
        if value is not None
    ]


def size_of(facts: dict[str, Any]) -> int:
    """Bytes of all of them."""
    tensors = [fact for _, *fact in facts.values()]
    pairs = [(fact[0], fact[1]) for fact in tensors]
    pairs += [(dtype, shape) for fact in tensors for _, dtype, shape in fact[2:]]
    return sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in pairs)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16", "int8", "nf4"])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_a_model_without_weights_has_what_the_loaded_one_has(
    architecture: str, dtype: Any, request: pytest.FixtureRequest
) -> None:
    """Dtypes, shapes and bytes of everything, by name.

    With nf4, one more table of 256 codes is bitsandbytes' own.
    """
    directory = request.getfixturevalue(f"{architecture}_dir")
    options: dict[str, Any] = {"dtype": dtype, "compute_dtype": TORCH_DTYPES["bf16"]}
    blank: list[Any] = []

    def build(device: torch.device) -> nn.Module:
        model = blank_model(load_config(str(directory)), device=str(device), **options)
        blank.append((facts(model), model.training))
        return model

    traced = simulate(build, lambda model: None, steps=1)

    real = load_model(str(directory), **options)
    assert blank == [(facts(real), False)]
    own = 4 * 256 if dtype == "nf4" else 0
    assert traced.by_category()["base weights"] == size_of(facts(real)) + own


def sizes() -> dict[str, Any]:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    rows = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    return {"vocab_size": 300, "max_position_embeddings": 64, **rows, **heads}


HEADS: dict[str, tuple[PreTrainedConfig, bool]] = {
    "gpt2": (make_gpt2().config, True),
    "gpt2, untied": (make_gpt2(tie_word_embeddings=False).config, True),
    "llama": (make_llama().config, True),
    "granite, scaled": (GraniteConfig(**sizes(), logits_scaling=8.0), False),
    "cohere, scaled": (CohereConfig(**sizes(), logit_scale=0.0625), False),
    "gemma2, capped": (Gemma2Config(**sizes(), head_dim=8, final_logit_softcapping=2.0), False),
    "gemma2, not capped": (Gemma2Config(**sizes(), head_dim=8, final_logit_softcapping=None), True),
}


@pytest.mark.parametrize("kind", HEADS)
def test_without_values_it_is_known_too_whether_logits_are_the_heads(kind: str) -> None:
    config, plain = HEADS[kind]
    torch.manual_seed(0)
    real = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    found: list[bool] = []

    def build(device: torch.device) -> nn.Module:
        model = blank_model(config, device=str(device), attention="eager")
        found.append(head_is_plain(model))
        return model

    simulate(build, lambda model: None, steps=1)

    assert found == [head_is_plain(real)] == [plain]
