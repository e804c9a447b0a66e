"""Recipes that were made to do harm, or by accident look as if they were: each is defined."""

# ruff: noqa: E501 (a message stands on one line, as it is printed)

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lowvram.directory import RunDirectory
from lowvram.errors import DataError, LowVRAMError, ModelError, RecipeError
from lowvram.inputs import check_inputs
from lowvram.recipe import dump_recipe, load_recipe, parse_set
from lowvram.recipe.problems import known_keys

HEAD = "model: {name: gpt2}\ndata: {source: my.txt}\n"
Write = Callable[[str], str]

# Bounded, and the same examples each time. The directory of a test is its only state.
bounded = settings(
    max_examples=300,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    monkeypatch.chdir(tmp_path)

    def write_text(text: str) -> str:
        Path("my.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
        return "my.yaml"

    return write_text


def refusal(name: str, overrides: dict[str, Any] | None = None) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(name, overrides)
    return str(caught.value)


# --- properties -------------------------------------------------------------------------------

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(["auto", "lora", "full", "fp32", "1e400", "~", "$HOME", "12GiB", ".nan", "**"]),
)
values = st.one_of(scalars, st.lists(scalars, max_size=3), st.dictionaries(st.text(), scalars))
overridden = st.dictionaries(st.sampled_from(sorted(known_keys())), values, max_size=4)


def loads_or_is_refused(name: str, overrides: dict[str, Any] | None = None) -> None:
    """A recipe that its own dump gives back, or one of our errors with words in it."""
    try:
        recipe = load_recipe(name, overrides)
    except RecipeError as error:
        said = str(error)
    else:
        said = ""
    if said:
        assert said.startswith(("my.yaml:", "--set "))
        return
    Path("again.yaml").write_text(dump_recipe(recipe), encoding="utf-8", newline="")
    assert load_recipe("again.yaml") == recipe


@bounded
@given(st.binary(max_size=200))
def test_any_bytes(write: Write, content: bytes) -> None:
    write("")
    Path("my.yaml").write_bytes(content)
    loads_or_is_refused("my.yaml")


@bounded
@given(
    st.text(alphabet="model:na{}[]&*!|>-?#'\"\\%@`, \n\t\u00a0\u2028\ufeff\ud800a1.~", max_size=60)
)
def test_any_yaml(write: Write, text: str) -> None:
    loads_or_is_refused(write(HEAD + text))


@bounded
@given(overridden)
def test_any_value_of_any_key(write: Write, changes: dict[str, Any]) -> None:
    loads_or_is_refused(write(HEAD), changes)


@bounded
@given(
    st.sampled_from(["model.name", "data.source", "data.encoding"]),
    st.text(min_size=1, max_size=30),
)
def test_any_name_of_an_input(write: Write, key: str, text: str) -> None:
    said = "fine"
    try:
        check_inputs(load_recipe(write(HEAD), {key: text}))
    except LowVRAMError as error:
        said = str(error)
    assert key.split(".")[-1] in said or text in said or said == "fine"


@bounded
@given(st.text(max_size=30))
def test_any_setting(text: str) -> None:
    said, key = "", text.partition("=")[0].strip()
    try:
        assert parse_set(text)[0] == key
    except RecipeError as error:
        said = str(error)
    assert said == "" or said.startswith("--set ")


# --- YAML -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:os.system [ls]",
        "!!python/name:os.system",
        "!!binary YQ==",
        "!!set {a}",
        "!!int 1",
        "!include x",
        "!<tag:yaml.org,2002:str> a",
    ],
)
def test_tags_are_refused_and_do_nothing(write: Write, tag: str) -> None:
    said = refusal(write(HEAD + f"output_dir: {tag}\n"))

    assert said.startswith("my.yaml:3: output_dir: tags such as ")
    assert said.endswith(" are not allowed")


