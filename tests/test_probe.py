"""`lowvram probe`: what it answers, prints and writes, for a card that is here or elsewhere."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fakes import (
    MIB,
    Cost,
    FakeMeasure,
    FakePredict,
    forbid,
    measurement,
    patch,
    put_card,
    save_without_weights,
)
from rich.console import Console
from test_cli import error_of, invoke

from lowvram.build import choose_numerics
from lowvram.display import Display
from lowvram.measurement import Measure
from lowvram.memory import Card, card_of_size, find_card
from lowvram.plan import Plan, plan
from lowvram.prediction import Predict, predict, with_budget
from lowvram.prices import time_of
from lowvram.probe import ask, epoch_seconds, probe
from lowvram.recipe import Recipe, load_recipe
from lowvram.rehearsal import BatchShape
from lowvram.run import run

MakeRecipe = Callable[..., Recipe]
GIB = 2**30
CARD = find_card("rtx-4070-ti")

FIGURES = {
    "seq_len",
    "gradient_checkpointing",
    "micro_batch_size",
    "predicted_reserved_bytes",
    "predicted_allocated_bytes",
    "headroom_bytes",
}


def cost(shape: BatchShape) -> int:
    """600 MiB, and for each token 1 MiB or, with checkpointing, 0.25 MiB."""
    a_token = 0.25 if shape.gradient_checkpointing else 1
    return int((600 + a_token * shape.micro_batch_size * shape.seq_len) * MIB)


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> Callable[[Cost], None]:
    """simulated(cost): from now on, predictions come from the formula."""

    def put(cost: Cost) -> None:
        @contextmanager
        def predicting(card: Card) -> Iterator[Predict]:
            yield FakePredict(cost, card.budget())

        patch(monkeypatch, "lowvram.probe", predictor=predicting)

    return put


@pytest.fixture
def recipe_file(gpt2_dir: Path, text_file: Path, tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(
        f"model: {{name: {gpt2_dir}}}\n"
        f"data: {{source: {text_file}}}\n"
        "train: {global_batch_size: 8, max_steps: 2}\n"
        f"output_dir: {tmp_path / 'run'}\n"
    )
    return path


def answer(*arguments: Any) -> dict[str, Any]:
    """The JSON that is printed, and nothing else is."""
    result = invoke("probe", *arguments, "--json")
    assert result.stderr == ""
    found: dict[str, Any] = json.loads(result.stdout)
    return found


# --- the whole way, simulated ---------------------------------------------------------------------


def test_the_frontier_of_a_tiny_model(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More rows than 8 would fit, but are not searched for here."""
    patch(monkeypatch, "lowvram.frontier", MOST_ROWS=8)
    found = answer(recipe_file, "--vram", "48MiB", "--save-recipe", tmp_path / "saved.yaml")

    assert found.keys() == {"card", "budget_bytes", "context_length", "frontier", "chosen"}
    assert found["context_length"] == 64
    assert found["card"] == "0.04688 GiB"
    assert found["budget_bytes"] == 48 * MIB
    assert [row.keys() for row in found["frontier"]] == [FIGURES, FIGURES]
    assert [(row["seq_len"], row["gradient_checkpointing"]) for row in found["frontier"]] == [
        (64, False),
        (64, True),
    ]
    for row in found["frontier"]:
        assert row["predicted_allocated_bytes"] <= row["predicted_reserved_bytes"] <= 48 * MIB
        assert row["headroom_bytes"] == 48 * MIB - row["predicted_reserved_bytes"]
        assert row["micro_batch_size"] == 8
    chosen = found["chosen"]
    assert chosen.keys() == FIGURES | {"gradient_accumulation_steps", "measured", "reason"}
    assert (chosen["seq_len"], chosen["micro_batch_size"]) == (64, 8)
    assert chosen["gradient_accumulation_steps"] == 1
    assert chosen["gradient_checkpointing"] is False
    assert chosen["measured"] is None
    saved, original = load_recipe(tmp_path / "saved.yaml"), load_recipe(recipe_file)
    assert saved.fit.micro_batch_size == 8
    assert saved.fit.max_seq_len == 64
    assert saved.fit.gradient_checkpointing is False
    assert saved.model_dump(exclude={"fit"}) == original.model_dump(exclude={"fit"})


