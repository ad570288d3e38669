"""A Llama checkpoint of any size with random weights, and a LoRA for it, written tensor by tensor."""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from tensor_file import Tensor, write_tensors

RANK = 32
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
SHARDS = 4


@dataclass(frozen=True)
class Dimensions:
    """Widths of a Llama; depth and vocabulary follow from the size asked for.

    Attributes:
        hidden, heads, kv_heads, head_dim, intermediate: As in ``LlamaConfig``.
        layers, vocabulary: Those of the real model.
    """

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    layers: int
    vocabulary: int


#: Llama-3.2-1B (here with a head of its own: 3.0 GB, 11% of it attention) and Llama-3.1-8B (16.1 GB, 17%).
SHAPES = {
    "1b": Dimensions(2048, 32, 8, 64, 8192, 16, 128256),
    "8b": Dimensions(4096, 32, 8, 128, 14336, 32, 128256),
}


def scaled(shape: Dimensions, nbytes: float) -> Dimensions:
    """The same widths at about ``nbytes``: depth and vocabulary grow alike, so the share of attention stays."""
    factor = nbytes / sum(tensor.nbytes for tensor in llama_tensors(shape))
    layers = max(1, round(shape.layers * factor))
    vocabulary = max(64, round(shape.vocabulary * factor))
    return replace(shape, layers=layers, vocabulary=vocabulary)


def write_llama(directory: Path, shape: Dimensions) -> int:
    """Write ``SHARDS`` safetensors files, their index and ``config.json``.

    Returns:
        The bytes of all tensors.
    """
    directory.mkdir(parents=True)
    tensors = list(llama_tensors(shape))
    total = sum(tensor.nbytes for tensor in tensors)
    weight_map, written = {}, 0
    for number in range(1, SHARDS + 1):
        file = f"model-{number:05}-of-{SHARDS:05}.safetensors"
        shard = []
        while tensors and (written < total * number / SHARDS):
            shard.append(tensors.pop(0))
            written += shard[-1].nbytes
        write_tensors(directory / file, shard, {"format": "pt"})
        weight_map |= {tensor.name: file for tensor in shard}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocabulary,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    return total


def write_adapter(directory: Path, shape: Dimensions, *, base: Path, seed: int = 1) -> None:
    """Write a PEFT LoRA of rank 32 on q, k, v and o of every layer; ||delta|| is about 1% of ||W||."""
    directory.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, rows, columns in attention(shape):
        for layer in range(shape.layers):
            key = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(RANK, columns, generator=generator) / columns**0.5
            tensors[f"{key}.lora_B.weight"] = (
                torch.randn(rows, RANK, generator=generator) * 2e-4 * (columns / RANK) ** 0.5
            )
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": list(TARGETS),
        "bias": "none",
        "inference_mode": True,
    }
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2))


def touched_share(shape: Dimensions) -> float:
    """Bytes of the tensors that the adapter changes, over all bytes."""
    touched = sum(2 * rows * columns for _, rows, columns in attention(shape)) * shape.layers
    return touched / sum(tensor.nbytes for tensor in llama_tensors(shape))


def attention(shape: Dimensions) -> list[tuple[str, int, int]]:
    """Name, rows and columns of the projections of one layer."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    return [
        ("q_proj", queries, shape.hidden),
        ("k_proj", keys, shape.hidden),
        ("v_proj", keys, shape.hidden),
        ("o_proj", shape.hidden, queries),
    ]


def llama_tensors(shape: Dimensions) -> Iterator[Tensor]:
    """All of its tensors, in the order of its state_dict."""
    yield Tensor("model.embed_tokens.weight", (shape.vocabulary, shape.hidden))
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}"
        for name, rows, columns in attention(shape):
            yield Tensor(f"{prefix}.self_attn.{name}.weight", (rows, columns))
        yield Tensor(f"{prefix}.mlp.gate_proj.weight", (shape.intermediate, shape.hidden))
        yield Tensor(f"{prefix}.mlp.up_proj.weight", (shape.intermediate, shape.hidden))
        yield Tensor(f"{prefix}.mlp.down_proj.weight", (shape.hidden, shape.intermediate))
        yield Tensor(f"{prefix}.input_layernorm.weight", (shape.hidden,))
        yield Tensor(f"{prefix}.post_attention_layernorm.weight", (shape.hidden,))
    yield Tensor("model.norm.weight", (shape.hidden,))
    yield Tensor("lm_head.weight", (shape.vocabulary, shape.hidden))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, help="gets base/ and adapter/")
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--gigabytes", type=float, help="size of the base; default: that of the shape")
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape]
    if arguments.gigabytes:
        shape = scaled(shape, arguments.gigabytes * 1e9)
    total = write_llama(arguments.directory / "base", shape)
    write_adapter(arguments.directory / "adapter", shape, base=arguments.directory / "base")
    print(f"{total / 1e9:.2f} GB, {touched_share(shape):.1%} of it touched, in {arguments.directory}")


if __name__ == "__main__":
    main()
