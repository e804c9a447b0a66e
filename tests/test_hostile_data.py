"""Data from strangers and in bad times: a DataError that says where, and never a wrong cache."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from click.testing import CliRunner
from conftest import make_tokenizer

from lowvram.cli import main
from lowvram.data import Source, TokenStore, cache, files, tokenize, tokens
from lowvram.data.text import CountedFile
from lowvram.errors import DataError

fcntl: Any = pytest.importorskip("fcntl")
resource: Any = pytest.importorskip("resource")
EOS = "<|endoftext|>"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "tokens"  # as conftest sets it


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(tokenizer: Any, *names: Path | str, allow: bool = False, **options: Any) -> TokenStore:
    source = Source(names=tuple(map(str, names)), **options)
    return tokenize(source, tokenizer, allow_special_tokens=allow)


def refusal(tokenizer: Any, *names: Path | str, **options: Any) -> str:
    with pytest.raises(DataError) as error:
        read(tokenizer, *names, **options)
    return str(error.value)


# Values

DEEP = "[" * 100_000 + "]" * 100_000
DIGITS = "9" * 5_000
BRACKETS = "malformed JSON: brackets in brackets, too many: write the text as a string"
NUMBER = "malformed JSON: a number of thousands of digits: write the text as a string"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (DEEP, BRACKETS),
        (DIGITS, NUMBER),
        ("-" + DIGITS, NUMBER),
        ("1e999", "the text is inf, of type float: write it as a string"),
        ("NaN", "the text is nan, of type float: write it as a string"),
        ('{"a": "b"}', "the text is {'a': 'b'}, of type dict: write it as a string"),
        ('"\\udc00"', "half of a surrogate pair in the text, which is no character: write both"),
    ],
    ids=["deep", "digits", "negative digits", "infinite", "nan", "object", "surrogate"],
)
def test_values_of_json_that_are_no_text(
    tmp_path: Path, tokenizer: Any, value: str, expected: str
) -> None:
    lines = write(tmp_path / "x.jsonl", f'{{"text": "a"}}\n{{"text": {value}}}\n')
    array = write(tmp_path / "x.json", f'[{{"text": "a"}},\n{{"text": {value}}}]')

    assert refusal(tokenizer, lines).startswith(f"{lines}:2: {expected}")
    assert refusal(tokenizer, array).startswith(f"{array}:2: {expected}")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (pyarrow.array([["a"]]), "row 1: the text is ['a'], of type list: write it as a string"),
        (pyarrow.array([{"a": 1}]), "row 1: the text is {'a': 1}, of type dict: write it"),
        (pyarrow.array([b"\xff"]), "row 1: the text is b'\\xff', of type bytes: write it as"),
        (pyarrow.array([2**62], pyarrow.timestamp("us")), "cannot be read as Parquet: "),
        (pyarrow.array([2**62], pyarrow.duration("s")), "cannot be read as Parquet: "),
    ],
    ids=["list", "struct", "binary", "date", "duration"],
)
def test_columns_of_parquet_that_are_no_text(
    tmp_path: Path, tokenizer: Any, values: Any, expected: str
) -> None:
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": values}), path)

    assert expected in refusal(tokenizer, path)


@pytest.mark.parametrize("content", [b"PAR1", b"hello", b"PAR1" + b"\xff" * 400 + b"PAR1"])
def test_what_is_called_parquet_and_is_not(tmp_path: Path, tokenizer: Any, content: bytes) -> None:
    path = write(tmp_path / "x.parquet", content)

    assert refusal(tokenizer, path).startswith(f"{path}: cannot be read as Parquet: ")


# Lengths

LONG = [
    ("x.txt", "ab\n" + "x" * 200 + "\n", {"separator": "|"}, ":2: a line of more than 100 "),
    ("x.txt", "ab\n\n" + "x y\n" * 50, {"format": "paragraphs"}, ": a paragraph of more than 100 "),
    ("x.txt", "x y\n" * 50, {"format": "document", "separator": "|"}, ": a document of more than "),
    ("x.jsonl", '"a"\n{"text": "' + "x" * 200 + '"}\n', {}, ":2: a line of more than 100 "),
    ("x.json", '["a",\n{"text": "' + "x" * 900 + '"}]', {}, ":2: a value of more than 100 "),
    ("x.csv", "text\na\n" + "x" * 200 + "\n", {}, ":3: a line of more than 100 "),
    ("x.csv", 'text\na\n"' + "x\n" * 99 + '"\n', {}, ": a record of more than 100 characters"),
    ("x.csv", "text\na\n" + '"\n",' * 90 + "\n", {}, ": a record of more than 100 characters"),
]


@pytest.mark.parametrize(("name", "content", "options", "expected"), LONG, ids=lambda value: "")
def test_what_has_to_be_in_memory_as_a_whole_has_a_limit(
    tmp_path: Path,
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    content: str,
    options: dict[str, Any],
    expected: str,
) -> None:
    monkeypatch.setattr("lowvram.data.source.VALUE_CHARACTERS", 100)
    monkeypatch.setattr("lowvram.data.text.CHUNK_CHARACTERS", 50)
    path = write(tmp_path / name, content)

    message = refusal(tokenizer, path, **options)

    assert message.startswith(str(path))
    assert expected in message
    assert message.endswith("which has to be in memory as a whole: break it into several")


def test_rows_below_the_limit_are_no_matter_how_many(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowvram.data.source.VALUE_CHARACTERS", 100)
    row = '"' + "x\n" * 30 + '"\n\n'
    table = write(tmp_path / "x.csv", "text\n" + row * 20)
    array = write(tmp_path / "x.json", json.dumps(["x " * 30] * 50))
    text = write(tmp_path / "x.txt", ("x\n" * 40 + "\n") * 20)

    assert len(read(tokenizer, table)) == 20
    assert len(read(tokenizer, array)) == 50
    assert len(read(tokenizer, text, format="paragraphs")) == 20


@pytest.mark.parametrize("form", ["lines", "document"])
def test_a_text_that_cannot_be_cut_has_a_limit(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    """A long line with spaces is streamed, whatever its length."""
    monkeypatch.setattr("lowvram.data.pieces.STRETCH_CHARACTERS", 3000)
    cut = write(tmp_path / "cut.txt", "ab cd " * 5000)
    solid = write(tmp_path / "solid.txt", "short " + "x" * 20_000)

    assert len(read(tokenizer, cut, format=form)) == 1
    message = refusal(tokenizer, solid, format=form)

    assert message.startswith(f"{solid}: a text that begins ")
    assert " goes on for more than 3,000 characters without a place where " in message
    table = write(tmp_path / "solid.jsonl", json.dumps("x" * 20_000))
    assert refusal(tokenizer, table).startswith(f"{table}: a text that begins 'xxxx")


# Files


def test_names_that_no_file_can_have(tmp_path: Path, tokenizer: Any) -> None:
    for name, wanted in (
        ("x" * 5000, "cannot be looked for: File name too long"),
        ("~nobody-of-this-name/x.txt", "no such file or directory"),
    ):
        message = refusal(tokenizer, name)
        assert message.startswith(f"data.source {name!r}: {wanted}")
        with pytest.raises(DataError, match=wanted):
            files.check_names([name])
    assert "no such file or directory" in refusal(tokenizer, f"{tmp_path}/a\0b")
    text = write(tmp_path / "a.txt", "a")
    assert refusal(tokenizer, text, encoding="a\0b").startswith("data.encoding is 'a\\x00b', which")


def test_loops_and_pipes_do_not_hang(tmp_path: Path, tokenizer: Any) -> None:
    """In a directory they are not read; named by themselves they are an error."""
    place = tmp_path / "data"
    place.mkdir()
    (place / "self").symlink_to(place)
    (place / "loop.txt").symlink_to("loop.txt")
    os.mkfifo(place / "pipe.txt")
    write(place / "a.txt", "one\n")

    assert len(read(tokenizer, place)) == 1
    for name in (place / "pipe.txt", "/dev/zero"):
        assert refusal(tokenizer, name) == (
            f"{name}: not a regular file: give a file or a directory"
        )
    assert "loop.txt': no such file or directory" in refusal(tokenizer, place / "loop.txt")


def during_reading(monkeypatch: pytest.MonkeyPatch, act: Callable[[], Any]) -> None:
    """`act` happens once, when the first bytes have been read."""
    real, done = CountedFile.readinto, []

    def readinto(self: CountedFile, buffer: Any, /) -> int:
        n = real(self, buffer)
        if not done:
            done.append(act())
        return n

    monkeypatch.setattr(CountedFile, "readinto", readinto)


@pytest.mark.parametrize("form", ["lines", "document"])
def test_a_file_that_grows_while_it_is_read_is_an_error(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, home: Path, form: str
) -> None:
    path = write(tmp_path / "a.txt", "one\ntwo\n")

    def grow() -> None:
        with path.open("a") as file:
            file.write("three\n" * 100)

    during_reading(monkeypatch, grow)

    assert refusal(tokenizer, path, format=form) == (
        f"{path}: grows while it is read: give a copy of it"
    )
    assert list(home.iterdir()) == []


def test_a_file_that_is_changed_while_it_is_read_makes_no_entry(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    path = write(tmp_path / "a.txt", "one\ntwo\n")
    during_reading(monkeypatch, lambda: os.utime(path, ns=(5, 5)))

    assert refusal(tokenizer, path) == (
        f"data.source {path}: was changed while it was read: start again"
    )
    assert list(home.iterdir()) == []
    assert len(read(tokenizer, path)) == 2


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.json", "a.parquet"])
@pytest.mark.parametrize("when", ["listed", "keyed", "read"])
def test_a_file_that_vanishes_is_an_error(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, name: str, when: str
) -> None:
    path = write(tmp_path / name, "text\na\n")
    step = {"listed": "cache_key", "keyed": "size_bytes", "read": "read_pieces"}[when]
    real = getattr(tokens, step)

    def vanish(*given: Any, **options: Any) -> Any:
        path.unlink()
        return real(*given, **options)

    monkeypatch.setattr(tokens, step, vanish)

    assert refusal(tokenizer, path).startswith(f"{path}: cannot be read")


def test_a_file_that_vanishes_before_its_encoding_is_guessed(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.txt", b"a\xff\n")
    during_reading(monkeypatch, path.unlink)

    assert refusal(tokenizer, path) == f"{path}: cannot be read: No such file or directory"


# Special tokens


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.jsonl", json.dumps({"prompt": f"a{EOS}", "completion": f"{EOS}b"})),
        ("x.json", json.dumps([{"prompt": f"a{EOS}", "completion": f"{EOS}b"}])),
        ("x.csv", f"prompt,completion\na{EOS},{EOS}b\n"),
        ("x.txt", f"a{EOS}{EOS}b\n"),
    ],
)
@pytest.mark.parametrize("other", [EOS, "<|assistant|>"])
def test_no_text_forges_a_special_token(
    tmp_path: Path, name: str, content: str, other: str
) -> None:
    """Neither the end of a document nor another that the tokenizer has."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|assistant|>"]})
    special = tokenizer.convert_tokens_to_ids(other)
    path = write(tmp_path / name, content.replace(EOS, other))

    plain = read(tokenizer, path)
    allowed = read(tokenizer, path, allow=True)

    ends = int(other == EOS)
    assert plain.tokens.tolist().count(special) == ends
    assert allowed.tokens.tolist().count(special) == 2 + ends
    assert len(plain) == len(allowed) == 1
    assert tokenizer.decode(plain.tokens[:-1]) == f"a{other}{other}b"


