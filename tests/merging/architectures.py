"""Tiny models of many architectures, with files named as those on the hub are, and adapters for them."""

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from merging.tiny import LLAMA, VOCABULARY
from safetensors.torch import load_file, save_file

import mergekit_bio

TOKENS = torch.arange(24).reshape(2, 12) * 5 % (VOCABULARY - 5)
LANGUAGE = LLAMA | {"num_hidden_layers": 2}
VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip
GPT = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def language(kind: type, **settings: Any) -> Any:
    return kind(**LANGUAGE | settings)


def llava() -> Any:
    vision = transformers.CLIPVisionConfig(**VISION)
    return transformers.LlavaConfig(
        text_config=language(transformers.LlamaConfig), vision_config=vision, image_token_index=60
    )


def gemma3() -> Any:
    return transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(**LANGUAGE | {"tie_word_embeddings": True}, head_dim=8),
        vision_config=transformers.SiglipVisionConfig(**VISION),
        mm_tokens_per_image=4, image_token_index=60, boi_token_index=58, eoi_token_index=59,
    )  # fmt: skip


def qwen2_audio() -> Any:
    audio = transformers.Qwen2AudioEncoderConfig(
        d_model=16, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=24, num_mel_bins=8,
        max_source_positions=16,
    )  # fmt: skip
    text = language(transformers.Qwen2Config)
    return transformers.Qwen2AudioConfig(text_config=text, audio_config=audio, audio_token_index=60)


def voxtral() -> Any:
    audio = transformers.VoxtralEncoderConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_mel_bins=8,
        max_source_positions=16,
    )  # fmt: skip
    text = language(transformers.LlamaConfig, head_dim=8)
    return transformers.VoxtralConfig(text_config=text, audio_config=audio, audio_token_id=60)


def qwen2_5_vl() -> Any:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    text = LANGUAGE | {"rope_parameters": rope, "bos_token_id": 0, "eos_token_id": 1}
    vision = {
        "depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32, "patch_size": 4,
        "window_size": 8, "fullatt_block_indexes": [1],
    }  # fmt: skip
    tokens = {"image_token_id": 60, "video_token_id": 59, "vision_start_token_id": 58, "vision_end_token_id": 57}
    return transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens)


def opt() -> Any:
    return transformers.OPTConfig(
        vocab_size=VOCABULARY, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=32,
    )  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """A model, and an adapter for it.

    Attributes:
        config: Makes its configuration.
        model: The class.
        targets: ``target_modules`` of the adapter.
        settings: Others of ``peft.LoraConfig``.
        hub_names: What its files on the hub say -> in the place of what Transformers 5.19 writes.
        head: The head's name in the files, if it has one.
        unties: Whether the adapter changes one side of a tied pair.
        prefix: What the names in its files get when it does.
    """

    config: Callable[[], Any]
    model: str
    targets: list[str] | str
    settings: dict[str, Any] = field(default_factory=dict)
    hub_names: tuple[str, str] = ("", "")
    head: str | None = "lm_head.weight"
    unties: bool = False
    prefix: str = ""


