"""Checkpoints: going on is as if nothing had happened, and damage is noticed."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from lowvram import checkpoint
from lowvram.build import build
from lowvram.checkpoint import list_checkpoints, load_newest, save_checkpoint
from lowvram.data import IGNORED, Batch
from lowvram.disk import MANIFEST
from lowvram.errors import CheckpointError
from lowvram.train import StepMetrics, TrainState, train_step

BUILD = import_module("lowvram.build")  # as an attribute of the package it is the function
OPTIMIZERS = ["adamw", "adamw8bit", "paged_adamw8bit", "lion8bit", "adafactor", "sgd"]
FINGERPRINT = {"base": "b1", "data": "d1", "recipe": "r1"}
STEPS = 6
Windows = list[list[Batch]]


@pytest.fixture
def make_state(make_recipe: Any, dropout_gpt2_dir: Path) -> Callable[..., TrainState]:
    """Dropout everywhere; A has 4096 and B 12288 elements, enough for 8-bit state."""

    def make(**changes: Any) -> TrainState:
        settings = {
            "model.name": str(dropout_gpt2_dir),
            "method.rank": 128,
            "method.dropout": 0.1,
            "train.learning_rate": 1e-3,
            "train.warmup_steps": 2,
        }
        state = build(make_recipe(**(settings | changes)), total_steps=STEPS)
        for name, parameter in state.model.named_parameters():
            if "lora_B" in name:
                with torch.no_grad():
                    parameter.copy_(0.05 * torch.ones_like(parameter).cumsum(1).sin())
        return state

    return make


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


@pytest.fixture(scope="module")
def windows() -> Windows:
    """Two micro-batches a step, of random tokens."""
    generator = torch.Generator().manual_seed(4)
    found = []
    for _ in range(STEPS):
        window = []
        for b, s in ((2, 12), (1, 7)):
            ids = torch.randint(0, 290, (b, s), generator=generator)
            labels = ids.clone()
            labels[:, 0] = IGNORED
            window.append(
                Batch(
                    input_ids=ids,
                    labels=labels,
                    position_ids=None,
                    target_tokens=b * (s - 1),
                    tokens=b * s,
                )
            )
        found.append(window)
    return found


def take(state: TrainState, windows: Windows) -> list[StepMetrics]:
    return [train_step(state, window) for window in windows]


def figures(steps: list[StepMetrics]) -> list[tuple[Any, ...]]:
    """All of them but the time, which are compared to the bit."""
    return [tuple(value for name, value in vars(m).items() if name != "seconds") for m in steps]


def weights(state: TrainState) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in state.model.named_parameters() if p.requires_grad}


def assert_same_weights(one: TrainState, other: TrainState) -> None:
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def save(state: TrainState, directory: Path, **changes: Any) -> Path:
    options: dict[str, Any] = {"fingerprint": FINGERPRINT, "keep_last": 9, **changes}
    return save_checkpoint(state, directory, **options)


def load(state: TrainState, directory: Path, **changes: str) -> tuple[Path, list[str]]:
    """Which checkpoint it was, and what was skipped."""
    found = load_newest(state, directory, fingerprint=FINGERPRINT | changes)
    assert found is not None
    return found.path, found.skipped


def scramble_random_state() -> None:
    torch.manual_seed(12345)
    random.seed(12345)


def assert_going_on_is_exact(
    make: Callable[[], TrainState], windows: Windows, directory: Path, at: int = 3
) -> list[StepMetrics]:
    """Compares a straight run with one that was saved, thrown away and loaded after `at` steps."""
    straight = make()
    torch.manual_seed(0)
    wanted = take(straight, windows)

    stopped = make()
    torch.manual_seed(0)
    before = take(stopped, windows[:at])
    save(stopped, directory)
    resumed = make()
    torch.manual_seed(12345)
    path, notes = load(resumed, directory)
    assert (path.name, notes) == (f"step-{at:08d}", [])
    after = take(resumed, windows[at:])

    assert figures(before + after) == figures(wanted)
    assert_same_weights(resumed, straight)
    for field in ("step", "optimizer_steps", "tokens", "nonfinite_in_a_row"):
        assert getattr(resumed, field) == getattr(straight, field)
    return wanted


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_going_on_is_exact(optimizer: str, make_state: Any, windows: Windows, place: Path) -> None:
    """6 steps = 3 steps, save, a new state, load, 3 steps: to the bit, with dropout 0.1."""
    steps = assert_going_on_is_exact(
        lambda: make_state(**{"train.optimizer": optimizer}), windows, place
    )
    assert len({metrics.loss for metrics in steps}) == STEPS


@pytest.mark.parametrize("method", ["dora", "full"])
def test_going_on_is_exact_for_other_methods(
    method: str, make_recipe: Any, windows: Windows, dropout_gpt2_dir: Path, place: Path
) -> None:
    recipe = make_recipe(**{"model.name": str(dropout_gpt2_dir), "method.name": method})
    assert_going_on_is_exact(lambda: build(recipe, total_steps=STEPS), windows, place)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_going_on_is_exact_with_a_loss_scale(
    optimizer: str,
    make_state: Any,
    windows: Windows,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The scale grows every second step, so its counter has to be restored too."""
    monkeypatch.setattr(BUILD, "has_fast_16_bit", lambda dtype: True)

    def make() -> TrainState:
        state: TrainState = make_state(
            **{"train.optimizer": optimizer, "train.precision": "fp16", "model.dtype": "fp16"}
        )
        assert state.scaler is not None
        state.scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2)
        return state

    steps = assert_going_on_is_exact(make, windows, place)
    assert [metrics.loss_scale for metrics in steps] == [4, 8, 8, 16, 16, 32]


