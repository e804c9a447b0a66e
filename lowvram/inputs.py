"""What a command would refuse at once, told in a moment: none of this imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lowvram.data import check_names
from lowvram.data.encoding import check_encoding
from lowvram.directory import RunDirectory
from lowvram.errors import RecipeError
from lowvram.memory.cards import find_card
from lowvram.names import local_directory
from lowvram.recipe import Recipe, parse_size

_PICTURES = (".png", ".html")


def check_start(recipe: Recipe, *, resume: bool, overwrite: bool) -> None:
    """The directory of a run may be written, and its inputs can be there.

    Raises CheckpointError, ModelError or DataError.
    """
    inputs = [recipe.model.name, *_sources(recipe)]
    RunDirectory(recipe.output_dir).check(resume=resume, overwrite=overwrite, inputs=inputs)
    check_inputs(recipe)


def check_inputs(recipe: Recipe) -> None:
    """The model and the data of a recipe can be what their names say; nothing is fetched.

    Raises ModelError or DataError.
    """
    check_model(recipe.model.name)
    check_data(_sources(recipe), recipe.data.encoding)


def check_model(name: str) -> None:
    """A directory of any kind, an embedded model or the id of one of the hub; or a ModelError."""
    local_directory(name)


def check_data(names: Sequence[str], encoding: str) -> None:
    """Names that can be read, and an encoding that there is; or a DataError."""
    check_encoding(encoding)
    check_names(names)


def check_card(gpu: str | None, vram: str | None) -> None:
    """A known card, or a size of memory; the error of a wrong one is that of its command."""
    if gpu is not None:
        find_card(gpu)
    if vram is not None:
        try:
            parse_size(vram)
        except ValueError as error:
            raise RecipeError(f"--vram: found {vram!r}; {error}") from error


def check_picture(path: Path) -> None:
    """A name that tells how to draw; or a RecipeError, minutes before there is what to draw."""
    suffix = path.suffix.lower()
    if suffix not in _PICTURES:
        raise RecipeError(
            f"{path}: found {suffix or 'no suffix'}, allowed .png and .html. "
            "Give a name that ends so"
        )


def _sources(recipe: Recipe) -> list[str]:
    """All names in `data.source` and `data.validation_source`, one or several each."""
    values = (recipe.data.source, recipe.data.validation_source)
    return [
        name for value in values for name in ((value,) if isinstance(value, str) else value or ())
    ]
