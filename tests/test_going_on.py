"""What a run that was stopped, killed, moved or changed goes on with, and who may write where."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console
from safetensors.torch import load_file

from lowvram.checkpoint import list_checkpoints
from lowvram.cli import main
from lowvram.directory import RunDirectory
from lowvram.display import Display
from lowvram.errors import CheckpointError, DoesNotFit, Interrupted
from lowvram.interrupts import GRACE_SECONDS
from lowvram.recipe import Recipe, dump_recipe
from lowvram.run import run

TRAIN, JOB, DISK, BUILD, INTERRUPTS, CHECKPOINT = (
    import_module(f"lowvram.{name}")
    for name in ("train", "job", "disk", "build", "interrupts", "checkpoint")
)
QUIET = Display(quiet=True)
TIMES = ("seconds", "tokens_per_second")
Make = Callable[..., Recipe]


def lines_of(recipe: Recipe, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    text = (Path(recipe.output_dir) / name).read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    return [{key: line[key] for key in line if key not in TIMES} for line in lines]


def end_of(recipe: Recipe) -> dict[str, Any]:
    """Everything that must not depend on whether a run was stopped on the way."""
    directory = Path(recipe.output_dir)
    newest = list_checkpoints(directory / "checkpoints")[-1]
    found: dict[str, Any] = {
        f"{part.name}/{path.name}": path.read_bytes()
        for part in (directory / "adapter", directory / "merged", newest)
        if part.is_dir()
        for path in part.iterdir()
    }
    result = json.loads((directory / "result.json").read_text(encoding="utf-8"))
    kept = ("perplexity", "evaluation", "samples", "steps", "optimizer_steps", "tokens", "merge")
    return found | {key: result[key] for key in kept} | {"metrics": lines_of(recipe)}


def act_at(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], Any]) -> None:
    """Do `act` when this step has been taken, once."""
    original, done = TRAIN.train_step, []

    def train_step(*arguments: Any) -> Any:
        metrics = original(*arguments)
        if metrics.step == step and not done:
            done.append(step)
            act()
        return metrics

    monkeypatch.setattr(TRAIN, "train_step", train_step)


class Killed(BaseException):
    """As SIGKILL: nothing is saved or cleared up that is not so already."""


def killed_at(recipe: Recipe, step: int, *, resume: bool = False) -> Recipe:
    def die() -> None:
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        act_at(patch, step, die)
        with pytest.raises(Killed):
            run(recipe, resume=resume, display=QUIET)
    return recipe


def stopped_at(recipe: Recipe, step: int) -> Recipe:
    with pytest.MonkeyPatch.context() as patch:
        act_at(patch, step, lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(Interrupted):
            run(recipe, display=QUIET)
    return recipe


# To the bit

SETTINGS = {"train.max_steps": 12, "train.save_every": 4, "train.eval_every": 3}
KINDS: dict[str, dict[str, Any]] = {
    "adamw, one micro-batch": {"train.optimizer": "adamw", "fit.micro_batch_size": 4},
    "lion8bit, unpacked": {"train.optimizer": "lion8bit", "data.packing": False},
    "adafactor, dora": {"train.optimizer": "adafactor", "method.name": "dora"},
    "paged, fp16": {"train.optimizer": "paged_adamw8bit", "train.precision": "fp16"},
    "sgd, bf16": {"train.optimizer": "sgd", "train.precision": "bf16"},
    "full, deterministic": {"method.name": "full", "train.deterministic": True},
    "full in bf16, rounded by chance": {"method.name": "full", "model.dtype": "bf16"},
    "recomputed": {"fit.gradient_checkpointing": True, "method.dropout": 0.1},
}


@pytest.fixture
def _deterministic_for_now() -> Any:
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


@pytest.mark.usefixtures("_deterministic_for_now")
@pytest.mark.parametrize("kind", KINDS)
def test_killed_twice_it_is_the_run_that_was_not(
    kind: str, make_recipe: Make, dropout_gpt2_dir: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """In both epochs; the tokens are made anew in between, as from data that is streamed."""
    monkeypatch.setattr(BUILD, "has_fast_16_bit", lambda dtype: True)
    settings = {"model.name": str(dropout_gpt2_dir), "fit.micro_batch_size": 2}
    settings |= SETTINGS | {"model.dtype": "fp32"} | KINDS[kind]
    straight = make_recipe(output_dir=str(tmp_path / "straight"), **settings)
    run(straight, display=QUIET)
    recipe = killed_at(make_recipe(**settings), 6)
    shutil.rmtree(tmp_path / "cache")
    killed_at(recipe, 11, resume=True)
    run(recipe, resume=True, display=QUIET)
    assert end_of(recipe) == end_of(straight)
    assert len({line["loss"] for line in lines_of(recipe)}) == 12


def test_killed_before_its_first_checkpoint(make_recipe: Make, tmp_path: Path) -> None:
    straight = make_recipe(output_dir=str(tmp_path / "straight"), **{"method.dropout": 0.1})
    run(straight, display=QUIET)
    recipe = make_recipe(**{"method.dropout": 0.1})

    def die(*_: Any, **__: Any) -> None:
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JOB, "save_checkpoint", die)
        with pytest.raises(Killed):
            run(recipe, display=QUIET)
    assert RunDirectory(recipe.output_dir).start.exists()
    assert not RunDirectory(recipe.output_dir).checkpoints.exists()
    run(recipe, resume=True, display=QUIET)
    assert end_of(recipe) == end_of(straight)


def test_checkpoints_that_are_lost_are_not_begun_anew(make_recipe: Make) -> None:
    recipe = killed_at(make_recipe(), 2)
    shutil.rmtree(RunDirectory(recipe.output_dir).checkpoints)
    with pytest.raises(CheckpointError, match="has lost its checkpoints, though steps were taken"):
        run(recipe, resume=True, display=QUIET)


# Stopping within what is long


class Clock:
    """A signal comes when `at` calls of `module.name` have been made; then time flies."""

    def __init__(self, patch: pytest.MonkeyPatch, module: Any, name: str, at: int) -> None:
        self.calls, self.at, self.original = 0, at, getattr(module, name)
        patch.setattr(module, name, self.call)
        self.late = 0.0
        patch.setattr(INTERRUPTS.time, "monotonic", lambda real=time.monotonic: real() + self.late)

    def call(self, *arguments: Any, **options: Any) -> Any:
        self.calls += 1
        if self.calls == self.at:
            signal.raise_signal(signal.SIGTERM)
            self.late = 2 * GRACE_SECONDS
        return self.original(*arguments, **options)


def test_a_long_step_is_given_up_and_taken_again(
    make_recipe: Make, dropout_gpt2_dir: Path, tmp_path: Path
) -> None:
    """In the second of four micro-batches of step 2: its dropout is that of an undisturbed step."""
    settings = {"model.name": str(dropout_gpt2_dir), "fit.micro_batch_size": 1}
    straight = make_recipe(output_dir=str(tmp_path / "straight"), **settings)
    run(straight, display=QUIET)
    recipe = make_recipe(**settings)
    with pytest.MonkeyPatch.context() as patch:
        clock = Clock(patch, TRAIN, "token_loss", at=4 + 2)
        with pytest.raises(Interrupted, match="stopped after step 1 of 3, state saved in "):
            run(recipe, display=QUIET)
    assert clock.calls == 6
    assert [line["step"] for line in lines_of(recipe)] == [1]
    run(recipe, resume=True, display=QUIET)
    assert end_of(recipe) == end_of(straight)


def test_a_long_evaluation_is_given_up_and_made_again(make_recipe: Make, tmp_path: Path) -> None:
    """The step before it is saved without its record, which is complete after all."""
    straight = make_recipe(output_dir=str(tmp_path / "straight"), **{"train.eval_every": 2})
    run(straight, display=QUIET)
    recipe = make_recipe(**{"train.eval_every": 2})
    with pytest.MonkeyPatch.context() as patch:
        Clock(patch, JOB, "score", at=2)  # the first is that of the base
        with pytest.raises(Interrupted, match="stopped after step 2 of 3"):
            run(recipe, display=QUIET)
    assert [line["step"] for line in lines_of(recipe)] == [1]
    run(recipe, resume=True, display=QUIET)
    assert end_of(recipe) == end_of(straight)
    assert "validation_perplexity" in lines_of(recipe)[1]


# When, and which


def test_a_checkpoint_is_due_by_time(make_recipe: Make) -> None:
    """Each step takes a minute of a clock that is not the real one."""
    settings = {"train.save_every": None, "train.save_every_minutes": 2.5, "train.keep_last": 9}
    recipe = make_recipe(**settings, **{"train.max_steps": 8})
    late = [0.0]

    def a_minute(original: Any = TRAIN.train_step) -> Any:
        def train_step(*arguments: Any) -> Any:
            late[0] += 60
            return original(*arguments)

        return train_step

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TRAIN, "train_step", a_minute())
        patch.setattr(JOB.time, "monotonic", lambda real=time.monotonic: real() + late[0])
        run(recipe, display=QUIET)
    names = [path.name for path in list_checkpoints(RunDirectory(recipe.output_dir).checkpoints)]
    assert [int(name[-1]) for name in names] == [0, 3, 6, 8]


@pytest.fixture
def getting_worse(make_recipe: Make) -> Make:
    """The learning rate is far too high: the first evaluation is the best by far."""
    settings = {
        "train.max_steps": 8,
        "train.eval_every": 2,
        "train.keep_last": 1,
        "train.learning_rate": 0.3,
        "train.optimizer": "adamw",
        "train.schedule": "constant",
        "train.warmup_steps": 0,
    }
    return lambda **changes: make_recipe(**(settings | changes))


def test_the_best_is_put_out(getting_worse: Make, tmp_path: Path) -> None:
    recipe = getting_worse(**{"train.keep_best": True})
    result = run(recipe, display=QUIET)
    directory = Path(recipe.output_dir)
    evaluated = {
        line["step"]: line["validation_perplexity"]
        for line in lines_of(recipe)
        if "validation_perplexity" in line
    }
    best = min(evaluated, key=lambda step: evaluated[step])
    assert evaluated[best] < 0.9 * evaluated[6]
    names = [path.name for path in list_checkpoints(directory / "checkpoints")]
    assert names == [f"step-{best:08d}", "step-00000008"]
    assert result.perplexity["adapter"] == pytest.approx(evaluated[best], rel=1e-6)
    assert result.perplexity["merged"] == pytest.approx(evaluated[best], rel=1e-4)
    kept = load_file(directory / "checkpoints" / names[0] / "trained.safetensors")
    out = load_file(directory / "adapter" / "adapter_model.safetensors")
    assert {key.replace(".default", ""): value.tolist() for key, value in kept.items()} == {
        key: value.tolist() for key, value in out.items()
    }
    other = getting_worse(output_dir=str(tmp_path / "last"))
    assert run(other, display=QUIET).perplexity["adapter"] > 1.05 * evaluated[best]


def test_the_best_survives_a_kill(getting_worse: Make, tmp_path: Path) -> None:
    straight = getting_worse(output_dir=str(tmp_path / "s"), **{"train.keep_best": True})
    run(straight, display=QUIET)
    recipe = killed_at(getting_worse(**{"train.keep_best": True}), 7)
    run(recipe, resume=True, display=QUIET)
    assert end_of(recipe) == end_of(straight)


def test_a_best_that_is_damaged_is_not_put_out(getting_worse: Make) -> None:
    recipe = killed_at(getting_worse(**{"train.keep_best": True, "train.save_every": 1}), 7)
    first, *_ = list_checkpoints(RunDirectory(recipe.output_dir).checkpoints)
    (first / "trained.safetensors").write_bytes(b"")
    console = Console(record=True, file=io.StringIO(), soft_wrap=True)
    result = run(recipe, resume=True, display=Display(console, quiet=True))
    assert "train.keep_best: the weights of the last step are put out, since" in (
        console.export_text()
    )
    assert result.steps == 8


# What has changed


def test_going_on_anyway_is_recorded(make_recipe: Make) -> None:
    recipe = stopped_at(make_recipe(), 2)
    changed = make_recipe(**{"train.learning_rate": 5e-3})
    with pytest.raises(CheckpointError, match="train.learning_rate: was 0.01, is 0.005.*anyway"):
        run(changed, resume=True, display=QUIET)
    result = run(changed, resume_anyway=True, display=QUIET)
    assert [event["event"] for event in result.events] == ["stopped", "resumed"]
    assert result.events[1]["differences"] == ["train.learning_rate: was 0.01, is 0.005"]
    assert [line["step"] for line in lines_of(recipe)] == [1, 2, 3]
    rates = [line["learning_rate"] for line in lines_of(recipe)]
    assert rates[2] < rates[1] / 2


def test_after_going_on_anyway_it_is_a_run_of_the_new_recipe(make_recipe: Make) -> None:
    stopped_at(make_recipe(), 1)
    changed = make_recipe(**{"train.weight_decay": 0.5})

    def die(*_: Any) -> None:
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TRAIN, "train_step", die)
        with pytest.raises(Killed):
            run(changed, resume_anyway=True, display=QUIET)
    assert run(changed, resume=True, display=QUIET).steps == 3


def test_other_parameters_cannot_be_gone_on_with_anyway(make_recipe: Make) -> None:
    stopped_at(make_recipe(), 1)
    with pytest.raises(CheckpointError, match="trains other parameters than this recipe"):
        run(make_recipe(**{"method.rank": 4}), resume_anyway=True, display=QUIET)


def test_on_the_command_line(make_recipe: Make, tmp_path: Path) -> None:
    stopped_at(make_recipe(), 2)
    path = tmp_path / "changed.yaml"
    path.write_text(dump_recipe(make_recipe(**{"train.weight_decay": 0.5})), encoding="utf-8")
    refused = CliRunner().invoke(main, ["run", str(path), "--resume", "--quiet"])
    assert refused.exit_code == 5
    assert "train.weight_decay: was 0.01, is 0.5" in refused.stderr
    done = CliRunner().invoke(main, ["run", str(path), "--resume-anyway", "--quiet"])
    assert done.exit_code == 0, done.stderr
    assert "note: going on all the same, though train.weight_decay: was 0.01, is 0.5" in done.stdout


def test_model_and_data_may_move(
    gpt2_dir: Path, text_file: Path, make_recipe: Make, tmp_path: Path
) -> None:
    stopped_at(make_recipe(), 2)
    shutil.copytree(gpt2_dir, tmp_path / "moved")
    shutil.copy(text_file, tmp_path / "moved.txt")
    moved = {"model.name": str(tmp_path / "moved"), "data.source": str(tmp_path / "moved.txt")}
    assert run(make_recipe(**moved), resume=True, display=QUIET).steps == 3


def test_another_machine_keeps_the_formats(
    make_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`auto` was bf16 on the card where it began; here it would be fp32."""
    monkeypatch.setattr(BUILD, "has_fast_16_bit", lambda dtype: True)
    with monkeypatch.context() as patch:
        patch.setattr(BUILD, "_precision", lambda wanted, capability: ("bf16", ()))
        recipe = stopped_at(make_recipe(), 2)
    result = run(recipe, resume=True, display=QUIET)
    assert (result.numerics["precision"], result.numerics["base_dtype"]) == ("bf16", "bf16")
    assert run(make_recipe(), overwrite=True, display=QUIET).numerics["precision"] == "fp32"


