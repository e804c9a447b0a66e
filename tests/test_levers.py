"""What would make a step smaller: each simulated, the most first, and each a key that works."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes import MIB, FakePredict, save_without_weights

from lowvram.checkpointing import Checkpointing
from lowvram.errors import DeviceError
from lowvram.levers import levers
from lowvram.memory import card_of_size
from lowvram.prediction import Prediction, predict, predictor
from lowvram.prices import of_recomputation, time_of
from lowvram.recipe import Recipe, parse_set
from lowvram.recipe.loading import with_overrides
from lowvram.rehearsal import BatchShape, pinned

MakeRecipe = Callable[..., Recipe]


def shape_of(rows: int = 8, seq_len: int = 256, checkpointing: Checkpointing = False) -> BatchShape:
    return BatchShape(micro_batch_size=rows, seq_len=seq_len, gradient_checkpointing=checkpointing)


def saving(recipe: Recipe, shape: BatchShape) -> Prediction:
    """Every change of recipe or shape saves another amount."""
    kind = shape.gradient_checkpointing
    size = 1000.0 - (8 - shape.micro_batch_size)
    size -= {"False": 0, "1": 110, "selective": 100, "True": 300, "offload": 310}[str(kind)]
    size -= (256 - shape.seq_len) / 2
    size -= 20 * recipe.train.chunked_loss + 30 * recipe.model.fused_gelu
    size -= {"adamw": 0, "adamw8bit": 40, "paged_adamw8bit": 50}[recipe.train.optimizer]
    size -= {"auto": 0, "fp32": 0, "bf16": 61, "int8": 70, "nf4": 80}[recipe.model.dtype]
    size -= 90 * (recipe.method.name != "full") + 10 * (recipe.train.precision == "bf16")
    return FakePredict(lambda _: int(size * MIB), 800 * MIB)(recipe, shape)


def changes(recipe: Recipe, shape: BatchShape) -> list[str]:
    return [lever.change for lever in levers(recipe, saving, saving(recipe, shape))]


def test_every_lever_that_a_recipe_has_is_tried_and_the_most_comes_first(
    make_recipe: MakeRecipe,
) -> None:
    recipe = make_recipe(
        **{
            "train.global_batch_size": 8,
            "train.chunked_loss": False,
            "model.fused_gelu": False,
            "train.precision": "fp32",
            "train.optimizer": "adamw",
        }
    )
    now = saving(recipe, shape_of())

    found = levers(recipe, saving, now)

    assert {lever.change: lever.saved_bytes // MIB for lever in found} == {
        "fit.gradient_checkpointing=offload": 310,
        "fit.gradient_checkpointing=true": 300,
        "fit.gradient_checkpointing=1": 110,
        "fit.gradient_checkpointing=selective": 100,
        "model.dtype=nf4": 80,
        "model.dtype=int8": 70,
        "fit.max_seq_len=128": 64,
        "model.dtype=bf16": 61,
        "train.optimizer=paged_adamw8bit": 50,
        "train.optimizer=adamw8bit": 40,
        "model.fused_gelu=true": 30,
        "train.chunked_loss=true": 20,
        "train.precision=bf16": 10,
        "fit.micro_batch_size=4": 4,
    }
    saved = [lever.saved_bytes for lever in found]
    assert saved == sorted(saved, reverse=True)
    for lever in found:
        assert lever.prediction.reserved_bytes == now.reserved_bytes - lever.saved_bytes
        assert lever.prediction.fits == (lever.prediction.reserved_bytes <= 800 * MIB)
        assert lever.price.words
        assert json.loads(json.dumps(lever.to_json())) == {
            "change": lever.change,
            "price": str(lever.price),
            "time": lever.price.time,
            "saved_bytes": lever.saved_bytes,
            "predicted_reserved_bytes": lever.prediction.reserved_bytes,
            "fits": lever.prediction.fits,
        }


def test_what_is_on_already_is_no_lever(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(
        **{
            "model.dtype": "nf4",
            "train.optimizer": "paged_adamw8bit",
            "train.precision": "bf16",
        }
    )

    assert changes(recipe, shape_of(1, 64, checkpointing="offload")) == []


@pytest.mark.parametrize(
    ("now", "more"),
    [
        (False, ["1", "selective", "true", "offload"]),
        (1, ["true", "offload"]),
        ("selective", ["true", "offload"]),
        (True, ["offload"]),
        ("offload", []),
    ],
)
def test_more_can_be_recomputed_until_all_is(
    make_recipe: MakeRecipe, now: Checkpointing, more: list[str]
) -> None:
    """Half of the two blocks, all but what is expensive, all, and with the inputs elsewhere."""
    found = {
        lever.change: lever
        for lever in levers(
            make_recipe(), saving, saving(make_recipe(), shape_of(checkpointing=now))
        )
    }

    key = "fit.gradient_checkpointing="
    assert {change for change in found if change.startswith(key)} == {key + kind for kind in more}
    for kind in more:
        lever = found[key + kind]
        wanted = dict([parse_set(lever.change)])["fit.gradient_checkpointing"]
        assert lever.price == of_recomputation(wanted, blocks=2, method="lora")
        assert lever.price.time is not None
        assert str(lever.price).endswith(f"; {lever.price.time:.2f} x the time")
        recipe = with_overrides(make_recipe(), dict([parse_set(lever.change)]))
        assert repr(recipe.fit.gradient_checkpointing) == repr(wanted)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_more_recomputation_takes_more_time(method: str) -> None:
    times = [time_of(kind, 12, method) for kind in (False, 1, 6, True, "offload")]

    assert times == sorted(times)
    assert times[0] == 1.0
    assert time_of(12, 12, method) == time_of(True, 12, method)
    assert times[2] == pytest.approx((1 + time_of(True, 12, method)) / 2)
    assert 1.0 < time_of("selective", 12, method) < time_of(True, 12, method)
    assert time_of(True, 12, "full") < time_of(True, 12, "dora") == time_of(True, 12, "lora")


def test_a_full_run_can_become_one_of_an_adapter(make_recipe: MakeRecipe) -> None:
    found = changes(make_recipe(**{"method.name": "full"}), shape_of(1, 64, "offload"))

    assert found == ["method.name=lora", "model.dtype=bf16", "train.optimizer=paged_adamw8bit"]


@pytest.mark.parametrize(
    ("rows", "settings", "offered"),
    [
        (4, {}, True),
        (2, {}, False),  # two micro-batches, whose gradients add up
        (4, {"fit.micro_batch_size": 2}, False),
        (4, {"train.precision": "fp16"}, False),
        (4, {"train.fused_backward": True, "train.max_grad_norm": None}, False),  # it is on
        (4, {"method.name": "lora"}, False),
    ],
)
def test_gradients_need_not_be_kept_with_one_micro_batch_a_step(
    make_recipe: MakeRecipe, rows: int, settings: dict[str, Any], offered: bool
) -> None:
    def predict(recipe: Recipe, shape: BatchShape) -> Prediction:
        recipe = pinned(recipe, shape)
        size = 900 if recipe.train.fused_backward else 1000
        return FakePredict(lambda _: size * MIB, 800 * MIB)(recipe, shape)

    values = {"method.name": "full", "train.global_batch_size": 4} | settings
    found = levers(make_recipe(**values), predict, predict(make_recipe(**values), shape_of(rows)))

    change = "train.fused_backward=true, train.max_grad_norm=null"
    assert (change in [lever.change for lever in found]) == offered


@pytest.mark.parametrize(
    ("rows", "size", "expected"),
    [(8, 8, 4), (5, 5, 1), (9, 9, 3), (6, 12, 3), (6, 6, 3), (256, 32, 32), (2, 32, 1)],
)
def test_fewer_rows_are_a_divisor_of_the_global_batch(
    make_recipe: MakeRecipe, rows: int, size: int, expected: int
) -> None:
    """At most half as many; `lowvram run` would refuse others."""
    recipe = make_recipe(**{"train.global_batch_size": size})

    def predict(recipe: Recipe, shape: BatchShape) -> Prediction:
        return FakePredict(lambda shape: shape.micro_batch_size * MIB, MIB)(recipe, shape)

    found = levers(recipe, predict, predict(recipe, shape_of(rows)))

    assert [lever.change for lever in found] == [f"fit.micro_batch_size={expected}"]
    assert with_overrides(recipe, {"fit.micro_batch_size": expected})


def test_what_this_card_cannot_do_is_left_out(make_recipe: MakeRecipe) -> None:
    def predict(recipe: Recipe, shape: BatchShape) -> Prediction:
        if recipe.train.precision == "bf16":
            raise DeviceError("train.precision: this card only emulates bf16")
        return saving(recipe, shape)

    recipe = make_recipe(**{"train.precision": "fp32"})
    found = levers(recipe, predict, predict(recipe, shape_of()))

    assert "train.precision=bf16" not in [lever.change for lever in found]
    assert "fit.gradient_checkpointing=true" in [lever.change for lever in found]


def test_bugs_are_not_left_out(make_recipe: MakeRecipe) -> None:
    def predict(recipe: Recipe, shape: BatchShape) -> Prediction:
        if shape.gradient_checkpointing is True:
            raise ZeroDivisionError
        return saving(recipe, shape)

    with pytest.raises(ZeroDivisionError):
        levers(make_recipe(), predict, saving(make_recipe(), shape_of()))


def test_simulated_levers_save_what_they_say(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Each change, made in the recipe and predicted anew, takes what was said, to the byte."""
    model = save_without_weights(tmp_path / "model")
    recipe = make_recipe(
        **{
            "model.name": str(model),
            "model.dtype": "fp32",
            "train.precision": "fp32",
            "train.optimizer": "adamw",
            "model.fused_gelu": False,
            "method.target_modules": "all-linear",
            "method.rank": 64,
            "train.global_batch_size": 8,
        }
    )
    card = card_of_size(2**30)
    with predictor(card) as remembering:
        now = remembering(recipe, shape_of())
        found = levers(recipe, remembering, now)

    assert {lever.change for lever in found} >= {
        "fit.gradient_checkpointing=2",
        "fit.gradient_checkpointing=offload",
        "fit.gradient_checkpointing=selective",
        "fit.gradient_checkpointing=true",
        "fit.max_seq_len=128",
        "fit.micro_batch_size=4",
        "model.dtype=bf16",
        "model.dtype=nf4",
        "model.fused_gelu=true",
        "train.optimizer=adamw8bit",
        "train.precision=bf16",
    }
    assert found[0].change.startswith("fit.gradient_checkpointing=")
    assert found[0].saved_bytes > now.reserved_bytes // 3
    for lever in found[::5]:  # some of them, since each takes a fraction of a second
        changed = with_overrides(pinned(recipe, shape_of()), dict([parse_set(lever.change)]))
        fit: Any = changed.fit
        shape = shape_of(fit.micro_batch_size, fit.max_seq_len, fit.gradient_checkpointing)
        again = predict(card, changed, shape)
        assert again == lever.prediction
        assert again.reserved_bytes == now.reserved_bytes - lever.saved_bytes