# The cache


def entry_of(home: Path) -> Path:
    (entry,) = home.iterdir()
    return entry


def forge_dtype(entry: Path, other: Path) -> None:
    about = json.loads((entry / "store.json").read_text())
    (entry / "store.json").write_text(json.dumps(about | {"tokens": "uint8"}))


def forge_starts(entry: Path, other: Path) -> None:
    """With the digest to go with it."""
    from lowvram.data.store import digest

    starts = np.fromfile(entry / "starts", np.int64)
    starts[1] += 10**9
    starts.tofile(entry / "starts")
    about = json.loads((entry / "store.json").read_text())
    (entry / "store.json").write_text(json.dumps(about | {"sha256": digest(entry)}))


def replace_with_other(entry: Path, other: Path) -> None:
    shutil.rmtree(entry)
    shutil.copytree(other, entry)


def replace_with_file(entry: Path, other: Path) -> None:
    shutil.rmtree(entry)
    entry.write_text("not a directory")


def empty(entry: Path, other: Path) -> None:
    for file in entry.iterdir():
        file.write_bytes(b"")


@pytest.mark.parametrize(
    "damage", [forge_dtype, forge_starts, replace_with_other, replace_with_file, empty]
)
def test_an_entry_that_is_not_what_was_written_is_made_again(
    tmp_path: Path, tokenizer: Any, home: Path, damage: Callable[[Path, Path], None]
) -> None:
    other = write(tmp_path / "other.txt", "another text\nof two lines\n")
    read(tokenizer, other)
    foreign = entry_of(home).rename(tmp_path / "foreign")
    path = write(tmp_path / "a.txt", "one\ntwo\nthree\n")
    expected = read(tokenizer, path).tokens.tolist()
    entry = entry_of(home)
    damage(entry, foreign)

    again = read(tokenizer, path)

    assert not again.cached
    assert again.tokens.tolist() == expected
    assert read(tokenizer, path).cached
    assert entry_of(home) == entry


