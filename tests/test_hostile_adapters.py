"""Adapter directories from strangers: nothing is built that the file does not hold."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import make_gpt2
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPT2LMHeadModel

from lowvram.adapters import load_adapter, recorded_base
from lowvram.cli import main
from lowvram.errors import ModelError
from lowvram.model import load_model

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

IDS = torch.arange(3, 60).unsqueeze(0)
START = "base_model.model.transformer.h."
FIT = "the adapter does not fit its base: "


@pytest.fixture(scope="module")
def made(gpt2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of peft itself, on every layer of attention, with weights that matter."""
    config = LoraConfig(
        r=4,
        target_modules=["c_attn", "attn.c_proj"],
        fan_in_fan_out=True,
        task_type="CAUSAL_LM",
        init_lora_weights=False,
    )
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a newer name for an attribute
        model = get_peft_model(GPT2LMHeadModel.from_pretrained(gpt2_dir), config)
    directory = tmp_path_factory.mktemp("adapters") / "made"
    model.save_pretrained(directory)
    return directory


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "adapter"))


@pytest.fixture
def unbuilt(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on, it is a failure to have peft build something."""

    def called(*_: Any, **__: Any) -> None:
        raise AssertionError("layers were built")

    monkeypatch.setattr(PeftModel, "from_pretrained", called)


def edit(directory: Path, **changes: Any) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(directory / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, directory / "adapter_model.safetensors")


def refusal(directory: Path) -> str:
    with pytest.raises(ModelError) as error:
        load_adapter(make_gpt2(), directory)
    message = str(error.value)
    assert message.startswith(f"{directory}")
    return message


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


REDOS = "(a+)+$"

SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"r": 10**9}, "its rank is 1000000000 by adapter_config.json, 4 by its tensors"),
    ({"r": 5}, "its rank is 5 by adapter_config.json, 4 by its tensors"),
    ({"r": -4}, "r is -4; it has to be a whole number from 1"),
    ({"r": 0}, "r is 0; it has to be a whole number from 1"),
    ({"r": "4"}, "r is '4'; it has to be a whole number from 1"),
    ({"r": True}, "r is True; it has to be a whole number from 1"),
    ({"r": None}, "r is None; it has to be a whole number from 1"),
    ({"lora_alpha": math.nan}, "lora_alpha is nan; it has to be a finite number"),
    ({"lora_alpha": math.inf}, "lora_alpha is inf; it has to be a finite number"),
    ({"lora_alpha": "16"}, "lora_alpha is '16'; it has to be a finite number"),
    ({"lora_dropout": 7}, "lora_dropout is 7; it has to be a number from 0 up to 1"),
    ({"bias": "some"}, "bias is 'some'; it has to be none, all or lora_only"),
    ({"use_dora": "yes"}, "use_dora is 'yes'; it has to be true or false"),
    ({"rank_pattern": {"c_attn": 10**9}}, "its rank is 4, 1000000000 by adapter_config.json"),
    ({"rank_pattern": {"c_attn": "4"}}, "rank_pattern is {'c_attn': '4'}; it has to be whole"),
    ({"rank_pattern": {REDOS: 4}}, "rank_pattern is {'(a+)+$': 4}; it has to be whole numbers by"),
    ({"rank_pattern": [4]}, "rank_pattern is [4]; it has to be whole numbers by the plain names"),
    (
        {"rank_pattern": {f"x{i}": 4 for i in range(10_000)}},
        "rank_pattern has 10,000 entries for 4 layers; give one for each layer at most",
    ),
    ({"alpha_pattern": {"c_attn": math.nan}}, "alpha_pattern is {'c_attn': nan}; it has to be fin"),
    ({"alpha_pattern": {REDOS: 1}}, "alpha_pattern is {'(a+)+$': 1}; it has to be finite numbers"),
    (
        {"alpha_pattern": {f"x{i}": 4 for i in range(10_000)}},
        "alpha_pattern has 10,000 entries for 4 layers; give one for each layer at most",
    ),
    ({"peft_type": "XLORA"}, "peft_type is 'XLORA'; read are LORA, LOHA, LOKR, IA3"),
    ({"peft_type": ["LORA"]}, "peft_type is ['LORA']; read are"),
    ({"peft_type": None}, "peft_type is None; read are"),
    ({"task_type": "SEQ_CLS"}, "task_type is 'SEQ_CLS', not CAUSAL_LM"),
    ({"init_lora_weights": "pissa_niter_1000000000"}, "init_lora_weights is 'pissa_niter_1000000"),
    ({"init_lora_weights": "corda", "corda_config": {"cache_file": "/x"}}, "init_lora_weights is"),
    ({"init_lora_weights": "loftq", "loftq_config": {}}, "init_lora_weights is 'loftq', which"),
    ({"layer_replication": [[0, 10**9]]}, "layer_replication is set, which is more than an"),
    ({"megatron_config": {"a": 1}, "megatron_core": "evil"}, "megatron_config is set, which is"),
    ({"arrow_config": {"top_k": 1}}, "arrow_config is set, which is more than"),
    ({"trainable_token_indices": [10**9]}, "trainable_token_indices is set, which is more than"),
    ({"target_parameters": ["x"]}, "target_parameters is set, which is more than an adapter of"),
    ({"modules_to_save": ["transformer"]}, "base_model.model.transformer."),
    ({"modules_to_save": ["ln_f", "mlp"]}, "is not in the file"),
    ({"modules_to_save": [REDOS]}, "modules_to_save is ['(a+)+$']; it has to be a list of plain"),
    ({"target_modules": ["c_attn", "c_fc"]}, "c_fc.lora_A.weight is not in the file"),
]


@pytest.mark.usefixtures("unbuilt")
@pytest.mark.parametrize(("changes", "expected"), SETTINGS, ids=[str(c)[:50] for c, _ in SETTINGS])
def test_settings_that_lie_are_an_error_at_once(
    copy: Path, changes: dict[str, Any], expected: str
) -> None:
    edit(copy, **changes)
    start = time.perf_counter()

    message = refusal(copy)

    assert message.startswith(f"{copy}: {FIT}")
    assert expected in message
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": r"(.*\.)*(\w+)+\.(c_attn|attn\.c_proj)"},
        {"target_modules": "((((a+)+)+)+)+!", "exclude_modules": "((a+)+)+!"},
        {"layers_pattern": ["(((h+)+)+)+!"], "layers_to_transform": [0, 1]},
        {"target_modules": r".*(c_attn|c_proj)"},
    ],
    ids=str,
)
def test_regular_expressions_are_never_searched_with(
    copy: Path, made: Path, changes: dict[str, Any]
) -> None:
    """The file says which layers it is for."""
    expected = logits(load_adapter(make_gpt2(), made))
    edit(copy, **changes)
    start = time.perf_counter()

    found = load_adapter(make_gpt2(), copy)

    assert time.perf_counter() - start < 5
    assert torch.equal(logits(found), expected)
    assert not torch.equal(expected, logits(make_gpt2()))


def test_ranks_and_scales_of_single_layers_are_those_of_peft(
    gpt2_dir: Path, tmp_path: Path
) -> None:
    config = LoraConfig(
        r=4,
        rank_pattern={"h.0.attn.c_attn": 2, r"^transformer.h.1.mlp.c_fc": 3},
        alpha_pattern={"c_fc": 5.5},
        target_modules=["c_attn", "c_fc"],
        fan_in_fan_out=True,
        init_lora_weights=False,
    )
    model = get_peft_model(GPT2LMHeadModel.from_pretrained(gpt2_dir), config)
    model.save_pretrained(tmp_path / "a")

    found = load_adapter(load_model(str(gpt2_dir)), tmp_path / "a")

    assert (logits(found) - logits(model.eval())).abs().max() < 1e-5


def test_no_code_is_imported(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the library nor the class that the settings name."""
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    edit(
        copy,
        auto_mapping={"base_model_class": "M", "parent_library": "evil"},
        megatron_core="evil",
        task_type=None,
    )

    load_adapter(make_gpt2(), copy)

    assert "evil" not in sys.modules
    assert not (tmp_path / "executed").exists()


# Tensors


def grow(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{START}0.attn.c_attn.lora_B.weight"] = torch.ones(96, 5)


TENSORS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "rank of B": (grow, "h.0.attn.c_attn.lora_B.weight is (96, 5), its layer takes (96, 4)"),
    "width of A": (
        lambda t: t.update({f"{START}1.attn.c_proj.lora_A.weight": torch.ones(4, 33)}),
        "h.1.attn.c_proj.lora_A.weight is (4, 33), its layer takes (4, 32)",
    ),
    "flat": (
        lambda t: t.update({f"{START}1.attn.c_proj.lora_A.weight": torch.tensor(1.0)}),
        "h.1.attn.c_proj.lora_A.weight is (), its layer takes (0, 32)",
    ),
    "half": (
        lambda t: t.pop(f"{START}1.attn.c_proj.lora_B.weight"),
        "h.1.attn.c_proj.lora_B.weight is not in the file",
    ),
    "layer": (
        lambda t: t.update({f"{START}7.attn.c_proj.lora_A.weight": torch.ones(4, 32)}),
        "h.7.attn.c_proj.lora_A.weight is not in the base",
    ),
    "stranger": (lambda t: t.update({"x": torch.ones(1)}), "x is not in the base"),
    "base weight": (
        lambda t: t.update({f"{START}0.ln_1.weight": torch.ones(33)}),
        "h.0.ln_1.weight is (33,), in the base (32,)",
    ),
    "nan": (
        lambda t: t[f"{START}1.attn.c_proj.lora_B.weight"][-1].fill_(math.nan),
        "h.1.attn.c_proj.lora_B.weight holds NaN or infinity, not weights",
    ),
    "infinity": (
        lambda t: t[f"{START}0.attn.c_attn.lora_A.weight"][0].fill_(-math.inf),
        "h.0.attn.c_attn.lora_A.weight holds NaN or infinity, not weights",
    ),
}


@pytest.mark.usefixtures("unbuilt")
@pytest.mark.parametrize("lie", TENSORS)
def test_tensors_that_do_not_fit_are_found_before_layers_are_built(copy: Path, lie: str) -> None:
    change, expected = TENSORS[lie]
    edit_weights(copy, change)

    message = refusal(copy)

    assert message.startswith(f"{copy}: {FIT}")
    assert expected in message


@pytest.mark.usefixtures("unbuilt")
def test_headers_that_lie_are_found(copy: Path) -> None:
    """That of a file with a hole; the table of such lies is that of models."""
    path = copy / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes() + b"\0" * 8)
    assert "its tensors end at byte " in refusal(copy)

    path.write_bytes((2**60).to_bytes(8, "little") + b"{}")
    assert "its header would be 1,152,921,504,606,846,976 bytes, the file has 10" in refusal(copy)


