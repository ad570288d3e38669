"""PEFT LoRA directories: ``adapter_config.json`` and ``adapter_model.safetensors`` -> deltas.

Names and meanings follow PEFT 0.21 (``peft/tuners/lora/config.py``, ``peft/utils/save_and_load.py``).
"""

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_bio.adapter.delta import Delta, check_float
from mergekit_bio.adapter.dense import Dense
from mergekit_bio.adapter.dora import Dora
from mergekit_bio.adapter.interface import LM_HEAD, Adapter, Base, check_all_used, check_fits
from mergekit_bio.adapter.lora import BiasVector, LowRank
from mergekit_bio.adapter.targets import pattern_value, targeted
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

# Settings that do not change what the merged weights are.
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "inference_mode",
    "loftq_config", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "modules_to_save",
    "peft_type", "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type", "dynamic_lora",
}  # fmt: skip
# Settings that are read here.
_READ = {
    "alpha_pattern", "bias", "exclude_modules", "fan_in_fan_out", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "lora_alpha", "lora_bias", "r", "rank_pattern", "target_modules", "use_dora", "use_rslora",
}  # fmt: skip
# Initialisations that leave the base as it is; the others (PiSSA, OLoRA, CorDA, LoftQ, ...) subtract from it.
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "mica", "orthogonal")

# Where Transformers uses Conv1D, which keeps weights as [in, out].
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_CONV1D = ("c_attn", "q_attn", "c_proj", "c_fc")

_LORA_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector(?:\.weight)?|base_layer\.(?:weight|bias))"
)
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
    """Read the LoRA directory ``source`` as deltas for ``base``.

    Raises:
        AdapterError: It is of another kind, damaged, made for another model, or cannot be folded exactly.
    """
    config = read_json(inside(source.path, CONFIG))
    where = source.path / CONFIG
    _refuse_unfoldable(config, where)
    file, tensors = _stored(source.path)
    deltas: dict[str, list[Delta]] = defaultdict(list)
    # 1. Tell the parts of adapted modules from whole tensors: a bias, a module to save, a resized embedding.
    modules: dict[str, dict[str, StoredTensor]] = defaultdict(dict)
    whole: set[str] = set()
    repeated: set[str] = set()
    for key, tensor in tensors.items():
        check_float(tensor)
        if not key.startswith(_PREFIX):
            raise AdapterError(f"{file}: tensor {key}: does not begin with {_PREFIX!r} as PEFT's names do")
        name = key.removeprefix(_PREFIX)
        part, wrapped = _LORA_PART.fullmatch(name), _WRAPPED.fullmatch(name)
        if part:
            modules[part["module"]][part["part"].removesuffix(".weight")] = tensor
            if "base_layer" in part["part"]:
                repeated.add(key)  # both sides of tied embeddings bring theirs
        elif wrapped and f"{_PREFIX}{wrapped['module']}.{wrapped['part']}" in tensors:
            repeated.add(key)
        else:
            deltas[name].append(Dense(tensor))
            whole.add(name)
    # 2. Turn the parts of each module into deltas of its weight and bias.
    for module, parts in modules.items():
        weight = f"{module}.weight"
        if "base_layer.bias" in parts:
            deltas[f"{module}.bias"].append(Dense(parts["base_layer.bias"]))
        if _is_lora(parts):
            _add_lora(deltas, module, parts, config, base, where)
            if "lora_magnitude_vector" in parts:
                whole.add(weight)  # DoRA counts from the matrix that the adapter brings
        if "base_layer" not in parts:
            continue
        # PEFT saves an adapted embedding's own matrix along; with a tied head it is the head's too.
        tied = base.tied and weight in (base.input_embedding, LM_HEAD)
        for side in (str(base.input_embedding), LM_HEAD) if tied else (weight,):
            if side not in whole:
                deltas[side].append(Dense(parts["base_layer"]))
                whole.add(side)
    # 3. Check that the deltas fit the base, and that they are all that the configuration and the file speak of.
    _check_targets(config, {module for module, parts in modules.items() if _is_lora(parts)}, base, where)
    for name, added in deltas.items():
        for delta in added:
            check_fits(name, delta, base)
    used = {tensor.name for added in deltas.values() for delta in added for tensor in delta.stored}
    check_all_used(tensors, used | repeated, file)
    if not deltas:
        raise AdapterError(f"{file}: holds no tensors; there is nothing to merge")
    frozen = {name: tuple(added) for name, added in deltas.items()}
    return Adapter("peft", source, file, frozen, (file,), config=config)