@pytest.fixture
def no_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "GRACE_SECONDS", -1)


@pytest.mark.usefixtures("no_grace")
def test_what_a_killed_process_left_is_cleared_away(
    tmp_path: Path, tokenizer: Any, home: Path
) -> None:
    """What a living one is writing is not."""
    path = write(tmp_path / "a.txt", "one\n")
    for name in ("killed", "living", "starting", "ancient"):
        (home / f"{cache.PARTIAL}{name}").mkdir(parents=True)
        (home / f"{cache.PARTIAL}{name}" / "tokens").write_bytes(b"x" * 100)
    for name in ("killed", "living"):
        (home / f"{cache.PARTIAL}{name}" / cache.LOCK_FILE).touch()
    os.utime(home / f"{cache.PARTIAL}ancient", (1, 1))

    with (home / f"{cache.PARTIAL}living" / cache.LOCK_FILE).open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        read(tokenizer, path)

    left = {file.name for file in home.glob(f"{cache.PARTIAL}*")}
    assert left == {f"{cache.PARTIAL}living", f"{cache.PARTIAL}starting"}


def test_a_directory_just_made_is_left_alone(tmp_path: Path, tokenizer: Any, home: Path) -> None:
    new = home / f"{cache.PARTIAL}new"
    new.mkdir(parents=True)
    (new / cache.LOCK_FILE).touch()

    read(tokenizer, write(tmp_path / "a.txt", "one\n"))

    assert new.is_dir()


