"""The command line: what it prints, its exit codes, and that no user ever sees a traceback."""

from __future__ import annotations

import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.shell_completion import ShellComplete
from click.testing import CliRunner, Result
from conftest import make_gpt2, make_tokenizer, save
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoTokenizer, GPT2LMHeadModel

from lowvram import __version__, errors
from lowvram.cli import main
from lowvram.display import Display
from lowvram.errors import LowVRAMError
from lowvram.recipe import Recipe, list_recipes, load_recipe, recipe_text
from lowvram.run import run
from lowvram.terminal import printable

HEAVY = ("torch", "transformers", "peft", "datasets", "bitsandbytes")
TEXT = "The quick brown fox jumps over the lazy dog. Words repeat, and numbers: 1, 2, 3.\n" * 6


def invoke(*arguments: Any, code: int = 0, **options: Any) -> Result:
    """Run the command in this process; it must end in an exit code, whatever happens."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments], **options)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception  # a traceback for the user
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


def error_of(*arguments: Any, code: int) -> str:
    """The message on standard error of a command that fails."""
    result = invoke(*arguments, code=code)
    *_, last = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    return last.removeprefix("error: ")


@pytest.fixture
def recipe_file(gpt2_dir: Path, text_file: Path, tmp_path: Path) -> Path:
    """A recipe of a run of a second."""
    path = tmp_path / "small.yaml"
    path.write_text(
        f"model: {{name: {gpt2_dir}}}\n"
        f"data: {{source: {text_file}}}\n"
        "train: {global_batch_size: 4, max_steps: 2, learning_rate: 1e-2}\n"
        "generate: {max_new_tokens: 4}\n"
        f"output_dir: {tmp_path / 'run'}\n"
    )
    return path


@pytest.fixture(scope="session")
def finished(gpt2_dir: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run."""
    directory = tmp_path_factory.mktemp("finished")
    settings = {
        "model.name": str(gpt2_dir),
        "data.source": str(text_file),
        "train.global_batch_size": 4,
        "train.max_steps": 3,
        "train.learning_rate": 3e-2,
        "generate.max_new_tokens": 4,
        "output_dir": str(directory / "run"),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOWVRAM_CACHE", str(directory / "cache"))
        run(load_recipe("gpt2-lora", settings), display=Display(Console(file=io.StringIO())))
    return directory / "run"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


# Processes

# What main() does, then which heavy packages it has loaded.
LIGHT = f"""
import atexit, sys
sys.argv[0] = "lowvram"
heavy = {{*{HEAVY!r}}}
atexit.register(lambda: print("loaded:", *sorted(heavy & set(sys.modules)), file=sys.stderr))
from lowvram.cli import main
main()
"""


def process(*arguments: Any, **options: Any) -> tuple[subprocess.CompletedProcess[str], float]:
    """The command in a process of its own, and its processor seconds."""
    before = os.times()
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, *map(str, arguments)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        **options,
    )
    after = os.times()
    user, system = after.children_user, after.children_system
    return done, user + system - before.children_user - before.children_system


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["run", "--help"], ["generate", "-h"], ["--version"], ["recipes", "list"]],
    ids=" ".join,
)
def test_help_is_quick_and_light(arguments: list[str]) -> None:
    """Half a second of a processor, the best of three where others use it too."""
    runs = [process(*arguments)]
    while runs[-1][1] >= 0.5 and len(runs) < 3:
        runs.append(process(*arguments))

    done, seconds = runs[-1]
    assert done.returncode == 0
    assert done.stderr.split() == ["loaded:"]
    assert done.stdout
    assert seconds < 0.5


