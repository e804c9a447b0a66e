"""The shape of a step where the recipe leaves it open, and what it may not be."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from fakes import MIB, FakeMeasure, FakePredict, forbid, measurement, put_card, save_without_weights

from lowvram.checkpointing import Checkpointing
from lowvram.cli import main
from lowvram.errors import DoesNotFit, RecipeError
from lowvram.fit import Fit, choose_seq_len, fit, with_shape
from lowvram.measurement import Measurement
from lowvram.memory import card_of_size
from lowvram.prediction import Predict, predict, predictor
from lowvram.recipe import Recipe, parse_set
from lowvram.recipe.loading import with_overrides
from lowvram.rehearsal import BatchShape

MakeRecipe = Callable[..., Recipe]
GIB = 2**30


def choose(recipe: Recipe, **changes: Any) -> Fit:
    return fit(recipe, **({"context_length": 1024, "longest_document": 5000} | changes))


def taken(found: Fit | BatchShape) -> str:
    """As text, since True is 1 to Python: "(4, True)" is not "(4, 1)"."""
    return repr((found.micro_batch_size, found.gradient_checkpointing))


@pytest.fixture
def make_recipe(make_recipe: MakeRecipe, tmp_path: Path) -> MakeRecipe:
    """Of a model of ten blocks, which is never loaded."""
    deep = save_without_weights(tmp_path / "deep", n_layer=10)
    return lambda **changes: make_recipe(**({"model.name": str(deep)} | changes))


# --- the length of rows ---------------------------------------------------------------------------


def test_more_tokens_than_positions_are_refused_before_anything_is_loaded(
    make_recipe: MakeRecipe,
) -> None:
    recipe = make_recipe(**{"fit.max_seq_len": 2048})
    with pytest.raises(RecipeError) as error:
        choose(recipe)
    assert str(error.value) == (
        "fit.max_seq_len: found 2048, the model has 1024 positions; allowed 2 to 1024"
    )


@pytest.mark.parametrize(
    ("longest", "context", "expected"),
    [
        (5000, 1024, 1024),
        (5000, 131072, 1024),
        (600, 1000, 1000),
        (100, 1024, 128),
        (128, 1024, 128),
        (129, 1024, 256),
        (3, 64, 16),
        (1, 8, 8),
    ],
)
def test_rows_are_as_long_as_the_data_needs(
    make_recipe: MakeRecipe, longest: int, context: int, expected: int
) -> None:
    """The next power of two from 16 on, up to the model's limit and 1024."""
    found = choose(make_recipe(), longest_document=longest, context_length=context)
    assert found.max_seq_len == expected
    assert choose_seq_len("auto", context, longest) == expected


