"""The benchmarks of capacity and of the card: they compare like with like, and say what they found.

The peer here is transformers' Trainer, which needs nothing that the tests do not have.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lowvram.build import build_model, choose_numerics
from lowvram.memory import find_card
from lowvram.memory.measure import GIB
from lowvram.prediction import Prediction, predictor
from lowvram.rehearsal import BatchShape

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def load(name: str) -> Any:
    """A script as a module, by the name that the other scripts import; none is in a package."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


for needed in ("accuracy_rows", "memory_accuracy", "contestants", "arena"):
    load(needed)
peers = load("peers")
capacity = load("capacity")
gpu = load("gpu")

DEPRECATED = "ignore:.*gradient_checkpointing.*:FutureWarning"  # peft has the older spelling
CARD = find_card("rtx-4070-ti")
TINY = {"model_type": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 64, "vocab_size": 97}
TINY |= {"bos_token_id": 96, "eos_token_id": 96}


def setup(**changes: Any) -> Any:
    settings = {"tool": "trainer", "config": TINY, "rows": 2, "tokens": 32, "checkpointing": False}
    return peers.Setup(**(settings | changes))


@pytest.fixture(scope="module")
def simulated() -> Iterator[Any]:
    with peers.Peer(Path(sys.executable), peers.SIMULATED) as peer:
        yield peer


# --- peers ----------------------------------------------------------------------------------------


def test_the_trainer_is_simulated(simulated: Any) -> None:
    """More rows, fp32 weights and no recomputation take more; what is too much does not fit."""
    width = {"config": TINY | {"n_embd": 256, "vocab_size": 4096}, "rows": 8, "tokens": 256}
    plain = simulated.ask(setup(**width), CARD)
    rows = simulated.ask(setup(**(width | {"rows": 16})), CARD)
    recomputed = simulated.ask(setup(**width, checkpointing=True), CARD)
    half = simulated.ask(setup(**width, base="bf16"), CARD)
    card = dataclasses.replace(CARD, held_bytes=CARD.total_bytes - CARD.context_bytes - 2**26)
    small = simulated.ask(setup(**width), card)

    assert plain.fits
    logits = 8 * 256 * 4096 * 4
    assert 3 * logits < plain.allocated_bytes <= plain.reserved_bytes < 12 * logits
    assert rows.allocated_bytes > 1.5 * plain.allocated_bytes
    assert recomputed.allocated_bytes < plain.allocated_bytes
    assert half.allocated_bytes < plain.allocated_bytes
    assert not small.fits
    assert small.reserved_bytes == plain.reserved_bytes


def test_a_question_without_an_answer_says_why(simulated: Any) -> None:
    with pytest.raises(peers.Failed, match="ValueError: Unrecognized model identifier: nothing"):
        simulated.ask(setup(config={"model_type": "nothing"}), CARD)

    assert simulated.ask(setup(), CARD).fits  # and the process goes on