def test_a_bad_recipe_fails_quickly_and_lightly(tmp_path: Path) -> None:
    """Exit code 2 before anything heavy is loaded, in a second of a processor at most."""
    path = tmp_path / "bad.yaml"
    path.write_text("model:\n  name: gpt2\n  dtpye: bf16\ndata: {source: x}\ntrain: {epochs: no}\n")

    done, seconds = process("run", path)

    assert done.returncode == 2
    assert done.stdout == ""
    message, loaded = done.stderr.rsplit("loaded:", 1)
    assert loaded.strip() == ""
    assert f"{path}:3: model.dtpye: unknown key" in message
    assert "Did you mean model.dtype?" in message
    assert f"{path}:5: train.epochs: " in message
    assert "Traceback" not in message
    assert seconds < 1


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["run", "nonesuch"], 2, "nonesuch: no recipe of that name"),
        (["run", "{bad_yaml}"], 2, "{bad_yaml}:2: not valid YAML"),
        (["run", "quickstart", "--set", "model.name=/none"], 4, "'/none' is no directory"),
        (["run", "quickstart", "--set", "data.source=/none.txt"], 3, "'/none.txt': no such file"),
        (["run", "quickstart", "--set", "output_dir={bad_yaml}"], 5, "is a file"),
        (["run", "quickstart", "--dry-run", "--gpu", "rtx-0"], 6, "unknown card 'rtx-0'"),
        (["probe", "quickstart", "--gpu", "rtx-0"], 6, "unknown card 'rtx-0'"),
        (["probe", "quickstart", "--vram", "12Foo"], 2, "--vram: found '12Foo'"),
        (["probe", "quickstart", "--plot", "x.foo"], 2, "x.foo: found .foo, allowed .png"),
        (["probe", "quickstart", "--set", "model.name=/none"], 4, "'/none' is no directory"),
        (["evaluate", "/none", "--data", "{bad_yaml}"], 4, "'/none' is no directory"),
        (["evaluate", "gpt2", "--data", "/none.txt"], 3, "'/none.txt': no such file"),
        (["evaluate", "gpt2", "--data", "{bad_yaml}", "--encoding", "x"], 3, "encoding is 'x'"),
        (["generate", "/none", "--prompt", "x"], 4, "'/none' is no directory"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_can_be_refused_at_once_is(
    arguments: list[str], code: int, message: str, tmp_path: Path
) -> None:
    """Nothing heavy is loaded first; how long that takes is what benchmarks/startup.py says."""
    bad_yaml = tmp_path / "bad.yaml"
    bad_yaml.write_text("model: {name: gpt2\n")
    arguments = [argument.format(bad_yaml=bad_yaml) for argument in arguments]

    done, _ = process(*arguments, cwd=tmp_path)

    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    error, loaded = done.stderr.rsplit("loaded:", 1)
    assert message.format(bad_yaml=bad_yaml) in error
    assert loaded.strip() == ""


def test_light_checks_say_what_the_command_itself_would_say(tmp_path: Path) -> None:
    """The same words from the functions that the commands end in, where two of ours tell them."""
    from lowvram.inputs import check_card, check_picture
    from lowvram.memory.canvas import open_canvas
    from lowvram.model import locate
    from lowvram.names import local_directory
    from lowvram.target import named_card

    for name in ("/none", "embedded:none", "a b"):
        with pytest.raises(LowVRAMError) as expected:
            locate(name)
        with pytest.raises(type(expected.value), match=f"^{re.escape(str(expected.value))}$"):
            local_directory(name)
    for gpu, vram in (("rtx-0", None), (None, "12Foo"), (None, "-1")):
        with pytest.raises(LowVRAMError) as expected:
            named_card(gpu, vram)
        with pytest.raises(type(expected.value), match=f"^{re.escape(str(expected.value))}$"):
            check_card(gpu, vram)
    for picture in (Path("x.foo"), Path("x")):
        with pytest.raises(LowVRAMError) as expected:
            open_canvas(picture, [1.0])
        with pytest.raises(type(expected.value), match=f"^{re.escape(str(expected.value))}$"):
            check_picture(picture)
    assert local_directory("embedded:gpt2-docstrings") == locate("embedded:gpt2-docstrings")
    assert local_directory(str(tmp_path)) == tmp_path
    assert local_directory("organisation/name") is None
    check_card("rtx-4070-ti", None)
    check_card(None, "12GiB")
    check_picture(Path("a.PNG"))


def test_a_run_in_a_process_of_its_own(recipe_file: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lowvram", "run", str(recipe_file), "--quiet"],
        capture_output=True,
        text=True,
        encoding="utf-8",
        cwd=tmp_path,
    )

    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "perplexity, merged" in done.stdout
    merged = tmp_path / "run" / "merged"
    assert done.stdout.splitlines()[-1] == f"next: lowvram generate {merged} --interactive"
    assert (merged / "model.safetensors").is_file()


def test_a_conversation_through_a_pipe(finished: Path) -> None:
    prompts = ["The quick", "", "Words repeat"]
    arguments = ["generate", finished, "--interactive", "--max-new-tokens", 6, "--temperature", 0]

    done, _ = process(*arguments, input="\n".join(prompts))

    assert done.returncode == 0, done.stderr
    expected = "".join(prompt + greedy(finished / "merged", prompt, 6) + "\n" for prompt in prompts)
    assert done.stdout == printable(expected)
    assert done.stderr.split()[0] == "loaded:"


def test_a_reader_that_has_gone_ends_it_quietly() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "lowvram", "recipes", "show", "quickstart"],
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
            env={key: os.environ[key] for key in os.environ if key != "PYTHONUNBUFFERED"},
        )
    finally:
        os.close(writing)

    assert done.returncode == 1
    assert done.stderr == ""


def test_shell_completion_in_a_process() -> None:
    source, _ = process(env=os.environ | {"_LOWVRAM_COMPLETE": "bash_source"})
    words = {"_LOWVRAM_COMPLETE": "bash_complete", "COMP_WORDS": "lowvram ge", "COMP_CWORD": "1"}
    done, _ = process(env=os.environ | words)

    assert "complete -o nosort -F _lowvram_completion lowvram" in source.stdout
    assert done.stdout.splitlines() == ["plain,generate"]


