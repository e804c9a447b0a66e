"""Memory that is short in mid-run: the step is taken again, smaller; what cannot go on says so."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_gpt2, tiny_recipe
from test_measure import FULL, OTHER

from lowvram.checkpoint import list_checkpoints
from lowvram.display import Display
from lowvram.errors import DeviceError, DoesNotFit
from lowvram.perplexity import score
from lowvram.recipe import Recipe, load_recipe
from lowvram.run import run

BUILD, TRAIN, TRAINING, PERPLEXITY, JOB = (
    import_module(f"lowvram.{name}") for name in ("build", "train", "training", "perplexity", "job")
)
QUIET = Display(quiet=True)
ASSERT = RuntimeError("CUDA error: device-side assert triggered\nCUDA kernel errors might be ...")
Make = Callable[..., Recipe]


SETTINGS: dict[str, Any] = {
    "train.global_batch_size": 4,
    "fit.micro_batch_size": 4,
    "train.max_steps": 5,
    "train.eval_every": None,
    "train.save_every": 2,
}
"""Four rows a step at once, no dropout: cut differently, a step differs by rounding only."""


@pytest.fixture
def make(make_recipe: Make) -> Make:
    return lambda **changes: make_recipe(**(SETTINGS | changes))


@pytest.fixture(scope="module")
def undisturbed(
    gpt2_dir: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Recipe:
    """Of a run that nothing happened to."""
    directory = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOWVRAM_CACHE", str(directory / "cache"))
        recipe = tiny_recipe(gpt2_dir, text_file, directory, **SETTINGS)
        run(recipe, display=QUIET)
    return recipe


class Card:
    """Passes `token_loss` on, but fails for more than `rows` rows from forward pass `at` on."""

    def __init__(self, rows: int, at: int, error: BaseException, times: int = 10**9) -> None:
        self.rows, self.at, self.error, self.times = rows, at, error, times
        self.seen: list[int] = []
        self.original = TRAIN.token_loss
        self.held: list[Any] = []

    def token_loss(self, model: Any, input_ids: torch.Tensor, *rest: Any, **options: Any) -> Any:
        self.seen.append(len(input_ids))
        if len(self.seen) >= self.at and len(input_ids) > self.rows and self.times:
            self.times -= 1
            activations = torch.zeros(1000)
            self.held.append(weakref.ref(activations))
            raise type(self.error)(*self.error.args)  # a kept error would keep its frames
        # What an earlier failure held must be gone before anything is tried again.
        assert [reference for reference in self.held if reference() is not None] == []
        return self.original(model, input_ids, *rest, **options)


def put_in(monkeypatch: pytest.MonkeyPatch, card: Card) -> Card:
    monkeypatch.setattr(TRAIN, "token_loss", card.token_loss)
    return card


def lines_of(directory: Path, name: str) -> list[dict[str, Any]]:
    lines = (directory / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def figures_of(recipe: Recipe) -> list[tuple[Any, ...]]:
    keys = ("step", "learning_rate", "tokens", "target_tokens", "skipped")
    lines = lines_of(Path(recipe.output_dir), "metrics.jsonl")
    return [tuple(line[key] for key in keys) for line in lines]


def losses_of(recipe: Recipe) -> list[float]:
    return [line["loss"] for line in lines_of(Path(recipe.output_dir), "metrics.jsonl")]


@pytest.mark.parametrize("error", [FULL[0], FULL[1], MemoryError()], ids=repr)
def test_the_step_is_taken_again_with_half_the_rows(
    error: BaseException, make: Make, undisturbed: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From step 3 on there is room for two rows only: the losses stay what they were."""
    recipe = make()
    card = put_in(monkeypatch, Card(rows=2, at=3, error=error))
    result = run(recipe, display=QUIET)
    assert card.seen == [4, 4, 4, *[2, 2] * 3]
    assert losses_of(recipe) == pytest.approx(losses_of(undisturbed), rel=1e-5)
    assert figures_of(recipe) == figures_of(undisturbed)
    assert (result.fit["micro_batch_size"], result.fit["gradient_accumulation_steps"]) == (2, 2)
    written = load_recipe(str(Path(recipe.output_dir) / "recipe.yaml"))
    assert (written.fit.micro_batch_size, written.train.global_batch_size) == (2, 4)
    (event,) = result.events
    assert {key: event[key] for key in ("event", "step", "micro_batch_size")} == {
        "event": "out of memory",
        "step": 3,
        "micro_batch_size": 4,
    }
    assert event["message"] == (str(error) or "out of memory").splitlines()[0]


