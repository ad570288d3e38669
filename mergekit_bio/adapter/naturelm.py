"""NatureLM-audio checkpoints: LoRA on Llama, and an audio tower, in one file (earthspecies/NatureLM-audio).

A *full* one carries its own copy of the base, a *trained-only* one does not. Llama's names are PEFT's, behind
``llama_model.base_model.model.``; everything else is the tower's.
"""

import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mergekit_bio.adapter.adapter import LM_HEAD, Adapter, Base, check_all_used, check_fits
from mergekit_bio.adapter.delta import Delta, LowRank, check_float
from mergekit_bio.audio.names import alias_of, is_tower_tensor
from mergekit_bio.checkpoint.checkpoint import Checkpoint
from mergekit_bio.checkpoint.compare import same_bytes
from mergekit_bio.checkpoint.header import TensorInfo
from mergekit_bio.checkpoint.source import Source
from mergekit_bio.errors import AdapterError

_PREFIX = "llama_model.base_model.model."
_EMBEDDING_ALIAS = "llama_embed_tokens.weight"
_LORA = re.compile(r"(?P<module>.+)\.lora_(?P<half>[AB])\.default\.weight")


def recognise(checkpoint: Checkpoint) -> bool:
    """Whether these are NatureLM-audio's tensor names."""
    return any(name.startswith(_PREFIX) for name in checkpoint.tensors)


def load(source: Source, base: Base) -> Adapter:
    """Read the NatureLM-audio checkpoint ``source`` as deltas for ``base``, and find its audio tower.

    Raises:
        AdapterError: It is incomplete, holds what is neither LoRA, base nor tower, or was made from another base.
    """
    checkpoint = Checkpoint.open(source.path)
    where = checkpoint.root / "config.json"
    rank, scaling = _strength(checkpoint.config, str(where))
    halves: dict[str, dict[str, TensorInfo]] = {}
    carried: dict[str, TensorInfo] = {}
    tower: list[TensorInfo] = []
    for name, info in checkpoint.tensors.items():
        match = _LORA.fullmatch(name.removeprefix(_PREFIX))
        if is_tower_tensor(name):
            if alias_of(name) is None:
                tower.append(info)
        elif name == _EMBEDDING_ALIAS:
            carried["model.embed_tokens.weight"] = info
        elif name.startswith(_PREFIX) and match:
            halves.setdefault(match["module"], {})[match["half"]] = info
        elif name.startswith(_PREFIX):
            carried[name.removeprefix(_PREFIX).replace(".base_layer.", ".")] = info
    deltas: dict[str, tuple[Delta, ...]] = {}
    for module, pair in halves.items():
        if len(pair) < 2:
            raise AdapterError(f"{checkpoint.root}: {module}: one half of its LoRA is missing; fetch the file again")
        for half, side in (("A", 0), ("B", 1)):
            check_float(pair[half])
            if len(pair[half].shape) != 2 or pair[half].shape[side] != rank:
                raise AdapterError(
                    f"{pair[half].file}: tensor {pair[half].name}: has shape {list(pair[half].shape)}, which is not "
                    f"of the rank {rank} that {where} gives"
                )
        delta = LowRank(pair["A"], pair["B"], scaling)
        check_fits(f"{module}.weight", delta, base)
        deltas[f"{module}.weight"] = (delta,)
    used = {info.name for pair in halves.values() for info in pair.values()} | {info.name for info in carried.values()}
    check_all_used(checkpoint.tensors, used | set(filter(is_tower_tensor, checkpoint.tensors)), checkpoint.root)
    notes = _compare_bases(carried, base) if carried else ()
    files = tuple(shard.file for shard in checkpoint.shards)
    return Adapter("naturelm-audio", source, checkpoint.root, deltas, files, tuple(tower), checkpoint.config, notes)


def _strength(config: Mapping[str, Any], where: str) -> tuple[int, float]:
    rank, alpha = config.get("lora_rank"), config.get("lora_alpha")
    if not config.get("lora") or not isinstance(rank, int) or rank < 1 or not isinstance(alpha, (int, float)):
        raise AdapterError(f"{where}: lora, lora_rank and lora_alpha do not describe a LoRA")
    return rank, alpha / rank


def _compare_bases(carried: dict[str, TensorInfo], base: Base) -> tuple[str, ...]:
    """A full checkpoint brings a copy of its base: it must be the base given, the added [PAD] row aside."""
    for name in base.checkpoint.tensors:
        if name not in carried:
            raise AdapterError(
                f"{next(iter(carried.values())).file}: carries a base without {name}; it was not made "
                f"from {base.source.given}"
            )
    padded = []
    pairs = []
    for name, info in carried.items():
        target = base.find(name)
        if target is None:
            raise AdapterError(f"{info.file}: tensor {info.name}: the base {base.source.given} has no {name}")
        extra = info.shape[0] - target.shape[0] if len(info.shape) == 2 == len(target.shape) else 0
        grown = extra == 1 and info.shape[1:] == target.shape[1:] and name in (base.input_embedding, LM_HEAD)
        if info.dtype != target.dtype or (info.shape != target.shape and not grown):
            raise AdapterError(
                f"{info.file}: tensor {info.name}: is {info.dtype} {list(info.shape)}, but {name} of the base "
                f"{base.source.given} is {target.dtype} {list(target.shape)}; it was made from another base"
            )
        if grown:
            padded.append(name)
        pairs.append((name, info, target))
    with ThreadPoolExecutor() as pool:
        for (name, info, _), same in zip(
            pairs, pool.map(lambda pair: same_bytes(pair[1], pair[2]), pairs), strict=True
        ):
            if not same:
                raise AdapterError(
                    f"{info.file}: tensor {info.name}: differs from {name} of the base {base.source.given}; this "
                    "checkpoint was made from another base"
                )
    notes = [f"its own copy of the base ({len(pairs)} tensors) equals {base.source.given}"]
    if padded:
        notes.append(f"its added [PAD] row is left out of {' and '.join(padded)}: nothing reads it")
    return tuple(notes)
