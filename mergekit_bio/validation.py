"""Outside data into plain dataclasses: pydantic checks, we say where it is wrong in one line."""

import json
import types
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from mergekit_bio.errors import MergekitBioError

T = TypeVar("T")
Path = tuple[str | int, ...]

#: Goes into the body of a dataclass that comes from outside: unknown keys are errors, infinities no numbers.
FORBID_EXTRA = {"extra": "forbid", "allow_inf_nan": False}


def dotted(path: Path) -> str:
    """``("datasets", 0, "path")`` -> ``"datasets[0].path"``."""
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return text


def validated(
    kind: type[T],
    data: Any,
    *,
    error: type[MergekitBioError],
    locate: Callable[[Path], str],
    named: Callable[[Path], str] = dotted,
) -> T:
    """Turn mappings, lists and scalars into ``kind``, strictly: no text becomes a number, no number a text.

    Args:
        kind: A frozen dataclass with ``__pydantic_config__ = FORBID_EXTRA``.
        data: JSON-like values.
        error: What to raise.
        locate: Where a path of keys and indices stands, for the message ("file.yaml:12").
        named: What is written there, where it is not the path itself.

    Raises:
        error: One line: where, which key, what is wrong, and for an unknown key the nearest one.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        # Strict validation takes a list for a tuple only when it comes as JSON.
        return TypeAdapter(kind).validate_json(json.dumps(data), strict=True)
    except ValidationError as failure:
        # An unknown key explains a missing one, seldom the other way round.
        problem = min(failure.errors(include_url=False), key=lambda item: item["type"] != "unexpected_keyword_argument")
    path = tuple(step for step in problem["loc"] if _occurs(step, data))
    name = named(path)
    if problem["type"] == "unexpected_keyword_argument":
        message = f"unknown key{nearest(str(path[-1]), _keys_at(kind, path[:-1]))}"
    elif problem["type"] == "missing":
        name, message = named((*path, problem["loc"][-1])), "is missing"
    else:
        message = problem["msg"][0].lower() + problem["msg"][1:]
    raise error(f"{locate(path)}: {name + ': ' if name else ''}{message}")


def is_text(value: Any) -> bool:
    """Whether it is a text that a file can hold: a lone surrogate comes through JSON's escapes, and goes nowhere."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def nearest(word: str, known: "list[str] | tuple[str, ...]") -> str:
    """What to add to "unknown ...": a suggestion, or the known words."""
    close = get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(known)}"


def _occurs(step: str | int, data: Any) -> bool:
    """Whether a step of pydantic's path is one of the data, and not the name of a member of a union."""
    if isinstance(data, dict):
        return step in data or any(_occurs(step, value) for value in data.values())
    if isinstance(data, list):
        return isinstance(step, int) or any(_occurs(step, value) for value in data)
    return False


def _keys_at(kind: Any, path: Path) -> list[str]:
    """The keys that the dataclass at ``path`` below ``kind`` knows."""
    for step in path:
        kind = _plain(kind)
        hints = get_type_hints(kind, include_extras=True) if is_dataclass(kind) else {}
        kind = hints[str(step)] if hints else get_args(kind)[0]
    kind = _plain(kind)
    return [field.name for field in fields(kind)] if is_dataclass(kind) else []


def _plain(kind: Any) -> Any:
    """Without ``Annotated`` and without ``| None``."""
    while True:
        if get_origin(kind) is Annotated:
            kind = get_args(kind)[0]
        elif get_origin(kind) in (Union, types.UnionType):
            kind = next(member for member in get_args(kind) if member is not type(None))
        else:
            return kind