# Errors


@pytest.mark.parametrize("kind", [LowVRAMError, *LowVRAMError.__subclasses__()])
def test_each_error_has_its_exit_code(
    kind: type[LowVRAMError], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise kind("what happened\nand what to do")

    monkeypatch.setattr("lowvram.recipe.load_recipe", fail)
    result = invoke("run", "any", code=kind.exit_code)

    assert result.stderr == "error: what happened\nand what to do\n"
    assert result.stdout == ""


def test_exit_codes_differ_and_are_in_the_help() -> None:
    codes = {kind.exit_code for kind in LowVRAMError.__subclasses__()}

    assert len(codes) == len(LowVRAMError.__subclasses__())
    text = invoke("run", "--help").output
    assert codes <= {int(number) for number in re.findall(r"\b\d+\b", text)}


def test_ctrl_c_has_its_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lowvram.recipe.load_recipe", interrupt)

    assert invoke("run", "any", code=130).stderr == "stopped\n"


def test_bugs_are_not_dressed_up_as_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("lowvram.recipe.load_recipe", fail)

    with pytest.raises(ZeroDivisionError):
        invoke("run", "any")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("nonsense", "--set 'nonsense': write KEY=VALUE, such as --set train.learning_rate=1e-3"),
        ("train.lr=1", "--set train.lr: unknown key. Did you mean train.learning_rate?"),
        ("train=1", "--set train: is a section; set one of its keys"),
        ("train.epochs=many", "--set train.epochs: found 'many', allowed: "),
        ("train.epochs=0", "--set train.epochs: found 0, allowed: "),
        ("train.learning_rate=[1", "--set train.learning_rate: "),
        ("=3", "--set '=3': write KEY=VALUE"),
        ("model.name=", "--set model.name: found null, allowed: "),
    ],
)
def test_bad_settings(recipe_file: Path, setting: str, message: str) -> None:
    assert error_of("run", recipe_file, "--set", setting, code=2).startswith(message)


def test_recipes_that_are_not_there(tmp_path: Path) -> None:
    missing = tmp_path / "no.yaml"

    assert error_of("run", missing, code=2) == (
        f"{missing}: no such file. Shipped recipes: lowvram recipes list"
    )
    assert "Did you mean gpt2-lora" in error_of("run", "gtp2-lora", code=2)
    assert "Did you mean gpt2-full" in error_of("recipes", "show", "gpt2-ful", code=2)


def damaged(gpt2_dir: Path, tmp_path: Path, name: str, content: bytes | None) -> Path:
    copy = Path(shutil.copytree(gpt2_dir, tmp_path / "damaged"))
    (copy / name).unlink()
    if content is not None:
        (copy / name).write_bytes(content)
    return copy


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", b"garbage"),
        ("model.safetensors", None),
        ("config.json", b"{bad"),
        ("config.json", b'{"model_type": "gpt2", "n_head": 0}'),
        ("config.json", None),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", None),
    ],
)
@pytest.mark.parametrize("command", ["run", "evaluate", "generate"])
def test_damaged_models(
    command: str,
    name: str,
    content: bytes | None,
    gpt2_dir: Path,
    recipe_file: Path,
    text: Path,
    tmp_path: Path,
) -> None:
    model = damaged(gpt2_dir, tmp_path, name, content)
    arguments = {
        "run": ["run", recipe_file, "--set", f"model.name={model}"],
        "evaluate": ["evaluate", model, "--data", text],
        "generate": ["generate", model, "--prompt", "The"],
    }

    assert error_of(*arguments[command], code=4).startswith("model.name: ")


@pytest.mark.parametrize("command", ["run", "evaluate", "generate"])
def test_missing_models(command: str, recipe_file: Path, text: Path, tmp_path: Path) -> None:
    model = tmp_path / "no" / "such"
    arguments = {
        "run": ["run", recipe_file, "--set", f"model.name={model}"],
        "evaluate": ["evaluate", model, "--data", text],
        "generate": ["generate", model, "--prompt", "The"],
    }

    message = error_of(*arguments[command], code=4)

    assert message.startswith(f"model.name: {str(model)!r} is no directory")


def test_bad_data(recipe_file: Path, gpt2_dir: Path, tmp_path: Path) -> None:
    latin = tmp_path / "latin.txt"
    latin.write_bytes("gut\nschön\n".encode("latin-1"))
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "table.csv").write_text("one,two\n1,2\n")

    for source, words in (
        ("no.txt", "no such file"),
        ("latin.txt", "is not utf-8"),
        ("empty.txt", "is empty"),
        ("table.csv", "column"),
    ):
        path = tmp_path / source
        in_run = error_of("run", recipe_file, "--set", f"data.source={path}", code=3)
        assert words in in_run
        assert source in in_run
        assert words in error_of("evaluate", gpt2_dir, "--data", path, code=3)
    message = error_of("evaluate", gpt2_dir, "--data", latin, code=3)
    assert message.startswith(f"{latin}: line 2, byte 7 is 0xf6: the file is not utf-8")
    invoke("evaluate", gpt2_dir, "--data", latin, "--encoding", "latin-1")


