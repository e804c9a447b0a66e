"""Damage of the kinds that files meet, and of those that people think of who mean harm."""

# ruff: noqa: E501 (lists of pieces are read across, not down)

from __future__ import annotations

import random
from collections.abc import Callable

NUMBERS = [b"0", b"-1", b"1e400", b"-1e-400", b".nan", b"-.inf", b"9" * 400, b"9" * 5000, b"0x" + b"f" * 300, b"0o7", b"1_0", b"0b1", b"1.5", b"00", b"+1", b"1e3", b"NaN", "\uff11".encode(), "\u0661".encode()]  # fmt: skip
VALUES = [*NUMBERS, b"null", b"~", b"true", b"no", b"", b"''", b"[]", b"{}", b"[a, b]", b"auto", b"full", b"lora", b"fp16", b"../..", b"~/x", b"~nobody/x", b"$HOME", b"${HOME}/x", b"https://a:b@c/d", b"a/" * 3000, b"a" * 300, b"*", b"**/*", b"embedded:x", b"C:\\x", b"12GiB", b"1e9GiB"]  # fmt: skip
YAML = [b"!!python/object/apply:os.system [ls]", b"!!binary aa==", b"!x ", b"&a ", b"*a", b"<<: *a", b"? ", b"|\n  x", b">-\n  x", b"---\n", b"...\n", b"%YAML 1.1\n---\n", b"%TAG ! x\n", b"# ", b": ", b"- ", b"\t", b"[" * 40, b"{a: " * 40, b"\"\\ud800\"", b"\"\\0\"", b"'", b'"', b"@", b"`"]  # fmt: skip
ODD = ["\u0430", "\u200b", "\u00a0", "\u2028", "\u202e", "\x85", "\x1b[31m", "\0", "\ufeff", "\ufffe", "\U0001f600", "\uff1a", "\uff41", "\u0301"]  # fmt: skip


def mutate(content: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """One to eight changes."""
    for _ in range(rng.choice((1, 1, 2, 3, 5, 8))):
        content = rng.choice(CHANGES)(content, others, rng)
    return content[: 2**20 + 10]


def flip(content: bytes, _others: list[bytes], rng: random.Random) -> bytes:
    if not content:
        return content
    place = rng.randrange(len(content))
    return content[:place] + bytes([rng.randrange(256)]) + content[place + 1 :]


def cut(content: bytes, _others: list[bytes], rng: random.Random) -> bytes:
    first, last = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    return content[:first] + content[last:]


def splice(content: bytes, others: list[bytes], rng: random.Random) -> bytes:
    other = rng.choice(others)
    return content[: rng.randrange(len(content) + 1)] + other[rng.randrange(len(other) + 1) :]


def insert(content: bytes, _others: list[bytes], rng: random.Random) -> bytes:
    place = rng.randrange(len(content) + 1)
    piece = rng.choice((rng.choice(YAML), rng.choice(ODD).encode(), rng.choice(VALUES)))
    return content[:place] + piece + content[place:]


def change_lines(content: bytes, _others: list[bytes], rng: random.Random) -> bytes:
    lines = content.split(b"\n")
    place = rng.randrange(len(lines))
    match rng.randrange(4):
        case 0:
            del lines[place]
        case 1:
            lines.insert(place, lines[place])
        case 2:
            lines[place] = b" " * rng.randrange(5) + lines[place].lstrip()
        case _:
            other = rng.randrange(len(lines))
            lines[place], lines[other] = lines[other], lines[place]
    return b"\n".join(lines)


def change_value(content: bytes, _others: list[bytes], rng: random.Random) -> bytes:
    lines = content.split(b"\n")
    places = [number for number, line in enumerate(lines) if b":" in line]
    if not places:
        return content
    place = rng.choice(places)
    key = lines[place].partition(b":")[0]
    piece = rng.choice((rng.choice(VALUES), rng.choice(YAML), rng.choice(ODD).encode()))
    lines[place] = key + b": " + piece
    return b"\n".join(lines)


def change_letter(content: bytes, _others: list[bytes], rng: random.Random) -> bytes:
    twins = {b"a": "\u0430", b"e": "\u0435", b"o": "\u043e", b" ": "\u00a0", b":": "\uff1a", b"1": "\uff11"}  # fmt: skip
    plain, twin = rng.choice(list(twins.items()))
    return content.replace(plain, twin.encode(), rng.randrange(1, 4))


def repeat(content: bytes, _others: list[bytes], rng: random.Random) -> bytes:
    """Many of something: bombs, depth, length."""
    piece = rng.choice([*YAML, b"x: &a [*a, *a]\n", b"[", b"{a: ", b"- ", b",", b"\n", b" "])
    return content + b"\nx: " + piece * rng.choice((10, 1000, 10_000))


CHANGES: list[Callable[[bytes, list[bytes], random.Random], bytes]] = [
    flip, flip, cut, splice, insert, insert, change_lines, change_value, change_value, change_value, change_letter, repeat,
]  # fmt: skip