def test_an_alias_bomb_costs_nothing(write: Write) -> None:
    text = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
    text += "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30))
    started = time.monotonic()

    assert "anchors such as &a0 are not allowed" in refusal(write(HEAD + text))
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("opening", ["[", "{a: ", "- ", "? "])
def test_nesting_ends_before_the_stack_does(write: Write, opening: str) -> None:
    said = refusal(write(f"data: \n  {opening * 50_000}"))

    assert "nested more than 16 levels deep" in said or "a key must be plain text" in said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"train: {{epochs: {10**400}}}", "train.epochs: found a number of more than 77 digits, allowed: a whole number of at least 1 and at most 1000000000"),
        (f"train: {{epochs: 1{'0' * 5000}}}", None),
        ("train: {epochs: 1000000001}", "train.epochs: found 1000000001, allowed: a whole number of at least 1 and at most 1000000000"),
        (f"train: {{epochs: 0x{'f' * 400}}}", "train.epochs: found a number of more than 77 digits, allowed: a whole number of at least 1 and at most 1000000000"),
        ("fit: {max_seq_len: 99999999999999999999}", "fit.max_seq_len: found 99999999999999999999, allowed: auto, or a whole number of at least 2 and at most 1000000000"),
        (f"train: {{learning_rate: {10**400}}}", "train.learning_rate: found a number of more than 77 digits, allowed: a number above 0"),
        ("train: {learning_rate: 1e400}", "train.learning_rate: found inf, allowed: a number above 0; it must be finite"),
        ("train: {learning_rate: -.inf}", "train.learning_rate: found -inf, allowed: a number above 0; it must be finite"),
        ("train: {learning_rate: .NaN}", "train.learning_rate: found nan, allowed: a number above 0; it must be finite"),
        ("train: {betas: [0.9, .nan]}", "train.betas[1]: found nan, allowed: a number of at least 0 and below 1"),
        ("train: {learning_rate: nan}", "train.learning_rate: found 'nan', allowed: a number above 0"),
        ("fit: {vram: 99999999999GiB}", "fit.vram: found '99999999999GiB': write a size such as 12GiB, 12GB or 11500MiB"),
    ],
)  # fmt: skip
def test_numbers_beyond_all_bounds(write: Write, text: str, message: str | None) -> None:
    said = refusal(write(HEAD + text))

    if message is None:  # so many digits are read as text, which is not repeated in full
        assert len(said) < 300
        assert said.startswith("my.yaml:3: train.epochs: found '1000")
    else:
        assert said == f"my.yaml:3: {message}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tr\u0430in: {epochs: 1}", "3: tr\u0430in: unknown key with U+0430 CYRILLIC SMALL LETTER A. Did you mean train?"),
        ("train: {ep\u043echs: 1}", "3: train.ep\u043echs: unknown key with U+043E CYRILLIC SMALL LETTER O. Did you mean train.epochs?"),
        ("method: {name: l\u043era}", "3: method.name: found 'l\u043era', allowed: lora, dora, rslora, full; it has U+043E CYRILLIC SMALL LETTER O; did you mean lora?"),
        ("train: {epochs: \uff11\uff12}", "3: train.epochs: found '\uff11\uff12', allowed: a whole number of at least 1 and at most 1000000000; it has U+FF11 FULLWIDTH DIGIT ONE, U+FF12 FULLWIDTH DIGIT TWO"),
        ("train: {learning_rate: \u0661.5}", "3: train.learning_rate: found '\u0661.5', allowed: a number above 0; it has U+0661 ARABIC-INDIC DIGIT ONE"),
        ("train:\n  ep\u200bochs: 1", "4: train.'ep\\u200bochs': unknown key with U+200B ZERO WIDTH SPACE. Did you mean train.epochs?"),
        ("train:\n  \u202eepochs: 1", "4: train.'\\u202eepochs': unknown key with U+202E RIGHT-TO-LEFT OVERRIDE. Did you mean train.epochs?"),
        ("train:\n\u00a0\u00a0epochs: 1", "4: '\\xa0\\xa0epochs': unknown key with U+00A0 NO-BREAK SPACE. Keys: model, data, method, train, fit, evaluate, generate, output_dir, output_dtype"),
        ("a\r", "4: not valid YAML: could not find expected ':'"),
        ("train:\n  epochs: 1\u2028  seed: 3", "4: not valid YAML: mapping values are not allowed here; the line holds U+2028 LINE SEPARATOR: type it anew"),
    ],
)  # fmt: skip
def test_look_alikes_are_named(write: Write, text: str, message: str) -> None:
    assert refusal(write(HEAD + text)) == f"my.yaml:{message}"


