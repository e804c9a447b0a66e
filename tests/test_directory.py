"""What a new run may replace, and what it may not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lowvram.directory import RunDirectory
from lowvram.display import Display
from lowvram.errors import CheckpointError
from lowvram.run import run

QUIET = Display(quiet=True)


def test_a_second_stage_does_not_remove_the_model_it_starts_from(
    make_recipe: Any, tmp_path: Path
) -> None:
    run(make_recipe(**{"train.max_steps": 1}), display=QUIET)
    merged = tmp_path / "run" / "merged"
    before = sorted(path.name for path in merged.iterdir())
    second = make_recipe(**{"model.name": str(merged), "train.max_steps": 1})
    with pytest.raises(CheckpointError, match="would replace .*merged, which it reads"):
        run(second, overwrite=True, display=QUIET)
    assert sorted(path.name for path in merged.iterdir()) == before


@pytest.mark.parametrize("name", ["metrics.jsonl", "recipe.yaml"])
def test_data_in_the_place_of_a_file_of_the_run_is_kept(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(CheckpointError, match=f"would replace .*{name}"):
        RunDirectory(tmp_path).check(
            resume=False, overwrite=True, inputs=[str(tmp_path / name), "gpt2"]
        )
    assert (tmp_path / name).read_text() == "mine"


def test_other_files_beside_the_run_may_be_read(tmp_path: Path) -> None:
    (tmp_path / "my.txt").write_text("mine")
    inputs = [str(tmp_path / "my.txt"), "embedded:gpt2-docstrings", "*.txt"]
    RunDirectory(tmp_path).check(resume=False, overwrite=True, inputs=inputs)


def test_resume_and_overwrite_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="give one of them"):
        RunDirectory(tmp_path).check(resume=True, overwrite=True)
