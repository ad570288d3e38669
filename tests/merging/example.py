"""A small Llama-shaped base and a LoRA for it, made on the spot: something to merge without a download."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_bio.checkpoint.directory import INDEX
from mergekit_bio.checkpoint.header import build_header

if TYPE_CHECKING:
    import torch

_HIDDEN, _FFN, _LAYERS, _HEADS, _KV, _VOCABULARY, _RANK = 256, 704, 4, 8, 4, 2048, 16


def write_example(folder: Path, *, seed: int = 0) -> tuple[Path, Path]:
    """Write ``base`` (4 layers, bfloat16, two shards) and ``adapter`` (a PEFT LoRA of rank 16 on q, k, v, o).

    Args:
        folder: An existing directory.
        seed: Of the random weights. The deltas are 0.3% of the weights, as a real fine-tune's are.

    Returns:
        The two directories.
    """
    import torch

    base, adapter = folder / "base", folder / "adapter"
    base.mkdir()
    adapter.mkdir()
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * scale

    kv = _HIDDEN * _KV // _HEADS
    attention = {"q_proj": _HIDDEN, "k_proj": kv, "v_proj": kv, "o_proj": _HIDDEN}
    weights = {"model.embed_tokens.weight": normal(_VOCABULARY, _HIDDEN, scale=0.02)}
    factors = {}
    for number in range(_LAYERS):
        layer = f"model.layers.{number}"
        for name, rows in attention.items():
            weights[f"{layer}.self_attn.{name}.weight"] = normal(rows, _HIDDEN, scale=0.02)
            pair = f"base_model.model.{layer}.self_attn.{name}"
            factors[f"{pair}.lora_A.weight"] = normal(_RANK, _HIDDEN, scale=1 / math.sqrt(_HIDDEN))
            factors[f"{pair}.lora_B.weight"] = normal(rows, _RANK, scale=6e-5 * math.sqrt(_HIDDEN / _RANK))
        for name, shape in (("gate", (_FFN, _HIDDEN)), ("up", (_FFN, _HIDDEN)), ("down", (_HIDDEN, _FFN))):
            weights[f"{layer}.mlp.{name}_proj.weight"] = normal(*shape, scale=0.02)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{layer}.{norm}.weight"] = torch.ones(_HIDDEN)
    weights |= {"model.norm.weight": torch.ones(_HIDDEN), "lm_head.weight": normal(_VOCABULARY, _HIDDEN, scale=0.02)}
    _write_base(base, {name: value.to(torch.bfloat16) for name, value in weights.items()})
    _write_tensors(adapter / "adapter_model.safetensors", factors, "F32")
    config = {"peft_type": "LORA", "r": _RANK, "lora_alpha": _RANK, "target_modules": sorted(attention), "bias": "none"}
    (adapter / "adapter_config.json").write_text(json.dumps(config, indent=2))
    return base, adapter


def _write_base(folder: Path, weights: "dict[str, torch.Tensor]") -> None:
    names = list(weights)
    weight_map: dict[str, str] = {}
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        _write_tensors(folder / file, {name: weights[name] for name in part}, "BF16")
        weight_map |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}, indent=2))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": _HIDDEN,
        "intermediate_size": _FFN, "num_hidden_layers": _LAYERS, "num_attention_heads": _HEADS,
        "num_key_value_heads": _KV, "vocab_size": _VOCABULARY, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def _write_tensors(file: Path, tensors: "dict[str, torch.Tensor]", dtype: str) -> None:
    from mergekit_bio.merging.fold import memory_of

    header = build_header(((name, dtype, tuple(value.shape)) for name, value in tensors.items()), {"format": "pt"})
    with file.open("wb") as stream:
        stream.write(header)
        for value in tensors.values():
            stream.write(memory_of(value))
