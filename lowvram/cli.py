"""The `lowvram` command: parse, call, print, exit code. Heavy imports wait for their use."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import click

from lowvram import __version__
from lowvram.errors import DoesNotFit, LowVRAMError, RecipeError
from lowvram.terminal import printable

_DTYPES = click.Choice(["fp32", "bf16", "fp16"])
_FORMATS = click.Choice(["document", "lines", "paragraphs"])
_SYSTEMS = click.Choice(["headless", "desktop", "windows"])


def _echo(text: str, *, nl: bool = True, err: bool = False) -> None:
    """All that the command prints itself: what came from data cannot steer the terminal."""
    click.echo(printable(text), nl=nl, err=err)


def _full_memory(error: BaseException) -> str | None:
    """What to say if an error is that memory is full."""
    from lowvram.memory.measure import is_out_of_memory

    if not is_out_of_memory(error):
        return None
    first = (str(error) or "of the host").splitlines()[0]
    return f"out of memory: {first}; end other programs, or take a smaller model or less at a time"


def _reports_errors(command: Callable[..., Any]) -> Callable[..., Any]:
    """Our errors become one message and their exit code; anything else is a bug and shows."""

    @wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except LowVRAMError as error:
            _echo(f"error: {error}", err=True)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            _echo("stopped", err=True)
            sys.exit(130)
        except BrokenPipeError:
            # Nobody reads on. What is still in the buffer goes nowhere, or Python would complain
            # about it at its end, and exit with a code of its own.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except OSError as error:
            place = f"{error.filename}: " if error.filename else ""
            _echo(f"error: {place}{error.strerror or error}", err=True)
            sys.exit(1)
        except (RuntimeError, MemoryError) as error:
            if (message := _full_memory(error)) is None:
                raise
            _echo(f"error: {message}", err=True)
            sys.exit(DoesNotFit.exit_code)

    return wrapper


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="lowvram")
def main() -> None:
    """Fine-tune GPT-2-class language models on one small GPU.

    A recipe in YAML goes in, a plain checkpoint that any tool loads comes out.
    """
    # When it is imported, it tells that a kernel for CPUs, of no use here, is not installed.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


@main.command()
@click.argument("recipe")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Override a key.")
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint.")
@click.option("--resume-anyway", is_flag=True,
              help="Even if base, data or recipe have changed; it is recorded.")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Start anew where a run already is.")
@click.option("--dry-run", is_flag=True, help="Print the whole recipe and the plan, and stop.")
@click.option("--gpu", help="With --dry-run: plan for this card, such as rtx-4070-ti.")
@click.option("--quiet", is_flag=True, help="Print the result only.")
@_reports_errors
def run(  # noqa: PLR0913 - one parameter an option
    recipe: str,
    settings: tuple[str, ...],
    resume: bool,
    resume_anyway: bool,
    overwrite: bool,
    dry_run: bool,
    gpu: str | None,
    quiet: bool,
) -> None:
    """Train as RECIPE (a file or a shipped recipe's name) says, merge, prove and evaluate.

    Exit codes: 0 done, 2 recipe, 3 data, 4 model, 5 run directory, 6 device, 7 memory,
    8 training stopped, 9 proof failed, 130 interrupted (state saved).
    """
    from lowvram.errors import DeviceError
    from lowvram.inputs import check_card, check_inputs, check_start
    from lowvram.recipe import dump_recipe, load_recipe, parse_set

    loaded = load_recipe(recipe, dict(parse_set(setting) for setting in settings))
    if gpu is not None and not dry_run:
        raise DeviceError("--gpu: a run takes the card that is here; add --dry-run to plan for one")
    if dry_run:
        check_card(gpu, None)
        check_inputs(loaded)
        _echo(dump_recipe(loaded), nl=False)
    else:
        check_start(loaded, resume=resume or resume_anyway, overwrite=overwrite)
    from lowvram.display import Display
    from lowvram.plan import plan
    from lowvram.run import announce
    from lowvram.run import run as run_recipe

    display = Display(quiet=quiet and not dry_run)
    if dry_run:
        _echo("")
        from lowvram.target import named_card

        announce(plan(loaded, elsewhere=named_card(gpu, None)), display)
        return
    result = run_recipe(
        loaded, resume=resume, resume_anyway=resume_anyway, overwrite=overwrite, display=display
    )
    merged = Path(result.output_dir) / "merged"
    _echo(f"next: lowvram generate {_shell(merged)} --interactive")


@main.command()
@click.argument("recipe")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Override a key.")
@click.option("--gpu", help="A card by name, such as rtx-4070-ti; it need not be here.")
@click.option("--vram", help="Memory for the allocator, such as 12GiB, of a card with no name.")
@click.option("--system", type=_SYSTEMS, default="headless", show_default=True,
              help="What else is on the card of --gpu.")  # fmt: skip
@click.option("--seq-len", type=click.IntRange(2), help="Ask for one shape: tokens in a row.")
@click.option("--micro-batch-size", type=click.IntRange(1), help="Ask for one shape: rows.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path),
              help="Draw the frontier, or the shape's timeline, as .png or .html.")  # fmt: skip
@click.option("--save-recipe", type=click.Path(dir_okay=False, path_type=Path),
              help="Write the recipe with the recommended shape pinned.")  # fmt: skip
@_reports_errors
def probe(  # noqa: PLR0913 - one parameter an option
    recipe: str,
    settings: tuple[str, ...],
    gpu: str | None,
    vram: str | None,
    system: Any,
    seq_len: int | None,
    micro_batch_size: int | None,
    as_json: bool,
    plot: Path | None,
    save_recipe: Path | None,
) -> None:
    """The largest micro-batch of RECIPE that fits a card, for each sequence length.

    Real training steps are simulated, so no card and no weights are needed. On the card itself the
    recommended shape is then tried, in a process of its own.
    """
    from lowvram.inputs import check_card, check_model, check_picture
    from lowvram.recipe import load_recipe, parse_set

    loaded = load_recipe(recipe, dict(parse_set(setting) for setting in settings))
    check_card(gpu, vram)
    check_model(loaded.model.name)
    if plot is not None:
        check_picture(plot)
    one_shape = seq_len is not None or micro_batch_size is not None
    if one_shape and save_recipe is not None:
        raise RecipeError("--save-recipe: saves what the whole probe recommends; leave out a shape")
    from lowvram.probe_report import choose_target, show_frontier, show_shape

    target = choose_target(gpu, vram, system)
    if one_shape:
        show_shape(
            loaded,
            target,
            seq_len=seq_len,
            micro_batch_size=micro_batch_size,
            as_json=as_json,
            plot=plot,
        )
    else:
        show_frontier(loaded, target, as_json=as_json, plot=plot, save=save_recipe)


@main.group()
def recipes() -> None:
    """The recipes that ship with lowvram."""


@recipes.command("list")
@_reports_errors
def list_() -> None:
    """Names and what they are for."""
    from lowvram.recipe import list_recipes

    found = list_recipes()
    width = max(len(name) for name, _ in found)
    for name, description in found:
        _echo(f"{name:<{width}}  {description}")


@recipes.command()
@click.argument("name")
@_reports_errors
def show(name: str) -> None:
    """Print a recipe."""
    from lowvram.recipe import recipe_text

    _echo(recipe_text(name), nl=False)


@recipes.command()
@click.argument("name")
@click.argument("target", required=False, type=click.Path(path_type=Path))
@_reports_errors
def copy(name: str, target: Path | None) -> None:
    """Copy a recipe to TARGET (default: NAME.yaml here), to make it yours."""
    from lowvram.recipe import recipe_text

    text = recipe_text(name)
    path = target or Path(f"{name}.yaml")
    if path.is_dir():
        path = path / f"{name}.yaml"
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise RecipeError(f"{path}: is there already; name another file") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be written: {error.strerror}") from error
    _echo(f"next: lowvram run {_shell(path)}")


@main.command()
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option("--output", required=True, type=click.Path(path_type=Path), help="New directory.")
@click.option("--base", help="Where the base is now, if not where it was.")
@click.option("--dtype", type=_DTYPES, default="fp32", show_default=True, help="Of the file.")
@_reports_errors
def merge(adapter: Path, output: Path, base: str | None, dtype: str) -> None:
    """Merge ADAPTER (a peft directory, or a run) into a plain checkpoint, and prove it equal."""
    from lowvram.merge import find_adapter
    from lowvram.merge import merge as merge_adapter

    proof = merge_adapter(find_adapter(adapter), output, base=base, dtype=dtype)
    _echo(
        f"{output}: largest logit difference {proof.max_logit_difference:.2g} "
        f"(allowed {proof.tolerance:.2g}), as read back {proof.read_back_difference:.2g}"
    )
    _echo(f"next: lowvram generate {_shell(output)} --interactive")


@main.command()
@click.argument("model")
@click.option("--data", "files", required=True, multiple=True, help="File to score; repeatable.")
@click.option("--stride", type=int, help="Tokens between windows; default: half the context.")
@click.option("--context", type=int, help="Tokens in a window; default: the model's, up to 1024.")
@click.option("--format", "format_", type=_FORMATS, default="document", show_default=True,
              help="What a document of a text file is.")  # fmt: skip
@click.option("--text-column", default="text", show_default=True, help="Of csv, json, parquet.")
@click.option("--encoding", default="utf-8", show_default=True, help="Of text files.")
@click.option("--base", help="Base of an adapter, if not where it was.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@_reports_errors
def evaluate(  # noqa: PLR0913 - one parameter an option
    model: str,
    files: tuple[str, ...],
    stride: int | None,
    context: int | None,
    format_: str,
    text_column: str,
    encoding: str,
    base: str | None,
    as_json: bool,
) -> None:
    """Perplexity of MODEL (a directory, adapter, run or hub id) on a text.

    A text file is one document unless --format says otherwise; each row of a table is one. Of a
    document of N tokens, N - 1 are scored.
    """
    from lowvram.data import Source
    from lowvram.inputs import check_data, check_model

    source = Source(names=files, format=format_, text_column=text_column, encoding=encoding)
    check_model(model)
    check_data(files, encoding)
    from lowvram.inference import evaluate_files

    result = evaluate_files(
        model,
        source,
        stride=stride,
        context=context,
        base=base,
        show_progress=not as_json and sys.stderr.isatty(),
    )
    values = result.to_json()
    if as_json:
        _echo(json.dumps(values))
        return
    for name, value in values.items():
        _echo(f"{name:<16} {value}")


@main.command()
@click.argument("model")
@click.option("--prompt", "prompts", multiple=True, help="Text to continue; repeatable.")
@click.option("--file", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="A prompt a line.")  # fmt: skip
@click.option("--interactive", is_flag=True, help="Ask for prompts until the end of input.")
@click.option("--max-new-tokens", type=click.IntRange(1), help="Default: 64.")
@click.option("--temperature", type=click.FloatRange(0),
              help="0 is greedy; default: 0.8, with beams 0.")  # fmt: skip
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=0.95,
              show_default=True)  # fmt: skip
@click.option("--top-k", type=click.IntRange(1))
@click.option("--beams", "num_beams", type=click.IntRange(1), default=1, show_default=True)
@click.option("--length-penalty", type=float, default=1.0, show_default=True, help="With beams.")
@click.option("--no-repeat-ngram", "no_repeat_ngram_size", type=click.IntRange(0), default=0)
@click.option("--repetition-penalty", type=click.FloatRange(0, min_open=True), default=1.0)
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True)
@click.option("--base", help="Base of an adapter, if not where it was.")
@click.option("--json", "as_json", is_flag=True, help="A JSON object a line, per prompt.")
@_reports_errors
def generate(
    model: str,
    prompts: tuple[str, ...],
    file: Path | None,
    interactive: bool,
    base: str | None,
    as_json: bool,
    temperature: float | None,
    **sampling: Any,
) -> None:
    """Continue prompts with MODEL; prints each prompt with its continuation."""

    try:
        texts = [*prompts, *(_prompt_lines(file) if file else [])]
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"--file {file}: cannot be read as UTF-8 text: {error}") from error
    _check_texts(texts)
    if interactive == bool(texts):
        raise RecipeError("generate: give --prompt (or --file), or --interactive, and not both")
    from lowvram.inputs import check_model

    check_model(model)
    from lowvram.inference import Writer

    if temperature is None:
        temperature = 0.8 if sampling["num_beams"] == 1 else 0.0
    writer = Writer(model, base=base, sampling={"temperature": temperature, **sampling})
    if interactive:
        _converse(writer)
    elif as_json:
        for record in writer.records(texts):
            _echo(json.dumps(record, ensure_ascii=False))
    elif len(texts) == 1:
        _stream(writer, texts[0])
    else:
        for record in writer.records(texts):
            _echo(f"{record['prompt']}{record['text']}\n")
            _say_notes(record["notes"])


def _check_texts(texts: Sequence[str]) -> None:
    if any("\ud800" <= character <= "\udfff" for text in texts for character in text):
        raise RecipeError("--prompt: holds bytes that are no text in this terminal's encoding")


def _prompt_lines(file: Path) -> list[str]:
    """A prompt a line, as text files of data are read: blank lines are none."""
    text = file.read_text(encoding="utf-8-sig")  # universal newlines
    return [line for line in text.split("\n") if line.strip()]


def _stream(writer: Any, prompt: str) -> None:
    notes: Sequence[str] = ()

    def pieces() -> Iterator[str]:
        nonlocal notes
        continuation = yield from writer.stream(prompt)
        notes = continuation.notes

    texts = pieces()
    first = next(texts, "")  # an error comes before the prompt is echoed
    _echo(prompt + first, nl=False)
    for text in texts:
        _echo(text, nl=False)
        sys.stdout.flush()
    _echo("")
    _say_notes(notes)


def _say_notes(notes: Sequence[str]) -> None:
    for note in notes:
        _echo(f"note: {note}", err=True)


def _converse(writer: Any) -> None:
    """A prompt a line, from a terminal or a pipe, until it ends."""
    terminal = sys.stdin.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # bytes that are no text end no conversation
    while True:
        if terminal:
            _echo("> ", nl=False)
            sys.stdout.flush()
        line = sys.stdin.readline()
        if not line:
            return
        _stream(writer, line.rstrip("\r\n"))


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@_reports_errors
def doctor(as_json: bool) -> None:
    """Can this machine train on its card? Exit code 1 if not."""
    from lowvram.doctor import examine

    diagnosis = examine()
    if as_json:
        _echo(json.dumps(diagnosis.to_dict(), indent=2))
    else:
        for check in diagnosis.checks:
            _echo(f"{check.status:<5} {check.name}: {check.found}")
            if check.advice:
                _echo(f"      {check.advice}")
    sys.exit(diagnosis.exit_code)


def _shell(path: Path) -> str:
    import shlex

    return shlex.quote(str(path))