@pytest.mark.usefixtures("no_grace")
def test_two_that_write_the_same_both_get_it(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    """The second starts while the first has begun, and is done before it."""
    path = write(tmp_path / "a.txt", "one\ntwo\n")
    second: list[TokenStore] = []
    real = tokens.write_store

    def write_store(*given: Any) -> None:
        monkeypatch.setattr(tokens, "write_store", real)
        second.append(read(tokenizer, path))
        real(*given)

    monkeypatch.setattr(tokens, "write_store", write_store)

    first = read(tokenizer, path)

    assert first.sha256 == second[0].sha256
    assert first.tokens.tolist() == second[0].tokens.tolist()
    assert read(tokenizer, path).cached
    assert len(list(home.iterdir())) == 1


def test_a_full_disk_is_an_error_and_leaves_nothing(
    tmp_path: Path, tokenizer: Any, home: Path
) -> None:
    """The limit of a process on the size of a file fails as a disk does."""
    path = write(tmp_path / "a.txt", "hello world\n" * 20_000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        message = refusal(tokenizer, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    assert message.startswith(
        f"{home}: tokens cannot be written: File too large. Set LOWVRAM_CACHE"
    )
    assert list(home.iterdir()) == []
    assert len(read(tokenizer, path)) == 20_000


# The command line


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("deep.json", DEEP),
        ("deep.jsonl", DEEP + "\n"),
        ("digits.json", DIGITS + DIGITS),
        ("x.parquet", b"PAR1" * 4),
        ("nul.txt", b"a\0b\n"),
        ("x.zip", b"PK\x03\x04"),
        ("wide.txt", "a".encode("utf-16")),
    ],
)
@pytest.mark.parametrize("command", ["evaluate", "run"])
def test_every_command_says_what_is_wrong_and_exits(
    gpt2_dir: Path, tmp_path: Path, name: str, content: str | bytes, command: str
) -> None:
    path = write(tmp_path / name, content)
    recipe = write(tmp_path / "r.yaml", f"model: {{name: {gpt2_dir}}}\ndata: {{source: {path}}}\n")
    start = time.perf_counter()

    done = CliRunner().invoke(
        main,
        ["evaluate", str(gpt2_dir), "--data", str(path)]
        if command == "evaluate"
        else ["run", str(recipe), "--dry-run"],
    )

    assert isinstance(done.exception, SystemExit), done.exception
    assert done.exit_code == 3
    assert done.stderr.startswith("error: ")
    assert str(path) in done.stderr
    assert time.perf_counter() - start < 20
