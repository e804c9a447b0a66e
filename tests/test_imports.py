"""The layers hold: imports point down only, and each third-party library has one home."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "lowvram"

LAYERS = {
    "errors": 0,
    "terminal": 0,
    "dropout": 0,
    "heap": 0,
    "attention": 1,
    "norms": 0,
    "frozen_block": 1,
    "int8": 0,
    "rounding": 0,
    "scratch": 0,
    "tensorwise": 1,
    "known_models": 1,
    "names": 1,
    "memory": 1,
    "safetensors_header": 0,
    "adapter_check": 1,
    "model_files": 1,
    "weight_check": 1,
    "weights": 1,
    "library_errors": 1,
    "recipe": 1,
    "data": 2,
    "model": 2,
    "folded_lora": 1,
    "adapters": 2,
    "optimizers": 2,
    "disk": 1,
    "interrupts": 0,
    "random_state": 0,
    "directory": 2,
    "loss": 2,
    "inputs": 3,
    "train": 3,
    "metric": 1,
    "perplexity": 3,
    "generate": 3,
    "checkpoint": 4,
    "checkpointing": 2,
    "build": 4,
    "merge": 4,
    "display": 4,
    "inference": 5,
    "rehearsal": 5,
    "measurement": 6,
    "prediction": 6,
    "frontier": 7,
    "prices": 3,
    "levers": 7,
    "target": 7,
    "fit": 8,
    "fit_cache": 9,
    "probe": 10,
    "probe_report": 11,
    "report": 5,
    "doctor": 5,
    "plan": 10,
    "needs": 11,
    "job": 12,
    "training": 13,
    "finish": 13,
    "run": 14,
    "cli": 15,
    "__main__": 16,
}

# Third-party package -> the only modules of ours that may import it.
HOMES = {
    "peft": {"adapters", "folded_lora"},
    "bitsandbytes": {"optimizers", "int8"},
    "evaluate": {"metric"},
    "datasets": {"data"},
    "ruamel": {"recipe"},
    "pydantic": {"recipe"},
    "click": {"cli"},
}


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def imports(path: Path) -> set[str]:
    """All dotted module names that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            if node.module == "lowvram":
                found.update(f"lowvram.{alias.name}" for alias in node.names)
    return found


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down_only(path: Path) -> None:
    home = module_of(path)
    for name in imports(path):
        if not name.startswith("lowvram.") or name == "lowvram.__version__":
            continue
        target = name.split(".")[1]
        if target == home:
            continue  # within one sub-package
        assert LAYERS[target] < LAYERS[home], f"{home} must not import {target}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_third_party_libraries_have_one_home(path: Path) -> None:
    for name in imports(path):
        allowed = HOMES.get(name.split(".")[0])
        assert allowed is None or module_of(path) in allowed, f"{name} in {path.name}"


@pytest.mark.parametrize(
    "statement",
    ["import lowvram", "import lowvram.cli", "import lowvram.recipe", "import lowvram.inputs"],
)
def test_import_costs_no_torch(statement: str) -> None:
    heavy = "{'torch', 'transformers', 'peft'}"
    code = f"import sys; {statement}; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True
    )
    assert result.stdout.strip() == "[]"
