"""YAML that remembers the line of every key, so that an error can name it."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mergekit_bio.errors import RecipeError
from mergekit_bio.plain_yaml import PlainLoader
from mergekit_bio.validation import Path as KeyPath

#: A recipe is three levels deep.
DEEPEST = 20


@dataclass(frozen=True)
class LocatedYaml:
    """A document and where its parts stand.

    Attributes:
        file: The file it came from.
        data: Mappings, lists and scalars.
        lines: Path of keys and indices -> line, counted from 1.
    """

    file: Path
    data: Any
    lines: dict[KeyPath, int]

    def locate(self, path: KeyPath) -> str:
        """``"file.yaml:12"``, the line of the path or of the nearest part above it."""
        while path and path not in self.lines:
            path = path[:-1]
        return f"{self.file}:{self.lines.get(path, 1)}"


class _Loader(PlainLoader):
    """Safe loading without aliases, which a recipe needs none of and can be made endless; yes and no are booleans.

    The reference's recipes are written for PyYAML, where ``do_sample: no`` is false.
    """

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(
                problem="aliases are not used in recipes", problem_mark=self.peek_event().start_mark
            )
        if self.depth > DEEPEST:
            raise yaml.MarkedYAMLError(problem="nested too deeply", problem_mark=self.peek_event().start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"(?:yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF)\Z"), list("yYnNoO")
)


def read_located_yaml(file: Path) -> LocatedYaml:
    """Read a YAML file whose keys are texts and occur once.

    Raises:
        RecipeError: The file cannot be read or is no such YAML; the line is named.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"{file}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{file}: is not UTF-8 text ({error.reason} at byte {error.start})") from None
    lines: dict[KeyPath, int] = {}
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        data = None if node is None else _value(loader, node, (), lines, file)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise RecipeError(
            f"{file}:{mark.line + 1 if mark else 1}: not YAML: {error.problem or error.context}"
        ) from None
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"{file}: not YAML: {' '.join(str(error).split())}") from None
    return LocatedYaml(file=file, data=data, lines=lines)


def _value(loader: _Loader, node: yaml.Node, path: KeyPath, lines: dict[KeyPath, int], file: Path) -> Any:
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.SequenceNode):
        return [_value(loader, child, (*path, index), lines, file) for index, child in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        value = loader.construct_object(node)
        if not isinstance(value, str | int | float | bool | None):
            raise RecipeError(f"{file}:{node.start_mark.line + 1}: not a value of a recipe: {node.tag}")
        return value
    mapping = {}
    for key_node, child in node.value:
        key = loader.construct_object(key_node) if isinstance(key_node, yaml.ScalarNode) else None
        line = key_node.start_mark.line + 1
        if not isinstance(key, str):
            raise RecipeError(f"{file}:{line}: a key must be a text")
        if key in mapping:
            raise RecipeError(f"{file}:{line}: the key '{key}' stands twice")
        lines[(*path, key)] = line
        mapping[key] = _value(loader, child, (*path, key), lines, file)
    return mapping
