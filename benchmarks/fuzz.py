"""Recipes that nobody would write: none may end in a traceback, hang, or cost memory.

    python benchmarks/fuzz.py                                 # 10,000 of each kind
    python benchmarks/fuzz.py --engine atheris --seconds 300  # by coverage; pip install atheris

Each input is a file that goes the way of `lowvram run FILE --dry-run` up to the import of torch:
it is loaded, what loads is dumped and must load back equal, and its inputs are looked for. That
ends in a recipe or in an error of ours with a message and an exit code; everything else is a
failure, as is an input that takes more than --limit seconds. A sample goes through the command
itself, in a process of its own, where a refusal must be one message on standard error.

`mutations` damages the shipped recipes: bytes, lines, values, numbers, tags, anchors, nesting,
look-alikes. `hypothesis` makes keys and values of every type, and bytes and text of any kind.
`atheris` changes what it has as long as that reaches new branches of lowvram.recipe, for all of
--seconds. Each engine runs in a process of its own without torch (hypothesis makes its inputs in
yet another), so that the peak is that of the loader. Exit code 1 after a failure, whose input
stands in the file that is named, or with a peak above 200 MiB.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from mutations import ODD, VALUES, YAML, mutate

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
ENGINES = ("mutations", "hypothesis", "atheris")
ALLOWED_MIB = 200
COMMANDS = 20
"""Inputs of each engine that go through the command itself."""


class Hang(BaseException):
    """Not an Exception, so that nothing on the way takes it for one of its own."""


@dataclass(kw_only=True)
class Tally:
    """What came of the inputs of one engine."""

    engine: str
    inputs: int = 0
    accepted: int = 0
    refused: int = 0
    worst_seconds: float = 0.0
    peak_mib: float = 0.0
    failures: int = 0
    seconds: float = 0.0
    commands: int = 0

    def row(self, seed: int) -> str:
        return (
            f"| {self.engine} | {self.inputs:,} | {self.accepted:,} | {self.refused:,} | "
            f"{self.worst_seconds:.2f} | {self.peak_mib:.0f} | {self.failures} | "
            f"{self.commands} | {self.seconds:.0f} | {seed} |"
        )


HEADER = (
    "| engine | inputs | accepted | refused | worst, s | peak, MiB | failures | as commands | "
    "seconds | seed |\n|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|"
)


class Judge:
    """Takes inputs one by one, in the current directory, and keeps the first failing one."""

    def __init__(self, engine: str, limit: float, kept: Path) -> None:
        self.tally = Tally(engine=engine)
        self.limit = limit
        self.kept = kept
        self.sample: list[bytes] = []
        signal.signal(signal.SIGALRM, self._ring)

    def _ring(self, _number: int, _frame: FrameType | None) -> None:
        raise Hang(f"no answer after {self.limit} s")

    def take(self, content: bytes) -> None:
        self.tally.inputs += 1
        if self.tally.inputs & (self.tally.inputs - 1) == 0 or self.tally.inputs % 1000 == 0:
            self.sample = [*self.sample, content][-COMMANDS:]
        Path("my.yaml").write_bytes(content)
        started = time.perf_counter()
        signal.setitimer(signal.ITIMER_REAL, self.limit)
        try:
            self._judge()
        except BaseException as error:  # noqa: BLE001 - that is what is looked for
            if isinstance(error, KeyboardInterrupt):
                raise
            signal.setitimer(signal.ITIMER_REAL, 0)
            self.fail(content, "".join(traceback.format_exception(error)))
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        seconds = time.perf_counter() - started
        self.tally.worst_seconds = max(self.tally.worst_seconds, seconds)

    def _judge(self) -> None:
        from lowvram.errors import LowVRAMError
        from lowvram.inputs import check_inputs
        from lowvram.recipe import dump_recipe, load_recipe

        try:
            recipe = load_recipe("my.yaml")
        except LowVRAMError as error:
            must(error.exit_code == 2, f"exit code {error.exit_code}")
            must(str(error).startswith("my.yaml:"), f"names no file: {error}")
            self.tally.refused += 1
            return
        Path("again.yaml").write_text(dump_recipe(recipe), encoding="utf-8", newline="")
        must(load_recipe("again.yaml") == recipe, "its dump is another recipe")
        self.tally.accepted += 1
        try:
            check_inputs(recipe)
        except LowVRAMError as error:
            must(error.exit_code in (3, 4), f"exit code {error.exit_code}")
            must(bool(str(error).strip()), "an error without a message")

    def fail(self, content: bytes, words: str) -> None:
        self.tally.failures += 1
        if not self.kept.exists():
            self.kept.write_bytes(content)
            print(f"{words}\nits input: {self.kept}", file=sys.stderr)

    def run_commands(self) -> None:
        """The sample through the command: an exit code of ours, and never a traceback."""
        for content in self.sample:
            Path("my.yaml").write_bytes(content)
            # The tokens are not counted and no model is looked for if the end comes here.
            code = "import sys; sys.modules['torch'] = None; from lowvram.cli import main; main()"
            done = subprocess.run(
                [sys.executable, "-c", code, "run", "my.yaml", "--dry-run"],
                capture_output=True,
                timeout=60,
            )
            self.tally.commands += 1
            torch_missing = b"import of torch halted" in done.stderr  # it was accepted
            refused = done.returncode in (2, 3, 4) and done.stderr.startswith(b"error: ")
            if not torch_missing and (not refused or b"Traceback" in done.stderr):
                self.fail(content, f"exit code {done.returncode}\n{done.stderr.decode()}")


def must(fine: bool, words: str) -> None:
    if not fine:
        raise AssertionError(words)


# Engines


def run_mutations(judge: Judge, inputs: int, until: float, seed: int) -> None:
    rng = random.Random(seed)
    shipped = [path.read_bytes() for path in sorted(RECIPES.glob("*.yaml"))]
    for _ in range(inputs):
        if time.monotonic() > until:
            return
        judge.take(mutate(rng.choice(shipped), shipped, rng))


def run_hypothesis(judge: Judge, inputs: int, until: float, seed: int) -> None:
    command = [sys.executable, __file__, "--make", "--inputs", str(inputs), "--seed", str(seed)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as maker:
        assert maker.stdout is not None
        while time.monotonic() <= until and (size := maker.stdout.read(8)):
            judge.take(maker.stdout.read(int.from_bytes(size)))
        maker.stdout.close()
        if maker.wait() > 0 and judge.tally.inputs < inputs and time.monotonic() <= until:
            raise RuntimeError(f"no more inputs after {judge.tally.inputs}")


def make_inputs(inputs: int, seed: int) -> None:
    """To standard output: each with its size in front."""
    from hypothesis import HealthCheck, given, settings
    from hypothesis import seed as with_seed

    @with_seed(seed)
    @settings(
        max_examples=inputs,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(_recipes())
    def make(content: bytes) -> None:
        sys.stdout.buffer.write(len(content).to_bytes(8) + content)

    make()


def _recipes() -> Any:
    """Bytes; text of YAML's own signs; and, mostly, mappings of known keys to any values."""
    from hypothesis import strategies as st

    from lowvram.recipe.problems import known_keys

    words = st.sampled_from([value.decode() for value in VALUES if len(value) < 400])
    scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
    values = st.recursive(
        scalars | words,
        lambda inner: (
            st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4)
        ),
        max_leaves=8,
    )
    keys = st.sampled_from(sorted(known_keys())) | st.text(max_size=8)
    settings = st.dictionaries(keys, values, max_size=6)
    likely = st.fixed_dictionaries(
        {}, optional={key: _likely(field, words) for key, field in known_keys().items()}
    )
    signs = "modelnatri:{}[]&*!|>-?#'\"\\%@`,~. \n\t\u00a0\u2028\ud800019"
    unruly = st.text(alphabet=signs, max_size=80)
    return st.one_of(
        settings.map(_as_json),
        likely.map(_as_json),
        st.tuples(keys, words | unruly).map(lambda pair: f"{HEAD}{pair[0]}: {pair[1]}"),
        unruly.map(lambda text: HEAD + text),
        st.binary(max_size=400),
    ).map(lambda made: made if isinstance(made, bytes) else made.encode(errors="surrogatepass"))


