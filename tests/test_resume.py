"""Runs that are stopped, killed or spoiled, and gone on with."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console
from safetensors.torch import load_file

from lowvram.checkpoint import list_checkpoints
from lowvram.cli import main
from lowvram.display import Display
from lowvram.errors import CheckpointError, Interrupted
from lowvram.plan import plan
from lowvram.recipe import Recipe, dump_recipe, load_recipe
from lowvram.run import run

# As attributes of the package these are the functions.
BUILD, TRAIN, JOB, FINISH = (
    import_module(f"lowvram.{name}") for name in ("build", "train", "job", "finish")
)
STEPS = 12
QUIET = Display(Console(quiet=True), quiet=True)
Make = Callable[..., Recipe]


def write_recipe(path: Path, model: Path, text: Path, **changes: Any) -> Recipe:
    """Dropout everywhere, two micro-batches a step, 8-bit state, more than one epoch."""
    settings = {
        "data.source": str(text),
        "method.rank": 128,
        "method.dropout": 0.1,
        "train.global_batch_size": 4,
        "train.max_steps": STEPS,
        "train.learning_rate": 1e-2,
        "train.optimizer": "adamw8bit",
        "train.eval_every": 5,
        "train.save_every": 4,
        "fit.micro_batch_size": 2,
        "generate.max_new_tokens": 4,
        "output_dir": str(path.with_suffix("")),
    }
    path.write_text(f"model: {{name: '{model}'}}\ndata: {{source: x}}\n", encoding="utf-8")
    recipe = load_recipe(str(path), settings | changes)
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    return recipe


@pytest.fixture
def make(dropout_gpt2_dir: Path, text_file: Path, tmp_path: Path) -> Make:
    """make(name="run", **changes): the recipe NAME.yaml, which writes into NAME."""

    def make(name: str = "run", **changes: Any) -> Recipe:
        return write_recipe(tmp_path / f"{name}.yaml", dropout_gpt2_dir, text_file, **changes)

    return make


@pytest.fixture(scope="module")
def reference(
    dropout_gpt2_dir: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The directory of a run that was not interrupted."""
    directory = tmp_path_factory.mktemp("reference")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOWVRAM_CACHE", str(directory / "cache"))
        recipe = write_recipe(directory / "run.yaml", dropout_gpt2_dir, text_file)
        run(recipe, display=QUIET)
    return Path(recipe.output_dir)


def act_at(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], Any]) -> None:
    """Do `act` when this step has been taken, once."""
    original = TRAIN.train_step
    done = []

    def train_step(*arguments: Any) -> Any:
        metrics = original(*arguments)
        if metrics.step == step and not done:
            done.append(step)
            act()
        return metrics

    monkeypatch.setattr(TRAIN, "train_step", train_step)


def metrics_of(directory: Path) -> list[dict[str, Any]]:
    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def assert_same_run(found: Path, wanted: Path) -> None:
    """To the bit: adapter, merged model, every figure of every step, perplexities, samples."""
    for file in ("adapter/adapter_model.safetensors", "merged/model.safetensors"):
        assert (found / file).read_bytes() == (wanted / file).read_bytes(), file
    lines, wanted_lines = metrics_of(found), metrics_of(wanted)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    timing = ("seconds", "tokens_per_second")
    for line, wanted_line in zip(lines, wanted_lines, strict=True):
        assert {key: line[key] for key in line if key not in timing} == {
            key: wanted_line[key] for key in wanted_line if key not in timing
        }
    assert [line["step"] for line in lines if "validation_perplexity" in line] == [5, 10]
    result, wanted_result = (
        json.loads((path / "result.json").read_text(encoding="utf-8")) for path in (found, wanted)
    )
    for key in ("perplexity", "samples", "steps", "optimizer_steps", "tokens", "merge"):
        assert result[key] == wanted_result[key], key


