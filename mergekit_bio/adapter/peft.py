"""PEFT directories: ``adapter_config.json`` and ``adapter_model.safetensors`` -> deltas.

What is of one kind of adapter is in that kind's file; the table below names them. Here is what PEFT does for all of
them (0.21: ``peft/config.py``, ``peft/utils/save_and_load.py``).
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_bio.adapter import lora
from mergekit_bio.adapter.delta import Delta, check_float
from mergekit_bio.adapter.dense import Dense
from mergekit_bio.adapter.interface import LM_HEAD, Adapter, Base, check_all_used, check_fits
from mergekit_bio.adapter.peft_kind import AdaptedModule, PeftKind
from mergekit_bio.checkpoint.directory import inside
from mergekit_bio.checkpoint.header import DTYPES, Shard, StoredTensor
from mergekit_bio.checkpoint.source import Source
from mergekit_bio.errors import AdapterError
from mergekit_bio.outside_data import read_json

if TYPE_CHECKING:
    import torch

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_OLD_WEIGHTS = "adapter_model.bin"
_PREFIX = "base_model.model."

#: ``peft_type`` -> how such an adapter is read.
_KINDS: dict[str, PeftKind] = {
    "LORA": lora,
}
# Settings of all kinds that are read here, or that do not change what the merged weights are.
_SETTINGS = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "dynamic_lora", "exclude_modules", "inference_mode",
    "layers_pattern", "layers_to_transform", "modules_to_save", "peft_type", "peft_version", "r", "rank_pattern",
    "revision", "runtime_config", "target_modules", "task_type",
}  # fmt: skip

# A saved module of a resized model comes thrice: as trained, and with both sides of PEFT's wrapper.
_WRAPPED = re.compile(r"(?P<module>.+)\.(?:modules_to_save|original_module)\.(?P<part>weight|bias)")


@dataclass(frozen=True)
class LoadedTensor:
    """A tensor of an old ``adapter_model.bin``, already in memory."""

    name: str
    file: Path
    values: "torch.Tensor"

    @property
    def dtype(self) -> str:
        name = str(self.values.dtype).removeprefix("torch.")
        return next((key for key, (_, torch_name) in DTYPES.items() if torch_name == name), name)

    @property
    def where(self) -> str:
        return f"{self.file}: tensor {self.name}"

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    def read(self, start: int = 0, stop: int | None = None) -> "torch.Tensor":
        if self.values.ndim < 2 or (start == 0 and stop is None):
            return self.values
        return self.values[start:stop]

    def ends(self, count: int = 4096) -> bytes:
        import torch

        flat = self.values.contiguous().flatten().view(torch.uint8)
        return bytes(flat[:count].tolist() + flat[max(0, len(flat) - count) :].tolist())


def load(source: Source, base: Base) -> Adapter:
    """Read the PEFT directory ``source`` as deltas for ``base``.

    Raises:
        AdapterError: It is of another kind, damaged, made for another model, or cannot be folded exactly.
    """
    config, where = read_json(inside(source.path, CONFIG)), source.path / CONFIG
    kind = _kind(config, where)
    file, tensors = _stored(source.path)
    # 1. Tell the parts of adapted modules from whole tensors: a bias, a module to save, a resized embedding.
    deltas: dict[str, list[Delta]] = defaultdict(list)
    modules: dict[str, dict[str, StoredTensor]] = defaultdict(dict)
    adapted: set[str] = set()  # modules with parts of the adapter's kind
    repeated: set[str] = set()  # tensors that may say again what another one says
    part_of_module = re.compile(
        rf"(.+)\.({'|'.join(map(re.escape, kind.PARTS))}|base_layer|base_layer\.bias)(\.weight)?"
    )
    for key, tensor in tensors.items():
        check_float(tensor)
        if not key.startswith(_PREFIX):
            raise AdapterError(f"{file}: tensor {key}: does not begin with {_PREFIX!r} as PEFT's names do")
        name = key.removeprefix(_PREFIX)
        part, wrapped = part_of_module.fullmatch(name), _WRAPPED.fullmatch(name)
        if part:
            modules[part[1]][part[2]] = tensor
            if "base_layer" in part[2]:
                repeated.add(key)  # both sides of tied embeddings bring theirs
            else:
                adapted.add(part[1])
        elif wrapped and f"{_PREFIX}{wrapped['module']}.{wrapped['part']}" in tensors:
            repeated.add(key)
        else:
            deltas[name].append(Dense(tensor))
    whole = set(deltas)  # tensors of the base that the adapter brings a whole one for
    # 2. Turn the parts of each module into deltas of its weight and bias.
    for module, parts in modules.items():
        weight, brought = f"{module}.weight", parts.get("base_layer")
        if "base_layer.bias" in parts:
            deltas[f"{module}.bias"].append(Dense(parts["base_layer.bias"]))
        if module in adapted:
            for name, delta in kind.read(AdaptedModule(module, parts, config, where, base)).items():
                deltas[name].append(delta)
                if brought in delta.stored:
                    whole.add(name)  # it counts from the matrix that the adapter brings
        if brought is None:
            continue
        # PEFT saves an adapted embedding's own matrix along; with a tied head it is the head's too.
        tied = base.tied and weight in (base.input_embedding, LM_HEAD)
        for side in (str(base.input_embedding), LM_HEAD) if tied else (weight,):
            if side not in whole:
                deltas[side].append(Dense(brought))
                whole.add(side)
    # 3. Check that the deltas fit the base, and that they are all that the configuration and the file speak of.
    _check_targets(config, adapted, base, where)
    for name, added in deltas.items():
        for delta in added:
            check_fits(name, delta, base)
    used = {tensor.name for added in deltas.values() for delta in added for tensor in delta.stored}
    check_all_used(tensors, used | repeated, file)
    if not deltas:
        raise AdapterError(f"{file}: holds no tensors; there is nothing to merge")
    frozen = {name: tuple(added) for name, added in deltas.items()}
    return Adapter("peft", source, file, frozen, config=config)


def _kind(config: Mapping[str, Any], where: Path) -> PeftKind:
    """The kind of adapter, if every setting is one that it knows."""
    peft_type = config.get("peft_type")
    kind = _KINDS.get(str(peft_type))
    if kind is None:
        known = ", ".join(_KINDS)
        raise AdapterError(f"{where}: peft_type {peft_type!r} cannot be folded; only {known} (with its variants) can")
    for key, value in config.items():
        if key not in _SETTINGS | kind.SETTINGS and value not in (None, False, [], {}, ""):
            raise AdapterError(f"{where}: {key} = {value!r} cannot be folded into plain weights by this version")
    return kind


def _stored(folder: Path) -> tuple[Path, dict[str, StoredTensor]]:
    if (folder / WEIGHTS).exists():
        file = inside(folder, WEIGHTS)
        return file, {info.name: info for info in Shard.open(file).tensors}
    if not (folder / _OLD_WEIGHTS).exists():
        raise AdapterError(f"{folder}: has {CONFIG} but neither {WEIGHTS} nor {_OLD_WEIGHTS}")
    file = inside(folder, _OLD_WEIGHTS)
    import pickle

    import torch

    try:
        values = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise AdapterError(
            f"{file}: is not a plain file of tensors, so it is not loaded; save it as safetensors"
        ) from error
    if not isinstance(values, dict) or not all(isinstance(value, torch.Tensor) for value in values.values()):
        raise AdapterError(f"{file}: is not a dictionary of tensors")
    return file, {name: LoadedTensor(name, file, value) for name, value in values.items()}


def _check_targets(config: Mapping[str, Any], adapted: set[str], base: Base, where: Path) -> None:
    """The configuration and the file must speak of the same modules."""
    if config.get("target_modules") in (None, "all-linear"):
        return
    modules = {
        name.removesuffix(".weight")
        for name, info in base.checkpoint.tensors.items()
        if name.endswith(".weight") and len(info.shape) == 2
    }
    if base.tied:
        modules.add(LM_HEAD.removesuffix(".weight"))
    try:
        wanted = _targeted(config, modules)
    except re.error as error:
        raise AdapterError(f"{where}: target_modules is not a regular expression: {error}") from error
    if not wanted:
        raise AdapterError(
            f"{where}: target_modules {config['target_modules']!r} match no module of the base {base.source.given}; "
            "this adapter was made for another model"
        )
    missing = sorted(wanted - adapted)
    if missing:
        raise AdapterError(
            f"{where.parent}: target_modules name {missing[0]} of the base, but the file holds no LoRA for it "
            f"({len(missing)} such); the adapter is incomplete"
        )


def _targeted(config: Mapping[str, Any], modules: Iterable[str]) -> set[str]:
    """The modules of the base that ``target_modules`` and its companions choose, by PEFT's rules."""
    return {
        module
        for module in modules
        if _matches(config.get("target_modules"), module)
        and not _matches(config.get("exclude_modules"), module)
        and _in_layers(config, module)
    }


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
