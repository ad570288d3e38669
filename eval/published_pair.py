"""Llama-3.1-8B-Instruct and NatureLM-audio as they are published, with other weights, in a Hugging Face cache.

Names, shapes, dtypes, headers and sizes are those of the published files, the NatureLM-audio file to the byte. The
weights are random, or absent: ``sparse`` files are full size, take no room on the disk, and read as zeros.
"""

import argparse
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from synthetic import RANK, SHAPES, attention, llama_tensors
from tensor_file import Tensor, write_tensors

from mergekit_bio.audio.config import AudioPrefixConfig
from mergekit_bio.audio.tower import needed_shapes, unused_shapes

#: A new shard begins where the next tensor would make the shard larger: Transformers' default at the time.
_SHARD_BYTES = 5_000_000_000
_LAYERS = SHAPES["8b"].layers
_ADAPTER_LLAMA = "llama_model.base_model.model."
_EMBEDDING = "model.embed_tokens.weight"
_SHARED_BIAS = "beats.encoder.layers.{}.self_attn.relative_attention_bias.weight"

_LLAMA_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": _LAYERS,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 128256,
}

_NATURELM_CONFIG: dict[str, Any] = {
    "audio_llama_proj_model": "",
    "beats_cfg": {
        "activation_dropout": 0.0,
        "activation_fn": "gelu",
        "attention_dropout": 0.0,
        "conv_bias": False,
        "conv_pos": 128,
        "conv_pos_groups": 16,
        "deep_norm": True,
        "dropout": 0.0,
        "dropout_input": 0.0,
        "embed_dim": 512,
        "encoder_attention_heads": 12,
        "encoder_embed_dim": 768,
        "encoder_ffn_embed_dim": 3072,
        "encoder_layerdrop": 0.05,
        "encoder_layers": 12,
        "finetuned_model": True,
        "gru_rel_pos": True,
        "input_patch_size": 16,
        "layer_norm_first": False,
        "layer_wise_gradient_decay_ratio": 0.6,
        "max_distance": 800,
        "num_buckets": 320,
        "predictor_class": 527,
        "predictor_dropout": 0.0,
        "relative_position_embedding": True,
    },
    "downsample_factor": 8,
    "end_sym": "<|end_of_text|>",
    "freeze_audio_QFormer": False,
    "freeze_audio_llama_proj": False,
    "freeze_beats": True,
    "llama_path": "meta-llama/Meta-Llama-3.1-8B-Instruct",
    "lora": True,
    "lora_alpha": 32,
    "lora_dropout": 0.1,
    "lora_rank": RANK,
    "max_pooling": False,
    "max_txt_len": 160,
    "num_audio_query_token": 1,
    "prompt_template": (
        "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "second_per_window": 0.333333,
    "second_stride": 0.333333,
    "use_audio_Qformer": True,
    "window_level_Qformer": True,
}

#: Llama 3.1's special tokens from id 128000 on.
_SPECIAL = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_2|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    *(f"<|reserved_special_token_{n}|>" for n in range(3, 248)),
]


@dataclass(frozen=True)
class Repository:
    """One repository in a Hugging Face cache.

    Attributes:
        id: ``user/name``.
        revision: The commit that its branch ``main`` is at.
    """

    id: str
    revision: str

    def snapshot(self, hub: Path) -> Path:
        """Where its files are found in the cache ``hub``."""
        return self._folder(hub) / "snapshots" / self.revision

    def start(self, hub: Path) -> None:
        """Make its folders in the cache ``hub``."""
        for name in ("blobs", "refs"):
            (self._folder(hub) / name).mkdir(parents=True)
        self.snapshot(hub).mkdir(parents=True)
        (self._folder(hub) / "refs" / "main").write_text(self.revision)

    def blob(self, hub: Path, name: str) -> Path:
        """Where to write the file ``name``, which its snapshot links to. (The hub names blobs by content instead.)"""
        blob = self._folder(hub) / "blobs" / hashlib.sha256(f"{self.id}/{name}".encode()).hexdigest()
        link = self.snapshot(hub) / name
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(Path(*[".."] * (1 + len(Path(name).parts))) / "blobs" / blob.name)
        return blob

    def _folder(self, hub: Path) -> Path:
        return hub / f"models--{self.id.replace('/', '--')}"


BASE = Repository("meta-llama/Llama-3.1-8B-Instruct", "0e9e39f249a16976918f6564b8830bc894c89659")
ADAPTER = Repository("EarthSpeciesProject/NatureLM-audio", "77855d9b0acd039f90798dcf0861f626bfefbd6f")


def write_pair(hub: Path, *, layers: int = _LAYERS, sparse: bool = False) -> tuple[Path, Path]:
    """Write both into the cache ``hub`` (``HF_HOME/hub``), and return their snapshots: base, adapter.

    Args:
        hub: Holds neither of them yet.
        layers: Of Llama. The published one has 32; fewer make a smaller pair of the same layout.
        sparse: Leave the weights out: 17.6 GB of zeros that take no room.
    """
    write_base(hub, layers=layers, sparse=sparse)
    write_adapter(hub, layers=layers, sparse=sparse)
    return BASE.snapshot(hub), ADAPTER.snapshot(hub)


