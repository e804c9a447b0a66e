"""Reading: what each kind of file gives, what is left out and counted, and every message."""

from __future__ import annotations

import gzip
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from lowvram.data import (
    FORMATS,
    Piece,
    ReadReport,
    Source,
    check_names,
    read_pieces,
    resolve,
)
from lowvram.data.reference import HEADING, MAX_CHARACTERS, reference_documents, reference_topics
from lowvram.errors import DataError


def read(source: Source, split_long: bool = False) -> tuple[list[Piece], ReadReport]:
    report = ReadReport()
    return list(read_pieces(source, report, split_long=split_long)), report


def texts(path: Path, **options: Any) -> list[str]:
    pieces, _ = read(Source(names=(str(path),), **options))
    return [piece.text for piece in pieces]


def message(*names: Path | str, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(Source(names=tuple(map(str, names)), **options))
    return str(caught.value)


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# Name, content, what else the source says, and the texts it has to give.
FILES: list[tuple[str, str | bytes, dict[str, Any], list[str]]] = [
    ("blank.txt", "one\n\n  \t\ntwo\n", {}, ["one", "two"]),
    ("spaces.txt", " a \nb  ", {}, [" a ", "b  "]),
    ("crlf.txt", b"one\r\ntwo\r\n", {}, ["one", "two"]),
    ("cr.txt", b"one\rtwo\r", {}, ["one", "two"]),
    ("separators.txt", "a\fb\u2028c\u0085d\x1ce\ntwo", {}, ["a\fb\u2028c\u0085d\x1ce", "two"]),
    ("bom.txt", b"\xef\xbb\xbfone\ntwo", {}, ["one", "two"]),
    ("latin.txt", "caf\xe9\n".encode("latin-1"), {"encoding": "latin-1"}, ["caf\xe9"]),
    ("utf16.txt", "caf\xe9\ntwo".encode("utf-16"), {"encoding": "utf-16"}, ["caf\xe9", "two"]),
    ("bom16.txt", "\ufeffx".encode("utf-16-le"), {"encoding": "utf-16-le"}, ["x"]),
    ("any.suffix", "one\ntwo\n", {}, ["one", "two"]),
    ("paragraphs.md", "a\r\nb\n \n\n\nc\n", {"format": "paragraphs"}, ["a\nb", "c"]),
    ("document.txt", "\ufeffa\r\n\n b\r\n", {"format": "document"}, ["a\n\n b\n"]),
    (
        "values.csv",
        "text,n\r\nNA,001\nnull,2\nNone,3\nnan,4\n001,5\n2024-01-01,6\n"
        '"a, ""b""\nc",7\n ,8\n"",9\n',
        {},
        ["NA", "null", "None", "nan", "001", "2024-01-01", 'a, "b"\nc'],
    ),
    ("bom.csv", b"\xef\xbb\xbftext\nNA\n", {}, ["NA"]),
    ("column.tsv", 'n\tbody\n1\ta, b\n\n2\tc "d"\n', {"text_column": "body"}, ["a, b", 'c "d"']),
    (
        "dates.jsonl",
        '{"text": "2024-01-01"}\n\n{"text": null}\n{"other": 1}\n'
        '{"text": "\\u2028\\ud83d\\ude00"}\n"a string"\n{"text": ""}\n',
        {},
        ["2024-01-01", "\u2028\U0001f600", "a string"],
    ),
    ("array.json", '[{"text": "a"},\n {"text": null, "x": [1, {}]}, "b"\n]\n', {}, ["a", "b"]),
    ("object.json", '{"text": "a"}', {}, ["a"]),
    ("lines.json", '{"text": "a"}\n{"text": "b"}\n', {}, ["a", "b"]),
]


@pytest.mark.parametrize(
    ("name", "content", "options", "expected"), FILES, ids=[file[0] for file in FILES]
)
def test_each_file_gives_exactly_these_texts(
    tmp_path: Path,
    name: str,
    content: str | bytes,
    options: dict[str, Any],
    expected: list[str],
) -> None:
    path = write(tmp_path / name, content)
    pieces, report = read(Source(names=(str(path),), **options))
    assert [piece.text for piece in pieces] == expected
    assert all(piece.end and not piece.prompt for piece in pieces)
    assert (report.documents, report.files) == (len(expected), 1)
    assert report.bytes_read == path.stat().st_size


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    contents = dict((name, content) for name, content, _, _ in FILES)
    found = {}
    for name in ("blank.txt", "values.csv", "dates.jsonl", "array.json"):
        _, report = read(Source(names=(str(write(tmp_path / name, contents[name])),)))
        found[name] = (report.blank, report.nulls)
    expected = {"blank.txt": (2, 0), "values.csv": (2, 0), "dates.jsonl": (2, 2)}
    assert found == {**expected, "array.json": (0, 1)}
    assert str(report) == "2 documents, 1 without text skipped"


def test_a_table_with_prompt_and_completion(tmp_path: Path) -> None:
    rows = [{"prompt": "Q: ", "completion": "A"}, {"prompt": None, "completion": "B"}]
    rows += [{"prompt": "", "completion": "C"}, {"prompt": "lost", "completion": " "}]
    path = write(tmp_path / "pairs.jsonl", "\n".join(map(json.dumps, rows)))
    pieces, report = read(Source(names=(str(path),)))
    assert pieces == [Piece("Q: ", end=False, prompt=True), Piece("A"), Piece("B"), Piece("C")]
    assert (report.documents, report.blank) == (3, 1)
    as_csv = write(tmp_path / "pairs.csv", "question,answer\nQ,A\n")
    options = {"prompt_column": "question", "completion_column": "answer"}
    pieces, _ = read(Source(names=(str(as_csv),), **options))
    assert pieces == [Piece("Q", end=False, prompt=True), Piece("A")]


def test_a_separator_splits_at_its_first_occurrence(tmp_path: Path) -> None:
    path = write(tmp_path / "e2e.txt", "name[X]||X is || here\nno separator\nname[Y]|| \n\n")
    pieces, report = read(Source(names=(str(path),), separator="||"))
    prompt = Piece("name[X]||", end=False, prompt=True)
    assert pieces == [prompt, Piece("X is || here"), Piece("no separator")]
    assert (report.documents, report.without_separator, report.blank) == (2, 1, 2)


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "table.parquet"
    rows = ["2024-01-01", None, "NA", "x" * 1000, ""] * 200
    table = pyarrow.table({"id": list(range(1000)), "text": rows})
    pyarrow.parquet.write_table(table, path, row_group_size=300)
    pieces, report = read(Source(names=(str(path),)))
    assert [piece.text for piece in pieces] == ["2024-01-01", "NA", "x" * 1000] * 200
    assert (report.nulls, report.blank, report.bytes_read) == (200, 200, path.stat().st_size)
    assert message(path, text_column="txt").startswith(
        f"{path}: no column 'txt', nor both 'prompt' and 'completion'. It has 'id', 'text'. "
        "Did you mean 'text'? Set data.text_column"
    )
    pyarrow.parquet.write_table(pyarrow.table({"text": [1]}), path)
    assert message(path) == f"{path}, row 1: the text is 1, of type int: write it as a string"
    write(path, b"PAR1 no parquet")
    assert message(path).startswith(f"{path}: cannot be read as Parquet: ")


def test_a_directory_is_read_in_sorted_order_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b.txt", "sub/a.TXT", "sub/c.jsonl", ".hidden.txt", ".git/x.txt"):
        write(tmp_path / name, json.dumps(name) if name.endswith("jsonl") else name)
    write(tmp_path / "empty.txt", "")
    write(tmp_path / "weights.bin", b"\0\1")
    (tmp_path / "sub" / "loop").symlink_to(tmp_path)
    (tmp_path / "link.txt").symlink_to(tmp_path / "b.txt")
    pieces, report = read(Source(names=(str(tmp_path), str(tmp_path / "b.txt"))))
    assert [piece.text for piece in pieces] == ["b.txt", "sub/a.TXT", "sub/c.jsonl"]
    assert (report.files, report.files_skipped) == (3, 2)


def test_a_glob_is_recursive_and_sorted(tmp_path: Path) -> None:
    for name in ("b/2.txt", "a/3.txt", "1.txt", "part-0", "x.bin"):
        write(tmp_path / name, name)
    pieces, _ = read(Source(names=(str(tmp_path / "**" / "*.txt"),)))
    assert [piece.text for piece in pieces] == ["1.txt", "a/3.txt", "b/2.txt"]
    assert texts(tmp_path / "part-*") == ["part-0"]
    assert message(tmp_path / "*.jsonl") == (
        f"data.source: glob {tmp_path}/*.jsonl has no file to read (0 files found). What can be "
        "read: .txt, .md and other text, .csv, .json, .jsonl, .ndjson, .parquet, .tsv, not empty, "
        "not hidden"
    )
    (tmp_path / "none").mkdir()
    start = f"data.source: directory {tmp_path}/none has no file to read (0 files found)."
    assert message(tmp_path / "none").startswith(start)


def test_wrong_encodings_name_line_byte_and_cure(tmp_path: Path) -> None:
    latin = write(tmp_path / "latin.txt", "one\ncaf\xe9s\n".encode("latin-1"))
    assert message(latin) == (
        f"{latin}: line 2, byte 7 is 0xe9: the file is not utf-8. Set data.encoding: latin-1"
    )
    windows = write(tmp_path / "windows.csv", b"text\n\x93quoted\x94\n")
    assert message(windows) == (
        f"{windows}: line 2, byte 5 is 0x93: the file is not utf-8. Set data.encoding: cp1252"
    )
    wide = write(tmp_path / "wide.jsonl", '{"text": "a"}'.encode("utf-16"))
    assert message(wide) == (
        f"{wide}: line 1, byte 0 is 0xff: the file is not utf-8. Set data.encoding: utf-16"
    )
    bare = write(tmp_path / "bare.txt", "abc".encode("utf-16-le"))
    assert message(bare) == (
        f"{bare}: NUL characters in line 1: the file looks like utf-16-le: "
        "set data.encoding: utf-16-le"
    )
    mostly = write(tmp_path / "mostly.txt", "caf\xe9\n".encode() * 2 + b"\xff\n")
    assert message(mostly) == (
        f"{mostly}: line 3, byte 12 is 0xff: the file is not utf-8. "
        "Most of it is utf-8: repair or remove that byte"
    )
    plain = write(tmp_path / "plain.txt", "caf\xe9\n")
    assert message(plain, encoding="utf-16") == (
        f"{plain}: UTF-16 stream does not start with BOM: the file is not utf-16. "
        "Set data.encoding: utf-8"
    )
    assert message(plain, encoding="utf-9") == (
        "data.encoding is 'utf-9', which Python does not know: use utf-8, latin-1, cp1252, utf-16 "
        "or another of its text encodings"
    )


def test_a_wrong_byte_deep_in_a_file_is_found(tmp_path: Path) -> None:
    path = write(tmp_path / "deep.txt", ("\xe9" * 100 + "\n").encode() * 2000 + b"ab\xe9\n")
    at = 2000 * 201 + 2
    assert message(path).startswith(f"{path}: line 2001, byte {at} is 0xe9: the file is not utf-8.")
    assert message(path, format="document").startswith(f"{path}: line 2001, byte {at} is 0xe9:")


def test_files_that_are_no_text(tmp_path: Path) -> None:
    empty = write(tmp_path / "empty.txt", "")
    assert message(empty) == (f"{empty}: the file is empty (0 bytes): give a file with text in it")
    blank = write(tmp_path / "blank.txt", " \n\n")
    assert message(blank) == (
        f"data.source {blank}: there is no text in it: 0 documents, 2 blank ones skipped. "
        "Give a source with at least one text"
    )
    for name in FORMATS[2:]:
        start = f"data.source {blank}: there is no text in it"
        assert message(blank, format=name).startswith(start)
    nul = write(tmp_path / "nul.txt", "a\nb\0c\n")
    cure = "this is no text file. Name files of text, or convert this one"
    assert message(nul) == f"{nul}: a NUL character in line 2: {cure}"
    assert message(nul, format="document") == f"{nul}: a NUL character in line 2: {cure}"
    packed = write(tmp_path / "text.txt.gz", gzip.compress(b"text"))
    assert message(packed) == (
        f"{packed}: a compressed file (.gz): unpack it and name what was in it"
    )
    weights = write(tmp_path / "pytorch_model.bin", b"\0")
    assert message(weights) == (
        f"{weights}: a .bin file is not text: convert it to .txt, .csv, .jsonl or .parquet"
    )


def test_names_that_are_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "data" / "train.txt", "text")
    tail = "A relative path starts at the working directory"
    assert message("data/trian.txt") == (
        f"data.source 'data/trian.txt': no such file or directory: {tmp_path}/data/trian.txt. "
        f"Did you mean 'data/train.txt'? {tail}"
    )
    assert message("./x") == f"data.source './x': no such file or directory: {tmp_path}/x. {tail}"
    # The directory is there, so this is no id of the hub: no network is asked.
    assert message("data/x").startswith("data.source 'data/x': no such file or directory: ")
    assert message("embedded:x") == (
        "data.source 'embedded:x': the only embedded text is 'embedded:python-reference'"
    )
    assert message("x.txt", format="line") == (
        "data.format is 'line': use one of auto, lines, paragraphs, document"
    )
    assert message() == "data.source names nothing: give a file, a directory or a data set"
    assert message("x.txt", separator="") == (
        "data.separator is empty: leave it out, or give the text to split at"
    )


