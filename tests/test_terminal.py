"""What comes from data, files and recipes reaches no terminal raw: one test for each way out."""

from __future__ import annotations

import io
import json
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result
from rich.console import Console
from ruamel.yaml import YAML

from lowvram import cli, inference, probe_report
from lowvram.cli import main
from lowvram.display import Display, literal
from lowvram.errors import DataError
from lowvram.memory import find_card
from lowvram.memory.plot import plot_frontier
from lowvram.report import RunResult, result_table
from lowvram.run import announce
from lowvram.terminal import odd_characters, printable

# Colour, title of the window, C1's CSI, back to the line's start, a bell, other direction, markup.
EVIL = "\x1b[31mred\x1b]0;title\x07\x9b2J\rover\u202eabc\u2066[blue]x[/] [link=http://x]y[/] :fire:"
SHOWN = "\\u001b[31mred\\u001b]0;title\\u0007\\u009b2J\\u000dover\\u202eabc\\u2066[blue]x[/] [link=http://x]y[/] :fire:"  # noqa: E501


def is_safe(text: str) -> bool:
    """Told by the Unicode database, not by our own list."""
    return not any(
        (unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") and c not in "\n\t")
        or unicodedata.bidirectional(c) in {"LRE", "RLE", "LRO", "RLO", "PDF"}
        or unicodedata.bidirectional(c) in {"LRI", "RLI", "FSI", "PDI"}
        for c in text
    )


def invoke(*arguments: Any, **options: Any) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], **options)


def on_display(show: Callable[[Display], None]) -> str:
    """What a colour terminal would get, without the sequences of rich's own styles."""
    file = io.StringIO()
    show(Display(Console(file=file, force_terminal=True, width=400, highlight=False)))
    return re.sub(r"\x1b\[[0-9;]*m", "", file.getvalue())


# --- the rule ---------------------------------------------------------------------------------


def test_every_character_is_as_it_is_or_spelled_out() -> None:
    for code in range(0x110000):
        character = chr(code)
        if is_safe(character) and code not in (0x61C, 0x200E, 0x200F):
            assert printable(character) == character
        else:
            assert printable(character) == f"\\u{code:04x}"
    assert (
        printable("caf\u00e9 \U0001f468\u200d\U0001f469 \u00a0\n\t")
        == "caf\u00e9 \U0001f468\u200d\U0001f469 \u00a0\n\t"
    )
    assert printable(EVIL) == SHOWN


@pytest.mark.parametrize("place", range(1, len(EVIL)))
def test_pieces_are_as_safe_as_the_whole(place: int) -> None:
    assert printable(EVIL[:place]) + printable(EVIL[place:]) == SHOWN


def test_json_and_yaml_still_say_the_same() -> None:
    assert json.loads(printable(json.dumps(EVIL, ensure_ascii=False))) == EVIL
    assert (
        YAML(typ="safe").load('"' + printable("\x85\u202e\x9b\x1b") + '"') == "\x85\u202e\x9b\x1b"
    )


def test_characters_have_names() -> None:
    assert odd_characters("plain") == ""
    assert odd_characters("\u0430\u0430\x85") == "U+0430 CYRILLIC SMALL LETTER A, U+0085"


# --- the command ------------------------------------------------------------------------------


def test_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise DataError(f"{EVIL}: cannot be read")

    monkeypatch.setattr("lowvram.recipe.list_recipes", fail)

    assert invoke("recipes", "list").stderr == f"error: {SHOWN}: cannot be read\n"


def test_names_of_files_and_recipes_in_errors(tmp_path: Path) -> None:
    path = tmp_path / "\x1b[31m\udcff.yaml"  # a byte that is no text
    for content in ("model: {name: gpt2}\n", "a: [", '"\\e[31m\\u202e": 1\nmodel: "\\x9b"'):
        path.write_text(content, encoding="utf-8")
        result = invoke("run", path)
        assert result.exit_code == 2
        assert is_safe(result.output)
        assert "\\u001b[31m\\udcff.yaml" in result.output
    assert is_safe(invoke("run", f"{tmp_path}/{EVIL}/x.yaml").output)


@pytest.mark.parametrize(
    "arguments",
    [
        [EVIL],
        ["run", f"--{EVIL}"],
        ["generate", "x", "--file", EVIL],
        ["generate", "x", "--seed", EVIL],
        [f"--{EVIL}"],
    ],
)
def test_wrong_usage(arguments: list[str]) -> None:
    result = invoke(*arguments)

    assert result.exit_code == 2
    assert result.stderr.startswith("Usage: ")
    assert is_safe(result.output)
    assert "x1b[31mred" in result.output  # click spells it as Python does


