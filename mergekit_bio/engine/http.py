"""Any number of servers as one engine: prompts over OpenAI's chat API, to whoever has room."""

import asyncio
import base64
import io
import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, NoReturn, Self

from mergekit_bio.audio.clip import Clip
from mergekit_bio.audio.prompt import render_prompt
from mergekit_bio.engine.interface import (
    Decoding,
    EngineSettings,
    Generation,
    Prompt,
    check_options,
)
from mergekit_bio.errors import EngineError, MissingPackageError, PromptError

#: Answers that another try, or another server, may better.
_RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504})


@dataclass(frozen=True)
class Retries:
    """How to deal with servers that fail.

    Attributes:
        attempts: Tries a prompt gets, on whichever servers.
        first_wait: Seconds before the second try; doubled from then on, and drawn at random below that.
        longest_wait: Seconds at most.
        given_up_after: Failures in a row after which a server is left alone for good.
    """

    attempts: int = 8
    first_wait: float = 0.5
    longest_wait: float = 30.0
    given_up_after: int = 5


class HttpEngine:
    """Servers of ``mergekit-bio serve``, which put a text's ``<AudioHere>`` slots and its audios together.

    Every server has a bounded number of requests under way; the next prompt goes to the server with the most room. A
    prompt whose server fails is tried again, elsewhere if there is an elsewhere.

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
    prompts_at_once: ClassVar = 64
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
        concurrency: int = 32,
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
        self._servers = [server.rstrip("/").removesuffix("/v1") for server in servers]
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._concurrency, self._timeout, self._retries = concurrency, timeout, retries or Retries()
        offered = [asyncio.run(self._models(server)) for server in self._servers]
        common = [name for name in offered[0] if all(name in names for names in offered)]
        if model is not None and model not in common:
            raise EngineError(
                f"not every server offers the model {model}; in common are: {', '.join(common) or 'none'}"
            )
        if not common:
            raise EngineError(f"the servers {', '.join(self._servers)} have no model in common")
        self._model = model or common[0]
        self._offered = common
        self._template = "{}"

    def render(self, prompt: Prompt) -> str:
        """The prompt in the template that the servers tell, else the user's words alone."""
        return render_prompt(prompt.text, template=self._template, num_audios=len(prompt.audios))

    def generate(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[Generation]:
        """Answer prompts, over all servers at once.

        Raises:
            EngineError: Beams or end tokens are asked for, which the API does not have, or no server answers any more.
            PromptError: A server refuses a prompt.
        """
        if decoding.num_beams > 1:
            raise EngineError("servers do not search with beams over OpenAI's API; take num_beams 1, or --engine vllm")
        if decoding.eos_token_ids is not None:
            raise EngineError("servers end with the end tokens of their own model; leave eos_token_ids out")
        bodies = [
            self._body(prompt)
            | {
                "max_tokens": decoding.max_new_tokens,
                "temperature": decoding.temperature,
                "top_p": decoding.top_p,
                **({"top_k": decoding.top_k} if decoding.top_k else {}),
                "seed": decoding.seed + n,
            }
            for n, prompt in enumerate(prompts)
        ]
        return asyncio.run(self._answer_all(bodies))

    def choose(self, prompts: Sequence[Prompt], labels: Sequence[str]) -> list[Generation]:
        """Answer each prompt with one of the labels; the server constrains the answer.

        It lets through any tokens that spell a label, where the other engines take the label's own, so between close
        labels another one may win. Its log-probabilities are those of the tokens among the whole vocabulary.
        """
        longest = max((len(label.encode()) for label in labels), default=0)
        bodies = [
            self._body(prompt)
            | {"max_tokens": longest + 1, "temperature": 0.0, "structured_outputs": {"choice": list(labels)}}
            for prompt in prompts
        ]
        return asyncio.run(self._answer_all(bodies))

    def loglikelihood(self, prompts: Sequence[Prompt], labels: Sequence[str]) -> list[dict[str, float]]:
        """OpenAI's chat API does not score given answers: raises EngineError."""
        raise EngineError("the http engine has no label scores; take --engine vllm or --engine transformers")

    def load(self, checkpoint: str | Path) -> str:
        """Ask the servers for another of the models they offer, by its directory's name.

        The servers check what they load; what is returned is their ``model_revision`` and not a hash of weights.
        """
        name = Path(checkpoint).name
        if name not in self._offered:
            raise EngineError(f"the servers do not offer {name}; start them with: mergekit-bio serve ... {checkpoint}")
        told = [asyncio.run(self._get(f"{server}/{name}/info")) for server in self._servers]
        revisions = {str(info.get("model_revision")) for info in told}
        if len(revisions) > 1:
            raise EngineError(f"the servers have different checkpoints called {name}; serve the same one everywhere")
        templates = {str(info.get("prompt_template")) for info in told}
        template = templates.pop() if len(templates) == 1 else ""
        self._model, self._template = name, template if template.count("{}") == 1 else "{}"
        return revisions.pop()

    def close(self) -> None:
        """Nothing to free: the servers stay."""

    def _body(self, prompt: Prompt) -> dict[str, Any]:
        audios = [{"type": "audio_url", "audio_url": {"url": _url(clip)}} for clip in prompt.audios]
        text = render_prompt(prompt.text, template="{}", num_audios=len(audios))
        content = [{"type": "text", "text": text}, *audios] if audios else text
        return {
            "model": self._model,
            "messages": [{"role": "user", "content": content}],
            "logprobs": True,
            "return_token_ids": True,
        }

    async def _answer_all(self, bodies: list[dict[str, Any]]) -> list[Generation]:
        import httpx

        pool = _Pool(self._servers, concurrency=self._concurrency, given_up_after=self._retries.given_up_after)
        limits = httpx.Limits(max_connections=self._concurrency * len(self._servers))
        async with httpx.AsyncClient(headers=self._headers, timeout=self._timeout, limits=limits) as client:
            tasks = [asyncio.create_task(self._answer(client, pool, body)) for body in bodies]
            try:
                return list(await asyncio.gather(*tasks))
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _answer(self, client: Any, pool: "_Pool", body: dict[str, Any]) -> Generation:
        import httpx

        reason = ""
        for attempt in range(self._retries.attempts):
            if attempt:
                longest = min(self._retries.longest_wait, self._retries.first_wait * 2 ** (attempt - 1))
                await asyncio.sleep(random.uniform(0, longest))
            server, failures_before = await pool.acquire()
            failed = True
            try:
                start = time.perf_counter()
                response = await client.post(f"{server}/v1/chat/completions", json=body)
                seconds = time.perf_counter() - start
                if response.status_code == 200:
                    generation = _generation(response.json(), seconds)
                    failed = False
                    return generation
                if response.status_code not in _RETRIED:
                    failed = False
                    _raise_refusal(server, response)
                reason = f"{server} answered with status {response.status_code}"
            except (httpx.TransportError, httpx.DecodingError, ValueError) as error:
                reason = f"{server} failed: {type(error).__name__} {error}".rstrip()
            finally:
                pool.release(server, failures_before, failed=failed)
        raise EngineError(f"a prompt was not answered in {self._retries.attempts} tries; the last one: {reason}")

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
            hint = "; give its --api-key" if error.response.status_code == 401 else ""
            raise EngineError(f"{url} answered with status {error.response.status_code}{hint}") from error
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            raise EngineError(f"{url} cannot be reached ({type(error).__name__}); is the server running?") from error
        return document


class _Pool:
    """Servers with a bounded number of requests each."""

    def __init__(self, servers: Sequence[str], *, concurrency: int, given_up_after: int) -> None:
        self._room = dict.fromkeys(servers, concurrency)
        self._failures = dict.fromkeys(servers, 0)
        self._given_up_after = given_up_after
        self._changed = asyncio.Condition()
        self._notifying: set[asyncio.Task[None]] = set()

    async def acquire(self) -> tuple[str, int]:
        """Wait for room at a server that works.

        Returns:
            The server and its failures in a row until now; both are for :meth:`release`.

        Raises:
            EngineError: None does any more.
        """
        async with self._changed:
            while True:
                alive = [server for server in self._room if self._failures[server] < self._given_up_after]
                if not alive:
                    raise EngineError("every server has stopped answering; restart them and resume the run")
                if free := [server for server in alive if self._room[server]]:
                    # The one that failed least, then the one with the most room.
                    best = min(free, key=lambda server: (self._failures[server], -self._room[server]))
                    self._room[best] -= 1
                    return best, self._failures[best]
                await self._changed.wait()

    def release(self, server: str, failures_before: int, *, failed: bool) -> None:
        """Give room back."""
        self._room[server] += 1
        # What was under way together and failed together failed once.
        self._failures[server] = max(self._failures[server], failures_before + 1) if failed else 0
        task = asyncio.get_running_loop().create_task(self._notify())
        self._notifying.add(task)  # or it might be collected before it ran
        task.add_done_callback(self._notifying.discard)

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()


def _raise_refusal(server: str, response: Any) -> NoReturn:
    """The prompt itself is at fault, or our credentials: trying again does not help."""
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = response.text[:200]
    if response.status_code in (400, 413, 422):
        raise PromptError(f"{server} refuses the prompt: {message}")
    raise EngineError(f"{server} answered with status {response.status_code}: {message}")


def _generation(document: dict[str, Any], seconds: float) -> Generation:
    """Read a completion.

    Raises:
        ValueError: It is none.
    """
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


def _url(clip: Clip) -> str:
    """A prepared clip as a ``data:`` URL of a file that loses nothing (64-bit floats).

    A server of ours would take it for the beginning of 10 s; the parameter says how long the clip is. Another server
    passes over the parameter and hears the clip as it is here: cut and padded.
    """
    import soundfile

    from mergekit_bio.audio.config import SAMPLING_RATE

    file = io.BytesIO()
    soundfile.write(file, clip.waveform.numpy(), SAMPLING_RATE, format="WAV", subtype="DOUBLE")
    data = base64.b64encode(file.getvalue()).decode()
    return f"data:audio/wav;seconds={clip.seconds};base64,{data}"