def test_an_output_directory_that_is_a_file(recipe_file: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    message = error_of("run", recipe_file, "--set", f"output_dir={tmp_path / 'file'}", code=5)

    assert message == f"output_dir: {tmp_path / 'file'} is a file; name a directory"


def test_resuming_what_has_not_begun(recipe_file: Path, tmp_path: Path) -> None:
    assert error_of("run", recipe_file, "--resume", code=5) == (
        f"output_dir: no run has been started in {tmp_path / 'run'}; run without --resume"
    )


def test_targets_that_are_not_there(recipe_file: Path) -> None:
    for targets, code in (("[q_proj]", 4), ("[ln_1]", 4), ("[wte]", 2)):
        setting = f"method.target_modules={targets}"
        assert "c_attn" in error_of("run", recipe_file, "--set", setting, "--dry-run", code=code)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["run"],
        ["run", "--nonsense"],
        ["evaluate", "x"],
        ["generate", "x", "--max-new-tokens", "0"],
        ["generate", "x", "--temperature", "-1"],
        ["generate", "x", "--top-p", "0"],
        ["generate", "x", "--file", "/no/such"],
        ["merge", "x"],
        ["merge", "x", "--output", "y", "--dtype", "int8"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    assert "Usage: main" in invoke(*arguments, code=2).output


# run


@pytest.fixture(scope="module")
def empty_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("empty")


def test_a_dry_run_prints_every_key_and_the_plan_and_writes_nothing(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_directory: Path
) -> None:
    monkeypatch.chdir(empty_directory)
    before = sorted(tmp_path.iterdir())

    result = invoke("run", recipe_file, "--set", "train.epochs=2", "--dry-run")

    yaml, plan = re.split(r"^(?= +device )", result.stdout, flags=re.MULTILINE)
    plan = " ".join(plan.split())  # a table, with long lines folded
    (empty_directory / "printed.yaml").write_text(yaml)
    printed = load_recipe(empty_directory / "printed.yaml")
    assert printed == load_recipe(recipe_file, {"train.epochs": 2})
    for section, field in Recipe.model_fields.items():
        for key in getattr(field.annotation, "model_fields", {section: None}):
            assert re.search(rf"^ *{key}:", yaml, re.MULTILINE), key
    (empty_directory / "printed.yaml").unlink()

    assert re.search(r"trainable 2,048 parameters \(5\.5\d%\)", plan)
    assert re.search(r"36 documents to train on, 4 held out; \d+ rows, [\d,]+ tokens", plan)
    assert "steps 2 (10 an epoch)" in plan
    assert "4 rows of up to 64 tokens = 1 x 4" in plan
    assert "on a CPU, up to 2,048 tokens at a time" in plan
    assert "0 tokens dropped" in plan
    assert sorted(p for p in tmp_path.iterdir() if p.name != "cache") == before
    assert list(empty_directory.iterdir()) == []


def test_a_run_is_refused_and_then_overwritten(recipe_file: Path, tmp_path: Path) -> None:
    first = invoke("run", recipe_file)
    assert "training 2/2" in first.stdout
    assert "merge proof" in first.stdout

    assert "holds a finished run" in error_of("run", recipe_file, code=5)
    invoke("run", recipe_file, "--overwrite", "--set", "train.max_steps=1")

    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["steps"] == 1


def test_a_path_with_spaces_is_quoted_in_the_next_command(
    recipe_file: Path, tmp_path: Path
) -> None:
    result = invoke("run", recipe_file, "--quiet", "--set", f"output_dir={tmp_path / 'my run'}")

    last = result.stdout.splitlines()[-1]
    assert last == f"next: lowvram generate '{tmp_path / 'my run' / 'merged'}' --interactive"


# recipes


def test_recipes_are_listed_shown_and_copied(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    names = [name for name, _ in list_recipes()]
    assert set(names) >= {
        "quickstart",
        "gpt2-lora",
        "gpt2-full",
        "gpt2-medium-lora",
        "gpt2-large-int8-lora",
        "gpt2-xl-nf4-lora",
        "e2e-lora",
    }

    listed = invoke("recipes", "list").stdout.splitlines()
    assert [line.split()[0] for line in listed] == names
    assert all(len(line.split()) > 4 for line in listed)
    for name in names:
        assert invoke("recipes", "show", name).stdout == recipe_text(name)

    assert invoke("recipes", "copy", "gpt2-lora").stdout == "next: lowvram run gpt2-lora.yaml\n"
    assert (tmp_path / "gpt2-lora.yaml").read_text() == recipe_text("gpt2-lora")
    (tmp_path / "gpt2-lora.yaml").write_text("mine")
    assert error_of("recipes", "copy", "gpt2-lora", code=2) == (
        "gpt2-lora.yaml: is there already; name another file"
    )
    assert (tmp_path / "gpt2-lora.yaml").read_text() == "mine"
    (tmp_path / "folder").mkdir()
    invoke("recipes", "copy", "gpt2-lora", "folder")
    invoke("recipes", "copy", "gpt2-lora", "other.yaml")
    assert load_recipe(tmp_path / "folder" / "gpt2-lora.yaml") == load_recipe("gpt2-lora")
    assert (tmp_path / "other.yaml").read_text() == recipe_text("gpt2-lora")
    assert "cannot be written" in error_of("recipes", "copy", "gpt2-lora", "no/such.yaml", code=2)


# merge


def test_merging_a_run_and_an_adapter(finished: Path, tmp_path: Path) -> None:
    merged = load_file(finished / "merged" / "model.safetensors")
    for number, source in enumerate([finished, finished / "adapter"]):
        output = tmp_path / f"merged-{number}"

        result = invoke("merge", source, "--output", output)

        found = load_file(output / "model.safetensors")
        assert found.keys() == merged.keys()
        assert all(torch.equal(tensor, found[name]) for name, tensor in merged.items())
        first, last = result.stdout.splitlines()
        assert re.match(
            rf"{re.escape(str(output))}: largest logit difference [\d.e-]+ \(allowed", first
        )
        assert last == f"next: lowvram generate {output} --interactive"


def test_merging_in_another_dtype(finished: Path, tmp_path: Path) -> None:
    invoke("merge", finished, "--output", tmp_path / "half", "--dtype", "bf16")

    tensors = load_file(tmp_path / "half" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_merges_that_are_refused(finished: Path, gpt2_dir: Path, tmp_path: Path) -> None:
    other = save(make_gpt2(initializer_range=0.1), tmp_path / "other")
    output = tmp_path / "merged"

    wrong = error_of("merge", finished, "--output", output, "--base", other, code=4)
    assert "was trained on a base with weights " in wrong
    assert "Name the right one with --base" in wrong
    assert "is neither an adapter" in error_of("merge", gpt2_dir, "--output", output, code=4)
    assert "is neither an adapter" in error_of("merge", tmp_path / "no", "--output", output, code=4)
    again = finished / "merged"
    assert "is there already" in error_of("merge", finished, "--output", again, code=5)
    assert not output.exists()


# evaluate


def reference(directory: Path, path: Path, context: int, stride: int) -> dict[str, float]:
    """Perplexity by transformers, one window after the other, in float64 after the logits."""
    text = path.read_text(encoding="utf-8")
    model = GPT2LMHeadModel.from_pretrained(directory).eval()
    ids = torch.tensor(make_tokenizer()(text, verbose=False)["input_ids"])
    nll, scored = 0.0, 1
    for start in range(0, len(ids), stride):
        window = ids[start : start + context]
        end = start + len(window)
        if end > scored:
            with torch.no_grad():
                logits = model(input_ids=window[None]).logits[0].double()
            each = -logits[:-1].log_softmax(-1).gather(1, window[1:, None])[:, 0]
            nll += each[scored - start - 1 :].sum().item()
            scored = end
    count = len(ids) - 1
    assert scored == len(ids)
    return {
        "perplexity": math.exp(nll / count),
        "nll_sum": nll,
        "tokens_scored": count,
        "context_length": context,
        "stride": stride,
        "bits_per_byte": nll / math.log(2) / len(text.encode()),
        "word_perplexity": math.exp(nll / len(text.split())),
    }


@pytest.mark.parametrize(
    ("arguments", "context", "stride"),
    [
        ([], 64, 32),
        (["--stride", 1], 64, 1),
        (["--stride", 13], 64, 13),
        (["--stride", 63], 64, 63),
        (["--context", 20], 20, 10),
        (["--context", 20, "--stride", 19], 20, 19),
        (["--context", 2], 2, 1),
    ],
    ids=str,
)
def test_perplexity_is_that_of_transformers(
    gpt2_dir: Path, text: Path, arguments: list[Any], context: int, stride: int
) -> None:
    """To 1e-6 relative, and N - 1 of N tokens for every stride."""
    result = invoke("evaluate", gpt2_dir, "--data", text, *arguments, "--json")

    found = json.loads(result.stdout)
    expected = reference(gpt2_dir, text, context, stride)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-5 if key == "word_perplexity" else 1e-6)
    assert result.stderr == ""


def test_merged_adapter_and_run_are_the_same_model(finished: Path, text: Path) -> None:
    def perplexity(model: Path) -> float:
        return float(
            json.loads(invoke("evaluate", model, "--data", text, "--json").stdout)["perplexity"]
        )

    merged = perplexity(finished / "merged")

    expected = reference(finished / "merged", text, 64, 32)["perplexity"]
    assert merged == pytest.approx(expected, rel=1e-6)
    assert perplexity(finished) == merged
    assert perplexity(finished / "adapter") == pytest.approx(merged, rel=1e-5)
    base = json.loads((finished / "adapter" / "base.json").read_text())["name"]
    assert perplexity(base) != pytest.approx(merged, rel=1e-2)


def test_a_run_without_a_merge_stands_for_its_adapter(
    finished: Path, text: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished / "adapter", tmp_path / "run" / "adapter")

    found = invoke("evaluate", tmp_path / "run", "--data", text, "--json").stdout

    assert found == invoke("evaluate", finished / "adapter", "--data", text, "--json").stdout


def test_a_base_that_moved_is_named(
    finished: Path, gpt2_dir: Path, text: Path, tmp_path: Path
) -> None:
    adapter = Path(shutil.copytree(finished / "adapter", tmp_path / "adapter"))
    facts = json.loads((adapter / "base.json").read_text()) | {"name": "/gone"}
    (adapter / "base.json").write_text(json.dumps(facts))
    moved = Path(shutil.copytree(gpt2_dir, tmp_path / "moved"))
    other = save(make_gpt2(initializer_range=0.1), tmp_path / "other")

    assert "name it with --base" in error_of("evaluate", adapter, "--data", text, code=4)
    invoke("evaluate", adapter, "--data", text, "--base", moved)
    wrong = error_of("evaluate", adapter, "--data", text, "--base", other, code=4)
    assert "was trained on a base with weights" in wrong
    assert error_of("evaluate", gpt2_dir, "--data", text, "--base", moved, code=2) == (
        f"--base: {str(gpt2_dir)!r} is no adapter, so it has no base"
    )


def test_evaluation_prints_each_figure(gpt2_dir: Path, text: Path) -> None:
    lines = invoke("evaluate", gpt2_dir, "--data", text).stdout.splitlines()

    found = dict(line.split() for line in lines)
    assert list(found) == [
        "perplexity",
        "nll_sum",
        "tokens_scored",
        "context_length",
        "stride",
        "bits_per_byte",
        "word_perplexity",
    ]
    expected = json.loads(invoke("evaluate", gpt2_dir, "--data", text, "--json").stdout)
    assert {key: float(value) for key, value in found.items()} == expected


def test_what_a_document_is(gpt2_dir: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "more.txt").write_text(TEXT)
    rows = ["The quick brown", "Words repeat"]
    (tmp_path / "table.csv").write_text(f"n,body\n1,{rows[0]}\n2,{rows[1]}\n")
    tokens = len(make_tokenizer()(TEXT, verbose=False)["input_ids"])
    of_line = len(make_tokenizer()(TEXT.splitlines()[0])["input_ids"])

    def scored(*arguments: Any) -> int:
        found = json.loads(invoke("evaluate", gpt2_dir, *arguments, "--json").stdout)
        return int(found["tokens_scored"])

    assert scored("--data", text) == tokens - 1
    assert scored("--data", text, "--data", tmp_path / "more.txt") == 2 * (tokens - 1)
    assert scored("--data", text, "--format", "lines") == 6 * (of_line - 1)
    of_rows = sum(len(make_tokenizer()(row)["input_ids"]) - 1 for row in rows)
    assert scored("--data", tmp_path / "table.csv", "--text-column", "body") == of_rows


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stride", 64], "evaluate.stride: found 64, allowed 1 to 63, "),
        (["--stride", 0], "evaluate.stride: found 0, allowed 1 to 63, "),
        (["--stride", -3], "evaluate.stride: found -3, allowed 1 to 63, "),
        (["--context", 65], "evaluate.context_length: found 65, allowed 2 to 64, "),
        (["--context", 1], "evaluate.context_length: found 1, allowed 2 to 64, "),
        (["--context", 0], "evaluate.context_length: found 0, allowed 2 to 64, "),
    ],
    ids=str,
)
def test_windows_that_cannot_be(
    gpt2_dir: Path, text: Path, arguments: list[Any], message: str
) -> None:
    assert error_of("evaluate", gpt2_dir, "--data", text, *arguments, code=2).startswith(message)


# generate


def greedy(directory: Path, prompt: str, tokens: int) -> str:
    """transformers' model, one argmax after the other."""
    model = GPT2LMHeadModel.from_pretrained(directory).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    start = tokenizer(prompt)["input_ids"] or [tokenizer.eos_token_id]
    ids = torch.tensor([start])
    for _ in range(tokens):
        with torch.no_grad():
            best = model(input_ids=ids).logits[:, -1:].argmax(-1)
        if best.item() == tokenizer.eos_token_id:
            break
        ids = torch.cat([ids, best], dim=1)
    whole = tokenizer.decode(ids[0], skip_special_tokens=True).rstrip("\ufffd")
    return str(whole[len(prompt) :])


PROMPTS = ["The quick brown", "1, 2, 3", "again"]
GREEDY = ["--temperature", 0, "--max-new-tokens", 8]


def prompted(*prompts: str) -> list[str]:
    return [part for prompt in prompts for part in ("--prompt", prompt)]


def records(*arguments: Any) -> list[dict[str, Any]]:
    output = invoke("generate", *arguments, "--json").stdout
    return [json.loads(line) for line in output.splitlines()]


def test_greedy_is_that_of_transformers_alone_and_together(finished: Path) -> None:
    together = records(finished, *prompted(*PROMPTS), *GREEDY)

    assert [record["prompt"] for record in together] == PROMPTS
    for prompt, record in zip(PROMPTS, together, strict=True):
        assert record.keys() == {"prompt", "text", "tokens", "finished", "notes"}
        assert record["text"] == greedy(finished / "merged", prompt, 8)
        assert record["tokens"] == 8 or record["finished"]
        assert records(finished, *prompted(prompt), *GREEDY) == [record]


def test_a_continuation_follows_its_prompt(finished: Path) -> None:
    texts = [greedy(finished / "merged", prompt, 8) for prompt in PROMPTS]

    one = invoke("generate", finished, *prompted(PROMPTS[0]), *GREEDY).stdout
    assert one == printable(f"{PROMPTS[0]}{texts[0]}\n")
    several = invoke("generate", finished, *prompted(*PROMPTS), *GREEDY).stdout
    expected = "".join(f"{p}{t}\n\n" for p, t in zip(PROMPTS, texts, strict=True))
    assert several == printable(expected)


def test_prompts_from_a_file(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[1:]) + "\n")

    found = records(finished, *prompted(PROMPTS[0]), "--file", tmp_path / "prompts.txt", *GREEDY)

    assert found == records(finished, *prompted(*PROMPTS), *GREEDY)


