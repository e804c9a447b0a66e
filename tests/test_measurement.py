"""Real steps in a process of their own: what counts as fitting, and what is no measurement."""

from __future__ import annotations

import gc
import json
import re
import subprocess
import sys
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fakes import MIB, FakeCuda, measurement
from torch import nn

from lowvram.build import choose_numerics
from lowvram.errors import DeviceError
from lowvram.measurement import (
    Measurement,
    accepted,
    measure,
    measure_here,
    smaller,
)
from lowvram.recipe import Recipe, load_recipe
from lowvram.rehearsal import BatchShape, pinned, rehearse

GIB = 2**30
SHAPE = BatchShape(micro_batch_size=4, seq_len=64, gradient_checkpointing=False)

# what torch and its libraries say where memory is full.
FULL = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has ..."),
    torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be ..."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED."),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("Error out of memory at line 380 in file /src/csrc/pythonInterface.cpp"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."),
    MemoryError(),
]
OTHERS = [
    IndexError("index out of range in self"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x64 and 32x96)"),
    torch.AcceleratorError("CUDA error: device-side assert triggered\nCompile with ..."),
    KeyboardInterrupt(),
]


def name_of(error: BaseException) -> str:
    return f"{type(error).__name__} {error}".partition("\n")[0]


class Steps:
    """A rehearsal whose steps reserve memory, or fail from the one that is told."""

    def __init__(
        self,
        card: FakeCuda,
        *,
        reserves: int = GIB,
        error: BaseException | None = None,
        fails_in: int = 2,
        model: object = None,
    ) -> None:
        self.window = [SimpleNamespace(tokens=256), SimpleNamespace(tokens=256)]
        self.card = card
        self.reserves = reserves
        self.error = error
        self.fails_in = fails_in
        self.model = model
        self.taken = 0

    def step(self) -> None:
        self.taken += 1
        self.card.reserve(self.reserves)
        if self.error is not None and self.taken == self.fails_in:
            raise type(self.error)(*self.error.args)  # a new one, which nobody else holds


# --- in this process ------------------------------------------------------------------------------


def test_six_steps_are_taken_and_the_last_three_are_timed() -> None:
    card, made = FakeCuda(), []

    def rehearsal() -> Any:
        made.append(Steps(card, reserves=3 * GIB))
        return made[0]

    found = measure_here(rehearsal, card)

    assert made[0].taken == 6
    assert found.fits
    assert found.error is None
    assert found.reserved_bytes == found.driver_bytes == 3 * GIB
    assert found.allocated_bytes == 3 * GIB - MIB
    assert found.tokens_per_second == pytest.approx(512 / found.seconds_per_step)


@pytest.mark.parametrize("fails_in", [1, 2, 5])
@pytest.mark.parametrize("error", FULL, ids=name_of)
def test_each_way_to_say_that_memory_is_full_is_a_shape_that_does_not_fit(
    error: BaseException, fails_in: int
) -> None:
    card = FakeCuda()

    found = measure_here(lambda: Steps(card, error=error, fails_in=fails_in), card)

    assert not found.fits
    assert found.error == (re.split(r"\. |\n", str(error))[0] or "out of memory")
    assert accepted(found, 12 * GIB) == found.error


def test_a_card_that_is_full_before_the_first_step_does_not_fit_either() -> None:
    def full(*_: Any) -> Any:
        raise torch.AcceleratorError("CUDA error: out of memory\nCompile with ...")

    card = FakeCuda()
    assert not measure_here(full, card).fits
    card.mem_get_info = full
    assert measure_here(full, card).error == "CUDA error: out of memory"


@pytest.mark.parametrize("error", OTHERS, ids=name_of)
def test_other_errors_are_none_of_memory(error: BaseException) -> None:
    card = FakeCuda()

    with pytest.raises(type(error)) as raised:
        measure_here(lambda: Steps(card, error=error), card)

    assert str(raised.value) == str(error)