def write_base(hub: Path, *, layers: int = _LAYERS, sparse: bool = False) -> None:
    """Write the base alone; see :func:`write_pair`."""
    BASE.start(hub)
    shards = _shards(base_tensors(layers))
    weight_map = {}
    for number, tensors in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_tensors(BASE.blob(hub, file), tensors, {"format": "pt"}, sparse=sparse)
        weight_map |= {tensor.name: file for tensor in tensors}
    total = sum(tensor.nbytes for tensors in shards for tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    texts = {
        "model.safetensors.index.json": json.dumps(index, indent=2, sort_keys=True) + "\n",
        "config.json": json.dumps(_LLAMA_CONFIG | {"num_hidden_layers": layers}, indent=2),
        "generation_config.json": json.dumps(
            {
                "bos_token_id": 128000,
                "do_sample": True,
                "eos_token_id": [128001, 128008, 128009],
                "temperature": 0.6,
                "top_p": 0.9,
                "transformers_version": "4.42.3",
            },
            indent=2,
        ),
        **_tokenizer_files(),
        "LICENSE": "LLAMA 3.1 COMMUNITY LICENSE AGREEMENT\n",
        "USE_POLICY.md": "# Llama 3.1 Acceptable Use Policy\n",
        "README.md": "---\nlicense: llama3.1\n---\n",
        "original/consolidated.00.pth": "Beside the shards lies the same model for other programs.",
    }
    for name, text in texts.items():
        BASE.blob(hub, name).write_text(text)


def write_adapter(hub: Path, *, layers: int = _LAYERS, sparse: bool = False) -> None:
    """Write NatureLM-audio alone; see :func:`write_pair`."""
    ADAPTER.start(hub)
    shared = _SHARED_BIAS.format(0)
    encoder_layers = _NATURELM_CONFIG["beats_cfg"]["encoder_layers"]
    metadata = {_SHARED_BIAS.format(layer): shared for layer in range(1, encoder_layers)}
    write_tensors(ADAPTER.blob(hub, "model.safetensors"), adapter_tensors(layers), metadata, sparse=sparse)
    ADAPTER.blob(hub, "config.json").write_text(json.dumps(_NATURELM_CONFIG, indent=2))
    card = f"---\nlicense: cc-by-nc-sa-4.0\nbase_model:\n- {BASE.id}\n---\n"
    ADAPTER.blob(hub, "README.md").write_text(card)


def base_tensors(layers: int = _LAYERS) -> list[Tensor]:
    """Llama's, bfloat16; norms are ones."""
    tensors = llama_tensors(replace(SHAPES["8b"], layers=layers))
    return [replace(tensor, mean=1.0, std=0.0) if len(tensor.shape) == 1 else tensor for tensor in tensors]


def adapter_tensors(layers: int = _LAYERS) -> list[Tensor]:
    """NatureLM-audio's: the tower in float32; LoRA, and the input embedding with a row for [PAD], in bfloat16."""
    shape = SHAPES["8b"]
    embedding = Tensor("llama_embed_tokens.weight", (shape.vocabulary + 1, shape.hidden), alike=_EMBEDDING)
    return [*_tower_tensors(), *_lora_tensors(layers), embedding]


def _lora_tensors(layers: int) -> Iterator[Tensor]:
    for layer in range(layers):
        for name, rows, columns in attention(SHAPES["8b"]):
            module = f"{_ADAPTER_LLAMA}model.layers.{layer}.self_attn.{name}"
            yield Tensor(f"{module}.lora_A.default.weight", (RANK, columns))
            yield Tensor(f"{module}.lora_B.default.weight", (rows, RANK), std=0.002)  # ||delta|| is 1% of ||W||


def _tower_tensors() -> Iterator[Tensor]:
    """What our own tower asks for, and what it passes over: BEATs' classifier, and BERT's positions."""
    config = AudioPrefixConfig.from_naturelm(_NATURELM_CONFIG, hidden_size=SHAPES["8b"].hidden)
    for name, shape in (needed_shapes(config) | unused_shapes(config)).items():
        dtype = "I64" if name.endswith("position_ids") else "F32"
        scale = ("norm" in name.lower() or "ln_audio" in name) and name.endswith("weight")
        if scale or name.endswith("weight_g"):  # ones, so that activations stay sane
            yield Tensor(name, shape, dtype, mean=1.0, std=0.0)
        else:
            yield Tensor(name, shape, dtype)


def _shards(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    shards: list[list[Tensor]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(one.nbytes for one in shards[-1]) + tensor.nbytes > _SHARD_BYTES:
            shards.append([])
        shards[-1].append(tensor)
    return shards


def _tokenizer_files() -> dict[str, str]:
    """A tokenizer with Llama 3.1's ids: the demo's pieces, then names that stand for the others, then its specials."""
    import mergekit_bio.demo

    demo = Path(mergekit_bio.demo.__file__).parent / "model" / "base"
    tokenizer = json.loads((demo / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first = _LLAMA_CONFIG["bos_token_id"]
    vocabulary |= {f"Ġtoken{n}": n for n in range(len(vocabulary), first)}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer["added_tokens"] = [{"id": first + n, "content": text, **plain} for n, text in enumerate(_SPECIAL)]
    config = {
        "bos_token": "<|begin_of_text|>",
        "chat_template": (demo / "chat_template.jinja").read_text(),
        "clean_up_tokenization_spaces": True,
        "eos_token": "<|eot_id|>",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 131072,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    special = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    return {
        "tokenizer.json": json.dumps(tokenizer, ensure_ascii=False),
        "tokenizer_config.json": json.dumps(config, indent=2),
        "special_tokens_map.json": json.dumps(special, indent=2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("hub", type=Path, help="the cache: what HF_HUB_CACHE is to be")
    parser.add_argument("--layers", type=int, default=_LAYERS, help="of Llama; fewer than 32 make a smaller pair")
    parser.add_argument("--sparse", action="store_true", help="zeros that take no room")
    arguments = parser.parse_args()
    for snapshot in write_pair(arguments.hub, layers=arguments.layers, sparse=arguments.sparse):
        print(snapshot)


if __name__ == "__main__":
    main()
