"""What the page looks like, and what happens where. Gradio draws it."""

import asyncio
import math
from collections.abc import AsyncIterator, Sequence
from functools import partial
from html import escape
from itertools import zip_longest
from time import monotonic
from typing import Any

import gradio as gr
from fastapi import FastAPI
from vllm.exceptions import VLLMClientError

from mergekit_bio.engine.vllm.dial import LARGEST
from mergekit_bio.errors import MergekitBioError, PromptError
from mergekit_bio.serve.keys import vllms_keys
from mergekit_bio.serve.page.asking import Exchange, Question, ask, read_list, read_recording
from mergekit_bio.serve.page.login import KEY_NAME
from mergekit_bio.serve.page.spectrogram import as_data_url, spectrogram_png
from mergekit_bio.serve.request_log import CLIENT_LEFT, Entry, RequestLog, now
from mergekit_bio.serve.settings import PAGE, ServeSettings

#: Recordings of a question at most.
_MOST_RECORDINGS = 6
#: Uploads are deleted after so many seconds, and looked through so often; conversations need them no longer.
KEPT_SECONDS, LOOK_SECONDS = 3600, 60
#: A conversation that nobody goes on with is kept so long, and for an hour when its browser has left.
CONVERSATION_SECONDS = 12 * 3600

#: What NatureLM-audio was trained to be asked.
EXAMPLES = (
    "What is the common name for the focal species in the audio?",
    "What is the scientific name for the focal species in the audio?",
    "Caption the audio, using the common name for any animal species.",
    "What is the life stage of the focal species in the audio?",
    "Which of these, if any, are present in the audio? {species_list}",
    "How many individuals are heard in the audio?",
)

CSS = """
.gradio-container { max-width: 1200px !important; margin: 0 auto !important; }
.head { display: flex; flex-wrap: wrap; gap: .25rem 1rem; align-items: baseline; justify-content: space-between; }
.head h1 { font-size: 1.35rem; margin: 0; } .head p { margin: 0; opacity: .75; }
.spectrogram img { width: 100%; border-radius: 6px; } .spectrogram p { margin: 0; font-size: .85rem; opacity: .75; }
.chat .message-content > span { white-space: pre-wrap; overflow-wrap: anywhere; }
footer { display: none !important; }
"""


class _Side:
    """One conversation's part of the page, at one strength.

    Attributes:
        history: What was said: a tuple of exchanges.
    """

    def __init__(self, name: str, *, strength: float | None, visible: bool = True) -> None:
        self.history = gr.State((), time_to_live=CONVERSATION_SECONDS)
        with gr.Column(visible=visible, min_width=320) as self.column:
            self.strength = gr.Slider(
                0,
                LARGEST / 1000,
                value=strength or 0.0,
                step=0.05,
                label="Strength (alpha)",
                visible=strength is not None,
                elem_id=f"alpha-{name}",
            )
            self.chat = gr.Chatbot(
                label="Conversation",
                height=340,
                render_markdown=False,
                latex_delimiters=[],
                buttons=[],
                feedback_options=None,
                allow_file_downloads=False,
                elem_id=f"chat-{name}",
                elem_classes="chat",
                placeholder="Add a recording, then ask.",
            )
            self.probabilities = gr.Label(label="Probabilities", visible=False, elem_id=f"choices-{name}")
            with gr.Accordion("Prompt as sent", open=False):
                self.prompt = gr.Textbox(
                    show_label=False,
                    lines=6,
                    max_lines=20,
                    interactive=False,
                    buttons=["copy"],
                    elem_id=f"prompt-{name}",
                )

    @property
    def shown(self) -> list[Any]:
        """The components that :meth:`show` has values for."""
        return [self.history, self.chat, self.probabilities, self.prompt]

    def show(
        self, history: Sequence[Exchange], *, asked: Question | None = None, asked_anew: bool = False
    ) -> list[Any]:
        """Their values after what was said, with a question that waits for its answer."""
        if asked_anew:
            asked = history[-1].question
        messages = [message for said in history[: -1 if asked_anew else None] for message in _messages(said)]
        if asked is not None:
            messages += [_asked(asked), {"role": "assistant", "content": "…"}]
        last = history[-1].answer if history else None
        probabilities = dict(last.probabilities[:10]) if last is not None and asked is None else {}
        return [
            tuple(history),
            messages,
            gr.Label(probabilities or None, visible=bool(probabilities)),
            last.prompt if last is not None else "",
        ]


