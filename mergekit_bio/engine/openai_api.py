"""Any server of OpenAI's chat API with a model that hears: other people's models, asked the same as ours."""

import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self
from urllib.parse import urlsplit

from mergekit_bio.audio.layout import AUDIO_SLOT
from mergekit_bio.audio.prompt import render_prompt
from mergekit_bio.engine.http import HttpEngine, with_scheme
from mergekit_bio.engine.http_questions import Question, wav_in_base64
from mergekit_bio.engine.interface import EngineSettings, Generation, Prompt
from mergekit_bio.errors import EngineError

#: Where an audio goes, with the words that NatureLM-audio has around it and other models do not know.
_SLOT = re.compile(f"(?:<Audio>)?{re.escape(AUDIO_SLOT)}(?:</Audio>)?")


class OpenAiEngine(HttpEngine):
    """Models of others over OpenAI's API, as baselines.

    A request holds what every such server takes and no more: the text with its audios in their places, as
    ``input_audio`` in 16-bit WAV, the length, the temperature. There is no beam search, no closed list and no score of
    a given answer.

    Args:
        servers: Base addresses as OpenAI's own clients take them, such as ``https://api.openai.com/v1``; where nothing
            stands behind the host, ``/v1`` is added.
        model: The model's name.
        api_key: The servers' key; by default that of the variable ``OPENAI_API_KEY``.
        **settings: As of :class:`mergekit_bio.engine.http.HttpEngine`.
    """

    name: ClassVar = "openai"
    baseline: ClassVar = True

    @classmethod
    def start(cls, checkpoint: str, settings: EngineSettings) -> Self:
        """Ask the servers for the model of this name."""
        return cls(settings.servers, model=checkpoint, api_key=settings.api_key, **settings.options)

    def __init__(self, servers: Sequence[str], *, model: str, api_key: str | None = None, **settings: Any) -> None:
        key = api_key or os.environ.get("OPENAI_API_KEY")
        super().__init__(servers, model=model, api_key=key, **settings)

    def _address(self, server: str) -> str:
        server = with_scheme(server).rstrip("/")
        return server if urlsplit(server).path else f"{server}/v1"

    def _choose_model(self, model: str | None) -> str:
        # Not all servers list their models, and some list them under other names. One that is unknown is refused when
        # it is asked.
        return model or ""

    def choose(self, prompts: Sequence[Prompt], labels: Sequence[str]) -> list[Generation]:
        """OpenAI's API has no closed lists: raises EngineError."""
        raise EngineError("OpenAI's API has no closed list; take decoding: generate")

    def loglikelihood(
        self, prompts: Sequence[Prompt], labels: Sequence[str], *, negligible: float = 0.0
    ) -> list[dict[str, float]]:
        """OpenAI's API does not score given answers: raises EngineError."""
        raise EngineError("OpenAI's API has no label scores; ask freely: decoding: generate, or ask without --choices")

    def load(self, checkpoint: str | Path) -> str:
        """Ask for another model. What tells it from others is its name alone."""
        self._model = str(checkpoint)
        return self._model

    def _question(self, prompt: Prompt, settings: dict[str, Any]) -> Question[Generation]:
        def body() -> dict[str, Any]:
            text = render_prompt(prompt.text, template="{}", num_audios=len(prompt.audios))
            content = list(_parts(text, prompt)) if prompt.audios else text
            return {"model": self._model, "messages": [{"role": "user", "content": content}]} | _needed(settings)

        return Question("/chat/completions", body, _read)


def _parts(text: str, prompt: Prompt) -> Iterator[dict[str, Any]]:
    """The text around its audios, in order."""
    clips = iter(prompt.audios)
    for number, piece in enumerate(_SLOT.split(text)):
        if number:
            audio = {"data": wav_in_base64(next(clips), bits=16), "format": "wav"}
            yield {"type": "input_audio", "input_audio": audio}
        if piece.strip():
            yield {"type": "text", "text": piece.strip()}


def _needed(settings: dict[str, Any]) -> dict[str, Any]:
    """Without what decides nothing: servers refuse what they do not know."""
    needed = {key: settings[key] for key in ("max_tokens", "temperature")}
    if settings["temperature"] > 0:
        needed["seed"] = settings["seed"]
    if settings["top_p"] < 1:
        needed["top_p"] = settings["top_p"]
    return needed


def _text(message: dict[str, Any]) -> str:
    """What a model says, in one text or in parts; or why it refuses to."""
    content = message.get("content") or message.get("refusal") or ""
    if isinstance(content, list):
        content = "".join(part["text"] for part in content if part.get("type") in ("text", "output_text"))
    if not isinstance(content, str):
        raise ValueError("the answer is no text")
    return content


def _read(document: Any, server: str, seconds: float) -> Generation:
    try:
        choice = document["choices"][0]
        return Generation(
            text=_text(choice["message"]),
            token_ids=(),
            logprobs=(math.nan,),
            finish_reason="length" if choice.get("finish_reason") == "length" else "stop",
            prompt_tokens=(document.get("usage") or {}).get("prompt_tokens") or 0,
            seconds=seconds,
        )
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError("the answer is no completion") from error
