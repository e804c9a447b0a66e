"""Tokens come from the environment or the hub's own login, and go to the hub and nowhere else."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from click.testing import CliRunner

from lowvram.cli import main
from lowvram.errors import ModelError

SECRET = "MARKERmarkerMARKERmarkerMARKERmark"
TOKEN = f"hf_{SECRET}"


@pytest.fixture(autouse=True)
def _token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", TOKEN)


def files_with_it(*directories: Path) -> tuple[int, list[Path]]:
    """How many files there are, and those that hold the secret, as text of any encoding."""
    spellings = [SECRET.encode(encoding) for encoding in ("utf-8", "utf-16-le", "utf-16-be")]
    files = [path for directory in directories for path in directory.rglob("*") if path.is_file()]
    return len(files), [
        path for path in files if any(spelling in path.read_bytes() for spelling in spellings)
    ]


def test_a_run_writes_no_token_anywhere(gpt2_dir: Path, text_file: Path, tmp_path: Path) -> None:
    settings = {
        "model.name": gpt2_dir,
        "data.source": text_file,
        "train.global_batch_size": 4,
        "train.max_steps": 2,
        "train.save_every": 1,
        "generate.max_new_tokens": 4,
        "output_dir": tmp_path / "run",
    }

    result = CliRunner().invoke(
        main, ["run", "gpt2-lora", *(f"--set={key}={value}" for key, value in settings.items())]
    )

    assert result.exit_code == 0, result.output
    assert SECRET not in result.output
    count, found = files_with_it(tmp_path / "run", tmp_path / "cache")
    assert count > 15  # recipe, result, metrics, checkpoints, adapter, merged, tokens
    assert found == []


def test_the_search_would_find_it(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/log").write_text(f"x{TOKEN}", encoding="utf-16")

    assert files_with_it(tmp_path) == (1, [tmp_path / "a/log"])


class Hub(BaseHTTPRequestHandler):
    """Refuses, and tells what it was sent, as a careless or hostile one could."""

    seen: list[str | None] = []

    def do_HEAD(self) -> None:
        sent = self.headers.get("Authorization")
        self.seen.append(sent)
        body = json.dumps({"error": f"refused: {sent}"}).encode()
        self.send_response(403)
        self.send_header("X-Error-Message", f"refused: {sent}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_GET = do_HEAD

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def hub() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_download_that_fails_tells_no_token(
    hub: str, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name, value in {
        "ENDPOINT": hub,
        "HF_HUB_OFFLINE": False,
        "HF_HUB_CACHE": str(tmp_path / "hub"),
    }.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)

    result = CliRunner().invoke(main, ["evaluate", "some/model", "--data", str(text_file)])

    assert f"Bearer {TOKEN}" in Hub.seen  # it was of use
    assert result.exit_code == 4, result.output
    assert "error: model.name: 'some/model' is no directory here" in result.stderr
    assert "hf_***" in result.stderr  # the hub did tell it
    assert SECRET not in result.output
    assert files_with_it(tmp_path)[1] == []


def test_tokens_are_masked_in_any_error() -> None:
    assert str(ModelError(f"cannot load {TOKEN}.")) == "cannot load hf_***."
    assert str(ModelError("hf_model_of_mine")) == "hf_model_of_mine"
