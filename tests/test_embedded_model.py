"""The embedded base model is small, plain and trained; the script that made it reads what it says.

The scores below use the training script's own windows: 256 tokens of context, per document.
"""

import importlib.util
import json
import math
import random
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from transformers import AutoTokenizer, GPT2LMHeadModel, GPT2Tokenizer

ROOT = Path(__file__).resolve().parents[1]
MODEL_DIR = ROOT / "lowvram" / "assets" / "gpt2-docstrings"
END_ID = 4095

FILES = {
    "config.json",
    "generation_config.json",
    "merges.txt",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
}

# Written for this test in the manner of a docstring; it is in no standard library.
UNSEEN_TEXT = """Return the sorted names of all files in a directory.

If the optional argument recursive is true, the files of every subdirectory are included too.
The argument path must be a string or a path-like object. Names are returned as strings, in the
order of their characters.

Raises ValueError if path does not exist, and TypeError if it is not a string. The result is a
new list; changing it has no effect on the directory.

    >>> list_files("project", recursive=True)
    ['README.txt', 'setup.py']
"""


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The training script as a module; benchmarks/ is not a package."""
    path = ROOT / "benchmarks" / "train_embedded_model.py"
    spec = importlib.util.spec_from_file_location("train_embedded_model", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tokenizer() -> GPT2Tokenizer:
    loaded = AutoTokenizer.from_pretrained(MODEL_DIR)
    assert isinstance(loaded, GPT2Tokenizer)
    return loaded


@pytest.fixture(scope="module")
def model() -> GPT2LMHeadModel:
    loaded = GPT2LMHeadModel.from_pretrained(MODEL_DIR, dtype=torch.float32)
    loaded.train(False)
    return loaded


def load_with_info(path: Path) -> tuple[GPT2LMHeadModel, dict[str, Any]]:
    """Load a model and what transformers says about missing and unexpected weights."""
    loaded: Any = GPT2LMHeadModel.from_pretrained(path, output_loading_info=True)
    model, info = loaded
    return model, info


# --- the directory --------------------------------------------------------------------------------


def test_directory_holds_only_plain_files_and_is_small() -> None:
    files = list(MODEL_DIR.iterdir())

    assert {path.name for path in files} == FILES
    assert sum(path.stat().st_size for path in files) <= 8_000_000


def test_weights_load_with_nothing_missing_and_nothing_left_over() -> None:
    model, info = load_with_info(MODEL_DIR)

    assert not any(info.values())
    with safe_open(MODEL_DIR / "model.safetensors", "pt") as weights:
        names = set(weights.keys())
    assert len(names) == 12 * model.config.n_layer + 4
    assert "lm_head.weight" not in names  # tied to the embedding
    assert model.lm_head.weight is model.transformer.wte.weight


def test_config_is_that_of_a_plain_gpt2() -> None:
    config = json.loads((MODEL_DIR / "config.json").read_text())

    assert config["architectures"] == ["GPT2LMHeadModel"]
    assert config["activation_function"] == "gelu_new"
    assert config["use_cache"] is True
    assert config["tie_word_embeddings"] is True
    assert config["dtype"] == "float32"
    assert (config["vocab_size"], config["n_positions"]) == (4096, 256)
    assert config["bos_token_id"] == config["eos_token_id"] == END_ID


# --- the tokenizer --------------------------------------------------------------------------------


def test_tokenizer_is_a_gpt2_tokenizer_of_4096_tokens(tokenizer: GPT2Tokenizer) -> None:
    assert isinstance(tokenizer, GPT2Tokenizer)
    assert len(tokenizer) == 4096
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == END_ID
    assert tokenizer.model_max_length == 256
    assert tokenizer("")["input_ids"] == []
    assert tokenizer("a<|endoftext|>b")["input_ids"][1] == END_ID


@pytest.mark.parametrize(
    "text",
    [
        "Return the number of items.",
        " a leading space, and a trailing one ",
        "tabs\tand\r\nline ends\n\n\n    indented ,  spaced . n't",
        "naïve Ångström 中文 עברית e\u0301",
        "emoji 👩‍👩‍👧‍👦 🏳️‍🌈 \U0001f600",
        "".join(map(chr, range(256))),
        "\ufeff\u2028\u0085\ufffd\U0010ffff",
    ],
)
def test_tokenizer_gives_back_any_text(tokenizer: GPT2Tokenizer, text: str) -> None:
    ids = tokenizer(text)["input_ids"]

    assert END_ID not in ids
    assert tokenizer.decode(ids) == text


def test_vocabulary_has_every_byte(script: ModuleType, tokenizer: GPT2Tokenizer) -> None:
    alphabet = script.pre_tokenizers.ByteLevel.alphabet()

    assert len(alphabet) == 256
    assert set(alphabet) <= set(tokenizer.get_vocab())


def test_old_and_new_files_hold_the_same_tokenizer(tokenizer: GPT2Tokenizer) -> None:
    vocab = json.loads((MODEL_DIR / "vocab.json").read_text(encoding="utf-8"))
    lines = (MODEL_DIR / "merges.txt").read_text(encoding="utf-8").splitlines()
    merges: Any = [tuple(line.split(" ")) for line in lines if not line.startswith("#version")]
    old = GPT2Tokenizer(vocab=vocab, merges=merges)

    assert vocab == tokenizer.get_vocab()
    assert old(UNSEEN_TEXT)["input_ids"] == tokenizer(UNSEEN_TEXT)["input_ids"]


# --- the model ------------------------------------------------------------------------------------


def test_perplexity_of_unseen_text_is_far_below_a_unigram_bound(
    script: ModuleType, model: GPT2LMHeadModel, tokenizer: GPT2Tokenizer
) -> None:
    """The trained model scores this text at 41.

    The training script's unigram model (add-one counts of the training tokens) scores it at 549.
    Even a unigram model fitted to this very text could not be below the entropy of its tokens,
    71, which the test computes.
    """
    ids = tokenizer(UNSEEN_TEXT)["input_ids"]
    perplexity = math.exp(script.score_documents(model, [ids]).mean())

    shares = torch.bincount(torch.tensor([*ids, END_ID])).double() / (len(ids) + 1)
    entropy_bound = math.exp(torch.special.entr(shares).sum())
    assert perplexity < 549 / 10
    assert perplexity < entropy_bound / 1.25


def test_packed_documents_do_not_see_each_other(script: ModuleType, model: GPT2LMHeadModel) -> None:
    rng = random.Random(0)
    pieces = [[rng.randrange(END_ID) for _ in range(length)] for length in (90, 2, 120)]

    with torch.no_grad():
        packed = script.token_losses(model, [script.make_row(pieces)])
        alone = torch.cat([script.token_losses(model, [script.make_row([p])]) for p in pieces])

    assert len(packed) == 89 + 1 + 119
    torch.testing.assert_close(packed, alone, atol=1e-4, rtol=1e-4)


# --- the script -----------------------------------------------------------------------------------


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def test_corpus_holds_docstrings_of_the_library_only(script: ModuleType, tmp_path: Path) -> None:
    def doc(name: str) -> str:
        return f"{name} is described in a sentence that is long enough."

    write(
        tmp_path / "a.py",
        f'"""{doc("module")}"""\n'
        f'class C:\n    """{doc("class")}"""\n'
        f'    def f(self):\n        """{doc("method")}\n\n'
        '        Flush.\n          Indented.\n        """\n'
        f'        "{doc("not a docstring")}"\n'
        f'async def g():\n    "{doc("async")}"\n'
        'def h():\n    """Too short."""\n',
    )
    write(tmp_path / "pkg" / "b.py", f'"""{doc("module")}"""\ndef f():\n    "{doc("b")}"\n')
    for part in ("pydoc_data", "site-packages", "dist-packages", "test", "lib2to3"):
        write(tmp_path / part / "x.py", f'"""{doc("excluded")}"""\n')
    for part in ("unittest/test", "idlelib/idle_test", "distutils/tests"):
        write(tmp_path / part / "x.py", "this is not Python\n")

    assert sorted(script.read_corpus(tmp_path)) == [
        doc("async"),
        doc("b"),
        doc("class"),
        doc("method") + "\n\nFlush.\n  Indented.",
        doc("module"),  # twice in the tree, once in the corpus
    ]


