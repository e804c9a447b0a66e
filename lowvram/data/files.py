"""From names to origins: which files a name stands for, and which names are no files at all."""

from __future__ import annotations

import difflib
import glob
import os
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from lowvram.data.hub import load_hub
from lowvram.data.source import Origin, ReadReport, Source, status_of
from lowvram.errors import DataError

EMBEDDED = "embedded:python-reference"

TABLES = frozenset((".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet"))
# What a directory or a glob is searched for. A file named by itself is text whatever its suffix.
TEXTS = frozenset(
    """.txt .text .md .markdown .rst .tex .org .adoc .log .html .htm .xml .srt .sql .sh
    .py .pyi .js .ts .jsx .tsx .c .h .cc .cpp .hpp .java .kt .go .rs .rb .php .cs .swift .scala
    .lua .r .jl .pl .hs .ml .lisp .el .css .yaml .yml .toml .ini .cfg""".split()
)
COMPRESSED = frozenset((".gz", ".zip", ".bz2", ".xz", ".zst", ".7z", ".tar", ".tgz", ".rar"))
BINARIES = COMPRESSED | frozenset(
    """.bin .pt .pth .ckpt .safetensors .gguf .onnx .npy .npz .pkl .pickle .arrow .feather .h5
    .db .sqlite .pdf .doc .docx .xls .xlsx .ppt .pptx .odt .epub .png .jpg .jpeg .gif .webp .mp3
    .mp4 .wav .exe .so .dll .dylib .pyc .class .o .a""".split()
)
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)
MAX_FILES = 50_000


def resolve(source: Source, report: ReadReport) -> list[Origin]:
    """The origins in the order of the names; a file that several names lead to comes once.

    Raises DataError for a name that stands for nothing that can be read.
    """
    origins: list[Origin] = []
    known: set[Path] = set()
    for name in source.names:
        for origin in resolve_name(name, source, report):
            real = None if origin.path is None else origin.path.resolve()
            if real is None or real not in known:
                origins.append(origin)
            if real is not None:
                known.add(real)
    return origins


def check_names(names: Iterable[str]) -> None:
    """Raises the DataError of `resolve` for what it would refuse without asking the hub."""
    for name in names:
        if not local_origins(name, ReadReport()) and not may_be_hub_id(name):
            raise not_found(name, home_expanded(name))


def resolve_name(name: str, source: Source, report: ReadReport) -> list[Origin]:
    found = local_origins(name, report)
    if found:
        return found
    if may_be_hub_id(name):
        return [Origin(name=name, dataset=load_hub(name, source.config, source.split))]
    raise not_found(name, home_expanded(name))


def local_origins(name: str, report: ReadReport) -> list[Origin]:
    """What a name stands for on this machine; nothing if it has to be looked for elsewhere."""
    try:
        return looked_for(name, report)
    except OSError as error:  # too long for a name, or in a directory that may not be read
        raise DataError(
            f"data.source {name!r}: cannot be looked for: {error.strerror}. Give the name of a "
            "file or directory that can be read"
        ) from error


def home_expanded(name: str) -> Path:
    """`~` is the home directory; that of a user whom nobody knows stays as it is."""
    return Path(os.path.expanduser(name))


def looked_for(name: str, report: ReadReport) -> list[Origin]:
    if name.startswith("embedded:"):
        if name != EMBEDDED:
            raise DataError(f"data.source {name!r}: the only embedded text is {EMBEDDED!r}")
        return [Origin(name=name)]
    path = home_expanded(name)
    if path.is_dir():
        found = at_most(files_below(path), f"directory {absolute(path)}")
        kept = [file for file in found if file.suffix.lower() in TABLES | TEXTS]
        return usable(found, kept, f"directory {absolute(path)}", report)
    if path.exists():
        return [named_file(path)]
    if glob.has_magic(name):
        pattern = re.sub(r"(\*\*/)+", "**/", str(path))  # each more would search all of it again
        matches = map(Path, glob.iglob(pattern, recursive=True))
        files = (match for match in matches if match.is_file())
        found = sorted(at_most(files, f"glob {absolute(path)}"), key=str)
        kept = [file for file in found if file.suffix.lower() not in BINARIES]
        return usable(found, kept, f"glob {absolute(path)}", report)
    return []


def may_be_hub_id(name: str) -> bool:
    """`name` or `organisation/name`, unless that is plainly meant to be a file."""
    path = Path(name)
    is_file_name = path.suffix.lower() in TABLES | TEXTS | BINARIES
    in_directory = "/" in name and path.parent.is_dir()
    return bool(HUB_ID.fullmatch(name)) and not is_file_name and not in_directory


def not_found(name: str, path: Path) -> DataError:
    beside = os.listdir(path.parent) if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, beside, n=1)
    hint = f"Did you mean {str(path.parent / close[0])!r}? " if close else ""
    return DataError(
        f"data.source {name!r}: no such file or directory: {absolute(path)}. {hint}"
        "A relative path starts at the working directory"
    )


def absolute(path: Path) -> str:
    return os.path.abspath(path)


def file_origin(path: Path) -> Origin:
    return Origin(name=str(path), path=path)


def named_file(path: Path) -> Origin:
    """A file that was named by itself has to be of use, so here everything unusual is an error."""
    suffix = path.suffix.lower()
    if suffix in COMPRESSED:
        raise DataError(f"{path}: a compressed file ({suffix}): unpack it and name what was in it")
    if suffix in BINARIES:
        raise DataError(
            f"{path}: a {suffix} file is not text: convert it to .txt, .csv, .jsonl or .parquet"
        )
    if not path.is_file():
        raise DataError(f"{path}: not a regular file: give a file or a directory")
    if status_of(path).st_size == 0:
        raise DataError(f"{path}: the file is empty (0 bytes): give a file with text in it")
    return file_origin(path)


def at_most(files: Iterator[Path], what: str) -> list[Path]:
    """All of them, if a text can be in so many: `/` is searched for minutes, and is no text."""
    found = list(islice(files, MAX_FILES + 1))
    if len(found) > MAX_FILES:
        raise DataError(
            f"data.source: {what} has more than {MAX_FILES:,} files. Name a directory that holds "
            "nothing but the text, or put it into fewer files"
        )
    return found


def usable(found: list[Path], kept: list[Path], what: str, report: ReadReport) -> list[Origin]:
    """The files kept, without empty ones; what is left of those found is counted."""
    kept = [file for file in kept if status_of(file).st_size > 0]
    report.files_skipped += len(found) - len(kept)
    if not kept:
        raise DataError(
            f"data.source: {what} has no file to read ({len(found)} files found). What can be "
            f"read: .txt, .md and other text, {', '.join(sorted(TABLES))}, not empty, not hidden"
        )
    return [file_origin(file) for file in kept]


def files_below(directory: Path) -> Iterator[Path]:
    """All files below a directory in sorted order, without hidden ones.

    Links to directories are followed, but each directory is entered once: loops end.
    """
    entered: set[Path] = set()
    for root, directories, names in os.walk(directory, onerror=unreadable, followlinks=True):
        real = Path(root).resolve()
        if real in entered:
            directories.clear()
            continue
        entered.add(real)
        directories[:] = sorted(name for name in directories if not name.startswith("."))
        for name in sorted(names):
            path = Path(root, name)
            if not name.startswith(".") and path.is_file():
                yield path


def unreadable(error: OSError) -> None:
    raise DataError(f"{error.filename}: cannot be read: {error.strerror}: check its permissions")
