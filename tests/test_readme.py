"""What the README and the recipes' headers tell people to type is what the command takes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

import lowvram
from lowvram.cli import main
from lowvram.recipe import load_recipe, parse_set

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))


def commands(text: str) -> list[str]:
    """Lines that call lowvram, without their comments."""
    found = []
    for line in text.splitlines():
        line = re.sub(r"^#\s+", "", line.strip())
        match = re.match(r"(?:\S*[/\\])?lowvram\s+(?!\()(.*)", line)
        if match and not line.startswith("lowvram:"):
            found.append(match.group(1).replace("\\", "/"))
    return found


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def parse(arguments: list[str]) -> click.Context:
    """The context that click makes of a command line; nothing is run."""
    context = main.make_context("lowvram", list(arguments))
    command: click.Command = main
    rest = [*context._protected_args, *context.args]
    while isinstance(command, click.Group):
        name, subcommand, rest = command.resolve_command(context, rest)
        assert subcommand is not None
        command = subcommand
        context = command.make_context(name, rest, parent=context)
        rest = [*context._protected_args, *context.args]
    return context


README_COMMANDS = [c for language in ("sh", "bat") for b in blocks(language) for c in commands(b)]


def test_the_readme_has_commands() -> None:
    assert len(README_COMMANDS) >= 10


@pytest.mark.parametrize("command", README_COMMANDS)
def test_commands_of_the_readme_parse(command: str) -> None:
    context = parse(shlex.split(command, comments=True))
    assert context.info_name is not None


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_commands_of_recipe_headers_parse_and_load(path: Path) -> None:
    header = path.read_text(encoding="utf-8").split("\nmodel:")[0]
    [command] = [c for c in commands(header) if c.startswith("run recipes/")]
    context = parse(shlex.split(command))
    assert context.params["recipe"] == f"recipes/{path.name}"
    load_recipe(str(path), dict(parse_set(setting) for setting in context.params["settings"]))


@pytest.mark.parametrize("block", blocks("yaml"))
def test_recipes_of_the_readme_load(block: str, tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text(block, encoding="utf-8")
    assert load_recipe(str(path)).output_dir == "runs/my"


SIMULATING, PYTHON = (
    [block for block in blocks("python") if ("lowvram.memory" in block) is simulates]
    for simulates in (True, False)
)


@pytest.mark.parametrize("block", SIMULATING)
def test_simulations_of_the_readme_run(
    block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})
    assert capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"trace.pickle", "trace.html"}


@pytest.mark.parametrize("block", PYTHON)
def test_library_use_of_the_readme_names_what_is_there(block: str) -> None:
    compile(block, "README.md", "exec")
    names = set(re.findall(r"lowvram\.(\w+)", block))
    assert names
    assert names <= set(lowvram.__all__)


def test_keys_named_in_the_readme_exist() -> None:
    from lowvram.recipe import Recipe

    sections = {name: field.annotation for name, field in Recipe.model_fields.items()}
    for section, key in re.findall(r"`(\w+)\.(\w+)`", README):
        if section in sections and f"{section}.{key}" != "model.safetensors":
            assert key in sections[section].model_fields, f"{section}.{key}"  # type: ignore[union-attr]
