"""Weight files written tensor by tensor are those of safetensors, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lowvram import weights
from lowvram.errors import ProofError
from lowvram.weights import size_bytes, write_weights

TENSORS = {
    "flags": torch.tensor([True, False, True]),
    "whole": torch.arange(7),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "half": torch.linspace(-1, 1, 9).half(),
    "brain": torch.linspace(-3, 3, 15).bfloat16().view(3, 5),
    "single": torch.randn(4, 6, generator=torch.Generator().manual_seed(0)),
    "double": torch.tensor(0.1, dtype=torch.float64),
    "nothing": torch.empty(0, 3),
}


def test_a_file_is_what_safetensors_reads(tmp_path: Path) -> None:
    """All kinds, given in any order; what is not contiguous is written as it is indexed."""
    tensors = TENSORS | {"turned": TENSORS["single"].T}

    write_weights(tmp_path, tensors, reversed(tensors.items()))

    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_file_is_as_large_as_that_of_safetensors(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "theirs", metadata={"format": "pt"})

    write_weights(tmp_path, TENSORS, TENSORS.items())

    size = (tmp_path / "model.safetensors").stat().st_size
    assert abs(size - (tmp_path / "theirs").stat().st_size) < 16
    assert 0 < size - size_bytes(TENSORS) < 1000


def test_tensors_are_cast_to_the_layout(tmp_path: Path) -> None:
    layout = {"a": torch.empty(4, 6, dtype=torch.bfloat16, device="meta")}

    write_weights(tmp_path, layout, [("a", TENSORS["single"])])

    found = load_file(tmp_path / "model.safetensors")["a"]
    assert torch.equal(found, TENSORS["single"].bfloat16())


def test_large_checkpoints_are_cut_into_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "_SHARD", 100)

    write_weights(tmp_path, TENSORS, TENSORS.items())

    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == size_bytes(TENSORS)
    assert index["weight_map"].keys() == TENSORS.keys()
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == [
        f"model-0000{i + 1}-of-0000{len(files)}.safetensors" for i in range(len(files))
    ]
    assert len(files) > 1
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], TENSORS[name])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"a": torch.ones(2)}, "out: lacks b"),
        ({"a": torch.ones(2), "b": torch.ones(3), "c": torch.ones(1)}, "out: c is not a tensor"),
        ({"a": torch.ones(2), "b": torch.ones(1, 3)}, "out: b is not a tensor"),
    ],
    ids=["less", "more", "shape"],
)
def test_other_tensors_than_those_announced_are_refused(
    tmp_path: Path, given: Any, message: str
) -> None:
    (tmp_path / "out").mkdir()

    with pytest.raises(ProofError, match=message):
        write_weights(tmp_path / "out", {"a": torch.ones(2), "b": torch.ones(3)}, given.items())


def test_bytes_that_are_not_those_written_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = weights._put

    def lose_a_bit(file: Any, data: Any) -> None:
        if len(data) == 96:
            data = data.copy()
            data[50] ^= 1
        real(file, data)

    monkeypatch.setattr(weights, "_put", lose_a_bit)

    with pytest.raises(ProofError) as error:
        write_weights(tmp_path, TENSORS, TENSORS.items())

    assert str(error.value) == "model.safetensors: single is not what was written"


def test_numbers_too_large_for_the_format_are_refused(tmp_path: Path) -> None:
    """1e5 is infinity in fp16; a checkpoint of it would answer NaN."""
    weights = {"a": torch.tensor([1.0, 1e5])}
    layout = {"a": torch.empty(2, dtype=torch.float16, device="meta")}

    with pytest.raises(ProofError, match="not written, since a is not finite in float16"):
        write_weights(tmp_path, layout, weights.items())