def test_a_file_of_prompts_that_is_no_text(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes(b"caf\xe9\n")

    message = error_of("generate", finished, "--file", tmp_path / "prompts.txt", code=2)

    assert message.startswith(f"--file {tmp_path / 'prompts.txt'}: cannot be read as UTF-8 text: ")


def test_a_conversation(finished: Path) -> None:
    options: dict[str, Any] = {"input": "The quick\r\nagain"}

    result = invoke("generate", finished, "--interactive", *GREEDY, **options)

    expected = [
        prompt + greedy(finished / "merged", prompt, 8) for prompt in ("The quick", "again")
    ]
    assert result.stdout == printable("".join(f"{line}\n" for line in expected))
    assert invoke("generate", finished, "--interactive", *GREEDY, input="").stdout == ""


def test_bytes_that_are_no_text_do_not_end_a_conversation(finished: Path) -> None:
    options: dict[str, Any] = {"input": b"\xff\nagain\n"}

    result = invoke("generate", finished, "--interactive", *GREEDY, **options)

    again = "again" + greedy(finished / "merged", "again", 8) + "\n"
    assert result.stdout.endswith(printable(again))


def test_the_seed_decides(finished: Path) -> None:
    def sample(*arguments: Any) -> str:
        common = ["--prompt", "The", "--temperature", 2, "--max-new-tokens", 16]
        return str(records(finished, *common, *arguments)[0]["text"])

    assert sample("--seed", 1) == sample("--seed", 1) != sample("--seed", 2)
    assert sample() == sample("--seed", 0)


def test_a_prompt_that_is_too_long_loses_its_beginning_out_loud(finished: Path) -> None:
    prompt = "again and " * 40 + "again"
    ids = make_tokenizer()(prompt, verbose=False)["input_ids"]
    kept = make_tokenizer().decode(ids[-56:])
    note = (
        f"the prompt's first {len(ids) - 56} of {len(ids)} tokens were left out: with 8 new "
        "tokens, the model's 64 positions have room for 56"
    )

    alone = invoke("generate", finished, *prompted(prompt), *GREEDY)
    together = invoke("generate", finished, *prompted(prompt, "again"), *GREEDY)
    [record] = records(finished, *prompted(prompt), *GREEDY)

    assert alone.stderr == together.stderr == f"note: {note}\n"
    assert record["notes"] == [note]
    assert record["text"] == greedy(finished / "merged", kept, 8)
    assert alone.stdout == printable(prompt + record["text"] + "\n")


def test_no_room_for_a_prompt(finished: Path) -> None:
    """Said before the prompt is printed."""
    result = invoke("generate", finished, "--prompt", "The", "--max-new-tokens", 64, code=2)

    assert result.stdout == ""
    assert result.stderr.startswith("error: generate.max_new_tokens: found 64, allowed 1 to 63: ")


@pytest.mark.parametrize(
    "arguments",
    [[], ["--interactive", "--prompt", "x"], ["--interactive", "--file", __file__]],
    ids=["neither", "both", "file too"],
)
def test_prompts_come_one_way(finished: Path, arguments: list[str]) -> None:
    assert error_of("generate", finished, *arguments, code=2) == (
        "generate: give --prompt (or --file), or --interactive, and not both"
    )


def test_beams(finished: Path) -> None:
    [found] = records(finished, "--prompt", "The", "--beams", 3, "--max-new-tokens", 6)
    model = GPT2LMHeadModel.from_pretrained(finished / "merged").eval()
    ids = make_tokenizer()("The", return_tensors="pt").input_ids
    options = {"num_beams": 3, "do_sample": False, "max_new_tokens": 6, "pad_token_id": 0}
    with torch.no_grad():
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), **options)

    whole = make_tokenizer().decode(expected[0], skip_special_tokens=True)
    assert ("The" + found["text"]).rstrip("\ufffd") == whole.rstrip("\ufffd")
    wrong = error_of(
        "generate", finished, "--prompt", "The", "--beams", 3, "--temperature", 1, code=2
    )
    assert "beam search does not sample" in wrong


