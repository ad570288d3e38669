"""A worker that listens: it hears stretches of an archive and asks about every window."""

import time
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from threading import Lock
from typing import NoReturn

from mergekit_bio.audio.clip import Clip
from mergekit_bio.engine.choice import engine_class
from mergekit_bio.engine.decoding.choices import NEGLIGIBLE, likeliest
from mergekit_bio.engine.interface import Engine, EngineSettings, Prompt
from mergekit_bio.engine.slot import EngineSlot
from mergekit_bio.listen.question import Question
from mergekit_bio.listen.quiet import is_quiet
from mergekit_bio.listen.reading import Ended, Window, WindowReader, windows_of
from mergekit_bio.listen.stretches import Heard, Stretch, StretchReader

#: An engine is asked for about so long at a time: as often, answers appear.
_SECONDS_AT_ONCE = 15.0
#: Windows that it is asked about before anybody knows how fast it is.
_FIRST = 16


@dataclass(frozen=True)
class Answer:
    """What the model says of a window.

    Attributes:
        text: Its words, or the likeliest choice; None where it was not asked, because the window is quiet.
        probability: Among the choices, where there are any.
        others: The next likeliest choices, with their probabilities.
    """

    text: str | None
    probability: float | None = None
    others: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class AnsweredWindow:
    """An answer and where it belongs: the ``number``-th window of a recording, from ``start`` to ``end`` seconds."""

    recording: str
    number: int
    start: float
    end: float
    answer: Answer


class ListenWorker:
    """Answers a question about stretches of an archive with one engine.

    Args:
        question: What is asked.
        model: The checkpoint that answers.
        slot: Holds the engine; whoever made it closes it.
    """

    def __init__(self, question: Question, model: str, slot: EngineSlot) -> None:
        self._question, self._model, self._slot = question, model, slot
        self._at_once = engine_class(slot.name).prompts_at_once(slot.settings)
        self._size = self._at_once if slot.remote else min(_FIRST, self._at_once)
        self._readers = StretchReader(self._reader_of)
        self._sending = ThreadPoolExecutor(2)
        self._sent: deque[tuple[list[Window | Ended], Future[list[Answer]]]] = deque()
        self._needed: Counter[str] = Counter()
        self._counting = Lock()
        self._told = len(slot.notes)

    def answer(self, stretch: Stretch, following: Stretch | None) -> Heard[AnsweredWindow]:
        """Ask about the next windows of a stretch.

        Args:
            stretch: What is left of it.
            following: What will probably come next: it is read when all of this is.

        Raises:
            MergekitBioError: The engine cannot run the model, or the question is no use.
        """
        # 1. The engine, and the reader at the stretch's beginning.
        engine = self._slot.at(self._model)
        since = time.perf_counter()
        reader = self._readers.at(stretch)
        # 2. Ask. Servers get the next windows too, to have something to do while the last answers are awaited.
        if self._slot.remote:
            while len(self._sent) < 2 and (heard := reader.take(self._size)):
                self._sent.append((heard, self._sending.submit(self._ask, engine, heard)))
            heard, sent = self._sent.popleft() if self._sent else ([], None)
            answers = sent.result() if sent else []
        else:
            heard = reader.take(self._size)
            self._readers.read_ahead(following)
            answers = self._ask(engine, heard)
        # 3. Say what was heard, and what is left.
        seconds = time.perf_counter() - since
        asked = sum(answer.text is not None for answer in answers)
        if asked and not self._slot.remote:
            self._size = max(1, min(self._at_once, round(asked / seconds * _SECONDS_AT_ONCE)))
        windows = [item for item in heard if isinstance(item, Window)]
        return Heard(
            windows=tuple(
                AnsweredWindow(window.recording, window.number, window.clip.start, window.clip.end, answer)
                for window, answer in zip(windows, answers, strict=True)
            ),
            ended=tuple(item for item in heard if isinstance(item, Ended)),
            rest=self._readers.left_after(heard),
            seconds=seconds,
            notes=self._notes(),
        )

    def close(self) -> None:
        """Read no further."""
        self._readers.close()
        self._sending.shutdown(wait=False, cancel_futures=True)

    def _ask(self, engine: Engine, heard: Sequence[Window | Ended]) -> list[Answer]:
        windows = [item for item in heard if isinstance(item, Window)]
        clips = [window.clip for window in windows if not window.quiet]
        answers = iter(answers_to(engine, self._question, [Prompt(self._question.text, (clip,)) for clip in clips]))
        if not self._slot.remote:
            self._forget(clips)
        return [Answer(None) if window.quiet else next(answers) for window in windows]

    def _reader_of(self, stretch: Stretch) -> WindowReader:
        question = self._question
        return WindowReader(
            stretch.recordings,
            windows_of(window=question.window, hop=question.hop, channel=question.channel),
            prepare=list if self._slot.remote else self._encode,
            ahead=2 * self._at_once,
            is_quiet=partial(is_quiet, decibels=question.skip_quiet),
        )

    def _encode(self, windows: list[Window]) -> list[Window]:
        """Have the prefixes of windows at hand; their samples, 1.3 MB each, are let go."""
        clips = [window.clip for window in windows if not window.quiet]
        with self._counting:  # before they are encoded: one that sounds the same may be answered meanwhile
            self._needed.update(clip.digest for clip in clips)
        self._slot.encode(clips)
        return [replace(window, clip=_without_samples(window)) for window in windows]

    def _forget(self, clips: Sequence[Clip]) -> None:
        """Free what no window needs any more: silence sounds like other silence."""
        with self._counting:
            self._needed.subtract(clip.digest for clip in clips)
            done = [clip for clip in clips if self._needed[clip.digest] <= 0]
            for clip in done:
                del self._needed[clip.digest]
            self._slot.forget(done)

    def _notes(self) -> tuple[str, ...]:
        """What a user should know of the prefixes, and has not been told."""
        self._slot.note_problem()
        new = tuple(self._slot.notes[self._told :])
        self._told += len(new)
        return new


class OwnEngine(ListenWorker):
    """A worker with an engine of its own.

    Args:
        question: What is asked.
        model: The checkpoint that answers.
        engine: The engine's name.
        settings: What it is started with.
    """

    def __init__(self, question: Question, model: str, engine: str, settings: EngineSettings) -> None:
        super().__init__(question, model, EngineSlot(engine_class(engine), settings))

    def close(self) -> None:
        """Close the engine too."""
        super().close()
        self._slot.close()


def answers_to(engine: Engine, question: Question, prompts: Sequence[Prompt]) -> list[Answer]:
    """Ask an engine in the way that the question says."""
    if not prompts:
        return []
    if question.choices:
        scored = engine.loglikelihood(prompts, question.choices, negligible=NEGLIGIBLE)
        return [Answer(*first, tuple(others)) for first, *others in map(likeliest, scored)]
    return [Answer(generation.text.strip()) for generation in engine.generate(prompts, question.decoding)]


def _without_samples(window: Window) -> Clip:
    clip = window.clip
    digest = None if window.quiet else clip.digest
    return Clip(_let_go, clip.seconds, clip.start, clip.end, digest=digest)


def _let_go() -> NoReturn:
    raise AssertionError("the samples of a clip whose prefix is at hand are not needed")