def test_split_keeps_copies_together_and_depends_on_the_seed(script: ModuleType) -> None:
    texts = [f"document number {i} of many" for i in range(2000)]
    held_out = {text for text in texts if script.is_held_out(text, 0)}

    assert 0.03 < len(held_out) / len(texts) < 0.07
    assert all(script.is_held_out(text.upper() + " .\n", 0) for text in held_out)
    assert held_out != {text for text in texts if script.is_held_out(text, 1)}


def test_cutting_and_packing_lose_no_token(script: ModuleType) -> None:
    rng = random.Random(0)
    lengths = [rng.randrange(1, 120) for _ in range(300)] + [256, 257, 700]
    documents = [[rng.randrange(END_ID)] * length for length in lengths]
    pieces = script.cut_documents(documents, END_ID, 256, rng)
    rows = script.pack_pieces(pieces, 256)

    assert max(map(len, pieces)) <= 256
    assert max(sum(map(len, row)) for row in rows) <= 256
    assert sorted(piece for row in rows for piece in row) == sorted(pieces)
    kept = sum(token != END_ID for piece in pieces for token in piece)
    assert kept == sum(map(len, documents))
    assert len(rows) <= sum(map(len, pieces)) / 256 * 1.05


@pytest.mark.parametrize("length", [0, 1, 254, 255, 256, 257, 383, 384, 1000])
def test_windows_score_each_token_once(script: ModuleType, length: int) -> None:
    document = list(range(length))
    windows = list(script.make_windows(document, END_ID, 256))

    scored = [t for row in windows for t in row.targets if t != script.IGNORED]
    assert scored == [*document, END_ID]
    assert all(len(row.tokens) == len(row.targets) <= 256 for row in windows)


