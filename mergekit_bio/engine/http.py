"""Any number of servers as one engine: each prompt goes to whoever has room."""

import asyncio
import math
import random
import threading
import time
from collections.abc import Coroutine, Mapping, Sequence, Set
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, NoReturn, Self, TypeVar

from mergekit_bio.audio.prompt import render_prompt
from mergekit_bio.engine.http_questions import Question, beam_question, chat_question, choices_question
from mergekit_bio.engine.interface import (
    Decoding,
    EngineSettings,
    Generation,
    Prompt,
    check_options,
)
from mergekit_bio.errors import EngineError, MissingPackageError, PromptError

T = TypeVar("T")

#: Requests under way at each server, where nobody says otherwise.
CONCURRENCY = 32
#: Answers that another try, or another server, may better.
_RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
#: What a user may do about an answer to the first requests.
_HINTS = {
    401: "; give its --api-key",
    404: "; it has no such model, or is no server of mergekit-bio (others are asked with --engine openai)",
}


@dataclass(frozen=True)
class Retries:
    """How to deal with servers that fail.

    Attributes:
        attempts: Tries a prompt gets, on whichever servers.
        first_wait: Seconds before the second try; doubled from then on, and drawn at random below that.
        longest_wait: Seconds at most.
        longest_patience: Seconds at most that are waited because a server asks for it (status 429, ``Retry-After``).
        given_up_after: Failures in a row after which a server is left alone for good.
        patience: A prompt that takes so many times longer than any answer did so far is asked at another server too,
            as soon as one has room; a server that lost such a race has failed.
    """

    attempts: int = 8
    first_wait: float = 0.5
    longest_wait: float = 30.0
    longest_patience: float = 600.0
    given_up_after: int = 5
    patience: float = 3.0


@dataclass(frozen=True)
class ListLimits:
    """The lists of choices that a server scores, as its ``/info`` says.

    Attributes:
        choices: How many at most; 0: it scores none.
        characters: Of all of them together.
    """

    choices: int = 0
    characters: int = 0

    @classmethod
    def of(cls, info: Mapping[str, Any]) -> Self:
        """As ``/info`` says; servers that score no choices do not say it."""
        limits = [info.get(key) for key in ("max_choices", "max_choice_characters")]
        return cls(*(limit if isinstance(limit, int) else 0 for limit in limits))

    def check(self, choices: Sequence[str], server: str) -> None:
        """Refuse what the server does not score.

        Raises:
            EngineError: It does not score choices, or not so many.
        """
        if not self.choices:
            raise EngineError(
                f"{server} does not score choices: its /info has no max_choices; update its mergekit-bio, or take "
                "--engine vllm or transformers"
            )
        characters = sum(map(len, choices))
        if len(choices) > self.choices or characters > self.characters:
            raise EngineError(
                f"the list has {len(choices)} choices with {characters} characters, and {server} takes {self.choices} "
                f"with {self.characters} at most; shorten it, or take --engine vllm or transformers"
            )


