"""The peaks in the headers of the recipes are what the probe predicts."""

from __future__ import annotations

import re

import pytest

from lowvram.fit import fit
from lowvram.memory import find_card
from lowvram.memory.measure import GIB
from lowvram.model import context_length, known_config
from lowvram.prediction import predictor
from lowvram.recipe import list_recipes, load_recipe, recipe_text

PEAK = re.compile(
    r"^# Peak: +([\d.]+) GiB, predicted for (\d+) rows of ([\d,]+) tokens at a time on an "
    r"RTX 4070 Ti\.$",
    re.MULTILINE,
)


@pytest.mark.parametrize("name", [name for name, _ in list_recipes()])
def test_headers_tell_the_predicted_peak(name: str) -> None:
    found = PEAK.findall(recipe_text(name))
    assert len(found) == 1
    recipe = load_recipe(name)
    positions = context_length(known_config(recipe.model.name))

    with predictor(find_card("rtx-4070-ti")) as predict:
        chosen = fit(recipe, context_length=positions, longest_document=positions, predict=predict)

    assert chosen.predicted_reserved_bytes is not None
    assert found[0] == (
        f"{chosen.predicted_reserved_bytes / GIB:.2f}",
        str(chosen.micro_batch_size),
        f"{chosen.max_seq_len:,}",
    )
