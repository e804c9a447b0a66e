"""Recomputing blocks changes memory and time, and not one bit of what is computed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_gpt2, make_llama, save
from fakes import save_without_weights
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, PreTrainedConfig, PreTrainedModel

from lowvram import checkpointing
from lowvram.adapters import Adapter, add_adapter
from lowvram.build import build
from lowvram.checkpointing import Checkpointing, block_count, in_words, recompute
from lowvram.data import Batch
from lowvram.errors import ModelError, RecipeError, TrainingError
from lowvram.memory import card_of_size
from lowvram.prediction import predict
from lowvram.recipe import Recipe
from lowvram.rehearsal import BatchShape
from lowvram.train import accumulate_gradients

MakeRecipe = Callable[..., Recipe]
KINDS: list[Checkpointing] = [True, 1, 2, "selective", "offload"]
WIDE = 192  # products over fewer numbers are never kept


def dropping_gpt2() -> PreTrainedModel:
    rates = {"resid_pdrop": 0.1, "attn_pdrop": 0.1, "embd_pdrop": 0.1}
    return make_gpt2(n_embd=WIDE, n_head=3, n_layer=3, **rates)


def wide_llama() -> PreTrainedModel:
    return make_llama(hidden_size=WIDE, intermediate_size=256, num_hidden_layers=3)


def with_adapter(model: PreTrainedModel, *, folded: bool) -> nn.Module:
    """On all linear layers, with dropout and a B that is not zero."""
    adapter = Adapter(rank=4, alpha=8.0, dropout=0.1, target_modules="all-linear", folded=folded)
    wrapped: nn.Module = add_adapter(model, adapter)
    torch.manual_seed(3)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return wrapped


TRAINED: dict[str, Callable[[PreTrainedModel], nn.Module]] = {
    "folded LoRA": lambda model: with_adapter(model, folded=True),
    "peft's LoRA": lambda model: with_adapter(model, folded=False),
    "full": lambda model: model.requires_grad_(True),
}


def gradients(
    make: Callable[[], PreTrainedModel], trained: str, kind: Checkpointing, *, bf16: bool = False
) -> dict[str, torch.Tensor]:
    """Those of one step, and the loss with them."""
    model = make()
    trainee = TRAINED[trained](model).train()
    recompute(model, kind)
    ids = torch.arange(2 * 40).view(2, 40) % 97
    torch.manual_seed(5)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        loss = trainee(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    found = {name: p.grad for name, p in trainee.named_parameters() if p.grad is not None}
    return {**found, "loss": loss.detach()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """To the bit."""
    assert found.keys() == expected.keys()
    assert all(gradient.abs().max() > 0 for gradient in expected.values())
    for name, gradient in found.items():
        assert gradient.equal(expected[name]), name


# --- nothing changes ------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("make", [dropping_gpt2, wide_llama])
def test_every_kind_gives_the_same_gradients(
    make: Callable[[], PreTrainedModel], trained: str
) -> None:
    """With dropout in GPT-2's blocks and in the adapters, whose draws are made again."""
    expected = gradients(make, trained, False)

    for kind in KINDS:
        assert_same(gradients(make, trained, kind), expected)


@pytest.mark.parametrize("trained", ["folded LoRA", "full"])
def test_every_kind_gives_the_same_gradients_under_autocast(trained: str) -> None:
    """Weights are cast anew when a block is computed again."""
    expected = gradients(dropping_gpt2, trained, False, bf16=True)

    for kind in KINDS:
        assert_same(gradients(dropping_gpt2, trained, kind, bf16=True), expected)


