"""The side-by-side benchmarks count, compare and judge as they say."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import lines
from safetensors.torch import load_file, save_file
from torch.nn import functional

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def load(name: str) -> Any:
    """A script as a module, by the name that the other scripts import; none is in a package."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


for needed in ("accuracy_rows", "memory_accuracy"):
    load(needed)
contestants = load("contestants")
arena = load("arena")
throughput = load("throughput")
learning = load("learning")


def report(name: str = "trainer", *, warm_up: int = 1, **values: Any) -> Any:
    return contestants.Report(contestant=name, warm_up=warm_up, **values)


def job(**values: Any) -> Any:
    paths = {"model": "", "adapter": "", "text": "", "work": ""}
    return contestants.Job(**(paths | {"contestant": "trainer"} | values))


def figures(speed: float, resident: int = 100, live: int = 100) -> Any:
    return throughput.Figures(
        steps=1,
        tokens_per_second=speed,
        slowest=speed,
        fastest=speed,
        resident_bytes=resident,
        live_bytes=live,
    )


# --- figures --------------------------------------------------------------------------------------


def test_figures_are_medians_of_steps_after_the_warm_up() -> None:
    first = report(tokens=[10, 10, 10], seconds=[100.0, 1.0, 2.0], resident_bytes=5)
    second = report(tokens=[10, 40], seconds=[100.0, 1.0], resident_bytes=9)

    found = throughput.figures_of([first, second], report(live_bytes=7))

    assert found.steps == 3
    assert (found.slowest, found.tokens_per_second, found.fastest) == (5.0, 10.0, 40.0)
    assert (found.resident_bytes, found.live_bytes) == (7, 7)


def test_losses_agree_within_a_ten_thousandth() -> None:
    close = throughput.agreement("trainer", [2.0, 3.0], [2.00005, 3.0, 9.0])
    far = throughput.agreement("trainer", [2.0, 3.0], [2.0, 3.0002])

    assert close.holds
    assert close.steps == 2
    assert not far.holds
    assert "DISAGREE, largest difference 2.0e-04" in throughput.describe(far)


def test_mean_losses_are_of_the_batches_that_were_recorded() -> None:
    """Their second repetition took a third step, on a batch that nobody recorded."""
    theirs = [report(losses=[2.0, 3.0]), report(losses=[2.0, 3.0, 99.0])]
    ours = [report(losses=[2.1, 2.9, 2.1]), report(losses=[2.1, 2.9, 2.1])]

    found = throughput.mean_agreement(theirs, ours)

    assert found.steps == 4
    assert found.difference == pytest.approx(0, abs=1e-12)


def test_claims_are_met_only_if_both_rows_meet_them() -> None:
    found = {
        ("tutorial", 0.1): figures(10),
        ("trainer", 0.1): figures(100),
        ("trainer", 0.0): figures(100),
        ("lowvram-same", 0.1): figures(150, 35, 35),
        ("lowvram", 0.1): figures(149, 35, 36),
        ("lowvram-same", 0.0): figures(170, 45, 45),
        ("lowvram", 0.0): figures(171, 46, 45),
    }

    met = [claim.is_met for claim in throughput.claims(found, limit=200)]

    assert met == [True, False, True, True, False, True, True, False]


def test_claim_about_what_was_not_measured_is_not_met() -> None:
    decided = throughput.claims({("lowvram", 0.0): figures(100, live=0)}, limit=100)

    assert not any(claim.is_met for claim in decided)
    assert str(decided[3]) == (
        "NOT MET: tokens/s by the limit, dropout 0 >= 0.85: not measured and 1.00"
    )


def test_table_has_a_row_for_what_was_measured() -> None:
    text = throughput.table({("trainer", 0.1): figures(50, 3 * 2**30, 0)}, limit=200)

    assert text.splitlines()[2:] == [
        "| Trainer + peft, packed | 0.1 | 50.0 | 50.0 to 50.0 | 25% | 3.00 GiB |  | 1 |"
    ]