def test_names_are_checked_without_reading_or_asking_the_hub(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "b.zip").write_bytes(b"x")
    good = [str(tmp_path), str(tmp_path / "a.txt"), str(tmp_path / "*a.txt"), "owner/data", "data"]
    check_names([*good, "embedded:python-reference"])
    for bad in ("c.txt", "empty.txt", "b.zip", "*.md"):
        name = str(tmp_path / bad)
        with pytest.raises(DataError) as expected:
            resolve(Source(names=(name,)), ReadReport())
        with pytest.raises(DataError) as found:
            check_names(["data", name])
        assert str(found.value) == str(expected.value)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(tmp_path: Path) -> None:
    path = write(tmp_path / "secret.txt", "text")
    path.chmod(0)
    assert message(path) == f"{path}: cannot be read: Permission denied"


def test_malformed_tables_name_file_and_line(tmp_path: Path) -> None:
    shifted = write(tmp_path / "shifted.csv", "text,n\nfine,1\nhello, world,1\n")
    assert message(shifted) == (
        f"{shifted}:3: 3 fields, but the first line names 2: text, n. A field that holds a tab or "
        "a comma that separates nothing needs quotes around it"
    )
    short = write(tmp_path / "short.csv", "text,n\nfine\n")
    assert message(short).startswith(f"{short}:2: 1 fields, but the first line names 2: text, n.")
    no_end = write(tmp_path / "quote.csv", 'text\n"never ends\nb\n')
    assert message(no_end).startswith(f"{no_end}:3: malformed: unexpected end of data. A field ")
    twice = write(tmp_path / "twice.csv", "text,text\na,b\n")
    assert message(twice) == f"{twice}:1: a column name occurs twice: text, text. Rename one"
    headless = write(tmp_path / "headless.csv", "some text,1\nmore,2\n")
    assert message(headless) == (
        f"{headless}: the first line names the columns: no column 'text', nor both 'prompt' and "
        "'completion'. It has 'some text', '1'. Did you mean 'some text'? "
        "Set data.text_column, or data.prompt_column and data.completion_column"
    )
    nul = write(tmp_path / "nul.csv", "text\na\0b\n")
    assert message(nul).startswith(f"{nul}: a NUL character in line 2: ")