def test_a_process_that_ends_says_what_it_said_last(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho no such library >&2\n")
    python.chmod(0o755)

    with peers.Peer(python, "cpu") as peer, pytest.raises(peers.Failed, match="no such library"):
        peer.ask(setup())


@pytest.fixture
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    for name in ("ACCELERATE_TORCH_DEVICE", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    config = TINY | {"attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1}
    made = setup(config=config, rank=4, targets=("c_attn",))
    return peers.make_trainer(made, str(tmp_path / "out"), 2, "cpu")


@pytest.mark.filterwarnings("ignore:.*pin_memory.*", DEPRECATED)
def test_both_sides_train_the_same(trainer: Any, dropout_gpt2_dir: Path, make_recipe: Any) -> None:
    """The same dropout at the same places, the same layers with an adapter of the same size."""
    recipe = make_recipe(**{"model.name": str(dropout_gpt2_dir), "method.rank": 4})
    ours = build_model(recipe, choose_numerics(recipe, torch.device("cpu")))
    theirs = trainer.model

    assert peers.dropouts(theirs) == peers.dropouts(ours) == [0.1] * (1 + 2 * 3)
    for model in (ours, theirs):
        model.train()
        assert all(m.training for m in model.modules() if isinstance(m, nn.Dropout))
    trained = [
        sorted(
            name.split("base_model.model.")[-1]
            for name, p in m.named_parameters()
            if p.requires_grad
        )
        for m in (ours, theirs)
    ]
    assert trained[0] == trained[1]
    assert len(trained[0]) == 4  # A and B of two layers


@pytest.mark.filterwarnings("ignore:.*pin_memory.*", DEPRECATED)
def test_the_trainer_trains(trainer: Any) -> None:
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}

    assert trainer.train().global_step == 2

    changed = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed
    assert all("lora_" in name for name in changed)


# --- the table ------------------------------------------------------------------------------------


def cell(contestant: Any, rows: int, *, model: str = "gpt2", checkpointing: bool = False) -> Any:
    return capacity.Cell(
        model=model,
        contestant=contestant,
        checkpointing=checkpointing,
        rows=rows,
        reserved_bytes=GIB,
    )


THEIRS = capacity.Contestant(tool="trainer", base="fp32")
OURS = capacity.Contestant(tool="lowvram", base="bf16")


def test_the_search_asks_a_peer_as_it_asks_a_recipe() -> None:
    """A peer that takes 1 GiB, and 1 GiB a row: 10 rows of 11.44 GiB."""
    asked = []

    class Fake:
        def ask(self, setup: Any, card: Any) -> Any:
            asked.append(setup)
            size = (1 + setup.rows) * GIB
            return peers.Found(
                fits=size <= card.budget(), reserved_bytes=size, allocated_bytes=size
            )

    def ours(recipe: Any, shape: BatchShape) -> Prediction:
        raise AssertionError("our side was asked")

    cells = capacity.search(THEIRS, "gpt2-xl", CARD, ours, {"trainer": Fake()})

    assert [(one.rows, one.reserved_bytes) for one in cells] == [(10, 11 * GIB)] * 2
    assert [one.checkpointing for one in cells] == [False, True]
    assert {setup.checkpointing for setup in asked} == {False, True}
    assert {setup.tokens for setup in asked} == {1024}
    assert {(setup.rank, setup.alpha, setup.targets) for setup in asked} == {(8, 16, ("c_attn",))}
    assert asked[0].config["n_layer"] == 48
    assert asked[0].base == "fp32"


def test_the_search_of_our_side_is_in_bf16_with_that_base() -> None:
    seen = set()

    def predict(recipe: Any, shape: BatchShape) -> Prediction:
        seen.add((recipe.train.precision, recipe.model.dtype, recipe.model.name))
        rows = shape.micro_batch_size
        return Prediction(
            shape=shape,
            fits=rows <= 5,
            reserved_bytes=rows,
            allocated_bytes=rows,
            budget_bytes=5,
            categories={},
        )

    cells = capacity.search(OURS, "gpt2", CARD, predict, {})

    assert [one.rows for one in cells] == [5, 5]
    assert seen == {("bf16", "bf16", "gpt2")}


def test_the_table() -> None:
    cells = [
        cell(THEIRS, 7),
        cell(THEIRS, 14, checkpointing=True),
        cell(OURS, 40),
        cell(OURS, 170, checkpointing=True),
        cell(OURS, 0, model="gpt2-xl"),
        cell(OURS, 30, model="gpt2-xl", checkpointing=True),
    ]

    assert capacity.table(cells).splitlines() == [
        "| rows of 1,024 tokens, without / with recomputation | GPT-2 small (124M) | "
        "GPT-2 XL (1.5B) |",
        "|---|--:|--:|",
        "| transformers Trainer + peft, base in fp32 | 7 / 14 |  |",
        "| lowvram, base in bf16 | 40 / 170 | 0 / 30 |",
    ]
    assert capacity.verdict(CARD, cells) == []


def test_what_is_not_reached_is_said() -> None:
    cells = [cell(THEIRS, 7), cell(OURS, 35), cell(OURS, 159, checkpointing=True)]

    assert capacity.verdict(CARD, cells) == [
        "gpt2 without recomputation: 35 rows, asked 36",
        "gpt2 with recomputation: 159 rows, asked 160",
    ]
    assert capacity.verdict(find_card("rtx-3060-12gb"), cells) == []


def test_the_table_of_recipes() -> None:
    one = capacity.Shipped(
        recipe="a", model="m", rows=8, tokens=1024, checkpointing=True, reserved_bytes=5 * GIB
    )
    none = dataclasses.replace(one, recipe="b", problem="it takes 20 GiB")
    found = [
        one,
        dataclasses.replace(one, checkpointing=False),
        dataclasses.replace(one, checkpointing=12),
        dataclasses.replace(one, checkpointing="selective"),
        none,
    ]

    assert [line.split("|")[5:7] for line in capacity.shipped_table(found).splitlines()[2:]] == [
        [" every block ", " 5.00 GiB "],
        [" nothing ", " 5.00 GiB "],
        [" 12 blocks ", " 5.00 GiB "],
        [" selective ", " 5.00 GiB "],
        [" ", " does not fit "],
    ]


def test_a_recipe_that_ships_is_asked_for_what_a_run_would_take() -> None:
    with predictor(CARD) as predict:
        found = capacity.shipped("quickstart", predict)

    assert (found.rows, found.tokens, found.checkpointing) == (16, 256, False)
    assert 0 < found.reserved_bytes < GIB


def test_the_plot_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    cells = [cell(THEIRS, 7), cell(THEIRS, 14, checkpointing=True), cell(OURS, 40)]

    capacity.plot(cells, CARD, tmp_path / "bars.png")

    assert (tmp_path / "bars.png").read_bytes()[:4] == b"\x89PNG"


# --- the card -------------------------------------------------------------------------------------


def line(**changes: Any) -> Any:
    case = gpu.Case(recipe="gpt2-lora", model="gpt2", rows=7)
    settings = {
        "case": case,
        "predicted": peers.Found(fits=True, reserved_bytes=10_000, allocated_bytes=9_000),
        "measured": peers.Found(
            fits=True, reserved_bytes=10_050, allocated_bytes=9_000, tokens_per_second=2_000
        ),
        "flops_per_second": 1e12,
    }
    return gpu.Line(**(settings | changes))


@pytest.mark.parametrize(("method", "factor"), [("lora", 4), ("full", 6)])
def test_the_operations_of_a_token(method: str, factor: int) -> None:
    """GPT-2 small by hand: 124,439,808 parameters, the shared embedding counted once."""
    assert gpu.flops_per_token(gpu.config_of("gpt2"), method) == factor * 124_439_808


def test_a_line_of_the_table() -> None:
    assert gpu.row(line(), 4e12) == (
        "| gpt2-lora, gpt2, 7 x 1024 | lowvram | 2,000 | 25% | 0.0 MiB | 0.0 MiB | -0.50% | "
        "0.0 MiB | 0.0 MiB |"
    )
    assert line().is_right
    assert gpu.heading().count("|") == 2 * gpu.row(line(), 4e12).count("|")


def test_what_fails_is_a_line_as_well() -> None:
    broken = line(problem="out of memory: CUDA out of memory")

    assert "| out of memory: CUDA out of memory |" in gpu.row(broken, 4e12)
    assert gpu.row(broken, 4e12).count("|") == gpu.row(line(), 4e12).count("|")
    assert not broken.is_right
    assert "out of memory" in gpu.summary([broken])[-1]


def test_a_prediction_that_is_off_is_an_error() -> None:
    measured = peers.Found(fits=True, reserved_bytes=9_800, allocated_bytes=9_000)
    off = line(measured=measured)

    assert off.error == pytest.approx(0.0204, abs=1e-4)
    assert not off.is_right
    assert gpu.summary([line(), off])[0].startswith(
        "largest error of what is reserved: 2.04% (lowvram, gpt2-lora, gpt2, 7 x 1024)"
    )
    on_cpu = line(measured=peers.Found(fits=True, tokens_per_second=10.0))
    assert on_cpu.error is None
    assert on_cpu.is_right


def test_every_case_names_a_recipe_that_ships(tmp_path: Path) -> None:
    """And its keys; and a peer gets the model, the method and the rows of it."""
    for case in (*gpu.SPEED, *gpu.EXACTNESS, *gpu.QUICK):
        recipe = gpu.recipe_of(case, tmp_path)
        if case.tool != "lowvram":
            found = gpu.setup_of(case, recipe)
            assert (found.targets == ()) == (recipe.method.name == "full")
            assert found.config["n_layer"] == gpu.config_of(case.model).n_layer
            assert (found.rows, found.tokens) == (case.rows, case.tokens)
            json.dumps(dataclasses.asdict(found))


class FakeBench:
    def __init__(self, *found: Any) -> None:
        self.found = list(found)

    def run(self, case: Any) -> Any:
        return self.found.pop(0)


def test_what_does_not_fit_is_left_out_and_told(capsys: pytest.CaptureFixture[str]) -> None:
    cases = [line().case] * 3

    found = gpu.run_all(FakeBench(line(), None, line(problem="broken")), cases, 1, 1e12)

    assert [one.problem for one in found] == ["", "broken"]
    assert (
        "do not fit, by prediction: lowvram, gpt2-lora, gpt2, 7 x 1024" in capsys.readouterr().out
    )


def test_nothing_is_begun_when_the_time_is_over(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.run_all(FakeBench(), [line().case] * 3, -1, 1e12) == []
    assert "3 configurations are left out: -1 minutes are over" in capsys.readouterr().out


def test_our_side_is_measured_and_predicted(tmp_path: Path) -> None:
    """On the CPU: the tiny case of the quick run, for real."""
    case = next(case for case in gpu.QUICK if case.tool == "lowvram")
    with predictor(CARD) as predict:
        bench = gpu.Bench(
            card=CARD, device="cpu", directory=tmp_path, predict=predict, simulated={}, pythons={}
        )
        found = bench.run(case)

    assert not found.problem
    assert found.measured.fits
    assert found.measured.tokens_per_second > 0
    assert 0 < found.predicted.allocated_bytes <= found.predicted.reserved_bytes
    assert found.flops_per_second > 0
