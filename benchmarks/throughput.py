"""Tokens per second and peak memory on the CPU, beside what people would use instead.

    python benchmarks/throughput.py --tokenizer DIR --text FILE --make-venvs --plot plot.png

DIR holds GPT-2's tokenizer; FILE has a document a line. GPT-2 small with random weights gets a LoRA
adapter, in fp32, 4 rows of 512 tokens a step: by transformers' Trainer with peft as the common
tutorial uses it (every line padded), the same with packed blocks, TRL, bengo, Soup, and lowvram.
Every contestant has a process of its own and all cores; their order alternates. torch's own limit
is the rate of a matrix product of the shape of the first layer of an MLP, at 4 N FLOP a token.

First of all, losses: lowvram trains on the very batches that the others trained on, from the same
weights, without dropout; per target token the losses have to agree. Exit code 1 if they do not, or
if a claim below the table is not met. Peers without a Python are left out: give one with
--trl-python and so on, or have virtual environments made once with --make-venvs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arena import (
    PEERS,
    WEIGHTS,
    Arena,
    Failed,
    find_pythons,
    prepare,
    random_gpt2,
    read_lines,
    say,
)
from contestants import REMARKS, Report

from lowvram.memory.measure import format_gib

DROPOUTS = (0.0, 0.1)
DOCUMENTS = 2000
"""Lines of the text that are used: more than any contestant gets to."""
ALLOWED_LOSS = 1e-4
ALLOWED_MEAN_LOSS = 0.02
"""With dropout the random numbers differ, and with them the losses; nats."""
PRODUCT = (2048, 768, 3072)
"""Rows, inputs and outputs of the matrix product that is the limit."""

LABELS = {
    "tutorial": "Trainer + peft, tutorial (padded)",
    "trainer": "Trainer + peft, packed",
    "trl": "TRL SFTTrainer, packed",
    "bengo": "bengo",
    "soup": "Soup, packed",
    "lowvram-same": "lowvram, same blocks as Trainer-packed",
    "lowvram": "lowvram, as shipped",
    "lowvram-compiled": "lowvram, same blocks, torch.compile",
}
JUDGED = ("trainer", "lowvram-same", "lowvram")
OURS = ("lowvram-same", "lowvram")


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What was measured of one contestant at one dropout."""

    steps: int
    tokens_per_second: float
    """Median over all measured steps of all repetitions; useful tokens, not padding."""
    slowest: float
    fastest: float
    resident_bytes: int
    live_bytes: int
    """0 where they were not counted."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Losses of a contestant and of lowvram on the same batches."""

    contestant: str
    steps: int
    difference: float
    """The largest of a step or, with dropout, that of the means over all steps."""
    allowed: float

    @property
    def holds(self) -> bool:
        return self.difference <= self.allowed


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A quotient that is to be at least, or at most, a bound; a value for each of our rows."""

    text: str
    values: tuple[float | None, ...]
    bound: float
    at_least: bool

    @property
    def is_met(self) -> bool:
        if any(value is None for value in self.values):
            return False
        found = [value for value in self.values if value is not None]
        return min(found) >= self.bound if self.at_least else max(found) <= self.bound

    def __str__(self) -> str:
        shown = " and ".join("not measured" if v is None else f"{v:.2f}" for v in self.values)
        sign = ">=" if self.at_least else "<="
        return f"{'met' if self.is_met else 'NOT MET'}: {self.text} {sign} {self.bound}: {shown}"


@dataclass(kw_only=True)
class Results:
    """All reports, by contestant and dropout; those of memory apart, since profiling takes time."""

    reports: dict[tuple[str, float], list[Report]] = field(default_factory=dict)
    memory: dict[tuple[str, float], Report] = field(default_factory=dict)
    agreements: list[Agreement] = field(default_factory=list)
    products: list[float] = field(default_factory=list)
    """FLOP a second of the matrix product, once a repetition."""
    failures: dict[str, str] = field(default_factory=dict)

    def add(self, report: Report, dropout: float) -> Report:
        self.reports.setdefault((report.contestant, dropout), []).append(report)
        return report

    def figures(self) -> dict[tuple[str, float], Figures]:
        return {
            key: figures_of(reports, self.memory.get(key)) for key, reports in self.reports.items()
        }


def figures_of(reports: Sequence[Report], memory: Report | None) -> Figures:
    rates = [tokens / seconds for report in reports for tokens, seconds in report.measured]
    return Figures(
        steps=len(rates),
        tokens_per_second=statistics.median(rates),
        slowest=min(rates),
        fastest=max(rates),
        resident_bytes=round(statistics.median(report.resident_bytes for report in reports)),
        live_bytes=memory.live_bytes if memory else 0,
    )


def agreement(contestant: str, theirs: Sequence[float], ours: Sequence[float]) -> Agreement:
    """Step by step, as far as both have trained."""
    pairs = list(zip(theirs, ours, strict=False))
    difference = max(abs(a - b) for a, b in pairs)
    return Agreement(
        contestant=contestant, steps=len(pairs), difference=difference, allowed=ALLOWED_LOSS
    )


def mean_agreement(theirs: Sequence[Report], ours: Sequence[Report]) -> Agreement:
    """Means over the steps that both have trained, of pairs of reports on the same batches.

    Every repetition of theirs begins with the batches of the first, which were recorded; what came
    after those was not.
    """
    recorded = len(theirs[0].losses)
    pairs = [
        pair
        for a, b in zip(theirs, ours, strict=False)
        for pair in zip(a.losses[:recorded], b.losses, strict=False)
    ]
    return Agreement(
        contestant=theirs[0].contestant,
        steps=len(pairs),
        difference=abs(statistics.fmean(a - b for a, b in pairs)),
        allowed=ALLOWED_MEAN_LOSS,
    )


def claims(figures: dict[tuple[str, float], Figures], limit: float) -> list[Claim]:
    """What is claimed, each for both of our rows: quotients of medians."""

    def speed(name: str, dropout: float) -> float | None:
        found = figures.get((name, dropout))
        return found.tokens_per_second if found else None

    def resident(name: str, dropout: float) -> float | None:
        found = figures.get((name, dropout))
        return found.resident_bytes if found else None

    def live(name: str, dropout: float) -> float | None:
        found = figures.get((name, dropout))
        return found.live_bytes or None if found else None

    def claim(text: str, of: Any, dropout: float, peer: str | None, bound: float) -> Claim:
        base = limit if peer is None else of(peer, dropout)
        values = tuple(quotient(of(name, dropout), base) for name in OURS)
        return Claim(text=text, values=values, bound=bound, at_least=of is speed)

    def memory(of: Any, what: str, dropout: float, bound: float) -> Claim:
        text = f"peak {what} by that of Trainer-packed, dropout {dropout:g}"
        return claim(text, of, dropout, "trainer", bound)

    return [
        claim("tokens/s by those of the tutorial, dropout 0.1", speed, 0.1, "tutorial", 12),
        claim("tokens/s by those of Trainer-packed, dropout 0.1", speed, 0.1, "trainer", 1.5),
        claim("tokens/s by those of Trainer-packed, dropout 0", speed, 0.0, "trainer", 1.15),
        claim("tokens/s by the limit, dropout 0", speed, 0.0, None, 0.85),
        memory(resident, "resident memory", 0.0, 0.45),
        memory(resident, "resident memory", 0.1, 0.35),
        memory(live, "live tensor bytes", 0.0, 0.45),
        memory(live, "live tensor bytes", 0.1, 0.35),
    ]


def quotient(value: float | None, base: float | None) -> float | None:
    return value / base if value is not None and base else None


# --- running --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Match:
    """How much is run where; its methods fill the results."""

    arena: Arena
    results: Results
    repetitions: int
    seconds: float
    equal_steps: int
    slow_steps: int
    parameters: int

    def run(self, contestant: str, dropout: float, **options: Any) -> Report | None:
        """Run, print, and go on without it if it fails."""
        started = time.perf_counter()
        try:
            report = self.arena.run(self.arena.job(contestant, dropout, **options))
        except Failed as error:
            self.results.failures[contestant] = str(error)
            say(f"{contestant}: failed: {error}")
            return None
        rates = [tokens / seconds for tokens, seconds in report.measured]
        say(
            f"{LABELS[contestant]}, dropout {dropout:g}: {len(rates)} steps, "
            f"{statistics.median(rates) if rates else 0:.1f} tokens/s, "
            f"{format_gib(report.resident_bytes)} ({time.perf_counter() - started:.0f} s in all)"
        )
        return report

    def batches(self, contestant: str, dropout: float) -> str:
        return str(self.arena.directory / f"batches-{contestant}-{dropout:g}.safetensors")

    def check_losses(self) -> None:
        """lowvram on the batches of Trainer-packed; both count as the first repetition."""
        file, steps = self.batches("trainer", 0.0), self.equal_steps - 1
        theirs = self.run("trainer", 0.0, steps=steps, record=file)
        ours = self.run("lowvram-same", 0.0, steps=steps, replay=file) if theirs else None
        if theirs is None or ours is None:
            raise SystemExit(f"no losses to compare: {self.results.failures}")
        self.results.agreements.append(agreement("trainer", theirs.losses, ours.losses))
        self.results.add(theirs, 0.0)
        self.results.add(ours, 0.0)

    def measure_judged(self) -> None:
        """Every repetition anew, in alternating order."""
        for repetition in range(self.repetitions):
            for dropout in DROPOUTS:
                first = repetition == 0 and dropout == 0.0
                names = ("lowvram",) if first else JUDGED
                for name in reversed(names) if repetition % 2 else names:
                    self.results.products.append(product_rate(self.arena.threads))
                    self.measure(name, dropout)

    def measure(self, name: str, dropout: float) -> None:
        """Repetitions after the first replay its batches, so that any order will do."""
        options: dict[str, Any] = {"steps": 1, "seconds": self.seconds}
        if name == "trainer" and not self.results.reports.get((name, dropout)):
            options["record"] = self.batches(name, dropout)
        elif name.startswith("lowvram-"):
            options["replay"] = self.batches("trainer", dropout)
        report = self.run(name, dropout, **options)
        if report is not None:
            self.results.add(report, dropout)

    def measure_slow(self, names: Sequence[str]) -> None:
        """Once; and what was trained on without dropout also by lowvram, to compare losses."""
        for name in names:
            for dropout in DROPOUTS:
                file = self.batches(name, dropout)
                report = self.run(name, dropout, steps=self.slow_steps, record=file)
                if report is None:
                    break
                self.results.add(report, dropout)
                if dropout == 0.0:
                    ours = self.run("lowvram-same", dropout, warm_up=0, steps=2, replay=file)
                    if ours is not None:
                        found = agreement(name, report.losses, ours.losses)
                        self.results.agreements.append(found)

    def measure_memory(self) -> None:
        for dropout in DROPOUTS:
            for name in JUDGED:
                replay = self.batches("trainer", dropout) if name == "lowvram-same" else ""
                report = self.run(name, dropout, warm_up=0, profile=True, replay=replay)
                if report is not None:
                    self.results.memory[(name, dropout)] = report

    def measure_compiled(self) -> None:
        for dropout in DROPOUTS:
            replay = self.batches("trainer", dropout)
            report = self.run("lowvram-compiled", dropout, steps=self.slow_steps, replay=replay)
            if report is not None:
                self.results.add(report, dropout)

    @property
    def limit(self) -> float:
        """Tokens a second, if a step were nothing but matrix products: 4 N FLOP a token.

        2 N for the forward pass and 2 N for the gradients of the activations; those of frozen
        weights are not needed. Attention comes on top.
        """
        return statistics.median(self.results.products) / (4 * self.parameters)


def product_rate(threads: int, times: int = 30) -> float:
    """FLOP a second of the matrix product, the median of `times`."""
    import torch

    torch.set_num_threads(threads)
    rows, inputs, outputs = PRODUCT
    a, b = torch.randn(rows, inputs), torch.randn(inputs, outputs)
    found = []
    for _ in range(times + 3):
        started = time.perf_counter()
        torch.mm(a, b)
        found.append(time.perf_counter() - started)
    return 2 * rows * inputs * outputs / statistics.median(found[3:])


def parameters_of(model: Path) -> int:
    """As the weight file has them, a tied one once."""
    from math import prod

    from safetensors import safe_open

    with safe_open(model / WEIGHTS, framework="pt") as file:
        return sum(prod(file.get_slice(name).get_shape()) for name in file.keys())


# --- printing -------------------------------------------------------------------------------------


def table(figures: dict[tuple[str, float], Figures], limit: float) -> str:
    """Markdown; one row a contestant and dropout, the slowest kind first."""
    lines = [
        "| | dropout | useful tokens/s | slowest to fastest step | of the limit | resident peak | "
        "live tensors | steps |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, label in LABELS.items():
        for dropout in DROPOUTS:
            found = figures.get((name, dropout))
            if found is None:
                continue
            live = format_gib(found.live_bytes) if found.live_bytes else ""
            lines.append(
                f"| {label} | {dropout:g} | {found.tokens_per_second:.1f} | {found.slowest:.1f} to "
                f"{found.fastest:.1f} | {found.tokens_per_second / limit:.0%} | "
                f"{format_gib(found.resident_bytes)} | {live} | {found.steps} |"
            )
    return "\n".join(lines)


def notes(match: Match) -> list[str]:
    """Settings, versions and what is not equal."""
    results, arena = match.results, match.arena
    rate = statistics.median(results.products)
    names = {name for name, _ in results.reports}
    found = [
        f"{arena.rows} x {arena.length} tokens a step, LoRA rank 8, alpha 16 on c_attn, fp32, "
        f"AdamW, {arena.threads} threads, {cpu_name()}",
        f"limit: {rate / 1e9:.1f} GFLOP/s in products of {' x '.join(map(str, PRODUCT))}, at "
        f"4 x {match.parameters:,} FLOP a token: {match.limit:.1f} tokens/s",
    ]
    found += [f"{LABELS[name]}: {REMARKS[name]}" for name in LABELS if name in names]
    for name in ("trainer", "trl", "bengo", "soup"):
        if (name, 0.0) in results.reports:
            shown = ", ".join(
                f"{k} {v}" for k, v in results.reports[(name, 0.0)][0].versions.items()
            )
            found.append(f"versions, {LABELS[name]}: {shown}")
    found += [f"{LABELS[name]} failed: {reason}" for name, reason in results.failures.items()]
    return found + compile_notes(results)


def compile_notes(results: Results) -> list[str]:
    """What compiling costs, and after how many steps that is won back."""
    found = []
    for dropout in DROPOUTS:
        compiled = results.reports.get(("lowvram-compiled", dropout))
        plain = results.reports.get(("lowvram-same", dropout))
        if not compiled or not plain:
            continue
        after = statistics.median(s for _, s in compiled[0].measured)
        before = statistics.median(s for report in plain for _, s in report.measured)
        cost = compiled[0].seconds[0] - after
        gain = before - after
        pays = f"wins it back after {cost / gain:.0f} steps" if gain > 0 else "never pays"
        found.append(
            f"torch.compile, dropout {dropout:g}: {cost:.0f} s to compile, {after:.2f} s a step "
            f"instead of {before:.2f}: {pays}"
        )
    return found


def cpu_name() -> str:
    """As the system calls the processor."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def describe(found: Agreement) -> str:
    holds = "agree" if found.holds else "DISAGREE"
    what = "means" if found.allowed == ALLOWED_MEAN_LOSS else "losses"
    return (
        f"{what} of {found.steps} steps on the same batches, lowvram and "
        f"{LABELS[found.contestant]}: {holds}, largest difference {found.difference:.1e}, "
        f"allowed {found.allowed:g}"
    )


