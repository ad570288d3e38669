"""Everything of a checkpoint directory that is not weights: config, index, tokenizer, licences."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergekit_bio.adapter.adapter import Adapter
from mergekit_bio.checkpoint.checkpoint import INDEX, inside, read_json
from mergekit_bio.checkpoint.source import licence_files
from mergekit_bio.merging.plan import MergePlan, Output
from mergekit_bio.model.layout import merged_config, processor_config

_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_COMPANIONS = (*_TOKENIZER, "generation_config.json")


def write_companions(plan: MergePlan, folder: Path) -> None:
    """Write config, tokenizer and licence files of a merged checkpoint into ``folder``.

    Raises:
        CheckpointError: The base's config is missing or damaged.
    """
    for name in _COMPANIONS:
        origin = _tokenizer_source(plan) if name in _TOKENIZER else plan.base.source.path
        if (origin / name).is_file():
            shutil.copyfile(inside(origin, name), folder / name)
    for licence in licence_files(plan.base.source):
        shutil.copyfile(inside(plan.base.source.path, licence), folder / licence)
    for adapter in plan.adapters:
        for licence in licence_files(adapter.source):
            shutil.copyfile(inside(adapter.source.path, licence), folder / f"{adapter.source.name}-{licence}")
    config = _text_config(plan)
    towers = [adapter for adapter in plan.adapters if adapter.tower and not plan.text_only]
    for adapter in towers:
        tokenizer = read_json(inside(_tokenizer_source(plan), "tokenizer.json"))
        ears = dict(adapter.config)
        processor = processor_config(text_config=config, naturelm_config=ears, tokenizer=tokenizer)
        _write_json(folder / "processor_config.json", processor)
        config = merged_config(text_config=config, naturelm_config=ears, tokenizer=tokenizer)
    _write_json(folder / "config.json", config)


def write_index(plan: MergePlan, output: Output, folder: Path) -> None:
    """Write the index of a checkpoint of several shards."""
    if len(output.files) == 1:
        return
    held = plan.files_of(output)
    weight_map = {name: file for file, shard in held.items() for name in shard.tensors}
    total = sum(shard.size - len(shard.header) for shard in held.values())
    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


def _tokenizer_source(plan: MergePlan) -> Path:
    """The base's tokenizer, or that of the adapter that brought new tokens."""
    if plan.vocabulary is not None:
        for adapter in plan.adapters:
            if (adapter.source.path / "tokenizer.json").is_file() and _grows(adapter, plan.vocabulary):
                return adapter.source.path
    return plan.base.source.path


def _grows(adapter: Adapter, rows: int) -> bool:
    return any(delta.shape and delta.shape[0] == rows for deltas in adapter.deltas.values() for delta in deltas)


def _text_config(plan: MergePlan) -> dict[str, Any]:
    config: dict[str, Any] = dict(plan.base.checkpoint.config)
    if plan.untied:
        config["tie_word_embeddings"] = False
    if plan.vocabulary is not None:
        config["vocab_size"] = plan.vocabulary
    if plan.dtype != "keep":
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = plan.dtype
    return config


def _write_json(file: Path, document: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
