"""What servers are asked for a prompt, and how their answers are read."""

import base64
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from mergekit_bio.audio.clip import Clip
from mergekit_bio.audio.prompt import render_prompt
from mergekit_bio.engine.interface import Decoding, Generation, Prompt
from mergekit_bio.errors import PromptError

T = TypeVar("T")


@dataclass(frozen=True)
class Question(Generic[T]):
    """What a server is asked.

    Attributes:
        path: Of the address.
        body: Makes the request.
        read: Reads the answer, which is no text, given the server's name and the seconds that it took; raises
            ValueError where it is none, and PromptError where the server cannot answer the prompt.
    """

    path: str
    body: Callable[[], dict[str, Any]]
    read: Callable[[Any, str, float], T]


def chat_question(model: str, prompt: Prompt, settings: dict[str, Any]) -> Question[Generation]:
    """A prompt over OpenAI's chat API."""

    def body() -> dict[str, Any]:
        audios = [{"type": "audio_url", "audio_url": {"url": audio_url(clip)}} for clip in prompt.audios]
        text = render_prompt(prompt.text, template="{}", num_audios=len(audios))
        content = [{"type": "text", "text": text}, *audios] if audios else text
        messages = [{"role": "user", "content": content}]
        return {"model": model, "messages": messages, "logprobs": True, "return_token_ids": True} | settings

    def read(document: Any, server: str, seconds: float) -> Generation:
        try:
            (choice,) = document["choices"]
            entries = (choice.get("logprobs") or {}).get("content") or []
            logprobs = tuple(float(entry["logprob"]) for entry in entries)
            ids = tuple(choice.get("token_ids") or ())
            return Generation(
                text=choice["message"]["content"] or "",
                token_ids=ids,
                logprobs=logprobs or (math.nan,) * len(ids),
                finish_reason="length" if choice["finish_reason"] == "length" else "stop",
                prompt_tokens=document["usage"]["prompt_tokens"],
                seconds=seconds,
            )
        except (KeyError, TypeError) as error:
            raise ValueError("the answer is no completion") from error

    return Question("/v1/chat/completions", body, read)


def beam_question(model: str, prompt: Prompt, decoding: Decoding) -> Question[Generation]:
    """A prompt over predictions_v1, where our servers search with beams. Its answers tell no tokens."""
    config = {
        "max_new_tokens": decoding.max_new_tokens,
        "num_beams": decoding.num_beams,
        "length_penalty": decoding.length_penalty,
        "early_stopping": decoding.early_stopping,
    }

    def read(response: Any, seconds: float) -> Generation:
        return Generation(
            text=response["predictions"][0],
            token_ids=(),
            logprobs=(),
            finish_reason="length" if response["finish_reason"] == "length" else "stop",
            prompt_tokens=response["usage"]["prompt_tokens"],
            seconds=seconds,
        )

    return _predict_question(model, prompt, config, read)


def choices_question(
    model: str, prompt: Prompt, choices: Sequence[str], *, negligible: float
) -> Question[dict[str, float]]:
    """A prompt over predictions_v1, where our servers score choices.

    The answer is choice -> natural log-probability, as :meth:`mergekit_bio.engine.interface.Engine.loglikelihood` has
    it.
    """

    def read(response: Any, seconds: float) -> dict[str, float]:
        logprobs = response["choice_logprobs"]
        return {choice: -math.inf if logprobs[choice] is None else float(logprobs[choice]) for choice in choices}

    return _predict_question(model, prompt, {"choices": list(choices), "negligible_choices": negligible}, read)


def _predict_question(
    model: str, prompt: Prompt, config: dict[str, Any], read_response: Callable[[Any, float], T]
) -> Question[T]:
    """A prompt over predictions_v1.

    Args:
        model: Its name.
        prompt: What is asked.
        config: Its ``generation_config``.
        read_response: Reads the response to it.

    Raises:
        PromptError: The audios have different lengths: the contract has one for all of a prompt.
    """
    if len({clip.seconds for clip in prompt.audios}) > 1:
        raise PromptError(
            "servers search with beams, and score choices, only where all audios of a prompt are of one length"
        )

    def body() -> dict[str, Any]:
        text = render_prompt(prompt.text, template="{}", num_audios=len(prompt.audios))
        length = {"max_length_seconds": prompt.audios[0].seconds} if prompt.audios else {}
        item = {
            "sample_id": "0",
            "messages": [{"role": "user", "content": text}],
            "audio_inputs": [{"payload_type": "base64_wav", "data": wav_in_base64(clip)} for clip in prompt.audios],
            "generation_config": config | length,
        }
        return {"schema_version": "predictions_v1", "requests": [item]}

    def read(document: Any, server: str, seconds: float) -> T:
        try:
            (response,) = document["responses"]
            if response.get("error"):
                raise PromptError(f"{server} refuses the prompt: {response['error']}")
            return read_response(response, seconds)
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError("the answer is no response of predictions_v1") from error

    return Question(f"/{model}/predict", body, read)


def audio_url(clip: Clip) -> str:
    """A prepared clip as a ``data:`` URL.

    A server of ours would take it for the beginning of 10 s; the parameter says how long the clip is. Another server
    passes over the parameter and hears the clip as it is here: cut and padded.
    """
    return f"data:audio/wav;seconds={clip.seconds};base64,{wav_in_base64(clip)}"


def wav_in_base64(clip: Clip, *, bits: int | None = None) -> str:
    """A prepared clip as a WAV file in base64: 16-bit samples where all of them are, or ``bits`` is 16, else floats."""
    import soundfile

    from mergekit_bio.audio.config import SAMPLING_RATE

    scaled = clip.waveform * 32768
    pcm16 = bits == 16 or bool(((scaled.round() == scaled) & (scaled.abs() < 32768)).all())
    samples = scaled.round().clamp(-32768, 32767).short() if pcm16 else clip.waveform.float()
    file = io.BytesIO()
    subtype = "PCM_16" if pcm16 else "FLOAT"
    soundfile.write(file, samples.numpy(), SAMPLING_RATE, format="WAV", subtype=subtype)
    return base64.b64encode(file.getvalue()).decode()