def test_one_shape_of_a_tiny_model(recipe_file: Path) -> None:
    found = answer(recipe_file, "--vram", "64MiB", "--seq-len", 32, "--micro-batch-size", 3)

    assert found.keys() == FIGURES | {
        "card",
        "budget_bytes",
        "fits",
        "categories",
        "levers",
        "measured",
        "refused",
    }
    assert found["fits"] is True
    assert (found["micro_batch_size"], found["seq_len"]) == (3, 32)
    assert found["headroom_bytes"] == 64 * MIB - found["predicted_reserved_bytes"]
    # As asked for; the allocator rounds each block up to 512 bytes.
    assert 0.99 < sum(found["categories"].values()) / found["predicted_allocated_bytes"] <= 1
    assert found["measured"] is None
    assert found["refused"] is None


def test_openais_models_need_no_hub_and_no_weights() -> None:
    """The tests are offline."""
    found = predict(
        CARD,
        load_recipe("gpt2-lora"),
        BatchShape(micro_batch_size=1, seq_len=256, gradient_checkpointing=False),
    )

    assert found.fits
    assert 0.4 * GIB < found.reserved_bytes < GIB
    assert found.categories["base weights"] == pytest.approx(2 * 124_439_808, rel=1e-4)


# --- what is printed, of a formula ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2-lora", "gpt2-full", "gpt2-xl-nf4-lora"])
def test_shipped_recipes_are_probed_up_to_the_models_limit(
    name: str, simulated: Callable[[Cost], None]
) -> None:
    simulated(cost)

    found = answer(name, "--gpu", "rtx-4070-ti")

    assert found["card"] == "RTX 4070 Ti"
    assert found["budget_bytes"] == CARD.budget()
    assert [
        (row["seq_len"], row["gradient_checkpointing"], row["micro_batch_size"])
        for row in found["frontier"]
    ] == [
        (256, False, 43),
        (256, True, 173),
        (512, False, 21),
        (512, True, 86),
        (1024, False, 10),
        (1024, True, 43),
    ]


def test_the_frontier_as_a_table(simulated: Callable[[Cost], None]) -> None:
    simulated(cost)

    result = invoke("probe", "gpt2-lora", "--vram", "4GiB")

    text = result.stdout
    assert text.startswith("4 GiB: 4.00 GiB for the allocator, simulated\n")
    rows = [
        re.findall(r"[^│\s](?:[^│]*[^│\s])?", line) for line in text.splitlines() if "│" in line
    ]
    assert rows[0] == ["256", "off", "13", "3.84 GiB", "0.16 GiB"]
    assert rows[-1] == ["1024", "on", "13", "3.84 GiB", "0.16 GiB"]
    assert len(rows) == 6
    assert (
        "recommended: 8 x 4 rows of 1024 tokens, 1 of 12 blocks recomputed (predicted peak "
        "1.59 GiB of 4.00 GiB): as many rows as fit or keep a card busy, of those that divide the "
        "32 of a step; the cheapest recomputation that fits, "
        f"{time_of(1, 12, 'lora'):.2f} x the time of none\n"
    ) in text
    assert "measured" not in text
    assert "longer rows" not in text
    assert result.stderr == ""


def test_the_frontier_of_a_long_context_ends_early(
    simulated: Callable[[Cost], None], tmp_path: Path
) -> None:
    simulated(cost)
    model = save_without_weights(tmp_path / "model", n_positions=65_536)

    result = invoke("probe", "gpt2-lora", "--vram", "4GiB", "--set", f"model.name={model}")

    assert len(re.findall("│ +(?:off|on) +│", result.stdout)) == 2 * 5
    assert "longer rows, of up to 65,536 tokens: ask with --seq-len\n" in result.stdout


def test_where_nothing_fits_the_table_and_the_reason_say_so(
    simulated: Callable[[Cost], None], tmp_path: Path
) -> None:
    simulated(cost)

    found = answer("gpt2-lora", "--vram", "640MiB")

    assert [row["micro_batch_size"] for row in found["frontier"]] == [0] * 6
    assert found["frontier"][0]["headroom_bytes"] == (640 - 600 - 256) * MIB
    assert found["chosen"] is None
    text = invoke("probe", "gpt2-lora", "--vram", "640MiB").stdout
    assert text.count("does not fit") == 6
    assert (
        "no shape for this recipe: 1 x 1024 tokens with all 12 blocks recomputed, their inputs in "
        "host memory take"
    ) in text
    arguments = ["--vram", "640MiB", "--save-recipe", tmp_path / "saved.yaml"]
    message = error_of("probe", "gpt2-lora", *arguments, code=2)
    assert message.startswith("--save-recipe: nothing to save: 1 x 1024 tokens ")
    assert not (tmp_path / "saved.yaml").exists()


