"""lowvram as a library: its public names, and the uses that the README shows."""

from __future__ import annotations

import ast
import importlib
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lowvram

SOURCE = Path(lowvram.__file__)


def fresh(code: str) -> str:
    """What the code prints in a new process."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_public_names_are_sorted_and_each_is_there() -> None:
    assert list(lowvram.__all__) == sorted(set(lowvram.__all__))
    for name in lowvram.__all__:
        assert not isinstance(getattr(lowvram, name), ModuleType), name
    assert {"load_recipe", "run", "train"} <= set(lowvram.__all__)
    assert set(lowvram.__all__) <= set(dir(lowvram))


def test_public_names_are_the_objects_of_their_modules() -> None:
    """As type checkers see them: what TYPE_CHECKING imports is what is loaded on first use."""
    tree = ast.parse(SOURCE.read_text(encoding="utf-8"))
    [block] = [
        node
        for node in tree.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    declared = {
        alias.asname or alias.name: (node.module, alias.name)
        for node in block.body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }

    assert set(declared) == set(lowvram.__all__)
    for name, (module, original) in declared.items():
        assert getattr(lowvram, name) is getattr(importlib.import_module(module), original)


def test_names_stay_after_their_modules_are_imported() -> None:
    """`lowvram.run` is a function and also the name of a submodule."""
    for name in ("run", "merge", "plan", "build", "train"):
        module = importlib.import_module(f"lowvram.{name}")
        assert callable(getattr(lowvram, name))
        assert getattr(lowvram, name) is getattr(module, name)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="^module 'lowvram' has no attribute 'nonsense'$"):
        _ = lowvram.nonsense
    assert not hasattr(lowvram, "nonsense")


def test_the_import_and_a_recipe_cost_no_torch() -> None:
    code = (
        "import sys, lowvram\n"
        "lowvram.load_recipe('gpt2-lora', overrides={'train.max_steps': 10})\n"
        "lowvram.Recipe, lowvram.LowVRAMError, dir(lowvram)\n"
        "print(sorted({'torch', 'transformers', 'peft', 'numpy'} & set(sys.modules)))\n"
    )

    assert fresh(code) == "[]\n"


def test_the_package_is_typed_and_has_its_version() -> None:
    assert (SOURCE.parent / "py.typed").is_file()
    assert lowvram.__version__.count(".") == 2


def test_a_recipe_takes_overrides() -> None:
    recipe = lowvram.load_recipe("gpt2-lora", overrides={"train.max_steps": 10, "method.rank": 2})

    assert (recipe.train.max_steps, recipe.method.rank) == (10, 2)
    assert lowvram.load_recipe("gpt2-lora").train.max_steps is None
    with pytest.raises(lowvram.LowVRAMError, match=r"unknown key. Did you mean train.max_steps\?"):
        lowvram.load_recipe("gpt2-lora", overrides={"train.max_step": 10})


def test_a_run_from_a_shipped_recipe(gpt2_dir: Path, text_file: Path, tmp_path: Path) -> None:
    overrides = {
        "model.name": str(gpt2_dir),
        "data.source": str(text_file),
        "train.max_steps": 2,
        "train.learning_rate": 1e-2,
        "generate.max_new_tokens": 2,
        "output_dir": str(tmp_path / "run"),
    }

    result = lowvram.run(lowvram.load_recipe("gpt2-lora", overrides=overrides))

    assert isinstance(result, lowvram.RunResult)
    assert result.steps == 2
    base, merged = result.perplexity["base"], result.perplexity["merged"]
    assert base is not None
    assert merged is not None
    assert merged < base
    assert (tmp_path / "run" / "merged" / "model.safetensors").is_file()


def test_training_step_by_step_is_the_run(make_recipe: Callable[..., Any], tmp_path: Path) -> None:
    """plan, build and train are what `run` does: same losses, same weights, bit for bit."""
    recipe = make_recipe(**{"method.dropout": 0.1, "train.max_steps": 4})
    result = lowvram.run(recipe)

    plan = lowvram.plan(recipe)
    state = lowvram.build(recipe, total_steps=plan.total_steps)
    assert isinstance(plan, lowvram.Plan)
    assert isinstance(state, lowvram.TrainState)
    losses = []
    for metrics in lowvram.train(state, plan.windows()):
        assert isinstance(metrics, lowvram.StepMetrics)
        assert math.isfinite(metrics.loss)
        losses.append(metrics.loss)

    assert len(losses) == plan.total_steps == 4
    saved = load_file(Path(result.output_dir) / "adapter" / "adapter_model.safetensors")
    live = {name: p for name, p in state.model.named_parameters() if p.requires_grad}
    assert len(saved) == len(live) == 4
    for name, tensor in live.items():
        assert torch.equal(saved[name.replace(".default", "")], tensor)


def test_a_caller_may_stop_between_steps(make_recipe: Callable[..., Any]) -> None:
    plan = lowvram.plan(make_recipe())
    state = lowvram.build(make_recipe(), total_steps=plan.total_steps)

    for metrics in lowvram.train(state, plan.windows()):
        if metrics.step == 2:
            break

    assert state.step == state.optimizer_steps == 2
    [third] = lowvram.train(state, plan.windows(state.step))
    assert third.step == 3


def test_one_step_alone(make_recipe: Callable[..., Any]) -> None:
    plan = lowvram.plan(make_recipe())
    state = lowvram.build(make_recipe(), total_steps=plan.total_steps)

    metrics = lowvram.train_step(state, next(plan.windows()))

    assert metrics.step == metrics.optimizer_steps == 1
    assert metrics.target_tokens > 0


def test_merging_as_a_function(make_recipe: Callable[..., Any], tmp_path: Path) -> None:
    result = lowvram.run(make_recipe())

    proof = lowvram.merge(Path(result.output_dir) / "adapter", tmp_path / "again", dtype="fp32")

    again = load_file(tmp_path / "again" / "model.safetensors")
    merged = load_file(Path(result.output_dir) / "merged" / "model.safetensors")
    assert all(torch.equal(tensor, again[name]) for name, tensor in merged.items())
    assert proof.max_logit_difference <= proof.tolerance
