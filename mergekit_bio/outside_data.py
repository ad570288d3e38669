"""The one reader of what others wrote: YAML, JSON, JSON lines and CSV into checked data.

Every fault is one line of one shape, ``FILE:LINE: KEY: what is wrong``, raised as the error class that the caller
names::

    document = read_yaml(Path("mine.yaml"), error=RecipeError)
    recipe = document.checked(Recipe)           # mine.yaml:4: generate.num_beam: unknown key; did you mean 'num_beams'?
    raise document.problem(("seed",), "sampling needs a seed of 0 or more")

    config = read_json(folder / "config.json")                              # a dict
    for row in read_rows(Path("metadata.csv"), error=DatasetError):         # a document a line, CSV or JSON lines
        row.data["label"]
"""

import csv
import io
import json
import re
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from difflib import get_close_matches
from functools import cache
from os import fspath
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from mergekit_bio.errors import CheckpointError, MergekitBioError

T = TypeVar("T")
#: Keys and indices that lead to a value: ``("datasets", 0, "path")``.
KeyPath = tuple[str | int, ...]

#: Goes into the body of a dataclass that comes from outside: unknown keys are errors, infinities no numbers.
FORBID_EXTRA = {"extra": "forbid", "allow_inf_nan": False}

#: A recipe is three levels deep. What is nested without end is somebody's attempt to exhaust us.
DEEPEST = 20


@dataclass(frozen=True)
class Document:
    """What a file, or one line of it, says, and where in it each value stands.

    Attributes:
        source: The file, or whatever else names where the text came from.
        data: Mappings with texts as keys, lists, texts, numbers, booleans and None.
        error: The class of the errors about it.
        lines: Path -> line, counted from 1; empty where lines are not known.
    """

    source: Path | str
    data: Any
    error: type[MergekitBioError]
    lines: dict[KeyPath, int] = field(default_factory=dict)

    def line(self, path: KeyPath = ()) -> str:
        """``"mine.yaml:12"``: the line of a value, or of the nearest value around it."""
        while path and path not in self.lines:
            path = path[:-1]
        return f"{self.source}:{self.lines.get(path, 1)}" if self.lines else str(self.source)

    def where(self, path: KeyPath = ()) -> str:
        """``"mine.yaml:12: datasets[0].path"``."""
        return f"{self.line(path)}: {dotted(path)}" if path else self.line()

    def problem(self, path: KeyPath, message: str) -> MergekitBioError:
        """The error to raise about a value: where it stands and what is wrong with it."""
        return self.error(f"{self.where(path)}: {message}")

    def checked(self, kind: type[T]) -> T:
        """The data as ``kind``; see :func:`checked`."""
        return checked(kind, self.data, error=self.error, where=self.where)


def dotted(path: KeyPath) -> str:
    """``("datasets", 0, "path")`` -> ``"datasets[0].path"``."""
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return text


def nearest(word: str, known: "list[str] | tuple[str, ...]") -> str:
    """What to add to "unknown ...": a suggestion, or the known words."""
    close = get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(known)}"


def changes(before: Any, now: Any) -> str:
    """What differs between two settings, nested by key: ``"generate.seed was 0 and is now 1; ..."``, three at most."""
    found = list(_changes(before, now, ()))
    return "; ".join(found[:3]) + ("; ..." if len(found) > 3 else "")


def _changes(before: Any, now: Any, path: KeyPath) -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted({*before, *now}):
            if before.get(key) != now.get(key) or (key in before) != (key in now):
                yield from _changes(before.get(key), now.get(key), (*path, key))
        return
    name = dotted(path)
    if isinstance(before, list) and isinstance(now, list):
        gone, new = ([value for value in one if value not in other] for one, other in ((before, now), (now, before)))
        if gone or new:
            parts = [f"{word} {_in_short(values)}" for word, values in (("lacks", gone), ("has", new)) if values]
            yield f"{name} now {' and '.join(parts)}"
            return
    yield f"{name} was {_in_short(before)} and is now {_in_short(now)}"


