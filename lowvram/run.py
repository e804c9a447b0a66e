"""The story of a run: plan, train, save, merge, prove, evaluate, generate, report."""

from __future__ import annotations

import time

from rich.table import Table

from lowvram.checkpoint import newest_facts
from lowvram.directory import RunDirectory
from lowvram.disk import disk_error, write_json
from lowvram.display import Display, literal
from lowvram.errors import DeviceError, DoesNotFit, Interrupted
from lowvram.finish import finish
from lowvram.interrupts import Interrupts, interrupts
from lowvram.job import start
from lowvram.memory.measure import format_gib, is_device_failure, is_out_of_memory
from lowvram.needs import needs_of
from lowvram.plan import Plan, plan
from lowvram.recipe import Recipe, with_overrides
from lowvram.report import RunResult, result_table
from lowvram.training import take_steps


def run(
    recipe: Recipe,
    *,
    resume: bool = False,
    resume_anyway: bool = False,
    overwrite: bool = False,
    display: Display | None = None,
) -> RunResult:
    """Fine-tune as `recipe` says; everything it makes is in `recipe.output_dir`.

    Ctrl-C, SIGTERM and SIGHUP save after the step under way and raise Interrupted; a second one
    stops at once. `resume` goes on from the newest checkpoint that is whole; with `resume_anyway`
    also where base, data or recipe have changed since, which is recorded.
    """
    display, resume = display or Display(), resume or resume_anyway
    directory = RunDirectory(recipe.output_dir)
    inputs = (recipe.model.name, recipe.data.source, recipe.data.validation_source)
    names = _names(*inputs)
    directory.check(resume=resume, overwrite=overwrite, inputs=names)
    try:
        with interrupts() as taken, directory.held():
            directory.check(resume=resume, overwrite=overwrite, inputs=names)
            options = {"resume": resume, "anyway": resume_anyway}
            return _run(recipe, directory, display, taken, **options)
    except KeyboardInterrupt:
        raise Interrupted(_stopped_at_once(directory)) from None
    except BrokenPipeError:
        raise  # of the output: nobody reads on
    except OSError as error:
        if error.filename is None:  # what is printed cannot be; files have names
            raise disk_error("the output", error) from error
        raise disk_error(str(error.filename), error, failed="used") from error
    except (RuntimeError, MemoryError) as error:
        # In training both are met where they occur; this is before and after it.
        if is_out_of_memory(error):
            raise DoesNotFit(
                f"out of memory outside of training: {str(error) or 'of the host'}. "
                f"{_stopped_at_once(directory)}"
            ) from error
        if is_device_failure(error):
            raise DeviceError(f"the card failed: {error}. {_stopped_at_once(directory)}") from error
        raise


def _run(
    recipe: Recipe,
    directory: RunDirectory,
    display: Display,
    taken: Interrupts,
    *,
    resume: bool,
    anyway: bool,
) -> RunResult:
    started = time.monotonic()
    if resume and not anyway:
        recipe = _in_its_formats(recipe, directory)
    with display.progress("tokenising") as update:
        planned = plan(recipe, lambda done, total: update(done, total, "bytes"))
    announce(planned, display)
    begun = resume and directory.start.exists()
    job = start(planned, directory, display, taken, resume=begun, anyway=anyway)
    take_steps(job, display)
    taken.check()
    result = finish(job, display, started=started)
    write_json(directory.result, result.to_json())
    display.show(result_table(result))
    return result


def _in_its_formats(recipe: Recipe, directory: RunDirectory) -> Recipe:
    """What auto stood for on the machine where the run began, it stands for on this one too."""
    facts = newest_facts(directory.checkpoints)
    if facts is None:
        return recipe
    changes = {
        key: facts["fingerprint"].get(key)
        for key, value in (
            ("train.precision", recipe.train.precision),
            ("model.dtype", recipe.model.dtype),
        )
        if value == "auto" and key in facts["fingerprint"]
    }
    return with_overrides(recipe, changes) if changes else recipe


def _stopped_at_once(directory: RunDirectory) -> str:
    if not directory.start.exists():
        return f"Nothing was begun in {directory.path}; the same command begins anew"
    return (
        f"Stopped; {directory.checkpoints} has the last state that was saved, and the same command "
        "with --resume goes on from it"
    )


def _names(*values: str | tuple[str, ...] | None) -> list[str]:
    """All names in them, one or several each."""
    return [
        name for value in values for name in ((value,) if isinstance(value, str) else value or ())
    ]


def _host_row(planned: Plan) -> tuple[str, str]:
    needs = needs_of(planned)
    pinned = f" ({format_gib(needs.pinned_bytes)} pinned)" * (needs.pinned_bytes > 0)
    return (
        "host",
        f"up to {format_gib(needs.memory_bytes)} of memory{pinned}, "
        f"{format_gib(needs.disk_bytes)} of disk",
    )


def announce(planned: Plan, display: Display) -> None:
    if not display.quiet:
        table = Table.grid(padding=(0, 2))
        table.add_column(justify="right", style="bold")
        for name, value in (*planned.describe(), _host_row(planned)):
            table.add_row(name, literal(value))
        display.show(table)
    for note in planned.notes:
        display.warn(note)