def test_nothing_keeps_a_failed_model_for_the_next_try() -> None:
    """Not the traceback either; and nobody has to collect garbage for it."""
    card, alive = FakeCuda(), []

    def attempt(error: BaseException | None) -> Measurement:
        model = nn.Linear(64, 64)
        alive.append(weakref.ref(model))
        made = Steps(card, error=error, model=model)
        del model
        return measure_here(lambda: made, card)

    gc.disable()
    try:
        for error in FULL:
            assert not attempt(error).fits
            assert alive[-1]() is None
    finally:
        gc.enable()
    assert attempt(None).fits


def test_the_runs_own_steps_are_measured(make_recipe: Callable[..., Recipe]) -> None:
    """On a CPU, with a card that counts nothing: the whole way of a measuring process."""
    recipe = pinned(make_recipe(), SHAPE)

    found = measure_here(lambda: rehearse(recipe, choose_numerics(recipe)), FakeCuda())

    assert found.fits
    assert found.tokens_per_second == pytest.approx(4 * 64 / found.seconds_per_step)


# --- what is a proof ------------------------------------------------------------------------------


def test_what_fits_and_is_on_the_card_is_accepted() -> None:
    assert accepted(measurement(11 * GIB), 12 * GIB) is None
    assert accepted(measurement(12 * GIB), 12 * GIB) is None
    slower = measurement(11 * GIB, tokens_per_second=400.0)
    assert accepted(slower, 12 * GIB, measurement(6 * GIB)) is None


def test_13_gib_of_a_card_of_12_that_never_fails_are_refused() -> None:
    """Drivers of Windows and WSL go over to memory of the host."""
    card = FakeCuda(12 * GIB, spills=True)

    found = measure_here(lambda: Steps(card, reserves=13 * GIB), card)

    assert found.fits
    assert found.reserved_bytes == 13 * GIB
    assert accepted(found, 12 * GIB) == (
        "more was reserved than the card has: the rest is in host memory"
    )


@pytest.mark.parametrize(
    ("gone", "reason"),
    [
        (1.2, None),
        (0.95, None),
        (0.85, "less of the card is in use than was reserved: the rest is in host memory"),
    ],
)
def test_what_was_reserved_is_gone_from_the_drivers_account(
    gone: float, reason: str | None
) -> None:
    """But for a tenth, since other programs may have given back some meanwhile."""
    found = measurement(10 * GIB, driver_bytes=int(gone * 10 * GIB))

    assert accepted(found, 12 * GIB) == reason


def test_three_times_slower_than_half_as_many_rows_is_refused() -> None:
    before = measurement(6 * GIB, tokens_per_second=3100.0)

    assert accepted(measurement(11 * GIB), 12 * GIB, before) == (
        "more than 3 times slower per token than half as many rows"
    )
    assert accepted(measurement(11 * GIB), 12 * GIB) is None