def _likely(field: Any, words: Any) -> Any:
    """The default nine times of ten, if there is one: all keys are right now and then."""
    from hypothesis import strategies as st

    if field.is_required():
        return st.sampled_from(["gpt2", "x.txt", "embedded:python-reference", "~/x", "a\u0430"])
    default = st.just(field.get_default())
    return st.integers(0, 99).flatmap(lambda number: words if number == 0 else default)


HEAD = "model: {name: gpt2}\ndata: {source: x.txt}\n"


def _as_json(settings: dict[str, Any]) -> str:
    """JSON is YAML, with its quotes; a recipe that could be one, where the values allow it."""
    tree: dict[str, Any] = {"model": {"name": "gpt2"}, "data": {"source": "x.txt"}}
    for key, value in settings.items():
        section, _, name = key.rpartition(".")
        parent = tree.setdefault(section, {}) if section else tree
        if isinstance(parent, dict):  # and not what a key of the section's name was set to
            parent[name] = value
    return json.dumps(tree, ensure_ascii=False)


def run_atheris(judge: Judge, until: float, seed: int, finished: Callable[[], None]) -> None:
    """Never returns: `finished` is called when the time is over."""
    import atheris

    with atheris.instrument_imports(include=["lowvram", "ruamel"]):
        import lowvram.inputs
        import lowvram.recipe  # noqa: F401
    Path("corpus").mkdir()
    for path in RECIPES.glob("*.yaml"):
        Path("corpus", path.name).write_bytes(path.read_bytes())
    words = [
        value for value in (*VALUES, *YAML, *(odd.encode() for odd in ODD)) if 0 < len(value) < 60
    ]
    lines = ('"' + "".join(f"\\x{byte:02x}" for byte in word) + '"' for word in words)
    Path("words").write_text("\n".join(lines) + "\n")

    def take(content: bytes) -> None:
        if time.monotonic() > until:
            finished()
            os._exit(0)  # libFuzzer's own end runs nothing of Python
        judge.take(content)

    atheris.Setup(
        [sys.argv[0], "corpus", "-dict=words", f"-seed={seed}",
         "-max_len=8192", "-rss_limit_mb=0", "-verbosity=0", "-print_final_stats=0"],
        take,
    )  # fmt: skip
    atheris.Fuzz()