def test_other_settings_of_generation_act(finished: Path) -> None:
    common = ["--prompt", "The quick brown", "--temperature", 0, "--max-new-tokens", 24]
    [plain] = records(finished, *common)
    [no_repeats] = records(finished, *common, "--no-repeat-ngram", 1)
    [penalised] = records(finished, *common, "--repetition-penalty", 5)
    warm = ["--prompt", "The", "--temperature", 3, "--max-new-tokens", 16]
    [sampled] = records(finished, *warm)
    [one_token] = records(finished, *warm, "--top-k", 1)
    [likeliest] = records(finished, *warm, "--top-p", 0.0001)
    [greedily] = records(finished, *warm[:2], "--temperature", 0, *warm[4:])

    assert len({plain["text"], no_repeats["text"]}) == 2
    assert len({plain["text"], penalised["text"]}) == 2
    assert one_token["text"] == likeliest["text"] == greedily["text"] != sampled["text"]


# The rest


def test_the_version() -> None:
    assert invoke("--version").stdout == f"lowvram, version {__version__}\n"


def test_every_command_has_a_help_of_its_own() -> None:
    names = {"run", "recipes", "merge", "evaluate", "generate", "doctor"}

    assert names <= main.commands.keys()
    overview = invoke("--help").stdout
    for name in main.commands:
        assert re.search(rf"^  {name} ", overview, re.MULTILINE)
        assert invoke(name, "--help").stdout.startswith("Usage: ")