def _in_short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def is_text(value: Any) -> bool:
    """Whether it is a text that a file can hold: half of a surrogate pair comes through JSON's escapes and is none."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


# ---- reading


def read_text(file: Path, *, error: type[MergekitBioError]) -> str:
    """The text of a file, UTF-8 or with a byte order mark UTF-16, without that mark.

    Raises:
        error: It cannot be read, or is no such text.
    """
    try:
        content = file.read_bytes()
    except OSError as failure:
        raise error(f"{file}: cannot be read ({failure.strerror})") from None
    to_save = "; save it as 'CSV UTF-8' in Excel" if file.suffix == ".csv" else ""
    if content.startswith((b"PK\x03\x04", b"\xd0\xcf\x11\xe0")):
        raise error(f"{file}: is a workbook or an archive, not text{to_save}")
    try:
        # Excel's "Unicode text" is UTF-16.
        text = content.decode("utf-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig")
    except UnicodeDecodeError as failure:
        raise error(f"{file}: is not UTF-8 text ({failure.reason} at byte {failure.start}){to_save}") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_yaml(file: Path, *, error: type[MergekitBioError]) -> Document:
    """Read a YAML file; see :func:`parse_yaml`."""
    return parse_yaml(read_text(file, error=error), source=file, error=error)


def parse_yaml(text: str, *, source: Path | str, error: type[MergekitBioError]) -> Document:
    """Read YAML whose keys are texts and occur once, and remember the line of every value.

    A plain scalar is what it looks like in YAML 1.2's core schema (section 10.3.2), of its numbers the decimal ones:
    ``0:1:0.1`` and ``2026-01-01`` are texts, ``010`` is ten. Besides, yes, no, on and off are booleans: recipes of
    the reference are written for PyYAML, where ``do_sample: no`` is false. Aliases are refused: nobody needs them
    here, and a few of them can stand for gigabytes.

    Raises:
        error: It is no such YAML; the line is named.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    document = Document(source, None, error)
    try:
        # The parser's events come one after the other, so that neither depth nor aliases can exhaust us.
        events = iter(YAML(typ="safe", pure=True).parse(text))
        next(events)  # the stream's start
        data = None
        if type(next(events)).__name__ == "DocumentStartEvent":
            data = _yaml_value(events, next(events), (), document)
            next(events)  # the document's end
            if type(event := next(events)).__name__ == "DocumentStartEvent":
                raise _not_yaml(document, event, "there is a second document in it")
    except MarkedYAMLError as failure:
        mark = failure.problem_mark or failure.context_mark
        line = f"{source}:{mark.line + 1 if mark else 1}"
        raise error(f"{line}: not YAML: {_one_line(failure.problem or failure.context)}") from None
    except (YAMLError, ValueError) as failure:
        raise error(f"{source}: not YAML: {_one_line(failure)}") from None
    return Document(source, data, error, document.lines or {(): 1})


def to_yaml(data: Any) -> str:
    """Mappings, lists, tuples and scalars as YAML that :func:`parse_yaml` reads back.

    Texts stand in quotation marks where another reader might take them for something else.
    """
    from ruamel.yaml import YAML

    def text_node(representer: Any, text: str) -> Any:
        plain = _scalar_kind(text) == "str" and not re.match(r"[-+.\d=~]|[yYnN]$", text)
        # Only between double quotation marks are the line breaks of YAML 1.1 escaped; elsewhere they are folded.
        style = '"' if re.search("[\x85\u2028\u2029]", text) else None if plain else "'"
        return representer.represent_scalar(_YAML + "str", text, style=style)

    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.width = 1 << 16  # ruamel.yaml would leave a blank at the end of a broken line
    yaml.representer.add_representer(str, text_node)
    stream = io.StringIO()
    yaml.dump(data, stream)
    return stream.getvalue()


def read_json(file: Path, *, error: type[MergekitBioError] = CheckpointError) -> dict[str, Any]:
    """Read a file that holds one JSON object; most of them belong to checkpoints.

    Raises:
        error: It cannot be read or holds something else.
    """
    try:
        content = file.read_bytes()
    except OSError as failure:
        raise error(f"{file}: cannot be read ({failure.strerror})") from None
    return parse_json(content, source=str(file), error=error)


def parse_json(
    text: str | bytes, *, source: str, error: type[MergekitBioError], keys_once: bool = False
) -> dict[str, Any]:
    """Read one JSON object; with ``keys_once`` no key may stand in it twice, else the last one counts.

    Raises:
        error: It is something else; ``source`` says where it stands.
    """

    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if repeated := _twice([key for key, _ in pairs]):
            raise error(f"{source}: the key {_shown(repeated)} stands twice")
        return dict(pairs)

    try:
        document = json.loads(text, object_pairs_hook=distinct if keys_once else None)
    except (ValueError, RecursionError) as failure:
        raise error(f"{source}: is not valid JSON ({failure}): {_shown(text)}") from None
    if not isinstance(document, dict):
        raise error(f"{source}: is not a JSON object: {_shown(text)}")
    return document