# Processes


def child(options: argparse.Namespace, report: Path) -> None:
    """One engine, in the current directory."""
    started = time.monotonic()
    judge = Judge(options.engine, options.limit, Path(options.kept))
    until = started + options.seconds
    if options.engine == "mutations":
        run_mutations(judge, options.inputs, until, options.seed)
    elif options.engine == "hypothesis":
        run_hypothesis(judge, options.inputs, until, options.seed)
    else:
        run_atheris(judge, until, options.seed, lambda: finish(judge, started, report))
    finish(judge, started, report)


def finish(judge: Judge, started: float, report: Path) -> None:
    tally = judge.tally
    tally.seconds = time.monotonic() - started
    tally.peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    judge.run_commands()
    if "torch" in sys.modules:
        raise RuntimeError("torch was imported: the peak says nothing about the loader")
    report.write_text(json.dumps(asdict(tally)))


def run_engine(engine: str, options: argparse.Namespace) -> Tally:
    """In a process and a directory of its own."""
    with tempfile.TemporaryDirectory() as name:
        report = Path(name, "tally.json")
        command = [sys.executable, __file__, "--child", str(report), "--engine", engine]
        for key in ("seconds", "inputs", "seed", "limit", "kept"):
            command += [f"--{key}", str(getattr(options, key))]
        paths = [str(RECIPES.parent), os.environ.get("PYTHONPATH", "")]
        work = Path(name, "work")
        work.mkdir()
        done = subprocess.run(
            command,
            cwd=work,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        if not report.exists():
            raise RuntimeError(f"{engine}: exit code {done.returncode}\n{done.stderr[-4000:]}")
        tally = Tally(**json.loads(report.read_text()))
        if tally.failures:
            print(done.stderr[-4000:], file=sys.stderr)
        return tally


def installed(engine: str) -> bool:
    from importlib.util import find_spec

    return engine == "mutations" or find_spec(engine) is not None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", choices=[*ENGINES, "all"], default="all")
    parser.add_argument("--inputs", type=int, default=10_000, help="of mutations and hypothesis")
    parser.add_argument("--seconds", type=float, default=120, help="at most, for each engine")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--limit", type=float, default=5.0, help="seconds for one input")
    parser.add_argument("--kept", default="fuzz-failure.yaml", help="where a failing input goes")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--make", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        make_inputs(options.inputs, options.seed)
        return 0
    if options.child:
        child(options, options.child)
        return 0
    options.kept = str(Path(options.kept).absolute())
    Path(options.kept).unlink(missing_ok=True)
    failed = False
    print(HEADER)
    for engine in ENGINES if options.engine == "all" else (options.engine,):
        if not installed(engine):
            print(f"{engine}: not installed, so not run: pip install {engine}", file=sys.stderr)
            continue
        tally = run_engine(engine, options)
        print(tally.row(options.seed), flush=True)
        failed = failed or bool(tally.failures) or tally.peak_mib > ALLOWED_MIB
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
