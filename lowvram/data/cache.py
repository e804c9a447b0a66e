"""The cache of token stores on disk.

An entry is made beside its place and renamed when it is whole, so that neither an interrupted
process nor two at a time can leave a wrong one. What a killed process has left is cleared away by
the next that writes. Deleting the cache is always safe.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lowvram.data.reference import reference_topics
from lowvram.data.source import Origin, Source, status_of
from lowvram.data.store import TokenStore, open_store
from lowvram.errors import DataError

if os.name == "posix":
    import fcntl

VERSION = 1
"""To be raised when the documents of a source, their tokens or the files of a store change."""

KEY_FILE = "key"
LOCK_FILE = "lock"
PARTIAL = ".partial-"
GRACE_SECONDS = 60
"""For a process that has made its directory and not yet its lock."""
DAY_SECONDS = 24 * 60 * 60


def cache_directory(kind: str = "tokens") -> Path:
    """$LOWVRAM_CACHE/KIND, or lowvram/KIND in the user's cache directory."""
    own = os.environ.get("LOWVRAM_CACHE")
    if own:
        return Path(own).expanduser() / kind
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "lowvram" / kind


def cache_key(source: Source, origins: list[Origin], encoder_key: list[Any]) -> str:
    """The sha256 of everything that a store depends on; files count by name, size and time."""
    options = {name: value for name, value in asdict(source).items() if name != "names"}
    parts = [VERSION, options, [origin_key(origin) for origin in origins], encoder_key]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def origin_key(origin: Origin) -> list[Any]:
    if origin.path is not None:
        status = status_of(origin.path)
        return [str(origin.path.resolve()), status.st_size, status.st_mtime_ns]
    if origin.dataset is not None:
        return [origin.name, origin.dataset._fingerprint]
    text = json.dumps(reference_topics(), sort_keys=True)
    return [origin.name, hashlib.sha256(text.encode()).hexdigest()]


def open_entry(entry: Path, *, cached: bool) -> TokenStore | None:
    """The store in the place of an entry; None for a broken one, or one made for another place."""
    try:
        if (entry / KEY_FILE).read_text(encoding="utf-8") != entry.name:
            return None
    except (OSError, ValueError):
        return None
    return open_store(entry, cached=cached)


def make_entry(entry: Path, fill: Callable[[Path], None]) -> TokenStore:
    """Have an empty directory filled with a store, and put it in the entry's place."""
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        clear_abandoned(entry.parent)
        directory = Path(tempfile.mkdtemp(prefix=f"{PARTIAL}{entry.name[:16]}-", dir=entry.parent))
    except OSError as error:
        raise cannot_write(entry.parent, error) from error
    try:
        with locked(directory):
            fill(directory)
            (directory / KEY_FILE).write_text(entry.name, encoding="utf-8")
        return publish(directory, entry)
    except OSError as error:
        raise cannot_write(entry.parent, error) from error
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Marks a directory as being written, for as long as this process lives."""
    path = directory / LOCK_FILE
    with path.open("wb") as file:
        if os.name == "posix":
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
        path.unlink()


def clear_abandoned(cache: Path) -> None:
    """Remove what processes that were killed have left unfinished."""
    for directory in cache.glob(f"{PARTIAL}*"):
        try:
            if time.time() - directory.stat().st_mtime > GRACE_SECONDS and not is_locked(directory):
                shutil.rmtree(directory, ignore_errors=True)
        except OSError:  # gone, or not ours
            continue


def is_locked(directory: Path) -> bool:
    """Whether a process is writing there; where there are no locks, one may be."""
    path = directory / LOCK_FILE
    if os.name != "posix" or not path.exists():
        return time.time() - directory.stat().st_mtime < DAY_SECONDS
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def publish(directory: Path, entry: Path) -> TokenStore:
    """Rename a finished store into its place, whoever else does the same."""
    try:
        directory.rename(entry)
    except OSError:
        # Something is there: another process was faster, which is as good, or it is broken.
        found = open_entry(entry, cached=False)
        if found is not None:
            return found
        broken = directory.with_name(directory.name + "-broken")
        entry.rename(broken)
        directory.rename(entry)
        if broken.is_dir():
            shutil.rmtree(broken, ignore_errors=True)
        else:
            broken.unlink()
    store = open_entry(entry, cached=False)
    if store is None:
        raise DataError(f"{entry}: the tokens on disk are not those that were written: try again")
    return store


def cannot_write(directory: Path, error: OSError) -> DataError:
    return DataError(
        f"{directory}: tokens cannot be written: {error.strerror or error}. Set LOWVRAM_CACHE to "
        "a directory with room for about twice the bytes of the text"
    )
