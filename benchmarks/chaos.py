"""Runs that are killed at any moment, on disks that fail at any call: is anything lost?

    python benchmarks/chaos.py --minutes 60 --seed 1   # the table of RESULTS.md
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
import ctypes
import errno
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("chaos_disk.c")
COUNT, FAIL_ONCE, FAIL_ON, KILL = range(4)
ERRNOS = ("ENOSPC", "EIO", "EROFS", "EDQUOT", "EMFILE", "ESTALE")
HANGS_AFTER_SECONDS = 120
MOST_KILLS = 4
STEPS = 6
TIMES = {"seconds", "tokens_per_second"}
OF_THE_PLACE = {
    "seconds",
    "tokens_per_second",
    "memory",
    "events",
    "output_dir",
    "notes",
    "recipe_sha256",
}

SCENARIOS: dict[str, dict[str, Any]] = {
    "lora, adamw8bit": {"train.optimizer": "adamw8bit", "method.rank": 128},
    "lora, adamw, no packing": {"train.optimizer": "adamw", "data.packing": False},
    "lora, fp16": {"train.precision": "fp16", "train.optimizer": "paged_adamw8bit"},
    "lora, bf16, best kept": {
        "train.precision": "bf16",
        "train.keep_best": True,
        "train.keep_last": 1,
    },
    "lora on nf4, lion8bit": {"model.dtype": "nf4", "train.optimizer": "lion8bit"},
    "dora, adafactor": {"method.name": "dora", "train.optimizer": "adafactor"},
    "full, adamw8bit": {"method.name": "full", "train.optimizer": "adamw8bit"},
    "full, fused, sgd": {
        "method.name": "full",
        "train.optimizer": "sgd",
        "train.fused_backward": True,
        "train.max_grad_norm": None,
        "fit.micro_batch_size": 4,
    },
}
COMMON = {
    "train.global_batch_size": 4,
    "fit.micro_batch_size": 2,
    "train.max_steps": STEPS,
    "train.learning_rate": 1e-2,
    "train.eval_every": 2,
    "train.save_every": 2,
    "generate.max_new_tokens": 4,
}


class Failure(Exception):
    """A trial did not end as it has to."""


# --- the place ------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Place:
    """A directory with a tiny model, a text, and a recipe for each scenario."""

    directory: Path
    references: dict[str, Reference] = field(default_factory=dict)

    def recipe(self, scenario: str) -> Path:
        return self.directory / f"{list(SCENARIOS).index(scenario)}.yaml"


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What a run gives that nothing happens to."""

    end: dict[str, str]
    calls: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Ended:
    """Of a process: its exit code, or minus its signal, and what it said."""

    code: int
    said: str
    calls: int
    seconds: float


