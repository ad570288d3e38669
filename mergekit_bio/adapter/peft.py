"""PEFT directories: ``adapter_config.json`` and ``adapter_model.safetensors`` -> deltas.

What is of one kind of adapter is in that kind's file; the table below names them. Here is what PEFT does for all of
them (0.21: ``peft/config.py``, ``peft/utils/save_and_load.py``).
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_bio.adapter import lora
from mergekit_bio.adapter.delta import Delta
from mergekit_bio.adapter.dense import Dense
from mergekit_bio.adapter.interface import Adapter, Base, check_all_used, check_fits
from mergekit_bio.adapter.names import differing_beginnings, match_names
from mergekit_bio.adapter.peft_file import CONFIG, read_tensors
from mergekit_bio.adapter.peft_kind import AdaptedModule, PeftKind
from mergekit_bio.adapter.peft_settings import check_settings, settings_notes
from mergekit_bio.adapter.peft_targets import check_targets, promise_notes
from mergekit_bio.adapter.token_rows import TokenRows
from mergekit_bio.checkpoint.directory import inside
from mergekit_bio.checkpoint.header import StoredTensor
from mergekit_bio.checkpoint.source import Source
from mergekit_bio.errors import AdapterError
from mergekit_bio.outside_data import read_json

#: ``peft_type`` -> how such an adapter is read.
_KINDS: dict[str, PeftKind] = {
    "LORA": lora,
}

# A module to save is wrapped, with the base's beside it; files of resized models have it under its own name too.
_WRAPPED = re.compile(r"(?P<module>.+)\.(?P<side>modules_to_save|original_module)\.(?P<part>weight|bias)")
_ROWS, _ROWS_ORIGIN = "token_adapter.trainable_tokens_delta", "token_adapter.base_layer"
#: Where LLaVA's own training puts what is no LoRA.
_LLAVA_REST = "non_lora_trainables.bin"


@dataclass(frozen=True)
class _Contents:
    """The tensors of an adapter, by what they are; modules and tensors are named as the adapter names them.

    Attributes:
        modules: Module -> its parts: those of the adapter's kind, new rows, and the matrices it was trained on.
        whole: Tensor of the base -> what stands in its place: a bias, a module to save, a resized embedding.
        repeated: Names of tensors that may say again what another one says.
    """

    modules: dict[str, dict[str, StoredTensor]]
    whole: dict[str, StoredTensor]
    repeated: set[str]


def load(source: Source, base: Base) -> Adapter:
    """Read the PEFT directory ``source`` as deltas for ``base``.

    Raises:
        AdapterError: It is of another kind, damaged, made for another model, or cannot be folded exactly.
    """
    config, where = read_json(inside(source.path, CONFIG)), source.path / CONFIG
    kind = check_settings(config, where, _KINDS)
    file, tensors = read_tensors(source.path)
    if not tensors:
        raise AdapterError(f"{file}: holds no tensors; there is nothing to merge")
    # 1. Tell the parts of adapted modules from whole tensors, and find the tensors of the base that all are about.
    contents = _sorted(tensors, kind)
    about = {f"{module}.weight": next(iter(parts.values())) for module, parts in contents.modules.items()}
    names = match_names(about | contents.whole, base)
    in_base = {module: names[f"{module}.weight"].removesuffix(".weight") for module in contents.modules}
    # 2. Turn whole tensors into deltas.
    deltas: dict[str, list[Delta]] = defaultdict(list)
    for name, tensor in contents.whole.items():
        deltas[names[name]].append(Dense(tensor))
    brought = set(deltas)  # tensors of the base that the adapter brings a whole one for, or rows of
    # 3. Turn the parts of each module into deltas of its weight and bias.
    adapted = {module: in_base[module] for module, parts in contents.modules.items() if parts.keys() & set(kind.PARTS)}
    for module, parts in contents.modules.items():
        weight, matrix = f"{in_base[module]}.weight", parts.get("base_layer")
        if "base_layer.bias" in parts:
            deltas[f"{in_base[module]}.bias"].append(Dense(parts["base_layer.bias"]))
            brought.add(f"{in_base[module]}.bias")
        if module in adapted:
            read = kind.read(AdaptedModule(module, in_base[module], parts, config, where, base))
            for name, delta in read.items():
                deltas[name].append(delta)
                if matrix in delta.stored:
                    brought.add(name)  # it counts from the matrix that the adapter brings
        if matrix is None:
            continue
        # PEFT saves an adapted embedding's own matrix along; with a tied head it is the head's too.
        tied = weight in (base.input_embedding, base.head) and base.shared
        for side in (str(base.input_embedding), str(base.head)) if tied else (weight,):
            if side not in brought:
                deltas[side].append(Dense(matrix))
                brought.add(side)
    rows = {in_base[module]: parts for module, parts in contents.modules.items() if _ROWS in parts}
    for name, row_delta in _token_rows(rows, config, where, base).items():
        deltas[name].append(row_delta)
        brought.add(name)
    # 4. Check that the deltas fit the base, and that they are all that the configuration and the file speak of.
    notes = [*settings_notes(config, kind, base), *check_targets(config, adapted, base, where)]
    notes += promise_notes(config, adapted, brought, base)
    for name, added in deltas.items():
        for delta in added:
            check_fits(name, delta, base)
    used = {tensor.name for added in deltas.values() for delta in added for tensor in delta.stored}
    check_all_used({tensor.name: tensor for tensor in tensors.values()}, used | contents.repeated, file)
    # 5. Say what else is worth knowing.
    notes += _spelling_notes(names, base)
    if adapted and all(kind.is_zero(contents.modules[module]) for module in adapted):
        notes.append("every LoRA B in its file is zero, as before training; it was not trained, or not saved")
    if (source.path / _LLAVA_REST).exists():
        notes.append(f"its {_LLAVA_REST} is pickled, and not read; what is trained in it stays the base's")
    frozen = {name: tuple(added) for name, added in deltas.items()}
    return Adapter("peft", source, file, frozen, config=config, notes=tuple(notes))


def _sorted(tensors: Mapping[str, StoredTensor], kind: PeftKind) -> _Contents:
    contents = _Contents(defaultdict(dict), {}, set())
    parts = "|".join(map(re.escape, (*kind.PARTS, _ROWS, _ROWS_ORIGIN, "base_layer.bias", "base_layer")))
    part_of_module = re.compile(rf"(.+?)\.({parts})(\.weight)?")
    for name, tensor in tensors.items():
        part, wrapped = part_of_module.fullmatch(name), _WRAPPED.fullmatch(name)
        plain = f"{wrapped['module']}.{wrapped['part']}" if wrapped else name
        if part:
            contents.modules[part[1]][part[2]] = tensor
            if "base_layer" in part[2]:
                contents.repeated.add(tensor.name)  # both sides of tied embeddings bring theirs
        elif wrapped and (wrapped["side"] == "original_module" or plain in tensors):
            contents.repeated.add(tensor.name)
        else:
            contents.whole[plain] = tensor
    return contents


def _token_rows(
    rows: Mapping[str, Mapping[str, StoredTensor]], config: Mapping[str, Any], where: Path, base: Base
) -> dict[str, TokenRows]:
    """What ``trainable_token_indices`` changes: name of a base tensor -> its new rows.

    Args:
        rows: Module of the base -> its parts in the file.
        config: ``adapter_config.json``.
        where: That file, for messages.
        base: What the rows are for.

    Raises:
        AdapterError: The configuration does not say which rows they are.
    """
    deltas: dict[str, TokenRows] = {}
    for module, stored in rows.items():
        values, origin, weight = stored[_ROWS], stored.get(_ROWS_ORIGIN), f"{module}.weight"
        target, tokens = origin or base.find(weight), _stated_tokens(config, module)
        shape = target.shape if target else ()
        if values.shape != (len(tokens), *shape[1:]):
            raise AdapterError(
                f"{values.where}: has shape {list(values.shape)}; trainable_token_indices in {where} does not name "
                f"that many rows of {weight} {list(shape)}"
            )
        if beyond := [token for token in tokens if token >= shape[0]]:
            raise AdapterError(
                f"{values.where}: trainable_token_indices in {where} names row {beyond[0]} of {weight}, which has "
                f"{shape[0]}; save the adapter with save_embedding_layers=True, so that it brings the new rows"
            )
        deltas[weight] = TokenRows(values, tokens, shape, origin)
    # PEFT ties the rows as the model ties its matrices.
    embedding, head = base.input_embedding, base.head
    if embedding in deltas and base.shared and head is not None and head not in deltas:
        deltas[head] = deltas[embedding]
    return deltas


def _stated_tokens(config: Mapping[str, Any], module: str) -> tuple[int, ...]:
    """The tokens that were trained in one embedding or head; none where the configuration does not say it well."""
    stated = config.get("trainable_token_indices")
    if isinstance(stated, dict):  # module -> its tokens; a tied head has the embedding's
        of_module = (tokens for name, tokens in stated.items() if module.endswith(name))
        stated = next(of_module, next(iter(stated.values())) if len(stated) == 1 else None)
    tokens = stated if isinstance(stated, list) else []
    return tuple(tokens) if all(isinstance(token, int) and token >= 0 for token in tokens) else ()


def _spelling_notes(names: Mapping[str, str], base: Base) -> Iterator[str]:
    for ours, theirs in differing_beginnings(names).items():
        spelled = [f"{start}.*" if start else "*" for start in (ours, theirs)]
        yield f"its {spelled[0]} is {spelled[1]} in the files of {base.source.given}"
