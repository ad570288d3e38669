"""Which tensors the audio tower has, and reading them out of a checkpoint, strictly."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_bio.audio.config import AudioPrefixConfig
from mergekit_bio.audio.names import MERGED_PREFIX, alias_of, is_tower_tensor
from mergekit_bio.checkpoint.header import FLOATS, TensorInfo
from mergekit_bio.checkpoint.source import Source
from mergekit_bio.errors import CheckpointError, SourceError

if TYPE_CHECKING:
    import torch

    from mergekit_bio.checkpoint.directory import Checkpoint

_LLAMA_ROOTS = ("llama_model.", "llama_embed_tokens.")
PROJECTION = "audio_llama_proj.weight"
#: What a checkpoint may hold and nothing reads: BEATs' own classifier and a buffer of BERT's.
PREDICTOR = "beats.predictor"
POSITION_IDS = "audio_Qformer.bert.embeddings.position_ids"


def needed_shapes(config: AudioPrefixConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that the tower computes with, under the original checkpoint's names.

    Kept without torch, so that a merge can be planned before torch is imported.
    """
    return dict(_needed(config))


def unused_shapes(config: AudioPrefixConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of what a checkpoint may hold besides, and the tower does not read."""
    beats = config.beats
    predictor = dict(_with_bias(PREDICTOR, beats.num_labels, beats.hidden_size)) if beats.num_labels else {}
    return {POSITION_IDS: (1, config.qformer.num_positions), **predictor}


def _needed(config: AudioPrefixConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    beats, qformer = config.beats, config.qformer
    wide, heads = beats.hidden_size, beats.num_attention_heads
    # BEATs: patches, the convolutional position embedding, the layers.
    yield "beats.patch_embedding.weight", (beats.patch_dim, 1, beats.patch_size, beats.patch_size)
    yield from _with_bias("beats.layer_norm", beats.patch_dim)
    yield from _with_bias("beats.post_extract_proj", wide, beats.patch_dim)
    yield "beats.encoder.pos_conv.0.bias", (wide,)
    yield "beats.encoder.pos_conv.0.weight_g", (1, 1, beats.conv_kernel)
    yield "beats.encoder.pos_conv.0.weight_v", (wide, wide // beats.conv_groups, beats.conv_kernel)
    yield from _with_bias("beats.encoder.layer_norm", wide)
    for number in range(beats.num_hidden_layers):
        layer = f"beats.encoder.layers.{number}"
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _with_bias(f"{layer}.self_attn.{projection}", wide, wide)
        yield from _with_bias(f"{layer}.self_attn.grep_linear", 8, wide // heads)
        yield f"{layer}.self_attn.grep_a", (1, heads, 1, 1)
        if number == 0:  # all layers share it
            yield f"{layer}.self_attn.relative_attention_bias.weight", (beats.num_buckets, heads)
        yield from _with_bias(f"{layer}.self_attn_layer_norm", wide)
        yield from _with_bias(f"{layer}.fc1", beats.intermediate_size, wide)
        yield from _with_bias(f"{layer}.fc2", wide, beats.intermediate_size)
        yield from _with_bias(f"{layer}.final_layer_norm", wide)
    yield from _with_bias("ln_audio", wide)
    # The Q-Former: queries that attend to themselves and to a window of BEATs' tokens.
    width = qformer.hidden_size
    yield "audio_query_tokens", (1, qformer.num_queries, width)
    yield from _with_bias("audio_Qformer.bert.embeddings.LayerNorm", width)
    for number in range(qformer.num_hidden_layers):
        layer = f"audio_Qformer.bert.encoder.layer.{number}"
        for attention, context in (("attention", width), ("crossattention", wide)):
            for projection, read in (("query", width), ("key", context), ("value", context)):
                yield from _with_bias(f"{layer}.{attention}.self.{projection}", width, read)
            yield from _with_bias(f"{layer}.{attention}.output.dense", width, width)
            yield from _with_bias(f"{layer}.{attention}.output.LayerNorm", width)
        yield from _with_bias(f"{layer}.intermediate_query.dense", qformer.intermediate_size, width)
        yield from _with_bias(f"{layer}.output_query.dense", width, qformer.intermediate_size)
        yield from _with_bias(f"{layer}.output_query.LayerNorm", width)
    yield from _with_bias("audio_llama_proj", config.hidden_size, width)


def _with_bias(name: str, *shape: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The tensors of a linear layer or a layer norm."""
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]


