"""Tokens: those of the whole text, with an end for each document; cached, whole or not there."""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lowvram.data import Source, TokenStore, tokenize
from lowvram.data.cache import cache_directory
from lowvram.data.encoder import LLAMA_3, Encoder
from lowvram.data.pieces import parts
from lowvram.errors import DataError

EOS = "<|endoftext|>"
LONG = "characteristically"  # one token
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
LLAMA = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Split(Regex(LLAMA_3), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
)
# Whatever may surround a cut: white space of all kinds, letters, digits, marks, contractions.
NASTY = """a b É 1 23 's ' ! .. 'S 'll _ \u4e2d \U0001f600 \u0301 \u200b \u180e \ufeff""".split()
NASTY += ["\n", "\n\n", " ", "  ", "\t", "\r\n", "\r", "\xa0", "\u2028", "\x85", "\f", "\x1c"]


def make_tokenizer(pre_tokenizer: Any = GPT2, **options: Any) -> PreTrainedTokenizerFast:
    """A byte-level BPE in which runs of white space and common words have tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[EOS],
    )
    corpus = ["hello world, hello there\n\n", "a  b\n\n\nc \n d\t\te", "it's the end.\n\nof"] * 9
    corpus += [f"{LONG} {LONG}"] * 9
    backend.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{"eos_token": EOS, **options})


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("hello world\n\nit's the end of it\n")
    return path


def run(path: Path, tokenizer: Any, **options: Any) -> TokenStore:
    source = {name: options.pop(name) for name in ("format", "separator") if name in options}
    cache = path.parent / "cache"
    return tokenize(Source(names=(str(path),), **source), tokenizer, cache_dir=cache, **options)


def ids(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer(
        text, add_special_tokens=False, split_special_tokens=True, verbose=False
    )["input_ids"]
    return found


def test_a_store(path: Path, tokenizer: Any) -> None:
    store = run(path, tokenizer)
    expected = [ids(tokenizer, line) + [0] for line in ("hello world", "it's the end of it")]
    assert [store.document(i).tolist() for i in range(len(store))] == expected
    assert store.tokens.dtype == np.uint16
    assert not store.tokens.flags.writeable
    assert isinstance(store.tokens, np.memmap)
    assert store.lengths().tolist() == [len(tokens) for tokens in expected]
    assert store.lengths(np.array([1])).tolist() == [len(expected[1])]
    assert store.prompt_lengths.tolist() == [0, 0]
    assert store.byte_counts.tolist() == [11, 18]
    assert store.word_counts.tolist() == [2, 5]
    assert (store.report.documents, store.report.blank, store.report.bytes_read) == (2, 1, 32)
    assert len(store.sha256) == 64


def test_without_eos(path: Path, tokenizer: Any) -> None:
    store = run(path, tokenizer, append_eos=False)
    assert store.document(0).tolist() == ids(tokenizer, "hello world")


def test_a_special_token_in_the_text_is_only_text(path: Path, tokenizer: Any) -> None:
    path.write_text(f"a{EOS}b\nc\n")
    store = run(path, tokenizer)
    assert len(store) == 2
    assert store.document(0).tolist().count(0) == 1
    assert store.document(0)[:-1].tolist() == ids(tokenizer, f"a{EOS}b")
    allowed = run(path, tokenizer, allow_special_tokens=True)
    assert len(allowed) == 2
    assert allowed.document(0).tolist() == [*ids(tokenizer, "a"), 0, *ids(tokenizer, "b"), 0]


def test_what_a_tokenizer_puts_in_front_is_kept(path: Path) -> None:
    tokenizer = make_tokenizer(bos_token="<s>")
    bos = tokenizer.convert_tokens_to_ids("<s>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"<s> $A {EOS}", special_tokens=[("<s>", bos), (EOS, 0)]
    )
    path.write_text("ask|hello\nworld\n")
    store = run(path, tokenizer, separator="|")
    prompt = [bos, *ids(tokenizer, "ask|")]
    assert store.document(0).tolist() == [*prompt, *ids(tokenizer, "hello"), 0]
    assert store.document(1).tolist() == [bos, *ids(tokenizer, "world"), 0]
    assert store.prompt_lengths.tolist() == [len(prompt), 0]


def test_prompts_and_their_words(path: Path, tokenizer: Any) -> None:
    path.write_text("name[X]||Hello there\nQ: || A\n")
    store = run(path, tokenizer, separator="||")
    assert store.prompt_lengths.tolist() == [len(ids(tokenizer, p)) for p in ("name[X]||", "Q: ||")]
    assert store.word_counts.tolist() == [2, 3]
    assert store.byte_counts.tolist() == [20, 7]


@pytest.mark.parametrize("pre_tokenizer", [GPT2, LLAMA], ids=["gpt2", "llama3"])
def test_a_cut_is_always_a_border_of_pre_tokens(
    pre_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowvram.data.pieces.PIECE_CHARACTERS", 1)

    def pre_tokens(text: str) -> list[str]:
        return [token for token, _ in pre_tokenizer.pre_tokenize_str(text)]

    generator = random.Random(0)
    cuts = 0
    for _ in range(5000):
        text = "".join(generator.choices(NASTY, k=generator.randint(2, 14)))
        found = list(parts([text]))
        cuts += len(found) - 1
        assert "".join(found) == text
        assert sum(map(pre_tokens, found), []) == pre_tokens(text), text
    assert cuts > 1000


def test_parts_do_not_depend_on_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowvram.data.pieces.PIECE_CHARACTERS", 10)
    generator = random.Random(1)
    for _ in range(300):
        text = "".join(generator.choices(NASTY, k=100))
        size = generator.randint(1, 30)
        chunks = [text[i : i + size] for i in range(0, len(text), size)]
        assert list(parts(chunks)) == list(parts([text]))
        assert list(parts(chunks, split_long=False)) == [text]


@pytest.mark.parametrize("format", ["lines", "paragraphs", "document"])
@pytest.mark.parametrize("pre_tokenizer", [GPT2, LLAMA], ids=["gpt2", "llama3"])
def test_a_stream_of_pieces_has_the_tokens_of_the_whole(
    path: Path, pre_tokenizer: Any, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = make_tokenizer(pre_tokenizer)
    generator = random.Random(2)
    pieces = [" " if generator.random() < 0.3 else p for p in generator.choices(NASTY, k=3000)]
    path.write_text("\ufeff" + "".join(pieces), encoding="utf-8", newline="")
    whole = run(path, without_splitting(tokenizer), format=format)
    monkeypatch.setattr("lowvram.data.pieces.PIECE_CHARACTERS", 50)
    monkeypatch.setattr("lowvram.data.text.CHUNK_CHARACTERS", 33)
    monkeypatch.setattr("lowvram.data.tokens.BATCH_CHARACTERS", 99)
    split = run(path, tokenizer, format=format)
    assert not split.cached
    assert split.sha256 == whole.sha256
    for name in ("tokens", "starts", "hashes", "byte_counts", "word_counts"):
        assert np.array_equal(getattr(split, name), getattr(whole, name)), name
    assert split.report == whole.report
    text = path.read_text(encoding="utf-8-sig")
    if format == "document":
        assert split.document(0).tolist() == [*ids(tokenizer, text), 0]
        assert split.word_counts.tolist() == [len(text.split())]
        assert split.byte_counts.tolist() == [len(text.encode())]


def without_splitting(tokenizer: Any) -> Any:
    """The same tokens from a tokenizer that is not known to allow cuts."""
    copy = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()), eos_token=EOS
    )
    copy.backend_tokenizer.normalizer = normalizers.Sequence([])
    assert not Encoder(copy, True, False).may_split
    return copy


def test_which_tokenizers_allow_cuts() -> None:
    def allowed(tokenizer: Any) -> bool:
        return Encoder(tokenizer, True, False).may_split

    assert allowed(make_tokenizer(GPT2))
    assert allowed(make_tokenizer(LLAMA))
    assert not allowed(make_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=True)))
    assert not allowed(make_tokenizer(pre_tokenizers.Metaspace()))
    with_space = make_tokenizer()
    with_space.add_tokens([" x"])
    assert not allowed(with_space)


@pytest.mark.parametrize("end", [" ", ","], ids=["split", "whole"])
def test_a_line_of_ten_megabytes_loses_nothing(path: Path, tokenizer: Any, end: str) -> None:
    line = (LONG + end) * (10_000_000 // len(LONG + end))
    path.write_text("hello\n" + line + "\n")
    store = run(path, tokenizer)
    assert len(store) == 2
    assert store.byte_counts.tolist() == [5, len(line)]
    # One token for the first word, one for each further one with its space, one for each comma.
    n = line.count(LONG)
    expected = n + 1 if end == " " else 2 * n
    assert int(store.lengths()[1]) == expected + 1
    assert store.document(1)[:9].tolist() == ids(tokenizer, line[:1000])[:9]


@pytest.mark.parametrize("text", ["a" * 99, "a b " * 60, " " * 99 + "a", "\n", " " * 99, "a\n"])
@pytest.mark.parametrize("last", ["", "\n", " ", "\nx"])
def test_lines_in_stretches_are_the_lines(
    path: Path, tokenizer: Any, text: str, last: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blank or not, long or short, ended or not, up to the border of a stretch or not."""
    path.write_text(f"x y\n{text}\n\n{text}{last}")
    expected = run(path, without_splitting(tokenizer))
    monkeypatch.setattr("lowvram.data.pieces.PIECE_CHARACTERS", 10)
    for characters in (1, 7, 99, 100, 101):
        monkeypatch.setattr("lowvram.data.text.CHUNK_CHARACTERS", characters)
        found = tokenize(
            Source(names=(str(path),)), tokenizer, cache_dir=path.parent / f"cache {characters}"
        )
        assert found.sha256 == expected.sha256
        assert found.report == expected.report


