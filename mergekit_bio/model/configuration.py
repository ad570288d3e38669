"""The configuration of a merged directory, for Transformers."""

from typing import Any

from transformers import LlamaConfig, PreTrainedConfig

from mergekit_bio.audio.config import AudioPrefixConfig
from mergekit_bio.audio.layout import MODEL_TYPE


class NatureLMAudioConfig(PreTrainedConfig):
    """A plain Llama's configuration and the audio tower's, side by side; see :mod:`mergekit_bio.audio.layout`.

    Args:
        text_config: Llama's.
        audio_config: The tower's, as :meth:`AudioPrefixConfig.to_dict` gives it.
        audio_token_id: The token that stands for audio in ``input_ids``.
    """

    model_type = MODEL_TYPE
    sub_configs = {"text_config": LlamaConfig}  # noqa: RUF012 -- Transformers declares it a ClassVar

    text_config: dict[str, Any] | LlamaConfig | None = None
    audio_config: dict[str, Any] | None = None
    audio_token_id: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if not isinstance(self.text_config, LlamaConfig):
            self.text_config = LlamaConfig(**(self.text_config or {}))
        super().__post_init__(**kwargs)

    @property
    def audio_prefix_config(self) -> AudioPrefixConfig:
        """``audio_config``, checked.

        Raises:
            CheckpointError: It is missing, incomplete or inconsistent.
        """
        return AudioPrefixConfig.from_dict(self.audio_config or {}, where="config.json: audio_config")