def test_look_alikes_on_the_command_line(write: Write) -> None:
    key, value = parse_set("tr\u0430in.epochs=\uff11")

    assert "U+0430 CYRILLIC SMALL LETTER A" in refusal(write(HEAD), {key: value})
    assert "U+FF11 FULLWIDTH DIGIT ONE" in refusal(write(HEAD), {"train.epochs": value})


def test_a_look_alike_of_a_model_is_no_id_of_the_hub(write: Write) -> None:
    recipe = load_recipe(write(HEAD), {"model.name": "g\u0440t2"})

    with pytest.raises(ModelError, match=r"no model id of the hub .*; it has U\+0440 CYRILLIC"):
        check_inputs(recipe)


def test_texts_keep_every_character(write: Write) -> None:
    prompt = "caf\u00e9 \u202eabc\u202c \u200b\u00a0 \u2028 \uff11"

    assert load_recipe(write(HEAD), {"generate.prompts": [prompt]}).generate.prompts == (prompt,)


@pytest.mark.parametrize(
    "setting",
    [
        "train.epochs=!!python/name:os.system",
        "train.epochs=&a 1",
        "train.epochs=*a",
        "train.epochs=[" + "[" * 1000,
        "data.source={a: " + "{a: " * 1000,
    ],
)
def test_settings_refuse_what_files_refuse(setting: str) -> None:
    with pytest.raises(RecipeError, match=r"^--set \w+\.\w+: "):
        parse_set(setting)


@pytest.mark.parametrize("value", ["1e400", ".nan", "9" * 400, "9" * 5000, "\uff11", "a\0b"])
def test_settings_have_the_bounds_of_files(write: Write, value: str) -> None:
    key, read = parse_set(f"train.learning_rate={value}")

    assert refusal(write(HEAD), {key: read}).startswith("--set train.learning_rate: found ")


# --- places -----------------------------------------------------------------------------------


def test_relative_paths_start_at_the_working_directory(write: Write, tmp_path: Path) -> None:
    write(HEAD)
    Path("elsewhere").mkdir()
    Path("elsewhere/my.yaml").write_text(HEAD.replace("my.txt", "./near.txt"))
    Path("elsewhere/near.txt").write_text("beside the recipe")
    recipe = load_recipe("elsewhere/my.yaml")

    with pytest.raises(DataError, match=f"no such file or directory: {tmp_path}/near.txt"):
        check_inputs(recipe)
    Path("near.txt").write_text("in the working directory")
    check_inputs(recipe)
    assert RunDirectory(recipe.output_dir).path.absolute() == tmp_path / "runs/my"


