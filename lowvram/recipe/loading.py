"""From a file, a shipped name or a mapping to a Recipe, with every problem named in one error."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lowvram.errors import RecipeError
from lowvram.recipe.problems import (
    describe_errors,
    known_keys,
    section_keys,
    show,
    show_path,
    unknown_key,
)
from lowvram.recipe.schema import ADAPTER_KEYS, Recipe, conflicts
from lowvram.recipe.shipped import recipe_text
from lowvram.recipe.text import Document, KeyPath, Problem, dump_yaml, parse_yaml

MAX_BYTES = 2**20


def load_recipe(
    path_or_name: str | os.PathLike[str], overrides: Mapping[str, Any] | None = None
) -> Recipe:
    """The recipe in a YAML file, or the shipped one of that name.

    `overrides` maps dotted keys to values that win over the file's: {"train.epochs": 1}.
    """
    given = os.fspath(path_or_name)
    if _is_path(given):
        label, text = given, _read(given)
    else:
        label, text = f"{given}.yaml", recipe_text(given)
    document = parse_yaml(text)
    default = {"output_dir": f"runs/{Path(label).stem}"}
    return _assemble(document, overrides or {}, label=label, defaults=default)


def with_overrides(recipe: Recipe, overrides: Mapping[str, Any]) -> Recipe:
    """A copy with some keys set, checked like a file; the others stay set or unset."""
    values = recipe.model_dump(mode="json", exclude_unset=True)
    document = Document(values=values, lines={}, problems=[])
    return _assemble(document, overrides, label="recipe")


def parse_set(argument: str) -> tuple[str, Any]:
    """Key and value of a command line's KEY=VALUE; the value is read as YAML, as in a file."""
    key, equals, text = argument.partition("=")
    if not equals or not key.strip():
        raise RecipeError(
            f"--set {show(argument)}: write KEY=VALUE, such as --set train.learning_rate=1e-3"
        )
    document = parse_yaml(text)
    if document.problems:
        if text[:1] in tuple("[{\"'&*!"):
            raise RecipeError(f"--set {key.strip()}: {document.problems[0].message}")
        # `||` or `a: b: c`: no YAML, yet plainly a text. The shell has already eaten any quotes.
        return key.strip(), text
    return key.strip(), document.values


def dump_recipe(recipe: Recipe) -> str:
    """YAML with every setting, defaults included, that loads back as an equal recipe."""
    values = recipe.model_dump(mode="json")
    if recipe.method.name == "full":
        # Loading refuses them, since they would do nothing.
        for key in ADAPTER_KEYS:
            del values["method"][key]
    return dump_yaml(values)


def recipe_sha256(recipe: Recipe) -> str:
    """The same for equal recipes, whatever the order, spelling and comments of their files."""
    text = json.dumps(recipe.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _is_path(text: str) -> bool:
    separators = [separator for separator in (os.sep, os.altsep) if separator]
    return (
        text.endswith((".yaml", ".yml"))
        or any(separator in text for separator in separators)
        or Path(text).is_file()
    )


def _read(path: str) -> str:
    try:
        mode = os.stat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            # A pipe without a writer would never open, a terminal never end.
            raise RecipeError(f"{path}: not a regular file; save the recipe as a file")
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such file. Shipped recipes: lowvram recipes list") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError:
        raise RecipeError(f"{show(path)}: not a file name") from None
    if len(content) > MAX_BYTES:
        raise RecipeError(f"{path}: larger than 1 MiB; a recipe is a page of text")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise RecipeError(f"{path}:{line}: not UTF-8 text; save the file as UTF-8") from None


def _assemble(
    document: Document,
    overrides: Mapping[str, Any],
    *,
    label: str,
    defaults: Mapping[str, Any] | None = None,
) -> Recipe:
    problems = list(document.problems)
    values = {} if document.values is None else document.values
    if not isinstance(values, dict):
        message = f"found {show(values)}, allowed: keys such as model, data and train"
        problems.append(Problem(path=(), message=message))
    if not document.complete or not isinstance(values, dict):
        raise _error(problems, document.lines, {}, label)
    values = {**(defaults or {}), "model": {}, "data": {}, **_without_null_sections(values)}
    problems += _override(values, overrides)
    recipe, found = _validate(values, ignore={problem.path[:2] for problem in problems})
    if problems or found or recipe is None:
        raise _error(problems + found, document.lines, overrides, label)
    return recipe


def _without_null_sections(values: Mapping[str, Any]) -> dict[str, Any]:
    """A section whose keys are all commented out is null, and meant to be empty."""
    return {
        key: {} if value is None and section_keys(key) else value for key, value in values.items()
    }


def _override(values: dict[str, Any], overrides: Mapping[str, Any]) -> list[Problem]:
    """Put the overrides into `values`; the keys that there are not come back as problems."""
    problems = []
    for key, value in overrides.items():
        section, _, name = key.rpartition(".")
        if key not in known_keys():
            problems.append(Problem(path=(key,), message=unknown_key(key)))
        elif not section:
            values[name] = value
        elif isinstance(keys := values.get(section, {}), dict):
            values[section] = {**keys, name: value}
    return problems


def _validate(values: dict[str, Any], ignore: set[KeyPath]) -> tuple[Recipe | None, list[Problem]]:
    """The recipe if there is one, and what is wrong: with single keys, then between keys.

    Problems of the keys in `ignore` are known already.
    """
    recipe: Recipe | None
    problems: list[Problem] = []
    try:
        recipe = Recipe.model_validate(values, context="conflicts later")
    except ValidationError as error:
        found = describe_errors(error.errors(include_url=False), values)
        problems = [item for item in found if not {item.path[:1], item.path[:2]} & ignore]
        ignore = ignore | {problem.path[:2] for problem in found}
        recipe = _rest(values, ignore)
    problems += [
        Problem(path=tuple(conflict.keys[0].split(".")), message=conflict.message)
        for conflict in (conflicts(recipe) if recipe else ())
        if not ignore & {tuple(key.split(".")) for key in conflict.keys}
    ]
    return recipe, problems


def _rest(values: dict[str, Any], bad: set[KeyPath]) -> Recipe | None:
    """A stand-in recipe of the keys that are fine, so that conflicts between them are found too."""
    kept = {
        name: {key: value for key, value in keys.items() if (name, key) not in bad}
        if isinstance(keys, dict)
        else keys
        for name, keys in values.items()
        if (name,) not in bad
    }
    for section, key in (("model", "name"), ("data", "source")):
        kept[section] = {key: "-", **kept.get(section, {})}
    try:
        return Recipe.model_validate(kept, context="conflicts later")
    except ValidationError:
        return None


def _error(
    problems: list[Problem], lines: Mapping[KeyPath, int], overrides: Mapping[str, Any], label: str
) -> RecipeError:
    def line_of(problem: Problem) -> int | None:
        return problem.line or lines.get(problem.path) or lines.get(problem.path[:2])

    def words(problem: Problem) -> str:
        path = show_path(problem.path)
        key = ".".join(str(part) for part in problem.path[:2])
        if key in overrides and problem.line is None:
            return f"--set {path}: {problem.message}"
        line = line_of(problem)
        place = f"{label}:{line}: " if line else f"{label}: "
        return place + (f"{path}: " if path else "") + problem.message

    ordered = sorted(problems, key=lambda problem: line_of(problem) or 2**31)
    return RecipeError("\n".join(words(problem) for problem in ordered))