def test_counters_are_restored(make_state: Any, windows: Windows, place: Path) -> None:
    """Skipped steps are part of the position in the data, not of that in the schedule."""
    state = make_state()
    take(state, windows[:2])
    handle = state.trainable()[0].register_hook(lambda gradient: gradient * float("nan"))
    take(state, windows[2:4])
    handle.remove()
    save(state, place)
    fresh = make_state()
    load(fresh, place)
    assert (fresh.step, fresh.optimizer_steps, fresh.nonfinite_in_a_row) == (4, 2, 2)
    assert fresh.tokens == state.tokens == 2 * (2 * 12 + 7)
    assert take(fresh, windows[4:])[0].learning_rate == state.learning_rate(2)


def test_pythons_random_state_is_restored(make_state: Any, windows: Windows, place: Path) -> None:
    state = make_state()
    save(state, place)
    wanted = random.random(), torch.rand(3).tolist()
    random.seed(1)
    torch.manual_seed(1)
    load(state, place)
    assert (random.random(), torch.rand(3).tolist()) == wanted


def test_there_is_no_pickle_in_it(make_state: Any, windows: Windows, place: Path) -> None:
    """Files that any safetensors or JSON reader takes, and nothing else."""
    state = make_state()
    take(state, windows[:1])
    path = save(state, place)
    files = sorted(path.iterdir())
    assert {file.suffix for file in files} == {".safetensors", ".json"}
    for file in files:
        content = file.read_bytes()
        assert not content.startswith((b"\x80", b"PK"))
        if file.suffix == ".json":
            json.loads(content)
        else:
            assert load_file(file)
    trained = load_file(path / checkpoint.WEIGHTS_FILE)
    assert trained.keys() == weights(state).keys()
    assert all(torch.equal(trained[name], value) for name, value in weights(state).items())
    assert [entry.name for entry in place.iterdir()] == ["step-00000001"]


# Damage


def three_checkpoints(state: TrainState, windows: Windows, directory: Path) -> list[Path]:
    found = []
    for window in windows[:3]:
        take(state, [window])
        found.append(save(state, directory))
    return found