def test_one_shape_as_text(simulated: Callable[[Cost], None]) -> None:
    simulated(cost)
    shape = ["--seq-len", 512, "--micro-batch-size", 16]

    fits = invoke("probe", "gpt2-lora", "--vram", "12GiB", *shape).stdout
    not_so = invoke("probe", "gpt2-lora", "--vram", "2GiB", *shape).stdout

    assert fits.startswith(
        "16 x 512 tokens, nothing recomputed, on 12 GiB: fits. Predicted peak 8.59 GiB of "
        "12.00 GiB, 3.41 GiB to spare\n"
    )
    assert not_so.startswith(
        "16 x 512 tokens, all 12 blocks recomputed, their inputs in host memory, on 2 GiB: does "
        "not fit. Predicted peak "
        "2.59 GiB of 2.00 GiB, 0.59 GiB too much\n"
    )
    less = answer("gpt2-lora", "--vram", "2GiB", *shape)
    assert less["fits"] is False
    assert less["headroom_bytes"] == (2048 - 600 - 2048) * MIB
    assert less["gradient_checkpointing"] == "offload"
    other = answer("gpt2-lora", "--vram", "8GiB", *shape)
    assert other["fits"] is True
    assert repr(other["gradient_checkpointing"]) == "1"  # one block, as a run would take; not true
    for change in ("fit.gradient_checkpointing=true", "fit.max_seq_len=256", "micro_batch_size=8"):
        assert change in fits
    assert "4.00 GiB │ fit.micro_batch_size=8" in fits
    assert "live at the peak" in fits


def test_what_is_not_asked_for_is_the_recipes(
    simulated: Callable[[Cost], None], make_recipe: MakeRecipe
) -> None:
    simulated(cost)
    recipe = make_recipe(**{"train.global_batch_size": 12, "fit.max_seq_len": 48})

    def asked(recipe: Recipe, **changes: Any) -> BatchShape:
        options: dict[str, Any] = {"seq_len": None, "micro_batch_size": None}
        return ask(recipe, CARD, **(options | changes)).prediction.shape

    assert asked(recipe, seq_len=32) == BatchShape(
        micro_batch_size=12, seq_len=32, gradient_checkpointing=False
    )
    assert asked(recipe, micro_batch_size=5) == BatchShape(
        micro_batch_size=5, seq_len=48, gradient_checkpointing=False
    )
    pinned = make_recipe(**{"fit.micro_batch_size": 2, "fit.gradient_checkpointing": True})
    assert asked(pinned, seq_len=16) == BatchShape(
        micro_batch_size=2, seq_len=16, gradient_checkpointing=True
    )


def test_fit_vram_limits_a_probe_too(
    simulated: Callable[[Cost], None], make_recipe: MakeRecipe
) -> None:
    simulated(cost)
    recipe = make_recipe(**{"fit.vram": "2GiB"})

    assert probe(recipe, CARD).to_json()["budget_bytes"] == 2 * GIB
    assert ask(recipe, CARD, seq_len=64, micro_batch_size=1).to_json()["budget_bytes"] == 2 * GIB


def test_what_else_is_on_a_card_depends_on_the_system(simulated: Callable[[Cost], None]) -> None:
    simulated(cost)
    budgets = [
        answer("gpt2-lora", "--gpu", "rtx-4070-ti", "--system", system)["budget_bytes"]
        for system in ("headless", "desktop", "windows")
    ]

    assert budgets[0] == answer("gpt2-lora", "--gpu", "rtx-4070-ti")["budget_bytes"]
    assert budgets == sorted(set(budgets), reverse=True)


