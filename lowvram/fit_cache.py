"""Fits that were measured on a card, remembered by everything that they depend on."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from lowvram import __version__
from lowvram.data import cache_directory
from lowvram.disk import replace_text
from lowvram.fit import Fit
from lowvram.measurement import Measurement
from lowvram.memory import Card
from lowvram.model import known_config
from lowvram.recipe import Recipe

_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")
_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "CUBLAS_WORKSPACE_CONFIG")


def remembered(
    recipe: Recipe, card: Card, lengths: tuple[int, int], search: Callable[[], Fit]
) -> Fit:
    """What `search` found before for the same recipe, card, data and versions, or finds now.

    A cache that cannot be read or written is as good as none.
    """
    path = cache_directory("fits") / f"{_key(recipe, card, lengths)}.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        values["measurement"] = Measurement(**values["measurement"])
        return Fit(**values)
    except (OSError, ValueError, TypeError, KeyError):
        found = search()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps(asdict(found), indent=2))
    except OSError:
        pass
    return found


def _key(recipe: Recipe, card: Card, lengths: tuple[int, int]) -> str:
    without = {"output_dir", "output_dtype", "generate", "evaluate"}
    parts: list[Any] = [
        recipe.model_dump(mode="json", exclude=without),
        known_config(recipe.model.name, recipe.model.revision).to_dict(),
        (card.name, card.total_bytes, card.budget(), card.compute_capability),
        lengths,
        [__version__, sys.version, torch.version.cuda, *(_version(name) for name in _LIBRARIES)],
        [os.environ.get(name) for name in _SETTINGS],
    ]
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return ""