def make_place(directory: Path) -> Place:
    import torch
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    from lowvram.data.reference import reference_documents, reference_topics
    from lowvram.model import locate
    from lowvram.recipe import dump_recipe, load_recipe

    tokenizer = AutoTokenizer.from_pretrained(locate("embedded:gpt2-docstrings"))
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        initializer_range=0.2,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    GPT2LMHeadModel(config).save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")
    documents = islice(reference_documents(reference_topics()), 40)
    lines = [" ".join(document.split())[:90] for document in documents]
    (directory / "text.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    place = Place(directory=directory)
    first = directory / "first.yaml"
    first.write_text("model: {name: x}\ndata: {source: x}\n", encoding="utf-8")
    for scenario, changes in SCENARIOS.items():
        names = {"model.name": str(directory / "model"), "data.source": str(directory / "text.txt")}
        dropout = {} if changes.get("method.name") == "full" else {"method.dropout": 0.1}
        recipe = load_recipe(first, {**COMMON, **dropout, **names, **changes})
        place.recipe(scenario).write_text(dump_recipe(recipe), encoding="utf-8")
    return place


# --- a command ------------------------------------------------------------------------------------


class Disk:
    """chaos_disk.c, which has been loaded before libc."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL(None)
        self.library.chaos_calls.restype = ctypes.c_long
        self.library.chaos_arm.argtypes = (
            ctypes.c_char_p,
            ctypes.c_long,
            ctypes.c_int,
            ctypes.c_int,
        )

    def arm(self, directory: str, at: int = 0, how: int = COUNT, number: int = 0) -> None:
        self.library.chaos_arm(directory.encode(), at, how, number)

    @property
    def calls(self) -> int:
        return int(self.library.chaos_calls())


@dataclass(frozen=True, kw_only=True)
class Strike:
    """What happens to a command: nothing, unless something is given."""

    at: int = 0
    how: int = COUNT
    error: str = "ENOSPC"
    kill_after: float | None = None
    """Seconds."""
    file_bytes: int | None = None
    """The largest file that it may write."""
    fill_after: float | None = None
    """Seconds after which the file system is filled to its end."""

    def __str__(self) -> str:
        kind = ("nothing", "fails once", "fails from there on", "is the last")[self.how]
        what = f"call {self.at} {kind} ({self.error})" if self.how != COUNT else ""
        other = {
            "killed after": self.kill_after,
            "files up to": self.file_bytes,
            "full after": self.fill_after,
        }
        return what + ", ".join(
            f"{name} {value}" for name, value in other.items() if value is not None
        )


NOTHING = Strike()


def command(home: Path, *arguments: str, strike: Strike = NOTHING) -> Ended:
    """`lowvram ARGUMENTS` in a new process, whose cache and temporary files are in `home`."""
    home.mkdir(parents=True, exist_ok=True)
    (home / "tmp").mkdir(exist_ok=True)
    said, counted = (Path(f"{home}-{name}") for name in ("said", "calls"))
    counted.unlink(missing_ok=True)
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        _be_command(home, arguments, strike, said, counted)
    status = _wait(child, home, strike, started)
    code = os.waitstatus_to_exitcode(status)
    calls = int(counted.read_text()) if counted.exists() and counted.read_text() else 0
    text = said.read_text(encoding="utf-8", errors="replace")
    return Ended(code=code, said=text, calls=calls, seconds=time.monotonic() - started)


def _be_command(
    home: Path, arguments: Sequence[str], strike: Strike, said: Path, counted: Path
) -> None:
    """The child; it does not return."""
    code = 70
    try:
        output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(output, stream)
        os.environ |= {"LOWVRAM_CACHE": str(home / "cache"), "TMPDIR": str(home / "tmp")}
        tempfile.tempdir = None
        if strike.file_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (strike.file_bytes, resource.RLIM_INFINITY))
        disk = Disk()
        disk.arm(f"{home}/", strike.at, strike.how, getattr(errno, strike.error))
        try:
            from lowvram.cli import main

            main(list(arguments), prog_name="lowvram")
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        except BaseException:
            traceback.print_exc()
        calls = disk.calls
        disk.arm("")
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        counted.write_text(str(calls))
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _wait(child: int, home: Path, strike: Strike, started: float) -> int:
    """The status of the child, to which its strike is done while it runs."""
    filled = False
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return status
        now = time.monotonic() - started
        if strike.kill_after is not None and now >= strike.kill_after:
            os.kill(child, signal.SIGKILL)
        if strike.fill_after is not None and now >= strike.fill_after and not filled:
            filled = True
            _fill(home)
        if now > HANGS_AFTER_SECONDS:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise Failure(f"hangs: not done after {HANGS_AFTER_SECONDS} s")
        time.sleep(0.001)


def _fill(home: Path) -> None:
    with (home / "filler").open("wb", buffering=0) as file:
        try:
            while file.write(bytes(1 << 12)):
                pass
        except OSError:
            return


# --- what has to hold -----------------------------------------------------------------------------


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def end_of(run: Path) -> dict[str, str]:
    """Of a finished run, everything that must not depend on what happened on the way."""
    found = {}
    for part in (run / "adapter", run / "merged", *sorted((run / "checkpoints").iterdir())[-1:]):
        if part.is_dir():
            found |= {
                f"{part.name}/{p.name}": sha256(p)
                for p in part.iterdir()
                if p.name != "manifest.json"
            }
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    found["metrics"] = json.dumps(steps)
    found["result"] = json.dumps({k: v for k, v in result.items() if k not in OF_THE_PLACE})
    found["start"] = (run / "start.json").read_text(encoding="utf-8")
    return found


def check_visible(run: Path, reference: Reference) -> None:
    """Whatever there is under its own name is whole."""
    from lowvram.checkpoint import OPTIMIZER_FILE, STATE_FILE, WEIGHTS_FILE
    from lowvram.disk import check_manifest

    if (run / "checkpoints").is_dir():
        for path in (run / "checkpoints").glob("step-*"):
            try:
                check_manifest(path, (WEIGHTS_FILE, OPTIMIZER_FILE, STATE_FILE))
            except (OSError, ValueError) as error:
                raise Failure(f"{path.name} is visible and not whole: {error}") from error
    for part in ("adapter", "merged"):
        if (run / part).is_dir():
            found = {f"{part}/{path.name}": sha256(path) for path in (run / part).iterdir()}
            wanted = {
                key: value for key, value in reference.end.items() if key.startswith(f"{part}/")
            }
            if found != wanted:
                raise Failure(f"{part} is visible and not what it has to be")
    if (run / "result.json").exists():
        compare(end_of(run), reference.end)


def compare(found: dict[str, str], wanted: dict[str, str]) -> None:
    different = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
    if different:
        raise Failure(f"differs from a run that nothing happened to: {', '.join(different)}")


def check_said(ended: Ended) -> None:
    """A command that was not killed says in its own words what is wrong."""
    if "Traceback" in ended.said or ended.code not in (0, 3, 4, 5, 9, -signal.SIGKILL):
        raise Failure(f"exit code {ended.code}: {ended.said[-2000:]}")
    if ended.code > 0 and not ended.said.rpartition("note: ")[2].count("error: "):
        raise Failure(f"exit code {ended.code} without a reason: {ended.said[-2000:]}")


def flags_asked_for(ended: Ended) -> list[str]:
    """What a message about the directory says to add."""
    if ended.code == 5 and "holds an unfinished run" in ended.said:
        return ["--resume"]
    if ended.code == 5 and "allow it with --overwrite" in ended.said:
        return ["--overwrite"]
    return []


# --- trials ---------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Trial:
    place: Place
    home: Path
    scenario: str
    kills: int = 0
    faults: int = 0
    said: list[str] = field(default_factory=list)

    @property
    def reference(self) -> Reference:
        return self.place.references[self.scenario]

    @property
    def run(self) -> Path:
        return self.home / "run"

    def start(self, flags: Sequence[str] = (), strike: Strike = NOTHING) -> Ended:
        recipe = str(self.place.recipe(self.scenario))
        arguments = ("run", recipe, "--quiet", "--set", f"output_dir={self.run}", *flags)
        return self.told(command(self.home, *arguments, strike=strike), strike, flags)

    def told(self, ended: Ended, strike: Strike, flags: Sequence[str]) -> Ended:
        self.said.append(
            f"{' '.join(flags)} [{strike}] -> {ended.code}: {ended.said.strip()[-500:]}"
        )
        check_said(ended)
        self.kills += ended.code == -signal.SIGKILL
        return ended

    def under(self, strikes: Sequence[Strike]) -> None:
        """A run that is struck again and again, then left in peace."""
        flags: list[str] = []
        for strike in strikes:
            ended = self.start(flags, strike)
            if asked := flags_asked_for(ended):
                ended = self.start(flags := asked, strike)
            if "--overwrite" in flags:
                flags = []
            check_visible(self.run, self.reference)
            if ended.code == 0:
                break
        self.in_peace(flags)

    def in_peace(self, flags: Sequence[str] = ()) -> None:
        if (self.run / "result.json").exists():
            compare(end_of(self.run), self.reference.end)
            return
        for _ in range(3):
            ended = self.start(flags)
            if ended.code == 0:
                break
            flags = flags_asked_for(ended)
            if not flags:
                raise Failure(f"cannot be gone on with: {ended.said[-2000:]}")
        compare(end_of(self.run), self.reference.end)
        left = [str(path.relative_to(self.home)) for path in self.home.rglob(".partial-*")]
        if left:
            raise Failure(f"left behind: {', '.join(left)}")


def killed(trial: Trial, rng: random.Random) -> None:
    longest = 1.1 * trial.reference.seconds
    times = [rng.uniform(0, longest) for _ in range(rng.randint(1, MOST_KILLS))]
    trial.under([Strike(kill_after=seconds) for seconds in times])


def killed_at_a_call(trial: Trial, rng: random.Random) -> None:
    trial.under([Strike(at=rng.randint(1, trial.reference.calls), how=KILL)])


def fault(trial: Trial, rng: random.Random) -> None:
    at, how = rng.randint(1, trial.reference.calls), rng.choice((FAIL_ONCE, FAIL_ON))
    trial.faults += 1
    trial.under([Strike(at=at, how=how, error=rng.choice(ERRNOS))])


def file_limit(trial: Trial, rng: random.Random) -> None:
    trial.faults += 1
    trial.under([Strike(file_bytes=rng.randint(0, 1 << 17))])


def full_disk(trial: Trial, rng: random.Random) -> None:
    """On a file system that is filled by another program in mid-run, and emptied again."""
    trial.faults += 1
    trial.home.mkdir(parents=True)
    with mounted(trial.home):
        ended = trial.start(strike=Strike(fill_after=rng.uniform(0, trial.reference.seconds)))
        check_visible(trial.run, trial.reference)
        (trial.home / "filler").unlink(missing_ok=True)
        trial.in_peace(["--resume"] if ended.code and (trial.run / "start.json").exists() else [])


@contextmanager
def mounted(directory: Path) -> Iterator[None]:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(directory)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)


def can_mount(directory: Path) -> bool:
    directory.mkdir()
    try:
        with mounted(directory):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


def overwritten(trial: Trial, rng: random.Random) -> None:
    """A finished run is started anew, killed or struck while the old one goes, and finished."""
    shutil.copytree(trial.place.directory / "references" / trial.scenario / "run", trial.run)
    strike = Strike(at=rng.randint(1, trial.reference.calls), how=rng.choice((KILL, FAIL_ONCE)))
    ended = trial.start(["--overwrite"], strike)
    check_visible(trial.run, trial.reference)
    trial.faults += ended.code > 0
    trial.in_peace()


def merged(trial: Trial, rng: random.Random) -> None:
    """`lowvram merge` of a finished run, killed or struck, then left in peace."""
    adapter = trial.place.directory / "references" / trial.scenario / "run" / "adapter"
    output = trial.home / "merged"
    arguments = ("merge", str(adapter), "--output", str(output))
    calls = trial.place.references["merge"].calls
    seconds = trial.place.references["merge"].seconds
    strike = rng.choice(
        [
            Strike(kill_after=rng.uniform(0, seconds)),
            Strike(at=rng.randint(1, calls), how=KILL),
            Strike(
                at=rng.randint(1, calls),
                how=rng.choice((FAIL_ONCE, FAIL_ON)),
                error=rng.choice(ERRNOS),
            ),
        ]
    )
    ended = trial.told(command(trial.home, *arguments, strike=strike), strike, ())
    trial.faults += ended.code > 0
    wanted = {
        k.removeprefix("merged/"): v
        for k, v in trial.reference.end.items()
        if k.startswith("merged/")
    }
    if not output.exists():
        ended = trial.told(command(trial.home, *arguments), NOTHING, ())
        if ended.code:
            raise Failure(f"cannot be merged again: {ended.said[-2000:]}")
    compare({path.name: sha256(path) for path in output.iterdir()}, wanted)
    if left := [path.name for path in trial.home.glob(".partial-*")]:
        raise Failure(f"left behind: {', '.join(left)}")


def evaluated(trial: Trial, rng: random.Random) -> None:
    """`lowvram evaluate`, killed; the next one clears up after it."""
    model = str(trial.place.directory / "references" / next(iter(SCENARIOS)) / "run")
    arguments = ("evaluate", model, "--data", str(trial.place.directory / "text.txt"), "--json")
    strike = Strike(kill_after=rng.uniform(0, trial.place.references["evaluate"].seconds))
    trial.told(command(trial.home, *arguments, strike=strike), strike, ())
    ended = trial.told(command(trial.home, *arguments), NOTHING, ())
    if ended.said != trial.place.references["evaluate"].end["said"]:
        raise Failure("gives another perplexity")
    if left := list((trial.home / "tmp").iterdir()):
        raise Failure(f"left behind: {', '.join(path.name for path in left)}")


KINDS: dict[str, tuple[Callable[[Trial, random.Random], None], int]] = {
    "kills at random moments": (killed, 8),
    "kills at a call": (killed_at_a_call, 4),
    "calls that fail": (fault, 6),
    "file size limits": (file_limit, 1),
    "disks that fill up": (full_disk, 1),
    "runs started anew": (overwritten, 1),
    "merges": (merged, 2),
    "evaluations": (evaluated, 1),
}
"""Each with its share of the trials."""


# --- all of it ------------------------------------------------------------------------------------


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
        f"Seed {seed}, {minutes:.0f} minutes of trials.",
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


def with_disk() -> None:
    """This process anew, with chaos_disk.c loaded before libc."""
    library = Path(tempfile.mkdtemp(prefix="lowvram-chaos-")) / "chaos_disk.so"
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not sys.platform.startswith("linux"):
        raise SystemExit("chaos.py: needs Linux and a C compiler (cc)")
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
    arguments = parser.parse_args()
    if "chaos_disk" not in os.environ.get("LD_PRELOAD", ""):
        with_disk()
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