# Files


def test_links_out_of_the_directory_are_refused(copy: Path, tmp_path: Path) -> None:
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        (copy / file).rename(tmp_path / file)
        (copy / file).symlink_to(tmp_path / file)
        assert f"{copy / file} is a link to {tmp_path / file}, outside of its" in refusal(copy)
        (copy / file).unlink()
        (tmp_path / file).rename(copy / file)
    (copy / "base.json").symlink_to("/etc/hostname")
    with pytest.raises(ModelError, match="base.json is a link to /etc/hostname, outside"):
        recorded_base(copy)


@pytest.mark.skipif(os.name == "nt", reason="has no such files")
@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json", "base.json"])
def test_what_is_no_regular_file_does_not_hang(copy: Path, file: str) -> None:
    (copy / file).unlink(missing_ok=True)
    os.mkfifo(copy / file)

    assert f"{copy / file} is not a regular file" in refusal(copy)
    with pytest.raises(ModelError, match="is not a regular file"):
        recorded_base(copy)


DEEP = "[" * 10_000 + "]" * 10_000


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("adapter_config.json", '{"x": ' + DEEP + "}"),
        ("adapter_config.json", '{"base_model_name_or_path": 5}'),
        ("adapter_config.json", '{"base_model_name_or_path": ["../.."]}'),
        ("adapter_config.json", '{"base_model_name_or_path": "x", "revision": {}}'),
        ("base.json", '{"name": 5, "revision": null, "sha256": null}'),
        ("base.json", '{"name": "x", "revision": null, "sha256": [1]}'),
        ("base.json", '{"name": "x", "revision": 1' + "0" * 5000 + ', "sha256": null}'),
        ("base.json", DEEP),
    ],
)
def test_records_of_a_base_that_are_none(copy: Path, file: str, content: str) -> None:
    (copy / file).write_text(content)

    with pytest.raises(ModelError, match="is no readable adapter"):
        recorded_base(copy)


@pytest.mark.parametrize(
    "base",
    ["../..", "/", "https://example.com/model", "file:///etc", "a\0b", "", "~nobody/x", "x" * 5000],
)
@pytest.mark.parametrize("command", ["evaluate", "generate", "merge"])
def test_a_hostile_name_of_a_base_is_an_error(
    copy: Path, tmp_path: Path, text_file: Path, base: str, command: str
) -> None:
    edit(copy, base_model_name_or_path=base)
    arguments = {
        "evaluate": ["--data", str(text_file)],
        "generate": ["--prompt", "a"],
        "merge": ["--output", str(tmp_path / "out")],
    }[command]

    done = CliRunner().invoke(main, [command, str(copy), *arguments])

    assert isinstance(done.exception, SystemExit), done.exception
    assert done.exit_code == 4
    assert "model.name: " in done.stderr
    assert not (tmp_path / "out").exists()