def test_longer_rows_have_to_be_asked_for(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(**{"fit.max_seq_len": 2000})
    assert choose(recipe, context_length=131072).max_seq_len == 2000


# --- on a CPU -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 12, 30, 32])
def test_the_micro_batch_of_a_cpu_divides_the_global_one(
    make_recipe: MakeRecipe, size: int
) -> None:
    found = choose(make_recipe(**{"train.global_batch_size": size}))
    assert found.micro_batch_size * found.gradient_accumulation_steps == size
    assert found.micro_batch_size * found.max_seq_len <= 2048
    assert found.reason == "on a CPU, up to 2,048 tokens at a time"
    assert found.gradient_checkpointing is False
    assert found.predicted_reserved_bytes is None
    assert found.measurement is None


def test_what_the_recipe_says_stays(make_recipe: MakeRecipe) -> None:
    settings = {
        "fit.micro_batch_size": 2,
        "fit.max_seq_len": 48,
        "fit.gradient_checkpointing": True,
    }
    assert choose(make_recipe(**settings)) == Fit(
        micro_batch_size=2,
        max_seq_len=48,
        gradient_checkpointing=True,
        gradient_accumulation_steps=2,
        reason="as the recipe says",
        blocks=10,
    )


@pytest.mark.parametrize("kind", [True, 1, 10, "selective", "offload"])
def test_what_is_recomputed_on_a_cpu_is_as_the_recipe_says(
    make_recipe: MakeRecipe, kind: Checkpointing
) -> None:
    found = choose(make_recipe(**{"fit.gradient_checkpointing": kind}))

    assert repr(found.gradient_checkpointing) == repr(kind)  # True is 1 to Python


@pytest.mark.parametrize("predict", [None, lambda *_: pytest.fail("it was simulated")])
def test_more_blocks_than_the_model_has_are_refused(
    make_recipe: MakeRecipe, predict: Predict | None
) -> None:
    with pytest.raises(RecipeError) as error:
        choose(make_recipe(**{"fit.gradient_checkpointing": 11}), predict=predict)

    assert str(error.value) == (
        "fit.gradient_checkpointing: found 11, the model has 10 blocks; allowed 1 to 10, true (all "
        "of them), false, selective, offload or auto"
    )


# --- on a card: 500 MiB, and for a row 1000 MiB, less 70 for each of ten blocks recomputed --------


def cost(shape: BatchShape) -> int:
    kind = shape.gradient_checkpointing
    a_row = {"selective": 600, "offload": 250, True: 300}
    mib = a_row[kind] if isinstance(kind, str) or kind is True else 1000 - 70 * kind
    return (500 + mib * shape.micro_batch_size) * MIB


def budget(mib: int) -> dict[str, Any]:
    return {"predict": FakePredict(cost, mib * MIB)}


@pytest.fixture(autouse=True)
def _prices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block recomputed costs 0.03; selective costs as much as more than three."""
    monkeypatch.setattr("lowvram.prices.ALL_BLOCKS", {"adapter": 1.3, "full": 1.3})
    monkeypatch.setattr("lowvram.prices.SELECTIVE", {"adapter": 1.1, "full": 1.1})


@pytest.mark.parametrize(
    ("mib", "expected"),
    [
        (40_000, (32, False)),
        (32_628, (32, False)),  # 128 MiB to spare, as fit.headroom says
        (32_627, (16, False)),
        (9_000, (8, False)),
        (4_628, (4, False)),  # 4 rows of 1,024 tokens keep a card busy; fewer do not
        (4_627, (4, 1)),
        (4_348, (4, 1)),
        (4_347, (4, 2)),
        (3_788, (4, 3)),
        (3_787, (4, "selective")),  # rather than 4 blocks
        (3_028, (4, "selective")),
        (3_027, (4, 6)),
        (2_108, (4, 9)),
        (2_107, (4, True)),
        (1_828, (4, True)),
        (1_827, (4, "offload")),
        (1_628, (4, "offload")),
        (1_627, (2, 8)),
        (1_000, (1, 9)),
        (900, (1, "offload")),
        (877, (1, 9)),  # rather than refuse, nothing is left free
        (750, (1, "offload")),
    ],
)
def test_the_cheapest_shape_that_fits(
    make_recipe: MakeRecipe, mib: int, expected: tuple[int, Checkpointing]
) -> None:
    """The most rows without recomputation as long as a pass is of a useful size. Then the fewest
    rows of that size with the cheapest recomputation; then fewer rows, likewise.
    """
    recipe = make_recipe(**{"train.global_batch_size": 32})
    predict = FakePredict(cost, mib * MIB)

    found = choose(recipe, predict=predict)

    assert taken(found) == repr(expected)
    assert found.micro_batch_size * found.gradient_accumulation_steps == 32
    assert found.predicted_reserved_bytes is not None
    assert found.predicted_reserved_bytes <= mib * MIB == found.budget_bytes
    assert found == choose(recipe, **budget(mib))
    assert len(predict.asked) <= 20


@pytest.mark.parametrize("blocks", [1, 2, 7, 48])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.5, 0.77, 1.0])
def test_as_few_blocks_as_fit_with_few_predictions(
    make_recipe: MakeRecipe, tmp_path: Path, blocks: int, share: float
) -> None:
    """What a block takes need not be the same for all: here the later ones take more."""
    model = save_without_weights(tmp_path / "blocks", n_layer=blocks)
    rows = {"fit.micro_batch_size": 4, "train.global_batch_size": 4, "model.name": str(model)}

    def size(recomputed: float) -> int:
        return int((4000 - 3000 * (recomputed / blocks) ** 1.5) * MIB)

    def bent(shape: BatchShape) -> int:
        kind = shape.gradient_checkpointing
        if isinstance(kind, str):  # which saves nothing here
            return size(0)
        return size(blocks if kind is True else kind)

    predict = FakePredict(bent, size(share * blocks))

    found = choose(make_recipe(**rows), predict=predict)

    least = next(n for n in range(blocks + 1) if size(n) <= predict.budget_bytes)
    assert repr(found.gradient_checkpointing) == repr({0: False, blocks: True}.get(least, least))
    assert len(predict.asked) <= 10


@pytest.mark.parametrize(("rows", "mib"), [(8, 8_628), (2, 2_628), (1, 1_628)])
def test_checkpointing_is_not_used_where_it_allows_no_more_rows(
    make_recipe: MakeRecipe, rows: int, mib: int
) -> None:
    recipe = make_recipe(**{"train.global_batch_size": rows})
    useless = FakePredict(lambda shape: (500 + 1000 * shape.micro_batch_size) * MIB, mib * MIB)

    expected = repr((rows, False))
    assert taken(choose(recipe, **budget(mib))) == expected
    assert taken(choose(recipe, predict=useless)) == expected
    smaller = make_recipe(**{"train.global_batch_size": 8 * rows})
    assert taken(choose(smaller, predict=useless)) == expected


@pytest.mark.parametrize("size", [1, 6, 7, 30, 36])
def test_only_divisors_of_the_global_batch_are_tried(make_recipe: MakeRecipe, size: int) -> None:
    predict = FakePredict(cost, 700 * MIB)
    recipe = make_recipe(**{"train.global_batch_size": size})

    with pytest.raises(DoesNotFit):
        choose(recipe, predict=predict)

    shapes = {shape.micro_batch_size for shape in predict.asked}
    assert shapes == {rows for rows in range(1, size + 1) if size % rows == 0}


def test_short_rows_may_be_many(make_recipe: MakeRecipe) -> None:
    """A pass of 64 rows of 64 tokens is as busy as one of 4 rows of 1,024."""
    recipe = make_recipe(**{"train.global_batch_size": 256})

    found = choose(recipe, longest_document=64, **budget(63_000))

    assert (found.max_seq_len, taken(found)) == (64, "(64, 1)")


@pytest.mark.parametrize(
    ("settings", "mib", "expected"),
    [
        ({"fit.micro_batch_size": 4}, 4_500, (4, False)),  # with nothing to spare
        ({"fit.micro_batch_size": 4}, 4_499, (4, 1)),
        ({"fit.micro_batch_size": 4}, 90_000, (4, False)),
        ({"fit.gradient_checkpointing": True}, 90_000, (32, True)),
        ({"fit.gradient_checkpointing": False}, 3_000, (2, False)),
        ({"fit.gradient_checkpointing": False, "fit.micro_batch_size": 1}, 1_500, (1, False)),
        ({"fit.headroom": "1MiB"}, 32_501, (32, False)),
        ({"fit.headroom": "2GiB"}, 32_501, (16, False)),
        ({"fit.headroom": "8GiB"}, 900, (1, 9)),  # rather than refuse, nothing is left free
        ({"fit.gradient_checkpointing": 3, "fit.micro_batch_size": 4}, 3_660, (4, 3)),
        ({"fit.gradient_checkpointing": 1}, 9_000, (8, 1)),
        ({"fit.gradient_checkpointing": "selective"}, 9_000, (8, "selective")),
        ({"fit.gradient_checkpointing": "offload"}, 9_000, (32, "offload")),
    ],
)
def test_what_the_recipe_pins_is_respected(
    make_recipe: MakeRecipe, settings: dict[str, Any], mib: int, expected: tuple[int, Any]
) -> None:
    recipe = make_recipe(**{"train.global_batch_size": 32}, **settings)

    assert taken(choose(recipe, **budget(mib))) == repr(expected)


def test_a_fit_says_what_it_found_and_pins_it(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(**{"train.global_batch_size": 32})

    found = choose(recipe, **budget(9_216))

    assert found.reason == "predicted peak 8.30 GiB of 9.00 GiB"
    assert found.predicted_allocated_bytes == 8_499 * MIB
    pinned = with_shape(recipe, found)
    assert pinned.fit.micro_batch_size == 8
    assert pinned.fit.max_seq_len == 1024
    assert pinned.fit.gradient_checkpointing is False
    assert taken(choose(pinned, **budget(9_216))) == "(8, False)"


@pytest.mark.parametrize(
    ("mib", "kind"), [(4_627, 1), (3_787, "selective"), (2_107, True), (1_827, "offload")]
)
def test_a_fit_pins_what_is_recomputed(
    make_recipe: MakeRecipe, mib: int, kind: Checkpointing
) -> None:
    recipe = make_recipe(**{"train.global_batch_size": 32})

    pinned = with_shape(recipe, choose(recipe, **budget(mib)))

    assert repr(pinned.fit.gradient_checkpointing) == repr(kind)
    assert taken(choose(pinned, **budget(mib))) == repr((4, kind))


# --- measured on the card -------------------------------------------------------------------------


def test_the_shape_is_tried_on_the_card(make_recipe: MakeRecipe) -> None:
    """Prediction and card agree: one try, and no larger shape would have fitted."""
    recipe = make_recipe(**{"train.global_batch_size": 32})
    measure = FakeMeasure(cost, 9_000 * MIB)

    found = choose(recipe, measure=measure, **budget(9_000))

    assert [shape.micro_batch_size for shape in measure.tried] == [8]
    assert found.measurement == measurement(8_500 * MIB)
    assert found.reason == "predicted peak 8.30 GiB of 8.79 GiB, measured 8.30 GiB"
    assert found == choose(recipe, measure=FakeMeasure(cost, 9_000 * MIB), **budget(9_000))


@pytest.mark.parametrize(
    ("real", "expected", "tried"),
    [(8_400, (4, False), [8, 4]), (4_400, (4, True), [8, 4, 4])],
)
def test_what_the_card_refuses_leads_to_the_next_shape(
    make_recipe: MakeRecipe, real: int, expected: tuple[int, bool], tried: list[int]
) -> None:
    recipe = make_recipe(**{"train.global_batch_size": 8})
    measure = FakeMeasure(cost, real * MIB)

    found = choose(recipe, measure=measure, **budget(9_000))

    assert taken(found) == repr(expected)
    assert [shape.micro_batch_size for shape in measure.tried] == tried


def test_after_three_tries_the_run_is_refused(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(**{"train.global_batch_size": 8})
    measure = FakeMeasure(cost, 0)

    with pytest.raises(DoesNotFit) as error:
        choose(recipe, measure=measure, **budget(9_000))

    assert len(measure.tried) == len(set(measure.tried)) == 3
    assert str(error.value) == (
        "the card refuses what should fit: "
        "8 x 1024 tokens with nothing recomputed: CUDA out of memory; "
        "4 x 1024 tokens with nothing recomputed: CUDA out of memory; "
        "4 x 1024 tokens with all 10 blocks recomputed: CUDA out of memory. "
        "Other programs may have taken its memory meanwhile: see nvidia-smi, or set fit.vram to "
        "less than it has"
    )


def test_no_shape_is_tried_twice(make_recipe: MakeRecipe) -> None:
    """Where nothing has the head-room, shapes are gone through once more without it."""
    recipe = make_recipe(**{"train.global_batch_size": 1})
    measure = FakeMeasure(cost, 0)

    with pytest.raises(DoesNotFit, match="refuses what should fit"):
        choose(recipe, measure=measure, **budget(2_000))

    tried = [taken(shape) for shape in measure.tried]
    assert tried == ["(1, False)", "(1, True)", "(1, 'offload')"]


@pytest.mark.parametrize(
    ("measured", "reason"),
    [
        ({"reserved_bytes": 9_001 * MIB}, "more was reserved than the card has"),
        ({"driver_bytes": 100 * MIB}, "less of the card is in use than was reserved"),
        ({"fits": False, "error": None}, "out of memory"),
        ({"fits": False, "error": "not done after 900 s"}, "not done after 900 s"),
    ],
)
def test_a_measurement_that_is_no_proof_is_a_refusal(
    make_recipe: MakeRecipe, measured: dict[str, Any], reason: str
) -> None:
    def measure(recipe: Recipe, shape: BatchShape) -> Measurement:
        size = cost(shape)
        return measurement(size, **(measured if shape.micro_batch_size == 8 else {}))

    recipe = make_recipe(**{"train.global_batch_size": 8, "fit.gradient_checkpointing": False})
    found = choose(recipe, measure=measure, **budget(9_000))
    assert taken(found) == "(4, False)"

    pinned = make_recipe(
        **{
            "train.global_batch_size": 8,
            "fit.gradient_checkpointing": False,
            "fit.micro_batch_size": 8,
        }
    )
    with pytest.raises(DoesNotFit, match=f"8 x 1024 tokens with nothing recomputed: {reason}"):
        choose(pinned, measure=measure, **budget(9_000))


def test_a_shape_that_spills_is_found_by_its_speed(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Windows each shape is compared with half of its rows."""
    monkeypatch.setattr("lowvram.measurement.sys.platform", "win32")
    speeds = {8: 300.0, 4: 1000.0, 2: 1100.0}

    def measure(recipe: Recipe, shape: BatchShape) -> Measurement:
        return measurement(cost(shape), tokens_per_second=speeds[shape.micro_batch_size])

    recipe = make_recipe(**{"train.global_batch_size": 8})

    assert taken(choose(recipe, measure=measure, **budget(9_000))) == "(4, False)"


# --- what cannot fit ------------------------------------------------------------------------------


def test_a_refusal_says_what_is_missing(make_recipe: MakeRecipe) -> None:
    """Starting from the shape that takes least, and naming what would be enough."""

    def smaller_in_lora(recipe: Recipe, shape: BatchShape) -> Any:
        full = recipe.method.name == "full"
        return FakePredict(lambda shape: (3 if full else 1) * cost(shape), 1_000 * MIB)(
            recipe, shape
        )

    recipe = make_recipe(**{"method.name": "full"})

    with pytest.raises(DoesNotFit) as error:
        choose(recipe, predict=smaller_in_lora)

    assert error.value.exit_code == 7
    assert str(error.value) == (
        "1 x 1024 tokens with all 10 blocks recomputed, their inputs in host memory take 2.20 GiB, "
        "and the card has 0.98 GiB for them (predicted). Each of these would fit: method.name=lora "
        "(0.73 GiB, trains a small part of the weights)"
    )


def test_a_refusal_where_no_single_change_is_enough(make_recipe: MakeRecipe) -> None:
    def predict(recipe: Recipe, shape: BatchShape) -> Any:
        size = 4_000 * MIB - (500 * MIB if shape.seq_len < 1024 else 0)
        return FakePredict(lambda _: size, 1_000 * MIB)(recipe, shape)

    with pytest.raises(DoesNotFit) as error:
        choose(make_recipe(), predict=predict)

    assert str(error.value).endswith(
        "(predicted). No single change is enough; the largest are fit.max_seq_len=512 (3.42 GiB, "
        "longer documents become several rows). Else: a smaller model, or a larger card"
    )


def test_each_change_that_a_refusal_names_does_fit(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Simulated: 3 million weights with fp32 moments, on a card with 116 MiB."""
    model = save_without_weights(tmp_path / "model")
    settings = {
        "model.name": str(model),
        "method.name": "full",
        "train.optimizer": "adamw",
        "train.global_batch_size": 6,
        "fit.micro_batch_size": 6,
        "fit.gradient_checkpointing": True,
    }
    recipe = make_recipe(**settings)
    with predictor(card_of_size(116 * MIB)) as predict:
        tiny: dict[str, Any] = {"context_length": 256, "predict": predict}
        with pytest.raises(DoesNotFit) as error:
            choose(recipe, **tiny)
        [named] = re.findall(r"Each of these would fit: (.*)", str(error.value))
        changes = re.findall(r"(\S+=\S+(?:, \S+=\S+)?) \(([\d.]+ [MG]iB), ", named)

        assert str(error.value).startswith("6 x 256 tokens with all 4 blocks recomputed take ")
        assert len(changes) >= 3
        for change, size in changes:
            changed = with_overrides(recipe, dict(map(parse_set, change.split(", "))))
            found = choose(changed, **tiny)
            assert found.reason.startswith(f"predicted peak {size} of ")
            assert found.budget_bytes == 116 * MIB


def test_simulated_as_few_blocks_as_fit(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """The number chosen fits and one block less does not, asked anew."""
    model = save_without_weights(tmp_path / "model", n_layer=8)
    recipe = make_recipe(
        **{
            "model.name": str(model),
            "model.dtype": "fp32",
            "train.precision": "fp32",
            "train.global_batch_size": 16,
            "fit.micro_batch_size": 16,
        }
    )
    shape = BatchShape(micro_batch_size=16, seq_len=256, gradient_checkpointing=False)
    large = card_of_size(4 * GIB)
    sizes = [
        predict(large, recipe, replace(shape, gradient_checkpointing=kind)).reserved_bytes
        for kind in (False, True)
    ]
    card = card_of_size(sum(sizes) // 2)

    with predictor(card) as predicting:
        found = choose(recipe, context_length=256, predict=predicting)

    blocks = found.gradient_checkpointing
    assert isinstance(blocks, int)
    assert 2 <= blocks <= 6
    chosen = replace(shape, gradient_checkpointing=blocks)
    assert predict(card, recipe, chosen).fits
    assert not predict(card, recipe, replace(chosen, gradient_checkpointing=blocks - 1)).fits
    assert found.predicted_reserved_bytes == predict(large, recipe, chosen).reserved_bytes


@pytest.fixture
def recipe_file(gpt2_dir: Path, text_file: Path, tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(
        f"model: {{name: {gpt2_dir}}}\n"
        f"data: {{source: {text_file}}}\n"
        "train: {global_batch_size: 1, max_steps: 2}\n"
        f"output_dir: {tmp_path / 'run'}\n"
    )
    return path


def test_a_run_that_cannot_fit_is_refused_before_weights_are_loaded(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With exit code 7; nothing is measured on the card and nothing is written."""
    put_card(monkeypatch, card_of_size(30 * MIB))
    forbid(monkeypatch, "lowvram.plan", "measure")
    forbid(monkeypatch, "lowvram.build", "load_model")
    forbid(monkeypatch, "lowvram.job", "build")

    result = CliRunner().invoke(main, ["run", str(recipe_file)])

    assert result.exit_code == 7
    assert re.search(
        r"^error: 1 x 64 tokens with all 2 blocks recomputed, their inputs in host memory take "
        r"46\.0 MiB, and the card has 30\.0 MiB for them \(predicted\)\. ",
        result.stderr,
        re.MULTILINE,
    )
    assert not (tmp_path / "run").exists()
