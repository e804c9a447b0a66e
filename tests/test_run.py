"""A run from recipe to result.json: it is whole, its figures are true, and each key acts."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import signal
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import lines, make_gpt2, save
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowvram.build import build
from lowvram.directory import RunDirectory
from lowvram.display import Display
from lowvram.errors import CheckpointError, DataError, Interrupted, LowVRAMError, ModelError
from lowvram.memory import card_of_size
from lowvram.model import weights_sha256
from lowvram.plan import plan
from lowvram.recipe import list_recipes, load_recipe, recipe_sha256
from lowvram.recipe.schema import Recipe, Section
from lowvram.report import RunResult
from lowvram.run import run

MakeRecipe = Callable[..., Any]


def quiet() -> Display:
    return Display(Console(file=io.StringIO()), quiet=True)


def go(recipe: Recipe, **options: Any) -> RunResult:
    return run(recipe, display=quiet(), **options)


def metrics_of(result: RunResult) -> list[dict[str, Any]]:
    text = (Path(result.output_dir) / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def adapter_of(result: RunResult) -> dict[str, torch.Tensor]:
    return load_file(Path(result.output_dir) / "adapter" / "adapter_model.safetensors")


def merged_of(result: RunResult) -> dict[str, torch.Tensor]:
    return load_file(Path(result.output_dir) / "merged" / "model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


# What comes out, for every kind of run


def check_output(result: RunResult, base: Path, *, method: str, held_out: bool = True) -> None:
    """The directory and result.json are whole, and the figures make sense."""
    directory = Path(result.output_dir)
    expected = {
        ".lock",
        "recipe.yaml",
        "start.json",
        "metrics.jsonl",
        "checkpoints",
        "adapter",
        "merged",
        "result.json",
    }
    assert {path.name for path in directory.iterdir()} == expected - (
        {"adapter"} if method == "full" else set()
    )
    saved = json.loads((directory / "result.json").read_text())
    assert saved == json.loads(json.dumps(result.to_json()))
    assert saved.keys() >= {
        "perplexity",
        "merge",
        "tokens_per_second",
        "memory",
        "steps",
        "tokens",
        "recipe_sha256",
        "versions",
        "samples",
    }
    assert set(saved["perplexity"]) == {"base", "adapter", "merged"}
    for value in saved["perplexity"].values():
        assert (value is not None and 1 < value < 1e5) if held_out else value is None
    assert 0 <= saved["merge"]["max_logit_difference"] < saved["merge"]["tolerance"] < 0.01
    assert saved["tokens_per_second"] > 0
    assert saved["memory"]["predicted_peak_bytes"] is None
    assert 2**26 < saved["memory"]["measured_peak_bytes"] < 2**36
    assert {"python", "torch", "transformers", "peft", "lowvram"} <= saved["versions"].keys()
    assert str(torch.__version__).startswith(saved["versions"]["torch"])
    assert len(saved["recipe_sha256"]) == 64
    steps = metrics_of(result)
    assert [step["step"] for step in steps] == list(range(1, saved["steps"] + 1))
    assert saved["tokens"] == sum(step["tokens"] for step in steps)
    assert all(math.isfinite(step["loss"]) and step["skipped"] is None for step in steps)
    base_tensors = load_file(base / "model.safetensors")
    merged = merged_of(result)
    assert merged.keys() == base_tensors.keys()
    assert not same(merged, base_tensors)
    assert {tensor.dtype for tensor in merged.values()} == {torch.float32}


KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"method.name": "rslora"},
    "dora": {"method.name": "dora"},
    "full": {"method.name": "full", "train.learning_rate": 1e-3},
    "int8": {"model.dtype": "int8"},
    "nf4": {"model.dtype": "nf4"},
    "bias": {"method.bias": "all"},
    "checkpointing": {"fit.gradient_checkpointing": True, "fit.micro_batch_size": 2},
    "everywhere": {"method.target_modules": "all-linear", "data.packing": False},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_every_kind_of_run(
    architecture: str, kind: str, make_recipe: MakeRecipe, request: Any
) -> None:
    base = request.getfixturevalue(f"{architecture}_dir")

    result = go(make_recipe(**{"model.name": str(base)}, **KINDS[kind]))

    check_output(result, base, method="full" if kind == "full" else "lora")
    perplexity = result.perplexity
    assert result.steps == 3
    if kind not in ("int8", "nf4"):  # their base has other weights than the merged model
        assert perplexity["merged"] == pytest.approx(perplexity["adapter"], rel=1e-4)
    assert perplexity["merged"] != pytest.approx(perplexity["base"], rel=1e-3)


def independent_perplexity(directory: Path, texts: list[str]) -> tuple[float, int]:
    """transformers alone, one document at a time, each with its end-of-text token."""
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    nll, count = 0.0, 0
    with torch.no_grad():
        for text in texts:
            ids = torch.tensor([tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]])
            nll += model(input_ids=ids, labels=ids).loss.double().item() * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
    return math.exp(nll / count), count


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_perplexities_are_those_of_transformers(
    architecture: str, make_recipe: MakeRecipe, tmp_path: Path, request: Any
) -> None:
    """On the held-out file, base and merged, to 1e-5 relative."""
    base = request.getfixturevalue(f"{architecture}_dir")
    texts = ["A quick plain checkpoint.", "Numbers jump over words.", "again, 8"]
    (tmp_path / "held-out.txt").write_text("\n".join(texts))

    result = go(
        make_recipe(
            **{"model.name": str(base), "data.validation_source": str(tmp_path / "held-out.txt")}
        )
    )

    before, count = independent_perplexity(base, texts)
    after, _ = independent_perplexity(Path(result.output_dir) / "merged", texts)
    assert result.perplexity["base"] == pytest.approx(before, rel=1e-5)
    assert result.perplexity["merged"] == pytest.approx(after, rel=1e-5)
    assert result.evaluation["tokens_scored"] == count
    assert result.evaluation["documents"] == 3


def test_a_run_learns(make_recipe: MakeRecipe) -> None:
    """Text that repeats itself: held-out perplexity falls below a third."""
    result = go(make_recipe(**{"train.max_steps": None, "train.learning_rate": 3e-2}))

    assert result.steps == 30
    assert result.perplexity["merged"] < result.perplexity["base"] / 3
    losses = [step["loss"] for step in metrics_of(result)]
    assert sum(losses[-3:]) < sum(losses[:3]) - 3


def test_one_more_time_it_is_the_same_run(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    first = go(make_recipe(output_dir=str(tmp_path / "one")))
    second = go(make_recipe(output_dir=str(tmp_path / "two")))

    assert same(adapter_of(first), adapter_of(second))
    assert first.perplexity == second.perplexity
    assert first.samples == second.samples
    losses = [[step["loss"] for step in metrics_of(result)] for result in (first, second)]
    assert losses[0] == losses[1]


# Data


def test_tables_and_lines_give_the_same_run(
    make_recipe: MakeRecipe, text_file: Path, tmp_path: Path
) -> None:
    texts = text_file.read_text().splitlines()
    with (tmp_path / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["number", "body"], *enumerate(texts)])
    rows = [json.dumps({"body": text, "number": i}) for i, text in enumerate(texts)]
    (tmp_path / "table.jsonl").write_text("\n".join(rows))

    found = {"txt": go(make_recipe(output_dir=str(tmp_path / "txt")))}
    for kind in ("csv", "jsonl"):
        changes = {"data.source": str(tmp_path / f"table.{kind}"), "data.text_column": "body"}
        found[kind] = go(make_recipe(output_dir=str(tmp_path / kind), **changes))

    assert same(adapter_of(found["csv"]), adapter_of(found["txt"]))
    assert same(adapter_of(found["jsonl"]), adapter_of(found["txt"]))
    assert found["csv"].perplexity == found["jsonl"].perplexity == found["txt"].perplexity


def decoded(recipe: Recipe) -> tuple[list[str], str]:
    """The text of each row of all epochs, and of what counts in the loss."""
    planned = plan(recipe)
    rows, targets = [], []
    for window in planned.windows():
        for batch in window:
            rows += [planned.tokenizer.decode(row) for row in batch.input_ids]
            targets.append(planned.tokenizer.decode(batch.labels[batch.labels != -100]))
    return rows, "".join(targets)


@pytest.mark.parametrize("as_table", [False, True], ids=["separator", "columns"])
def test_only_completions_are_learned(
    make_recipe: MakeRecipe, gpt2_dir: Path, tmp_path: Path, as_table: bool
) -> None:
    if as_table:
        data = {"data.source": str(tmp_path / "pairs.jsonl")}
        rows = [{"prompt": f"name[{i}]||", "completion": f"The dog {i}"} for i in range(20)]
        (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    else:
        data = {"data.source": str(tmp_path / "pairs.txt"), "data.separator": "||"}
        (tmp_path / "pairs.txt").write_text("\n".join(f"name[{i}]||The dog {i}" for i in range(20)))
    data |= {"data.loss_on": "completion", "train.max_steps": None, "train.epochs": 1}

    rows_, targets = decoded(make_recipe(**data))
    assert any("name[" in row for row in rows_)
    assert "The dog" in targets
    assert "name" not in targets
    assert "||" not in targets
    assert targets.count("<|endoftext|>") == 18

    result = go(make_recipe(**data))
    check_output(result, gpt2_dir, method="lora")
    both = go(make_recipe(**data | {"data.loss_on": "all", "output_dir": str(tmp_path / "all")}))
    assert not same(adapter_of(result), adapter_of(both))


@pytest.mark.parametrize("packing", [True, False])
def test_held_out_documents_are_never_trained_on(
    make_recipe: MakeRecipe, tmp_path: Path, packing: bool
) -> None:
    """Each document carries a marker; so do copies of documents, which stay on one side."""
    texts = [f"({n:03}) {text}" for n, text in enumerate(lines(60))]
    (tmp_path / "marked.txt").write_text("\n".join(texts + texts[:20]))
    recipe = make_recipe(
        **{
            "data.source": str(tmp_path / "marked.txt"),
            "data.validation_fraction": 0.3,
            "data.packing": packing,
            "train.max_steps": None,
            "evaluate.max_tokens": None,
        }
    )
    planned = plan(recipe)

    def markers(text: str) -> set[int]:
        return {n for n in range(60) if f"({n:03})" in text}

    held_out = set()
    for tokens, _, _ in planned.held_out():
        held_out |= markers(planned.tokenizer.decode(tokens))
    rows, _ = decoded(recipe)
    in_training = set().union(*map(markers, rows))

    assert 12 <= len(held_out) <= 24
    assert in_training == set(range(60)) - held_out


def test_text_that_is_held_out_elsewhere_is_not_trained_on(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    texts = [f"({n:03}) {text}" for n, text in enumerate(lines(30))]
    (tmp_path / "all.txt").write_text("\n".join(texts))
    (tmp_path / "held-out.txt").write_text("\n".join(texts[5:9]))
    changes = {
        "data.source": str(tmp_path / "all.txt"),
        "data.validation_source": str(tmp_path / "held-out.txt"),
        "train.max_steps": None,
        "train.epochs": 1,
    }

    rows, _ = decoded(make_recipe(**changes))
    result = go(make_recipe(**changes))

    seen = "".join(rows)
    assert [n for n in range(30) if f"({n:03})" not in seen] == [5, 6, 7, 8]
    assert "4 documents of data.source are held out too: not trained on" in result.notes
    assert result.evaluation["documents"] == 4


def test_nothing_held_out(make_recipe: MakeRecipe, gpt2_dir: Path) -> None:
    """No perplexity, but a merge, proven on text that was trained on."""
    result = go(make_recipe(**{"data.validation_fraction": 0, "generate.prompts": ["The quick"]}))

    check_output(result, gpt2_dir, method="lora", held_out=False)
    assert result.evaluation == {}
    assert result.merge["tokens"] > 1
    assert [sample["prompt"] for sample in result.samples] == ["The quick"]


def test_nothing_held_out_and_no_prompts(make_recipe: MakeRecipe) -> None:
    assert go(make_recipe(**{"data.validation_fraction": 0})).samples == []


def test_a_model_with_few_positions(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    base = save(make_gpt2(n_positions=16), tmp_path / "base")

    result = go(make_recipe(**{"model.name": str(base), "generate.max_new_tokens": 64}))

    check_output(result, base, method="lora")
    assert result.fit["max_seq_len"] == 16
    assert result.merge["tokens"] == 4 * 16
    assert "generate.max_new_tokens 64 leaves a prompt less than half" in " ".join(result.notes)


# Recipes that ship


@pytest.fixture(scope="session")
def long_gpt2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the positions of GPT-2, for recipes that ask for 512 of them."""
    return save(make_gpt2(n_positions=1024), tmp_path_factory.mktemp("models") / "long-gpt2")


