"""Settings meet constructors: what a recipe says is what is built."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2LMHeadModel

from lowvram.build import build, choose_device, choose_numerics
from lowvram.data import Batch
from lowvram.display import Display
from lowvram.errors import DataError, ModelError, RecipeError
from lowvram.job import Job
from lowvram.plan import plan
from lowvram.recipe import load_recipe, recipe_sha256
from lowvram.run import run
from lowvram.train import accumulate_gradients


def test_a_plan_pins_the_shape_and_build_reads_it(make_recipe: Any) -> None:
    """What `run` trains is what the two functions give by themselves."""
    recipe = make_recipe(**{"fit.gradient_checkpointing": True})
    planned = plan(recipe)
    assert planned.recipe.fit.micro_batch_size == planned.fit.micro_batch_size == 4
    assert planned.recipe.fit.max_seq_len == planned.fit.max_seq_len == 64
    state = build(planned.recipe, total_steps=planned.total_steps)
    assert any(getattr(m, "gradient_checkpointing", False) for m in state.model.modules())


def test_the_memory_limit_is_set_where_the_model_is_built(
    make_recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    module = sys.modules["lowvram.build"]  # the attribute of the package is the function
    monkeypatch.setattr(module, "limit_memory", lambda *given: asked.append(given))
    build(make_recipe(**{"fit.vram": "10GiB"}), total_steps=1)
    assert asked == [(torch.device("cpu"), 10 * 2**30)]


def test_a_card_is_named_with_its_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's set_per_process_memory_fraction refuses a device without one."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    assert choose_device() == torch.device("cuda", 0)


@pytest.mark.parametrize(("dtype", "precision"), [("bf16", "fp16"), ("fp16", "bf16")])
def test_the_two_sixteen_bit_formats_do_not_mix(
    make_recipe: Any, monkeypatch: pytest.MonkeyPatch, dtype: str, precision: str
) -> None:
    monkeypatch.setattr(sys.modules["lowvram.build"], "has_fast_16_bit", lambda _: True)
    recipe = make_recipe(**{"model.dtype": dtype, "train.precision": precision})
    with pytest.raises(RecipeError, match=f"found {dtype} with train.precision {precision}"):
        choose_numerics(recipe, torch.device("cpu"))


def test_an_evaluation_in_passing_does_not_end_a_run(
    make_recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Job.perplexity

    def perplexity(job: Job, model: Any, title: str, display: Any) -> Any:
        if title == "evaluation":
            raise ModelError("perplexity: the model gives NaN")
        return real(job, model, title, display)

    monkeypatch.setattr(Job, "perplexity", perplexity)
    recipe = make_recipe(**{"train.eval_every": 1})
    assert run(recipe, display=Display(quiet=True)).steps == 3


def test_loss_on_the_completion_needs_prompts(make_recipe: Any) -> None:
    with pytest.raises(DataError, match="data.loss_on: completion, but no document has a prompt"):
        plan(make_recipe(**{"data.loss_on": "completion"}))


def test_the_hash_of_a_plan_is_that_of_its_file(make_recipe: Any, tmp_path: Any) -> None:
    from lowvram.recipe import dump_recipe

    planned = plan(make_recipe())
    (tmp_path / "pinned.yaml").write_text(dump_recipe(planned.recipe), encoding="utf-8")
    found = load_recipe(str(tmp_path / "pinned.yaml"))
    assert recipe_sha256(found) == recipe_sha256(planned.recipe)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_with_every_lean_part_off_a_step_is_that_of_transformers_and_peft(
    dropout_gpt2_dir: Path, make_recipe: Any
) -> None:
    """To the bit, dropout and its random numbers included."""
    recipe = make_recipe(
        **{
            "model.name": str(dropout_gpt2_dir),
            "model.attention": "sdpa",
            "model.fast_dropout": False,
            "model.fused_gelu": False,
            "model.lean_norms": False,
            "method.rank": 4,
            "method.alpha": 8,
            "method.dropout": 0.1,
            "method.folded": False,
            "method.target_modules": ["c_attn", "c_proj"],
            "train.chunked_loss": False,
            "train.precision": "fp32",
        }
    )
    state = build(recipe, total_steps=1)
    plain = GPT2LMHeadModel.from_pretrained(dropout_gpt2_dir, attn_implementation="sdpa")
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        lora_dropout=0.1,
        target_modules=["c_attn", "c_proj"],
        fan_in_fan_out=True,
        task_type="CAUSAL_LM",
    )
    theirs = get_peft_model(plain, config).train()
    ours = state.model.train()
    for (_, one), (_, other) in zip(trained(ours), trained(theirs), strict=True):
        torch.nn.init.normal_(one, std=0.1)
        other.data.copy_(one.data)
    ids = torch.arange(2 * 40).view(2, 40) % 97
    batch = Batch(input_ids=ids, labels=ids, position_ids=None, target_tokens=78, tokens=80)

    torch.manual_seed(5)
    loss = accumulate_gradients(state, [batch], 78)
    torch.manual_seed(5)
    expected = theirs(input_ids=ids, labels=ids, num_items_in_batch=1, use_cache=False).loss / 78
    expected.backward()

    assert loss == expected.item()
    for (name, one), (_, other) in zip(trained(ours), trained(theirs), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.equal(one.grad, other.grad), name


def trained(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]
