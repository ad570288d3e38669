"""What is in a directory, told from its headers and configuration alone."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from mergekit_bio.adapter import naturelm, peft_file
from mergekit_bio.adapter.interface import Base
from mergekit_bio.audio.names import MERGED_PREFIX
from mergekit_bio.audio.tower import refuse_newer_layout
from mergekit_bio.checkpoint.directory import INDEX, SINGLE, Checkpoint, inside, what_else
from mergekit_bio.checkpoint.header import Shard, TensorInfo
from mergekit_bio.checkpoint.manifest import MANIFEST
from mergekit_bio.checkpoint.model_config import language_setting
from mergekit_bio.checkpoint.source import Source, stated_licence
from mergekit_bio.errors import SourceError
from mergekit_bio.outside_data import read_json


def inspect(source: Source) -> dict[str, Any]:
    """Describe what ``source`` holds: a base, an adapter or a merged checkpoint.

    Returns:
        ``source``, ``path`` and ``revision``; ``kind`` in words; ``files`` (their number), ``bytes``, ``tensors``
        (dtype -> ``count`` and ``elements``); then, under names for people, whatever else there is to know.

    Raises:
        SourceError: It holds nothing of use to a merge.
        AdapterError: It is a NatureLM-audio checkpoint with tensors that belong to none of its parts.
        CheckpointError: Its files are damaged.
    """
    refuse_newer_layout(source)
    if (source.path / peft_file.CONFIG).exists():
        return _adapter(source)
    if not (source.path / SINGLE).exists() and not (source.path / INDEX).exists():
        raise SourceError(
            f"{source.given}: holds neither {peft_file.CONFIG}, {SINGLE} nor {INDEX}; it is no model or adapter"
            f"{what_else(source.path)}"
        )
    checkpoint = Checkpoint.open(source.path)
    if naturelm.recognise(checkpoint):
        return _naturelm(source, checkpoint)
    config = checkpoint.config
    has_tower = any(name.startswith(MERGED_PREFIX) for name in checkpoint.tensors)
    kind = "merged audio model" if has_tower else "checkpoint"
    architectures = config.get("architectures")
    facts = {
        "model type": config.get("model_type"),
        "architecture": ", ".join(map(str, architectures)) if isinstance(architectures, list) else None,
        "layers": language_setting(config, "num_hidden_layers"),
        "hidden size": language_setting(config, "hidden_size"),
        "vocabulary": language_setting(config, "vocab_size"),
        "tied embeddings": Base(source, checkpoint).tied,
        "quantized": _mapping(config.get("quantization_config")).get("quant_method"),
        "audio tower": _count(info for name, info in checkpoint.tensors.items() if name.startswith(MERGED_PREFIX)),
    }
    if (source.path / MANIFEST).is_file():
        manifest = read_json(inside(source.path, MANIFEST))
        facts["merged from"] = " + ".join(
            str(origin.get("source"))
            for origin in (manifest.get("base") or {}, *(manifest.get("adapters") or []))
            if isinstance(origin, dict)
        )
        facts["alpha"] = manifest.get("alpha")
    return _contents(source, kind, checkpoint.shards, facts)


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _adapter(source: Source) -> dict[str, Any]:
    config = read_json(inside(source.path, peft_file.CONFIG))
    facts = {
        "PEFT type": config.get("peft_type"),
        "made for": config.get("base_model_name_or_path"),
        "rank": config.get("r"),
        "lora_alpha": config.get("lora_alpha"),
        "targets": config.get("target_modules"),
        "with": ", ".join(key for key in ("use_dora", "use_rslora", "lora_bias") if config.get(key)) or None,
        "modules to save": config.get("modules_to_save"),
    }
    shards = (Shard.open(inside(source.path, peft_file.WEIGHTS)),) if (source.path / peft_file.WEIGHTS).exists() else ()
    return _contents(source, f"PEFT {config.get('peft_type', '')} adapter", shards, facts)


def _naturelm(source: Source, checkpoint: Checkpoint) -> dict[str, Any]:
    contents = naturelm.read_contents(checkpoint)
    facts = {
        "holds": contents.description,
        "made for": checkpoint.config.get("llama_path"),
        "rank": checkpoint.config.get("lora_rank"),
        "lora_alpha": checkpoint.config.get("lora_alpha"),
        "targets": sorted({module.rpartition(".")[2] for module in contents.lora}),
        "low-rank pairs": len(contents.lora),
        "audio tower": _count((*contents.tower, *contents.aliases)),
    }
    return _contents(source, "NatureLM-audio checkpoint", checkpoint.shards, facts)


def _count(tensors: Iterable[TensorInfo]) -> str | None:
    elements = [info.elements for info in tensors]
    return f"{len(elements)} tensors, {sum(elements) / 1e6:.1f} M weights" if elements else None


def _contents(source: Source, kind: str, shards: tuple[Shard, ...], facts: dict[str, Any]) -> dict[str, Any]:
    elements: dict[str, list[int]] = defaultdict(list)
    for info in (info for shard in shards for info in shard.tensors):
        elements[info.dtype].append(info.elements)
    facts["licence"] = stated_licence(source)
    return {
        "source": source.given,
        "path": str(source.path),
        "revision": source.revision,
        "kind": kind,
        "files": len(shards),
        "bytes": sum(shard.size for shard in shards),
        "tensors": {dtype: {"count": len(sizes), "elements": sum(sizes)} for dtype, sizes in sorted(elements.items())},
        **{name: value for name, value in facts.items() if value not in (None, [], "")},
    }
