"""Prompts through vLLM's asynchronous engine: greedy, sampled, with Transformers' beam search, or with choices scored;
and what every request of a server must have before the engine sees it."""

import asyncio
import uuid
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from contextlib import aclosing
from functools import lru_cache
from typing import Any

from mergekit_bio.audio.clip import Clip
from mergekit_bio.engine.decoding.labels import LabelSearch, Node, Query, build_trie, longest_label
from mergekit_bio.engine.interface import Decoding, Generation
from mergekit_bio.engine.tokenization import Tokenization
from mergekit_bio.engine.vllm.beams import PromptBeams, Rollout, gave_up
from mergekit_bio.engine.vllm.dial import Dial
from mergekit_bio.engine.vllm.requests import (
    candidate_logprobs,
    continued,
    generation,
    never_generate,
    one_token,
    sampling_params,
    split_query,
)
from mergekit_bio.engine.vllm.turns import Turns
from mergekit_bio.errors import PromptError

#: One-token requests that the engine has at once for all lists of choices together: enough to keep it busy.
_QUERIES_AT_ONCE = 64
#: Of these a list has its share, or asks for so many if that is more: a short one is to be done in a few turns.
_OF_A_LIST = 4
#: Tokens of a list's choices together, at most: each may be a request.
_MOST_TOKENS = 50_000
#: Lists whose tokens are kept: all windows of an archive are asked about the same one.
_LISTS_KEPT = 8


def prepare_requests(engine: Any, dial: Dial | None, *, never: int | None, check: Callable[[Any], None] | None) -> None:
    """See to it that no request reaches a server's engine without what it needs, whichever route it came by.

    Args:
        engine: vLLM's ``EngineClient``, which all of its routes ask.
        dial: What gives a request without an adapter the default strength's. None where there are no LoRA slots.
        never: The token that no answer may hold: the audio placeholder. None where vLLM takes no biases.
        check: Raises where it objects to the grammar in a request's ``SamplingParams``; it may take a while.
    """
    generate = engine.generate

    async def prepared(prompt: Any, params: Any, *args: Any, lora_request: Any = None, **named: Any) -> Any:
        if check is not None and params.structured_outputs is not None:
            await asyncio.to_thread(check, params)
        adapter = dial[None] if dial is not None and lora_request is None else lora_request
        if never is not None:
            params = never_generate(never, params)
        async with aclosing(generate(prompt, params, *args, lora_request=adapter, **named)) as outputs:
            async for output in outputs:
                yield output

    engine.generate = prepared


async def answer(
    engine: Any,
    tokenization: Tokenization,
    *,
    prompt: str,
    clips: list[Clip],
    decoding: Decoding,
    adapter: Any = None,
) -> Generation:
    """Answer a complete prompt.

    Args:
        engine: vLLM's ``EngineClient``.
        tokenization: Of the checkpoint that it runs.
        prompt: Headers included, with a slot for each clip.
        clips: The audios.
        decoding: How to generate.
        adapter: vLLM's ``LoRARequest``, where the engine has LoRA slots.

    Raises:
        PromptError: The prompt does not fit.
        EngineError: vLLM gave it up.
    """
    loop = asyncio.get_running_loop()
    start = loop.time()
    request, length = await _request(engine, tokenization, prompt, clips, room=decoding.max_new_tokens)
    if decoding.num_beams > 1:
        beams = PromptBeams(request, decoding, tokenization)
        await _search(engine, beams, adapter)
        return beams.generation(prompt_tokens=length, seconds=loop.time() - start)
    output = await _run(engine, request, sampling_params(decoding, tokenization, seed=decoding.seed), adapter)
    return generation(output, decoding, tokenization, prompt_tokens=length, seconds=loop.time() - start)