def test_another_card_may_cut_the_step_otherwise(make_recipe: Make, tmp_path: Path) -> None:
    """Four rows at once there, two here: the same training up to rounding."""
    straight = make_recipe(output_dir=str(tmp_path / "s"), **{"fit.micro_batch_size": 4})
    run(straight, display=QUIET)
    stopped_at(make_recipe(**{"fit.micro_batch_size": 4}), 1)
    recipe = make_recipe(**{"fit.micro_batch_size": 2})
    run(recipe, resume=True, display=QUIET)
    losses, wanted = ([line["loss"] for line in lines_of(r)] for r in (recipe, straight))
    assert losses == pytest.approx(wanted, rel=1e-5)
    assert losses[0] == wanted[0]


# Records that came to harm


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "[" * 100_000])
def test_a_start_that_is_not_what_was_written(content: str, make_recipe: Make) -> None:
    """Told before a step is taken, not at the end of the run."""
    recipe = stopped_at(make_recipe(), 2)
    RunDirectory(recipe.output_dir).start.write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError, match="start.json: is not what was written"):
        run(recipe, resume=True, display=QUIET)
    assert [line["step"] for line in lines_of(recipe)] == [1, 2]


@pytest.mark.parametrize("damage", [b"\xff\x00", b"5\n", b"{}\n", b"[" * 100_000])
def test_metrics_that_lost_lines_are_told(damage: bytes, make_recipe: Make) -> None:
    recipe = stopped_at(make_recipe(), 2)
    path = RunDirectory(recipe.output_dir).metrics
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + damage + second[:20])
    console = Console(record=True, file=io.StringIO(), soft_wrap=True)
    assert run(recipe, resume=True, display=Display(console, quiet=True)).steps == 3
    told = "metrics.jsonl has lost lines of the 2 steps so far" in console.export_text()
    assert told
    assert [line["step"] for line in lines_of(recipe)] == [1, 3]