@pytest.mark.filterwarnings("ignore:.*quantization.*")
@pytest.mark.parametrize("dtype", ["fp32", "int8", "nf4"])
def test_every_kind_gives_the_same_gradients_as_a_recipe_builds_it(
    dtype: str, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    base = save(make_gpt2(n_embd=WIDE, n_head=3), tmp_path / "base")
    ids = torch.arange(2 * 40).view(2, 40) % 97
    batch = Batch(input_ids=ids, labels=ids, position_ids=None, target_tokens=2 * 39, tokens=2 * 40)

    def seen(kind: Checkpointing) -> dict[str, torch.Tensor]:
        recipe = make_recipe(
            **{
                "model.name": str(base),
                "model.dtype": dtype,
                "method.dropout": 0.1,
                "fit.gradient_checkpointing": kind,
            }
        )
        state = build(recipe, total_steps=3)
        state.model.train()
        torch.manual_seed(3)
        for name, parameter in state.model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
        torch.manual_seed(5)
        loss = accumulate_gradients(state, [batch], batch.target_tokens)
        found = {n: p.grad for n, p in state.model.named_parameters() if p.grad is not None}
        return {**found, "loss": torch.tensor(loss)}

    expected = seen(False)
    for kind in KINDS:
        assert_same(seen(kind), expected)


# --- what is computed again -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "passes"),
    [
        (False, [1, 1, 1]),
        (1, [2, 1, 1]),
        (2, [2, 2, 1]),
        (3, [2, 2, 2]),
        (True, [2, 2, 2]),
        ("selective", [2, 2, 2]),
        ("offload", [2, 2, 2]),
    ],
)
def test_it_is_the_first_blocks_that_run_again(kind: Checkpointing, passes: list[int]) -> None:
    model = dropping_gpt2().requires_grad_(True).train()
    recompute(model, kind)
    runs = [0, 0, 0]
    for number, block in enumerate(model.transformer.h):

        def count(*_: Any, number: int = number) -> None:
            runs[number] += 1

        block.ln_1.register_forward_hook(count)
    ids = torch.arange(40)[None]

    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    assert runs == passes
    model.eval()(input_ids=ids)
    assert runs == [n + 1 for n in passes], "an evaluation recomputes nothing"


class Counting(TorchDispatchMode):
    """How often operators run, those that are answered from what was kept left out."""

    def __init__(self) -> None:
        super().__init__()
        self.runs: Counter[str] = Counter()

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.runs[op.name()] += 1
        return op(*args, **(kwargs or {}))


def runs_in_backward(make: Callable[[], PreTrainedModel], trained: str, kind: Any) -> Counter[str]:
    model = make()
    trainee = TRAINED[trained](model).train()
    recompute(model, kind)
    ids = torch.arange(40)[None]
    loss = trainee(input_ids=ids, labels=ids, use_cache=False).loss
    with Counting() as counting:
        loss.backward()
    return counting.runs


ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"


def test_selective_computes_no_wide_product_and_no_attention_again() -> None:
    """Of the 12 products of three GPT-2 blocks, full recomputation does all but the last of each,
    after which nothing is needed."""
    plain, again, selective = (
        runs_in_backward(lambda: make_gpt2(n_embd=WIDE, n_head=3, n_layer=3), "full", kind)
        for kind in (False, True, "selective")
    )

    assert plain["aten::addmm"] == plain[ATTENTION] == 0
    assert again["aten::addmm"] >= 9
    assert again[ATTENTION] == 3
    assert selective["aten::addmm"] == selective[ATTENTION] == 0
    assert selective["aten::native_layer_norm"] == again["aten::native_layer_norm"] == 6


@pytest.mark.parametrize(("trained", "narrow"), [("folded LoRA", 0), ("peft's LoRA", 12)])
def test_selective_keeps_the_products_of_adapted_layers(trained: str, narrow: int) -> None:
    """Of B (A x), over the 4 numbers of a rank, only peft's own is made again: it is a tensor of
    its own, where the folded one was added to the base's product."""
    plain = runs_in_backward(dropping_gpt2, trained, False)
    selective = runs_in_backward(dropping_gpt2, trained, "selective")

    assert selective["aten::addmm"] == selective["aten::addmm_"] == 0
    assert selective["aten::mm"] == plain["aten::mm"] + narrow


class InPlace(nn.Module):
    """An activation that changes its input, before or after another use of it."""

    def __init__(self, *, uses_first: bool) -> None:
        super().__init__()
        self.uses_first = uses_first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        used = x + 1.0 if self.uses_first else 0.0
        return x.relu_() + used


def test_a_product_may_be_changed_in_place_before_it_is_used() -> None:
    def make() -> PreTrainedModel:
        model = dropping_gpt2()
        for block in model.transformer.h:
            block.mlp.act = InPlace(uses_first=False)
        return model

    expected = gradients(make, "full", False)

    assert_same(gradients(make, "full", "selective"), expected)
    assert runs_in_backward(make, "full", "selective")["aten::addmm"] == 0


def test_a_product_that_is_changed_after_its_use_cannot_be_kept() -> None:
    model = dropping_gpt2().requires_grad_(True).train()
    model.transformer.h[1].mlp.act = InPlace(uses_first=True)
    recompute(model, "selective")

    with pytest.raises(TrainingError) as error:
        model(input_ids=torch.arange(40)[None], use_cache=False)

    assert str(error.value) == (
        "fit.gradient_checkpointing: selective: this model changes a product in place "
        "(aten::relu_) after it has used it; use true, or a number of blocks"
    )