@pytest.mark.parametrize("name", [name for name, _ in list_recipes()])
def test_recipes_that_ship_run(
    name: str, long_gpt2_dir: Path, llama_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    source = text_file
    base = llama_dir if name.startswith("llama") else long_gpt2_dir
    changes: dict[str, Any] = {}
    if name == "e2e-lora":
        source = tmp_path / "e2e.txt"
        pairs = [f"name : A{i} | food : B{i % 3}||A{i} serves B{i % 3}." for i in range(60)]
        source.write_text("\n".join(pairs))
        changes["fit.max_seq_len"] = 32
    changes |= {
        "model.name": str(base),
        "data.source": str(source),
        "train.max_steps": 2,
        "generate.max_new_tokens": 2,
        "output_dir": str(tmp_path / "run"),
    }
    recipe = load_recipe(name, changes)

    result = go(recipe)

    check_output(result, base, method=recipe.method.name)
    assert result.steps == 2
    expected = {
        "gpt2-large-int8-lora": "int8",
        "gpt2-xl-nf4-lora": "nf4",
        "llama-3b-nf4-lora": "nf4",
    }
    if name in expected:
        assert result.numerics["base_dtype"] == expected[name]


# The directory


def test_the_recipe_of_a_run_loads_back_and_pins_the_shape(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(**{"train.betas": [0.8, 0.99], "generate.prompts": ["a: b", "- c"]})
    assert recipe.fit.micro_batch_size == recipe.fit.max_seq_len == "auto"

    result = go(recipe)

    loaded = load_recipe(Path(result.output_dir) / "recipe.yaml")
    assert loaded.fit.model_dump() == {
        "micro_batch_size": 4,
        "max_seq_len": 64,
        "gradient_checkpointing": False,
        "vram": "auto",
        "headroom": "128MiB",
    }
    assert loaded.model_copy(update={"fit": recipe.fit}) == recipe
    assert result.recipe_sha256 == recipe_sha256(loaded)
    assert result.fit["gradient_accumulation_steps"] == 1


@pytest.mark.parametrize("kind", ["lora", "rslora", "full"])
def test_the_recipe_of_a_run_gives_the_same_run(
    kind: str, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    first = go(make_recipe(**KINDS[kind]))

    path = str(Path(first.output_dir) / "recipe.yaml")
    second = go(load_recipe(path, {"output_dir": str(tmp_path / "second")}))

    assert same(merged_of(first), merged_of(second))
    assert first.perplexity == second.perplexity


def test_the_adapter_knows_its_base(make_recipe: MakeRecipe, gpt2_dir: Path) -> None:
    result = go(make_recipe())

    facts = json.loads((Path(result.output_dir) / "adapter" / "base.json").read_text())

    assert facts == {
        "name": str(gpt2_dir),
        "revision": None,
        "sha256": weights_sha256(str(gpt2_dir)),
    }


def test_a_finished_run_is_not_overwritten(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    result = go(recipe)
    before = (Path(result.output_dir) / "result.json").read_text()

    with pytest.raises(CheckpointError) as error:
        go(recipe)
    assert str(error.value) == (
        f"output_dir: {result.output_dir} holds a finished run; start anew with --overwrite, or "
        "choose another with --set output_dir=DIR"
    )
    with pytest.raises(CheckpointError) as finished:
        go(recipe, resume=True)
    assert str(finished.value) == (
        f"output_dir: the run in {result.output_dir} is finished; --overwrite starts it anew"
    )
    assert (Path(result.output_dir) / "result.json").read_text() == before

    (Path(result.output_dir) / "mine.txt").write_text("of the user")
    again = go(make_recipe(**{"train.max_steps": 1}), overwrite=True)
    assert len(metrics_of(again)) == again.steps == 1
    names = sorted(path.name for path in (Path(result.output_dir) / "checkpoints").iterdir())
    assert names == ["step-00000000", "step-00000001"]
    assert (Path(result.output_dir) / "mine.txt").read_text() == "of the user"


@pytest.mark.parametrize(
    ("changes", "error"),
    [({"data.source": "/no/such.txt"}, DataError), ({"model.name": "/no/such"}, ModelError)],
    ids=["data", "model"],
)
def test_overwriting_with_a_bad_recipe_leaves_the_old_run(
    make_recipe: MakeRecipe, changes: dict[str, str], error: type[LowVRAMError]
) -> None:
    result = go(make_recipe())
    directory = Path(result.output_dir)

    def times() -> dict[Path, int]:
        paths = (path for path in directory.rglob("*") if path.name != ".lock")
        return {path: path.stat().st_mtime_ns for path in paths}

    before = times()

    with pytest.raises(error):
        go(make_recipe(**changes), overwrite=True)

    assert times() == before


@pytest.mark.parametrize("name", ["recipe.yaml", "checkpoints", "adapter", "merged"])
def test_what_is_not_of_a_run_is_not_replaced(
    make_recipe: MakeRecipe, tmp_path: Path, name: str
) -> None:
    """`output_dir: .` beside a recipe.yaml or checkpoints/ of the user's own."""
    directory = tmp_path / "mine"
    directory.mkdir()
    if name.endswith(".yaml"):
        (directory / name).write_text("mine")
    else:
        (directory / name).mkdir()
        (directory / name / "mine").write_text("mine")
    before = sorted(directory.rglob("*"))

    with pytest.raises(CheckpointError) as error:
        go(make_recipe(output_dir=str(directory)))

    assert str(error.value) == (
        f"output_dir: {directory} is no run's and holds {name}, which a run replaces; choose "
        "another with --set output_dir=DIR, or allow it with --overwrite"
    )
    assert sorted(directory.rglob("*")) == before


def test_an_output_directory_that_cannot_be(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(CheckpointError) as error:
        go(make_recipe(output_dir=str(tmp_path / "file")))
    assert str(error.value) == f"output_dir: {tmp_path / 'file'} is a file; name a directory"
    with pytest.raises(CheckpointError) as below:
        go(make_recipe(output_dir=str(tmp_path / "file" / "a" / "b")))
    assert str(below.value) == (
        f"output_dir: {tmp_path / 'file' / 'a' / 'b'} cannot be made: "
        f"cannot write {tmp_path / 'file'}"
    )


def test_an_output_directory_below_home(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As model.name and data.source have it; not a directory with the name ~."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))

    result = go(make_recipe(output_dir="~/run"))

    assert result.output_dir == str(tmp_path / "home" / "run")
    assert (tmp_path / "home" / "run" / "merged" / "model.safetensors").is_file()
    assert not (tmp_path / "~").exists()


def test_overwriting_removes_a_link_and_not_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "precious").write_text("")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "merged").symlink_to(tmp_path / "elsewhere")

    RunDirectory(tmp_path / "run").make_empty()

    assert not (tmp_path / "run" / "merged").exists()
    assert (tmp_path / "elsewhere" / "precious").exists()


def test_a_merge_that_fails_its_proof_leaves_no_merged_directory(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def merge_nothing(model: Any, names: Any) -> Any:
        base = model.unload().state_dict()
        return ((name, base[name]) for name in names)

    monkeypatch.setattr(sys.modules["lowvram.merge"], "merged_tensors", merge_nothing)
    recipe = make_recipe()

    with pytest.raises(LowVRAMError) as error:
        go(recipe)

    assert error.value.exit_code == 9
    names = {path.name for path in Path(recipe.output_dir).iterdir()}
    assert names == {
        ".lock",
        "recipe.yaml",
        "start.json",
        "metrics.jsonl",
        "checkpoints",
        "adapter",
    }


class Interrupting(Display):
    """Sends Ctrl-C to this process when a step has been shown."""

    def __init__(self, step: int) -> None:
        super().__init__(Console(file=io.StringIO()))
        self.step = step

    def progress(self, title: str, **options: Any) -> Any:
        display, whole = self, super().progress(title, **options)

        class Watching:
            def __enter__(self) -> Callable[..., None]:
                update = whole.__enter__()

                def watch(completed: int, total: int | None, text: str) -> None:
                    update(completed, total, text)
                    if title == "training" and completed == display.step:
                        os.kill(os.getpid(), signal.SIGINT)

                return watch

            def __exit__(self, *error: Any) -> Any:
                return whole.__exit__(*error)

        return Watching()


def test_ctrl_c_saves_and_resume_goes_on(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    settings = {"train.max_steps": 5, "train.log_every": 1, "method.dropout": 0.2}
    whole = go(make_recipe(output_dir=str(tmp_path / "whole"), **settings))
    recipe = make_recipe(**settings)

    with pytest.raises(Interrupted) as error:
        run(recipe, display=Interrupting(2))

    directory = Path(recipe.output_dir)
    assert str(error.value) == (
        f"stopped after step 2 of 5, state saved in {directory / 'checkpoints'}; "
        "the same command with --resume goes on"
    )
    assert not (directory / "result.json").exists()
    with pytest.raises(CheckpointError, match="holds an unfinished run; go on with --resume, or"):
        go(recipe)
    result = go(recipe, resume=True)
    assert same(adapter_of(result), adapter_of(whole))
    assert result.perplexity == whole.perplexity
    assert result.tokens == whole.tokens
    assert [step["loss"] for step in metrics_of(result)] == [
        step["loss"] for step in metrics_of(whole)
    ]


# Keys


class Reads:
    """Which fields of which sections were read outside of the recipe package itself."""

    def __init__(self) -> None:
        self.found: dict[str, set[str]] = defaultdict(set)

    def __enter__(self) -> Reads:
        original = object.__getattribute__
        found = self.found

        def get(section: Any, name: str) -> Any:
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if caller.startswith("lowvram.") and not caller.startswith("lowvram.recipe"):
                kind = type(section)
                field = name.removesuffix("_bytes")
                if field in kind.model_fields:
                    found[kind.__name__].add(field)
            return original(section, name)

        Section.__getattribute__ = get  # type: ignore[method-assign]
        return self

    def __exit__(self, *error: Any) -> None:
        del Section.__getattribute__


def fields() -> dict[str, set[str]]:
    found = {"Recipe": set(Recipe.model_fields)}
    for field in Recipe.model_fields.values():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            found[field.annotation.__name__] = set(field.annotation.model_fields)
    return found


def test_every_key_is_read(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """A LoRA run reads all of them: each is used by the run or handed on to what uses it.

    One of them has a meaning on a card only.
    """
    recipe = make_recipe(**{"generate.prompts": ["The"], "train.optimizer": "adamw"})
    assert sum(map(len, fields().values())) > 50

    with Reads() as reads:
        go(recipe)
        plan(recipe, elsewhere=card_of_size(2**30))

    unread = {kind: names - reads.found[kind] for kind, names in fields().items()}
    assert {kind: names for kind, names in unread.items() if names} == {}


@pytest.fixture(scope="module")
def unchanged(
    gpt2_dir: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """The settings that each of the next tests changes one of; the run with them is in there."""
    directory = tmp_path_factory.mktemp("unchanged")
    settings = {
        "model.name": str(gpt2_dir),
        "data.source": str(text_file),
        "method.target_modules": ["c_attn"],
        "train.global_batch_size": 4,
        "train.max_steps": 3,
        "train.learning_rate": 1e-2,
        "train.optimizer": "adamw",
        "generate.max_new_tokens": 4,
        "output_dir": str(directory / "run"),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOWVRAM_CACHE", str(directory / "cache"))
        return settings | {"result": go(load_recipe("gpt2-lora", settings))}


def changed(unchanged: dict[str, Any], tmp_path: Path, change: dict[str, Any]) -> Any:
    """The runs without and with a change."""
    settings = {key: value for key, value in unchanged.items() if key != "result"}
    settings |= {"output_dir": str(tmp_path / "after")} | change
    return unchanged["result"], go(load_recipe("gpt2-lora", settings))


def test_without_a_change_it_is_the_same_run(unchanged: dict[str, Any], tmp_path: Path) -> None:
    before, after = changed(unchanged, tmp_path, {})

    assert same(merged_of(before), merged_of(after))


@pytest.mark.parametrize(
    "change",
    [
        {"train.seed": 1},
        {"train.betas": [0.5, 0.9]},
        {"train.weight_decay": 0.5},
        {"train.learning_rate": 5e-3},
        {"train.schedule": "linear"},
        {"train.warmup_steps": 2},
        {"train.max_grad_norm": 0.1},
        {"train.label_smoothing": 0.2},
        {"train.optimizer": "sgd"},
        {"train.optimizer": "lion8bit"},
        {"train.global_batch_size": 2},
        {"method.rank": 4},
        {"method.alpha": 4},
        {"method.dropout": 0.3},
        {"method.name": "rslora"},
        {"method.target_modules": ["c_fc"]},
        {"method.bias": "all"},
        {"model.dtype": "nf4"},
        {"data.packing": False},
        {"data.format": "document", "data.validation_fraction": 0},
        {"fit.max_seq_len": 16},
    ],
    ids=lambda change: " ".join(f"{k}={v}" for k, v in change.items()),
)
def test_keys_that_change_what_is_learned(
    unchanged: dict[str, Any], tmp_path: Path, change: dict[str, Any]
) -> None:
    before, after = changed(unchanged, tmp_path, change)

    assert not same(merged_of(before), merged_of(after))


@pytest.mark.parametrize(
    "change",
    [
        {"fit.micro_batch_size": 1},
        {"fit.gradient_checkpointing": True},
        {"train.chunked_loss": False},
        {"model.fused_gelu": False},
        {"model.attention": "eager"},
        {"train.eval_every": 1},
        {"train.save_every": 1},
        {"evaluate.stride": 7},
        {"fit.vram": "1GiB"},
    ],
    ids=str,
)
def test_keys_that_change_nothing_but_rounding(
    unchanged: dict[str, Any], tmp_path: Path, change: dict[str, Any]
) -> None:
    before, after = changed(unchanged, tmp_path, change)

    for name, tensor in merged_of(before).items():
        # AdamW's first steps are about the sign of gradients, so rounding is made large by it.
        assert (tensor - merged_of(after)[name]).abs().max() < 1e-4


def test_the_seed_draws_the_first_adapter(make_recipe: MakeRecipe) -> None:
    def drawn(seed: int) -> list[torch.Tensor]:
        state = build(make_recipe(**{"train.seed": seed}), total_steps=3)
        return [p for name, p in state.model.named_parameters() if "lora_A" in name]

    one, again, other = drawn(1), drawn(1), drawn(2)

    assert len(one) == 2
    for a, b, c in zip(one, again, other, strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


def test_betas_are_those_of_the_optimizer(unchanged: dict[str, Any], tmp_path: Path) -> None:
    """The first step of Adam does not depend on them, and the second does."""
    before, after = changed(unchanged, tmp_path, {"train.betas": [0.5, 0.9]})

    first, second = ([step["loss"] for step in metrics_of(result)] for result in (before, after))
    assert first[:2] == second[:2]
    assert first[2] != second[2]


def test_the_learning_rate_warms_up_and_falls(make_recipe: MakeRecipe) -> None:
    settings = {"train.max_steps": 6, "train.warmup_steps": 2, "train.schedule": "linear"}
    result = go(make_recipe(**settings))

    rates = [step["learning_rate"] for step in metrics_of(result)]

    assert rates == pytest.approx([1e-2 * x for x in (1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25)])


def test_a_warm_up_longer_than_the_run_is_shortened_out_loud(make_recipe: MakeRecipe) -> None:
    result = go(make_recipe(**{"train.warmup_steps": 500}))

    assert (
        "train.warmup_steps 500 is not shorter than the run (3 steps): warming up over 0"
        in result.notes
    )
    assert metrics_of(result)[0]["learning_rate"] == pytest.approx(1e-2)


def test_checkpoints_are_saved_and_kept_as_asked(make_recipe: MakeRecipe) -> None:
    settings = {"train.max_steps": 7, "train.save_every": 2, "train.keep_last": 3}

    result = go(make_recipe(**settings))

    names = sorted(path.name for path in (Path(result.output_dir) / "checkpoints").iterdir())
    assert names == ["step-00000004", "step-00000006", "step-00000007"]


def test_without_save_every_the_end_is_saved(make_recipe: MakeRecipe) -> None:
    result = go(make_recipe(**{"train.save_every": None}))

    names = sorted(p.name for p in (Path(result.output_dir) / "checkpoints").iterdir())
    assert names == ["step-00000000", "step-00000003"]


def test_evaluations_come_as_asked(make_recipe: MakeRecipe) -> None:
    result = go(make_recipe(**{"train.max_steps": 5, "train.eval_every": 2}))

    found = {step["step"]: step.get("validation_perplexity") for step in metrics_of(result)}
    assert [step for step, value in found.items() if value is not None] == [2, 4]
    assert result.perplexity["base"] > found[2] > found[4] > result.perplexity["adapter"]


def shown(recipe: Recipe) -> list[str]:
    output = io.StringIO()
    run(recipe, display=Display(Console(file=output, width=200)))
    return output.getvalue().splitlines()


@pytest.mark.parametrize(
    ("every", "steps"), [(1, [1, 2, 3, 4, 5, 6, 7]), (3, [1, 3, 6, 7]), (100, [1, 7])]
)
def test_steps_are_shown_as_asked(make_recipe: MakeRecipe, every: int, steps: list[int]) -> None:
    found = shown(make_recipe(**{"train.max_steps": 7, "train.log_every": every}))

    training = [line for line in found if line.startswith("training ")]
    assert [line.split()[1] for line in training] == [f"{step}/7" for step in steps]
    assert all("loss " in line and " tok" in line and "peak" in line for line in training)


def test_a_run_tells_its_story(make_recipe: MakeRecipe) -> None:
    text = "\n".join(shown(make_recipe()))

    for part in (
        "trainable  2,048 parameters",
        "36 documents to train on, 4 held out",
        "on a CPU, up to 2,048 tokens at a time",
        "steps  3 (10 an epoch)",
        "base: perplexity ",
        "merged: largest logit difference ",
        "perplexity, base",
        "perplexity, merged",
        "merge proof",
    ):
        assert part in text


def greedy(directory: Path, prompt: str, tokens: int) -> str:
    """Prompt and continuation by transformers' model, one argmax after the other."""
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    for _ in range(tokens):
        with torch.no_grad():
            best = model(input_ids=ids).logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, best], dim=1)
    return str(tokenizer.decode(ids[0])).split("<|endoftext|>")[0].rstrip("\ufffd")


def test_samples_are_of_the_prompts(make_recipe: MakeRecipe, gpt2_dir: Path) -> None:
    """Without temperature, those of base and merged model by hand."""
    settings = {
        "generate.prompts": ["The quick", "Words"],
        "generate.temperature": 0,
        "method.target_modules": "all-linear",
        "train.learning_rate": 5e-2,
    }

    result = go(make_recipe(**settings))

    merged = Path(result.output_dir) / "merged"
    assert [sample["prompt"] for sample in result.samples] == ["The quick", "Words"]
    for sample in result.samples:
        prompt = sample["prompt"]
        assert prompt + sample["base"] == greedy(gpt2_dir, prompt, 4)
        assert prompt + sample["tuned"] == greedy(merged, prompt, 4)
        assert sample["tuned"] != sample["base"]


def test_evaluation_is_limited_to_max_tokens(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    whole = go(make_recipe(**{"data.validation_fraction": 0.5, "evaluate.max_tokens": None}))
    part = go(
        make_recipe(
            **{
                "data.validation_fraction": 0.5,
                "evaluate.max_tokens": 100,
                "output_dir": str(tmp_path / "part"),
            }
        )
    )

    assert 90 <= part.evaluation["tokens_scored"] < 100
    assert whole.evaluation["tokens_scored"] > 500


def test_the_merged_checkpoint_has_the_dtype_asked_for(make_recipe: MakeRecipe) -> None:
    result = go(make_recipe(output_dtype="bf16"))

    assert {tensor.dtype for tensor in merged_of(result).values()} == {torch.bfloat16}
    assert result.merge["dtype"] == "bf16"
    assert result.perplexity["merged"] == pytest.approx(result.perplexity["adapter"], rel=0.02)


def test_nothing_half_written_is_left(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    go(make_recipe())

    assert list(tmp_path.rglob(".partial*")) == []