def test_unigram_scores_are_those_of_add_one_counts(script: ModuleType) -> None:
    losses = script.score_unigram([[0, 0, 1]], [[0, 2]], vocab_size=4)

    # counts with the end token and add-one: 3, 2, 1, 2 of 8
    expected = torch.tensor([3 / 8, 1 / 8, 2 / 8], dtype=torch.float64)
    torch.testing.assert_close(losses.exp() ** -1, expected)


def test_smoke_run_writes_a_model_and_a_report(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = "\n".join(f'def f{i}():\n    "{UNSEEN_TEXT[:60]!r} {i}"' for i in range(200))
    write(tmp_path / "lib" / "a.py", source)
    monkeypatch.setattr(script.sysconfig, "get_path", lambda name: str(tmp_path / "lib"))
    output, report = tmp_path / "model", tmp_path / "report.json"

    result = CliRunner().invoke(
        script.main, ["--smoke", "--output", str(output), "--report", str(report)]
    )

    assert result.exit_code == 0, result.output
    assert {path.name for path in output.iterdir()} == FILES
    figures = json.loads(report.read_text())
    assert figures["training"]["documents"] == figures["settings"]["max_documents"]
    assert figures["model"]["perplexity"] > 1
    model, info = load_with_info(output)
    assert not any(info.values())
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(output))


def test_smoke_run_refuses_to_replace_the_shipped_model(script: ModuleType) -> None:
    result = CliRunner().invoke(script.main, ["--smoke"])

    assert result.exit_code == 2
    assert "--smoke needs --output: it must not replace the shipped model" in result.output