def test_a_tilde_is_the_home_directory(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home/model").mkdir(parents=True)
    (tmp_path / "home/a.txt").write_text("text")
    home = {"model.name": "~/model", "data.source": "~/a.txt", "data.validation_source": "~/a.txt"}
    recipe = load_recipe(write(HEAD), {**home, "output_dir": "~/run"})

    check_inputs(recipe)
    assert RunDirectory(recipe.output_dir).path == tmp_path / "home/run"
    assert recipe.data.source == "~/a.txt"  # as written, so that it means the same elsewhere


def test_the_home_of_nobody_is_a_name_as_any_other(write: Write) -> None:
    nobody = "~no-such-user/x"

    with pytest.raises(ModelError, match=r"'~no-such-user/x' is no directory"):
        check_inputs(load_recipe(write(HEAD), {"model.name": nobody}))
    with pytest.raises(DataError, match=r"'~no-such-user/x': no such file"):
        check_inputs(load_recipe(write(HEAD), {"data.source": nobody}))
    RunDirectory(nobody).check(resume=False, overwrite=False, inputs=[nobody])


@pytest.mark.parametrize("name", ["$HOME/a.txt", "${HOME}/a.txt", "%USERPROFILE%/a.txt"])
def test_the_environment_is_not_looked_into(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "a.txt").write_text("text")
    recipe = load_recipe(write(HEAD), {"data.source": name, "output_dir": name})

    with pytest.raises(DataError, match="no such file or directory"):
        check_inputs(recipe)
    assert RunDirectory(recipe.output_dir).path == Path(name)
    (tmp_path / Path(name).parent).mkdir()
    (tmp_path / name).write_text("text")
    check_inputs(recipe)


@pytest.mark.parametrize(
    "key", ["model.name", "data.source", "data.validation_source", "output_dir"]
)
def test_names_that_no_file_can_have(write: Write, key: str) -> None:
    assert "holds a character that no file name" in refusal(write(HEAD), {key: "a\0b"})
    assert "longer than 4096 characters" in refusal(write(HEAD), {key: "a/" * 3000})


def test_a_part_that_is_too_long_for_a_file(write: Write) -> None:
    with pytest.raises(DataError, match=r"cannot be looked for: File name too long"):
        check_inputs(load_recipe(write(HEAD), {"data.source": "a" * 300 + ".txt"}))


def test_a_search_of_everything_ends(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowvram.data.files.MAX_FILES", 3)
    (tmp_path / "many").mkdir()
    for name in "abcd":
        (tmp_path / "many" / f"{name}.txt").write_text("text")

    for source in ("many", "many/*.txt"):
        with pytest.raises(DataError, match=r"has more than 3 files\. Name a directory"):
            check_inputs(load_recipe(write(HEAD), {"data.source": source}))
    (tmp_path / "many/d.txt").unlink()
    check_inputs(load_recipe(write(HEAD), {"data.source": "many"}))


def test_stars_do_not_multiply(write: Write, tmp_path: Path) -> None:
    tmp_path.joinpath(*"abcdefghijkl").mkdir(parents=True)
    tmp_path.joinpath(*"abcdefghijkl", "x.txt").write_text("text")
    started = time.monotonic()

    check_inputs(load_recipe(write(HEAD), {"data.source": "**/" * 12 + "*.txt"}))
    assert time.monotonic() - started < 2


# --- files ------------------------------------------------------------------------------------


def run_on(name: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The command itself; standard input stays open, as a terminal's would."""
    with subprocess.Popen(["sleep", "60"], stdout=subprocess.PIPE) as silent:
        try:
            return subprocess.run(
                [sys.executable, "-m", "lowvram", "run", name, "--dry-run"],
                stdin=silent.stdout,
                capture_output=True,
                text=True,
                cwd=cwd,
                timeout=20,
            )
        finally:
            silent.kill()


@pytest.mark.skipif(os.name != "posix", reason="has other devices")
@pytest.mark.parametrize("name", ["/dev/zero", "/dev/stdin", "pipe.yaml"])
def test_what_never_ends_is_not_read(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")  # nobody writes into it

    done = run_on(name, tmp_path)

    assert done.returncode == 2
    assert done.stderr == f"error: {name}: not a regular file; save the recipe as a file\n"


def test_links_that_lead_nowhere(write: Write) -> None:
    Path("loop.yaml").symlink_to("loop.yaml")
    Path("gone.yaml").symlink_to("nowhere")

    assert refusal("loop.yaml") == "loop.yaml: cannot be read: Too many levels of symbolic links"
    assert refusal("gone.yaml").startswith("gone.yaml: no such file.")


def test_a_directory_is_no_recipe(tmp_path: Path) -> None:
    assert refusal(f"{tmp_path}/") == f"{tmp_path}/: cannot be read: Is a directory"


def test_a_mebibyte_is_the_limit(write: Write) -> None:
    fine = HEAD + "#" * (2**20 - len(HEAD))

    assert load_recipe(write(fine)).model.name == "gpt2"
    assert refusal(write(fine + "#")) == "my.yaml: larger than 1 MiB; a recipe is a page of text"


# --- credentials ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key", ["model.name", "data.source", "data.validation_source", "output_dir"]
)
def test_urls_are_refused_and_passwords_masked(write: Write, key: str) -> None:
    said = refusal(write(HEAD), {key: "https://user:se@cret@host/x"})

    assert said.startswith(f"--set {key}: found 'https://***@host/x': is a URL")
    assert "HF_TOKEN" in said


def test_a_password_in_any_error_is_masked() -> None:
    for url, shown in {
        "s3://a:secret@b/c": "s3://***@b/c",
        "https:/a:secret@b": "https:/***@b",  # as a path shows it
        "C:/x@y.txt and a@b": "C:/x@y.txt and a@b",
    }.items():
        assert str(DataError(f"{url}: no")) == f"{shown}: no"
    assert "secret" not in refusal("https://user:secret@host/x.yaml")
