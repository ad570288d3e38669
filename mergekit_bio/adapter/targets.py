"""Which modules a PEFT configuration targets, by name (the rules of PEFT's ``LoraConfig`` fields)."""

import re
from collections.abc import Iterable, Mapping
from typing import Any


def targeted(config: Mapping[str, Any], modules: Iterable[str]) -> set[str]:
    """The modules out of ``modules`` that ``target_modules`` and its companions choose.

    Args:
        config: ``adapter_config.json``: ``target_modules`` (list or regular expression), ``exclude_modules``,
            ``layers_to_transform`` and ``layers_pattern`` are read.
        modules: Dotted module names of the base.
    """
    return {
        module
        for module in modules
        if _matches(config.get("target_modules"), module)
        and not _matches(config.get("exclude_modules"), module)
        and _in_layers(config, module)
    }


def pattern_value(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The entry of ``rank_pattern`` or ``alpha_pattern`` whose key, a regular expression, ends ``module``."""
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _matches(wanted: Any, module: str) -> bool:
    if not wanted:
        return False
    if isinstance(wanted, str):
        return re.fullmatch(wanted, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in wanted)


def _in_layers(config: Mapping[str, Any], module: str) -> bool:
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    layers = [layers] if isinstance(layers, int) else layers
    patterns = config.get("layers_pattern") or [r"[^.]*"]
    patterns = [patterns] if isinstance(patterns, str) else patterns
    for pattern in patterns:
        layer = re.match(rf".*\.{pattern}\.(\d+)\.", module)
        if layer:
            return int(layer[1]) in layers
    return False
