"""Which tensors of a NatureLM-audio checkpoint are the audio tower, and what a merged directory calls them."""

import re

#: In a merged directory every tensor of the tower keeps its original name behind this prefix.
MERGED_PREFIX = "audio_prefix."

_TOWER_ROOTS = ("beats.", "ln_audio.", "audio_Qformer.", "audio_query_tokens", "audio_llama_proj.")

_SHARED_BIAS = "beats.encoder.layers.0.self_attn.relative_attention_bias.weight"
_SHARED_BIAS_ALIAS = re.compile(r"beats\.encoder\.layers\.[1-9]\d*\.self_attn\.relative_attention_bias\.weight")


def is_tower_tensor(name: str) -> bool:
    """Whether an original NatureLM-audio tensor name belongs to the audio tower (and not to Llama or its LoRA)."""
    return name.startswith(_TOWER_ROOTS)


def merged_name(name: str) -> str:
    """``"beats.layer_norm.weight"`` -> ``"audio_prefix.beats.layer_norm.weight"``."""
    return MERGED_PREFIX + name


def alias_of(name: str) -> str | None:
    """The tensor that ``name`` is a second name of, or None.

    All BEATs layers share the position bias of layer 0. safetensors' ``save_model`` stores it once; a checkpoint
    written another way may hold a copy for every layer. Copies are not carried into a merged directory.
    """
    return _SHARED_BIAS if _SHARED_BIAS_ALIAS.fullmatch(name) else None
