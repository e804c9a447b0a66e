"""Real steps of a shape on the card, each shape in a process of its own.

A process that has run out of memory keeps pieces of it, so one that tried too much must not be
the one that trains. Run as `python -m lowvram.measurement`, this module is such a process: it reads
a request from its standard input and writes a measurement to its standard output.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from lowvram.errors import DeviceError
from lowvram.memory.measure import is_out_of_memory
from lowvram.recipe import Recipe
from lowvram.rehearsal import STEPS, BatchShape, Rehearsal, pinned, rehearse

_TIMED_STEPS = 3
_SLOWER = 3.0
"""A step this many times slower per token than a smaller one waits for memory of the host."""
_GONE = 0.9
"""Of what was reserved, so much at least must be gone from the driver's account; other programs
may have given back some."""
_SECONDS = 900


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Sizes in bytes."""

    fits: bool
    error: str | None = None
    """What the card said, if it does not fit."""
    reserved_bytes: int = 0
    allocated_bytes: int = 0
    driver_bytes: int = 0
    """What the driver has less than before: allocator and context."""
    seconds_per_step: float = 0.0
    tokens_per_second: float = 0.0


Measure = Callable[[Recipe, BatchShape], Measurement]


def measure(recipe: Recipe, shape: BatchShape) -> Measurement:
    """In a new process. Raises DeviceError for what is neither a measurement nor memory."""
    # Only what is set: some keys may not be, with method.name: full.
    values = recipe.model_dump(mode="json", exclude_unset=True)
    request = json.dumps({"recipe": values, "shape": asdict(shape)})
    try:
        process = subprocess.run(
            [sys.executable, "-m", "lowvram.measurement"],
            input=request,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Measurement(fits=False, error=f"not done after {_SECONDS} s")
    lines = process.stdout.strip().splitlines()
    if process.returncode == 0 and lines:
        return Measurement(**json.loads(lines[-1]))
    reason = last_error(process.stderr) or f"exit code {process.returncode}"
    raise DeviceError(
        f"measuring {shape.micro_batch_size} x {shape.seq_len} tokens on the card failed: {reason}"
    )


def last_error(text: str) -> str | None:
    """What a process died of: CUDA's errors go on with advice for debugging."""
    lines = [line for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Interrupt)\b", line)]
    return next(reversed(errors or lines), None)


def accepted(
    measurement: Measurement, budget_bytes: int, before: Measurement | None = None
) -> str | None:
    """Why a measurement is no proof that its shape fits; None if it is one.

    Drivers of Windows and WSL go over to memory of the host rather than fail. Then more is reserved
    than the card has, or less of the card is gone than was reserved, or a step takes many times as
    long as that of a smaller shape (`before`).
    """
    if not measurement.fits:
        return measurement.error or "out of memory"
    if measurement.reserved_bytes > budget_bytes:
        return "more was reserved than the card has: the rest is in host memory"
    if measurement.driver_bytes < _GONE * measurement.reserved_bytes:
        return "less of the card is in use than was reserved: the rest is in host memory"
    if before is not None and measurement.tokens_per_second * _SLOWER < before.tokens_per_second:
        return f"more than {_SLOWER:g} times slower per token than half as many rows"
    return None


def smaller(recipe: Recipe, shape: BatchShape, measure: Measure) -> Measurement | None:
    """Half as many rows, to compare the speed with, where memory may go to the host unnoticed."""
    if shape.micro_batch_size < 2 or not spills():
        return None
    rows = shape.micro_batch_size // 2
    return measure(recipe, dataclasses.replace(shape, micro_batch_size=rows))


def spills() -> bool:
    """Windows, or Linux under it."""
    return sys.platform == "win32" or "microsoft" in platform.release().lower()


def measure_here(rehearsal: Callable[[], Rehearsal], card: Any) -> Measurement:
    """In this process. `card` is `torch.cuda`, or stands for it."""
    try:
        free_before, _ = card.mem_get_info()
        rehearsed = rehearsal()
        card.reset_peak_memory_stats()
        for _ in range(STEPS):
            rehearsed.step()
        card.synchronize()
        started = time.perf_counter()
        for _ in range(_TIMED_STEPS):
            rehearsed.step()
        card.synchronize()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        said = str(error) or "out of memory"
        return Measurement(fits=False, error=said.splitlines()[0].split(". ")[0])
    seconds = (time.perf_counter() - started) / _TIMED_STEPS
    free_after, _ = card.mem_get_info()
    tokens = sum(batch.tokens for batch in rehearsed.window)
    return Measurement(
        fits=True,
        reserved_bytes=card.max_memory_reserved(),
        allocated_bytes=card.max_memory_allocated(),
        driver_bytes=free_before - free_after,
        seconds_per_step=seconds,
        tokens_per_second=tokens / seconds if seconds else 0.0,
    )


def main() -> None:
    import torch

    from lowvram.build import choose_numerics

    request = json.loads(sys.stdin.read())
    recipe = pinned(Recipe.model_validate(request["recipe"]), BatchShape(**request["shape"]))
    output = os.dup(1)
    os.dup2(2, 1)  # libraries that print must not mix with the answer
    found = measure_here(lambda: rehearse(recipe, choose_numerics(recipe)), torch.cuda)
    os.write(output, (json.dumps(asdict(found)) + "\n").encode())


if __name__ == "__main__":
    main()