def test_malformed_json_names_file_and_line(tmp_path: Path) -> None:
    cut_off = write(tmp_path / "cut.jsonl", '{"text": "a"}\n{"text": "b\n')
    assert message(cut_off) == (
        f"{cut_off}:2: malformed JSON: Invalid control character at: line 1 column 12 (char 11). "
        "In JSON Lines every line is one complete value"
    )
    number = write(tmp_path / "number.jsonl", '{"text": "a"}\n{"text": 5}\n')
    assert message(number) == f"{number}:2: the text is 5, of type int: write it as a string"
    listed = write(tmp_path / "list.jsonl", "[1]\n")
    assert message(listed) == (
        f"{listed}:1: expected an object or a string, found list: write each example as "
        "{'text': ...}"
    )
    missing = write(tmp_path / "missing.jsonl", '{"txt": "a"}\n{"body": "b"}\n')
    assert message(missing) == (
        f"{missing}: no column 'text', nor both 'prompt' and 'completion'. It has 'txt', 'body'. "
        "Did you mean 'txt'? Set data.text_column, or data.prompt_column and "
        "data.completion_column"
    )
    surrogate = write(tmp_path / "half.jsonl", '{"text": "a\\ud83d"}\n')
    assert message(surrogate).startswith(f"{surrogate}:1: half of a surrogate pair in the text")
    nul = write(tmp_path / "nul.jsonl", '{"text": "a\\u0000"}\n')
    assert message(nul) == f"{nul}:1: a NUL character in the text: remove it"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('[{"text": "a"},\n{"text": }]', "2: malformed JSON: Expecting value. A .json file is"),
        ('[{"text": "a"}\n', "2: malformed JSON: the array has no end: add ]"),
        ('["a"]\n"b"', "2: malformed JSON: text after the end of the array"),
        ('["a",\n\n"b', "3: malformed JSON: Unterminated string starting at. A .json file is"),
        ("\n12 ", "2: expected an object or a string, found int: write each example as"),
    ],
)
def test_malformed_json_files(tmp_path: Path, content: str, expected: str) -> None:
    path = write(tmp_path / "x.json", content)
    assert message(path).startswith(f"{path}:{expected}")