def draw(figures: dict[tuple[str, float], Figures], limit: float, path: Path) -> None:
    """Bars of tokens a second with the limit as a line, and of resident memory beside them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [name for name in LABELS if any((name, dropout) in figures for dropout in DROPOUTS)]
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 0.6 * len(names) + 1.6), sharey=True)
    values: list[tuple[str, Callable[[Figures], float]]] = [
        ("useful tokens/s", lambda found: found.tokens_per_second),
        ("peak resident memory, GiB", lambda found: found.resident_bytes / 2**30),
    ]
    for axis, (title, value) in zip(axes, values, strict=True):
        for place, dropout in enumerate(DROPOUTS):
            rows = [i for i, name in enumerate(names) if (name, dropout) in figures]
            widths = [value(figures[(names[i], dropout)]) for i in rows]
            heights = [i + (place - 0.5) * 0.38 for i in rows]
            bars = axis.barh(heights, widths, 0.36, label=f"dropout {dropout:g}")
            axis.bar_label(bars, fmt="{:.3g}", padding=3, fontsize=8)
        axis.set_xlabel(title)
        axis.margins(x=0.12)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].axvline(limit, color="black", linestyle="--", linewidth=1)
    axes[0].annotate(
        f"limit {limit:.0f}", (limit, -0.7), fontsize=8, ha="right", annotation_clip=False
    )
    axes[0].set_yticks(range(len(names)), [LABELS[name] for name in names])
    axes[0].invert_yaxis()
    axes[1].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def to_json(match: Match, found: dict[tuple[str, float], Figures]) -> dict[str, Any]:
    results = match.results
    return {
        "limit_tokens_per_second": match.limit,
        "product_flop_per_second": results.products,
        "notes": notes(match),
        "figures": [
            {"contestant": name, "dropout": dropout, **dataclasses.asdict(value)}
            for (name, dropout), value in found.items()
        ],
        "agreements": [
            {**dataclasses.asdict(item), "holds": item.holds} for item in results.agreements
        ],
        "claims": [
            {**dataclasses.asdict(item), "met": item.is_met} for item in claims(found, match.limit)
        ],
        "reports": [
            {"dropout": dropout, **dataclasses.asdict(report)}
            for (_, dropout), reports in results.reports.items()
            for report in reports
        ],
    }


# --- the command ----------------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="a document a line")
    parser.add_argument("--tokenizer", type=Path, help="a directory with GPT-2's tokenizer")
    parser.add_argument(
        "--model", type=Path, help="a GPT-2 directory, instead of random weights of GPT-2 small"
    )
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=15, help="of steps, each repetition")
    parser.add_argument("--equal-steps", type=int, default=10, help="whose losses are compared")
    parser.add_argument("--slow-steps", type=int, default=3, help="of peers measured once")
    parser.add_argument("--length", type=int, default=512, help="tokens a row")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--compile", action="store_true", help="measure torch.compile as well")
    parser.add_argument("--make-venvs", action="store_true", help="for the peers; once")
    for peer in PEERS:
        parser.add_argument(f"--{peer.name}-python", type=Path, help=f"with {peer.packages[0]}")
    parser.add_argument("--plot", type=Path, help="write a bar chart to this file")
    parser.add_argument("--json", type=Path, help="write everything to this file")
    arguments = parser.parse_args()
    if (arguments.tokenizer is None) == (arguments.model is None):
        parser.error("give either --tokenizer or --model")
    return arguments


def play(arguments: argparse.Namespace, directory: Path) -> Match:
    """Prepare the arena, and run everything in it."""
    given = {peer.name: getattr(arguments, f"{peer.name}_python") for peer in PEERS}
    arena = Arena(
        directory=directory,
        threads=arguments.threads,
        pythons=find_pythons(given, arguments.make_venvs),
        rows=4,
        length=arguments.length,
    )
    model = arguments.model or random_gpt2(directory / "gpt2", arguments.tokenizer)
    prepare(arena, model, DROPOUTS, read_lines(arguments.text, DOCUMENTS))
    match = Match(
        arena=arena,
        results=Results(),
        repetitions=arguments.repetitions,
        seconds=arguments.seconds,
        equal_steps=arguments.equal_steps,
        slow_steps=arguments.slow_steps,
        parameters=parameters_of(model),
    )
    match.check_losses()
    match.measure_judged()
    match.results.agreements.append(
        mean_agreement(
            match.results.reports[("trainer", 0.1)], match.results.reports[("lowvram-same", 0.1)]
        )
    )
    match.measure_slow(("tutorial", *arena.pythons))
    match.measure_memory()
    if arguments.compile:
        match.measure_compiled()
    return match


def main() -> None:
    arguments = parse()
    if hasattr(os, "getloadavg") and os.getloadavg()[0] > 0.5:
        say(f"this machine has other work (load {os.getloadavg()[0]:.1f}): times will be off")
    with tempfile.TemporaryDirectory() as directory:
        match = play(arguments, Path(directory))
    found = match.results.figures()
    print(table(found, match.limit))
    print()
    print("\n".join(f"- {note}" for note in notes(match)))
    print()
    print("\n".join(map(describe, match.results.agreements)))
    decided = claims(found, match.limit)
    print("\n".join(map(str, decided)))
    print("(the two values: the same blocks, and as shipped; a claim is met if both meet it)")
    if arguments.plot:
        draw(found, match.limit, arguments.plot)
    if arguments.json:
        arguments.json.write_text(json.dumps(to_json(match, found), indent=1), encoding="utf-8")
    equal = all(item.holds for item in match.results.agreements)
    complete = not match.results.failures.keys() & set(JUDGED)
    sys.exit(0 if equal and complete and all(claim.is_met for claim in decided) else 1)


if __name__ == "__main__":
    main()