@pytest.mark.parametrize("suffix", [".png", ".html"])
def test_frontier_and_shape_are_drawn(
    simulated: Callable[[Cost], None], recipe_file: Path, tmp_path: Path, suffix: str
) -> None:
    simulated(cost)
    whole, one = tmp_path / f"whole{suffix}", tmp_path / f"one{suffix}"

    found = invoke("probe", recipe_file, "--vram", "4GiB", "--plot", whole)
    shape = ["--seq-len", 64, "--micro-batch-size", 2]
    alone = invoke("probe", recipe_file, "--vram", "4GiB", *shape, "--plot", one)

    assert found.stdout.splitlines()[-1] == f"wrote {whole}"
    assert alone.stdout.splitlines()[-1] == f"wrote {one}"
    for path in (whole, one):
        begins = b"\x89PNG" if suffix == ".png" else b"<!"
        assert path.read_bytes()[: len(begins)] == begins


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            [],
            6,
            "probe: there is no card in this machine; name one with --gpu rtx-4070-ti, or give its "
            "memory with --vram 12GiB",
        ),
        (
            ["--gpu", "rtx-4070-ti", "--vram", "12GiB"],
            6,
            "--gpu and --vram: give one of them; a card has its own memory",
        ),
        (["--gpu", "rtx-4070-it"], 6, "unknown card 'rtx-4070-it'. Did you mean rtx-4070-ti"),
        (["--vram", "many"], 2, "--vram: found 'many'; write a size such as 12GiB"),
        (
            ["--vram", "1GiB", "--seq-len", "2048"],
            2,
            "--seq-len: found 2048, the model allows 2 to 1024",
        ),
        (
            ["--vram", "1GiB", "--seq-len", "64", "--save-recipe", "x.yaml"],
            2,
            "--save-recipe: saves what the whole probe recommends; leave out a shape",
        ),
        (
            ["--vram", "1GiB", "--set", "fit.max_seq_len=2048"],
            2,
            "fit.max_seq_len: found 2048, the model has 1024 positions; allowed 2 to 1024",
        ),
        (
            ["--gpu", "gtx-1660", "--set", "train.precision=bf16", "--seq-len", "64"],
            6,
            "train.precision: found bf16, but this card (compute capability 7.5) only emulates it",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_questions_that_cannot_be(
    arguments: list[str], code: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid(monkeypatch, "lowvram.prediction", "simulate")

    found = error_of("probe", "gpt2-lora", *arguments, code=code)

    assert found.startswith(message)


@pytest.mark.parametrize("option", [["--seq-len", "1"], ["--micro-batch-size", "0"]])
def test_numbers_that_cannot_be(option: list[str]) -> None:
    assert "Invalid value" in invoke("probe", "gpt2-lora", *option, code=2).stderr


def test_files_that_cannot_be_written(simulated: Callable[[Cost], None], tmp_path: Path) -> None:
    simulated(cost)
    path = tmp_path / "no" / "such.yaml"

    message = error_of("probe", "gpt2-lora", "--vram", "4GiB", "--save-recipe", path, code=2)

    assert message == (
        f"--save-recipe {path}: cannot be written: No such file or directory; name a file in a "
        "directory that exists"
    )
    plot = tmp_path / "no" / "such.png"
    message = error_of("probe", "gpt2-lora", "--vram", "4GiB", "--plot", plot, code=2)
    assert message.startswith(f"{plot}: there is no directory")


# --- on a card ------------------------------------------------------------------------------------


@pytest.fixture
def on_card(
    simulated: Callable[[Cost], None], monkeypatch: pytest.MonkeyPatch
) -> Callable[[Measure], None]:
    """on_card(measure): a card with 4 GiB free is here, and real steps are measured so."""

    def put(measure: Measure) -> None:
        simulated(cost)
        patch(
            monkeypatch,
            "lowvram.probe_report",
            card_here=lambda: with_budget(CARD, 4 * GIB),
            measure=measure,
        )

    return put


def test_the_recommended_shape_is_confirmed_on_the_card(
    on_card: Callable[[Measure], None], recipe_file: Path
) -> None:
    measure = FakeMeasure(cost, 4 * GIB)
    on_card(measure)

    text = invoke("probe", recipe_file).stdout
    found = answer(recipe_file)

    assert len(measure.tried) == 1  # the second probe remembers
    assert (
        "8 rows of 64 tokens, nothing recomputed (predicted peak 1.09 GiB of 4.00 GiB, measured "
        "1.09 GiB)"
    ) in text
    assert (
        "measured: 1.09 GiB reserved, 1.08 GiB allocated, 1.09 GiB by the driver's account; "
        "1,000 tokens/s\n"
    ) in text
    # The file's 40 lines have some 2,500 tokens, of which a tenth is held out.
    assert re.search(r"^an epoch of its data takes about 0:0\d$", text, re.MULTILINE)
    assert found["card"] == "RTX 4070 Ti"
    assert found["chosen"]["predicted_reserved_bytes"] == (600 + 8 * 64) * MIB
    assert found["chosen"]["measured"] == {
        "fits": True,
        "error": None,
        "reserved_bytes": (600 + 8 * 64) * MIB,
        "allocated_bytes": (600 + 8 * 64 - 1) * MIB,
        "driver_bytes": (600 + 8 * 64 + 1) * MIB,
        "seconds_per_step": 0.5,
        "tokens_per_second": 1000.0,
    }
    assert answer(recipe_file) == found


def test_a_shape_that_the_card_refuses_leads_to_the_next(
    on_card: Callable[[Measure], None], recipe_file: Path
) -> None:
    measure = FakeMeasure(cost, (600 + 4 * 64) * MIB)
    on_card(measure)

    chosen = answer(recipe_file)["chosen"]

    assert [shape.gradient_checkpointing for shape in measure.tried] == [False, True]
    assert chosen["gradient_checkpointing"] is True
    assert chosen["micro_batch_size"] == 8


def test_a_card_that_refuses_everything_has_no_shape(
    on_card: Callable[[Measure], None], recipe_file: Path
) -> None:
    on_card(FakeMeasure(cost, 0))

    found = answer(recipe_file)

    assert found["chosen"] is None
    assert len(found["frontier"]) == 2
    text = invoke("probe", recipe_file).stdout
    assert "no shape for this recipe: the card refuses what should fit: 8 x 64 tokens" in text


def test_one_shape_is_tried_on_the_card(
    on_card: Callable[[Measure], None], recipe_file: Path
) -> None:
    shape = ["--seq-len", 64, "--micro-batch-size", 8]
    on_card(FakeMeasure(cost, 4 * GIB))

    fits = answer(recipe_file, *shape)
    assert fits["fits"] is True
    assert fits["measured"]["tokens_per_second"] == 1000.0
    assert "1,000 tokens/s" in invoke("probe", recipe_file, *shape).stdout

    on_card(FakeMeasure(cost, GIB))
    refused = answer(recipe_file, *shape)
    assert refused["fits"] is False
    assert refused["refused"] == "CUDA out of memory"
    text = invoke("probe", recipe_file, *shape).stdout
    assert "on RTX 4070 Ti: does not fit." in text
    assert "refused on the card: CUDA out of memory" in text


def test_what_is_predicted_not_to_fit_is_not_tried(
    on_card: Callable[[Measure], None], recipe_file: Path
) -> None:
    measure = FakeMeasure(cost, GIB)
    on_card(measure)

    assert answer(recipe_file, "--micro-batch-size", 4096)["measured"] is None
    assert measure.tried == []


def test_one_shape_that_spills_is_refused(
    on_card: Callable[[Measure], None], recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Windows its speed is compared with that of half its rows."""
    monkeypatch.setattr("lowvram.measurement.sys.platform", "win32")
    on_card(
        lambda recipe, shape: measurement(
            cost(shape), tokens_per_second=300.0 if shape.micro_batch_size == 8 else 1000.0
        )
    )

    found = answer(recipe_file, "--micro-batch-size", 8)

    assert found["fits"] is False
    assert found["refused"] == "more than 3 times slower per token than half as many rows"


def test_a_named_card_is_not_measured_even_where_one_is(
    on_card: Callable[[Measure], None], recipe_file: Path
) -> None:
    measure = FakeMeasure(cost, 4 * GIB)
    on_card(measure)

    assert answer(recipe_file, "--vram", "2GiB")["chosen"]["measured"] is None
    assert answer(recipe_file, "--gpu", "rtx-3060")["card"] == "RTX 3060 12GB"
    assert measure.tried == []


def test_how_long_an_epoch_takes(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("The quick brown fox\n" * 3)
    recipe = make_recipe(
        **{"data.source": str(tmp_path / "one.txt"), "data.validation_fraction": 0.0}
    )
    tokens = epoch_seconds(recipe, measurement(GIB, tokens_per_second=1.0))

    assert tokens is not None
    assert 10 < tokens < 100
    fast = epoch_seconds(recipe, measurement(GIB, tokens_per_second=10.0))
    assert fast == pytest.approx(tokens / 10)
    assert epoch_seconds(recipe, measurement(GIB, tokens_per_second=0.0)) is None
    absent = make_recipe(**{"data.source": str(tmp_path / "no.txt")})
    assert epoch_seconds(absent, measurement(GIB)) is None


# --- run ------------------------------------------------------------------------------------------


def test_a_dry_run_plans_for_a_card_that_is_elsewhere(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid(monkeypatch, "lowvram.plan", "measure")
    forbid(monkeypatch, "lowvram.build", "load_model")

    result = invoke("run", recipe_file, "--dry-run", "--gpu", "rtx-4070-ti")

    plan = " ".join(result.stdout.split())
    assert "device RTX 4070 Ti (simulated), bf16" in plan
    assert re.search(
        r"8 rows of up to 64 tokens = 1 x 8, nothing recomputed "
        r"\(predicted peak 46\.0 MiB of 11\.44 GiB\)",
        plan,
    )
    assert not (tmp_path / "run").exists()
    turing = invoke("run", recipe_file, "--dry-run", "--gpu", "RTX 2060").stdout
    assert "device RTX 2060 6GB (simulated), fp16" in " ".join(turing.split())


def test_a_run_takes_the_card_that_is_here(recipe_file: Path) -> None:
    assert error_of("run", recipe_file, "--gpu", "rtx-4070-ti", code=6) == (
        "--gpu: a run takes the card that is here; add --dry-run to plan for one"
    )
    message = error_of("run", recipe_file, "--dry-run", "--gpu", "rtx-4070-it", code=6)
    assert message.startswith("unknown card 'rtx-4070-it'. Did you mean rtx-4070-ti")


def test_a_run_on_a_card_reports_predicted_beside_measured(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan is for a card of 12 GiB, the steps are taken on the CPU."""

    def planning(recipe: Recipe, progress: Any = None) -> Plan:
        planned = plan(recipe, progress, elsewhere=card_of_size(12 * GIB))
        return dataclasses.replace(planned, numerics=choose_numerics(recipe))

    patch(monkeypatch, "lowvram.run", plan=planning)
    lines = Console(file=io.StringIO(), width=200)

    result = run(make_recipe(), display=Display(lines))

    found = json.loads((Path(result.output_dir) / "result.json").read_text())
    assert found["memory"] == {
        "predicted_peak_bytes": 46 * MIB,
        "measured_peak_bytes": result.memory["measured_peak_bytes"],
    }
    assert found["fit"]["predicted_reserved_bytes"] == 46 * MIB
    assert found["fit"]["budget_bytes"] == 12 * GIB
    assert found["fit"]["reason"] == "predicted peak 46.0 MiB of 12.00 GiB"
    text = lines.file.getvalue()  # type: ignore[attr-defined]
    assert re.search(r"peak memory +\S+ [\d.]+ [GM]iB \(predicted 46\.0 MiB\)", text)
    assert "4 rows of up to 64 tokens = 1 x 4, nothing recomputed (predicted peak 46.0 MiB" in text
    pinned = load_recipe(Path(result.output_dir) / "recipe.yaml").fit
    assert (pinned.micro_batch_size, pinned.max_seq_len) == (4, 64)


def test_a_run_uses_no_more_than_fit_vram(make_recipe: MakeRecipe) -> None:
    planned = plan(make_recipe(**{"fit.vram": "100MiB"}), elsewhere=card_of_size(GIB))

    assert planned.fit.budget_bytes == 100 * MIB


def test_a_run_measures_its_shape_once_and_remembers_it(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan is made twice; what other programs have taken meanwhile makes another question."""
    measure = FakeMeasure(lambda shape: 46 * MIB, GIB)
    patch(monkeypatch, "lowvram.plan", measure=measure)
    recipe = make_recipe()

    put_card(monkeypatch, card_of_size(GIB))
    plans = [plan(recipe) for _ in range(2)]
    assert len(measure.tried) == 1
    assert plans[0].fit == plans[1].fit
    assert plans[0].fit.measurement == measurement(46 * MIB)
    assert dict(plans[1].describe())["steps"].endswith(" s as measured)")

    put_card(monkeypatch, card_of_size(GIB // 2))
    plan(recipe)
    assert len(measure.tried) == 2
