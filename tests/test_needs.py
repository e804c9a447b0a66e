"""Bounds on what the host has to have; `benchmarks/host_memory.py` measures them at full size."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lowvram.directory import RunDirectory
from lowvram.disk import size_of
from lowvram.display import Display
from lowvram.memory import find_card
from lowvram.needs import needs_of
from lowvram.plan import plan
from lowvram.recipe import dump_recipe, load_recipe
from lowvram.run import run

MIB, GIB = 2**20, 2**30


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_takes_less_disk_than_it_says(method: str, make_recipe: Any) -> None:
    changes = {"method.name": method, "train.optimizer": "adamw", "train.save_every": 1}
    if method == "lora":
        changes["method.rank"] = 64
    recipe = make_recipe(**changes)
    needs = needs_of(plan(recipe))
    run(recipe, display=Display(quiet=True))
    directory = RunDirectory(recipe.output_dir)
    large = sum(size_of(p) for p in (directory.checkpoints, directory.merged, directory.adapter))
    assert large < needs.disk_bytes < large + 17 * MIB + size_of(directory.checkpoints)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_run_takes_less_memory_than_it_says(make_recipe: Any, tmp_path: Path) -> None:
    recipe = make_recipe(**{"train.max_steps": 2})
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    script = """
import re, sys
from lowvram.recipe import load_recipe
from lowvram.run import run
run(load_recipe(sys.argv[1]))
print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""
    ended = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True
    )
    measured = int(ended.stdout.split()[-1]) * 1024
    limit = needs_of(plan(recipe)).memory_bytes
    said = re.search(r"host +up to ([\d.]+) GiB of memory, ([\d.]+) MiB of disk", ended.stdout)
    assert said is not None
    assert float(said[1]) * GIB == pytest.approx(limit, rel=0.01)
    assert limit / 4 < measured < limit


def test_offloading_pins_what_it_says(make_recipe: Any) -> None:
    """GPT-2 small: 12 blocks whose inputs are 8 rows of 1,024 tokens of 768 numbers in bf16."""
    card = find_card("rtx-4070-ti")
    recipe = load_recipe(
        "gpt2-lora",
        {
            "model.name": "embedded:gpt2-docstrings",
            "fit.micro_batch_size": 8,
            "fit.gradient_checkpointing": "offload",
            "data.source": "embedded:python-reference",
        },
    )
    planned = plan(recipe, elsewhere=card)
    tokens, hidden = 8 * planned.fit.max_seq_len, 128
    pinned = needs_of(planned).pinned_bytes
    kept = replace(planned, fit=replace(planned.fit, gradient_checkpointing=True))
    rows = needs_of(kept).pinned_bytes
    config = planned.fit.blocks * 2 * tokens * hidden
    assert rows < 4 * MIB
    assert pinned - rows >= config
    cpu = replace(planned, numerics=replace(planned.numerics, device=torch.device("cpu")))
    assert needs_of(cpu).pinned_bytes == 0


def test_little_memory_is_said_before_the_run(
    make_recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lowvram import job

    class Memory:
        available = 100 * MIB

    said: list[str] = []
    monkeypatch.setattr(job.psutil, "virtual_memory", lambda: Memory)
    display = Display(quiet=True)
    monkeypatch.setattr(display, "warn", said.append)
    run(make_recipe(**{"train.max_steps": 1}), display=display)
    assert any("of the host's memory, of which 100.0 MiB are free" in text for text in said)