def read_rows(file: Path, *, error: type[MergekitBioError]) -> Iterator[Document]:
    """Read a table line by line: a JSON object a line where the name ends in ``.jsonl``, else CSV with a header.

    CSV's values may be separated by commas, semicolons or tabs, as spreadsheets write them: by what there is most of in
    the header.

    Yields:
        For each row that is not blank its mapping and its first line. All values of CSV are texts.

    Raises:
        error: The file cannot be read, a line is damaged, or a column or key stands twice; the line is named.
    """
    text = read_text(file, error=error)
    if file.suffix == ".jsonl":
        # Not splitlines: a JSON text may hold other line separators than the newline.
        for line_number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                row = parse_json(line, source=f"{file}:{line_number}", error=error, keys_once=True)
                yield Document(file, row, error, {(): line_number})
        return
    # 1. What separates values: Excel may say it in a line of its own.
    said = re.match(r'"?sep=(.)"?\n', text)
    header = next((line for line in text.split("\n") if line.strip()), "")
    separator = said[1] if said else max(",;\t", key=re.sub(r'"[^"]*"', "", header).count)
    # 2. Each row begins on the line behind the one before, however many lines that takes.
    before = 1 if said else 0
    lines = io.StringIO(text[said.end() :] if said else text, newline="")
    reader = csv.reader(lines, delimiter=separator, strict=True)
    columns: list[str] | None = None
    try:
        first_line = before + 1
        for values in reader:
            document = Document(file, None, error, {(): first_line})
            first_line = before + reader.line_num + 1
            if not any(value.strip() for value in values):
                continue
            if columns is None:
                columns = values
                if repeated := _twice([column.strip() for column in columns]):
                    raise document.problem((), f"the column {_shown(repeated)} stands twice")
                continue
            if len(values) != len(columns):
                raise document.problem((), f"{'more' if len(values) > len(columns) else 'fewer'} values than columns")
            yield replace(document, data=dict(zip(columns, values, strict=True)))
    except csv.Error as failure:
        raise error(f"{file}:{before + reader.line_num}: damaged ({failure})") from None


def _twice(names: list[str]) -> str:
    """The first of some names that stands there twice; empty where none does."""
    return next((name for index, name in enumerate(names) if name and name in names[:index]), "")


def _shown(text: str | bytes) -> str:
    text = text if isinstance(text, str) else text[:400].decode(errors="replace")
    return repr(text[:60].strip() + ("..." if len(text) > 60 else ""))


def _one_line(text: object) -> str:
    return " ".join(str(text).split())


# ---- YAML: events to values

_YAML = "tag:yaml.org,2002:"
_TRUE, _FALSE = r"true|True|TRUE|yes|Yes|YES|on|On|ON", r"false|False|FALSE|no|No|NO|off|Off|OFF"
#: What a plain scalar is: the first of these whose pattern is the whole of it, else a text.
_SCALARS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "null": (r"~|null|Null|NULL|", lambda text: None),
    "bool": (f"{_TRUE}|{_FALSE}", lambda text: re.fullmatch(_TRUE, text) is not None),
    "int": (r"[-+]?[0-9]+", int),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        lambda text: float(text.lower().replace(".inf", "inf").replace(".nan", "nan")),
    ),
    "str": (r"(?s:.*)", str),
}


def _yaml_value(events: Iterator[Any], event: Any, path: KeyPath, document: Document) -> Any:
    """The value that begins with ``event``, its lines noted in the document's ``lines``."""
    document.lines.setdefault(path, event.start_mark.line + 1)
    kind = type(event).__name__
    if kind == "AliasEvent":
        raise _not_yaml(document, event, "aliases are not used here")
    if len(path) > DEEPEST:
        raise _not_yaml(document, event, "nested too deeply")
    if kind == "ScalarEvent":
        return _yaml_scalar(event, document)
    if kind == "SequenceStartEvent":
        values: list[Any] = []
        while type(event := next(events)).__name__ != "SequenceEndEvent":
            values.append(_yaml_value(events, event, (*path, len(values)), document))
        return values
    mapping: dict[str, Any] = {}
    while type(event := next(events)).__name__ != "MappingEndEvent":
        line = f"{document.source}:{event.start_mark.line + 1}"
        key = _yaml_scalar(event, document) if type(event).__name__ == "ScalarEvent" else None
        if not isinstance(key, str):
            raise document.error(f"{line}: a key must be a text")
        if key in mapping:
            raise document.error(f"{line}: the key '{key}' stands twice")
        # The key's line: a long value begins on the next one.
        document.lines[(*path, key)] = event.start_mark.line + 1
        mapping[key] = _yaml_value(events, next(events), (*path, key), document)
    return mapping


