"""Compares what an adapter's configuration promises with what its file holds."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mergekit_bio.adapter.interface import Base
from mergekit_bio.adapter.layers import is_built, stack_of
from mergekit_bio.adapter.names import differing_beginnings
from mergekit_bio.errors import AdapterError


def check_targets(config: Mapping[str, Any], adapted: Mapping[str, str], base: Base, where: Path) -> Iterator[str]:
    """Make sure that the file has a part for every module that ``target_modules`` chooses in the base.

    Args:
        config: ``adapter_config.json``.
        adapted: Every module with a part in the file, as the adapter names it -> as the base does.
        base: What the adapter is for.
        where: The configuration's file, for messages.

    Yields:
        Notes on modules that it was perhaps not trained on, such as a tower beside the language model.

    Raises:
        AdapterError: ``target_modules`` chooses nothing, or modules among adapted ones that have no part.
    """
    if config.get("target_modules") in (None, "all-linear"):
        return
    # 1. Name the base's modules as the adapter does: patterns are about those names.
    modules = {
        name.removesuffix(".weight")
        for name, info in base.checkpoint.tensors.items()
        if name.endswith(".weight") and len(info.shape) == 2 and is_built(name, base)
    }
    if base.tied:
        modules.add(str(base.head).removesuffix(".weight"))
    named = _as_the_adapter_names(modules, adapted)
    # 2. Choose among them by PEFT's rules.
    try:
        wanted = {name: module for name, module in named.items() if _is_targeted(config, name)}
    except re.error as error:
        raise AdapterError(f"{where}: target_modules is not a regular expression: {error}") from error
    if not wanted:
        raise AdapterError(
            f"{where}: target_modules {config['target_modules']!r} match no module of the base {base.source.given}; "
            "this adapter was made for another model"
        )
    # 3. A stack of layers of which nothing is adapted may be no part of what was trained; a layer of one that is must
    # not be missing.
    missing = sorted(set(wanted.values()) - set(adapted.values()))
    stacks = {(), *map(stack_of, adapted.values())} if missing else set()
    lost = [module for module in missing if stack_of(module) in stacks]
    if lost:
        raise AdapterError(
            f"{where.parent}: target_modules name {lost[0]} of the base, but the file holds no LoRA for it "
            f"({len(lost)} such); the adapter is incomplete"
        )
    for stack, count in Counter(".".join(stack_of(module)) for module in missing).items():
        yield f"it has nothing for {stack}, of which its target_modules name {count} modules; they stay the base's"


def promise_notes(
    config: Mapping[str, Any], adapted: Mapping[str, str], changed: Iterable[str], base: Base
) -> Iterator[str]:
    """What the configuration says was trained, and the file does not hold.

    Args:
        config: ``adapter_config.json``.
        adapted: As for :func:`check_targets`.
        changed: Tensors of the base that the adapter brings whole, or rows of.
        base: What the adapter is for.
    """
    changed, tensors = set(changed), base.checkpoint.tensors
    bias = config.get("bias", "none")
    of_modules = {f"{module}.bias" for module in adapted.values()}
    biases = {name for name in tensors if name.endswith(".bias") and (bias == "all" or name in of_modules)}
    if bias in ("all", "lora_only") and biases and not biases & changed:
        yield f"its configuration says bias {bias!r}, but its file holds no biases; they stay the base's"
    for module in config.get("modules_to_save") or ():
        pattern = re.compile(rf"(^|.*\.){re.escape(str(module))}\..*")
        of_module = {name for name in (*tensors, str(base.head)) if pattern.match(name)}
        ends = {base.input_embedding, base.head} if base.shared else set()
        if of_module and not (of_module | (ends if of_module & ends else set())) & changed:
            yield f"its configuration says that {module} was trained, but its file lacks it; it stays the base's"
    if config.get("trainable_token_indices") and not {base.input_embedding, base.head} & changed:
        yield "its configuration has trainable_token_indices, but its file holds no rows; they stay the base's"


def _as_the_adapter_names(modules: Iterable[str], adapted: Mapping[str, str]) -> dict[str, str]:
    """The base's modules by the adapter's names: known ones, and others with a beginning that these have."""
    known = {theirs: ours for ours, theirs in adapted.items()}
    beginnings = {theirs: ours for ours, theirs in differing_beginnings(adapted).items()}
    longest_first = sorted(beginnings, key=len, reverse=True)

    def named(module: str) -> str:
        if module in known:
            return known[module]
        start = next((start for start in longest_first if f"{module}.".startswith(f"{start}." if start else "")), None)
        if start is None:
            return module
        return f"{beginnings[start]}.{module[len(start) :].lstrip('.')}".strip(".")

    return {named(module): module for module in modules}


def _is_targeted(config: Mapping[str, Any], module: str) -> bool:
    """Whether PEFT adapts a module (``check_target_module_exists`` of PEFT 0.21)."""
    if _matches(config.get("exclude_modules"), module):
        return False
    if any(re.match(rf"(^|.*\.){saved}($|\..*)", module) for saved in config.get("modules_to_save") or ()):
        return False
    return _matches(config.get("target_modules"), module) and _in_layers(config, module)


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
    patterns = config.get("layers_pattern") or []
    patterns = [patterns] if isinstance(patterns, str) else patterns
    beginnings = [rf"(?:^|.*?\.){pattern}" for pattern in patterns] or [r".*?\.[^.]*"]
    found = (re.match(rf"{beginning}\.(\d+)\.", module) for beginning in beginnings)
    layer = next((match for match in found if match), None)
    return layer is not None and int(layer[1]) in layers
