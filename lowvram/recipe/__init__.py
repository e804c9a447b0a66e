"""Recipes: the YAML file that fixes a run. Loads without torch, in well under a second."""

from lowvram.recipe.loading import (
    dump_recipe,
    load_recipe,
    parse_set,
    recipe_sha256,
    with_overrides,
)
from lowvram.recipe.schema import Recipe, TrainSection, parse_size
from lowvram.recipe.shipped import list_recipes, recipe_text

__all__ = [
    "Recipe",
    "TrainSection",
    "dump_recipe",
    "list_recipes",
    "load_recipe",
    "parse_set",
    "parse_size",
    "recipe_sha256",
    "recipe_text",
    "with_overrides",
]
