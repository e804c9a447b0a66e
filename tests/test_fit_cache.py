"""A measured fit is found again for the same everything, and for nothing else."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes import MIB, measurement, save_without_weights

from lowvram.data import cache_directory
from lowvram.errors import DoesNotFit
from lowvram.fit import Fit
from lowvram.fit_cache import remembered
from lowvram.memory import Card, card_of_size, find_card
from lowvram.prediction import with_budget
from lowvram.recipe import Recipe

MakeRecipe = Callable[..., Recipe]

LENGTHS = (64, 40)
CARD = find_card("rtx-4070-ti")
FOUND = Fit(
    micro_batch_size=4,
    max_seq_len=64,
    gradient_checkpointing=False,
    blocks=2,
    gradient_accumulation_steps=2,
    reason="predicted peak 46.0 MiB of 60.0 MiB, measured 46.0 MiB",
    predicted_reserved_bytes=46 * MIB,
    predicted_allocated_bytes=26 * MIB,
    budget_bytes=60 * MIB,
    measurement=measurement(46 * MIB, tokens_per_second=1234.5),
)


class Search:
    def __init__(self, found: Fit = FOUND) -> None:
        self.found = found
        self.count = 0

    def __call__(self) -> Fit:
        self.count += 1
        return self.found


def is_known(recipe: Recipe, card: Card = CARD, lengths: tuple[int, int] = LENGTHS) -> bool:
    search = Search()
    assert remembered(recipe, card, lengths, search) == FOUND
    return search.count == 0


def cached() -> Path:
    [path] = cache_directory("fits").iterdir()
    return path


@pytest.fixture
def known(make_recipe: MakeRecipe) -> Recipe:
    """A recipe whose fit is in the cache."""
    recipe = make_recipe()
    assert not is_known(recipe)
    return recipe


def test_what_was_found_is_found_again(known: Recipe) -> None:
    """Figures and all, as often as one asks."""
    assert is_known(known)
    assert is_known(known)
    assert json.loads(cached().read_text()) == dataclasses.asdict(FOUND)


@pytest.mark.parametrize(
    "changes",
    [
        {"generate.max_new_tokens": 9},
        {"generate.prompts": ["The quick"]},
        {"output_dir": "elsewhere"},
        {"output_dtype": "bf16"},
        {"evaluate.max_tokens": 99},
    ],
    ids=str,
)
def test_what_comes_after_the_training_does_not_matter(
    known: Recipe, make_recipe: MakeRecipe, changes: dict[str, Any]
) -> None:
    assert is_known(make_recipe(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"method.rank": 4},
        {"method.name": "full"},
        {"train.global_batch_size": 8},
        {"train.optimizer": "adamw"},
        {"train.chunked_loss": False},
        {"model.dtype": "nf4"},
        {"model.fused_gelu": False},
        {"data.packing": False},
        {"fit.micro_batch_size": 2},
        {"fit.max_seq_len": 32},
        {"fit.headroom": "1MiB"},
        {"fit.vram": "1GiB"},
    ],
    ids=str,
)
def test_another_recipe_is_another_question(
    known: Recipe, make_recipe: MakeRecipe, changes: dict[str, Any]
) -> None:
    assert not is_known(make_recipe(**changes))
    assert is_known(make_recipe(**changes))
    assert is_known(known)


@pytest.mark.parametrize(
    "card",
    [
        find_card("rtx-4070-ti-super"),
        with_budget(CARD, CARD.budget() - 64 * MIB),
        card_of_size(CARD.budget()),
        dataclasses.replace(CARD, compute_capability=(12, 0)),
    ],
    ids=lambda card: f"{card.name} {card.budget()}",
)
def test_so_is_another_card_or_less_of_it(known: Recipe, card: Card) -> None:
    assert not is_known(known, card)
    assert is_known(known)


@pytest.mark.parametrize("lengths", [(128, 40), (64, 41)])
def test_so_are_other_data(known: Recipe, lengths: tuple[int, int]) -> None:
    """The model's positions, and the tokens of the longest document."""
    assert not is_known(known, lengths=lengths)


def test_so_are_other_versions(known: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowvram.fit_cache.version", lambda name: f"99 of {name}")
    assert not is_known(known)
    monkeypatch.setattr("lowvram.fit_cache.__version__", "99")
    assert not is_known(known)
    monkeypatch.setattr("torch.version.cuda", "99.1")
    assert not is_known(known)


@pytest.mark.parametrize(
    "name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "CUBLAS_WORKSPACE_CONFIG"]
)
def test_so_are_other_settings_of_the_allocator(
    known: Recipe, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "expandable_segments:True")
    assert not is_known(known)
    monkeypatch.delenv(name)
    assert is_known(known)


def test_another_model_in_the_same_directory_is_another_model(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    recipe = make_recipe(**{"model.name": str(tmp_path / "model")})
    save_without_weights(tmp_path / "model")
    assert not is_known(recipe)
    assert is_known(recipe)

    save_without_weights(tmp_path / "model", n_layer=5)

    assert not is_known(recipe)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '"fit"',
        "{}",
        '{"measurement": null}',
        '{"measurement": {}}',
        '{"measurement": {"fits": true}, "micro_batch_size": 4}',
        '{"measurement": {"fits": true, "unknown": 1}}',
    ],
)
def test_a_damaged_entry_is_none_and_is_replaced(known: Recipe, text: str) -> None:
    cached().write_text(text)

    assert not is_known(known)
    assert is_known(known)


def test_bytes_that_are_no_text_are_none_either(known: Recipe) -> None:
    cached().write_bytes(b"\xff\xfe\x00")

    assert not is_known(known)
    assert is_known(known)


def test_a_cache_that_cannot_be_written_is_done_without(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its directory is a file, or the entry's name that of a directory."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LOWVRAM_CACHE", str(tmp_path / "file"))
    assert not is_known(make_recipe())
    assert not is_known(make_recipe())

    monkeypatch.setenv("LOWVRAM_CACHE", str(tmp_path / "cache"))
    assert not is_known(make_recipe())
    path = cached()
    path.unlink()
    path.mkdir()
    assert not is_known(make_recipe())


def test_a_refusal_is_not_remembered(make_recipe: MakeRecipe) -> None:
    def refuse() -> Fit:
        raise DoesNotFit("no")

    recipe = make_recipe()
    for _ in range(2):
        with pytest.raises(DoesNotFit):
            remembered(recipe, CARD, LENGTHS, refuse)
    assert not is_known(recipe)


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWVRAM_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "shared"))
    assert cache_directory("fits") == tmp_path / "own" / "fits"
    monkeypatch.delenv("LOWVRAM_CACHE")
    assert cache_directory("fits") == tmp_path / "shared" / "lowvram" / "fits"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory("fits") == tmp_path / ".cache" / "lowvram" / "fits"