def test_json_is_read_across_the_borders_of_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = [{"text": f'{i} "\\\n' + "x" * (i % 40), "n": [i, {"y": 1.5e3}]} for i in range(200)]
    path = write(tmp_path / "x.json", json.dumps(values, indent=1))
    for size in (1, 7, 64):
        monkeypatch.setattr("lowvram.data.text.CHUNK_CHARACTERS", size)
        assert texts(path) == [value["text"] for value in values]


def test_malformed_json_is_not_searched_for_a_cure_to_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowvram.data.text.CHUNK_CHARACTERS", 64)
    monkeypatch.setattr("lowvram.data.text.BUFFER_BYTES", 64)
    path = write(tmp_path / "x.json", '[{"text": }' + ' {"text": "a"},' * 10_000 + "]")
    report = ReadReport()
    with pytest.raises(DataError, match="x.json:1: malformed JSON: Expecting value"):
        list(read_pieces(Source(names=(str(path),)), report, split_long=False))
    assert report.bytes_read < path.stat().st_size / 2


def test_a_csv_field_of_ten_million_characters(tmp_path: Path) -> None:
    path = write(tmp_path / "long.csv", "text\n" + "x" * 10_000_000 + "\n")
    assert [len(text) for text in texts(path)] == [10_000_000]


