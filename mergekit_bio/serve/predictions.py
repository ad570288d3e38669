"""The predictions_v1 contract: what a request may be, and what comes back for it."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from mergekit_bio.audio.clip import CLIP_SECONDS
from mergekit_bio.audio.layout import AUDIO_SLOT
from mergekit_bio.audio.prompt import AUDIO_LEAD, check_audio_count
from mergekit_bio.audio.waveform import MIN_SECONDS
from mergekit_bio.engine.interface import Decoding, Generation
from mergekit_bio.errors import PromptError
from mergekit_bio.outside_data import is_text

SCHEMA = "predictions_v1"
MAX_BEAMS = 16
#: Choices of an item, and their characters together.
MAX_CHOICES, MAX_CHOICE_CHARACTERS = 2000, 100_000


def _check_text(value: str) -> str:
    if not is_text(value):
        raise ValueError("holds half of a surrogate pair, which is no text")
    return value


Text = Annotated[str, AfterValidator(_check_text)]


def _check_choices(choices: list[str]) -> list[str]:
    if (characters := sum(map(len, choices))) > MAX_CHOICE_CHARACTERS:
        raise ValueError(f"have {characters} characters together; at most {MAX_CHOICE_CHARACTERS} are taken")
    if not all(choice.strip() for choice in choices):
        raise ValueError(f"number {next(n for n, choice in enumerate(choices, 1) if not choice.strip())} is empty")
    if len(set(choices)) < len(choices):
        raise ValueError(f"{Counter(choices).most_common(1)[0][0]!r} is there twice")
    return choices


Choices = Annotated[list[Text], Field(min_length=1, max_length=MAX_CHOICES), AfterValidator(_check_choices)]


class _Tolerant(BaseModel):
    # The contract grows on the client's side; what is not known here changes nothing.
    model_config = ConfigDict(extra="ignore", frozen=True)


class Message(_Tolerant):
    """One turn."""

    role: Literal["system", "user", "assistant"]
    content: Text


class AudioInput(_Tolerant):
    """One audio. A file says its own sampling rate, which wins over ``sample_rate``."""

    payload_type: Literal["base64_wav", "file_path", "file_url"]
    data: Text
    sample_rate: float | None = None


class GenerationConfig(_Tolerant):
    """What beans-next sends and, under Transformers' names, more; null is unset.

    Attributes:
        max_tokens: Tokens at most; ``max_new_tokens`` is another name for it, and wins.
        max_length_seconds: What every audio is cut or padded to; 10 where it is unset. A benchmark's own setting, on
            which the number of an audio's prefix tokens depends.
        do_sample: Whether to sample; where it is not said, a temperature above 0 says so, except for beams.
        choices: The prediction is one of these, the likeliest as a whole answer; nothing is generated, so that what
            says how to generate is of no account.
        negligible_choices: Choices that all together have less than this share of the probability of all need not be
            scored; by default all are.
    """

    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_new_tokens: Annotated[int, Field(ge=1)] | None = None
    num_beams: Annotated[int, Field(ge=1, le=MAX_BEAMS)] | None = None
    length_penalty: Annotated[float, Field(ge=-10, le=10)] | None = None
    early_stopping: bool | Literal["never"] | None = None
    do_sample: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = None
    max_length_seconds: Annotated[float, Field(strict=True, ge=MIN_SECONDS, le=CLIP_SECONDS)] | None = None
    choices: Choices | None = None
    negligible_choices: Annotated[float, Field(ge=0, lt=1)] | None = None

    def decoding(self, *, default_tokens: int, default_beams: int) -> Decoding:
        """As an engine's settings.

        Args:
            default_tokens: Where the request does not say how many at most.
            default_beams: Where it does not say how many and does not sample.
        """
        temperature = 1.0 if self.temperature is None else self.temperature
        sample = self.do_sample
        if sample is None:
            sample = self.temperature is not None and self.num_beams in (None, 1)
        samples = sample and temperature > 0
        same = {"length_penalty", "early_stopping", "top_p", "top_k", "seed"}
        return Decoding(
            max_new_tokens=self.max_new_tokens or self.max_tokens or default_tokens,
            num_beams=self.num_beams or (1 if samples else default_beams),
            temperature=temperature if samples else 0.0,
            **self.model_dump(include=same, exclude_none=True),
        )


class Item(_Tolerant):
    """One sample to answer."""

    sample_id: Annotated[Text, Field(min_length=1)]
    messages: Annotated[list[Message], Field(min_length=1)]
    audio_inputs: list[AudioInput] = []
    generation_config: GenerationConfig = GenerationConfig()

    def prompt(self, *, system_turns: Literal["drop", "keep"]) -> str:
        """The complete prompt, with a slot for every audio.

        Audios without any slot stand before the first words of the user's. NatureLM-audio was trained without system
        turns, and its launchers in beans-next drop them.

        Raises:
            PromptError: The slots are not as many as the audios.
        """
        messages = [message for message in self.messages if message.role != "system" or system_turns == "keep"]
        contents = [message.content.strip() for message in messages]
        audios = len(self.audio_inputs)
        if audios and not any(AUDIO_SLOT in content for content in contents):
            first = next((n for n, message in enumerate(messages) if message.role == "user"), 0)
            if not messages:
                raise PromptError("the messages are empty")
            contents[first] = AUDIO_LEAD * audios + contents[first]
        check_audio_count(slots=sum(content.count(AUDIO_SLOT) for content in contents), audios=audios)
        if not any(contents):
            raise PromptError("the messages are empty")
        return conversation_prompt(
            [(message.role, content) for message, content in zip(messages, contents, strict=True)]
        )


def conversation_prompt(turns: Iterable[tuple[str, str]]) -> str:
    """The complete prompt of a conversation that the assistant is to go on with.

    Args:
        turns: Of each the role and the text, with ``<AudioHere>`` for every audio.
    """
    written = (f"<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>" for role, content in turns)
    return f"{''.join(written)}<|start_header_id|>assistant<|end_header_id|>\n\n"


class BadRequest(Exception):
    """A request that is refused as a whole, with an HTTP status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def read_requests(document: Any, *, max_batch: int) -> list[tuple[str, Item | str]]:
    """Check a request's body.

    Returns:
        For each item its ``sample_id`` and the item, or what is wrong with it.

    Raises:
        BadRequest: The whole cannot be answered: it is no request of this schema (422), has too many items (413) or
            the same ``sample_id`` twice (400).
    """
    if not isinstance(document, dict):
        raise BadRequest(422, "the body must be a JSON object")
    if document.get("schema_version") != SCHEMA:
        raise BadRequest(422, f"schema_version must be {SCHEMA!r}")
    items = document.get("requests")
    if not isinstance(items, list):
        raise BadRequest(422, "requests must be a list")
    if len(items) > max_batch:
        raise BadRequest(413, f"{len(items)} requests are more than max_batch_size {max_batch}")
    ids = [item.get("sample_id") if isinstance(item, dict) else None for item in items]
    if not all(is_text(sample_id) and sample_id for sample_id in ids):
        raise BadRequest(422, "every request needs a sample_id, a string of text that is not empty")
    if len(set(ids)) < len(ids):
        raise BadRequest(400, "a sample_id is there twice")
    return [(str(sample_id), _item(item)) for sample_id, item in zip(ids, items, strict=True)]


