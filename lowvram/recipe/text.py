"""YAML 1.2 text to plain values, with the line of every key. Knows nothing of recipes.

ruamel.yaml scans and parses; the tree is built here from its events, in a loop. That keeps what a
recipe has no use for out by construction: tags (and so objects), anchors, aliases and merge keys,
second documents, nesting that would exhaust the stack, and keys that are set twice.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from io import StringIO
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedSeq
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    NodeEvent,
    ScalarEvent,
    SequenceEndEvent,
)
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.representer import RoundTripRepresenter
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from lowvram.terminal import odd_characters

# Where a value stands: ("train", "betas", 0).
KeyPath = tuple[str | int, ...]

MAX_DEPTH = 16
# A megabyte of commas would keep the scanner busy for a minute; a recipe has some 60 keys.
MAX_NODES = 20_000

# Texts that need no quotes. The emitter still quotes those that would read as null or true.
PLAIN_TEXT = re.compile(r"[A-Za-z][A-Za-z0-9_./-]*")


@dataclass(frozen=True, kw_only=True)
class Problem:
    path: KeyPath
    message: str
    line: int | None = None


@dataclass(frozen=True, kw_only=True)
class Document:
    """What a YAML text says; keys with a problem are absent from `values`.

    `complete` is false where the reading had to stop early.
    """

    values: Any
    lines: dict[KeyPath, int]
    problems: list[Problem]
    complete: bool = True


class _Stop(Exception):
    """Ends the reading: what follows could not be understood."""

    def __init__(self, message: str, line: int, path: KeyPath = ()) -> None:
        self.problem = Problem(path=path, message=message, line=line)


@dataclass(kw_only=True)
class _Frame:
    """A mapping or sequence that is still open."""

    container: dict[str, Any] | list[Any]
    path: KeyPath
    key: str | None = None
    lines_of_keys: dict[str, int] = field(default_factory=dict)
    dropping: bool = False


def parse_yaml(text: str) -> Document:
    builder = _Builder()
    complete = False
    try:
        for event in _events(text):
            builder.take(event)
        complete = True
    except _Stop as stop:
        builder.problems.append(stop.problem)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else None
        reason = " ".join(str(error.problem or error.context).split())
        reason += _odd_spaces(text, mark.index) if mark else ""
        builder.problems.append(Problem(path=(), message=f"not valid YAML: {reason}", line=line))
    except YAMLError as error:
        # The reader's: a character that YAML does not allow. It knows an offset, no line.
        offset = getattr(error, "position", 0)
        line = text.count("\n", 0, offset) + 1
        message = f"not valid YAML: character {text[offset]!r} is not allowed"
        builder.problems.append(Problem(path=(), message=message, line=line))
    return Document(
        values=builder.root, lines=builder.lines, problems=builder.problems, complete=complete
    )


def dump_yaml(values: Mapping[str, Any]) -> str:
    """Block style for mappings, `[a, b]` for lists; every text reads back as the same text."""
    yaml = YAML(typ="rt", pure=True)
    yaml.Representer = _Representer
    yaml.width = 2**20  # folded long texts are hard to read and to search
    stream = StringIO()
    yaml.dump(_styled(values), stream)
    return stream.getvalue()


class _Representer(RoundTripRepresenter):
    """Writes null as `null`, where ruamel would leave the place empty."""


def _represent_none(representer: RoundTripRepresenter, value: None) -> ScalarNode:
    node: ScalarNode = representer.represent_scalar("tag:yaml.org,2002:null", "null")
    return node


_Representer.add_representer(type(None), _represent_none)


def _styled(value: Any) -> Any:
    """Lists on one line; quotes around every text that is not a plain name."""
    if isinstance(value, Mapping):
        return {key: _styled(item) for key, item in value.items()}
    if isinstance(value, list):
        items = CommentedSeq(_styled(item) for item in value)
        items.fa.set_flow_style()
        return items
    # ruamel's emitter leaves `? a` unquoted inside a list and loses U+0085, so it is not asked.
    if isinstance(value, str) and not PLAIN_TEXT.fullmatch(value):
        return DoubleQuotedScalarString(value)
    return value


def _events(text: str) -> Iterator[Event]:
    yield from YAML(typ="safe", pure=True).parse(StringIO(text))


class _Builder:
    def __init__(self) -> None:
        self.root: Any = None
        self.lines: dict[KeyPath, int] = {}
        self.problems: list[Problem] = []
        self._stack: list[_Frame] = []
        self._nodes = 0
        self._documents = 0
        self._resolver = YAML(typ="safe", pure=True).resolver

    def take(self, event: Event) -> None:
        line = event.start_mark.line + 1
        if isinstance(event, DocumentStartEvent):
            self._start_document(event, line)
        elif isinstance(event, (MappingEndEvent, SequenceEndEvent)):
            self._stack.pop()
        elif isinstance(event, NodeEvent):
            self._nodes += 1
            if self._nodes > MAX_NODES:
                raise _Stop(f"more than {MAX_NODES} entries; a recipe has a few dozen", line)
            self._take_node(event, line)

    def _start_document(self, event: DocumentStartEvent, line: int) -> None:
        self._documents += 1
        if self._documents > 1:
            raise _Stop("a second document begins here; a recipe is one document", line)
        if event.version not in (None, (1, 2)):
            raise _Stop("recipes are YAML 1.2; remove the %YAML line", line)

    def _take_node(self, event: NodeEvent, line: int) -> None:
        if self._awaits_key():
            self._take_key(event, line)
            return
        usable = self._check_node(event, line)
        if isinstance(event, AliasEvent):
            self._attach(None, line, keep=False)
        elif isinstance(event, ScalarEvent):
            self._attach(self._scalar(event), line, keep=usable)
        else:
            self._open({} if isinstance(event, MappingStartEvent) else [], line, keep=usable)

    def _awaits_key(self) -> bool:
        return bool(self._stack) and (
            isinstance(self._stack[-1].container, dict) and self._stack[-1].key is None
        )

    def _take_key(self, event: NodeEvent, line: int) -> None:
        frame = self._stack[-1]
        if not isinstance(event, ScalarEvent):
            raise _Stop("a key must be plain text", line, frame.path)
        frame.key = event.value
        path = (*frame.path, event.value)
        usable = self._check_node(event, line, path)
        first = frame.lines_of_keys.setdefault(event.value, line)
        frame.dropping = not usable or event.value in frame.container
        if frame.dropping and usable:
            self.problems.append(
                Problem(path=path, message=f"set twice, first on line {first}", line=line)
            )
        self.lines.setdefault(path, line)

    def _check_node(self, event: NodeEvent, line: int, path: KeyPath | None = None) -> bool:
        """Note what recipes do not use; False if the value cannot be used."""
        here = self._here() if path is None else path
        if isinstance(event, AliasEvent):
            message = (
                f"aliases such as *{_short(event.anchor)} are not allowed; write the value out"
            )
        elif (tag := getattr(event, "tag", None)) is not None:
            message = f"tags such as {_short(tag)} are not allowed"
        elif event.anchor is not None:
            message = f"anchors such as &{_short(event.anchor)} are not allowed"
        else:
            return True
        self.problems.append(Problem(path=here, message=message, line=line))
        return False

    def _here(self) -> KeyPath:
        """The path of the value that comes next."""
        if not self._stack:
            return ()
        frame = self._stack[-1]
        if isinstance(frame.container, list):
            return (*frame.path, len(frame.container))
        return (*frame.path, frame.key or "")

    def _open(self, container: dict[str, Any] | list[Any], line: int, *, keep: bool) -> None:
        path = self._here()
        if len(self._stack) >= MAX_DEPTH:
            raise _Stop(f"nested more than {MAX_DEPTH} levels deep", line, path[:2])
        self._attach(container, line, keep=keep)
        self._stack.append(_Frame(container=container, path=path))

    def _attach(self, value: Any, line: int, *, keep: bool) -> None:
        if not self._stack:
            self.root = value if keep else None
            return
        frame = self._stack[-1]
        if isinstance(frame.container, list):
            self.lines.setdefault(self._here(), line)
            frame.container.append(value)
            return
        if keep and not frame.dropping:
            frame.container[frame.key or ""] = value
        frame.key = None

    def _scalar(self, event: ScalarEvent) -> Any:
        if not event.implicit[0]:  # quoted, or a block of text
            return event.value
        return plain_value(
            self._resolver.resolve(ScalarNode, event.value, (True, False)), event.value
        )


def plain_value(tag: str, text: str) -> Any:
    """The value of an unquoted scalar that YAML resolved to `tag`; dates and the like stay text."""
    kind = str(tag).rpartition(":")[2]
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    digits = text.replace("_", "")
    try:
        if kind == "int":
            return int(digits, 0 if digits.lstrip("+-")[:2].lower() in ("0x", "0o", "0b") else 10)
        if kind == "float":
            return float(digits.lower().replace(".inf", "inf").replace(".nan", "nan"))
    except ValueError:  # thousands of digits, or no digit at all
        return text
    return text


def _odd_spaces(text: str, place: int) -> str:
    """The cure where a line cannot be read for characters that an editor shows as nothing."""
    line = text[text.rfind("\n", 0, place) + 1 :].partition("\n")[0]
    odd = odd_characters("".join(c for c in line if unicodedata.category(c)[0] in "ZC"))
    return f"; the line holds {odd}: type it anew" if odd else ""


def _short(text: object) -> str:
    return ascii(str(text))[1:-1][:60]
