"""What scripts/check finds in pins and audits, and that the pins of this repository are right."""

# ruff: noqa: E501 (a row of a table stands on one line)

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"script_{name}", ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check_pins: Any = script("check_pins")
audit: Any = script("audit")


# --- pins -------------------------------------------------------------------------------------

INSTALLED = {
    "a": ("1.5", ["b>=2", "c; extra == 'more'", "d; python_version < '3'", "pip"]),
    "b": ("2.0+cpu", []),
    "c": ("3", ["a"]),
}


def problems(direct: list[str], pins: str) -> list[str]:
    found = check_pins.wrong(
        [Requirement(text) for text in direct], check_pins.read_pins(pins), INSTALLED.get
    )
    return sorted(found)


@pytest.mark.parametrize(
    ("direct", "pins", "expected"),
    [
        (["a>=1"], "a==1.5\nb==2.0", []),
        (["a>=1"], "# a comment\n\nA==1.5\nb==2.0  # why", []),
        (["a>=1"], "a==1.5", ["b: a needs it and constraints.txt does not pin it"]),
        (["a>=2"], "a==1.5\nb==2.0", ["a: pinned at 1.5, and pyproject.toml needs >=2"]),
        (["a"], "a==1.5\nb==1", ["b: pinned at 1, and 2.0+cpu is installed", "b: pinned at 1, and a needs >=2"]),
        (["a"], "a==1.4\nb==2.0", ["a: pinned at 1.4, and 1.5 is installed"]),
        (["a[more]"], "a==1.5\nb==2.0", ["c: a needs it and constraints.txt does not pin it"]),
        (["a", "c"], "a==1.5\nb==2.0\nc==3", []),
        (["a", "x"], "a==1.5\nb==2.0\nx==1", ["x: pyproject.toml needs it and it is not installed"]),
        (["a; python_version < '3'"], "", []),
    ],
)  # fmt: skip
def test_what_is_wrong_with_pins(direct: list[str], pins: str, expected: list[str]) -> None:
    assert problems(direct, pins) == expected


def test_extras_count_and_the_project_itself_does_not() -> None:
    project = {
        "name": "me",
        "dependencies": ["a>=1"],
        "optional-dependencies": {"plot": ["b"], "dev": ["me[plot]", "c>=3"]},
    }

    assert [str(found) for found in check_pins.direct_requirements(project)] == [
        "a>=1",
        "b",
        "c>=3",
    ]


def test_the_pins_of_this_repository() -> None:
    """Against the environment of the tests, which may have builds but no versions of its own."""
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "check_pins.py"], capture_output=True, text=True
    )

    assert (done.returncode, done.stderr) == (0, "")
    count = sum("==" in line for line in (ROOT / "constraints.txt").read_text().splitlines())
    assert done.stdout == f"pins: all {count} are right\n"


def test_the_lowest_pins_are_the_lower_bounds() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    direct = check_pins.direct_requirements(project)
    bounds = {
        canonicalize_name(wanted.name): Version(bound.version)
        for wanted in direct
        for bound in wanted.specifier
        if bound.operator == ">="
    }

    lowest = check_pins.read_pins((ROOT / "constraints-lowest.txt").read_text("utf-8"))
    assert lowest == bounds
    assert len(direct) == len(bounds)  # none is without a bound


# --- the audit --------------------------------------------------------------------------------

SKIPPED = {"name": "a", "skip_reason": "Dependency not found on PyPI"}
FINE = {"name": "b", "version": "1", "vulns": []}
BAD = {"name": "c", "version": "2", "vulns": [{"id": "PYSEC-1", "fix_versions": ["3"]}]}


def run_audit(
    monkeypatch: pytest.MonkeyPatch, answers: dict[str, list[dict[str, Any]] | None]
) -> int:
    def answer(command: list[Any], **_: object) -> Any:
        records = answers[command[command.index("-s") + 1]]
        text = "" if records is None else json.dumps({"dependencies": records})
        return SimpleNamespace(stdout=text)

    monkeypatch.setattr(audit.subprocess, "run", answer)
    code: int = audit.main()
    return code


def test_a_vulnerability_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_audit(monkeypatch, {"pypi": [SKIPPED, FINE, BAD]}) == 1
    out, err = capsys.readouterr()
    assert err == "c 2: PYSEC-1, fixed in 3\n"
    assert out == "audit: pypi knows 2 of 3 packages, and 1 vulnerabilities of them\n"


def test_a_database_that_knows_nothing_is_not_asked_last(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_audit(monkeypatch, {"pypi": [SKIPPED], "osv": [FINE]}) == 0
    assert run_audit(monkeypatch, {"pypi": None, "osv": [BAD]}) == 1


def test_an_audit_that_could_not_be_done_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_audit(monkeypatch, {"pypi": [SKIPPED], "osv": None}) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "audit: NOT DONE: neither PyPI nor OSV could be asked from here\n"


def test_check_stops_at_the_first_failure(tmp_path: Path) -> None:
    """With tools of our own: each says its name, and one of them fails."""
    for name in ("ruff", "mypy", "python"):
        tool = tmp_path / name
        code = 3 if name == "mypy" else 0
        tool.write_text(f'#!/bin/sh\necho {name} "$@"\nexit {code}\n')
        tool.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"

    done = subprocess.run(
        [ROOT / "scripts" / "check"],
        capture_output=True,
        text=True,
        env=os.environ | {"PATH": path},
    )

    assert done.returncode == 3
    assert done.stdout.splitlines() == ["ruff check .", "ruff format --check .", "mypy"]
