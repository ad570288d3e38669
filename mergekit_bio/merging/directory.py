"""Everything of a checkpoint directory that is not weights: config, index, tokenizer, licences."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from itertools import chain, count
from pathlib import Path
from typing import Any, TypeAlias

from mergekit_bio.adapter.interface import LM_HEAD
from mergekit_bio.audio.layout import merged_config, processor_config
from mergekit_bio.checkpoint.directory import INDEX, inside
from mergekit_bio.checkpoint.source import licence_files
from mergekit_bio.errors import CheckpointError
from mergekit_bio.merging.plan import MergePlan, Output
from mergekit_bio.outside_data import read_json

#: Taken together from whoever brought the vocabulary.
_TOKENIZER = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template.*",
    "spiece.model", "sentencepiece*.model", "tekken.json", "*.tiktoken",
)  # fmt: skip
#: The base's.
_SETTINGS = ("generation_config.json", "*processor_config.json")

_EFFECTIVE = os.access in os.supports_effective_ids


#: What stands beside the weights of every checkpoint of a merge: name -> the file that it is copied from (tokenizer,
#: generation settings, licences), or a configuration to be written.
Companions: TypeAlias = Mapping[str, Path | Mapping[str, Any]]


def companions(plan: MergePlan) -> Companions:
    """Find out, before anything is written, what will stand beside the weights.

    Raises:
        CheckpointError: The base's config, or the tokenizer that an audio tower needs, is missing or damaged; a file
            that would be copied cannot be.
    """
    copies = dict(_copies(plan))
    for name, file in copies.items():
        try:
            name.encode()
        except UnicodeEncodeError:
            raise CheckpointError(
                f"{str(file)!r}: its name is not UTF-8, so no file can tell of it; rename it"
            ) from None
        if not os.access(inside(file.parent, file.name), os.R_OK, effective_ids=_EFFECTIVE):
            raise CheckpointError(f"{file}: may not be read; change its permissions")
    return {**copies, **_documents(plan)}


def write_companions(beside: Companions, plan: MergePlan, output: Output, folder: Path) -> list[str]:
    """Write what stands beside the weights of one output into ``folder``.

    Returns:
        The names of the files.
    """
    contents = {**beside, INDEX: _index(output)} if len(output.files) > 1 else beside
    for name, content in contents.items():
        if isinstance(content, Path):
            shutil.copyfile(content, folder / name)
        else:
            text = json.dumps(content, indent=2, ensure_ascii=False)
            (folder / name).write_text(text + "\n", encoding="utf-8")
    return sorted(contents)


def adapter_licences(plan: MergePlan) -> list[dict[str, Path]]:
    """For each adapter its licence files, under names that do not clash: ``NAME-LICENSE`` -> where it is."""
    taken: set[str] = set()
    licences = []
    for source in (planned.adapter.source for planned in plan.adapters):
        stem = source.name.lstrip(".")  # hidden files are not pushed
        name = next(name for name in chain([stem], (f"{stem}-{suffix}" for suffix in count(2))) if name not in taken)
        taken.add(name)
        licences.append({f"{name}-{file}": source.path / file for file in licence_files(source)})
    return licences


def _copies(plan: MergePlan) -> Iterator[tuple[str, Path]]:
    base, tokenizer = plan.base.source.path, _tokenizer_source(plan)
    for origin, patterns in ((base, _SETTINGS), (tokenizer, _TOKENIZER)):
        for file in sorted(origin.iterdir()):
            if file.is_file() and any(fnmatch(file.name, pattern) for pattern in patterns):
                yield file.name, file
    for name in licence_files(plan.base.source):
        yield name, base / name
    for licences in adapter_licences(plan):
        yield from licences.items()


def _documents(plan: MergePlan) -> dict[str, dict[str, Any]]:
    config = _text_config(plan)
    if not plan.tower:
        return {"config.json": config}
    naturelm = dict(next(planned.adapter.config for planned in plan.adapters if planned.adapter.tower))
    tokenizer = read_json(inside(_tokenizer_source(plan), "tokenizer.json"))
    return {
        "processor_config.json": processor_config(text_config=config, naturelm_config=naturelm, tokenizer=tokenizer),
        "config.json": merged_config(text_config=config, naturelm_config=naturelm, tokenizer=tokenizer),
    }


def _index(output: Output) -> dict[str, Any]:
    weight_map = {name: file for file, shard in output.files.items() for name in shard.tensors}
    total = sum(shard.size - len(shard.header) for shard in output.files.values())
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def _tokenizer_source(plan: MergePlan) -> Path:
    """The base's tokenizer, or that of the adapter that brought new tokens."""
    if plan.vocabulary is not None:
        for adapter in (planned.adapter for planned in plan.adapters):
            rows = {delta.shape[0] for deltas in adapter.deltas.values() for delta in deltas if delta.shape}
            if plan.vocabulary in rows and (adapter.source.path / "tokenizer.json").is_file():
                return adapter.source.path
    return plan.base.source.path


def _text_config(plan: MergePlan) -> dict[str, Any]:
    config: dict[str, Any] = dict(plan.base.checkpoint.config)
    # A base may store the head beside an equal embedding and say that they are tied; they may differ from now on.
    changed = {fold.name for fold in plan.folds if fold.deltas} & {LM_HEAD, plan.base.input_embedding}
    if plan.untied or (changed and LM_HEAD in plan.base.checkpoint.tensors and config.get("tie_word_embeddings")):
        config["tie_word_embeddings"] = False
    if plan.vocabulary is not None:
        config["vocab_size"] = plan.vocabulary
    if plan.request.dtype != "keep":
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = plan.request.dtype
    return config
