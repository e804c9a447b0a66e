"""Whole files or none: whatever call fails, and whenever a process dies."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from lowvram import disk
from lowvram.disk import (
    MANIFEST,
    PARTIAL,
    check_manifest,
    disk_error,
    new_directory,
    remove,
    remove_partials,
    remove_partials_of,
    room_for,
    size_of,
    temporary_directory,
    write_json,
    write_text,
    writing,
)
from lowvram.errors import CheckpointError

CALLS = ("open", "replace", "fsync", "mkdir")


def fail(monkeypatch: pytest.MonkeyPatch, call: str, number: int, at: int = 1) -> list[str]:
    """`os.CALL` (or Path.open) raises at its `at`-th use, once; what was called is remembered."""
    owner: Any = Path if call in ("open", "mkdir") else os
    original, seen = getattr(owner, call), []

    def failing(*arguments: Any, **options: Any) -> Any:
        seen.append(str(arguments[0]))
        if len(seen) == at:
            raise OSError(number, os.strerror(number), str(arguments[0]))
        return original(*arguments, **options)

    monkeypatch.setattr(owner, call, failing)
    return seen


@pytest.mark.parametrize("call", ["open", "replace", "fsync"])
def test_a_file_that_cannot_be_written_stays_what_it_was(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file.json"
    write_text(path, "old")
    with monkeypatch.context() as patch:
        fail(patch, call, errno.ENOSPC)
        with pytest.raises(CheckpointError) as error:
            write_text(path, "new")
    assert str(error.value) == (
        f"{path}: cannot be written: No space left on device; free some room there"
    )
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.json"]
    write_text(path, "new")
    assert path.read_text() == "new"


@pytest.mark.skipif(sys.platform == "win32", reason="no such limit")
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """A limit on the size of files: the system itself cuts the write short."""
    script = """
import resource, sys
from pathlib import Path
from lowvram.disk import new_directory, write_text
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
def attempt(write):
    try:
        write()
    except Exception as error:
        print(type(error).__name__, error)
place = Path(sys.argv[1])
attempt(lambda: write_text(place / "file", "x" * 2000))
def fill():
    with new_directory(place / "directory") as partial:
        partial.mkdir()
        (partial / "large").write_bytes(bytes(2000))
attempt(fill)
"""
    (tmp_path / "file").write_text("old")
    command = [sys.executable, "-c", script, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    for line, name in zip(ended.stdout.splitlines(), ("file", "directory"), strict=True):
        assert line == (
            f"CheckpointError {tmp_path / name}: cannot be written: File too large; the file "
            "system, or a limit of this shell (ulimit -f), allows no larger file"
        )
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"


@pytest.mark.parametrize(
    ("number", "cure"),
    [
        (errno.ENOSPC, "free some room there"),
        (errno.EDQUOT, "your quota there is used up"),
        (errno.EROFS, "mounted read-only"),
        (errno.EACCES, "check its permissions"),
        (errno.EMFILE, "ulimit -n"),
        (errno.ENFILE, "end other programs"),
        (errno.EIO, "has failed"),
        (errno.ESTALE, "network mount"),
        (errno.ENOTCONN, "network mount"),
    ],
)
def test_every_failure_has_a_cure(number: int, cure: str) -> None:
    said = (
        OSError(number, os.strerror(number)),
        SafetensorError(f"Error while serializing: I/O error: x (os error {number})"),
        Exception(f"x (os error {number})"),  # as tokenizers has it
    )
    for error in said:
        with pytest.raises(CheckpointError, match=re.escape(cure)), writing("place"):
            raise error
    assert str(disk_error("place", OSError(0, "odd"))) == "place: cannot be written: odd"


def test_other_errors_are_not_the_disks() -> None:
    with pytest.raises(ValueError, match="mine"), writing("place"):
        raise ValueError("mine")


# Directories


def fill(directory: Path, text: str) -> None:
    with new_directory(directory, replace=True, manifest=True) as partial:
        partial.mkdir()
        (partial / "a").write_text(text)
        (partial / "b").write_text("b")


def read(directory: Path) -> str:
    check_manifest(directory, ("a", "b"))
    return (directory / "a").read_text()


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("at", range(1, 7))
def test_a_directory_is_replaced_whole_or_not_at_all(
    call: str, at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each call of each kind fails in turn."""
    final = tmp_path / "final"
    fill(final, "old")
    with monkeypatch.context() as patch:
        seen = fail(patch, call, errno.EIO, at)
        try:
            fill(final, "new")
            failed = False
        except CheckpointError:
            failed = True
    assert failed == (len(seen) >= at)
    # When only the last flush fails, the new one is in its place already, and whole.
    assert read(final) in (("old", "new") if failed else ("new",))
    remove_partials(tmp_path, "final")
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_what_is_there_is_not_replaced_unasked(tmp_path: Path) -> None:
    """Two processes make the same directory: the second finds that of the first."""
    fill(tmp_path / "final", "first")

    def second() -> None:
        with new_directory(tmp_path / "final") as partial:
            partial.mkdir()

    with pytest.raises(CheckpointError, match="cannot be written: File exists"):
        second()
    assert read(tmp_path / "final") == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_what_fails_inside_leaves_nothing(tmp_path: Path) -> None:
    def half() -> None:
        with new_directory(tmp_path / "final") as partial:
            partial.mkdir()
            (partial / "a").write_text("half")
            raise KeyError("bug")

    with pytest.raises(KeyError):
        half()
    assert list(tmp_path.iterdir()) == []


