"""NatureLM-audio checkpoints: LoRA on Llama and an audio tower in one file (earthspecies/NatureLM-audio).

The published file also repeats Llama's input embedding, with a [PAD] row more; a file that the reference class saves
whole repeats all of Llama. Llama's names are PEFT's, behind ``llama_model.base_model.model.``; the embedding has a
second name, ``llama_embed_tokens.weight``; everything else is the tower's.
"""

import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mergekit_bio.adapter import lora
from mergekit_bio.adapter.delta import Delta, check_float
from mergekit_bio.adapter.interface import Adapter, Base, Override, check_all_used, check_fits
from mergekit_bio.adapter.peft_kind import AdaptedModule
from mergekit_bio.audio.names import alias_of, is_tower_tensor
from mergekit_bio.checkpoint.compare import rows_that_differ, same_bytes
from mergekit_bio.checkpoint.directory import Checkpoint
from mergekit_bio.checkpoint.header import FLOATS, TensorInfo
from mergekit_bio.checkpoint.source import Source
from mergekit_bio.errors import AdapterError

_PREFIX = "llama_model.base_model.model."
_EMBEDDING_ALIAS = "llama_embed_tokens.weight"
_EMBEDDING = "model.embed_tokens.weight"
_LORA = re.compile(r"(?P<module>.+)\.(?P<part>lora_[AB])\.default\.weight")
_LORA_WITHOUT_DEFAULT = re.compile(r".+\.lora_[AB]\.weight")


@dataclass(frozen=True)
class Contents:
    """The tensors of a NatureLM-audio checkpoint, by what they are.

    Attributes:
        lora: Base module -> ``"lora_A"`` and ``"lora_B"`` -> tensor.
        repeated: Base tensor -> its copies; the embedding may be there under two names.
        tower: The audio tower's tensors.
        aliases: Second names of the tower's tensors, where a copy is stored under them.
    """

    lora: Mapping[str, Mapping[str, TensorInfo]]
    repeated: Mapping[str, tuple[TensorInfo, ...]]
    tower: tuple[TensorInfo, ...]
    aliases: tuple[TensorInfo, ...]

    @property
    def description(self) -> str:
        """Such as ``"LoRA, audio tower, a copy of the input embedding"``."""
        parts = ["LoRA"] if self.lora else []
        parts += ["audio tower"] if self.tower else []
        if self.repeated.keys() == {_EMBEDDING}:
            parts.append("a copy of the input embedding")
        elif self.repeated:
            parts.append(f"a copy of {len(self.repeated)} tensors of the base")
        return ", ".join(parts)


def recognise(checkpoint: Checkpoint) -> bool:
    """Whether these are NatureLM-audio's tensor names."""
    return any(name.startswith(_PREFIX) for name in checkpoint.tensors)


def read_contents(checkpoint: Checkpoint) -> Contents:
    """Tell the tensors of a NatureLM-audio checkpoint apart by their names.

    Raises:
        AdapterError: A tensor belongs to none of its parts.
    """
    pairs: dict[str, dict[str, TensorInfo]] = {}
    repeated: dict[str, tuple[TensorInfo, ...]] = {}
    tower: list[TensorInfo] = []
    aliases: list[TensorInfo] = []
    known: set[str] = set()
    for name, info in checkpoint.tensors.items():
        inner = name.removeprefix(_PREFIX)
        if is_tower_tensor(name):
            (tower if alias_of(name) is None else aliases).append(info)
        elif name == _EMBEDDING_ALIAS:
            repeated[_EMBEDDING] = (*repeated.get(_EMBEDDING, ()), info)
        elif inner == name:
            continue
        elif match := _LORA.fullmatch(inner):
            pairs.setdefault(match["module"], {})[match["part"]] = info
        elif _LORA_WITHOUT_DEFAULT.fullmatch(inner):
            raise AdapterError(
                f"{info.where}: its LoRA names lack '.default.'; NatureLM-audio's end in "
                "lora_A.default.weight: rename them, or give the adapter as a PEFT directory"
            )
        else:
            base_name = inner.replace(".base_layer.", ".")
            repeated[base_name] = (*repeated.get(base_name, ()), info)
        known.add(name)
    check_all_used(checkpoint.tensors, known | {info.name for info in (*tower, *aliases)}, checkpoint.root)
    return Contents(pairs, repeated, tuple(tower), tuple(aliases))


