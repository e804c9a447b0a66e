"""Runs that are killed at any moment, on disks that fail at any call: is anything lost?

    python benchmarks/chaos.py --minutes 20 --seed 1   # the table of RESULTS.md
    python benchmarks/chaos.py --minutes 3             # a slice of it

It needs Linux and a C compiler.

Every trial is the real `lowvram` command in a process of its own, on a tiny model, and ends with a
run that has been gone on with to its end. That run has to be, to the bit, the one that nothing
happened to: adapter, merged model, optimizer state, every figure of every step, perplexities and
samples. What is visible in between has to be whole: checkpoints by their manifests, models by
comparison. A command that fails has to exit with a code and an error of ours.

- *kills*: SIGKILL after a random time, up to four times before a run may finish.
- *calls*: SIGKILL in place of one call that writes (open, write, rename, fsync, unlink, ...).
- *faults*: one such call fails, or all from one on: a full or lost disk, a quota, too many files.
- *full*: a file size limit (RLIMIT_FSIZE), and where it may be mounted a file system of a few MB.
- *merges*, *evaluations*: the same for `lowvram merge` and `lowvram evaluate`.

Calls are counted and struck by chaos_disk.c, which is compiled and loaded before libc. The seed
decides everything but what a process has got to at a moment. Exit code 1 if a trial fails; its
directory is then kept.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from chaos_command import Failure, command
from chaos_place import SCENARIOS, Place, Reference, end_of, make_place
from chaos_trials import KINDS, Trial, can_mount

SOURCE = Path(__file__).with_name("chaos_disk.c")


def take_references(place: Place) -> None:
    """Every scenario once with nothing happening to it, and a merge and an evaluation."""
    folder = place.directory / "references"
    for scenario in SCENARIOS:
        trial = Trial(place=place, home=folder / scenario, scenario=scenario)
        ended = trial.start()
        if ended.code:
            raise SystemExit(f"{scenario}: exit code {ended.code}: {ended.said}")
        place.references[scenario] = Reference(
            end=end_of(trial.run), calls=ended.calls, seconds=ended.seconds
        )
    run = folder / next(iter(SCENARIOS)) / "run"
    merge = command(
        folder / "merge", "merge", str(run / "adapter"), "--output", f"{folder}/merge/merged"
    )
    text = str(place.directory / "text.txt")
    evaluate = command(folder / "evaluate", "evaluate", str(run), "--data", text, "--json")
    for name, ended in (("merge", merge), ("evaluate", evaluate)):
        place.references[name] = Reference(
            end={"said": ended.said}, calls=ended.calls, seconds=ended.seconds
        )


@dataclass(kw_only=True)
class Row:
    trials: int = 0
    kills: int = 0
    faults: int = 0
    failures: int = 0


def torment(place: Place, seed: int, minutes: float, kinds: Sequence[str]) -> dict[str, Row]:
    """Trials until the time is over; the n-th of a seed is always the same."""
    rows = {kind: Row() for kind in kinds}
    bag = [kind for kind in kinds for _ in range(KINDS[kind][1])]
    end, number = time.monotonic() + 60 * minutes, 0
    while time.monotonic() < end:
        rng = random.Random(f"{seed}:{number}")
        kind = rng.choice(bag)
        scenarios = list(SCENARIOS)
        if kind == "merges":  # of an adapter that can be merged
            scenarios = [name for name in scenarios if not name.startswith("full")]
        trial = Trial(
            place=place,
            home=place.directory / "trials" / str(number),
            scenario=rng.choice(scenarios),
        )
        row = rows[kind]
        try:
            KINDS[kind][0](trial, rng)
            shutil.rmtree(trial.home, ignore_errors=True)
            for path in trial.home.parent.glob(f"{number}-*"):
                path.unlink()
        except (Failure, OSError) as failure:
            row.failures += 1
            print(f"\ntrial {number} ({kind}; {trial.scenario}; {trial.home}): {failure}")
            print(*trial.said, sep="\n", flush=True)
        row.trials, row.kills, row.faults = (
            row.trials + 1,
            row.kills + trial.kills,
            row.faults + trial.faults,
        )
        number += 1
    return rows


def table(rows: dict[str, Row], seed: int, minutes: float) -> str:
    lines = [
        f"Seed {seed}, {minutes / 60:.2f} hours of trials.",
        "",
        "| what | trials | kills | faults | failures |",
        "|---|---|---|---|---|",
    ]
    total = Row()
    for kind, row in rows.items():
        lines.append(f"| {kind} | {row.trials} | {row.kills} | {row.faults} | {row.failures} |")
        for name in vars(total):
            setattr(total, name, getattr(total, name) + getattr(row, name))
    lines.append(f"| all | {total.trials} | {total.kills} | {total.faults} | {total.failures} |")
    return "\n".join(lines)


def with_disk(*, if_possible: bool) -> None:
    """This process anew, with chaos_disk.c loaded before libc."""
    library = Path(tempfile.mkdtemp(prefix="lowvram-chaos-")) / "chaos_disk.so"
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not sys.platform.startswith("linux"):
        print("chaos.py: needs Linux and a C compiler (cc)", file=sys.stderr)
        raise SystemExit(0 if if_possible else 1)
    build = [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(SOURCE), "-ldl"]
    subprocess.run(build, check=True)
    # One thread: a process with more must not be forked from.
    threads = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    environment = os.environ | threads | {"LD_PRELOAD": str(library), "CUDA_VISIBLE_DEVICES": ""}
    os.execve(sys.executable, [sys.executable, *sys.argv], environment)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=list(KINDS), action="append", help="a kind of trial")
    parser.add_argument("--if-possible", action="store_true", help="else it is left out")
    arguments = parser.parse_args()
    if "chaos_disk" not in os.environ.get("LD_PRELOAD", ""):
        with_disk(if_possible=arguments.if_possible)
    import torch

    torch.set_num_threads(1)
    for name in ("cli", "run", "merge", "inference", "metric", "data.documents", "data.tokens"):
        __import__(f"lowvram.{name}")
    import bitsandbytes  # noqa: F401 - loaded once here rather than in every trial
    import transformers.models.gpt2.modeling_gpt2  # noqa: F401

    directory = Path(tempfile.mkdtemp(prefix="lowvram-chaos-"))
    place = make_place(directory)
    take_references(place)
    kinds = arguments.only or list(KINDS)
    if not can_mount(directory / "mount"):
        print("no file system can be mounted here: disks that fill up are left out")
        kinds = [kind for kind in kinds if kind != "disks that fill up"]
    for name, reference in place.references.items():
        print(f"{name}: {reference.calls} calls that write, {reference.seconds:.1f} s", flush=True)
    rows = torment(place, arguments.seed, arguments.minutes, kinds)
    print(table(rows, arguments.seed, arguments.minutes))
    if any(row.failures for row in rows.values()):
        raise SystemExit(1)
    shutil.rmtree(directory)


if __name__ == "__main__":
    main()
