"""Files that are there whole or not at all, and what a disk that fails is told as.

Everything is written beside its place, flushed to the disk and renamed; then the directory that
holds the name is flushed too. What a crash leaves begins with `.partial-` and is removed at the
next start, by whoever has the directory for itself.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from safetensors import SafetensorError

from lowvram.errors import CheckpointError

PARTIAL = ".partial-"
MANIFEST = "manifest.json"
_TEMPORARY = "lowvram-"

_FULL = "free some room there"
_GONE = "the disk or the network mount has failed: see that it is there and whole"
_CURES = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: "your quota there is used up: free some of it",
    errno.EFBIG: "the file system, or a limit of this shell (ulimit -f), allows no larger file",
    errno.EROFS: "it is mounted read-only: choose another directory",
    errno.EACCES: "check its permissions, or choose another directory",
    errno.EPERM: "check its permissions, or choose another directory",
    errno.EMFILE: "too many files are open: raise the limit of this shell (ulimit -n 4096)",
    errno.ENFILE: "too many files are open on this machine: end other programs",
    errno.EIO: _GONE,
    errno.ESTALE: _GONE,
    errno.ENOTCONN: _GONE,
    errno.ENODEV: _GONE,
    errno.ETIMEDOUT: _GONE,
}


def disk_error(what: str, error: Exception, *, failed: str = "written") -> CheckpointError:
    """The error of a user whose disk does not do what it should, with what to do about it."""
    number, reason = None, str(error)
    if isinstance(error, OSError):
        number, reason = error.errno, error.strerror or reason
    elif found := re.search(r"os error (\d+)", reason):  # as libraries in Rust say it
        number = int(found[1])
    cure = _CURES.get(number or 0)
    return CheckpointError(f"{what}: cannot be {failed}: {reason}" + (f"; {cure}" if cure else ""))


@contextmanager
def writing(what: str | Path) -> Iterator[None]:
    """What goes wrong with the disk inside is a CheckpointError."""
    try:
        yield
    except Exception as error:
        # tokenizers knows no kinds of errors at all.
        if isinstance(error, OSError | SafetensorError) or type(error) is Exception:
            raise disk_error(str(what), error) from error
        raise


def write_json(path: Path, content: Any) -> None:
    """NaN and infinity are refused: JSON has none."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    with writing(path):
        replace_text(path, text)


def replace_text(path: Path, text: str) -> None:
    """As `write_text`, with the OSError itself."""
    partial = path.with_name(f"{PARTIAL}{path.name}-{os.getpid()}")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync(path.parent)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


@contextmanager
def new_directory(final: Path, *, replace: bool = False, manifest: bool = False) -> Iterator[Path]:
    """A directory to be filled, which takes the place of `final` in the end or leaves nothing.

    Without `replace` there must be nothing at `final`. With `manifest`, sizes and hashes of its
    files are put beside them, for `check_manifest`.
    """
    partial = final.with_name(f"{PARTIAL}{final.name}-{os.getpid()}")
    with writing(final):
        try:
            remove(partial)
            partial.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            if manifest:
                text = json.dumps(_manifest_of(partial), indent=2) + "\n"
                (partial / MANIFEST).write_text(text, encoding="utf-8")
            for path in sorted(partial.rglob("*")):
                sync(path)
            sync(partial)
            if not replace and os.path.lexists(final):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(final))
            _put(partial, final)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def _put(partial: Path, final: Path) -> None:
    """Rename; what was there is moved away first, since a directory cannot replace another."""
    old = final.with_name(f"{PARTIAL}{final.name}-old-{os.getpid()}")
    there = os.path.lexists(final)
    if there:
        os.replace(final, old)
    try:
        os.replace(partial, final)
    except OSError:
        if there:
            os.replace(old, final)
        raise
    sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _manifest_of(directory: Path) -> dict[str, dict[str, Any]]:
    return {path.name: _size_and_hash(path) for path in sorted(directory.iterdir())}


def check_manifest(directory: Path, names: Iterable[str]) -> None:
    """Raises ValueError or OSError unless these files are those of the manifest, to the last byte.

    Sizes are looked at first, since they cost nothing.
    """
    if not (directory / MANIFEST).is_file():
        raise ValueError(f"{MANIFEST} is not there")
    content = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{MANIFEST} is not what was written")
    wanted = {name: content.get(name) for name in names}
    for read in (_size, _size_and_hash):
        for name, facts in wanted.items():
            if not isinstance(facts, dict) or not read(directory / name).items() <= facts.items():
                raise ValueError(f"{name} is not what was written")


def _size(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size}


def _size_and_hash(path: Path) -> dict[str, Any]:
    return _size(path) | {"sha256": sha256_of(path)}


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Have the disk hold what was written to a file, or the names in a directory."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open a directory
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """A file, a link or a directory with all in it; nothing if there is none.

    A directory loses its name first: under that there is never a part of it.
    """
    if path.is_dir() and not path.is_symlink():
        gone = path
        if not path.name.startswith(PARTIAL):
            gone = path.with_name(f"{PARTIAL}{path.name}-gone-{os.getpid()}")
            os.replace(path, gone)
        shutil.rmtree(gone, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_partials(directory: Path, names: str) -> None:
    """What crashed processes left of files called as the expression `names` says.

    For who has them for itself. What a process had moved away to replace it, and then did not, goes
    back to its place.
    """
    left = re.compile(rf"{re.escape(PARTIAL)}({names})-(old-|gone-)?\d+")
    for path in directory.glob(f"{PARTIAL}*"):
        match = left.fullmatch(path.name)
        if match is None:
            continue  # not of ours
        with suppress(OSError):
            if match[2] == "old-" and not os.path.lexists(directory / match[1]):
                os.replace(path, directory / match[1])
            else:
                remove(path)


def remove_partials_of(final: Path) -> None:
    """What crashed processes left of `final`, in a directory that is shared with others."""
    left = re.compile(rf"{re.escape(f'{PARTIAL}{final.name}')}-(?:old-|gone-)?(\d+)")
    for path in final.parent.glob(f"{PARTIAL}*"):
        match = left.fullmatch(path.name)
        if match and not psutil.pid_exists(int(match[1])):
            with suppress(OSError):
                remove(path)


@contextmanager
def temporary_directory() -> Iterator[Path]:
    """For as long as the context lasts; those of processes that were killed go first."""
    with writing("a temporary directory (TMPDIR)"):
        for path in Path(tempfile.gettempdir()).glob(f"{_TEMPORARY}*"):
            match = re.fullmatch(rf"{_TEMPORARY}(\d+)-\w+", path.name)
            if match and not psutil.pid_exists(int(match[1])):
                shutil.rmtree(path, ignore_errors=True)
        directory = Path(tempfile.mkdtemp(prefix=f"{_TEMPORARY}{os.getpid()}-"))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def existing(directory: Path) -> Path:
    """It, or what there is already of the way to it."""
    return next(path for path in (directory, *directory.absolute().parents) if path.is_dir())


def room_for(directory: Path, needed_bytes: int) -> tuple[bool, int]:
    """Whether a directory, there already or not, has room for so many bytes; and how many."""
    free = shutil.disk_usage(existing(directory)).free
    return needed_bytes <= free, free


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a directory; 0 of nothing."""
    if path.is_dir() and not path.is_symlink():
        return sum(size_of(below) for below in path.iterdir())
    return path.lstat().st_size if os.path.lexists(path) else 0
