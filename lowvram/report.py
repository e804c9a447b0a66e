"""The result of a run: result.json, and a table of it."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rich.table import Table

from lowvram.display import literal
from lowvram.memory.measure import format_gib

_PACKAGES = (
    "lowvram",
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "datasets",
    "accelerate",
    "evaluate",
    "tokenizers",
    "safetensors",
)


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a finished run found. `to_json` is the content of result.json."""

    output_dir: str
    perplexity: dict[str, float | None]
    """base, adapter, merged: on the held-out documents; None where nothing was held out."""
    evaluation: dict[str, Any]
    """tokens_scored, documents, context_length, stride, precision, and bits per byte."""
    merge: dict[str, Any]
    """max_logit_difference and how it was found."""
    tokens_per_second: float | None
    memory: dict[str, int | None]
    """predicted_peak_bytes (None: not predicted) and measured_peak_bytes."""
    data: dict[str, int]
    """Documents and tokens: in the rows, as targets, dropped, held out."""
    steps: int
    """Windows of the data, skipped ones included."""
    optimizer_steps: int
    tokens: int
    trainable_parameters: int
    fit: dict[str, Any]
    numerics: dict[str, str]
    samples: list[dict[str, str]]
    recipe_sha256: str
    seconds: float
    events: list[dict[str, Any]] = field(default_factory=list)
    """What happened on the way: resumed, stopped, out of memory."""
    notes: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=lambda: installed_versions())

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def installed_versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def result_table(result: RunResult) -> Table:
    table = Table(title=literal(result.output_dir), show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    for name in ("base", "adapter", "merged"):
        value = result.perplexity[name]
        text = "not measured: nothing was held out" if value is None else f"{value:.3f}"
        table.add_row(f"perplexity, {name}", text)
    if result.evaluation:
        table.add_row(
            "measured on",
            "{tokens_scored} held-out tokens of {documents} documents, context {context_length}, "
            "stride {stride}, {precision}".format(**result.evaluation),
        )
    table.add_row(
        "merge proof",
        f"largest logit difference {result.merge['max_logit_difference']:.2g} "
        f"(allowed {result.merge['tolerance']:.2g})",
    )
    table.add_row("steps, tokens", f"{result.optimizer_steps}, {result.tokens}")
    if result.tokens_per_second:
        table.add_row("tokens a second", f"{result.tokens_per_second:.0f}")
    measured = result.memory["measured_peak_bytes"]
    predicted = result.memory["predicted_peak_bytes"]
    peak = "unknown" if measured is None else format_gib(measured)
    if predicted is not None:
        peak += f" (predicted {format_gib(predicted)})"
    table.add_row("peak memory", peak)
    for sample in result.samples:
        table.add_section()
        table.add_row("prompt", literal(sample["prompt"]))
        table.add_row("before", literal(sample["base"]))
        table.add_row("after", literal(sample["tuned"]))
    return table
