"""What ``config.json`` says of the language model, which in a multimodal model stands in a part of its own."""

from collections.abc import Iterator
from typing import Any

#: Keys under which configurations keep their language model's part (Transformers, InternVL, DeepSeek-VL, Qwen-Omni).
_LANGUAGE_PARTS = ("text_config", "llm_config", "language_config", "thinker_config")


def language_parts(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The parts of a configuration that describe the language model, from the outermost, which is the whole, inwards.

    They are the dictionaries themselves: changing one changes ``config``.
    """
    yield config
    for key in _LANGUAGE_PARTS:
        if isinstance(part := config.get(key), dict):
            yield from language_parts(part)


def language_setting(config: dict[str, Any], *keys: str) -> Any:
    """What the innermost part that has one of ``keys`` says; None if none does."""
    found = [part[key] for part in language_parts(config) for key in keys if part.get(key) is not None]
    return found[-1] if found else None
