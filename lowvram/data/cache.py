"""The cache of token stores on disk.

An entry is made beside its place and renamed when it is whole, so that neither an interrupted
process nor two at a time can leave a wrong one. Deleting the cache is always safe.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lowvram.data.reference import reference_topics
from lowvram.data.source import Origin, Source
from lowvram.data.store import TokenStore, open_store
from lowvram.errors import DataError

VERSION = 1
"""To be raised when the documents of a source, their tokens or the files of a store change."""


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
        status = origin.path.stat()
        return [str(origin.path.resolve()), status.st_size, status.st_mtime_ns]
    if origin.dataset is not None:
        return [origin.name, origin.dataset._fingerprint]
    text = json.dumps(reference_topics(), sort_keys=True)
    return [origin.name, hashlib.sha256(text.encode()).hexdigest()]


def make_entry(entry: Path, fill: Callable[[Path], None]) -> TokenStore:
    """Have an empty directory filled with a store, and put it in the entry's place."""
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        directory = Path(tempfile.mkdtemp(prefix=f".{entry.name[:16]}-", dir=entry.parent))
    except OSError as error:
        raise cannot_write(entry.parent, error) from error
    try:
        fill(directory)
        return publish(directory, entry)
    except OSError as error:
        raise cannot_write(entry.parent, error) from error
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def publish(directory: Path, entry: Path) -> TokenStore:
    """Rename a finished store into its place, whoever else does the same."""
    try:
        directory.rename(entry)
    except OSError:
        # Something is there: another process was faster, which is as good, or it is broken.
        found = open_store(entry, cached=False)
        if found is not None:
            return found
        broken = directory.with_name(directory.name + "-broken")
        entry.rename(broken)
        directory.rename(entry)
        shutil.rmtree(broken, ignore_errors=True)
    store = open_store(entry, cached=False)
    if store is None:
        raise DataError(f"{entry}: the tokens on disk are not those that were written: try again")
    return store


def cannot_write(directory: Path, error: OSError) -> DataError:
    return DataError(
        f"{directory}: tokens cannot be written: {error.strerror or error}. Set LOWVRAM_CACHE to "
        "a directory with room for about twice the bytes of the text"
    )
