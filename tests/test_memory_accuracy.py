"""The accuracy benchmark's models compute what they should, and its table says what it found."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch.nn import functional
from torch.testing import assert_close

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
CPU = torch.device("cpu")


def load(name: str) -> ModuleType:
    """A script as a module; benchmarks/ is not a package."""
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # the other script and dataclasses look it up there
    spec.loader.exec_module(module)
    return module


rows: Any = load("accuracy_rows")
table: Any = load("memory_accuracy")

TINY = rows.Size(vocabulary=11, context=8, width=12, heads=3, blocks=2, dropout=0.0)
TINY_NATIVE = rows.Size(
    vocabulary=11, context=8, width=12, heads=3, blocks=2, dropout=0.0, by_hand=False
)


def make_row(name: str = "row", measured_mib: int = 1000, transformers: str | None = None) -> Any:
    return rows.Row(
        name=name,
        configuration=f"what {name} is",
        card="a100",
        measured_bytes=measured_mib * rows.MIB,
        source="",
        build=lambda device: {},
        step=lambda state: None,
        transformers=transformers,
    )


def make_result(measured_mib: int, predicted_mib: int) -> Any:
    row = make_row(measured_mib=measured_mib)
    return table.Result(row=row, predicted_bytes=predicted_mib * rows.MIB, seconds=1.25)


# --- models ---------------------------------------------------------------------------------------


def test_layer_norm_by_hand_is_layer_norm() -> None:
    torch.manual_seed(0)
    norm = rows.HandLayerNorm(12)
    torch.nn.init.normal_(norm.gain)
    torch.nn.init.normal_(norm.bias)
    x = 3 * torch.randn(2, 5, 12) + 1

    wanted = functional.layer_norm(x, (12,), norm.gain, norm.bias)

    assert_close(norm(x), wanted, rtol=0, atol=1e-6)


def test_gelu_by_hand_is_the_tanh_gelu() -> None:
    x = torch.linspace(-6, 6, 101)

    assert_close(rows.HandGELU()(x), functional.gelu(x, approximate="tanh"), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [TINY, TINY_NATIVE], ids=["buffer", "made on the fly"])
def test_attention_by_hand_is_causal_attention(size: Any) -> None:
    torch.manual_seed(0)
    attention = rows.HandAttention(size)
    x = torch.randn(2, 7, 12)

    heads = [attention.split(f(x)) for f in (attention.query, attention.key, attention.value)]
    mixed = functional.scaled_dot_product_attention(*heads, is_causal=True)
    wanted = attention.output(mixed.transpose(1, 2).reshape(x.shape))

    assert_close(attention(x), wanted, rtol=0, atol=1e-6)
    assert ("mask" in dict(attention.named_buffers())) == size.by_hand


def test_both_ways_to_write_gpt2_give_the_same_logits() -> None:
    torch.manual_seed(0)
    by_hand, native = rows.HandGPT2(TINY), rows.HandGPT2(TINY_NATIVE)
    for ours, theirs in zip(by_hand.parameters(), native.parameters(), strict=True):
        theirs.data = ours.data
    ids = torch.randint(11, (2, 8))

    assert by_hand(ids).shape == (2, 8, 11)
    assert_close(by_hand(ids), native(ids), rtol=0, atol=1e-5)


def test_gpt2_by_hand_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        model = rows.HandGPT2(rows.Size())

    # 124,439,808 with one matrix for both ends, less 3 x 12 x 768 biases of the projections
    assert sum(p.numel() for p in model.parameters()) == 124_439_808 + 50_257 * 768 - 27_648


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_step_by_hand_trains(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    state = rows.build_by_hand(TINY, dtype=dtype)(CPU)
    step = rows.step_by_hand(2, 8)

    step(state)
    before = state["loss"].item()
    step(state)

    assert {p.dtype for p in state["model"].parameters()} == {dtype}
    assert all(p.grad is not None for p in state["model"].parameters())
    assert state["loss"].item() < before


def test_step_with_transformers_trains_on_padded_rows() -> None:
    torch.manual_seed(0)
    tiny = {"vocab_size": 11, "n_positions": 8, "n_embd": 12, "n_layer": 1, "n_head": 3}
    state = rows.build_hugging_face(**tiny, bos_token_id=0, eos_token_id=0)(CPU)
    step = rows.step_hugging_face(3, 8)

    step(state)
    step(state)

    assert state["model"].training
    assert state["outputs"].logits.shape == (3, 8, 11)
    assert torch.isfinite(state["loss"])


def test_padded_batch_has_one_full_row_and_no_label_on_padding() -> None:
    batch = rows.padded_batch(3, 8)

    assert batch["attention_mask"].sum(1).tolist() == [1, 4, 8]
    assert torch.equal(batch["labels"] == rows.IGNORED, batch["attention_mask"] == 0)
    assert batch["input_ids"].shape == (3, 8)


# --- rows -----------------------------------------------------------------------------------------


def test_rows_have_distinct_names_and_whole_allocator_steps() -> None:
    assert len({row.name for row in rows.ROWS}) == len(rows.ROWS) == 5
    assert [row.measured_bytes % (2 * rows.MIB) for row in rows.ROWS] == [0] * 5
    assert [row.measured_bytes // rows.MIB for row in rows.ROWS[:2]] == [26892, 11842]
    assert [bool(row.transformers) for row in rows.ROWS] == [False, False, True, True, True]


def test_find_row_names_what_there_is() -> None:
    assert rows.find_row("gpt2-fp32-a100") is rows.ROWS[0]
    with pytest.raises(ValueError, match="no row 'gpt3'; there are gpt2-fp32-a100, "):
        rows.find_row("gpt3")


def test_another_transformers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(__version__="5.0.0"))

    rows.check_transformers(make_row())
    with pytest.raises(ValueError, match=r"row needs transformers 4\.52; this is 5\.0\.0"):
        rows.check_transformers(make_row(transformers="4.52"))
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(__version__="4.52.4"))
    rows.check_transformers(make_row(transformers="4.52"))


# --- running --------------------------------------------------------------------------------------


def test_each_row_gets_the_python_that_it_needs() -> None:
    asked = []

    def run(row: Any, python: Path | None) -> Any:
        asked.append((row.name, python))
        return table.Result(row=row, skipped=True)

    old = Path("old")
    table.run_rows([make_row("new"), make_row("old", transformers="4.52")], old, run)

    assert asked == [("new", Path(sys.executable)), ("old", old)]


@pytest.mark.parametrize(
    ("code", "out", "err", "wanted"),
    [
        (0, 'a warning\n{"predicted_bytes": 7, "seconds": 2.0}\n', "", (7, "")),
        (1, "", "Traceback\nValueError: why\n", (None, "ValueError: why")),
        (3, "", "", (None, "exit code 3")),
    ],
)
def test_run_row_reads_what_the_other_process_says(
    monkeypatch: pytest.MonkeyPatch, code: int, out: str, err: str, wanted: tuple[int | None, str]
) -> None:
    calls = []

    def fake(command: list[str], **options: Any) -> Any:
        calls.append((command, options))
        return subprocess.CompletedProcess(command, code, stdout=out, stderr=err)

    monkeypatch.setattr(subprocess, "run", fake)
    result = table.run_row(make_row("that"), Path("python"))

    assert (result.predicted_bytes, result.problem) == wanted
    assert calls[0][0] == ["python", str(BENCHMARKS / "accuracy_rows.py"), "that"]
    assert calls[0][1]["env"]["PYTHONPATH"] == str(BENCHMARKS.parent)


def test_a_row_without_a_python_is_skipped() -> None:
    row = make_row()

    assert table.run_row(row, None) == table.Result(row=row, skipped=True)


def test_venv_is_found_made_or_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def fake(command: list[str], **_: Any) -> None:
        commands.append(command)
        python.parent.mkdir(parents=True, exist_ok=True)
        python.touch()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(subprocess, "run", fake)
    directory = tmp_path / "lowvram" / "transformers-4.52"
    python = table.venv_python(directory)

    assert table.find_old_python(Path("given"), make=True) == Path("given")
    assert table.find_old_python(None, make=False) is None
    assert commands == []
    assert table.find_old_python(None, make=True) == python
    assert commands[0] == [sys.executable, "-m", "venv", str(directory)]
    assert [command[-1] for command in commands[1:]] == list(table.PACKAGES)
    assert table.find_old_python(None, make=False) == python


# --- the table ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("predicted_mib", "percent", "is_accurate"),
    [
        (1000, 0.0, True),
        (1002, 0.2, True),
        (998, -0.2, True),
        (1004, 0.4, False),
        (996, -0.4, False),
    ],
)
def test_error_is_relative_to_what_was_measured(
    predicted_mib: int, percent: float, is_accurate: bool
) -> None:
    result = make_result(1000, predicted_mib)

    assert result.error_percent == pytest.approx(percent)
    assert result.is_accurate == is_accurate


def test_table_lines_up() -> None:
    results = [make_result(26_892, 26_900), table.Result(row=make_row("other"), skipped=True)]

    assert table.format_table(results).splitlines() == [
        "| configuration | card |   measured |  predicted |   error | seconds |",
        "| ------------- | ---- | ---------: | ---------: | ------: | ------: |",
        "| what row is   | a100 | 26,892 MiB | 26,900 MiB | +0.03 % |     1.2 |",
        "| what other is | a100 |  1,000 MiB |    skipped |         |         |",
    ]


@pytest.mark.parametrize(
    ("outcomes", "code", "said"),
    [
        ({"first": 1000, "second": 1000}, 0, ""),
        ({"first": 1000, "second": 1010}, 1, ""),
        ({"first": 1000}, 0, "Skipped, for want of a Python with transformers 4.52: second."),
        ({"first": None, "second": 1000}, 1, "first: it broke"),
    ],
    ids=["accurate", "inaccurate", "skipped", "failed"],
)
def test_exit_code(
    monkeypatch: pytest.MonkeyPatch, outcomes: dict[str, int | None], code: int, said: str
) -> None:
    def run(row: Any, python: Path | None) -> Any:
        if row.name not in outcomes:
            return table.Result(row=row, skipped=True)
        predicted = outcomes[row.name]
        if predicted is None:
            return table.Result(row=row, problem="it broke")
        return table.Result(row=row, predicted_bytes=predicted * rows.MIB)

    monkeypatch.setattr(table, "ROWS", (make_row("first"), make_row("second")))
    monkeypatch.setattr(table, "run_row", run)
    monkeypatch.setattr(table, "find_old_python", lambda given, make: None)
    outcome = CliRunner().invoke(table.main)

    assert outcome.exit_code == code
    assert said in outcome.stderr


class FakeMemory:
    """Stands for lowvram.memory; what it simulates ends in the given trace."""

    def __init__(self, **trace: Any) -> None:
        self.trace = SimpleNamespace(**{"peak_reserved_bytes": 42, "out_of_memory": None} | trace)
        self.asked: list[Any] = []

    def find_card(self, name: str) -> str:
        return f"card {name}"

    def simulate(self, build: Any, step: Any, **options: Any) -> Any:
        self.asked.append((build, step, options))
        return self.trace


def test_prediction_is_the_peak_of_what_is_reserved(monkeypatch: pytest.MonkeyPatch) -> None:
    row, memory = make_row(), FakeMemory()
    monkeypatch.setitem(sys.modules, "lowvram.memory", memory)

    found = json.loads(json.dumps(rows.predict(row)))

    assert found["predicted_bytes"] == 42
    options = {"steps": 3, "card": "card a100", "torch_version": (2, 6)}
    assert memory.asked == [(row.build, row.step, options)]


def test_running_out_of_memory_is_no_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lowvram.memory", FakeMemory(out_of_memory="step 2: full"))

    with pytest.raises(RuntimeError, match="ran out of memory on a a100: step 2: full"):
        rows.predict(make_row())
