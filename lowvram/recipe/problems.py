"""What is wrong with a recipe, in words: what was found, what is allowed, what to do."""

from __future__ import annotations

import difflib
import math
import types
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from lowvram.recipe.schema import Recipe, Wanted
from lowvram.recipe.text import KeyPath, Problem
from lowvram.terminal import odd_characters

LONGEST_VALUE = 80

# What other tools call a key; difflib cannot know.
ELSEWHERE = {
    "lr": "train.learning_rate",
    "batch_size": "train.global_batch_size",
    "train_batch_size": "train.global_batch_size",
    "per_device_train_batch_size": "fit.micro_batch_size",
    "block_size": "fit.max_seq_len",
    "max_length": "fit.max_seq_len",
    "max_seq_length": "fit.max_seq_len",
    "seq_len": "fit.max_seq_len",
    "activation_checkpointing": "fit.gradient_checkpointing",
    "num_train_epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "lr_scheduler_type": "train.schedule",
    "warmup_ratio": "train.warmup_steps",
    "optim": "train.optimizer",
    "r": "method.rank",
    "lora_r": "method.rank",
    "lora_alpha": "method.alpha",
    "lora_dropout": "method.dropout",
    "model_name_or_path": "model.name",
    "load_in_4bit": "model.dtype",
    "load_in_8bit": "model.dtype",
    "attn_implementation": "model.attention",
}
SPOKEN_BOOLEANS = {"yes": "true", "on": "true", "no": "false", "off": "false"}


@cache
def known_keys() -> Mapping[str, FieldInfo]:
    """Every key that takes a value, dotted: train.learning_rate, output_dir."""
    found: dict[str, FieldInfo] = {}
    for name, field in Recipe.model_fields.items():
        keys = section_keys(name)
        found.update({f"{name}.{key}": inner for key, inner in keys.items()} or {name: field})
    return found


def section_keys(name: str) -> Mapping[str, FieldInfo]:
    """Fields of a section; empty if `name` is none."""
    field = Recipe.model_fields.get(name)
    section = field.annotation if field else None
    if isinstance(section, type) and issubclass(section, BaseModel):
        return section.model_fields
    return {}


def show(value: object) -> str:
    """A value as the recipe would spell it: one line, at most about 80 characters, no controls."""
    match value:
        case None | True | False:
            return {None: "null", True: "true", False: "false"}[value]
        case list() | tuple():
            # Twenty items fill the room; what follows is cut anyway.
            more = ["..."] if len(value) > 20 else []
            text = "[" + ", ".join([show(item) for item in value[:20]] + more) + "]"
        case dict():
            text = "{" + ", ".join(f"{show_key(key)}: ..." for key in list(value)[:20]) + "}"
        case str():
            text = repr(value[:LONGEST_VALUE])
        case int() if value.bit_length() > 256:
            text = "a number of more than 77 digits"
        case _:
            text = repr(value)
    too_long = len(text) > LONGEST_VALUE or (isinstance(value, str) and len(value) > LONGEST_VALUE)
    return text[: LONGEST_VALUE - 3] + "..." if too_long else text


def show_key(key: object) -> str:
    text = str(key)
    return text if text.isprintable() and 0 < len(text) <= LONGEST_VALUE else show(text)


def show_path(path: KeyPath) -> str:
    shown = ""
    for part in path:
        shown += f"[{part}]" if isinstance(part, int) else f".{show_key(part)}"
    return shown.removeprefix(".")


def allowed(kind: Any, metadata: Iterable[Any] = ()) -> str:
    """What a field's type and bounds allow, in words."""
    kind, notes = _unwrap(kind, metadata)
    for note in notes:
        if isinstance(note, Wanted):
            return note.words
    if get_origin(kind) in (Union, types.UnionType):
        options = [allowed(option) for option in get_args(kind)]
        words = {option for option in options if option.startswith(("a ", "text"))}
        choices = ", ".join(option for option in options if option not in words)
        return ", or ".join(filter(None, [choices, *(o for o in options if o in words)]))
    if get_origin(kind) is Literal:
        return ", ".join(get_args(kind))
    if get_origin(kind) is tuple:
        return _list_words(get_args(kind), notes)
    return {
        type(None): "null",
        bool: "true, false",
        int: "a whole number" + _range_words(notes),
        float: "a number" + _range_words(notes),
        str: "text" + (", not empty" if _minimum_length(notes) else ""),
    }[kind]


def _unwrap(kind: Any, metadata: Iterable[Any]) -> tuple[Any, list[Any]]:
    """The type inside Annotated, and all that was annotated."""
    notes = list(metadata)
    while get_origin(kind) is Annotated:
        kind, *inner = get_args(kind)
        for item in inner:
            notes += item.metadata if isinstance(item, FieldInfo) else [item]
    return kind, notes


def _list_words(kinds: tuple[Any, ...], notes: list[Any]) -> str:
    if Ellipsis not in kinds:
        return f"a list of {len(kinds)}, each {allowed(kinds[0])}"
    return "a list of one or more texts" if _minimum_length(notes) else "a list of texts"


def _minimum_length(notes: list[Any]) -> int:
    return max([note.min_length for note in notes if isinstance(note, MinLen)], default=0)