class HttpEngine:
    """Servers of ``mergekit-bio serve``, which put a text's ``<AudioHere>`` slots and its audios together.

    Every server has a bounded number of requests under way; the next prompt goes to the server with the most room. A
    prompt whose server fails or is slow is tried again, elsewhere if there is an elsewhere. Several threads may ask at
    once: they share the room, so that the end of one call and the beginning of the next keep the servers busy
    together.

    Args:
        servers: Their addresses, such as ``http://127.0.0.1:8000``.
        model: The model name that they offer; by default the one that all of them do.
        api_key: The servers' key.
        concurrency: Requests under way at each server.
        timeout: Seconds for one request.
        retries: How to deal with servers that fail.
    """

    name: ClassVar = "http"
    remote: ClassVar = True
    baseline: ClassVar = False
    packages: ClassVar = ("httpx",)
    advice: ClassVar = ""
    prefixes: None = None  # the servers have their own

    @classmethod
    def missing(cls) -> MissingPackageError | None:
        """The error that says how to install httpx, where it is not."""
        return None if find_spec("httpx") else MissingPackageError("httpx", "eval", "the http engine")

    @classmethod
    def set_environment(cls, *, quiet: bool) -> None:
        """The servers have their own."""

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        """Refuse options that it does not have."""
        check_options(cls.name, options, known=("concurrency", "timeout"))

    @classmethod
    def prompts_at_once(cls, settings: EngineSettings) -> int:
        """Twice what all servers have under way. A run sends the next as many before the last of these are answered."""
        return 2 * settings.options.get("concurrency", CONCURRENCY) * max(1, len(settings.servers))

    @classmethod
    def gpus(cls, options: Mapping[str, Any]) -> int:
        """None: the servers have them."""
        return 0

    @classmethod
    def start(cls, checkpoint: str, settings: EngineSettings) -> Self:
        """Ask the servers, and for the checkpoint that has this directory's name."""
        engine = cls(settings.servers, api_key=settings.api_key, **settings.options)
        engine.load(checkpoint)
        return engine

    def __init__(
        self,
        servers: Sequence[str],
        *,
        model: str | None = None,
        api_key: str | None = None,
        concurrency: int = CONCURRENCY,
        timeout: float = 600.0,
        retries: Retries | None = None,
    ) -> None:
        if error := self.missing():
            raise error
        if not servers:
            raise EngineError("name a server: --server http://HOST:PORT")
        if not isinstance(concurrency, int) or concurrency < 1:
            raise EngineError(f"concurrency={concurrency}: write a whole number of 1 or more")
        if not isinstance(timeout, int | float) or not timeout > 0:
            raise EngineError(f"timeout={timeout}: write a number of seconds")
        self._servers = [self._address(server) for server in servers]
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._concurrency, self._timeout, self._retries = concurrency, timeout, retries or Retries()
        # Connections and counts belong to one event loop. Whoever asks waits for it, from whichever thread.
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="http engine", daemon=True).start()
        self._room = _Room(self._servers, concurrency=concurrency, given_up_after=self._retries.given_up_after)
        self._client: Any = None
        self._most_beams = 1
        self._limits = dict.fromkeys(self._servers, ListLimits())
        self._template = "{}"
        try:
            self._model = self._choose_model(model)
        except BaseException:
            self.close()
            raise

    def _address(self, server: str) -> str:
        """What the paths of questions are added to."""
        return with_scheme(server).rstrip("/").removesuffix("/v1")

    def _choose_model(self, model: str | None) -> str:
        """The model to ask first, which every server has."""
        self._offered = self._in_common()
        if model is not None and not _offers(self._offered, model):
            raise EngineError(f"not every server offers the model {model}; in common are: {_in_words(self._offered)}")
        if not self._offered:
            raise EngineError(f"the servers {', '.join(self._servers)} have no model in common")
        return model or self._offered[0]

    def _in_common(self) -> list[str]:
        """The models that every server offers."""
        first, *others = [self._wait_for(self._models(server)) for server in self._servers]
        return [name for name in first if all(name in names for names in others)]

    def render(self, prompt: Prompt) -> str:
        """The prompt in the template that the servers tell, else the user's words alone."""
        return render_prompt(prompt.text, template=self._template, num_audios=len(prompt.audios))

    def generate(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[Generation]:
        """Answer prompts, over all servers at once.

        Raises:
            EngineError: The servers have no beam search that wide, or end tokens are asked for, which they do not
                take, or no server answers any more.
            PromptError: A server refuses a prompt.
        """
        if decoding.eos_token_ids is not None:
            raise EngineError("servers end with the end tokens of their own model; leave eos_token_ids out")
        if decoding.num_beams > self._most_beams:
            raise EngineError(
                f"not every server says that it searches with {decoding.num_beams} beams; take num_beams "
                f"{self._most_beams}, or --engine vllm"
            )
        if decoding.num_beams > 1:
            return self._answer_all([beam_question(self._model, prompt, decoding) for prompt in prompts])
        settings = {
            "max_tokens": decoding.max_new_tokens,
            "temperature": decoding.temperature,
            "top_p": decoding.top_p,
            **({"top_k": decoding.top_k} if decoding.top_k else {}),
        }
        seeds = range(decoding.seed, decoding.seed + len(prompts))
        return self._answer_all(
            [self._question(prompt, settings | {"seed": seed}) for prompt, seed in zip(prompts, seeds, strict=True)]
        )

    def choose(self, prompts: Sequence[Prompt], labels: Sequence[str]) -> list[Generation]:
        """Answer each prompt with one of the labels; the server constrains the answer.

        It lets through any tokens that spell a label, where the other engines take the label's own, so between close
        labels another one may win. Its log-probabilities are those of the tokens among the whole vocabulary.
        """
        longest = max((len(label.encode()) for label in labels), default=0)
        settings = {"max_tokens": longest + 1, "temperature": 0.0, "structured_outputs": {"choice": list(labels)}}
        return self._answer_all([self._question(prompt, settings) for prompt in prompts])

    def loglikelihood(
        self, prompts: Sequence[Prompt], labels: Sequence[str], *, negligible: float = 0.0
    ) -> list[dict[str, float]]:
        """See :meth:`mergekit_bio.engine.interface.Engine.loglikelihood`.

        Without prompts nothing is asked; a list that a server does not take is refused all the same.

        Raises:
            EngineError: A server does not score choices, or not so many, or no server answers any more.
            PromptError: A server refuses a prompt, or a choice.
        """
        for server, limits in self._limits.items():
            limits.check(labels, server)
        return self._answer_all(
            [choices_question(self._model, prompt, labels, negligible=negligible) for prompt in prompts]
        )

    def load(self, checkpoint: str | Path) -> str:
        """Ask the servers for another of the models they offer, by its directory's name.

        The servers check what they load; what is returned is their ``model_revision`` and not a hash of weights.
        """
        name = Path(checkpoint).name
        if not _offers(self._offered, name):
            raise EngineError(
                f"the servers do not offer {name}; they offer {_in_words(self._offered)}. Ask for one of these, or "
                f"start them with: mergekit-bio serve ... {checkpoint}"
            )
        told = [self._wait_for(self._get(f"{server}/{name}/info")) for server in self._servers]
        revisions = {str(info.get("model_revision")) for info in told}
        if len(revisions) > 1:
            raise EngineError(f"the servers have different checkpoints called {name}; serve the same one everywhere")
        templates = {str(info.get("prompt_template")) for info in told}
        template = templates.pop() if len(templates) == 1 else ""
        self._model, self._template = name, template if template.count("{}") == 1 else "{}"
        most_beams = [info.get("max_num_beams") for info in told]
        self._most_beams = min(beams if isinstance(beams, int) else 1 for beams in most_beams)
        self._limits = {server: ListLimits.of(info) for server, info in zip(self._servers, told, strict=True)}
        return revisions.pop()

    def _question(self, prompt: Prompt, settings: dict[str, Any]) -> Question[Generation]:
        """What is sent for a prompt, and how the answer is read."""
        return chat_question(self._model, prompt, settings)

    def close(self) -> None:
        """Close the connections; the servers stay."""

        async def end() -> None:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:  # what other threads still wait for
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            if self._client is not None:
                await self._client.aclose()

        if self._loop.is_running():
            self._wait_for(end())
            self._loop.call_soon_threadsafe(self._loop.stop)

    def _wait_for(self, coroutine: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:  # Ctrl-C: nobody waits for the answers any more
            future.cancel()
            raise

    def _answer_all(self, questions: Sequence[Question[T]]) -> list[T]:
        async def answer_all() -> list[T]:
            import httpx

            if self._client is None:
                limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)  # _Room bounds them
                self._client = httpx.AsyncClient(headers=self._headers, timeout=self._timeout, limits=limits)
            tasks = [asyncio.create_task(self._answer(question)) for question in questions]
            try:
                return list(await asyncio.gather(*tasks))
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

        return self._wait_for(answer_all())

    async def _answer(self, question: Question[T]) -> T:
        """Ask until somebody answers."""
        reason = ""
        for attempt in range(self._retries.attempts):
            if attempt:
                longest = min(self._retries.longest_wait, self._retries.first_wait * 2 ** (attempt - 1))
                await asyncio.sleep(random.uniform(0, longest))
            answered = await self._race(question)
            if not isinstance(answered, str):
                return answered
            reason = answered
        raise EngineError(f"a prompt was not answered in {self._retries.attempts} tries; the last one: {reason}")

    async def _race(self, question: Question[T]) -> T | str:
        """Ask one server, and others too where it takes suspiciously long.

        Returns:
            The first answer; where there is none, why the last server failed.
        """
        # 1. One server. Only now is the audio put into a request: no more of them are held than are under way.
        turn: _Turn | None = await self._room.acquire()
        asked: set[str] = set()
        asked_at = time.perf_counter()
        racing: set[asyncio.Task[T | str]] = set()
        outcome: T | str = ""
        try:
            while turn or racing:
                if turn:
                    asked.add(turn.server)
                    asked_one = self._ask(turn, question)
                    racing.add(asyncio.create_task(asked_one))
                done, racing = await asyncio.wait(racing, timeout=1.0, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    outcome = task.result()
                    if not isinstance(outcome, str):
                        return outcome
                # 2. Another one, where this prompt has taken much longer than any answer did.
                usual = self._room.longest_answer
                slow = usual and time.perf_counter() - asked_at > max(1.0, self._retries.patience * usual)
                turn = self._room.take(asked) if racing and slow else None
            return outcome
        finally:
            for task in racing:
                task.cancel()
            await asyncio.gather(*racing, return_exceptions=True)

    async def _ask(self, turn: "_Turn", question: Question[T]) -> T | str:
        """Ask one server.

        Returns:
            Its answer; a text says why there is none.

        Raises:
            PromptError: It refuses the prompt.
            EngineError: It refuses us.
        """
        import httpx

        server, failed, seconds = turn.server, True, 0.0
        try:
            body = await asyncio.to_thread(question.body)
            start = time.perf_counter()
            response = await self._client.post(server + question.path, json=body)
            seconds = time.perf_counter() - start
            if response.status_code == 200:
                answer = question.read(response.json(), server, seconds)
                failed = False
                return answer
            if response.status_code not in _RETRIED:
                failed = False
                _raise_refusal(server, response)
            # A server that asks for patience works, unless it says that waiting does not help. Its room is not given to
            # others meanwhile.
            if response.status_code == 429:
                failed = False
                if "insufficient_quota" in response.text:
                    _raise_refusal(server, response)
                await asyncio.sleep(min(_seconds_to_wait(response.headers), self._retries.longest_patience))
            return f"{server} answered with status {response.status_code}: {_message(response)}"
        except PromptError:
            failed = False
            raise
        except (httpx.TransportError, httpx.DecodingError, ValueError) as error:
            return f"{server} failed: {type(error).__name__} {error}".rstrip()
        finally:
            self._room.release(turn, failed=failed, seconds=seconds)

    async def _models(self, server: str) -> list[str]:
        document = await self._get(f"{server}/v1/models")
        return [model["id"] for model in document.get("data", [])]

    async def _get(self, url: str) -> dict[str, Any]:
        import httpx

        try:
            async with httpx.AsyncClient(headers=self._headers, timeout=30) as client:
                response = await client.get(url)
            response.raise_for_status()
            document: dict[str, Any] = response.json()
        except httpx.HTTPStatusError as error:
            hint = _HINTS.get(error.response.status_code, "")
            raise EngineError(f"{url} answered with status {error.response.status_code}{hint}") from error
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            raise EngineError(f"{url} cannot be reached ({type(error).__name__}); is the server running?") from error
        return document


def _offers(offered: Sequence[str], name: str) -> bool:
    """Whether servers have a model: they list it, or it is a strength of one that they list, such as ``NAME@0.35``."""
    return name in offered or name.rpartition("@")[0] in offered


def with_scheme(server: str) -> str:
    """A server's address; one without ``http://`` or ``https://`` is taken for the first."""
    return server if "://" in server else f"http://{server}"


def _in_words(offered: Sequence[str]) -> str:
    """The models that servers list; the strengths of one stand together."""
    together: dict[str, list[str]] = {}
    for name in offered:
        model, at, _ = name.rpartition("@")
        together.setdefault(f"{model}@" if at else name, []).append(name)
    named = [names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}" for names in together.values()]
    return ", ".join(named) or "none"


@dataclass(frozen=True)
class _Turn:
    """Leave to ask a server one thing."""

    server: str
    failures_before: int


class _Room:
    """Servers with a bounded number of requests each.

    Attributes:
        longest_answer: Seconds of the answer that took longest so far.
    """

    def __init__(self, servers: Sequence[str], *, concurrency: int, given_up_after: int) -> None:
        self.longest_answer = 0.0
        self._free = dict.fromkeys(servers, concurrency)
        self._failures = dict.fromkeys(servers, 0)
        self._given_up_after = given_up_after
        self._changed = asyncio.Event()

    async def acquire(self) -> _Turn:
        """Wait for room at a server that works.

        Raises:
            EngineError: None does any more.
        """
        while True:
            if all(failures >= self._given_up_after for failures in self._failures.values()):
                raise EngineError("every server has stopped answering; restart them and resume the run")
            if turn := self.take():
                return turn
            self._changed.clear()
            await self._changed.wait()

    def take(self, but: Set[str] = frozenset()) -> _Turn | None:
        """Room at a server that works and is none of some, if there is any at the moment."""
        alive = [server for server in self._free if self._failures[server] < self._given_up_after]
        free = [server for server in alive if self._free[server] and server not in but]
        if not free:
            return None
        # The one that failed least, then the one with the most room.
        server = min(free, key=lambda server: (self._failures[server], -self._free[server]))
        self._free[server] -= 1
        return _Turn(server, self._failures[server])

    def release(self, turn: _Turn, *, failed: bool, seconds: float) -> None:
        """Give room back."""
        self._free[turn.server] += 1
        self.longest_answer = max(self.longest_answer, 0.0 if failed else seconds)
        # What was under way together and failed together failed once.
        now = self._failures[turn.server]
        self._failures[turn.server] = max(now, turn.failures_before + 1) if failed else 0
        self._changed.set()


def _seconds_to_wait(headers: Mapping[str, str]) -> float:
    """How long a server asks to be left alone: in milliseconds, in seconds or until a date; 0 where it does not say."""
    milliseconds, said = headers.get("retry-after-ms", ""), headers.get("retry-after", "")
    try:
        seconds = float(milliseconds) / 1000 if milliseconds else float(said)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(said).timestamp() - time.time()
        except ValueError:
            return 0.0
    return seconds if 0 < seconds < math.inf else 0.0


def _message(response: Any) -> str:
    """What a server says is wrong."""
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return str(response.text[:200])


def _raise_refusal(server: str, response: Any) -> NoReturn:
    """The prompt itself is at fault, or our credentials: trying again does not help."""
    message = _message(response)
    if response.status_code in (400, 413, 422):
        raise PromptError(f"{server} refuses the prompt: {message}")
    raise EngineError(f"{server} answered with status {response.status_code}: {message}")
