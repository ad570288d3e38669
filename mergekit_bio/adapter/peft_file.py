"""The tensors of a PEFT directory, under the names that PEFT gives them when it saves."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_bio.adapter.delta import check_float
from mergekit_bio.checkpoint.directory import inside, what_else
from mergekit_bio.checkpoint.header import DTYPES, Shard, StoredTensor
from mergekit_bio.errors import AdapterError

if TYPE_CHECKING:
    import torch

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
OLD_WEIGHTS = "adapter_model.bin"

# What torch.compile and FSDP put into names.
_COMPILED = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# PEFT leaves the adapter's own name out; a state dictionary that was saved without it does not.
_OWN_NAME = re.compile(r"\.(lora_\w+|modules_to_save|trainable_tokens_delta)\.default(?=\.|$)")
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class LoadedTensor:
    """A tensor of an old ``adapter_model.bin``, already in memory."""

    name: str
    file: Path
    values: "torch.Tensor" = field(repr=False)

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


def read_tensors(folder: Path) -> tuple[Path, dict[str, StoredTensor]]:
    """Open the weights of a PEFT directory.

    Returns:
        The file, and its tensors by module and part: ``model.layers.0.mlp.up_proj.lora_A.weight``.

    Raises:
        AdapterError: There are none, they are no plain tensors, or some of them are empty.
    """
    file, stored = _stored(folder)
    tensors: dict[str, StoredTensor] = {}
    for key, tensor in stored.items():
        check_float(tensor)
        if 0 in tensor.shape:
            raise AdapterError(
                f"{tensor.where}: is empty, as DeepSpeed ZeRO-3 and FSDP leave what was not gathered before saving; "
                "gather it (stage3_gather_16bit_weights_on_model_save), or convert the training's checkpoint with "
                "zero_to_fp32.py, and save the adapter again"
            )
        name = _plain_name(key)
        if name in tensors:
            raise AdapterError(f"{tensor.where}: is {tensors[name].name} again; leave one of them out")
        tensors[name] = tensor
    return file, tensors


def _plain_name(key: str) -> str:
    """A tensor's name without what stands around the model, and without the adapter's own."""
    name = _OWN_NAME.sub(r".\1", _COMPILED.sub("", key))
    # Somebody's own module may be around PEFT's: what it is called does not matter.
    start = f".{name}".find(f".{_PREFIX}")
    return name[start + len(_PREFIX) :] if start >= 0 else name


def _stored(folder: Path) -> tuple[Path, dict[str, StoredTensor]]:
    if (folder / WEIGHTS).exists():
        file = inside(folder, WEIGHTS)
        return file, {info.name: info for info in Shard.open(file).tensors}
    if not (folder / OLD_WEIGHTS).exists():
        raise AdapterError(f"{folder}: has {CONFIG} but neither {WEIGHTS} nor {OLD_WEIGHTS}{what_else(folder)}")
    file = inside(folder, OLD_WEIGHTS)
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
    return file, {name: LoadedTensor(name, file, value.detach()) for name, value in values.items()}
