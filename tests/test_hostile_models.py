"""Model directories from strangers: an error before memory is spent, never code, never a hang."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import make_gpt2, make_llama, make_tokenizer, save
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lowvram.cli import main
from lowvram.errors import ModelError
from lowvram.model import empty_model, load_config, load_model, load_tokenizer, locate, weight_files
from lowvram.safetensors_header import HEADER_BYTES, read_header

NAME = "transformer.wte.weight"


@pytest.fixture
def copy(gpt2_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(gpt2_dir, tmp_path / "model"))


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on, it is a failure to have transformers load weights."""

    def called(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", called)


def refusal(use: Callable[[str], Any], directory: Path) -> str:
    with pytest.raises(ModelError) as error:
        use(str(directory))
    return str(error.value)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


# Formats and places


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("pytorch_model.bin", "as a pickle (pytorch_model.bin), which can run code"),
        ("pytorch_model.bin.index.json", "as a pickle (pytorch_model.bin.index.json), which can"),
        ("consolidated.00.pth", "as a pickle (consolidated.00.pth), which can run code"),
        ("model.pt", "as a pickle (model.pt), which can run code"),
        ("last.ckpt", "as a pickle (last.ckpt), which can run code"),
        ("model.gguf", "in GGUF (model.gguf); convert it to safetensors for example with"),
        ("tf_model.h5", "in the format of TensorFlow (tf_model.h5); convert it to safetensors"),
        ("flax_model.msgpack", "in the format of Flax (flax_model.msgpack); convert it to"),
    ],
)
def test_other_formats_say_how_to_convert(copy: Path, file: str, expected: str) -> None:
    (copy / "model.safetensors").unlink()
    (copy / file).write_bytes(b"{}")

    message = refusal(load_model, copy)

    assert f"model.name: {str(copy)!r} has its weights {expected}" in message
    assert message.endswith("with transformers' save_pretrained, and name that directory")
    if not file.endswith(".json"):  # named by itself
        assert expected in refusal(load_model, copy / file)


@pytest.mark.parametrize(
    ("file", "cure"),
    [
        ("model.zip", "unpack it and name the directory with config.json and model.safetensors"),
        ("model.tar.gz", "unpack it and name the directory"),
        ("model.safetensors", "name the directory that it is in: "),
        ("README", "name a directory with config.json, model.safetensors and a tokenizer"),
    ],
)
def test_a_file_is_no_directory(tmp_path: Path, file: str, cure: str) -> None:
    (tmp_path / file).write_bytes(b"PK\x03\x04")

    message = refusal(load_model, tmp_path / file)

    assert message.startswith(f"model.name: {str(tmp_path / file)!r} is a file, not a directory; ")
    assert cure in message


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_links_out_of_the_directory_are_refused(copy: Path, tmp_path: Path, file: str) -> None:
    (copy / file).rename(tmp_path / "elsewhere")
    (copy / file).symlink_to(tmp_path / "elsewhere")

    for use in (load_model, load_config, load_tokenizer, weight_files):
        message = refusal(use, copy)
        assert f"{copy / file} is a link to {tmp_path / 'elsewhere'}, outside of its" in message
        assert "put the file itself there" in message


def test_links_inside_and_in_the_cache_of_the_hub_are_followed(copy: Path, tmp_path: Path) -> None:
    (copy / "blob").mkdir()
    (copy / "model.safetensors").rename(copy / "blob" / "weights")
    (copy / "model.safetensors").symlink_to("blob/weights")
    snapshot = tmp_path / "models--x" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--x" / "blobs").mkdir()
    for file in copy.glob("*.*"):
        shutil.copy(file, tmp_path / "models--x" / "blobs" / file.name)
        (snapshot / file.name).symlink_to(Path("../../blobs", file.name))
    (tmp_path / "linked").symlink_to(copy)

    expected = load_model(str(copy)).state_dict()

    for directory in (snapshot, tmp_path / "linked"):
        found = load_model(str(directory)).state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_the_cache_of_the_hub_is_no_way_out(copy: Path, tmp_path: Path) -> None:
    """A stranger's `blobs` may itself be a link."""
    snapshot = tmp_path / "m" / "snapshots" / "abc"
    snapshot.parent.mkdir(parents=True)
    copy.rename(snapshot)
    (tmp_path / "secrets").mkdir()
    (snapshot / "model.safetensors").rename(tmp_path / "secrets" / "key")
    (tmp_path / "m" / "blobs").symlink_to(tmp_path / "secrets")
    (snapshot / "model.safetensors").symlink_to("../../blobs/key")

    assert "outside of its directory" in refusal(load_model, snapshot)