def _item(document: dict[str, Any]) -> Item | str:
    try:
        return Item.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg'].removeprefix('Value error, ')}"


def success(sample_id: str, generation: Generation) -> dict[str, Any]:
    """A response item with an answer."""
    return {
        "sample_id": sample_id,
        "predictions": [generation.text],
        "error": None,
        "finish_reason": generation.finish_reason,
        "usage": {"prompt_tokens": generation.prompt_tokens, "completion_tokens": len(generation.token_ids)},
        "latency_sec": generation.seconds,
    }


def scored(sample_id: str, scores: Mapping[str, float], *, prompt_tokens: int, seconds: float) -> dict[str, Any]:
    """A response item with the likeliest choice.

    Beside what every response item has it holds ``choice_logprobs``: choice -> natural log-probability as a whole
    answer, or null for one that need not be scored.
    """
    return {
        "sample_id": sample_id,
        "predictions": [max(scores, key=scores.__getitem__)],
        "error": None,
        "finish_reason": "stop",
        "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": 0},
        "latency_sec": seconds,
        "choice_logprobs": {choice: score if score > -math.inf else None for choice, score in scores.items()},
    }


def failure(sample_id: str, message: str) -> dict[str, Any]:
    """A response item without one."""
    return {"sample_id": sample_id, "predictions": [], "error": message or "the request cannot be answered"}
