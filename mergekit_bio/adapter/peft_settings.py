"""Judges ``adapter_config.json``: what may change the merged weights is known here, or refused by its name."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mergekit_bio.adapter.interface import Base
from mergekit_bio.adapter.peft_kind import PeftKind
from mergekit_bio.checkpoint.source import is_hub_id
from mergekit_bio.errors import AdapterError

# Settings of all kinds that are read here, or that do not change what the merged weights are.
_SETTINGS = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "dynamic_lora", "exclude_modules", "inference_mode",
    "layers_pattern", "layers_to_transform", "modules_to_save", "peft_type", "peft_version", "r", "rank_pattern",
    "revision", "runtime_config", "target_modules", "task_type", "trainable_token_indices",
}  # fmt: skip
# What other tools write beside them, about training or themselves: ms-swift (LoRA+ is another learning rate), and PEFT
# of before 0.4.
_HARMLESS = {"lora_dtype", "lorap_emb_lr", "lorap_lr_ratio", "merge_weights", "model_key_mapping", "swift_type"}
_QUANTIZED = re.compile(r"(?i)(^|[-_./])(bnb|nf4|gptq|awq|hqq|fp8|int[248]|[248][-_]?bits?)($|[-_./])")


def check_settings(config: Mapping[str, Any], where: Path, kinds: Mapping[str, PeftKind]) -> PeftKind:
    """The kind of adapter, if every setting is one that it knows.

    Args:
        config: ``adapter_config.json``.
        where: That file, for messages.
        kinds: ``peft_type`` -> how such an adapter is read.

    Raises:
        AdapterError: The kind or a setting is not known.
    """
    peft_type = config.get("peft_type")
    kind = kinds.get(str(peft_type))
    if kind is None:
        known = ", ".join(kinds)
        raise AdapterError(f"{where}: peft_type {peft_type!r} cannot be folded; only {known} (with its variants) can")
    for key, value in config.items():
        if key not in _SETTINGS | kind.SETTINGS and not _is_harmless(key, value):
            raise AdapterError(f"{where}: {key} = {value!r} cannot be folded into plain weights by this version")
    return kind


def settings_notes(config: Mapping[str, Any], kind: PeftKind, base: Base) -> Iterator[str]:
    """What a user should know about the settings."""
    others = {key: value for key, value in config.items() if key not in _SETTINGS | kind.SETTINGS and value}
    if others:
        stated = ", ".join(f"{key} = {value!r}" for key, value in others.items())
        yield f"settings of another tool's, which do not change the weights: {stated}"
    trained_on = config.get("base_model_name_or_path")
    if not isinstance(trained_on, str) or not trained_on:
        return
    if _QUANTIZED.search(trained_on):
        yield (
            f"it was trained on {trained_on}, whose weights are quantized; on {base.source.given} it answers a little "
            "differently"
        )
    elif not _same_model(trained_on, base) and is_hub_id(trained_on) and not Path(trained_on).is_dir():
        yield f"it was trained on {trained_on}, by its own word; this merge's base is {base.source.given}"


def _is_harmless(key: str, value: Any) -> bool:
    if value in (None, False, [], {}, "") or key in _HARMLESS:
        return True
    return key.endswith("version") and isinstance(value, str)


def _same_model(trained_on: str, base: Base) -> bool:
    # Meta has renamed its repositories, and copies keep the last part of the name.
    name = trained_on.split("/")[-1].lower().removeprefix("meta-")
    return name in {base.source.name.lower().removeprefix("meta-"), base.source.path.name.lower()}
