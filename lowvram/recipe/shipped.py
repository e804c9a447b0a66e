"""The recipes that come with the package: inside the wheel, or beside it in a source checkout."""

from __future__ import annotations

import difflib
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from lowvram.errors import RecipeError


def list_recipes() -> list[tuple[str, str]]:
    """Name and one-line description of each, sorted by name."""
    return [(name, _description(file.read_text("utf-8"))) for name, file in _shipped().items()]


def recipe_text(name: str) -> str:
    """The YAML of a shipped recipe, comments and all."""
    shipped = _shipped()
    if name in shipped:
        return shipped[name].read_text("utf-8")
    close = difflib.get_close_matches(name, shipped, n=3, cutoff=0.5)
    guess = f" Did you mean {' or '.join(close)}?" if close else ""
    raise RecipeError(
        f"{ascii(name)[1:-1][:80]}: no recipe of that name.{guess} "
        "See lowvram recipes list; for a file, write a name that ends in .yaml"
    )


def _shipped() -> dict[str, Traversable]:
    package = files("lowvram")
    folder = package / "recipes"
    if not folder.is_dir():
        folder = Path(str(package)).parent / "recipes"
    if not folder.is_dir():
        return {}
    found = {
        file.name.removesuffix(".yaml"): file
        for file in folder.iterdir()
        if file.name.endswith(".yaml")
    }
    return dict(sorted(found.items()))


def _description(text: str) -> str:
    """The first line of the header comment."""
    return text.partition("\n")[0].lstrip("# ").strip()
