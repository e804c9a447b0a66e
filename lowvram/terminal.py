"""Text from data, files and recipes, made safe to show: nothing in it can steer a terminal."""

from __future__ import annotations

import unicodedata
from itertools import chain

_ODD_SHOWN = 3

# C0 but for newline and tab, delete, C1; what turns the direction of writing; other line ends;
# halves of characters, which no terminal can be sent.
_STEERING = {
    code: f"\\u{code:04x}"
    for code in chain(
        (code for code in range(0x20) if chr(code) not in "\n\t"),
        range(0x7F, 0xA0),
        (0x061C, 0x200E, 0x200F),
        range(0x2028, 0x202F),
        range(0x2066, 0x206A),
        range(0xD800, 0xE000),
    )
}


def printable(text: str) -> str:
    r"""Text as it is, with every character that steers a terminal spelled out: \u001b.

    That is how JSON and YAML spell it, too, so that what was one of them still says the same. Each
    character stands for itself: text that comes in pieces is as safe as the whole.
    """
    return text.translate(_STEERING)


def odd_characters(text: str) -> str:
    """The names of the first characters that are not ASCII: U+0430 CYRILLIC SMALL LETTER A."""
    found = dict.fromkeys(c for c in text if not c.isascii())
    return ", ".join(
        f"U+{ord(c):04X} {unicodedata.name(c, '')}".rstrip() for c in list(found)[:_ODD_SHOWN]
    )