def test_columns_of_a_table(gpt2_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text(f'"{EVIL}",b\n1,2\n', encoding="utf-8", newline="")

    result = invoke("evaluate", gpt2_dir, "--data", path)

    assert result.exit_code == 3
    assert is_safe(result.output)
    assert "[31mred" in result.stderr


def test_a_dry_run_shows_a_recipe_that_is_still_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gpt2_dir: Path, text_file: Path
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise DataError("far enough")

    monkeypatch.setattr(sys.modules["lowvram.plan"], "plan", stop)
    recipe = {"model.name": gpt2_dir, "data.source": text_file}
    settings = [f"--set={key}={value}" for key, value in recipe.items()]
    prompt = EVIL + "\u2028 \x85"

    result = invoke(
        "run", "gpt2-lora", "--dry-run", *settings, f"--set=generate.prompts={json.dumps([prompt])}"
    )

    assert is_safe(result.stdout)
    assert YAML(typ="safe").load(result.stdout)["generate"]["prompts"] == [prompt]


class Evil:
    """A writer whose model says the worst, in pieces of one character."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def records(self, prompts: Any) -> Iterator[dict[str, Any]]:
        for prompt in prompts:
            yield {"prompt": prompt, "text": EVIL, "notes": [EVIL]}

    def stream(self, prompt: str) -> Iterator[str]:
        yield from EVIL
        return SimpleNamespace(notes=[EVIL])


@pytest.fixture
def evil(monkeypatch: pytest.MonkeyPatch, gpt2_dir: Path) -> Path:
    monkeypatch.setattr(inference, "Writer", Evil)
    return gpt2_dir


def test_a_stream_with_its_prompt_and_notes(evil: Path) -> None:
    result = invoke("generate", evil, "--prompt", EVIL)

    assert result.stdout == f"{SHOWN}{SHOWN}\n"
    assert result.stderr == f"note: {SHOWN}\n"


def test_several_prompts(evil: Path) -> None:
    result = invoke("generate", evil, "--prompt", EVIL, "--prompt", "b")

    assert result.stdout == f"{SHOWN}{SHOWN}\n\nb{SHOWN}\n\n"
    assert result.stderr == f"note: {SHOWN}\n" * 2


def test_a_conversation(evil: Path) -> None:
    assert invoke("generate", evil, "--interactive", input="\x1b[2Jhi\n").stdout == (
        f"\\u001b[2Jhi{SHOWN}\n"
    )


def test_json_is_exact_and_safe(evil: Path) -> None:
    result = invoke("generate", evil, "--prompt", EVIL, "--json")

    assert is_safe(result.stdout)
    assert json.loads(result.stdout) == {"prompt": EVIL, "text": EVIL, "notes": [EVIL]}


def test_evaluate(monkeypatch: pytest.MonkeyPatch, gpt2_dir: Path, text_file: Path) -> None:
    found = SimpleNamespace(to_json=lambda: {"precision": EVIL})
    monkeypatch.setattr(inference, "evaluate_files", lambda *_, **__: found)

    assert invoke("evaluate", gpt2_dir, "--data", text_file).stdout == f"precision        {SHOWN}\n"


def test_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    check = SimpleNamespace(status="fail", name="driver", found=EVIL, advice=EVIL)
    diagnosis = SimpleNamespace(checks=[check], exit_code=1)
    monkeypatch.setattr("lowvram.doctor.examine", lambda: diagnosis)

    assert invoke("doctor").stdout == f"fail  driver: {SHOWN}\n      {SHOWN}\n"


def test_the_next_command(tmp_path: Path) -> None:
    result = invoke("recipes", "copy", "quickstart", tmp_path / "\x1b[31m.yaml")

    assert result.stdout == f"next: lowvram run '{tmp_path}/\\u001b[31m.yaml'\n"


# --- what rich prints -------------------------------------------------------------------------


def test_lines_and_notes() -> None:
    assert on_display(lambda display: display.say(EVIL)) == f"{SHOWN}\n"
    assert on_display(lambda display: display.warn(EVIL)) == f"note: {SHOWN}\n"


def test_progress_in_a_terminal() -> None:
    def show(display: Display) -> None:
        with display.progress(EVIL) as update:
            update(1, 2, EVIL)

    said = on_display(show)
    assert said.count(SHOWN) >= 2
    for steering in "\x07\x9b\u202e\u2066":
        assert steering not in said
    assert "\x1b]0" not in said  # what moves the cursor is rich's own


def test_progress_as_lines() -> None:
    file = io.StringIO()
    with Display(Console(file=file, width=400)).progress(EVIL) as update:
        update(1, 1, EVIL)

    assert file.getvalue() == f"{SHOWN} 1/1  {SHOWN}\n"


def test_the_plan_and_its_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    planned: Any = SimpleNamespace(describe=lambda: [("data", EVIL)], notes=[EVIL])
    monkeypatch.setattr(import_module("lowvram.run"), "_host_row", lambda planned: ("host", ""))

    said = on_display(lambda display: announce(planned, display))

    assert said.split() == f"data {SHOWN} host note: {SHOWN}".split()


def test_the_table_of_a_result() -> None:
    result = RunResult(
        output_dir=EVIL,
        perplexity={"base": None, "adapter": None, "merged": None},
        evaluation={},
        merge={"max_logit_difference": 0.0, "tolerance": 1.0},
        tokens_per_second=None,
        memory={"measured_peak_bytes": None, "predicted_peak_bytes": None},
        data={},
        steps=1,
        optimizer_steps=1,
        tokens=1,
        trainable_parameters=1,
        fit={},
        numerics={},
        samples=[{"prompt": EVIL, "base": EVIL, "tuned": EVIL}],
        recipe_sha256="",
        seconds=1.0,
    )

    said = on_display(lambda display: display.show(result_table(result)))

    assert is_safe(said)
    assert said.count(SHOWN) == 4


def test_the_tables_of_a_probe() -> None:
    card = replace(find_card("rtx-4070-ti"), name=EVIL)
    lever = SimpleNamespace(saved_bytes=1, change=EVIL, price=EVIL)
    prediction = SimpleNamespace(categories={EVIL: 1})
    frontier: Any = SimpleNamespace(card=card, rows=[])
    answer: Any = SimpleNamespace(prediction=prediction, levers=[lever])
    tables = [probe_report.frontier_table(frontier), *probe_report.answer_tables(answer)]

    said = on_display(lambda display: [display.show(table) for table in tables] and None)

    assert is_safe(said)
    assert re.sub(r"\s", "", said).count(re.sub(r"\s", "", SHOWN)) == 4  # a title is folded


def test_literal_text_is_no_markup() -> None:
    assert literal("[red]a[/] :fire: \\[b]").plain == "[red]a[/] :fire: \\[b]"
    assert not literal("[red]a[/]").spans


# --- pictures ---------------------------------------------------------------------------------


def test_a_page_runs_no_script_of_a_name(tmp_path: Path) -> None:
    name = "</script><script>alert(1)</script><b>&amp;</b><a href='javascript:alert(2)'>x</a>"
    rows = [{"seq_len": 256, "gradient_checkpointing": False, "micro_batch_size": 1,
             "predicted_reserved_bytes": 2**30, "headroom_bytes": 2**30}]  # fmt: skip

    plot_frontier(rows, tmp_path / "x.html", card=name)

    page = (tmp_path / "x.html").read_text(encoding="utf-8")
    assert "alert(1)" in page  # it is shown, as text
    assert "<script>alert(1)" not in page
    [told] = re.findall(r'"text":("predicted for [^"]*")', page)
    assert "<b>" not in json.loads(told)
    assert "<a " not in json.loads(told)
    assert "&lt;b&gt;&amp;amp;&lt;/b&gt;" in json.loads(told)


# --- everything else --------------------------------------------------------------------------


def test_nothing_prints_past_this() -> None:
    """click's and Python's own printing has one home each, and rich's markup none."""
    package = Path(cli.__file__).parent
    found = {
        (path.name, match[0])
        for path in package.rglob("*.py")
        for match in re.finditer(
            r"\bclick\.echo\(|(?<![\w.])print\(|rich\.markup", path.read_text("utf-8")
        )
        if path.name != "__init__.py"  # of the package: an example in its docstring
    }
    assert found == {("cli.py", "click.echo("), ("probe_report.py", "print(")}
    printed = re.findall(
        r"(?<![\w.])print\((.*)\)", (package / "probe_report.py").read_text("utf-8")
    )
    assert all(re.fullmatch(r"json\.dumps\(\w+\.to_json\(\)\)", words) for words in printed)
    assert (package / "cli.py").read_text("utf-8").count("click.echo(") == 1