class ChoiceScorer:
    """Scores choices as whole answers. However many lists there are, others' requests find room in the engine.

    A list of a thousand choices is thousands of requests for one token. The engine has at most so many of them at once
    that half of its batch and of a step's tokens are left. All lists share these; where there are more lists, they take
    turns.

    Args:
        engine: vLLM's ``EngineClient``.
        tokenization: Of the checkpoint that it runs.
    """

    def __init__(self, engine: Any, tokenization: Tokenization) -> None:
        self._engine, self._tokenization = engine, tokenization
        scheduler, cache = engine.vllm_config.scheduler_config, engine.vllm_config.cache_config
        # Of its prompt a request reads less than a block anew: whole ones lie in the prefix cache.
        fits = min(scheduler.max_num_seqs, scheduler.max_num_batched_tokens // cache.block_size) // 2
        self._room = max(1, min(_QUERIES_AT_ONCE, fits))
        self._turns = Turns(self._room)
        self._lists = 0  # under way
        self._trie = lru_cache(_LISTS_KEPT)(self._make_trie)

    async def scores(
        self, *, prompt: str, clips: list[Clip], choices: Sequence[str], negligible: float, adapter: Any = None
    ) -> tuple[dict[str, float], int]:
        """How likely each choice is as the whole answer to a complete prompt.

        Args:
            prompt: Headers included, with a slot for each clip.
            clips: The audios.
            choices: The answers to score.
            negligible: As for :meth:`mergekit_bio.engine.interface.Engine.loglikelihood`.
            adapter: vLLM's ``LoRARequest``, where the engine has LoRA slots.

        Returns:
            Choice -> natural log-probability, as :meth:`mergekit_bio.engine.interface.Engine.loglikelihood` has it; and
            the prompt's length in tokens.

        Raises:
            PromptError: The prompt does not fit, or the choices are too long.
            EngineError: A choice is empty, two are the same tokens, or vLLM gave it up.
        """
        root, longest = await asyncio.to_thread(self._trie, tuple(choices))
        request, length = await _request(self._engine, self._tokenization, prompt, clips, room=longest + 1)
        ends = self._tokenization.eos_token_ids

        had = 0

        async def ask(node: Node) -> list[float]:
            nonlocal had
            logprobs: list[float] = []
            for query in split_query(Query(0, node.tokens, node.candidates(ends))):
                params = one_token(logprob_token_ids=list(query.candidates))
                had += 1
                async with self._turns.turn(had):
                    output = await _run(self._engine, continued(request, query.tokens), params, adapter)
                logprobs += candidate_logprobs(query, output)
            return logprobs

        search = LabelSearch(root, ends, negligible)
        self._lists += 1
        try:
            while nodes := search.next():
                # The root alone: it puts the prompt into vLLM's prefix cache, where all others find it.
                alone = nodes[:1] if nodes[0] is root else []
                answers = [await ask(node) for node in alone]
                answers += await self._ask_together(ask, nodes[len(alone) :])
                for node, logprobs in zip(nodes, answers, strict=True):
                    search.take(node, logprobs)
        finally:
            self._lists -= 1
        return search.scores(choices), length

    def _make_trie(self, choices: tuple[str, ...]) -> tuple[Node, int]:
        """The trie of a list, and how many tokens its longest choice has."""
        left = _MOST_TOKENS

        def encode(choice: str) -> list[int]:
            nonlocal left
            tokens = self._tokenization.encode(choice)
            left -= len(tokens)
            if left < 0:
                raise PromptError(f"the choices together are longer than {_MOST_TOKENS} tokens")
            return tokens

        root = build_trie(choices, encode)
        return root, longest_label(root)

    async def _ask_together(
        self, ask: Callable[[Node], Coroutine[Any, Any, list[float]]], nodes: Sequence[Node]
    ) -> list[list[float]]:
        """Ask about places, a few at once: what all lists together want must not be a long queue."""
        answers: dict[Node, list[float]] = {}
        running: dict[asyncio.Task[list[float]], Node] = {}
        waiting = deque(nodes)
        try:
            while waiting or running:
                while waiting and len(running) < max(_OF_A_LIST, self._room // self._lists):
                    node = waiting.popleft()
                    running[asyncio.create_task(ask(node))] = node
                done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    answers[running.pop(task)] = task.result()
        finally:  # one has failed, or the client has left
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
        return [answers[node] for node in nodes]


async def _request(
    engine: Any, tokenization: Tokenization, prompt: str, clips: list[Clip], *, room: int
) -> tuple[dict[str, Any], int]:
    """A complete prompt in vLLM's form, and its length in tokens, audio included; ``room`` tokens are to follow."""
    ids = await asyncio.to_thread(tokenization.processor.tokenize, prompt)
    length = tokenization.prompt_length(ids, clips)
    limit = engine.model_config.max_model_len
    if length + room > limit:
        raise PromptError(f"the prompt is {length} tokens long and {room} are to follow, but the server takes {limit}")
    request: dict[str, Any] = {"prompt_token_ids": ids}
    if clips:
        request["multi_modal_data"] = {"audio": list(clips)}
    return request, length


async def _search(engine: Any, beams: PromptBeams, adapter: Any) -> None:
    """Run a beam search; when the client goes away, vLLM is told to drop all its requests."""
    tasks: dict[Rollout, asyncio.Task[None]] = {}

    async def follow(rollout: Rollout) -> None:
        # Closed where the search has left it, vLLM's stream drops the request.
        outputs_of = engine.generate(rollout.request, rollout.params, rollout.request_id, lora_request=adapter)
        async with aclosing(outputs_of) as outputs:
            async for output in outputs:
                forks, abandoned = beams.take(rollout, output)
                for other in abandoned:
                    if other is not rollout:
                        tasks.pop(other).cancel()
                for fork in forks:
                    tasks[fork] = group.create_task(follow(fork))
                if rollout in abandoned:
                    return

    try:
        async with asyncio.TaskGroup() as group:
            for rollout in beams.rollouts:
                tasks[rollout] = group.create_task(follow(rollout))
    except ExceptionGroup as failures:
        # One request failed, and the others were dropped.
        raise failures.exceptions[0] from None


async def _run(engine: Any, request: dict[str, Any], params: Any, adapter: Any) -> Any:
    """Drain one request; when the client goes away, vLLM is told to drop it."""
    output = None
    async for partial in engine.generate(request, params, f"predict-{uuid.uuid4().hex}", lora_request=adapter):
        output = partial
    if output is None or output.outputs[0].finish_reason == "abort":  # its answer may have no token
        raise gave_up()
    return output