class Page:
    """The page's components and what they do.

    Attributes:
        blocks: Gradio's application.
    """

    def __init__(self, app: FastAPI, settings: ServeSettings) -> None:
        self._app, self._settings, self._dial = app, settings, settings.make_dial()
        self._log = None if settings.request_log is None else RequestLog(settings.request_log)
        default = None if settings.dial is None else settings.dial.default / 1000
        with gr.Blocks(
            title=settings.names[0], analytics_enabled=False, delete_cache=(LOOK_SECONDS, KEPT_SECONDS)
        ) as self.blocks:
            keys = settings.api_keys is not None or bool(vllms_keys(app.state.args.api_key))
            gr.HTML(_head(settings, keys=keys))
            # 1. Recordings: a further place appears where the last one is taken.
            self._recordings, spectrograms = [], []
            with gr.Row():
                for n in range(_MOST_RECORDINGS):
                    with gr.Column(visible=n == 0, min_width=320) as place:
                        recording = gr.Audio(
                            sources=["upload", "microphone"],
                            type="filepath",
                            label=f"Recording {n + 1}",
                            buttons=["download"],
                            elem_id=f"recording-{n + 1}",
                        )
                        spectrogram = gr.HTML(visible=False, elem_classes="spectrogram")
                    self._recordings.append((place, recording))
                    spectrograms.append(spectrogram)
            # 2. The question.
            self._question = gr.Textbox(
                label="Question", lines=2, max_lines=8, submit_btn="Ask", max_length=100_000,
                placeholder="What do you want to know? <AudioHere> says where a recording is heard; without it, all "
                "come first.", elem_id="question",
            )  # fmt: skip
            examples = gr.Dataset(
                components=["textbox"], samples=[[text] for text in EXAMPLES], label="Examples", elem_id="examples"
            )
            with gr.Accordion("Answer from a list", open=False):
                self._list = gr.Textbox(
                    value="",
                    label="Choices, one a line",
                    lines=4,
                    info="The answer is then the likeliest of them, each with its probability among them. "
                    "{species_list} in the question stands for the list.",
                    elem_id="choices",
                )
                self._none = gr.Checkbox(label="and “none of these”")
            # 3. The answers: at one strength, or at two side by side.
            self._comparing = gr.Checkbox(
                label="Compare with a second strength", visible=default is not None, elem_id="compare"
            )
            with gr.Row():
                self._left = _Side("a", strength=default)
                self._right = _Side("b", strength=None if default is None else 1.0, visible=False)
            again = gr.Button("New conversation", size="sm")
            # 4. What happens where.
            private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
            places = [place for place, _ in self._recordings]
            files = [recording for _, recording in self._recordings]
            for recording, spectrogram, following in zip_longest(files, spectrograms, places[1:]):
                outputs = [spectrogram, following] if following is not None else [spectrogram]
                recording.change(partial(self._hear, count=len(outputs)), recording, outputs, **private)
            examples.click(lambda sample: sample[0], examples, self._question, **private)
            sides = [self._left.strength, self._left.history, self._right.strength, self._right.history]
            asking = self._question.submit(
                self._ask,
                [self._question, self._list, self._none, self._comparing, *sides, *files],
                [self._question, *self._left.shown, *self._right.shown],
                **private,
            )
            self._question.stop(
                self._stop,
                [self._left.history, self._right.history],
                [self._question, *self._left.shown, *self._right.shown],
                cancels=[asking],
                **private,
            )
            for side in (self._left, self._right):
                # By pointer, keys or number; what comes while an answer is awaited is asked last, once.
                side.strength.change(
                    self._ask_again(side),
                    [side.strength, side.history],
                    side.shown,
                    trigger_mode="always_last",
                    **private,
                )
                side.chat.clear(partial(side.show, ()), None, side.shown, **private)
            self._comparing.change(
                self._compare,
                [self._comparing, self._right.strength, self._left.history],
                [self._right.column, *self._right.shown],
                **private,
            )
            again.click(self._begin, None, [*self._left.shown, *self._right.shown], **private)

    async def _hear(self, path: str | None, *, count: int) -> list[Any]:
        """Show what the model hears of a recording, and a place for the next one."""
        if path is None:
            return [gr.HTML(visible=False), gr.skip()][:count]
        try:
            recording = await read_recording(path, self._settings)
        except MergekitBioError as error:
            return [gr.HTML(f"<p role=alert>{escape(str(error))}</p>", visible=True), gr.skip()][:count]
        picture = as_data_url(await asyncio.to_thread(spectrogram_png, recording.clip))
        told = "What the model hears: one channel, up to 8 kHz."
        if recording.seconds > recording.clip.seconds:
            told = f"The model hears the first 10 s of {recording.seconds:.0f} s; the scissors choose others."
        shown = f'<img src="{picture}" alt="Spectrogram of {escape(recording.name)}"><p>{told}</p>'
        return [gr.HTML(shown, visible=True), gr.Column(visible=True)][:count]

    async def _ask(
        self,
        request: gr.Request,
        text: str,
        listed: str,
        none: bool,
        comparing: bool,
        left_strength: float,
        left: tuple[Exchange, ...],
        right_strength: float,
        right: tuple[Exchange, ...],
        *paths: str | None,
    ) -> AsyncIterator[list[Any]]:
        """Ask a question about the recordings that have not been sent yet, at one strength or two."""
        # 1. The question, or what is wrong with it.
        sent = {recording.path for said in left for recording in said.question.recordings}
        try:
            choices = read_list(listed or "", none=none)
            new = [path for path in paths if path is not None and path not in sent]
            recordings = [await read_recording(path, self._settings) for path in new]
            question = Question(text or "", tuple(recordings), choices)
            _ = question.content
        except MergekitBioError as error:
            raise _as_shown(error) from error
        # 2. It waits on each side; answers come in their own time.
        shown = [[gr.skip()] * 4, [gr.skip()] * 4]
        waiting: dict[asyncio.Task[Exchange], tuple[int, _Side, tuple[Exchange, ...]]] = {}
        for n, side, history, strength in (
            (0, self._left, left, left_strength),
            *([(1, self._right, right, right_strength)] if comparing else []),
        ):
            shown[n] = side.show(history, asked=question)
            task = asyncio.create_task(self._answer(request, history, question, strength))
            waiting[task] = n, side, history
        yield [gr.Textbox(submit_btn=False, stop_btn="Stop"), *shown[0], *shown[1]]
        problem: Exception | None = None
        try:
            while waiting:
                done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    n, side, history = waiting.pop(task)
                    try:
                        shown[n] = side.show([*history, task.result()])
                    except (MergekitBioError, VLLMClientError) as error:
                        problem, shown[n] = error, side.show(history)
                ended = gr.Textbox(text if problem else "", submit_btn="Ask", stop_btn=False)
                yield [gr.skip() if waiting else ended, *shown[0], *shown[1]]
        finally:
            for task in waiting:
                task.cancel()
        if problem is not None:
            raise _as_shown(problem)

    def _stop(self, left: tuple[Exchange, ...], right: tuple[Exchange, ...]) -> list[Any]:
        """Leave a question unanswered; it stays to be changed."""
        return [gr.Textbox(submit_btn="Ask", stop_btn=False), *self._left.show(left), *self._right.show(right)]

    def _ask_again(self, side: _Side) -> Any:
        """What asks one side's last question anew when its strength is another one."""

        async def ask_again(
            request: gr.Request, strength: float, history: tuple[Exchange, ...]
        ) -> AsyncIterator[list[Any]]:
            async for shown in self._anew(request, side, strength, history):
                yield shown

        return ask_again

    async def _compare(
        self, request: gr.Request, comparing: bool, strength: float, left: tuple[Exchange, ...]
    ) -> AsyncIterator[list[Any]]:
        """Show or hide the second side; it begins with the first one's conversation, its last question asked anew."""
        column = gr.Column(visible=comparing)
        yield [column, *self._right.show(())]
        if comparing:
            async for shown in self._anew(request, self._right, strength, left):
                yield [column, *shown]

    async def _anew(
        self, request: gr.Request, side: _Side, strength: float, history: tuple[Exchange, ...]
    ) -> AsyncIterator[list[Any]]:
        if not history:
            return
        *before, last = history
        yield side.show(history, asked_anew=True)
        try:
            yield side.show([*before, await self._answer(request, before, last.question, strength)])
        except (MergekitBioError, VLLMClientError) as error:
            yield side.show(history)
            raise _as_shown(error) from error

    async def _answer(
        self, request: gr.Request, history: Sequence[Exchange], question: Question, strength: float
    ) -> Exchange:
        """Ask the model, and put it into the request log as any other request."""
        entry = Entry(now(), getattr(request.request, "scope", {}).get(KEY_NAME), "POST", PAGE)
        start = monotonic()
        try:
            model = None if self._dial is None else self._dial.canonical(_thousandths(strength))
            entry.model = model or self._settings.names[0]
            said = await ask(self._app.state, history, question, model)
        except asyncio.CancelledError:
            entry.status = CLIENT_LEFT
            raise
        except (MergekitBioError, VLLMClientError):
            entry.status = 400
            raise
        else:
            questions = (*(old.question for old in history), question)
            heard = [recording for asked in questions for recording in asked.recordings]
            entry.audio_seconds = round(sum(min(one.seconds, one.clip.seconds) for one in heard), 3)
            entry.prompt_tokens, entry.completion_tokens = said.answer.prompt_tokens, said.answer.completion_tokens
            entry.status, entry.complete = 200, True
            return said
        finally:
            entry.status = entry.status or 500
            entry.seconds = round(monotonic() - start, 3)
            if self._log is not None:
                self._log.write(entry)

    def _begin(self) -> list[Any]:
        """Forget what was said; the recordings stay, and are sent with the next question."""
        return [*self._left.show(()), *self._right.show(())]