@pytest.mark.parametrize("error", [OTHER[0], OTHER[1]], ids=repr)
def test_other_errors_are_not_taken_for_memory(
    error: Exception, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = put_in(monkeypatch, Card(rows=0, at=3, error=error))
    with pytest.raises(type(error)):
        run(make(), display=QUIET)
    assert card.seen == [4, 4, 4]


def test_dropout_goes_on_from_where_it_was(
    make: Make, dropout_gpt2_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure in the second of two micro-batches: the masks of the first are drawn again."""
    settings = {"model.name": str(dropout_gpt2_dir), "fit.micro_batch_size": 2}
    undisturbed = make(output_dir=str(tmp_path / "undisturbed"), **settings)
    run(undisturbed, display=QUIET)
    monkeypatch.setattr(TRAINING, "_smaller", lambda job: job.plan.fit.micro_batch_size)
    card = put_in(monkeypatch, Card(rows=0, at=4, error=FULL[0], times=1))
    recipe = make(**settings)
    run(recipe, display=QUIET)
    assert len(card.seen) == 2 * 5 + 2
    assert losses_of(recipe) == losses_of(undisturbed)


def test_a_loss_scale_goes_on_from_where_it_was(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of memory while gradients are clipped, when they have been unscaled already."""
    monkeypatch.setattr(BUILD, "has_fast_16_bit", lambda dtype: True)
    settings = {"train.precision": "fp16", "model.dtype": "fp32"}
    undisturbed = make(output_dir=str(tmp_path / "undisturbed"), **settings)
    run(undisturbed, display=QUIET)
    monkeypatch.setattr(TRAINING, "_smaller", lambda job: job.plan.fit.micro_batch_size)
    original, calls = torch.nn.utils.get_total_norm, []

    def get_total_norm(gradients: Any) -> torch.Tensor:
        calls.append(len(gradients))
        if len(calls) == 2:
            raise FULL[0]
        return original(gradients)

    monkeypatch.setattr(torch.nn.utils, "get_total_norm", get_total_norm)
    recipe = make(**settings)
    run(recipe, display=QUIET)
    assert len(calls) == 6
    assert losses_of(recipe) == losses_of(undisturbed)


def test_an_update_that_fails_half_way_is_undone(
    make: Make, undisturbed: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights are spoilt then: the run goes back to its last checkpoint, which is step 2."""
    original, calls = TRAIN.take_step, []

    def take_step(optimizer: torch.optim.Optimizer) -> None:
        calls.append(optimizer)
        if len(calls) == 4:
            with torch.no_grad():
                optimizer.param_groups[0]["params"][0].add_(100.0)
            raise FULL[0]
        original(optimizer)

    monkeypatch.setattr(TRAIN, "take_step", take_step)
    recipe = make()
    result = run(recipe, display=QUIET)
    assert len(calls) == 3 + 1 + 3
    assert figures_of(recipe) == figures_of(undisturbed)
    assert losses_of(recipe) == pytest.approx(losses_of(undisturbed), rel=1e-5)
    assert result.fit["micro_batch_size"] == 2


def test_after_several_failures_it_is_saved_and_stops(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make()
    directory = Path(recipe.output_dir)
    card = put_in(monkeypatch, Card(rows=0, at=4, error=FULL[0]))
    with pytest.raises(DoesNotFit) as error:
        run(recipe, display=QUIET)
    assert card.seen == [4, 4, 4, 4, 2, 1, 1, 1]
    text = str(error.value)
    assert text.startswith(
        "out of memory in step 4: 1 sequences of 64 tokens do not fit. The state"
    )
    assert f"of step 3 is saved in {directory / 'checkpoints'}; --resume goes on from there" in text
    for lever in ("fit.gradient_checkpointing: true", "fit.max_seq_len below 64", "nf4"):
        assert lever in text
    assert list_checkpoints(directory / "checkpoints")[-1].name == "step-00000003"
    monkeypatch.undo()
    monkeypatch.setenv("LOWVRAM_CACHE", str(directory.parent / "cache"))
    result = run(recipe, resume=True, display=QUIET)
    assert [line["step"] for line in lines_of(directory, "metrics.jsonl")] == [1, 2, 3, 4, 5]
    # On the same device it does not try again what has failed.
    assert result.fit["micro_batch_size"] == 1


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_smaller_micro_batches_divide_the_step(
    rows: int, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 6 rows a step: from 6 to 3, from 3 to 1."""
    changes = {"train.global_batch_size": 6, "fit.micro_batch_size": 6, "train.max_steps": 1}
    put_in(monkeypatch, Card(rows=rows, at=1, error=FULL[0]))
    result = run(make(**changes), display=QUIET)
    assert result.fit["micro_batch_size"] == {1: 1, 2: 1, 3: 3}[rows]


def test_an_evaluation_that_fails_once_is_made_again(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is lost of the step before it, and its figures are those of a run without failure."""
    undisturbed = make(output_dir=str(tmp_path / "undisturbed"), **{"train.eval_every": 2})
    run(undisturbed, display=QUIET)
    original, calls = JOB.score, []

    def fail_at_step_2(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:  # the first is that of the base
            raise FULL[0]
        return original(*arguments, **options)

    monkeypatch.setattr(JOB, "score", fail_at_step_2)
    recipe = make(**{"train.eval_every": 2})
    result = run(recipe, display=QUIET)
    assert result.fit["micro_batch_size"] == 4
    time = ("seconds", "tokens_per_second")
    found, wanted = (
        [{k: v for k, v in line.items() if k not in time} for line in lines]
        for lines in (
            lines_of(Path(recipe.output_dir), "metrics.jsonl"),
            lines_of(Path(undisturbed.output_dir), "metrics.jsonl"),
        )
    )
    assert found == wanted
    assert "validation_perplexity" in found[1]


def test_an_evaluation_that_never_fits_stops_the_run(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = JOB.score, []

    def fail(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) > 1:
            raise FULL[0]
        return original(*arguments, **options)

    monkeypatch.setattr(JOB, "score", fail)
    recipe = make(**{"train.eval_every": 2})
    with pytest.raises(DoesNotFit, match="room for evaluating, tried 5 times. The state of step 2"):
        run(recipe, display=QUIET)
    monkeypatch.setattr(JOB, "score", original)
    run(recipe, resume=True, display=QUIET)
    lines = lines_of(Path(recipe.output_dir), "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert [line["step"] for line in lines if "validation_perplexity" in line] == [2, 4]


def test_saving_that_fails_for_memory_is_done_again(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = JOB.save_checkpoint, []

    def fail_once(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:  # the first is that of step 0
            raise MemoryError
        return original(*arguments, **options)

    monkeypatch.setattr(JOB, "save_checkpoint", fail_once)
    recipe = make(**{"train.keep_last": 9})
    run(recipe, display=QUIET)
    names = [p.name for p in list_checkpoints(Path(recipe.output_dir) / "checkpoints")]
    assert [int(name[-1]) for name in names] == [0, 2, 4, 5]


def test_a_card_that_fails_stops_the_run(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a device-side assert nothing can be fetched from the card: what was saved stays."""
    recipe = make()
    directory = Path(recipe.output_dir)
    put_in(monkeypatch, Card(rows=0, at=4, error=ASSERT))
    with monkeypatch.context() as patch:
        saves: list[Any] = []
        original = JOB.save_checkpoint

        def save_checkpoint(state: Any, *arguments: Any, **options: Any) -> Any:
            saves.append(state.step)
            return original(state, *arguments, **options)

        patch.setattr(JOB, "save_checkpoint", save_checkpoint)
        with pytest.raises(DeviceError) as error:
            run(recipe, display=QUIET)
    assert saves == [0, 2]
    assert str(error.value).startswith(
        "the card failed in step 4: CUDA error: device-side assert triggered. This process cannot "
        f"use it any more. The state of step 2 is saved in {directory / 'checkpoints'}; --resume"
    )
    events = [event["event"] for event in lines_of(directory, "events.jsonl")]
    assert events == ["card failed"]


@pytest.mark.parametrize("fused", [False, True])
def test_what_cannot_be_cut_is_tried_again(
    fused: bool, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory may have been short for a moment only."""
    changes = {"method.name": "full", "train.fused_backward": True, "train.max_grad_norm": None}
    recipe = make(**(changes if fused else {"fit.micro_batch_size": 1}))
    card = put_in(monkeypatch, Card(rows=0, at=3, error=FULL[0], times=2))
    result = run(recipe, display=QUIET)
    assert result.fit["micro_batch_size"] == (4 if fused else 1)
    assert [event["event"] for event in result.events] == ["out of memory"] * 2
    assert len(card.seen) == (5 + 2 if fused else 3 + 1 + 20)


def test_fused_updates_cannot_be_cut(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """They need all of a step at once: the run stops, and says what would help."""
    recipe = make(
        **{"method.name": "full", "train.fused_backward": True, "train.max_grad_norm": None}
    )
    put_in(monkeypatch, Card(rows=2, at=2, error=FULL[0]))
    with pytest.raises(DoesNotFit, match="What helps: .*train.fused_backward: false"):
        run(recipe, display=QUIET)


def test_memory_that_fails_before_training_is_an_error_of_ours(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(JOB, "build", fail)
    with pytest.raises(DoesNotFit, match="out of memory outside of training: of the host"):
        run(make(), display=QUIET)


# Evaluation


def documents() -> list[tuple[np.ndarray, int, int]]:
    rng = np.random.default_rng(0)
    return [(rng.integers(0, 290, size), 100, 20) for size in (64, 64, 50, 31, 30, 7, 64, 40)]


@pytest.mark.parametrize("most", [200, 130, 64])
def test_an_evaluation_shrinks_until_it_fits(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for `most` tokens at a time: the same figures, and few passes that fail."""
    model = make_gpt2()
    wanted = score(model, documents(), context_length=64, stride=32)
    original, failed = PERPLEXITY._Network.score, []

    def full(network: Any, batch: Any) -> Any:
        tokens = len(batch) * len(batch[0].tokens)
        if tokens > most:
            failed.append(tokens)
            raise FULL[len(failed) % len(FULL)]
        return original(network, batch)

    monkeypatch.setattr(PERPLEXITY._Network, "score", full)
    seen: list[int] = []
    found = score(model, documents(), context_length=64, stride=32, progress=seen.append)
    assert found.perplexity == pytest.approx(wanted.perplexity, rel=1e-6)
    assert replace(found, perplexity=0, nll_sum=0, bits_per_byte=0, word_perplexity=0) == replace(
        wanted, perplexity=0, nll_sum=0, bits_per_byte=0, word_perplexity=0
    )
    assert seen[-1] == found.tokens_scored
    assert 1 <= len(failed) <= 3


def test_one_window_that_does_not_fit_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(network: Any, batch: Any) -> Any:
        raise FULL[0]

    monkeypatch.setattr(PERPLEXITY._Network, "score", full)
    with pytest.raises(torch.OutOfMemoryError):
        score(make_gpt2(), documents(), context_length=64, stride=32)
