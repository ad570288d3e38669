"""A conversation with the served model about recordings; what is asked is what ``/predict`` would ask."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from mergekit_bio.audio.clip import CLIP_SECONDS, Clip
from mergekit_bio.audio.decoding import stated_length
from mergekit_bio.audio.layout import AUDIO_SLOT
from mergekit_bio.audio.prompt import AUDIO_LEAD, check_audio_count
from mergekit_bio.engine.decoding.choices import FLAG, NEGLIGIBLE, NONE, distinct_choices, likeliest, with_choices
from mergekit_bio.engine.interface import Decoding
from mergekit_bio.errors import AudioError, PromptError
from mergekit_bio.serve.asking import check_size, choose, generate
from mergekit_bio.serve.media import read_clip
from mergekit_bio.serve.predictions import MAX_CHOICE_CHARACTERS, MAX_CHOICES, conversation_prompt
from mergekit_bio.serve.settings import ServeSettings


@dataclass(frozen=True)
class Recording:
    """One that a visitor has added.

    Attributes:
        path: Where it lies until it is deleted.
        clip: What the model hears of it.
        seconds: How long it is.
    """

    path: str
    clip: Clip
    seconds: float

    @property
    def name(self) -> str:
        """As its file is called."""
        return Path(self.path).name


@dataclass(frozen=True)
class Question:
    """One turn of the visitor's.

    Attributes:
        text: Their words.
        recordings: Those that are heard with it.
        choices: What the answer is one of; empty for any.
    """

    text: str
    recordings: tuple[Recording, ...] = ()
    choices: tuple[str, ...] = ()

    @property
    def content(self) -> str:
        """The words as the model reads them, with ``<AudioHere>`` for every recording.

        Raises:
            PromptError: They are none, or their slots are not as many as the recordings.
        """
        text = self.text.strip()
        if not text:
            raise PromptError("write a question")
        if FLAG in text and not self.choices:
            raise PromptError(f"the question says {FLAG}; write the list")
        slots = text.count(AUDIO_SLOT)
        if slots:
            check_audio_count(slots=slots, audios=len(self.recordings))
        return with_choices(text if slots else AUDIO_LEAD * len(self.recordings) + text, self.choices)


@dataclass(frozen=True)
class Answer:
    """One turn of the model's.

    Attributes:
        text: Its words, or the likeliest choice.
        model: Who answered: ``NAME@0.35``.
        prompt: All that the model was sent.
        seconds: How long it took.
        prompt_tokens: Of the prompt, audio included.
        completion_tokens: Of the answer; 0 for a choice, of which none was generated.
        probabilities: Choice -> its probability among the choices, the likeliest first; empty for any answer.
    """

    text: str
    model: str
    prompt: str
    seconds: float
    prompt_tokens: int
    completion_tokens: int
    probabilities: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Exchange:
    """A question and its answer."""

    question: Question
    answer: Answer


async def read_recording(path: str, settings: ServeSettings) -> Recording:
    """A file that a visitor has uploaded, within the server's limits.

    Raises:
        AudioError: It is gone, too large, too long or no audio.
    """
    try:
        data = await asyncio.to_thread(Path(path).read_bytes)
    except OSError as error:
        raise AudioError(f"{Path(path).name} has been deleted in the meantime; add it again") from error
    try:
        clip = await read_clip(data, settings, seconds=CLIP_SECONDS, shortest=False)
    except AudioError as error:
        raise AudioError(f"{Path(path).name}: {error}") from error
    _, seconds = await asyncio.to_thread(stated_length, Path(path))
    return Recording(path, clip, seconds or CLIP_SECONDS)


def read_list(written: str, *, none: bool) -> tuple[str, ...]:
    """Choices, one a line; none where nothing is written.

    Raises:
        PromptError: There is one alone, or too many, or two that differ in case or white space only.
    """
    if len(written) > MAX_CHOICE_CHARACTERS or written.count("\n") > MAX_CHOICES:
        raise PromptError(f"the list has more than {MAX_CHOICES} lines or {MAX_CHOICE_CHARACTERS} characters")
    lines = [line.strip() for line in written.splitlines() if line.strip()]
    return distinct_choices([*lines, *[NONE] * none], where="the list") if lines else ()


async def ask(state: Any, history: Sequence[Exchange], question: Question, model: str | None) -> Exchange:
    """Ask the model to go on with a conversation.

    Args:
        state: The application's.
        history: What was said before.
        question: What is asked now.
        model: One of the dial's, ``NAME@0.35``; None for the one checkpoint that is served.

    Raises:
        MergekitBioError: The question does not go with its recordings, or does not fit.
    """
    # 1. The prompt, as /predict makes it.
    turns = [
        turn for said in history for turn in (("user", said.question.content), ("assistant", said.answer.text.strip()))
    ]
    prompt = conversation_prompt([*turns, ("user", question.content)])
    heard = [recording for asked in (*(said.question for said in history), question) for recording in asked.recordings]
    check_audio_count(slots=prompt.count(AUDIO_SLOT), audios=len(heard))  # an answer may have written one
    check_size(state, prompt, audios=len(heard))
    clips = [recording.clip for recording in heard]
    settings: ServeSettings = state.mergekit_bio_settings
    adapter = None if state.mergekit_bio_dial is None else state.mergekit_bio_dial[model]
    name = settings.names[0] if adapter is None else adapter.lora_name
    # 2. The answer: the likeliest of the choices, or what /predict would give.
    start = perf_counter()
    if question.choices:
        scores, prompt_tokens = await choose(
            state, prompt=prompt, clips=clips, choices=question.choices, negligible=NEGLIGIBLE, adapter=adapter
        )
        probabilities = tuple(likeliest(scores, len(scores)))
        text, tokens = probabilities[0][0], 0
    else:
        decoding = Decoding(max_new_tokens=settings.max_new_tokens, num_beams=settings.num_beams)
        generation = await generate(state, prompt=prompt, clips=clips, decoding=decoding, adapter=adapter)
        probabilities, text, tokens = (), generation.text, len(generation.token_ids)
        prompt_tokens = generation.prompt_tokens
    seconds = perf_counter() - start
    return Exchange(question, Answer(text, name, prompt, seconds, prompt_tokens, tokens, probabilities))