@pytest.mark.parametrize(
    ("words", "incomplete", "expected"),
    [
        ([], "ge", ["generate"]),
        ([], "re", ["recipes"]),
        (["recipes"], "", ["copy", "list", "show"]),
        (["run"], "--dry", ["--dry-run"]),
        (["merge", "x", "--dtype"], "b", ["bf16"]),
    ],
)
def test_shell_completion(words: list[str], incomplete: str, expected: list[str]) -> None:
    complete = ShellComplete(main, {}, "lowvram", "_LOWVRAM_COMPLETE")

    assert [item.value for item in complete.get_completions(words, incomplete)] == expected


def test_doctor_prints_json_or_lines() -> None:
    code = CliRunner().invoke(main, ["doctor"]).exit_code

    as_json = json.loads(invoke("doctor", "--json", code=code).stdout)
    as_lines = invoke("doctor", code=code).stdout

    assert code == int(as_json["would_fail"])
    assert as_json["checks"]
    for check in as_json["checks"]:
        assert f"{check['name']}: " in as_lines
    if not torch.cuda.is_available():
        assert code == 1


def test_the_docstring_of_errors_is_the_table_of_exit_codes() -> None:
    documented = dict(re.findall(r"[├└]── (\w+) +(\d+) ", errors.__doc__ or ""))

    assert documented == {k.__name__: str(k.exit_code) for k in LowVRAMError.__subclasses__()}


def test_a_file_of_prompts_is_read_as_data_are(finished: Path, tmp_path: Path) -> None:
    """No byte-order mark, no blank prompts, and a form feed ends no line."""
    (tmp_path / "prompts.txt").write_bytes("\ufeffThe quick\r\n\nbrown\x0cfox\n".encode())

    result = invoke("generate", finished, "--file", tmp_path / "prompts.txt", "--json", *GREEDY)

    prompts = [json.loads(line)["prompt"] for line in result.stdout.splitlines()]
    assert prompts == ["The quick", "brown\x0cfox"]


def test_a_small_model_generates_with_the_defaults(finished: Path) -> None:
    """64 positions have no room for 64 new tokens: half of them is the default then."""
    result = invoke("generate", finished, "--prompt", "The quick", "--json", "--temperature", 0)

    assert 1 <= json.loads(result.stdout)["tokens"] <= 32