def _yaml_scalar(event: Any, document: Document) -> Any:
    name, tag = _scalar_kind(event.value), event.tag
    if not event.implicit[0]:  # it stands in quotation marks, or after a tag
        name = "str" if tag in (None, "!") else tag.removeprefix(_YAML)
    if name not in _SCALARS or not re.fullmatch(_SCALARS[name][0], event.value):
        raise _not_yaml(document, event, f"could not determine a constructor for the tag '{tag}'")
    return _SCALARS[name][1](event.value)


def _scalar_kind(text: str) -> str:
    return next(name for name, (pattern, _) in _SCALARS.items() if re.fullmatch(pattern, text))


def _not_yaml(document: Document, event: Any, message: str) -> MergekitBioError:
    return document.error(f"{document.source}:{event.start_mark.line + 1}: not YAML: {message}")


# ---- checking


def checked(kind: type[T], data: Any, *, error: type[MergekitBioError], where: Callable[[KeyPath], str]) -> T:
    """Turn mappings, lists and scalars into ``kind``, strictly: no text becomes a number, no number a text.

    Args:
        kind: A dataclass. With ``FORBID_EXTRA`` as its ``__pydantic_config__`` it and those in it refuse unknown keys.
        data: JSON-like values; paths may stand for texts.
        error: What to raise.
        where: Where a path of keys and indices stands, for the message: "file.yaml:12: datasets[0]".

    Raises:
        error: One line: where, which key, what is wrong and what was there; for an unknown key the nearest one.
    """
    from pydantic import ValidationError

    try:
        # Strict validation takes a list for a tuple only when it comes as JSON.
        return _validator(cast(Any, kind)).validate_json(json.dumps(data, default=fspath), strict=True)
    except ValidationError as failure:
        problems = [(problem, _place(problem, data)) for problem in failure.errors(include_url=False)]
    # An unknown key explains a missing one, seldom the other way round. Of the members of a union the one was meant
    # into which the data fits the furthest.
    problem, path = min(problems, key=lambda item: (item[0]["type"] not in _UNKNOWN_KEY, -len(item[1])))
    if problem["type"] in _UNKNOWN_KEY:
        message = f"unknown key{nearest(str(path[-1]), _keys_at(kind, path[:-1]))}"
    elif problem["type"] == "missing":
        message = "is missing"
    elif problem["type"] == "json_invalid":  # json.dumps wrote it, so that only texts can be at fault
        path, message = _no_text(data) or (), "holds half of a surrogate pair, which is no text"
    else:
        message = problem["msg"][0].lower() + problem["msg"][1:]
        if not isinstance(problem["input"], dict | list):
            message += f", not {_shown(json.dumps(problem['input'], default=fspath))[1:-1]}"
    raise error(f"{where(path)}: {message}")


_UNKNOWN_KEY = ("unexpected_keyword_argument", "extra_forbidden")


@cache
def _validator(kind: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _place(problem: Any, data: Any) -> KeyPath:
    """Where in the data pydantic's problem is: its location without the names of a union's members."""
    path: KeyPath = ()
    for step in problem["loc"]:
        parts = data if isinstance(data, dict) else dict(enumerate(data)) if isinstance(data, list | tuple) else {}
        if step in parts:
            path, data = (*path, step), parts[step]
    return (*path, problem["loc"][-1]) if problem["type"] == "missing" else path


def _no_text(data: Any) -> KeyPath | None:
    """The path of a text or key that is not one (see ``is_text``); None where there is none."""
    if isinstance(data, str):
        return None if is_text(data) else ()
    parts = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list | tuple) else ()
    for key, value in parts:
        if isinstance(key, str) and not is_text(key):
            return ()
        path = _no_text(value)
        if path is not None:
            return (key, *path)
    return None


def _keys_at(kind: Any, path: KeyPath) -> list[str]:
    """The keys that may stand at ``path`` below ``kind``."""
    kinds = _members(kind)
    for step in path:
        below = []
        for member in kinds:
            keys = _keys(member)
            if keys:
                below += [keys[step]] if step in keys else []
            else:
                below += [argument for argument in get_args(member) if argument is not Ellipsis][-1:]
        kinds = [member for child in below for member in _members(child)]
    return [str(key) for member in kinds for key in _keys(member)]


def _keys(kind: Any) -> dict[str | int, Any]:
    """Key -> type of a dataclass; empty for other types."""
    hints = get_type_hints(kind, include_extras=True) if is_dataclass(kind) else {}
    return {part.name: hints[part.name] for part in (fields(kind) if hints else ())}


def _members(kind: Any) -> list[Any]:
    """The types that ``kind`` may be: the members of a union, without ``Annotated``."""
    if get_origin(kind) is Annotated:
        return _members(get_args(kind)[0])
    if get_origin(kind) in (Union, types.UnionType):
        return [member for argument in get_args(kind) for member in _members(argument)]
    return [kind]