def test_half_as_many_rows_are_measured_where_memory_may_spill(
    make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[BatchShape] = []

    def measuring(recipe: Recipe, shape: BatchShape) -> Measurement:
        asked.append(shape)
        return measurement(GIB)

    recipe = make_recipe()
    monkeypatch.setattr("lowvram.measurement.sys.platform", "linux")
    monkeypatch.setattr("lowvram.measurement.platform.release", lambda: "6.8.0-generic")
    assert smaller(recipe, SHAPE, measuring) is None
    monkeypatch.setattr(
        "lowvram.measurement.platform.release", lambda: "5.15.90.1-microsoft-standard-WSL2"
    )
    assert smaller(recipe, SHAPE, measuring) == measurement(GIB)
    monkeypatch.setattr("lowvram.measurement.sys.platform", "win32")
    assert smaller(recipe, SHAPE, measuring) == measurement(GIB)

    assert [shape.micro_batch_size for shape in asked] == [2, 2]
    one_row = BatchShape(micro_batch_size=1, seq_len=64, gradient_checkpointing=False)
    assert smaller(recipe, one_row, measuring) is None


# --- a process of its own -------------------------------------------------------------------------


def child(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Run `code` in place of the measuring process."""
    run = subprocess.run
    monkeypatch.setattr(
        "lowvram.measurement.subprocess.run",
        lambda command, **options: run([command[0], "-c", code], **options),
    )


ANSWER = json.dumps({"fits": True, "reserved_bytes": 7, "tokens_per_second": 2.5})


def test_a_process_is_asked_and_answers(
    make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes to its standard output before the answer, or to the other one, does not count."""
    code = f"""
import json, sys
request = json.loads(sys.stdin.read())
assert request["shape"] == {{
    "micro_batch_size": 4, "seq_len": 64, "gradient_checkpointing": False
}}
assert request["recipe"]["train"]["global_batch_size"] == 4
print("a library says hello")
print("Warning: nothing to see", file=sys.stderr)
print({ANSWER!r})
"""
    child(monkeypatch, code)

    found = measure(make_recipe(), SHAPE)

    assert found == Measurement(fits=True, reserved_bytes=7, tokens_per_second=2.5)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise SystemExit(3)", "exit code 3"),
        ("import os; os._exit(9)", "exit code 9"),
        ("raise ValueError('no such thing')", "ValueError: no such thing"),
        ("pass", "exit code 0"),
        (f"print({ANSWER!r}); raise SystemExit('too late')", "too late"),
        (
            "import torch; raise torch.AcceleratorError("
            "'CUDA error: device-side assert triggered\\nCompile with TORCH_USE_CUDA_DSA')",
            "torch.AcceleratorError: CUDA error: device-side assert triggered",
        ),
    ],
    ids=["exit", "killed", "error", "silent", "late", "assert"],
)
def test_a_process_that_dies_is_no_measurement(
    make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, code: str, reason: str
) -> None:
    child(monkeypatch, code)

    with pytest.raises(DeviceError) as error:
        measure(make_recipe(), SHAPE)

    assert str(error.value) == f"measuring 4 x 64 tokens on the card failed: {reason}"


def test_a_process_that_does_not_end_does_not_fit(
    make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowvram.measurement._SECONDS", 0.2)
    child(monkeypatch, "import time; time.sleep(60)")

    assert measure(make_recipe(), SHAPE) == Measurement(fits=False, error="not done after 0.2 s")


# In place of the card of the measuring process: one that counts nothing.
ON_A_CPU = """
import atexit, torch
atexit.register(print, "noise at the end")
torch.cuda.mem_get_info = lambda: (2**34, 2**34)
torch.cuda.max_memory_reserved = lambda: 5 * 2**20
torch.cuda.max_memory_allocated = lambda: 4 * 2**20
torch.cuda.reset_peak_memory_stats = torch.cuda.synchronize = lambda: None
print("noise of an import")
from lowvram import measurement
here = measurement.measure_here
def loudly(*arguments):
    print("noise of a step")
    return here(*arguments)
measurement.measure_here = loudly
measurement.main()
"""


def test_the_whole_way_through_a_process(
    make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a recipe that allows no keys of an adapter, not even with the values they have anyway."""
    child(monkeypatch, ON_A_CPU)

    found = measure(make_recipe(**{"method.name": "full"}), SHAPE)

    assert found.fits
    assert (found.reserved_bytes, found.allocated_bytes) == (5 * MIB, 4 * MIB)
    assert found.driver_bytes == 0
    assert found.tokens_per_second > 0


@pytest.mark.parametrize("name", ["gpt2-lora", "gpt2-full", "e2e-lora"])
def test_recipes_arrive_as_they_were(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def run(command: list[str], **options: Any) -> Any:
        asked.append((command, options["timeout"], json.loads(options["input"])))
        return SimpleNamespace(returncode=0, stdout=ANSWER, stderr="")

    monkeypatch.setattr("lowvram.measurement.subprocess.run", run)
    recipe = load_recipe(name)

    measure(recipe, SHAPE)

    [(command, seconds, request)] = asked
    assert command == [sys.executable, "-m", "lowvram.measurement"]
    assert seconds == 900
    assert Recipe.model_validate(request["recipe"]) == recipe
    assert BatchShape(**request["shape"]) == SHAPE
