"""Text encodings: which ones there are, and what to say when a file is not in the one named."""

from __future__ import annotations

import codecs
from pathlib import Path

from lowvram.errors import DataError

SAMPLE_BYTES = 4096
BLOCK_BYTES = 1 << 16


def check_encoding(encoding: str) -> None:
    try:
        is_text = codecs.lookup(encoding)._is_text_encoding
    except (LookupError, ValueError):  # a NUL in it
        is_text = False
    if not is_text:
        raise DataError(
            f"data.encoding is {encoding!r}, which Python does not know: "
            "use utf-8, latin-1, cp1252, utf-16 or another of its text encodings"
        )


def wrong_bytes(path: Path, encoding: str) -> DataError:
    """The error for a file that could not be decoded: where, what, and the likely encoding."""
    guess = likely_encoding(path)
    if codecs.lookup(guess).name == codecs.lookup(encoding).name:
        cure = f"Most of it is {guess}: repair or remove that byte"
    else:
        cure = f"Set data.encoding: {guess}"
    return DataError(f"{path}: {first_fault(path, encoding)}: the file is not {encoding}. {cure}")


def first_fault(path: Path, encoding: str) -> str:
    """Line, byte offset and value of the first byte that cannot be decoded."""
    decoder = codecs.getincrementaldecoder(encoding)()
    line, fed = 1, 0
    with path.open("rb") as file:
        while True:
            block = file.read(BLOCK_BYTES)
            try:
                line += decoder.decode(block, final=not block).count("\n")
            except UnicodeDecodeError as error:
                # The decoder may have kept bytes of the block before: error.object holds both.
                offset = fed + len(block) - len(error.object) + error.start
                line += error.object[: error.start].count(b"\n")
                return f"line {line}, byte {offset} is 0x{error.object[error.start]:02x}"
            except UnicodeError as error:
                return str(error)
            fed += len(block)
            if not block:
                return "it cannot be decoded"


def likely_encoding(path: Path) -> str:
    """A guess from the bytes of a file that could not be read as it was asked for."""
    with path.open("rb") as file:
        sample = file.read(SAMPLE_BYTES)
    if sample.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    if sample[1::2].count(0) > len(sample) // 4:
        return "utf-16-le"
    if sample[0::2].count(0) > len(sample) // 4:
        return "utf-16-be"
    if is_mostly_utf8(sample):
        return "utf-8"
    return "cp1252" if has_windows_punctuation(path) else "latin-1"


def is_mostly_utf8(sample: bytes) -> bool:
    """Whether most of the bytes outside ASCII belong to characters in UTF-8."""
    text = sample.decode(errors="replace")
    faults = text.count("\ufffd")
    return sum(not character.isascii() for character in text) > 2 * faults


def has_windows_punctuation(path: Path) -> bool:
    """Whether bytes occur that are punctuation in cp1252 and controls in latin-1."""
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            if any(byte in block for byte in b"\x80\x85\x91\x92\x93\x94\x96\x97"):
                return True
    return False
