"""A small Llama and a small NatureLM-audio checkpoint, written as the real ones are laid out."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from mergekit_bio.audio.config import AudioPrefixConfig
from mergekit_bio.audio.prefix import AudioPrefix

SPECIAL = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]
BOS, EOS, PLACEHOLDER = 256, 261, 258
HIDDEN = 32

NATURELM_CONFIG: dict[str, Any] = {
    "audio_qformer_cfg": {"intermediate_size": 40, "layer_norm_eps": 1e-12, "num_attention_heads": 2},
    "beats_cfg": {
        "activation_dropout": 0.0,
        "activation_fn": "gelu",
        "attention_dropout": 0.0,
        "conv_bias": False,
        "conv_pos": 8,
        "conv_pos_groups": 2,
        "deep_norm": True,
        "dropout": 0.0,
        "dropout_input": 0.0,
        "embed_dim": 16,
        "encoder_attention_heads": 2,
        "encoder_embed_dim": 24,
        "encoder_ffn_embed_dim": 48,
        "encoder_layerdrop": 0.05,
        "encoder_layers": 2,
        "finetuned_model": True,
        "gru_rel_pos": True,
        "input_patch_size": 16,
        "layer_norm_first": False,
        "layer_wise_gradient_decay_ratio": 0.6,
        "max_distance": 64,
        "num_buckets": 32,
        "predictor_class": 5,
        "predictor_dropout": 0.0,
        "relative_position_embedding": True,
    },
    "downsample_factor": 8,
    "llama_path": "llama",
    "lora": True,
    "lora_alpha": 8,
    "lora_rank": 4,
    "max_pooling": False,
    "num_audio_query_token": 1,
    "prompt_template": "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "second_per_window": 0.333333,
    "second_stride": 0.333333,
    "use_audio_Qformer": True,
    "window_level_Qformer": True,
}


def audio_config(**changes: Any) -> AudioPrefixConfig:
    return AudioPrefixConfig.from_naturelm(NATURELM_CONFIG | changes, hidden_size=HIDDEN)


def random_prefix(config: AudioPrefixConfig | None = None, seed: int = 0) -> AudioPrefix:
    """A tower in which every parameter matters."""
    torch.manual_seed(seed)
    prefix = AudioPrefix(config or audio_config()).eval()
    with torch.no_grad():
        for parameter in prefix.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return prefix


def write_base(path: Path, *, dtype: torch.dtype = torch.bfloat16, tied: bool = False) -> None:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=262,
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=BOS,
        eos_token_id=EOS,
        tie_word_embeddings=tied,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(path)
    tokenizer = Tokenizer(
        models.BPE(vocab={c: n for n, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(path / "tokenizer.json"))
    tokens = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[5], "tokenizer_class": "PreTrainedTokenizerFast"}
    (path / "tokenizer_config.json").write_text(json.dumps(tokens))


def write_naturelm(path: Path, *, base: Path | None = None) -> AudioPrefix:
    """A NatureLM-audio checkpoint; with ``base`` in the published layout.

    The published file holds a bfloat16 LoRA, BEATs' classifier, BERT's positions, and the base's input embedding with
    the row of [PAD] more.
    """
    path.mkdir()
    (path / "config.json").write_text(json.dumps(NATURELM_CONFIG))
    prefix = random_prefix()
    tensors = dict(prefix.state_dict())
    for layer in range(2):
        for module, rows in {"q_proj": HIDDEN, "k_proj": 16, "v_proj": 16, "o_proj": HIDDEN}.items():
            name = f"llama_model.base_model.model.model.layers.{layer}.self_attn.{module}.lora"
            tensors[f"{name}_A.default.weight"] = torch.randn(4, HIDDEN) * 0.1
            tensors[f"{name}_B.default.weight"] = torch.randn(rows, 4) * 0.1
    if base is not None:
        tensors = {name: t.bfloat16() if ".lora_" in name else t for name, t in tensors.items()}
        tensors |= {"beats.predictor.weight": torch.randn(5, 24), "beats.predictor.bias": torch.randn(5)}
        tensors["audio_Qformer.bert.embeddings.position_ids"] = torch.arange(512)[None]
        embedding = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
        tensors["llama_embed_tokens.weight"] = torch.cat([embedding, torch.randn(1, HIDDEN).to(embedding.dtype)])
    save_file(tensors, path / "model.safetensors")
    return prefix
