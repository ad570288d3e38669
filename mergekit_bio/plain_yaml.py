"""YAML whose scalars are what they look like.

PyYAML follows YAML 1.1, where ``0:1:0.1`` is the number 60.1, ``010`` is 8, ``no`` is false and ``2026-01-01`` a date.
Here they are read by YAML 1.2's core schema (section 10.3.2), of its numbers the decimal ones: true, false, null, and
texts. Merge keys (``<<``) stay.
"""

import re

import yaml

_CORE = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+", list("-+0123456789")),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    "merge": ("<<", ["<"]),
}


class PlainLoader(yaml.SafeLoader):
    """Safe loading by the core schema."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012 - PyYAML's own, filled below


for _name, (_pattern, _first) in _CORE.items():
    PlainLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(rf"(?:{_pattern})\Z"), _first)
PlainLoader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))