@pytest.mark.parametrize("target", ["model.safetensors", "nowhere"])
def test_links_that_lead_nowhere_are_refused(copy: Path, target: str) -> None:
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors").symlink_to(target)

    assert "model.safetensors is a link that leads nowhere; put" in refusal(load_model, copy)


@pytest.mark.skipif(os.name == "nt", reason="has no such files")
@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_what_is_no_regular_file_does_not_hang(copy: Path, file: str) -> None:
    (copy / file).unlink()
    os.mkfifo(copy / file)

    for use in (load_model, load_config, load_tokenizer):
        assert f"{copy / file} is not a regular file; put the" in refusal(use, copy)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "vocab.json", "merges.txt"])
def test_huge_small_files_are_not_read(copy: Path, file: str) -> None:
    with (copy / file).open("ab") as sparse:
        sparse.truncate(10 << 30)

    for use in (load_config, load_tokenizer):
        assert f"{file} has 10,737,418,240 bytes, at most " in refusal(use, copy)


# Headers


Header = dict[str, Any]


def forge(path: Path, change: Callable[[Header], Any], more: int = 0) -> None:
    """The file with another header, of the right length, and `more` bytes at its end."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    text = change(header)
    text = json.dumps(header).encode() if not isinstance(text, bytes) else text
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :] + b"\0" * more)


def sets(key: str, value: Any) -> Callable[[Header], Any]:
    return lambda header: header[NAME].update({key: value})


def share(header: Header) -> None:
    """Two tensors of one size have the same bytes."""
    first, second = "transformer.h.0.ln_1.bias", "transformer.h.0.ln_1.weight"
    header[second]["data_offsets"] = header[first]["data_offsets"]


def twice(header: Header) -> bytes:
    text = json.dumps(header)
    return (text[:-1] + f', "{NAME}": {json.dumps(header[NAME])}}}').encode()


LIES: dict[str, tuple[Callable[[Header], Any], int, str]] = {
    "no json": (lambda _: b"[" * 20_000, 0, "its header is not JSON of tensors"),
    "list": (lambda _: b"[]", 0, "its header is list, not an object"),
    "twice": (twice, 0, f"its header is not JSON of tensors: {NAME!r} occurs twice"),
    "word": (lambda h: h.update({NAME: 3}), 0, f"{NAME} is not described by dtype, shape and"),
    "dtype": (sets("dtype", "F128"), 0, f"{NAME} has the dtype 'F128', which is unknown"),
    "dtype list": (sets("dtype", ["F32"]), 0, "has the dtype \"['F32']\", which is unknown"),
    "negative": (sets("shape", [-1, -32]), 0, "has the shape [-1, -32], which no tensor has"),
    "huge": (sets("shape", [10**9, 10**9]), 0, "has the shape [1000000000, 1000000000], which no"),
    "many dims": (sets("shape", [1] * 100), 0, "which no tensor has"),
    "fraction": (sets("shape", [1.5, 2]), 0, "has the shape [1.5, 2], which no tensor has"),
    "truth": (sets("shape", [True]), 0, "has the shape [True], which no tensor has"),
    "shape": (sets("shape", [3, 5]), 0, f"{NAME} is F32 [3, 5], 60 bytes, but its offsets ["),
    "before": (sets("data_offsets", [-4, 0]), 0, "has the offsets [-4, 0], not first and end"),
    "one offset": (sets("data_offsets", [0]), 0, "has the offsets [0], not first and end"),
    "beyond": (
        lambda h: h["transformer.wpe.weight"].update(data_offsets=[10**12, 10**12 + 64 * 32 * 4]),
        0,
        "leaves a gap after",
    ),
    "overlap": (share, 0, "overlaps transformer."),
    "hole": (lambda h: h.pop("transformer.ln_f.bias"), 0, "leaves a gap after"),
    "tail": (lambda _: None, 8, "but the file has"),
}


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("lie", LIES)
def test_headers_that_lie_are_found_before_weights_are_read(copy: Path, lie: str) -> None:
    change, more, expected = LIES[lie]
    forge(copy / "model.safetensors", change, more)

    message = refusal(load_model, copy)

    assert message.startswith(f"model.name: cannot load {str(copy)!r}: model.safetensors: ")
    assert expected in message


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize(
    ("length", "size", "expected"),
    [
        (2**60, 100, "its header would be 1,152,921,504,606,846,976 bytes, the file has 100"),
        (2**64 - 1, 100, "its header would be 18,446,744,073,709,551,615 bytes"),
        (HEADER_BYTES + 1, 1 << 30, f"its header is {HEADER_BYTES + 1:,} bytes, at most"),
        (0, 8, "its header is not JSON of tensors"),
        (8, 7, "its header would be 8 bytes, the file has 7"),
    ],
)
def test_lengths_of_headers_that_lie(copy: Path, length: int, size: int, expected: str) -> None:
    with (copy / "model.safetensors").open("wb") as file:
        file.write(length.to_bytes(8, "little"))
        file.truncate(size)

    assert expected in refusal(load_model, copy)


def test_a_header_is_what_safetensors_wrote(gpt2_dir: Path) -> None:
    path = gpt2_dir / "model.safetensors"
    content, expected = path.read_bytes(), load_file(path)

    found = read_header(path)

    assert found.keys() == expected.keys()
    for name, entry in found.items():
        values = torch.frombuffer(bytearray(content[entry.start : entry.end]), dtype=torch.float32)
        assert torch.equal(values.view(entry.shape), expected[name])


@pytest.mark.usefixtures("unread")
def test_misfits_are_found_before_weights_are_read(copy: Path) -> None:
    """Tensors that are missing, of another shape, of another kind, or of a layer too many."""
    original = (copy / "model.safetensors").read_bytes()
    cases: list[tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = [
        (lambda t: t.pop(NAME), f"lack 1 tensors of the model ({NAME}, ...)"),
        (lambda t: t.update({NAME: torch.ones(7, 32)}), f"{NAME} is (7, 32), not ("),
        (lambda t: t.update({NAME: t[NAME].int()}), f"{NAME} is stored as I32; weights are F64,"),
        (
            lambda t: t.update({"transformer.h.2.ln_1.bias": torch.ones(32)}),
            "transformer.h.2.ln_1.bias is of a layer that its config.json does not have",
        ),
    ]
    for change, expected in cases:
        (copy / "model.safetensors").write_bytes(original)
        edit_weights(copy, change)
        assert expected in refusal(load_model, copy)


@pytest.mark.usefixtures("unread")
def test_a_configuration_with_fewer_layers_than_the_file_is_refused(copy: Path) -> None:
    edit(copy / "config.json", n_layer=1)

    message = refusal(load_model, copy)

    assert ": transformer.h.1." in message
    assert " is of a layer that its config.json does not have" in message


def test_what_published_checkpoints_have_besides_is_harmless(copy: Path) -> None:
    """Causal masks, a tied head, a value head; with the prefix and without it."""
    expected = load_model(str(copy)).state_dict()
    mask = torch.ones(64, 64).tril().view(1, 1, 64, 64)

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors[NAME].clone()
        tensors["v_head.summary.weight"] = torch.full((1, 32), math.nan)  # not of this model
        for layer in range(2):
            tensors[f"transformer.h.{layer}.attn.bias"] = mask.bool()
            tensors[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-math.inf)

    def strip(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)

    for change in (add, strip):
        edit_weights(copy, change)
        found = load_model(str(copy)).state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_tied_llama_without_its_head_or_with_it_alone(tmp_path: Path) -> None:
    model = make_llama(tie_word_embeddings=True)
    directory = save(model, tmp_path / "tied")
    assert "lm_head.weight" not in load_file(directory / "model.safetensors")
    assert load_model(str(directory)).config.tie_word_embeddings


# Shards


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    make_gpt2().save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    make_tokenizer().save_pretrained(tmp_path / "sharded")
    return tmp_path / "sharded"


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize(
    "file",
    [
        "../../x.safetensors",
        "/etc/x.safetensors",
        "sub/x.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "..",
        "",
        5,
        None,
        ["a.safetensors"],
    ],
    ids=str,
)
def test_an_index_names_safetensors_beside_it(sharded: Path, file: Any) -> None:
    """Even where a file of that name is beside it: transformers would read the other."""
    (sharded / "x.safetensors").write_bytes(b"")
    index = sharded / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": names | {NAME: file}}))

    for use in (load_model, weight_files):
        message = refusal(use, sharded)
        assert "model.safetensors.index.json names " in message
        assert "no safetensors file beside it" in message


@pytest.mark.usefixtures("unread")
def test_a_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    one, other = sorted(sharded.glob("*.safetensors"))[:2]
    save_file(load_file(one) | load_file(other), other)

    assert f" is in both {one.name} and {other.name}" in refusal(load_model, sharded)


# config.json


DEEP = "[" * 10_000 + "]" * 10_000

CONFIGS: list[tuple[str, str]] = [
    ('{"n_layer": 1000000000}', "n_layer is 1000000000, allowed are 1 to 1,024"),
    ('{"num_hidden_layers": 1000000000}', "num_hidden_layers is 1000000000, allowed are 1 to"),
    ('{"n_layer": 0}', "n_layer is 0, allowed are 1 to 1,024"),
    ('{"n_layer": -1}', "n_layer is -1, allowed are 1 to 1,024"),
    ('{"text": {"encoder_layers": 1000000000}}', "encoder_layers is 1000000000, allowed are 0 to"),
    ('{"attention_types": [[["global"], 1000000000]]}', "attention_types is 1000000000, allowed"),
    ('{"n_embd": 1000000000}', ""),
    ('{"n_embd": 1000000000000}', "n_embd is 1000000000000, allowed are "),
    ('{"vocab_size": 1000000000000}', "vocab_size is 1000000000000, allowed are "),
    ('{"n_embd": -32}', ""),
    ('{"n_embd": "32"}', ""),
    ('{"n_layer": "2"}', ""),
    ('{"n_layer": true}', ""),
    ('{"n_layer": null}', ""),
    ('{"layer_norm_epsilon": NaN}', "layer_norm_epsilon is NaN, which is no setting"),
    ('{"n_embd": Infinity}', ""),
    ('{"n_embd": 1' + "0" * 5000 + "}", "config.json is not JSON: Exceeds the limit"),
    ('{"x": ' + DEEP + "}", "config.json is not JSON: maximum recursion depth exceeded"),
    ('{"x": ' + DEEP[:500] + DEEP[-500:] + "}", ""),
    ('{"model_type": "nonsense"}', ""),
    ('{"model_type": ["gpt2"]}', ""),
    ('{"model_type": null}', ""),
    ('{"model_type": "bert-like", "auto_map": {"AutoConfig": "evil.C"}}', ""),
    (
        '{"quantization_config": {"quant_method": "gptq", "bits": 4}}',
        "config.json has a quantization_config: its weights are quantised already; take the model "
        "that it was made from, and set model.dtype to int8 or nf4",
    ),
    (
        '{"transformers_weights": "../x.safetensors"}',
        "config.json names its weights (transformers_weights); they have to be model.safetensors",
    ),
    (
        '{"attn_implementation": "stranger/kernel"}',
        "config.json names code of the hub (attn_implementation), which is not fetched",
    ),
    ("\udcff", "config.json is not JSON"),
    ("[]", "config.json holds list, not an object"),
]


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize(("changes", "expected"), CONFIGS, ids=[text[:40] for text, _ in CONFIGS])
def test_configurations_that_lie_are_an_error_at_once(
    copy: Path, changes: str, expected: str
) -> None:
    path = copy / "config.json"
    plain = path.read_text().rstrip().removesuffix("}").rstrip()
    text = f"{plain}, {changes[1:]}" if changes.startswith("{") else changes
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    start = time.perf_counter()

    message = refusal(load_model, copy)

    assert time.perf_counter() - start < 5
    assert message.startswith("model.name: ")
    assert expected in message
    if expected:
        for use in (load_config, empty_model):
            assert expected in refusal(use, copy)


def test_code_beside_a_model_is_never_run(copy: Path, tmp_path: Path) -> None:
    """A model that transformers knows loads without it; the tokenizer's is not run either."""
    marker = tmp_path / "executed"
    for name in ("modeling_evil", "evil", "tokenization_evil", "__init__", "configuration_gpt2"):
        (copy / f"{name}.py").write_text(f"open({str(marker)!r}, 'w')\n")
    maps = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "modeling_evil.M"}
    edit(copy / "config.json", auto_map=maps, trust_remote_code=True)
    tokens = ["tokenization_evil.T", "tokenization_evil.T"]
    edit(copy / "tokenizer_config.json", auto_map={"AutoTokenizer": tokens})

    found = load_model(str(copy))
    load_tokenizer(str(copy))

    assert type(found).__module__.startswith("transformers.")
    assert not marker.exists()