NESTED_HEAD = "language_model.lm_head.weight"
SAVED_TWICE = ("language_model.model.model.", "language_model.model.")  # Transformers 5.19 says "model" twice
ARCHITECTURES = {
    "llava": Architecture(
        llava, "LlavaForConditionalGeneration", ["q_proj", "v_proj", "fc1", "linear_1"],
        hub_names=("vision_tower.", "vision_tower.vision_model."), head=NESTED_HEAD,
    ),
    "gemma3": Architecture(
        gemma3, "Gemma3ForConditionalGeneration", r"model\.language_model.*\.(q_proj|down_proj)",
        {"modules_to_save": ["lm_head"]}, head=NESTED_HEAD, unties=True,
    ),
    "qwen2_audio": Architecture(
        qwen2_audio, "Qwen2AudioForConditionalGeneration", ["q_proj", "out_proj", "embed_tokens", "lm_head"],
        hub_names=SAVED_TWICE, head=NESTED_HEAD,
    ),
    "voxtral": Architecture(
        voxtral, "VoxtralForConditionalGeneration", ["q_proj", "o_proj", "fc2"], {"use_dora": True},
        hub_names=SAVED_TWICE, head=NESTED_HEAD,
    ),
    "qwen2_5_vl": Architecture(
        qwen2_5_vl, "Qwen2_5_VLForConditionalGeneration", ["q_proj", "qkv", "down_proj"], {"bias": "lora_only"},
    ),
    "opt": Architecture(opt, "OPTForCausalLM", ["q_proj", "lm_head"], unties=True),
    "cohere": Architecture(
        lambda: language(transformers.CohereConfig, tie_word_embeddings=True), "CohereForCausalLM", ["q_proj"],
        {"modules_to_save": ["lm_head"]}, unties=True,
    ),
    "starcoder2": Architecture(
        lambda: language(transformers.Starcoder2Config, tie_word_embeddings=True), "Starcoder2ForCausalLM",
        ["c_fc", "embed_tokens"], unties=True,
    ),
    "gpt_neox": Architecture(
        lambda: transformers.GPTNeoXConfig(**GPT, intermediate_size=48), "GPTNeoXForCausalLM",
        ["query_key_value", "lm_head"], head="embed_out.weight",
    ),
    "bloom": Architecture(
        lambda: transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4),
        "BloomForCausalLM", ["query_key_value", "word_embeddings"], hub_names=("transformer.", ""), unties=True,
        prefix="transformer.",
    ),
    "gpt2": Architecture(
        lambda: transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0
        ),
        "GPT2LMHeadModel", ["c_attn", "lm_head"], hub_names=("transformer.", ""), unties=True, prefix="transformer.",
    ),
    "mamba": Architecture(
        lambda: transformers.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, state_size=4, num_hidden_layers=2),
        "MambaForCausalLM", ["in_proj", "embeddings"], unties=True,
    ),
    "bert, classifier": Architecture(
        lambda: transformers.BertConfig(**GPT, intermediate_size=48, num_labels=3), "BertForSequenceClassification",
        ["query", "word_embeddings"], {"task_type": "SEQ_CLS"}, head=None,
    ),
    "llama, classifier": Architecture(
        lambda: language(transformers.LlamaConfig, num_labels=3, pad_token_id=0), "LlamaForSequenceClassification",
        ["q_proj", "embed_tokens"], {"task_type": "SEQ_CLS"}, head=None,
    ),
}  # fmt: skip


def build(architecture: Architecture) -> Any:
    torch.manual_seed(0)
    return getattr(transformers, architecture.model)(architecture.config())


def rename(file: Path, old: str, new: str) -> None:
    """What a file's tensors are called, changed."""
    save_file({name.replace(old, new): tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def load(directory: Path, *, untie: bool = False) -> Any:
    """What Transformers loads, in float64; ``untie`` gives a head that shares the embedding's weight one of its own."""
    config = transformers.AutoConfig.from_pretrained(directory)
    kind = getattr(transformers, config.architectures[0])
    settings = {"dtype": torch.float64, "attn_implementation": "eager"}
    model, found = kind.from_pretrained(directory, config=config, output_loading_info=True, **settings)
    assert not found["missing_keys"] and not found["unexpected_keys"], found
    if untie:
        weights = model.state_dict()
        for part in (config, config.get_text_config()):
            part.tie_word_embeddings = False
        model = kind(config).double()
        model.load_state_dict(weights)
    return model.eval()


def train(model: Any, adapter: Path, settings: dict[str, Any]) -> None:
    """Save what training would: every trainable parameter away from where it began."""
    torch.manual_seed(1)  # PEFT's initialisation draws from the global generator
    generator = torch.Generator().manual_seed(1)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        tuned = peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "lora_alpha": 8} | settings))
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        tuned.save_pretrained(adapter)


def unmerged(model: Any, adapter: Path) -> peft.PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message="Found missing adapter keys")
        return peft.PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def merge(base: Path, adapter: Path, out: Path, **options: Any) -> Path:
    options = {"dtype": "float32", "alphas": [1.0], "fsync": False, "device": "cpu"} | options
    return mergekit_bio.merge(base=base, adapter=adapter, out=out, **options)[0].path
