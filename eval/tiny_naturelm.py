"""A NatureLM-audio and its Llama of a few hundred kilobytes, made from random numbers, in the layouts on disk."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from mergekit_bio.audio.config import AudioPrefixConfig
from mergekit_bio.audio.layout import LLAMA3_TEMPLATE
from mergekit_bio.audio.prefix import AudioPrefix
from mergekit_bio.audio.tower import POSITION_IDS, unused_shapes

HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, FFN, RANK = 64, 2, 2, 1, 32, 128, 4

SPECIAL = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
]

BEATS = {
    "activation_dropout": 0.0,
    "activation_fn": "gelu",
    "attention_dropout": 0.0,
    "conv_bias": False,
    "conv_pos": 16,
    "conv_pos_groups": 4,
    "deep_norm": True,
    "dropout": 0.0,
    "dropout_input": 0.0,
    "embed_dim": 16,
    "encoder_attention_heads": 2,
    "encoder_embed_dim": 32,
    "encoder_ffn_embed_dim": 64,
    "encoder_layerdrop": 0.0,
    "encoder_layers": 1,
    "finetuned_model": True,
    "gru_rel_pos": True,
    "input_patch_size": 16,
    "layer_norm_first": False,
    "layer_wise_gradient_decay_ratio": 1.0,
    "max_distance": 64,
    "num_buckets": 32,
    "predictor_class": 3,
    "predictor_dropout": 0.0,
    "relative_position_embedding": True,
}

NATURELM = {
    "audio_qformer_cfg": {"intermediate_size": 64, "layer_norm_eps": 1e-12, "num_attention_heads": 2},
    "beats_cfg": BEATS,
    "llama_path": "base",
    "lora": True,
    "lora_alpha": 2 * RANK,
    "lora_rank": RANK,
    "max_pooling": False,
    "num_audio_query_token": 1,
    "prompt_template": LLAMA3_TEMPLATE,
    "second_per_window": 0.333333,
    "second_stride": 0.333333,
    "use_audio_Qformer": True,
    "window_level_Qformer": True,
}

CORPUS = [
    "What is the common name for the focal species in the audio?",
    "Answer with exactly one of: marsh wren, tree frog, gray wolf, spring peeper.",
    "Audio: <Audio></Audio>\nLabel: marsh wren\n",
]


def audio_config(**beats: object) -> AudioPrefixConfig:
    return AudioPrefixConfig.from_naturelm(NATURELM | {"beats_cfg": BEATS | beats}, hidden_size=HIDDEN)


def random_prefix() -> AudioPrefix:
    """A tower of two layers in which every parameter matters."""
    torch.manual_seed(0)
    prefix = AudioPrefix(audio_config(encoder_layers=2)).eval()
    with torch.no_grad():
        for parameter in prefix.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return prefix


def make_base(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """A Llama with a Llama-3-like tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    vocab_size = _write_tokenizer(folder)
    eos = [SPECIAL.index(name) + vocab_size - len(SPECIAL) for name in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")]
    bos = vocab_size - len(SPECIAL)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": bos,
        "eos_token_id": eos,
        "head_dim": HEAD_DIM,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "max_position_embeddings": 8192,
        "model_type": "llama",
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "vocab_size": vocab_size,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": bos, "eos_token_id": eos}))
    generator = torch.Generator().manual_seed(seed)

    def weight(*shape: int, std: float = 0.15) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * std

    tensors = {
        "model.embed_tokens.weight": weight(vocab_size, HIDDEN, std=1.0),
        "model.norm.weight": torch.ones(HIDDEN),
    }
    tensors["lm_head.weight"] = weight(vocab_size, HIDDEN, std=0.4)  # wide enough that ties are rare
    for n in range(LAYERS):
        layer = f"model.layers.{n}"
        tensors |= {
            f"{layer}.input_layernorm.weight": torch.ones(HIDDEN),
            f"{layer}.post_attention_layernorm.weight": torch.ones(HIDDEN),
            f"{layer}.self_attn.q_proj.weight": weight(HEADS * HEAD_DIM, HIDDEN),
            f"{layer}.self_attn.k_proj.weight": weight(KV_HEADS * HEAD_DIM, HIDDEN),
            f"{layer}.self_attn.v_proj.weight": weight(KV_HEADS * HEAD_DIM, HIDDEN),
            f"{layer}.self_attn.o_proj.weight": weight(HIDDEN, HEADS * HEAD_DIM),
            f"{layer}.mlp.gate_proj.weight": weight(FFN, HIDDEN),
            f"{layer}.mlp.up_proj.weight": weight(FFN, HIDDEN),
            f"{layer}.mlp.down_proj.weight": weight(HIDDEN, FFN),
        }
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def make_naturelm(
    folder: Path,
    *,
    seed: int = 1,
    base: Path | None = None,
    prefix: AudioPrefix | None = None,
    llama: Path | None = None,
) -> Path:
    """An original NatureLM-audio checkpoint: the LoRA and the tower, ``prefix`` or one whose matrices are random.

    With ``base`` it is in the published layout: the LoRA in bfloat16, BEATs' classifier and BERT's positions, and the
    base's input embedding with the row of [PAD] more. With ``llama``, the directory of another Llama than
    :func:`make_base` makes, it has that one's shapes.
    """
    folder.mkdir(parents=True)
    sizes = json.loads((llama / "config.json").read_text()) if llama else {}
    hidden, head_dim = sizes.get("hidden_size", HIDDEN), sizes.get("head_dim", HEAD_DIM)
    queries = sizes.get("num_attention_heads", HEADS) * head_dim
    keys = sizes.get("num_key_value_heads", KV_HEADS) * head_dim
    torch.manual_seed(seed)
    tower = prefix or AudioPrefix(AudioPrefixConfig.from_naturelm(NATURELM, hidden_size=hidden))
    tensors = dict(tower.state_dict())
    if prefix is None:
        tensors = {name: t if t.ndim < 2 else torch.randn_like(t) * 0.3 for name, t in tensors.items()}
    layers = {"encoder_layers": tower.config.beats.num_hidden_layers}
    (folder / "config.json").write_text(json.dumps(NATURELM | {"beats_cfg": BEATS | layers}))
    widths = {"q": queries, "k": keys, "v": keys, "o": hidden}
    for n in range(sizes.get("num_hidden_layers", LAYERS)):
        for kind, width in widths.items():
            module = f"llama_model.base_model.model.model.layers.{n}.self_attn.{kind}_proj"
            inner = queries if kind == "o" else hidden
            tensors[f"{module}.lora_A.default.weight"] = torch.randn(RANK, inner) * 0.15
            tensors[f"{module}.lora_B.default.weight"] = torch.randn(width, RANK) * 0.3
    if base is not None:
        tensors = {name: t.bfloat16() if ".lora_" in name else t for name, t in tensors.items()}
        tensors |= {name: torch.ones(shape) for name, shape in unused_shapes(tower.config).items()}
        tensors[POSITION_IDS] = torch.arange(tower.config.qformer.num_positions)[None]
        embedding = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
        tensors["llama_embed_tokens.weight"] = torch.cat([embedding, torch.randn(1, HIDDEN).to(embedding.dtype)])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _write_tokenizer(folder: Path) -> int:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": SPECIAL[0],
                "eos_token": SPECIAL[-1],
                "clean_up_tokenization_spaces": True,
            }
        )
    )
    return tokenizer.get_vocab_size()