def test_an_event_that_was_cut_does_not_hide_the_next(make_recipe: Make) -> None:
    recipe = stopped_at(make_recipe(), 2)
    with RunDirectory(recipe.output_dir).events.open("a", encoding="utf-8") as file:
        file.write('{"time": "2026-')
    events = run(recipe, resume=True, display=QUIET).events
    assert [event["event"] for event in events] == ["stopped", "resumed"]


def rewrite_state(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Spoil state.json, and make its manifest agree."""
    facts = json.loads((path / "state.json").read_text(encoding="utf-8"))
    changed = change(facts)
    (path / "state.json").write_text(json.dumps(facts if changed is None else changed))
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    manifest["state.json"] = DISK._size_and_hash(path / "state.json")
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "change",
    [
        lambda f: f.update(step=10**30),
        lambda f: f.update(step="2"),
        lambda f: f.update(step=1),
        lambda f: f.update(tokens=None),
        lambda f: f.update(run=1),
        lambda f: f.update(fingerprint=[]),
        lambda f: f.update(optimizer=1),
        lambda f: f["random"].update(python=[3, [2**99], None]),
        lambda f: f["random"].update(cpu="00"),
        lambda f: f.pop("random"),
        lambda f: [1],
    ],
)
def test_a_state_that_makes_no_sense_is_skipped(
    change: Callable[[dict[str, Any]], Any], make_recipe: Make
) -> None:
    """Though its manifest agrees with it: the checkpoint before it is gone on from."""
    recipe = stopped_at(make_recipe(**{"train.save_every": 1}), 2)
    newest = list_checkpoints(RunDirectory(recipe.output_dir).checkpoints)[-1]
    rewrite_state(newest, change)
    assert run(recipe, resume=True, display=QUIET).steps == 3
    events = [event["event"] for event in lines_of(recipe, "events.jsonl")]
    assert events == ["stopped", "checkpoint skipped", "resumed"]


@pytest.mark.parametrize(
    "error", [OSError(errno.EMFILE, "Too many open files"), RuntimeError("CUDA out of memory")]
)
def test_a_checkpoint_that_cannot_be_read_now_is_not_called_damaged(
    error: Exception, make_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = stopped_at(make_recipe(), 2)
    checkpoints = RunDirectory(recipe.output_dir).checkpoints
    before = list_checkpoints(checkpoints)

    def fail(path: Path) -> Any:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(CHECKPOINT, "load_file", fail)
        with pytest.raises((CheckpointError, DoesNotFit)):
            run(recipe, resume=True, display=QUIET)
    assert list_checkpoints(checkpoints) == before
    assert run(recipe, resume=True, display=QUIET).steps == 3


def test_names_like_checkpoints_are_none(make_recipe: Make) -> None:
    recipe = stopped_at(make_recipe(**{"train.save_every": 1}), 2)
    stray = RunDirectory(recipe.output_dir).checkpoints / "step-00000002.bak"
    stray.mkdir()
    run(recipe, resume=True, display=QUIET)
    assert stray.is_dir()


def test_another_base_before_the_first_checkpoint(
    make_recipe: Make, dropout_gpt2_dir: Path, tmp_path: Path
) -> None:
    """There is nothing to compare with yet: the base is measured anew."""

    def die(*_: Any, **__: Any) -> None:
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JOB, "save_checkpoint", die)
        with pytest.raises(Killed):
            run(make_recipe(), display=QUIET)
    other = {"model.name": str(dropout_gpt2_dir), "evaluate.max_tokens": 200}
    straight = make_recipe(output_dir=str(tmp_path / "s"), **other)
    wanted = run(straight, display=QUIET)
    assert run(make_recipe(**other), resume=True, display=QUIET).perplexity == wanted.perplexity


def test_the_best_is_given_up_when_asked(getting_worse: Make) -> None:
    recipe = killed_at(getting_worse(**{"train.keep_best": True}), 7)
    last = run(getting_worse(), resume=True, display=QUIET)
    other = run(getting_worse(), overwrite=True, display=QUIET)
    assert last.perplexity == other.perplexity
    assert Path(recipe.output_dir).is_dir()


def test_a_step_is_not_lost_when_it_cannot_be_shown(make_recipe: Make, tmp_path: Path) -> None:
    """The terminal, or the file that it is redirected to, fails in mid-run; the state is saved."""
    settings = {"train.log_every": 1, "train.eval_every": 2, "train.max_steps": 5}
    straight = make_recipe(output_dir=str(tmp_path / "s"), **settings)
    run(straight, display=QUIET)

    class Full(io.StringIO):
        def write(self, text: str) -> int:
            if "training 2/" in text:
                raise OSError(errno.ENOSPC, "No space left on device")
            return len(text)

    recipe = make_recipe(**settings)
    with pytest.raises(CheckpointError, match="the output: cannot be written: No space left"):
        run(recipe, display=Display(Console(file=Full())))
    run(recipe, resume=True, display=QUIET)
    assert end_of(recipe) == end_of(straight)


def test_nobody_reads_on(make_recipe: Make, tmp_path: Path) -> None:
    """As in `lowvram run ... | head`: the state is saved."""
    path = tmp_path / "piped.yaml"
    recipe = make_recipe(**{"train.max_steps": 400, "train.log_every": 1})
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    command = [sys.executable, "-m", "lowvram", "run", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("training 2/"):
                break
        process.stdout.close()
        assert process.wait() == 1
    last = lines_of(recipe)[-1]["step"]
    newest = list_checkpoints(RunDirectory(recipe.output_dir).checkpoints)[-1]
    assert newest.name == f"step-{last + 1:08d}"


def test_a_signal_that_was_swallowed_is_heard_later(make_recipe: Make) -> None:
    """Python drops what is raised while an object is deleted; the next look finds it."""
    recipe = make_recipe()
    original = JOB.Job.samples

    def samples(job: Any, model: Any) -> Any:
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        return original(job, model)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JOB.Job, "samples", samples)
        with pytest.raises(Interrupted, match="stopped after step 1 of 3"):
            run(recipe, display=QUIET)
    assert run(recipe, resume=True, display=QUIET).steps == 3


def test_resume_begins_what_died_before_it_had_begun(make_recipe: Make) -> None:
    recipe = make_recipe()

    def die(*_: Any, **__: Any) -> None:
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JOB, "write_json", die)
        patch.setattr(Path, "rmdir", die)
        with pytest.raises(Killed):
            run(recipe, display=QUIET)
    Path(recipe.output_dir).mkdir(exist_ok=True)
    RunDirectory(recipe.output_dir).lock.touch()
    assert run(recipe, resume=True, display=QUIET).steps == 3


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
def test_metrics_are_on_the_disk_before_their_checkpoint(make_recipe: Make) -> None:
    """Or power that goes would leave a checkpoint that is later than its records."""
    order: list[str] = []
    original = {name: getattr(os, name) for name in ("fsync", "replace")}

    def fsync(descriptor: int) -> None:
        order.append(f"fsync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        original["fsync"](descriptor)

    def replace(source: Any, target: Any) -> None:
        order.append(f"replace {Path(target).name}")
        original["replace"](source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        patch.setattr(os, "replace", replace)
        run(make_recipe(**{"train.max_steps": 1}), display=QUIET)
    visible = order.index("replace step-00000001")
    assert "fsync metrics.jsonl" in order[:visible]
    assert order[visible + 1] == "fsync checkpoints"


# Who may write

HOLD = """
import sys, time
from lowvram.directory import RunDirectory
with RunDirectory(sys.argv[1]).held():
    print("held", flush=True)
    time.sleep(60)
"""


def test_two_runs_in_one_directory(make_recipe: Make) -> None:
    """The second is refused at once; the lock goes with the process that holds it."""
    recipe = make_recipe(**{"train.max_steps": 1})
    command = [sys.executable, "-c", HOLD, recipe.output_dir]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(CheckpointError) as error:
            run(recipe, display=QUIET)
        holder.kill()
    assert str(error.value) == (
        f"output_dir: another run is under way in {recipe.output_dir}; wait for it, or choose "
        "another with --set output_dir=DIR"
    )
    assert run(recipe, display=QUIET).steps == 1


def test_what_a_crash_left_goes_at_the_next_start(make_recipe: Make) -> None:
    recipe = killed_at(make_recipe(), 2)
    directory = RunDirectory(recipe.output_dir)
    left = [
        directory.path / ".partial-merged-4711",
        directory.checkpoints / ".partial-step-00000009-4711",
    ]
    for path in left:
        path.mkdir()
    (directory.path / ".partial-result.json-4711").write_text("{")
    run(recipe, resume=True, display=QUIET)
    assert [str(path) for path in directory.path.rglob(".partial-*")] == []


def test_a_run_is_not_begun_without_room_for_it(
    make_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe()

    class Usage:
        free = 20_000_000

    monkeypatch.setattr(DISK.shutil, "disk_usage", lambda path: Usage)
    assert run(recipe, display=QUIET).steps == 3
    Usage.free = 1_000_000
    with pytest.raises(CheckpointError) as error:
        run(make_recipe(output_dir=f"{recipe.output_dir}-2"), display=QUIET)
    assert str(error.value).startswith(f"output_dir: {recipe.output_dir}-2 needs up to 16.")
    assert "MiB (3 checkpoints and the merged model), and its disk has 1.0 MiB" in str(error.value)
    assert "lower train.keep_last" in str(error.value)
    assert not Path(f"{recipe.output_dir}-2").exists()


@pytest.mark.parametrize(
    ("number", "cure"), [(errno.ENOSPC, "free some room"), (errno.ESTALE, "network mount")]
)
def test_a_disk_that_fails_in_mid_run(number: int, cure: str, make_recipe: Make) -> None:
    """The last checkpoint is there to go on from, and the error says what to do."""
    recipe = make_recipe(**{"train.save_every": 1})

    def no_room(path: Path, *_: Any) -> None:
        raise OSError(number, os.strerror(number))

    with pytest.MonkeyPatch.context() as patch:
        act_at(patch, 2, lambda: patch.setattr(DISK, "sync", no_room))
        with pytest.raises(CheckpointError, match=f"cannot be written: .*{cure}"):
            run(recipe, display=QUIET)
    directory = RunDirectory(recipe.output_dir)
    assert list_checkpoints(directory.checkpoints)[-1].name == "step-00000001"
    assert run(recipe, resume=True, display=QUIET).steps == 3


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere"
)
def test_a_directory_that_may_not_be_written(make_recipe: Make, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(CheckpointError, match="cannot be made: cannot write"):
        run(make_recipe(output_dir=str(tmp_path / "locked" / "run")), display=QUIET)
