"""What the server's parts need to know, handed to every process of vLLM's through the environment."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

VARIABLE = "MERGEKIT_BIO_SERVE"
#: What vLLM knows this package's routes and its way to audio by (``pyproject.toml``).
PLUGIN = "mergekit_bio"


@dataclass(frozen=True)
class ServeSettings:
    """Everything beyond vLLM's own flags.

    Attributes:
        models: Model name -> directory, the first being the one that is loaded at the start.
        max_body_bytes: Larger requests are refused before they are read.
        max_batch: Items in one ``/predict`` request.
        max_audio_seconds: Longer recordings are refused before they are decoded.
        max_new_tokens: What ``/predict`` generates where the request does not say.
        prompt_template: What the chat template makes of one user's turn, with ``{}`` for it; None where a user gave a
            chat template of their own.
        fetch_seconds: Time for one ``file_url``.
        allowed_local_media_path: The only folder that files are read from; None for none.
        allowed_media_domains: The only hosts that files are fetched from.
    """

    models: Mapping[str, str]
    max_body_bytes: int = 64 << 20
    max_batch: int = 64
    max_audio_seconds: float = 600.0
    max_audio_bytes: int = 25 << 20
    max_new_tokens: int = 100
    prompt_template: str | None = None
    fetch_seconds: float = 20.0
    allowed_local_media_path: str | None = None
    allowed_media_domains: tuple[str, ...] = ()

    @property
    def default_model(self) -> str:
        """The model for requests that name none."""
        return next(iter(self.models))

    def directory(self, model: str) -> Path:
        """Where a model lies."""
        return Path(self.models[model])

    def to_environment(self) -> dict[str, str]:
        """As environment variables for vLLM's processes."""
        return {VARIABLE: json.dumps(asdict(self) | {"models": dict(self.models)})}

    @classmethod
    def from_environment(cls) -> "ServeSettings":
        """What :meth:`to_environment` wrote."""
        values = json.loads(os.environ[VARIABLE])
        return cls(**values | {"allowed_media_domains": tuple(values["allowed_media_domains"])})