def test_an_interrupted_run_is_the_run_that_was_not(
    make: Make, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped by Ctrl-C at step 3 and by SIGTERM at 11, which is in the second epoch."""
    recipe = make()
    assert plan(recipe).steps_per_epoch == 10
    directory = Path(recipe.output_dir)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    for step, number, resume in ((3, signal.SIGINT, False), (11, signal.SIGTERM, True)):
        with monkeypatch.context() as patch:
            act_at(patch, step, lambda number=number: signal.raise_signal(number))
            with pytest.raises(Interrupted) as stopped:
                run(recipe, resume=resume, display=QUIET)
        assert str(stopped.value) == (
            f"stopped after step {step} of 12, state saved in {directory / 'checkpoints'}; "
            "the same command with --resume goes on"
        )
        assert [line["step"] for line in metrics_of(directory)] == list(range(1, step + 1))
        assert list_checkpoints(directory / "checkpoints")[-1].name == f"step-{step:08d}"
        assert not (directory / "result.json").exists()
        assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    run(recipe, resume=True, display=QUIET)
    assert_same_run(directory, reference)
    assert len({line["loss"] for line in metrics_of(directory)}) == STEPS


def test_a_killed_run_goes_on_from_its_last_checkpoint(
    make: Make, reference: Path, tmp_path: Path
) -> None:
    """Nothing can be saved after SIGKILL: steps 5 to 7 are taken again, and are the same."""
    recipe = make()
    script = """
import os, signal, sys
from importlib import import_module
import torch
from lowvram.recipe import load_recipe
torch.set_num_threads(1)
module = import_module("lowvram.train")
original = module.train_step
def train_step(state, window):
    metrics = original(state, window)
    if metrics.step == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return metrics
module.train_step = train_step
import_module("lowvram.run").run(load_recipe(sys.argv[1]))
"""
    command = [sys.executable, "-c", script, str(tmp_path / "run.yaml")]
    killed = subprocess.run(command, capture_output=True, env=os.environ, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    directory = Path(recipe.output_dir)
    assert [line["step"] for line in metrics_of(directory)] == [1, 2, 3, 4, 5, 6]
    with (directory / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 7, "lo')
    run(recipe, resume=True, display=QUIET)
    assert_same_run(directory, reference)


def test_a_damaged_checkpoint_costs_a_few_steps(
    make: Make, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make()
    act_at(monkeypatch, 6, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(Interrupted):
        run(recipe, display=QUIET)
    directory = Path(recipe.output_dir)
    newest = list_checkpoints(directory / "checkpoints")[-1]
    (newest / "trained.safetensors").write_bytes(b"")
    console = Console(record=True, file=io.StringIO(), soft_wrap=True)
    run(recipe, resume=True, display=Display(console, quiet=True))
    assert "note: skipped step-00000006, which is damaged" in console.export_text()
    assert_same_run(directory, reference)


def stopped_at(recipe: Recipe, step: int, monkeypatch: pytest.MonkeyPatch) -> Path:
    with monkeypatch.context() as patch:
        act_at(patch, step, lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(Interrupted):
            run(recipe, display=QUIET)
    return Path(recipe.output_dir)


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def test_what_resume_and_overwrite_may_do(
    make: Make, monkeypatch: pytest.MonkeyPatch, dropout_gpt2_dir: Path, tmp_path: Path
) -> None:
    recipe = make(**{"train.max_steps": 3})
    directory = Path(recipe.output_dir)

    def refused(recipe: Recipe, **options: bool) -> str:
        before = contents(directory)
        with pytest.raises(CheckpointError) as error:
            run(recipe, display=QUIET, **options)
        assert contents(directory) == before
        return str(error.value)

    assert refused(recipe, resume=True) == (
        f"output_dir: no run has been started in {directory}; run without --resume"
    )
    stopped_at(recipe, 2, monkeypatch)
    assert refused(recipe) == (
        f"output_dir: {directory} holds an unfinished run; go on with --resume, or start anew "
        "with --overwrite, or choose another with --set output_dir=DIR"
    )
    others = {
        "train.learning_rate": (2e-2, "was 0.01, is 0.02"),
        "train.seed": (1, "was 0, is 1"),
        "method.alpha": (8.0, "was 16.0, is 8.0"),
    }
    # What was measured before the first step would not compare with what is measured at the end.
    measured = {
        "evaluate.stride": (3, 'was "auto", is 3'),
        "generate.prompts": (["Other"], 'was [], is ["Other"]'),
    }
    for key, (value, difference) in (others | measured).items():
        text = refused(make(**{"train.max_steps": 3, key: value}), resume=True)
        assert (
            f"{directory}/checkpoints/step-00000002: belongs to another run ({key}: {difference})"
        ) in text
        assert text.endswith("start anew with --overwrite or another output_dir")

    other_text = tmp_path / "other.txt"
    other_text.write_text("Other lines.\nMore of them.\nAnd a third.\n", encoding="utf-8")
    changed = make(**{"train.max_steps": 3, "data.source": str(other_text)})
    assert '(data: was "' in refused(changed, resume=True)

    # None of these changes what is learned.
    free = {"train.log_every": 1, "train.eval_every": None, "train.keep_last": 1}
    free |= {"fit.micro_batch_size": 4, "output_dtype": "bf16"}
    run(make(**({"train.max_steps": 3} | free)), resume=True, display=QUIET)
    assert [line["step"] for line in metrics_of(directory)] == [1, 2, 3]
    assert refused(recipe) == (
        f"output_dir: {directory} holds a finished run; start anew with --overwrite, or choose "
        "another with --set output_dir=DIR"
    )
    assert refused(recipe, resume=True) == (
        f"output_dir: the run in {directory} is finished; --overwrite starts it anew"
    )


def test_overwrite_leaves_other_files_alone(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make(**{"train.max_steps": 3})
    directory = stopped_at(recipe, 2, monkeypatch)
    (directory / "notes.txt").write_text("mine", encoding="utf-8")
    (directory / "plots").mkdir()
    (directory / "plots" / "loss.csv").write_text("1,2", encoding="utf-8")
    (directory / "checkpoints" / "step-00000099").mkdir()
    changed = make(**{"train.max_steps": 1, "train.seed": 5})
    run(changed, overwrite=True, display=QUIET)
    assert (directory / "notes.txt").read_text(encoding="utf-8") == "mine"
    assert (directory / "plots" / "loss.csv").read_text(encoding="utf-8") == "1,2"
    assert [line["step"] for line in metrics_of(directory)] == [1]
    assert [path.name for path in list_checkpoints(directory / "checkpoints")] == [
        "step-00000000",
        "step-00000001",
    ]
    assert load_recipe(str(directory / "recipe.yaml")).train.seed == 5


def test_a_run_stopped_before_its_first_step_is_simply_run_again(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while the base is evaluated leaves nothing that stands in the way."""
    recipe = make(**{"train.max_steps": 1})

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(JOB, "score", stop)
        patch.setattr(JOB, "generate", stop)
        with pytest.raises(Interrupted, match="Nothing was begun in .*the same command begins"):
            run(recipe, display=QUIET)
    assert not Path(recipe.output_dir).exists()
    run(recipe, display=QUIET)
    assert (Path(recipe.output_dir) / "result.json").exists()


def test_a_run_stopped_after_its_last_step_is_finished(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By Ctrl-C in the last step, and again while the models are written."""
    recipe = make(**{"train.max_steps": 2})
    directory = stopped_at(recipe, 2, monkeypatch)

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(FINISH, "merge", stop)
        with pytest.raises(Interrupted, match="has the last state that was saved"):
            run(recipe, resume=True, display=QUIET)
    assert not (directory / "result.json").exists()
    result = run(recipe, resume=True, display=QUIET)
    assert (result.steps, result.optimizer_steps) == (2, 2)
    assert [line["step"] for line in metrics_of(directory)] == [1, 2]
    assert (directory / "merged" / "model.safetensors").exists()


def test_another_number_format_is_another_run(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without 16 bits computes in another format than the recipe names."""
    recipe = make(**{"train.precision": "bf16", "train.max_steps": 3})
    monkeypatch.setattr(BUILD, "has_fast_16_bit", lambda dtype: True)
    directory = stopped_at(recipe, 1, monkeypatch)
    monkeypatch.setattr(BUILD, "has_fast_16_bit", lambda dtype: False)
    with pytest.raises(CheckpointError) as error:
        run(recipe, resume=True, display=QUIET)
    assert (
        f"{directory}/checkpoints/step-00000001: belongs to another run "
        '(model.dtype: was "bf16", is "fp32"; train.precision: was "bf16", is "fp32")'
    ) in str(error.value)


def test_a_run_outside_the_main_thread(make: Make) -> None:
    """There signals belong to whoever started it."""
    recipe = make(**{"train.max_steps": 1})
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(run(recipe, display=QUIET)))
    thread.start()
    thread.join()
    assert found[0].steps == 1


# Through the command line


def invoke(*arguments: str | Path) -> Any:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_ctrl_c_on_the_command_line(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(**{"train.max_steps": 3})
    command = ("run", tmp_path / "run.yaml", "--quiet")
    with monkeypatch.context() as patch:
        act_at(patch, 2, lambda: signal.raise_signal(signal.SIGINT))
        stopped = invoke(*command)
    assert stopped.exit_code == 130
    assert stopped.stderr == (
        f"error: stopped after step 2 of 3, state saved in {tmp_path / 'run' / 'checkpoints'}; "
        "the same command with --resume goes on\n"
    )
    assert invoke(*command).exit_code == 5
    assert invoke(*command, "--resume").exit_code == 0
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == [1, 2, 3]
    assert invoke(*command, "--resume").exit_code == 5
    assert invoke(*command, "--overwrite").exit_code == 0


def test_a_second_ctrl_c_stops_at_once(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(**{"train.max_steps": 4, "train.save_every": 1})
    handler = signal.getsignal(signal.SIGINT)

    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    command = ("run", tmp_path / "run.yaml", "--quiet")
    with monkeypatch.context() as patch:
        act_at(patch, 3, twice)
        stopped = invoke(*command)
    assert (stopped.exit_code, stopped.stderr) == (
        130,
        f"error: Stopped; {tmp_path / 'run' / 'checkpoints'} has the last state that was saved, "
        "and the same command with --resume goes on from it\n",
    )
    assert signal.getsignal(signal.SIGINT) is handler
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == [1, 2]
    assert invoke(*command, "--resume").exit_code == 0
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == [1, 2, 3, 4]


def test_a_run_that_diverges(make: Make, tmp_path: Path) -> None:
    """Exit code 8, the true losses in the log (null where NaN), and a checkpoint without NaN."""
    make(
        **{
            "train.optimizer": "sgd",
            "train.learning_rate": 1e30,
            "train.max_grad_norm": None,
            "train.eval_every": None,
        }
    )
    spoiled = invoke("run", tmp_path / "run.yaml", "--quiet")
    directory = tmp_path / "run"
    assert spoiled.exit_code == 8
    lines = metrics_of(directory)
    bad = [line["step"] for line in lines if line["skipped"] == "nonfinite"]
    assert bad == [2, 3, 4]
    assert spoiled.stderr == (
        "error: step 4: the loss was not finite 3 steps in a row; the weights are still those of "
        "the last good step. Lower train.learning_rate, or use train.precision: bf16 or fp32 "
        "instead of fp16\n"
    )
    assert [line["loss"] is None for line in lines] == [False, True, True, True]
    assert math.isfinite(lines[0]["loss"])
    assert "NaN" not in (directory / "metrics.jsonl").read_text(encoding="utf-8")
    newest = list_checkpoints(directory / "checkpoints")[-1]
    assert newest.name == "step-00000004"
    trained = load_file(newest / "trained.safetensors")
    assert all(tensor.isfinite().all() for tensor in trained.values())
    for name in ("adapter", "merged", "result.json"):
        assert not (directory / name).exists()
    assert invoke("run", tmp_path / "run.yaml", "--quiet").exit_code == 5
    assert invoke("run", tmp_path / "run.yaml", "--quiet", "--resume").exit_code == 8
