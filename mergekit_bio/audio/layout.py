"""What a merged directory's config.json and processor_config.json say, as pure functions of its sources."""

import re
from typing import Any

from mergekit_bio.audio.config import AudioPrefixConfig
from mergekit_bio.errors import CheckpointError

#: Where an audio goes in a prompt's text (NatureLM-audio's own marker). It is text, not a token.
AUDIO_SLOT = "<AudioHere>"

MODEL_TYPE = "naturelm_audio"
ARCHITECTURE = "NatureLMAudioForConditionalGeneration"
PROCESSOR = "NatureLMAudioProcessor"

#: NatureLM-audio's prompt: one user turn, no system turn. The one BOS is put in front by the tokenization.
LLAMA3_TEMPLATE = (
    "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
)

#: What the config of a Llama and that of the model around it both state. Where a config.json on the disk does not say
#: which release wrote it, Transformers takes a tokenizer of 100,000 tokens for a faulty one of Mistral's, and warns.
_OF_BOTH = ("bos_token_id", "eos_token_id", "pad_token_id", "transformers_version")

_LLAMA31_RESERVED = "<|reserved_special_token_0|>"
_LOOKS_RESERVED = re.compile(r"reserved|unused|extra", re.IGNORECASE)


def placeholder_token(tokenizer: dict[str, Any]) -> tuple[str, int]:
    """The token that stands, prefix-length times, for an audio in ``input_ids``.

    It must be inside the vocabulary (vLLM refuses ids beyond it) and mean nothing to Llama: a reserved special token of
    ``tokenizer.json``.

    Returns:
        Its text and id: ``<|reserved_special_token_0|>`` in Llama 3.1, else the first special token whose name
        says that it is reserved.

    Raises:
        CheckpointError: The tokenizer has no reserved special token.
    """
    special = {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or [] if token.get("special")}
    reserved = [text for text in special if _LOOKS_RESERVED.search(text)]
    if not reserved:
        raise CheckpointError(
            "tokenizer.json has no reserved special token (such as <|reserved_special_token_0|>) that could stand for "
            "an audio; merge with --text-only, or use a base with Llama 3.1's tokenizer"
        )
    text = _LLAMA31_RESERVED if _LLAMA31_RESERVED in special else reserved[0]
    return text, special[text]


def merged_config(
    *,
    text_config: dict[str, Any],
    naturelm_config: dict[str, Any],
    tokenizer: dict[str, Any],
    dtype: str | None = None,
) -> dict[str, Any]:
    """``config.json`` of a merged directory with ears.

    Args:
        text_config: The base's ``config.json``: a plain Llama's. It is kept whole.
        naturelm_config: The original NatureLM-audio ``config.json``.
        tokenizer: The base's parsed ``tokenizer.json``.
        dtype: Data type of the Llama tensors written, such as ``"bfloat16"``; by default the base's. The tower
            keeps its own, whatever this is.

    Raises:
        CheckpointError: The base is no Llama, or one of the sources lacks what the other needs.
    """
    if text_config.get("model_type") != "llama":
        raise CheckpointError(
            f"the audio tower speaks to a Llama, but the base's model_type is {text_config.get('model_type')!r}; "
            "merge with --text-only"
        )
    _, audio_token_id = _placeholder_within(text_config, tokenizer)
    dtype = dtype or text_config.get("dtype") or text_config.get("torch_dtype") or "float32"
    text = {key: value for key, value in text_config.items() if key not in ("dtype", "torch_dtype")}
    of_both = {key: text_config[key] for key in _OF_BOTH if text_config.get(key) is not None}
    return {
        "architectures": [ARCHITECTURE],
        "audio_config": _audio_config(text_config, naturelm_config).to_dict(),
        "audio_token_id": audio_token_id,
        **of_both,
        "dtype": dtype,
        "model_type": MODEL_TYPE,
        "text_config": text | {"architectures": ["LlamaForCausalLM"], "dtype": dtype},
        "tie_word_embeddings": bool(text_config.get("tie_word_embeddings", False)),
    }


def processor_config(
    *, text_config: dict[str, Any], naturelm_config: dict[str, Any], tokenizer: dict[str, Any]
) -> dict[str, Any]:
    """``processor_config.json`` of a merged directory with ears; arguments and errors as for :func:`merged_config`."""
    audio_token, _ = _placeholder_within(text_config, tokenizer)
    audio = _audio_config(text_config, naturelm_config)
    template = naturelm_config.get("prompt_template") or LLAMA3_TEMPLATE
    if not isinstance(template, str) or template.count("{}") != 1:
        raise CheckpointError(f"config.json: prompt_template must hold {{}} exactly once, not {template!r}")
    return {
        "audio_token": audio_token,
        "clip_samples": audio.clip_samples,
        "prefix_length": audio.prefix_length(audio.clip_samples),
        "processor_class": PROCESSOR,
        "prompt_template": template,
        "sampling_rate": audio.sampling_rate,
    }


def _placeholder_within(text_config: dict[str, Any], tokenizer: dict[str, Any]) -> tuple[str, int]:
    text, token_id = placeholder_token(tokenizer)
    vocab_size = text_config.get("vocab_size")
    if not isinstance(vocab_size, int) or token_id >= vocab_size:
        raise CheckpointError(
            f"tokenizer.json gives {text} the id {token_id}, but the base's config.json has vocab_size {vocab_size!r}"
        )
    return text, token_id


def _audio_config(text_config: dict[str, Any], naturelm_config: dict[str, Any]) -> AudioPrefixConfig:
    hidden_size = text_config.get("hidden_size")
    if type(hidden_size) is not int:
        raise CheckpointError(f"the base's config.json must give hidden_size as an integer, not {hidden_size!r}")
    return AudioPrefixConfig.from_naturelm(naturelm_config, hidden_size=hidden_size)