def test_a_model_with_an_adapter_in_it_is_refused(copy: Path) -> None:
    """transformers would put it on the model without a word."""
    (copy / "adapter_config.json").write_text('{"base_model_name_or_path": "../.."}')

    assert "has an adapter in it (adapter_config.json); merge that, or" in refusal(load_model, copy)


# Numbers


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.usefixtures("unread")
def test_weights_that_are_no_numbers_name_the_tensor(
    copy: Path, value: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in the last element, and beyond the first chunk that is read."""
    monkeypatch.setattr("lowvram.weight_check.CHUNK_BYTES", 1 << 10)
    name = "transformer.h.1.mlp.c_fc.weight"

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        for key in tensors:
            tensors[key] = tensors[key].to(dtype)
        tensors[name][-1, -1] = value

    edit_weights(copy, spoil)

    message = refusal(load_model, copy)

    assert f"model.safetensors: {name} holds NaN or infinity, not weights" in message


@pytest.mark.parametrize("dtype", ["bf16", "int8", "nf4"])
def test_no_base_is_loaded_from_weights_that_are_no_numbers(copy: Path, dtype: Any) -> None:
    edit_weights(copy, lambda tensors: tensors[NAME][3, 5].fill_(math.nan))

    with pytest.raises(ModelError, match="holds NaN or infinity"):
        load_model(str(copy), dtype=dtype)


# Tokenizers


def test_a_tokenizer_with_tokens_beyond_the_embedding_is_refused(copy: Path) -> None:
    rows = len(make_tokenizer())
    path = copy / "tokenizer.json"
    tokens = json.loads(path.read_text())["added_tokens"]
    far = {**tokens[0], "content": "<far>", "id": rows + 5}
    edit(path, added_tokens=[*tokens, far])

    message = refusal(load_tokenizer, copy)

    assert message == (
        f"model.name: the tokenizer of {str(copy)!r} has {load_size(copy)} tokens, its model "
        f"{rows}; they do not belong together"
    )


def load_size(directory: Path) -> int:
    """One more than the largest id that the tokenizer gives, by its own library."""
    from tokenizers import Tokenizer

    found = Tokenizer.from_file(str(directory / "tokenizer.json"))
    return 1 + max(found.get_vocab(with_added_tokens=True).values())


def test_an_end_of_text_that_the_vocabulary_lacks_is_refused(copy: Path) -> None:
    """transformers would add it behind the last row of the embedding."""
    edit(copy / "tokenizer_config.json", eos_token="<never heard of>")

    assert "they do not belong together" in refusal(load_tokenizer, copy)


@pytest.mark.parametrize(
    "content", [DEEP, '{"model": ' + DEEP + "}", "\0", '{"version": "1.0", "model": 5}']
)
def test_tokenizers_that_are_no_tokenizers(copy: Path, content: str) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        directory = Path(shutil.copytree(copy, copy.parent / name))
        (directory / name).write_text(content)
        assert refusal(load_tokenizer, directory).startswith("model.name: ")


# The command line


@pytest.mark.parametrize("command", ["evaluate", "generate", "run", "probe"])
def test_every_command_says_what_is_wrong_and_exits(
    copy: Path, text_file: Path, tmp_path: Path, command: str
) -> None:
    forge(copy / "model.safetensors", sets("shape", [3, 5]))
    edit(copy / "config.json", n_layer=10**9)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"model: {{name: {copy}}}\ndata: {{source: {text_file}}}\n")
    arguments = {
        "evaluate": [str(copy), "--data", str(text_file)],
        "generate": [str(copy), "--prompt", "a"],
        "run": [str(recipe), "--dry-run"],
        "probe": [str(recipe), "--vram", "8GiB"],
    }[command]

    done = CliRunner().invoke(main, [command, *arguments])

    assert isinstance(done.exception, SystemExit)
    assert done.exit_code == 4
    assert done.stderr.startswith("error: model.name: ")
    assert "n_layer is 1000000000" in done.stderr


def test_only_what_is_read_is_checked(copy: Path) -> None:
    (copy / "notes.txt").symlink_to("/")
    with (copy / "corpus.txt").open("wb") as sparse:
        sparse.truncate(10 << 30)
    assert locate(str(copy)) == copy

    (copy / "vocab.txt").symlink_to("/")

    assert "vocab.txt is a link to /, outside" in refusal(locate, copy)