def check_tower(tensors: Mapping[str, TensorInfo], config: AudioPrefixConfig, where: Path) -> None:
    """Make sure, from headers alone, that a tower is whole: every tensor by its original name, without second names.

    Raises:
        CheckpointError: A tensor is missing, unknown, of another shape or of whole numbers.
    """
    needed, unused = needed_shapes(config), unused_shapes(config)
    if missing := sorted(needed.keys() - tensors.keys()):
        raise CheckpointError(f"{where}: lacks {_several(missing)} of the audio tower; fetch it again")
    if unknown := sorted(tensors.keys() - needed.keys() - unused.keys()):
        raise CheckpointError(f"{where}: holds {_several(unknown)}, unknown to the audio tower of this version")
    for name, shape in (needed | unused).items():
        if (tensor := tensors.get(name)) is None:
            continue
        if tensor.shape != shape:
            raise CheckpointError(f"{where}: {name} has the shape {tensor.shape}, but config.json asks for {shape}")
        if name in needed and tensor.dtype not in FLOATS:
            raise CheckpointError(
                f"{where}: {name} is {tensor.dtype}; the audio tower computes with {', '.join(FLOATS)}"
            )


def tower_config(checkpoint: "Checkpoint") -> AudioPrefixConfig:
    """The tower's configuration, from a merged directory or an original NatureLM-audio checkpoint.

    Raises:
        CheckpointError: The checkpoint has no tower, or its config.json does not describe one.
    """
    config = checkpoint.config
    if "audio_config" in config:
        return AudioPrefixConfig.from_dict(config["audio_config"], where=f"{checkpoint.root}/config.json: audio_config")
    projection = checkpoint.tensors.get(PROJECTION)
    if "beats_cfg" not in config and projection is None:
        raise CheckpointError(
            f"{checkpoint.root}: has no audio tower; give a merge of NatureLM-audio made without --text-only, or "
            "NatureLM-audio itself"
        )
    if projection is None:
        raise CheckpointError(f"{checkpoint.root}: lacks the tensor {PROJECTION}")
    try:
        return AudioPrefixConfig.from_naturelm(config, hidden_size=projection.shape[0])
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.root}/{error}") from error


def tower_tensors(checkpoint: "Checkpoint", config: AudioPrefixConfig) -> "dict[str, torch.Tensor]":
    """Read what the tower computes with, by its original names, of a merged directory or an original checkpoint.

    Raises:
        CheckpointError: A tensor is unknown, missing or of another shape, or a second name of a shared tensor
            holds other values.
    """
    merged = "audio_config" in checkpoint.config
    held: dict[str, TensorInfo] = {}
    for name, info in checkpoint.tensors.items():
        if merged and name.startswith(MERGED_PREFIX):
            held[name.removeprefix(MERGED_PREFIX)] = info
        elif not merged and is_tower_tensor(name):
            held[name] = info
        elif not merged and not name.startswith(_LLAMA_ROOTS):
            raise CheckpointError(f"{checkpoint.root}: the tensor {name} belongs neither to the tower nor to Llama")
    aliases = {name: original for name in held if (original := alias_of(name))}
    check_tower({name: info for name, info in held.items() if name not in aliases}, config, checkpoint.root)
    for name, original in aliases.items():
        if not held[name].read().equal(held[original].read()):
            raise CheckpointError(f"{checkpoint.root}: {name} differs from {original}, which it must share")
    return {name: held[name].read() for name in needed_shapes(config)}


def _several(names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"the tensor {names[0]}{more}"


def refuse_newer_layout(source: Source) -> None:
    """Refuse a directory that is laid out as NatureLM-audio 1.1 and later are.

    Raises:
        SourceError: It holds ``model.json`` beside ``model/llm``.
    """
    if (source.path / "model.json").is_file() and (source.path / "model" / "llm").is_dir():
        raise SourceError(
            f"{source.given}: is a NatureLM-audio of version 1.1 or later (model.json, model/llm), another "
            "architecture; this version reads NatureLM-audio 1.0, EarthSpeciesProject/NatureLM-audio"
        )