def load(source: Source, checkpoint: Checkpoint, base: Base) -> Adapter:
    """Read a NatureLM-audio checkpoint, which is at ``source``, as deltas for ``base``, and find its audio tower.

    What it repeats of the base is compared with the base: all of it, a part, or nothing may be there. Where it
    differs, the adapter says so in ``overrides``, and the merge decides.

    Raises:
        AdapterError: It is incomplete, holds what is neither LoRA, base nor tower, or was made from another base.
    """
    where = checkpoint.root / "config.json"
    settings = _lora_settings(checkpoint.config, where)
    contents = read_contents(checkpoint)
    # 1. Every pair of LoRA halves is a delta of one base tensor.
    deltas: dict[str, tuple[Delta, ...]] = {}
    for module, parts in contents.lora.items():
        for part in parts.values():
            check_float(part)
        for name, delta in lora.read(AdaptedModule(module, module, parts, settings, where, base)).items():
            check_fits(name, delta, base)
            deltas[name] = (delta,)
    # 2. All BEATs layers share one position bias: a stored copy of it must be one.
    for info in contents.aliases:
        original = checkpoint.tensors.get(str(alias_of(info.name)))
        if original is None or (info.dtype, info.shape) != (original.dtype, original.shape):
            raise AdapterError(f"{info.where}: is a second name of {alias_of(info.name)}, but differs")
        if not same_bytes(info, original):
            raise AdapterError(f"{info.where}: differs from {original.name}, which it must share")
    # 3. What it repeats of the base is a copy of it, or overrides it.
    overrides, notes = _compare_with_base(contents.repeated, base)
    tower = contents.tower
    return Adapter("naturelm-audio", source, checkpoint.root, deltas, tower, checkpoint.config, notes, overrides)


def _lora_settings(config: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """Rank and alpha under PEFT's names."""
    rank, alpha = config.get("lora_rank"), config.get("lora_alpha")
    if not config.get("lora") or not isinstance(rank, int) or rank < 1 or not isinstance(alpha, (int, float)):
        raise AdapterError(f"{where}: lora, lora_rank and lora_alpha do not describe a LoRA")
    return {"r": rank, "lora_alpha": alpha}


def _compare_with_base(
    repeated: Mapping[str, tuple[TensorInfo, ...]], base: Base
) -> tuple[dict[str, Override], tuple[str, ...]]:
    """The repeated tensors that differ from the base's, the added [PAD] row aside, and notes for the user."""
    pairs = [(info, *_fit(name, info, base)) for name, copies in repeated.items() for info in copies]
    with ThreadPoolExecutor() as pool:
        differences = list(pool.map(lambda pair: rows_that_differ(pair[1], pair[2]), pairs))
    first_copies: dict[str, TensorInfo] = {}
    overrides: dict[str, Override] = {}
    for (info, trimmed, target), rows in zip(pairs, differences, strict=True):
        first = first_copies.setdefault(target.name, trimmed)
        if first is not trimmed:  # one tensor under two names: both must say the same, equal to the base or not
            if rows_that_differ(trimmed, first):
                raise AdapterError(f"{info.where}: differs from {first.name}, its second name")
        elif rows:
            overrides[target.name] = Override(info, trimmed, rows)
    notes = []
    if equal := len({target.name for _, _, target in pairs}) - len(overrides):
        what = "input embedding" if repeated.keys() == {_EMBEDDING} else f"{equal} tensors"
        notes.append(f"its copy of the base's {what} equals {base.source.given}")
    if padded := sorted({target.name for info, trimmed, target in pairs if trimmed != info}):
        notes.append(f"its added [PAD] row is left out of {' and '.join(padded)}: nothing reads it")
    return overrides, tuple(notes)


def _fit(name: str, info: TensorInfo, base: Base) -> tuple[TensorInfo, TensorInfo]:
    """A repeated tensor without its [PAD] row, and the base's tensor that it repeats."""
    target = base.find(name)
    if target is None:
        raise AdapterError(f"{info.where}: the base {base.source.given} has no {name}")
    grown = (
        name in (base.input_embedding, base.head)
        and len(info.shape) == 2
        and info.shape == (target.shape[0] + 1, *target.shape[1:])
    )
    # The [PAD] row is the last one, so that what is before it is the tensor that begins at the same byte.
    trimmed = replace(info, shape=target.shape) if grown else info
    if trimmed.shape != target.shape or info.dtype not in FLOATS or target.dtype not in FLOATS:
        raise AdapterError(
            f"{info.where}: is {info.dtype} {list(info.shape)}, but {name} of the base "
            f"{base.source.given} is {target.dtype} {list(target.shape)}; it was made from another base"
        )
    return trimmed, target