def truncate(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def flip(path: Path) -> None:
    """One bit, near the end: in the tensors, or in a number of the JSON."""
    content = bytearray(path.read_bytes())
    content[-len(content) // 4] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def not_an_object(path: Path) -> None:
    path.write_text("[1, 2]", encoding="utf-8")


def lacks_everything(path: Path) -> None:
    path.write_text("{}", encoding="utf-8")


FILES = sorted(value for name, value in vars(checkpoint).items() if name.endswith("_FILE"))
FILES.append(MANIFEST)
DAMAGES = [truncate, flip, empty, not_an_object, lacks_everything, Path.unlink]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_is_skipped(
    damage: Callable[[Path], None], file: str, make_state: Any, windows: Windows, place: Path
) -> None:
    """Whatever is wrong with whichever file, the one before it is loaded and a note says so."""
    state = make_state()
    newest = three_checkpoints(state, windows, place)[-1]
    damage(newest / file)
    resumed = make_state()
    path, notes = load(resumed, place)
    assert (path.name, resumed.step) == ("step-00000002", 2)
    assert len(notes) == 1
    assert notes[0].startswith("skipped step-00000003, which is damaged: ")
    assert figures(take(resumed, windows[2:3]))
    assert_same_weights(resumed, state)


def test_all_damaged_is_an_error(make_state: Any, windows: Windows, place: Path) -> None:
    state = make_state()
    for path in three_checkpoints(state, windows, place):
        (path / checkpoint.WEIGHTS_FILE).write_bytes(b"no")
    before = weights(state)
    with pytest.raises(CheckpointError) as error:
        load(state, place)
    damaged = "; ".join(
        f"skipped step-0000000{n}, which is damaged: trained.safetensors is not what was written"
        for n in (3, 2, 1)
    )
    assert str(error.value) == (
        f"{place}: has no checkpoint to go on from ({damaged}); start anew with --overwrite"
    )
    assert all(torch.equal(before[name], value) for name, value in weights(state).items())


def test_no_checkpoint_changes_nothing(make_state: Any, place: Path) -> None:
    place.mkdir()
    for directory in (place, place / "none"):
        assert list_checkpoints(directory) == []
        state = make_state()
        assert load_newest(state, directory, fingerprint=FINGERPRINT) is None
        assert_same_weights(state, make_state())


def test_a_newer_format_is_said_to_be_one(
    make_state: Any, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "FORMAT", 7)
    save(make_state(), place)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="format 7, this version reads 2"):
        load(make_state(), place)


@pytest.mark.parametrize("key", ["base", "data", "recipe"])
def test_another_run_is_refused(key: str, make_state: Any, place: Path) -> None:
    path = save(make_state(), place)
    with pytest.raises(CheckpointError) as error:
        load(make_state(), place, **{key: "other"})
    was = FINGERPRINT[key]
    assert str(error.value) == (
        f'{path}: belongs to another run ({key}: was "{was}", is "other"). Go on with the recipe '
        "and data of that run, or go on all the same with --resume-anyway, or start anew with "
        "--overwrite or another output_dir"
    )


def test_all_differences_are_named(make_state: Any, place: Path) -> None:
    save(make_state(), place)
    with pytest.raises(
        CheckpointError, match='base: was "b1", is "b2"; data: was "d1", is "d2"; new: was null'
    ):
        load(make_state(), place, base="b2", data="d2", new="n")


def test_other_parameters_are_refused(make_state: Any, place: Path) -> None:
    path = save(make_state(), place)
    state = make_state(**{"method.target_modules": ["c_fc"]})
    with pytest.raises(CheckpointError) as error:
        load(state, place)
    assert str(error.value) == f"{path}: trains other parameters than this recipe"


# Saving


def test_the_last_ones_are_kept(make_state: Any, windows: Windows, place: Path) -> None:
    state = make_state()
    kept = []
    for window in windows[:4]:
        take(state, [window])
        save(state, place, keep_last=2)
        kept.append([path.name[-1] for path in list_checkpoints(place)])
    assert kept == [["1"], ["1", "2"], ["2", "3"], ["3", "4"]]


@pytest.mark.parametrize("keep_last", [1, 2])
def test_what_is_kept_was_written_by_this_run(
    keep_last: int, make_state: Any, windows: Windows, place: Path
) -> None:
    """A damaged checkpoint of a later step must not push out the whole one just saved."""
    *_, newest = three_checkpoints(make_state(), windows, place)
    flip(newest / checkpoint.WEIGHTS_FILE)
    second = place / "step-00000002"
    flip(second / checkpoint.WEIGHTS_FILE)
    resumed = make_state()
    load(resumed, place)
    take(resumed, windows[1:2])
    saved = save(resumed, place, keep_last=keep_last)
    assert [path.name[-1] for path in list_checkpoints(place)] == ["1", "2"][-keep_last:]
    again = make_state()
    assert load(again, place) == (saved, [])
    assert_same_weights(again, resumed)


def test_what_a_crash_left_is_ignored_and_removed(
    make_state: Any, windows: Windows, place: Path
) -> None:
    state = make_state()
    whole, *_ = three_checkpoints(state, windows[:1], place)
    left = place / ".partial-step-00000009-4711"
    shutil.copytree(whole, left)
    assert list_checkpoints(place) == [whole]
    resumed = make_state()
    assert load(resumed, place) == (whole, [])
    take(resumed, windows[1:2])
    save(resumed, place)
    assert sorted(path.name for path in place.iterdir()) == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize(
    ("failure", "wanted"),
    [
        (OSError(28, "No space left on device"), "No space left on device; free some room there"),
        (SafetensorError("I/O error: disk full"), "I/O error: disk full"),
        (
            SafetensorError("I/O error: No space left on device (os error 28)"),
            "No space left on device (os error 28); free some room there",
        ),
    ],
)
def test_a_failed_save_leaves_the_last_checkpoint(
    failure: Exception,
    wanted: str,
    make_state: Any,
    windows: Windows,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """safetensors reports a full disk as an error of its own kind."""
    state = make_state()
    (whole,) = three_checkpoints(state, windows[:1], place)
    original = checkpoint.write_file

    def fail(path: Path, layout: Any, tensors: Any) -> None:
        if path.name == checkpoint.OPTIMIZER_FILE:
            raise failure
        original(path, layout, tensors)

    monkeypatch.setattr(checkpoint, "write_file", fail)
    take(state, windows[1:2])
    with pytest.raises(CheckpointError) as error:
        save(state, place, keep_last=1)
    assert str(error.value).startswith(f"{place / 'step-00000002'}: cannot be written: ")
    assert str(error.value).endswith(wanted)
    assert list(place.iterdir()) == [whole]


def test_a_directory_that_cannot_be_made_is_an_error_of_ours(make_state: Any, place: Path) -> None:
    place.mkdir()
    (place / "file").write_text("", encoding="utf-8")
    with pytest.raises(CheckpointError, match="step-00000000: cannot be written: "):
        save(make_state(), place / "file" / "checkpoints")


def test_saving_a_step_again_replaces_it(make_state: Any, windows: Windows, place: Path) -> None:
    state = make_state()
    path = save(state, place)
    flip(path / checkpoint.WEIGHTS_FILE)
    assert save(state, place) == path
    assert load(make_state(), place) == (path, [])
