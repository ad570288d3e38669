"""Prompts through vLLM's asynchronous engine: greedy, sampled, or with Transformers' beam search; and what every
request of a server must have before the engine sees it."""

import asyncio
import uuid
from collections.abc import Callable, Sequence
from contextlib import aclosing
from typing import Any

from mergekit_bio.audio.clip import Clip
from mergekit_bio.engine.decoding.choices import NEGLIGIBLE
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
from mergekit_bio.errors import PromptError

#: One-token requests of a list of choices that the engine has at once: a long list leaves room for others.
_QUERIES_AT_ONCE = 32


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


async def score_choices(
    engine: Any,
    tokenization: Tokenization,
    *,
    prompt: str,
    clips: list[Clip],
    choices: Sequence[str],
    adapter: Any = None,
) -> tuple[dict[str, float], int]:
    """How likely each choice is as the whole answer to a complete prompt.

    Those that all together are of no account are left out: they get minus infinity.

    Args:
        engine: vLLM's ``EngineClient``.
        tokenization: Of the checkpoint that it runs.
        prompt: Headers included, with a slot for each clip.
        clips: The audios.
        choices: Two or more.
        adapter: vLLM's ``LoRARequest``, where the engine has LoRA slots.

    Returns:
        Choice -> natural log-probability, as :meth:`mergekit_bio.engine.interface.Engine.loglikelihood` has it; and the
        prompt's length in tokens.

    Raises:
        PromptError: The prompt does not fit.
        EngineError: Two choices are the same tokens, or vLLM gave it up.
    """
    root = build_trie(choices, tokenization.encode)
    request, length = await _request(engine, tokenization, prompt, clips, room=longest_label(root) + 1)
    few = asyncio.Semaphore(_QUERIES_AT_ONCE)

    async def ask(node: Node) -> list[float]:
        logprobs = []
        for query in split_query(Query(0, node.tokens, node.candidates(tokenization.eos_token_ids))):
            params = one_token(logprob_token_ids=list(query.candidates))
            async with few:
                output = await _run(engine, continued(request, query.tokens), params, adapter)
            logprobs += candidate_logprobs(query, output)
        return logprobs

    search = LabelSearch(root, tokenization.eos_token_ids, NEGLIGIBLE)
    while nodes := search.next():
        for node, logprobs in zip(nodes, await asyncio.gather(*map(ask, nodes)), strict=True):
            search.take(node, logprobs)
    return search.scores(choices), length


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