def test_a_crash_between_the_two_renames_is_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was moved away to be replaced is all there is: it goes back."""
    final = tmp_path / "final"
    fill(final, "old")
    original = os.replace

    class Killed(BaseException):
        pass

    def replace(source: Any, target: Any) -> None:
        if Path(target) == final:
            raise Killed
        original(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # nor is anything cleared up
        with pytest.raises(Killed):
            fill(final, "new")
    assert not final.exists()
    remove_partials(tmp_path, "final")
    assert read(final) == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_a_directory_goes_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its files cannot be removed, it has lost its name all the same."""
    fill(tmp_path / "final", "x")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        remove(tmp_path / "final")
    assert not (tmp_path / "final").exists()
    remove_partials(tmp_path, "final")
    assert list(tmp_path.iterdir()) == []
    remove(tmp_path / "none")


def test_files_of_others_are_not_cleared_up(tmp_path: Path) -> None:
    kept = [".partial-thesis.tex", ".partial-photos", ".partial-final", ".partial-other-12"]
    for name in kept:
        (tmp_path / name).mkdir()
    (tmp_path / ".partial-final-12").mkdir()
    remove_partials(tmp_path, "final|x")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)


def test_links_are_removed_and_not_what_they_lead_to(tmp_path: Path) -> None:
    fill(tmp_path / "mine", "x")
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    remove(tmp_path / "link")
    assert read(tmp_path / "mine") == "x"


def rewrite(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        content = json.loads((directory / MANIFEST).read_text())
        (directory / MANIFEST).write_text(json.dumps(change(content)))

    return damage


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "shorter": lambda d: (d / "a").write_text("ol"),
    "longer": lambda d: (d / "a").write_text("old "),
    "other": lambda d: (d / "a").write_text("odd"),
    "gone": lambda d: (d / "b").unlink(),
    "a directory": lambda d: ((d / "b").unlink(), (d / "b").mkdir()),
    "no manifest": lambda d: (d / MANIFEST).unlink(),
    "no JSON": lambda d: (d / MANIFEST).write_text("{"),
    "a list": lambda d: (d / MANIFEST).write_text("[]"),
    "not named": rewrite(lambda content: {"a": content["a"]}),
    "no facts": rewrite(lambda content: {**content, "b": None}),
    "no hash": rewrite(lambda content: {**content, "b": {"bytes": 1}}),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=list(DAMAGE))
def test_a_manifest_notices(damage: Callable[[Path], Any], tmp_path: Path) -> None:
    fill(tmp_path / "final", "old")
    check_manifest(tmp_path / "final", ("a", "b"))
    damage(tmp_path / "final")
    with pytest.raises((ValueError, OSError)):
        check_manifest(tmp_path / "final", ("a", "b"))


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_in_a_shared_directory_only_the_dead_are_cleared_up(tmp_path: Path) -> None:
    dead, alive = dead_process(), os.getpid()
    kept = [
        f"{PARTIAL}model-{alive}",
        f"{PARTIAL}model-2-{dead}",
        f"{PARTIAL}other-{dead}",
        "model",
    ]
    gone = [f"{PARTIAL}model-{dead}", f"{PARTIAL}model-old-{dead}", f"{PARTIAL}model-gone-{dead}"]
    for name in (*kept, *gone):
        (tmp_path / name).mkdir()
    remove_partials_of(tmp_path / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)


def test_temporary_directories_of_the_dead_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in (f"lowvram-{dead_process()}-abc", f"lowvram-{os.getpid()}-x", "lowvram-mine"):
        (tmp_path / name).mkdir()
    with temporary_directory() as directory:
        assert directory.is_dir()
        assert len(list(tmp_path.iterdir())) == 3
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == sorted([f"lowvram-{os.getpid()}-x", "lowvram-mine"])


def test_json_has_no_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_room_is_that_of_the_disk(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    enough, found = room_for(tmp_path / "not" / "there", 1)
    assert enough
    assert found == pytest.approx(free, rel=0.05)
    assert not room_for(tmp_path, free * 2)[0]
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "f").write_bytes(bytes(1000))
    assert (size_of(tmp_path), size_of(tmp_path / "none")) == (1000, 0)
    assert disk.size_of(tmp_path / "d" / "f") == 1000