@torch.library.custom_op("lowvram_test::attention", mutates_args=())
def drawing_attention(x: torch.Tensor, dropout_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws inside, as the kernels of a card do."""
    mask = torch.rand_like(x) >= dropout_p if dropout_p else torch.ones_like(x, dtype=torch.bool)
    return x * mask / (1.0 - dropout_p), mask


drawing_attention.register_autograd(
    lambda ctx, gradient, _: (gradient * ctx.saved_tensors[0] / (1.0 - ctx.dropout), None),
    setup_context=lambda ctx, inputs, output: (
        ctx.save_for_backward(output[1]),
        setattr(ctx, "dropout", inputs[1]),
    )[0],
)


@pytest.mark.parametrize(("dropout", "runs"), [(0.0, 0), (0.5, 1)])
def test_an_attention_that_draws_is_computed_again(
    dropout: float, runs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the dropouts after it would draw other numbers than in the forward pass."""
    name = "lowvram_test::attention"
    monkeypatch.setattr(checkpointing, "_KERNELS", checkpointing._KERNELS | {name})
    weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def block(x: torch.Tensor) -> torch.Tensor:
        attended = drawing_attention(x @ weight, dropout)[0]
        return nn.functional.dropout(attended.tanh(), 0.3)

    def gradient(selective: bool) -> tuple[torch.Tensor | None, int]:
        weight.grad = None
        torch.manual_seed(1)
        x = torch.linspace(-1, 1, 64).view(8, 8).requires_grad_()
        made = checkpointing._keep_products(block, x) if selective else block(x)
        with Counting() as counting:
            made.square().sum().backward()
        return weight.grad, counting.runs[name]

    expected, _ = gradient(False)
    found, again = gradient(True)

    assert torch.equal(found, expected)
    assert again == runs


# --- memory, simulated ----------------------------------------------------------------------------


def test_simulated_what_each_kind_takes(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Offload takes less than recomputing all by the inputs of all blocks but the one at hand."""
    blocks, rows, tokens, hidden = 4, 64, 256, 256
    model = save_without_weights(tmp_path / "model", n_layer=blocks, n_embd=hidden)
    recipe = make_recipe(**{"model.name": str(model), "train.precision": "fp32"})

    def allocated(kind: Checkpointing) -> int:
        shape = BatchShape(micro_batch_size=rows, seq_len=tokens, gradient_checkpointing=kind)
        return predict(card_of_size(2**40), recipe, shape).allocated_bytes

    none, one, three = allocated(False), allocated(1), allocated(3)
    every, selective, offload = allocated(True), allocated("selective"), allocated("offload")

    # Most is taken at the last block, which has its activations then, recomputed or not.
    assert none > one > three >= every > offload
    assert none > selective > every
    an_input = rows * tokens * hidden * 4
    assert every - offload == pytest.approx((blocks - 1) * an_input, rel=0.01)


# --- what cannot be -------------------------------------------------------------------------------


def test_more_blocks_than_there_are() -> None:
    with pytest.raises(RecipeError, match=r"found 4, the model has 3 blocks; allowed 1 to 3, true"):
        recompute(dropping_gpt2(), 4)


def test_a_model_whose_blocks_cannot_be_recomputed() -> None:
    class Rigid(nn.Module):
        supports_gradient_checkpointing = True

    recompute(Rigid(), False)
    with pytest.raises(RecipeError) as error:
        recompute(Rigid(), 2)
    assert str(error.value) == (
        "fit.gradient_checkpointing: found 2, but transformers cannot recompute blocks of Rigid; "
        "use false"
    )


def test_blocks_are_counted_from_the_configuration() -> None:
    assert block_count(GPT2Config(n_layer=5)) == 5
    with pytest.raises(ModelError, match="num_hidden_layers"):
        block_count(PreTrainedConfig())


def test_in_words() -> None:
    assert [in_words(kind, 12) for kind in (False, 1, 5, True, "selective", "offload")] == [
        "nothing recomputed",
        "1 of 12 blocks recomputed",
        "5 of 12 blocks recomputed",
        "all 12 blocks recomputed",
        "all 12 blocks recomputed but for products and attention",
        "all 12 blocks recomputed, their inputs in host memory",
    ]