def _range_words(notes: list[Any]) -> str:
    low = high = ""
    for note in notes:
        match note:
            case Ge(ge=bound):
                low = f"of at least {bound}"
            case Gt(gt=bound):
                low = f"above {bound}"
            case Le(le=bound):
                high = f"at most {bound}"
            case Lt(lt=bound):
                high = f"below {bound}"
    return "".join(f" {words}" for words in (low, "and" if low and high else "", high) if words)


def _item_of(kind: Any) -> Any:
    """The type of the items of the list that a field may be."""
    kind, _ = _unwrap(kind, ())
    if get_origin(kind) in (Union, types.UnionType):
        return next(item for option in get_args(kind) if (item := _item_of(option)))
    return get_args(kind)[0] if get_origin(kind) is tuple else None


def unknown_key(key: str) -> str:
    """The message for a dotted key that no recipe has."""
    section, _, name = key.rpartition(".")
    if not section and section_keys(key):
        return f"is a section; set one of its keys, such as {key}.{next(iter(section_keys(key)))}"
    odd = odd_characters(key)
    unknown = "unknown key" + (f" with {odd}" if odd else "")
    suggestion = _closest_key(section, name)
    if suggestion:
        return f"{unknown}. Did you mean {suggestion}?"
    if section_keys(section):
        return f"{unknown}. Keys of {section}: {', '.join(section_keys(section))}"
    return f"{unknown}. Keys: {', '.join(Recipe.model_fields)}"


def _closest_key(section: str, name: str) -> str | None:
    keys = list(known_keys())
    if name in ELSEWHERE:
        return ELSEWHERE[name]
    same_name = [key for key in keys if key.rpartition(".")[2] == name]
    if same_name:
        return same_name[0]
    inside = difflib.get_close_matches(name, section_keys(section), n=1, cutoff=0.7)
    if inside:
        return f"{section}.{inside[0]}"
    dotted = f"{section}.{name}".removeprefix(".")
    tops = [*Recipe.model_fields, *keys] if not section else keys
    return next(iter(difflib.get_close_matches(dotted, tops, n=1, cutoff=0.75)), None)


def describe_errors(errors: list[ErrorDetails], values: Mapping[str, Any]) -> list[Problem]:
    """One problem for each key that pydantic complains about, however often it does."""
    by_key: dict[KeyPath, list[ErrorDetails]] = {}
    for error in errors:
        depth = 2 if section_keys(str(error["loc"][0])) else 1
        by_key.setdefault(error["loc"][:depth], []).append(error)
    return [_describe(path, found, values) for path, found in by_key.items()]


def _describe(path: KeyPath, errors: list[ErrorDetails], values: Mapping[str, Any]) -> Problem:
    key = ".".join(str(part) for part in path)
    # Deeper ones are about items of a list.
    kinds = {error["type"] for error in errors if error["loc"] == path}
    if "extra_forbidden" in kinds:
        return Problem(path=path, message=unknown_key(key))
    if "missing" in kinds:
        return Problem(path=path, message="required key is missing")
    value: Any = values
    for part in path:
        value = value[part]
    field = known_keys().get(key)
    if field is None:
        keys = ", ".join(section_keys(key))
        return Problem(
            path=path, message=f"found {show(value)}, allowed: a section with keys {keys}"
        )
    own = [error for error in errors if error["type"] == "value_error"]
    if own:
        return Problem(path=path, message=f"found {show(value)}: {own[0]['ctx']['error']}")
    for error in errors:
        index = error["loc"][-1]
        if isinstance(value, (list, tuple)) and isinstance(index, int) and index < len(value):
            words = f"found {show(error['input'])}, allowed: {allowed(_item_of(field.annotation))}"
            return Problem(path=(*path, index), message=words)
    words = f"found {show(value)}, allowed: {allowed(field.annotation, field.metadata)}"
    return Problem(path=path, message=words + _cure(value, field))


def _cure(value: object, field: FieldInfo) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return "; it must be finite"
    odd = odd_characters(value[:LONGEST_VALUE]) if isinstance(value, str) else ""
    return (f"; it has {odd}" if odd else "") + _close_value(value, field, plain=not odd)


def _close_value(value: object, field: FieldInfo, *, plain: bool) -> str:
    """What may have been meant; characters that are not ASCII are none of a number."""
    kinds = _kinds(field.annotation)
    choices = [kind for kind in kinds if isinstance(kind, str)]
    if isinstance(value, float) and int in kinds and value.is_integer():
        return f"; write {int(value)}" if abs(value) < 1e15 else ""
    if (
        isinstance(value, (int, float))
        and str in kinds
        and not any(isinstance(note, Wanted) for note in field.metadata)
    ):
        return "; put it in quotes"
    if not isinstance(value, str):
        return ""
    if bool in kinds and value.lower() in SPOKEN_BOOLEANS:
        return f"; did you mean {SPOKEN_BOOLEANS[value.lower()]}?"
    close = difflib.get_close_matches(value.lower()[:LONGEST_VALUE], choices, n=1)
    if close:
        return f"; did you mean {close[0]}?"
    if plain and kinds & {int, float} and _is_number(value):
        return "; remove the quotes"
    if tuple in kinds and value:
        return f"; did you mean [{show_key(value)}]?"
    return ""


def _kinds(annotation: Any) -> set[Any]:
    """Types and words that a value may be: {int, "auto"}."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _kinds(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return set().union(*(_kinds(option) for option in get_args(annotation)))
    if origin is Literal:
        return set(get_args(annotation))
    return {origin or annotation}


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