def _thousandths(strength: float) -> int:
    """A strength as the dial has it; the sliders know no others, but whoever sends a request may.

    Raises:
        PromptError: It is no number.
    """
    if not isinstance(strength, int | float) or not math.isfinite(strength):
        raise PromptError("the strength is no number")
    return round(1000 * min(max(strength, 0.0), LARGEST / 1000))


def _head(settings: ServeSettings, *, keys: bool) -> str:
    about = "one merged checkpoint" if settings.dial is None else "every strength of its adapter, side by side"
    out = '<a href="logout">Log out</a>' if keys else ""
    return f'<div class="head"><h1>{escape(settings.names[0])}</h1><p>{about}</p>{out}</div>'


def _asked(question: Question) -> dict[str, Any]:
    # Gradio's chat takes texts for HTML, with Markdown or without.
    heard = [f"♪ {recording.name}" for recording in question.recordings]
    return {"role": "user", "content": escape("\n".join([*heard, question.text.strip()]), quote=False)}


def _messages(said: Exchange) -> list[dict[str, Any]]:
    answer = said.answer
    chosen = f" · probability {answer.probabilities[0][1]:.2f}" if answer.probabilities else ""
    about = f"{answer.model}{chosen} · {answer.seconds:.1f} s"
    return [_asked(said.question), {"role": "assistant", "content": [escape(answer.text, quote=False), about]}]


def _as_shown(error: Exception) -> Exception:
    """An error that a user can cause, as Gradio shows it."""
    return gr.Error(escape(str(error)), print_exception=False, title="")