def test_no_more_than_a_few_batches_are_held(
    path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a long line and of many short ones: pieces read ahead of those written, at most."""
    monkeypatch.setattr("lowvram.data.text.CHUNK_CHARACTERS", 1000)
    monkeypatch.setattr("lowvram.data.tokens.BATCH_CHARACTERS", 4000)
    monkeypatch.setattr("lowvram.data.tokens.BATCH_PIECES", 500)
    monkeypatch.setattr("lowvram.data.pieces.PIECE_CHARACTERS", 100)
    held = most = 0
    tokens = sys.modules["lowvram.data.tokens"]
    read, add = tokens.read_pieces, tokens.StoreWriter.add

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal held, most
        for piece in read(*arguments, **options):
            assert len(piece.text) < 200
            held += 1
            most = max(most, held)
            yield piece

    def added(*arguments: Any) -> None:
        nonlocal held
        held -= 1
        add(*arguments)

    monkeypatch.setattr(tokens, "read_pieces", counted)
    monkeypatch.setattr(tokens.StoreWriter, "add", added)
    path.write_text("hello world " * 10_000 + "\n" + "a\n" * 5_000)
    assert len(run(path, tokenizer)) == 5_001
    assert held == 0
    assert most <= (tokens.BATCHES_AHEAD + 1) * 500


def test_an_error_of_the_tokenizer_is_not_lost(
    path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: Encoder, texts: list[str]) -> list[list[int]]:
        raise MemoryError("no room")

    monkeypatch.setattr(Encoder, "encode", fails)
    with pytest.raises(MemoryError, match="no room"):
        run(path, tokenizer)
    assert list((path.parent / "cache").iterdir()) == []


class TestCache:
    def test_the_second_time_it_is_found(self, path: Path, tokenizer: Any) -> None:
        first, second = run(path, tokenizer), run(path, tokenizer)
        assert (first.cached, second.cached) == (False, True)
        assert first.sha256 == second.sha256
        assert second.report == first.report
        assert np.array_equal(first.tokens, second.tokens)
        assert len(list((path.parent / "cache").iterdir())) == 1

    def test_every_change_makes_a_new_one(self, path: Path, tokenizer: Any) -> None:
        run(path, tokenizer)
        assert not run(path, tokenizer, append_eos=False).cached
        assert not run(path, tokenizer, allow_special_tokens=True).cached
        assert not run(path, tokenizer, format="document").cached
        assert not run(path, make_tokenizer(LLAMA)).cached
        os.utime(path, ns=(1, 1))
        assert not run(path, tokenizer).cached
        path.write_text("hello world\n\nit's the end of us\n")
        os.utime(path, ns=(1, 1))
        assert run(path, tokenizer).cached  # size and time are all that is looked at
        os.utime(path, ns=(2, 2))
        assert not run(path, tokenizer).cached

    def test_calls_of_others_make_no_difference(self, path: Path) -> None:
        tokenizer = make_tokenizer(pad_token=EOS)
        first = run(path, tokenizer)
        tokenizer(["a", "b c"], padding=True, truncation=True, max_length=4)
        assert tokenizer.backend_tokenizer.padding is not None
        second = run(path, tokenizer)
        assert second.cached
        assert second.sha256 == first.sha256

    @pytest.mark.parametrize("damage", ["cut", "changed", "no report", "bad report", "missing"])
    def test_a_broken_one_is_made_again(self, path: Path, tokenizer: Any, damage: str) -> None:
        first = run(path, tokenizer)
        expected = first.sha256
        (entry,) = (path.parent / "cache").iterdir()
        data = (entry / "tokens").read_bytes()
        if damage == "cut":
            (entry / "tokens").write_bytes(data[:-2])
        elif damage == "changed":
            (entry / "tokens").write_bytes(b"\1" + data[1:])
        elif damage == "no report":
            (entry / "store.json").unlink()
        elif damage == "bad report":
            (entry / "store.json").write_text("{")
        else:
            (entry / "hashes").unlink()
        again = run(path, tokenizer)
        assert not again.cached
        assert again.sha256 == expected
        assert run(path, tokenizer).cached
        assert list((path.parent / "cache").iterdir()) == [entry]

    def test_a_faster_process_is_believed(
        self, path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = run(path, tokenizer)
        answers = iter([None])
        real = sys.modules["lowvram.data.cache"].open_entry
        monkeypatch.setattr(
            "lowvram.data.tokens.open_entry",
            lambda entry, cached: next(answers, real(entry, cached=cached)),
        )
        assert run(path, tokenizer).sha256 == first.sha256
        assert len(list((path.parent / "cache").iterdir())) == 1

    def test_an_error_leaves_nothing_behind(self, path: Path, tokenizer: Any) -> None:
        path.write_bytes(b"good\n\xff\n")
        with pytest.raises(DataError, match="line 2, byte 5 is 0xff"):
            run(path, tokenizer)
        assert list((path.parent / "cache").iterdir()) == []

    def test_a_directory_that_cannot_be_made(self, path: Path, tokenizer: Any) -> None:
        (path.parent / "cache").write_text("a file is in the way")
        with pytest.raises(DataError) as caught:
            run(path, tokenizer)
        assert str(caught.value) == (
            f"{path.parent}/cache: tokens cannot be written: File exists. Set LOWVRAM_CACHE to a "
            "directory with room for about twice the bytes of the text"
        )

    def test_where_it_is(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("LOWVRAM_CACHE", str(tmp_path))
        assert cache_directory() == tmp_path / "tokens"
        monkeypatch.delenv("LOWVRAM_CACHE")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert cache_directory() == tmp_path / "lowvram" / "tokens"

    def test_the_embedded_text(self, tmp_path: Path, tokenizer: Any) -> None:
        source = Source(names=("embedded:python-reference",))
        seen: list[tuple[int, int | None]] = []
        first = tokenize(
            source, tokenizer, cache_dir=tmp_path, progress=lambda *counts: seen.append(counts)
        )
        assert tokenize(source, tokenizer, cache_dir=tmp_path).cached
        assert seen == [(0, None)]
        assert len(first) >= 60


def test_progress_counts_bytes(path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowvram.data.tokens.BATCH_CHARACTERS", 5000)
    monkeypatch.setattr("lowvram.data.text.BUFFER_BYTES", 5000)
    path.write_text("hello world\n" * 5000)
    seen: list[tuple[int, int | None]] = []
    run(path, tokenizer, progress=lambda *counts: seen.append(counts))
    assert len(seen) > 5
    assert seen == sorted(seen)
    assert seen[-1] == (60_000, 60_000)
    assert 0 < seen[0][0] < 30_000


def test_tokenizers_that_cannot_be_used(path: Path) -> None:
    with pytest.raises(DataError) as caught:
        run(path, make_tokenizer(eos_token=None))
    assert str(caught.value) == (
        "the tokenizer has no end-of-sequence token, which ends every document: set eos_token in "
        "its tokenizer_config.json"
    )
    empty = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), eos_token=EOS)
    with pytest.raises(DataError) as caught:
        run(path, empty)
    assert str(caught.value) == (
        "the tokenizer makes no token of 2 documents; its vocabulary has 1 entries: load it from "
        "the directory of a tokenizer"
    )
    with pytest.raises(DataError, match="the tokenizer object is not a fast one: use a directory"):
        run(path, object())


def test_a_large_vocabulary_gets_wide_tokens(path: Path, tokenizer: Any) -> None:
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["added_tokens"].append({**backend["added_tokens"][0], "id": 70_000, "content": "<far>"})
    backend["model"]["vocab"]["<far>"] = 70_000
    wide = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(backend)), eos_token="<far>"
    )
    store = run(path, wide)
    assert store.tokens.dtype == np.uint32
    assert store.document(0)[-1] == 70_000
