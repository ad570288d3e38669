"""Reading the audio tower out of a checkpoint, strictly."""

from typing import TYPE_CHECKING

from mergekit_bio.audio.config import AudioPrefixConfig
from mergekit_bio.audio.names import MERGED_PREFIX, alias_of, is_tower_tensor
from mergekit_bio.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    from mergekit_bio.checkpoint.checkpoint import Checkpoint

_LLAMA_ROOTS = ("llama_model.", "llama_embed_tokens.")
_PROJECTION = "audio_llama_proj.weight"


def tower_config(checkpoint: "Checkpoint") -> AudioPrefixConfig:
    """The tower's configuration, from a merged directory or an original NatureLM-audio checkpoint.

    Raises:
        CheckpointError: The checkpoint has no tower, or its config.json does not describe one.
    """
    config = checkpoint.config
    if "audio_config" in config:
        return AudioPrefixConfig.from_dict(config["audio_config"], where=f"{checkpoint.root}/config.json: audio_config")
    projection = checkpoint.tensors.get(_PROJECTION)
    if "beats_cfg" not in config and projection is None:
        raise CheckpointError(
            f"{checkpoint.root}: has no audio tower; give a merge of NatureLM-audio made without --text-only, or "
            "NatureLM-audio itself"
        )
    if projection is None:
        raise CheckpointError(f"{checkpoint.root}: lacks the tensor {_PROJECTION}")
    try:
        return AudioPrefixConfig.from_naturelm(config, hidden_size=projection.shape[0])
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.root}/{error}") from error


def tower_tensors(checkpoint: "Checkpoint", shapes: "dict[str, torch.Size]") -> "dict[str, torch.Tensor]":
    """Read the tower's tensors by their original names.

    Args:
        checkpoint: A merged directory or an original NatureLM-audio checkpoint.
        shapes: What the configuration asks for.

    Raises:
        CheckpointError: A tensor is unknown, missing or of another shape, or a second name of a shared tensor
            holds other values.
    """
    merged = "audio_config" in checkpoint.config
    held = {}
    for name in checkpoint.tensors:
        if merged and name.startswith(MERGED_PREFIX):
            held[name.removeprefix(MERGED_PREFIX)] = name
        elif not merged and is_tower_tensor(name):
            held[name] = name
        elif not merged and not name.startswith(_LLAMA_ROOTS):
            raise CheckpointError(f"{checkpoint.root}: the tensor {name} belongs neither to the tower nor to Llama")
    aliases = {name: original for name in held if (original := alias_of(name))}
    if missing := sorted(shapes.keys() - held.keys()):
        raise CheckpointError(f"{checkpoint.root}: lacks {_several(missing)} of the audio tower")
    if unknown := sorted(held.keys() - shapes.keys() - aliases.keys()):
        raise CheckpointError(f"{checkpoint.root}: holds {_several(unknown)}, unknown to the audio tower")
    for name, shape in shapes.items():
        if (found := tuple(checkpoint.tensors[held[name]].shape)) != tuple(shape):
            raise CheckpointError(
                f"{checkpoint.root}: {name} has the shape {found}, but config.json asks for {tuple(shape)}"
            )
    for name, original in aliases.items():
        if not checkpoint.read(held[name]).equal(checkpoint.read(held[original])):
            raise CheckpointError(f"{checkpoint.root}: {name} differs from {original}, which it must share")
    return {name: checkpoint.read(held[name]) for name in shapes}


def _several(names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"the tensor {names[0]}{more}"
