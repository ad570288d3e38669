"""Tiny models with random weights, and the adapters that PEFT makes for them."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import peft
import torch
import transformers

VOCABULARY = 61
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LLAMA: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
}
TIED = LLAMA | {"tie_word_embeddings": True}
BASES: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "llama": lambda: transformers.LlamaConfig(**LLAMA),
    "llama-tied": lambda: transformers.LlamaConfig(**TIED),
    "llama-biased": lambda: transformers.LlamaConfig(**LLAMA, attention_bias=True, mlp_bias=True),
    "mistral": lambda: transformers.MistralConfig(**LLAMA),
    "qwen2": lambda: transformers.Qwen2Config(**LLAMA),
    "qwen3": lambda: transformers.Qwen3Config(**LLAMA, head_dim=8),
    "gemma": lambda: transformers.GemmaConfig(**TIED, head_dim=8),
    "gemma2": lambda: transformers.Gemma2Config(**TIED, head_dim=8),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0
    ),
}


@dataclass(frozen=True)
class Case:
    """One adapter.

    Attributes:
        name: What it is about.
        base: Key of ``BASES``.
        settings: Arguments of ``peft.LoraConfig``.
        added_tokens: Rows that the vocabulary was resized by before training.
        adapter_dtype: What the adapter's file is stored in.
        stays_tied: Whether a tied base stays tied.
    """

    name: str
    base: str
    settings: dict[str, Any]
    added_tokens: int
    adapter_dtype: torch.dtype
    stays_tied: bool

    @classmethod
    def of(
        cls,
        name: str,
        base: str = "llama",
        *,
        added_tokens: int = 0,
        adapter_dtype: torch.dtype = torch.float32,
        stays_tied: bool = True,
        **settings: Any,
    ) -> Self:
        """``r``, ``lora_alpha`` and ``target_modules`` have defaults; ``settings`` are the rest, and go before them."""
        defaults = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": ATTENTION}
        return cls(name, base, defaults | settings, added_tokens, adapter_dtype, stays_tied)


def write_base(name: str, directory: Path) -> None:
    """Save the model ``BASES[name]`` as a sharded bfloat16 checkpoint."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(BASES[name](), dtype=torch.float32)
    with torch.no_grad():  # new biases and norms are constant
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    model.to(torch.bfloat16).save_pretrained(directory, max_shard_size="16KB")


def load(base: Path, *, added_tokens: int = 0, untie: bool = False, dtype: torch.dtype = torch.float64):
    """The base in Transformers; ``untie`` gives a head that shares the embedding's weight one of its own."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=dtype, attn_implementation="eager")
    if untie and model.config.tie_word_embeddings:
        weights = model.state_dict()
        config = transformers.AutoConfig.from_pretrained(base, tie_word_embeddings=False)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
        model.load_state_dict(weights)
    if added_tokens:
        model.resize_token_embeddings(model.config.vocab_size + added_tokens, mean_resizing=False)
    return model.eval()


def train(case: Case, base: Path, adapter: Path) -> None:
    """Save what training would: every trainable parameter away from where it began."""
    torch.manual_seed(1)  # PEFT's initialisation draws from the global generator
    generator = torch.Generator().manual_seed(1)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # PEFT, on tied embeddings and on saving resized ones
        model = load(base, added_tokens=case.added_tokens, dtype=torch.float32)
        tuned = peft.get_peft_model(model, peft.LoraConfig(**case.settings))
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        tuned.to(case.adapter_dtype).save_pretrained(adapter)


def unmerged(case: Case, base: Path, adapter: Path, *, untie: bool = False) -> peft.PeftModel:
    """The adapter on its base, as PEFT loads them, in float64."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = load(base, added_tokens=case.added_tokens, untie=untie)
        return peft.PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False).eval()
