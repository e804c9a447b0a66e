"""What torments runs notices when one has come to harm."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from lowvram.display import Display
from lowvram.run import run

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
pytest.importorskip("resource", reason="chaos.py needs POSIX")
chaos, command, place = (import_module(name) for name in ("chaos", "chaos_command", "chaos_place"))


@pytest.fixture
def finished(make_recipe: Any) -> Path:
    recipe = make_recipe(**{"train.max_steps": 1})
    run(recipe, display=Display(quiet=True))
    return Path(recipe.output_dir)


def reference_of(directory: Path) -> Any:
    return place.Reference(end=place.end_of(directory), calls=1, seconds=1.0)


def test_a_run_that_came_through_is_let_pass(finished: Path) -> None:
    place.check_visible(finished, reference_of(finished))


@pytest.mark.parametrize(
    "file",
    [
        "adapter/adapter_model.safetensors",
        "merged/config.json",
        "checkpoints/step-00000001/optimizer.safetensors",
        "checkpoints/step-00000000/trained.safetensors",
        "start.json",
    ],
)
def test_one_altered_byte_is_noticed(file: str, finished: Path) -> None:
    reference = reference_of(finished)
    content = bytearray((finished / file).read_bytes())
    content[-3] ^= 1
    (finished / file).write_bytes(content)
    with pytest.raises(command.Failure):
        place.check_visible(finished, reference)


def test_an_altered_figure_is_noticed(finished: Path) -> None:
    reference = reference_of(finished)
    line = json.loads((finished / "metrics.jsonl").read_text())
    line["loss"] += 1e-12
    (finished / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(command.Failure, match="differs .*: metrics"):
        place.check_visible(finished, reference)


def test_half_a_model_is_noticed(finished: Path) -> None:
    reference = reference_of(finished)
    (finished / "result.json").unlink()
    (finished / "merged" / "vocab.json").unlink()
    with pytest.raises(command.Failure, match="merged is visible"):
        place.check_visible(finished, reference)
    shutil.rmtree(finished / "merged")
    place.check_visible(finished, reference)


@pytest.mark.parametrize(
    ("code", "said", "good"),
    [
        (0, "", True),
        (5, "error: x: cannot be written: No space left on device", True),
        (5, "note: skipped\nerror: x", True),
        (-signal.SIGKILL, "", True),
        (5, "", False),
        (1, "error: x", False),
        (5, "Traceback (most recent call last):\nerror: x", False),
        (-signal.SIGSEGV, "", False),
    ],
)
def test_how_a_command_may_end(code: int, said: str, good: bool) -> None:
    ended = command.Ended(code=code, said=said, calls=0, seconds=0.0)
    if good:
        place.check_said(ended)
    else:
        with pytest.raises(command.Failure):
            place.check_said(ended)


def test_every_kind_has_a_share() -> None:
    assert all(share > 0 for _, share in chaos.KINDS.values())
    rows = {"kills": chaos.Row(trials=2, kills=3), "faults": chaos.Row(trials=1, faults=1)}
    assert chaos.table(rows, 1, 5).splitlines()[-1] == "| all | 3 | 3 | 1 | 0 |"