def test_note_says_when_compiling_pays() -> None:
    results = throughput.Results()
    results.add(report("lowvram-same", tokens=[1, 1], seconds=[3.0, 2.0]), 0.0)
    results.add(report("lowvram-compiled", tokens=[1, 1], seconds=[41.5, 1.5]), 0.0)

    assert throughput.compile_notes(results) == [
        "torch.compile, dropout 0: 40 s to compile, 1.50 s a step instead of 2.00: wins it back "
        "after 80 steps"
    ]


def test_plot_draws_what_there_is(tmp_path: Path) -> None:
    found = {("trainer", 0.1): figures(50), ("lowvram", 0.0): figures(90)}

    throughput.draw(found, 100, tmp_path / "plot.png")

    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_parameters_are_those_of_the_model(gpt2_dir: Path) -> None:
    weights = load_file(gpt2_dir / "model.safetensors")

    assert throughput.parameters_of(gpt2_dir) == sum(tensor.numel() for tensor in weights.values())


# --- contestants ----------------------------------------------------------------------------------


def test_watch_ends_after_steps_and_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clock readings in pairs, begin and end of steps of 5, 2 and 2 seconds."""
    clock = iter([0.0, 5.0, 5.0, 7.0, 7.0, 9.0])
    monkeypatch.setattr(contestants.time, "perf_counter", lambda: next(clock))
    watch = contestants.Watch(job(steps=1, seconds=3.0))
    watch.report.tokens = [8, 8, 8]
    watch.begin()

    assert [watch.end(1.0), watch.end(2.0), watch.end(3.0)] == [False, False, True]
    assert watch.report.measured == [(8, 2.0), (8, 2.0)]
    assert watch.report.losses == [1.0, 2.0, 3.0]


def test_tokens_are_counted_without_padding_and_losses_by_target() -> None:
    """Three labels of which the first of a row is no target: a mean over 4 becomes one over 2."""
    watch = contestants.Watch(job())
    inputs = {
        "input_ids": torch.tensor([[5, 6, 9], [7, 8, 9]]),
        "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 0]]),
        "labels": torch.tensor([[5, 6, -100], [7, 8, -100]]),
    }

    watch.batch(inputs)

    assert watch.report.tokens == [4]
    assert watch.per_target == 2.0


def test_peak_is_the_highest_of_the_running_sum() -> None:
    assert contestants.peak_of([5, -3, 4, -6, 2]) == 6
    assert contestants.peak_of([-3, -4]) == 0


def test_live_bytes_count_what_was_there_and_what_came() -> None:
    """A million floats are kept, two million more are alive at once; 1 % for small change."""
    kept = torch.zeros(1_000_000)
    before = contestants.live_tensor_bytes()
    profiler = contestants.start_profiler()
    first = torch.ones(1_000_000)
    second = kept + first
    del first
    peak = contestants.stop_profiler(profiler)
    del second, kept

    assert peak == pytest.approx(8_000_000, rel=0.01)
    assert before - contestants.live_tensor_bytes() == 4_000_000


def test_lowvram_trains_on_recorded_batches(
    gpt2_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first loss is transformers' own, with the same adapter, on the same batch: to 1e-5."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text, adapter, batches = (tmp_path / name for name in ("text.txt", "a.safetensors", "b"))
    text.write_text("\n".join(lines(60)), encoding="utf-8")
    contestants.make_adapter(gpt2_dir, adapter)
    torch.manual_seed(0)
    ids = torch.randint(250, (4, 32))
    labels = ids.clone()
    labels[2, 20:] = -100
    save_file({"input_ids.0": ids, "labels.0": labels}, batches)
    task = job(
        contestant="lowvram-same",
        model=str(gpt2_dir),
        adapter=str(adapter),
        text=str(text),
        work=str(tmp_path),
        length=32,
        warm_up=0,
        steps=2,
        replay=str(batches),
    )

    found = contestants.run_lowvram(task, contestants.Watch(task))

    scorer = learning.Scorer(gpt2_dir, ["one two three"], 64, 1)
    contestants.load_adapter(scorer.model, adapter)
    with torch.inference_mode():
        logits = scorer.model(input_ids=ids).logits[:, :-1]
    wanted = functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:])
    assert found.losses[0] == pytest.approx(wanted.item(), rel=1e-5)
    assert found.losses[1] < found.losses[0]
    assert len(found.seconds) == len(found.tokens) == 2
    assert found.resident_bytes > 0


# --- the arena ------------------------------------------------------------------------------------


def test_job_goes_through_json() -> None:
    task = job(replay="file", seconds=2.5)

    assert contestants.Job(**json.loads(json.dumps(vars(task)))) == task


def test_dropout_changes_the_config_and_nothing_else(gpt2_dir: Path, tmp_path: Path) -> None:
    arena.with_dropout(gpt2_dir, tmp_path / "model", 0.25)

    before, after = (
        json.loads((path / "config.json").read_text(encoding="utf-8"))
        for path in (gpt2_dir, tmp_path / "model")
    )
    changed = {key for key in after if after[key] != before.get(key)}
    assert changed == {"attn_pdrop", "embd_pdrop", "resid_pdrop"}
    weights = "model.safetensors"
    assert (tmp_path / "model" / weights).read_bytes() == (gpt2_dir / weights).read_bytes()


def test_failed_contestant_says_what_it_died_of(tmp_path: Path) -> None:
    place = arena.Arena(directory=tmp_path, threads=1, pythons={}, rows=1, length=8)

    with pytest.raises(arena.Failed, match="KeyError: 'nobody'"):
        place.run(place.job("nobody", 0.0))


def test_last_error_is_found_above_advice() -> None:
    text = "Traceback:\n  File x\nValueError: bad\nSome advice\n"

    assert arena.last_error(text) == "ValueError: bad"
    assert arena.last_error("killed\n") == "killed"


def test_peer_without_a_python_is_left_out_with_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "stderr", said := io.StringIO())

    found = arena.find_pythons({"bengo": Path(sys.executable)}, make=False)

    assert found == {"bengo": Path(sys.executable)}
    assert "trl is left out, for want of a Python with trl==" in said.getvalue()
    assert "--trl-python, or --make-venvs once" in said.getvalue()


# --- learning -------------------------------------------------------------------------------------


def test_held_out_lines_are_not_trained_on() -> None:
    given = ["a", "b", "a", "c", "d", "b"]

    train, held_out = learning.hold_out(given, 2)

    assert len(held_out) == 2
    assert not set(train) & set(held_out)
    assert set(train) | set(held_out) == set(given)


def test_scorer_weighs_tokens_not_documents(gpt2_dir: Path, tmp_path: Path) -> None:
    """Padded rows of different lengths give what each document gives alone, to 1e-5."""
    documents = [TEXT * count for count in (1, 2, 1)]
    contestants.make_adapter(gpt2_dir, tmp_path / "a.safetensors")
    scorer = learning.Scorer(gpt2_dir, documents, 64, 1)

    found = scorer.loss(tmp_path / "a.safetensors")

    total, targets = 0.0, 0
    for ids in scorer.documents:
        row = torch.tensor([ids])
        with torch.inference_mode():
            logits = scorer.model(input_ids=row).logits[0, :-1]
        total += functional.cross_entropy(logits, row[0, 1:], reduction="sum").item()
        targets += len(ids) - 1
    assert scorer.targets == targets
    assert found == pytest.approx(total / targets, rel=1e-5)


TEXT = "Words repeat, and words that repeat are learned. "


def test_curve_is_straight_between_its_points() -> None:
    curve = learning.Curve(
        contestant="lowvram", steps=2, tokens=9, points=[(0.0, 5.0), (1.0, 4.0), (3.0, 2.0)]
    )

    assert curve.minutes_to(3.0) == 2.0
    assert curve.minutes_to(6.0) == 0.0
    assert curve.minutes_to(1.0) is None
    assert curve.last == 2.0