class TestHub:
    def test_rows_of_a_data_set(self, monkeypatch: pytest.MonkeyPatch) -> None:
        rows = datasets.Dataset.from_dict({"id": [1, 2, 3], "text": ["a", None, "NA"]})
        asked: list[Any] = []
        monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or rows)
        pieces, report = read(Source(names=("org/name",), config="small", split="train[:3]"))
        assert [piece.text for piece in pieces] == ["a", "NA"]
        assert report.nulls == 1
        assert asked == [(("org/name",), {"name": "small", "split": "train[:3]"})]

    @pytest.mark.parametrize(
        ("error", "expected"),
        [
            (
                ConnectionError("Couldn't reach 'org/name' on the Hub"),
                "ConnectionError: Couldn't reach 'org/name' on the Hub. The hub cannot be reached "
                "from here: download the data set on another machine and name its files",
            ),
            (
                ValueError("Config name is missing.\nPlease pick one among: ['a', 'b']"),
                "ValueError: Config name is missing. Please pick one among: ['a', 'b']. "
                "Set data.config to one of those",
            ),
            (
                ValueError("Unknown split \"tran\". Should be one of ['train']."),
                "ValueError: Unknown split \"tran\". Should be one of ['train']. "
                "Set data.split to one of those",
            ),
        ],
    )
    def test_errors(self, monkeypatch: pytest.MonkeyPatch, error: Exception, expected: str) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise error

        monkeypatch.setattr(datasets, "load_dataset", fail)
        assert message("org/name") == (
            f"data.source 'org/name': no such file or directory: {os.path.abspath('org/name')}, "
            f"and as a hub data set (configuration None, split 'train') it cannot be loaded: "
            f"{expected}"
        )


class TestReference:
    def test_documents_are_many_and_of_like_size(self) -> None:
        documents = list(reference_documents(reference_topics()))
        assert 60 <= len(documents) <= 150
        assert all(documents)
        assert max(map(len, documents)) <= MAX_CHARACTERS + 2000
        assert sum(map(len, documents)) > 200_000

    def test_no_long_line_and_no_paragraph_is_in_two_documents(self) -> None:
        seen: dict[str, int] = {}
        for i, document in enumerate(reference_documents(reference_topics())):
            marks = {" ".join(line.split()) for line in document.splitlines() if len(line) >= 60}
            marks = {mark for mark in marks if len(mark) >= 60}
            marks |= {" ".join(paragraph.split()) for paragraph in document.split("\n\n")}
            for mark in marks:
                assert seen.setdefault(mark, i) == i, mark

    def test_it_is_the_same_each_time(self) -> None:
        first, report = read(Source(names=("embedded:python-reference",)))
        again, _ = read(Source(names=("embedded:python-reference",)))
        assert first == again
        assert report.documents == len(first)

    def test_headings(self) -> None:
        assert HEADING.match("Calls\n*****")
        assert HEADING.match("A title\n=======")
        assert not HEADING.match("text\nmore text")

    def test_a_python_without_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
        start = "this Python has no module pydoc_data.topics (some distributions leave it out)"
        assert message("embedded:python-reference").startswith(start)


def test_resolve_gives_each_file_once(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "a")
    origins = resolve(Source(names=(str(path), str(tmp_path), str(path))), ReadReport())
    assert [origin.path for origin in origins] == [path]
    assert re.fullmatch(r".*a\.txt", origins[0].name)