def _refuse_unfoldable(config: Mapping[str, Any], where: Path) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise AdapterError(f"{where}: peft_type {kind!r} cannot be folded; only LORA (with its variants) can")
    init = config.get("init_lora_weights", True)
    if init not in _PLAIN_INITS:
        raise AdapterError(
            f"{where}: init_lora_weights {init!r} changed the base weights; save the adapter again with "
            "path_initial_model_for_weight_conversion, then merge that"
        )
    if config.get("bias", "none") not in ("none", "all", "lora_only"):
        raise AdapterError(f"{where}: bias {config['bias']!r} is not one of none, all, lora_only")
    for key, value in config.items():
        if key not in _HARMLESS | _READ and value not in (None, False, [], {}, ""):
            raise AdapterError(f"{where}: {key} = {value!r} cannot be folded into plain weights by this version")


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


def _is_lora(parts: Mapping[str, StoredTensor]) -> bool:
    return any(part.startswith("lora_") for part in parts)


def _add_lora(
    deltas: dict[str, list[Delta]],
    module: str,
    parts: Mapping[str, StoredTensor],
    config: Mapping[str, Any],
    base: Base,
    where: Path,
) -> None:
    """Add what the LoRA parts of one module change of its weight and its bias."""
    low_rank = _low_rank(module, parts, config, base, where)
    magnitude, bias = parts.get("lora_magnitude_vector"), parts.get("lora_B.bias")
    if (magnitude is not None) != bool(config.get("use_dora")):
        raise AdapterError(f"{where}: use_dora is {bool(config.get('use_dora'))}, but {module} says otherwise")
    if magnitude is None:
        deltas[f"{module}.weight"].append(low_rank)
    else:
        outputs = low_rank.shape[1] if low_rank.transposed else low_rank.shape[0]
        if math.prod(magnitude.shape) != outputs:
            raise AdapterError(
                f"{magnitude.file}: tensor {magnitude.name}: has {math.prod(magnitude.shape)} numbers for "
                f"{outputs} outputs"
            )
        deltas[f"{module}.weight"].append(Dora(low_rank, magnitude, parts.get("base_layer")))
    if bias is not None:
        if base.find(f"{module}.bias") is None:
            raise AdapterError(f"{where}: lora_bias: the base has no {module}.bias to add it to; this cannot be folded")
        deltas[f"{module}.bias"].append(BiasVector(bias, low_rank.scaling))


def _low_rank(
    module: str, parts: Mapping[str, StoredTensor], config: Mapping[str, Any], base: Base, where: Path
) -> LowRank:
    embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
    a, b = (parts.get(f"lora_embedding_{half}" if embedding else f"lora_{half}") for half in "AB")
    if a is None or b is None:
        present = (a or b or next(tensor for part, tensor in parts.items() if part.startswith("lora_"))).name
        raise AdapterError(f"{where.parent}: tensor {present}: its other half is missing; the file is incomplete")
    for factor in (a, b):
        if len(factor.shape) != 2:
            raise AdapterError(
                f"{factor.file}: tensor {factor.name}: has shape {list(factor.shape)}; only matrices fold"
            )
    rank = pattern_value(config.get("rank_pattern"), module, config.get("r"))
    alpha = pattern_value(config.get("alpha_pattern"), module, config.get("lora_alpha"))
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise AdapterError(f"{where}: the rank r of {module} is {rank!r}; it must be a whole number above 0")
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise AdapterError(f"{where}: lora_alpha of {module} is {alpha!r}; it must be a number")
    if a.shape[0] != rank or b.shape[1] != rank:
        raise AdapterError(
            f"{a.file}: tensor {a.name}: shapes {list(a.shape)} and {list(b.shape)} do not have the rank {rank} that "
            f"{where.name} gives {module}"
        )
    scaling = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    transposed = embedding or _stores_transposed(module, config, base)
    low_rank = LowRank(a, b, scaling, transposed)
    target = base.find(f"{module}.weight")
    if transposed and not embedding and target is not None and low_rank.shape != target.shape:
        return LowRank(a, b, scaling)  # a plain Linear among Conv1D layers
    return low_rank


def _stores_transposed(module: str, config: Mapping[str, Any], base: Base) -> bool:
    """Whether the base stores the module's weight as [in, out], as the Conv1D of GPT-2 and its kin does.

    PEFT keeps one fan_in_fan_out for all modules, that of the last it has seen, so the base is asked first.
    """
    if base.checkpoint.config.get("model_type") in _CONV1D_MODELS:
        return module.rpartition(".")[2] in _CONV1D
    return bool(config.get("fan_in_fan_out"))


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
        wanted = targeted(config, modules)
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
